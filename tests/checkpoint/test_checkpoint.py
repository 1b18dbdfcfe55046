"""A saved model against the model in memory, read by the package in a fresh process and by an independent reader."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from independent_reader import read_dense
from models_for_tests import FAMILIES, HIDDEN, PROMISED, VOCAB, make_batches, make_model, make_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import sgpt_lightning.checkpoint.save
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.models.names import resolve_model
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.float16
RECIPES = {
    "mixed-widths": Recipe(sparsity=0.5, target_avg_bits=3.5),
    "pattern": Recipe(pattern="2:4", target_avg_bits=4.0, allocation="quantile"),
    "quantized": Recipe(sparsity=0.0, target_avg_bits=3, allocation="uniform"),
    "row-widths": Recipe(sparsity=0.0, target_avg_bits=3.5, uniform_if_better=False),
    "groups": Recipe(sparsity=0.0, target_avg_bits=3.5, allocation="loss", group_size=12, uniform_if_better=False),
    "channel-widths": Recipe(target_avg_bits=3.5, allocation="loss", uniform_if_better=False),
    "one-bit": Recipe(target_avg_bits=1.5, widths=(1, 2, 4)),
    "low-sparsity": Recipe(preset="sparsegpt", sparsity=0.05, target_avg_bits=3),
    "pruned": Recipe(sparsity=0.5, target_avg_bits=None),
    "pruned-pattern": Recipe(pattern="3:4", target_avg_bits=None),
    "partly": Recipe(sparsity=0.5, ignore=["*.1.*"]),
    "coded": Recipe(coding="entropy", target_bits_per_weight=5.0),
}
PROBE = make_tokens(2, 10, seed=99)


def save(directory: Path, family: str, recipe: str = "mixed-widths", **overrides) -> tuple[PreTrainedModel, Manifest]:
    model = make_model(family, **overrides)
    solved = compress(model, make_batches(2), RECIPES[recipe], storage_dtype=HALF)
    return model, save_compressed(directory, model, solved, storage_dtype=HALF)


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def test_a_fresh_process_computes_the_same_logits_bit_for_bit(tmp_path):
    families = ["opt", "llama", "gpt2"]
    expected = {family: logits(save(tmp_path / family, family)[0]) for family in families}
    torch.save(PROBE, tmp_path / "probe.pt")
    script = """
import sys, torch
from pathlib import Path
from sgpt_lightning.checkpoint.load import load_compressed
torch.set_num_threads(1)
root, *families = sys.argv[1:]
probe = torch.load(Path(root, "probe.pt"))
with torch.no_grad():
    torch.save({f: load_compressed(Path(root, f))(input_ids=probe).logits for f in families}, Path(root, "logits.pt"))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script, tmp_path, *families], check=True, timeout=120)
    found = torch.load(tmp_path / "logits.pt")
    assert all(torch.equal(found[family], expected[family]) for family in families)


@pytest.mark.parametrize("family", ["opt", *(family for family in FAMILIES if family not in PROMISED)])
def test_every_family_comes_back_with_the_same_logits_and_no_global_state_moved(family, tmp_path):
    model, _ = save(tmp_path / "out", family)
    generator, default_dtype = torch.get_rng_state(), torch.get_default_dtype()
    loaded = load_compressed(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), generator)  # though the model was initialized at random first
    assert torch.get_default_dtype() == default_dtype
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_16_bits_comes_back_in_its_own_dtype(dtype, tmp_path):
    model = make_model("opt").to(dtype)
    solved = compress(model, make_batches(2), RECIPES["mixed-widths"])
    save_compressed(tmp_path / "out", model, solved, storage_dtype=dtype)
    loaded = load_compressed(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert load_compressed(tmp_path / "out", dtype="float32").dtype == torch.float32


def test_dtype_and_attention_are_those_of_the_evaluation_unless_told_otherwise(tmp_path):
    model = make_model("opt", attn_implementation="eager").to(torch.bfloat16)
    solved = compress(model, make_batches(1), RECIPES["pruned"])
    save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.bfloat16)
    loaded = load_compressed(tmp_path / "out")
    assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")
    told = load_compressed(tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa")
    assert (told.dtype, told.config._attn_implementation) == (torch.float32, "sdpa")


def test_generation_settings_come_back(tmp_path):
    model = make_model("opt")
    settings = {"max_new_tokens": 7, "do_sample": True, "top_k": 3, "temperature": 0.5, "eos_token_id": [2, 5]}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    solved = compress(model, make_batches(1), RECIPES["pruned"])
    save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    loaded = load_compressed(tmp_path / "out").generation_config
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.to_dict() == model.generation_config.to_dict()
    model.generation_config.do_sample = False  # a temperature without sampling: published models have it
    save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    assert load_compressed(tmp_path / "out").generation_config.temperature == 0.5


def test_a_loaded_model_is_a_plain_one_that_transformers_saves_and_loads(tmp_path):
    model, _ = save(tmp_path / "out", "llama")
    loaded = load_compressed(tmp_path / "out")
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", local_files_only=True)
    assert torch.equal(logits(dense), logits(model))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_with_nan_or_infinite_values_is_refused_and_all_of_them_are_named(value, tmp_path):
    model = make_model("opt")
    solved = compress(model, make_batches(1), RECIPES["mixed-widths"], storage_dtype=HALF)
    fc1 = "model.decoder.layers.0.fc1"
    solved[fc1].packed.tensors["weight_range"][3] = value
    model.model.decoder.final_layer_norm.weight[0] = value
    named = rf"NaN or infinite.*{fc1}\.weight_range.*final_layer_norm\.weight|final_layer_norm\.weight.*weight_range"
    with pytest.raises(ValueError, match=named):
        save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_a_reader_written_from_the_description_finds_the_same_weights(family, recipe, tmp_path):
    model, manifest = save(tmp_path / "out", family, recipe)
    assert_independent_reader_agrees(tmp_path / "out", model)
    layouts = {report["layout"] for report in manifest.linears.values()}
    expected = {"pattern": "pattern", "pruned-pattern": "pattern", "quantized": "dense", "low-sparsity": "dense"}
    expected |= {"row-widths": "dense", "groups": "dense", "coded": "coded"}
    assert layouts == {expected.get(recipe, "bitmap")}


def test_the_embedded_model_is_read_by_the_independent_reader(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(resolve_model("opt-mini"), dtype=torch.float32, local_files_only=True)
    recipe = Recipe(preset="sparsegpt", sparsity=0.5, target_avg_bits=3.0)
    solved = compress(model.eval().requires_grad_(False), make_batches(2, batch=1, time=32), recipe, storage_dtype=HALF)
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    assert_independent_reader_agrees(tmp_path / "out", model)
    # 3 bits for half of the weights, 1 bit of mask for all, and less than a tenth of a bit for ranges and widths
    assert 2.45 < manifest.ledger.linear_bits_per_weight < 2.6
    assert manifest.ledger.file < 0.6 * Path(resolve_model("opt-mini"), "model.safetensors").stat().st_size


def assert_independent_reader_agrees(directory: Path, model: PreTrainedModel) -> None:
    tensors, linears = read_dense(directory)
    with torch.random.fork_rng():
        other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    for name in linears:
        if isinstance(other.get_submodule(name), Conv1D):  # which holds its weight transposed
            state[f"{name}.weight"] = state[f"{name}.weight"].T
    tables = {name: state.pop(name) for name in state.keys() - other.state_dict().keys()}
    assert all(torch.equal(table, model.get_buffer(name)) for name, table in tables.items())
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "phi"])
def test_the_ledger_adds_up_to_the_file_on_disk(family, recipe, tmp_path):
    model, manifest = save(tmp_path / "out", family, recipe)
    ledger = manifest.ledger
    assert ledger.linears + ledger.embeddings + ledger.other + ledger.headers == ledger.file
    assert ledger.file == (tmp_path / "out" / "sgpt.safetensors").stat().st_size
    sizes = {"linears": 0, "embeddings": 0, "other": 0}
    embeddings = ("embed_tokens.weight", "embed_positions.weight", "wte.weight", "wpe.weight", "lm_head.weight")
    for name, tensor in stored_tensors(tmp_path / "out").items():
        in_block = any(part in name for part in ("attn.", "mlp.", ".fc1.", ".fc2.")) and not name.endswith(".bias")
        embedding = name.endswith((*embeddings, "lm_head.bias"))
        sizes["linears" if in_block else "embeddings" if embedding else "other"] += tensor.nbytes
    assert (ledger.linears, ledger.embeddings, ledger.other) == tuple(sizes.values())
    assert ledger.parameters == model.num_parameters()
    assert Manifest.read(tmp_path / "out").ledger == ledger


def test_bits_per_weight_count_every_stored_byte_of_the_linears(tmp_path):
    ledger = save(tmp_path / "out", "opt", "quantized")[1].ledger
    per_block = 4 * 32 * 32 + 2 * 32 * 64
    assert ledger.linear_weights == 2 * per_block
    ranges = 2 * (5 * 32 + 64) * (2 + 2)  # a float16 range and a float16 offset per row
    assert ledger.linears == 2 * per_block * 3 // 8 + ranges
    assert ledger.linear_bits_per_weight == 8 * ledger.linears / (2 * per_block)
    assert ledger.file_bits_per_weight == 8 * ledger.file / ledger.parameters


def test_a_tied_head_is_stored_once_and_an_untied_one_beside_the_embedding(tmp_path):
    def of_vocabulary(name: str) -> list[str]:
        return sorted(key for key, tensor in stored_tensors(tmp_path / name).items() if tensor.shape == (VOCAB, HIDDEN))

    def aliases(name: str) -> dict[str, str]:
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["aliases"]

    save(tmp_path / "opt", "opt")
    assert of_vocabulary("opt") == ["model.decoder.embed_tokens.weight"]
    assert aliases("opt") == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    loaded = load_compressed(tmp_path / "opt")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    save(tmp_path / "llama", "llama")
    assert of_vocabulary("llama") == ["lm_head.weight", "model.embed_tokens.weight"]
    assert aliases("llama") == {}


def test_what_is_not_compressed_is_stored_in_16_bits_only_where_that_loses_nothing(tmp_path):
    model = make_model("llama")
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.half())
    model.model.norm.weight.fill_(70_000)  # past the end of float16
    solved = compress(model, make_batches(2), RECIPES["pruned"], storage_dtype=HALF)
    save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    dtypes = {name: tensor.dtype for name, tensor in stored_tensors(tmp_path / "out").items()}
    assert dtypes["model.embed_tokens.weight"] == HALF
    assert dtypes["lm_head.weight"] == torch.float32
    assert dtypes["model.norm.weight"] == torch.float32
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))


def test_a_large_model_is_sharded_with_a_correct_index(tmp_path, monkeypatch):
    monkeypatch.setattr(sgpt_lightning.checkpoint.save, "MAX_SHARD_SIZE", "20KB")
    model, manifest = save(tmp_path / "out", "llama")
    index = json.loads((tmp_path / "out" / "sgpt.safetensors.index.json").read_text())
    held = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert len(set(held.values())) > 2
    assert index["weight_map"] == held
    assert set(manifest.weight_files) == set(held.values())
    assert {*manifest.files, "sgpt_manifest.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(tmp_path / "out").values())
    assert manifest.ledger.file == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))
    assert_independent_reader_agrees(tmp_path / "out", model)
    monkeypatch.undo()
    save(tmp_path / "out", "llama")
    assert [path.name for path in (tmp_path / "out").glob("sgpt*.safetensors*")] == ["sgpt.safetensors"]
