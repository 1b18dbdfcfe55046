"""An export against the model it came from: read by programs that never heard of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import make_batches, make_model, make_tokens
from readme_runs import run_main
from runs_for_tests import make_dense_directory
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.export import export
from sgpt_lightning.export.export import export_model
from sgpt_lightning.export.summary import summary
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.float16
CODED = Recipe(coding="entropy", target_bits_per_weight=4.0)
PROBE = make_tokens(2, 10, seed=99)
DENSE = {
    "opt": CODED,
    "llama": Recipe(sparsity=0.5, target_avg_bits=3.5),
    "gpt2": Recipe(preset="gptq", target_avg_bits=3),
    "mpt": CODED,
}
"""Recipes of models that are exported dense, by family."""
INTEGERS = {
    "three-bits": ("llama", Recipe(preset="gptq", target_avg_bits=3)),
    "rows": ("opt", Recipe(preset="gptq", target_avg_bits=4.5, allocation="rows", uniform_if_better=False)),
    "groups": ("llama", Recipe(preset="gptq", target_avg_bits=4, group_size=16)),
    "zeros": ("qwen2", Recipe(preset="sparsegpt", sparsity=0.5, target_avg_bits=4)),
    "eight": ("mistral", Recipe(preset="gptq", target_avg_bits=6)),
    "partly": ("llama", Recipe(preset="gptq", target_avg_bits=3, ignore=["*.0.*.k_proj", "*.1.*.down_proj"])),
}
"""Families and recipes of models whose linears compressed-tensors holds."""
SCRIPT = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root = Path(sys.argv[1])
probe, found = torch.load(root / "probe.pt"), {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        found[path] = model(probe).logits
assert not [module for module in sys.modules if module.startswith("sgpt_lightning")]
torch.save(found, root / "logits.pt")
"""


def compressed(directory: Path, family: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Path:
    model = make_model(family).to(dtype)
    save_compressed(directory, model, compress(model, make_batches(2), recipe, storage_dtype=HALF), storage_dtype=HALF)
    return directory


@pytest.fixture(scope="module")
def coded(tmp_path_factory) -> Path:
    return compressed(tmp_path_factory.mktemp("export") / "coded", "opt", CODED)


@pytest.fixture(scope="module")
def integers(tmp_path_factory) -> dict[str, Path]:
    """Models that compressed-tensors can hold, compressed."""
    root = tmp_path_factory.mktemp("integers")
    return {name: compressed(root / name, *case) for name, case in INTEGERS.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE).logits


def test_plain_transformers_computes_the_same_logits_in_a_process_of_its_own(integers, tmp_path):
    sources = {family: compressed(tmp_path / family, family, recipe) for family, recipe in DENSE.items()}
    outputs = {str(tmp_path / f"{name}-out"): source for name, source in (sources | integers).items()}
    for output, source in outputs.items():
        export_model(source, output, "compressed-tensors" if source in integers.values() else "dense-hf")
    torch.save(PROBE, tmp_path / "probe.pt")
    command = [sys.executable, "-c", SCRIPT, tmp_path, *outputs]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, timeout=120, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    for output, source in outputs.items():
        assert torch.equal(found[output], logits(load_compressed(source))), output


def test_a_plain_directory_is_the_dense_model_with_its_zeros_tokenizer_and_generation_settings(tmp_path):
    source = make_dense_directory(tmp_path / "dense")
    model = load_model(str(source))
    model.generation_config.temperature = 0.5  # without sampling: transformers would refuse to save it
    solved = compress(model, make_batches(2), Recipe(sparsity=0.5, target_avg_bits=4), storage_dtype=HALF)
    tokenizer = load_tokenizer("opt-mini")
    save_compressed(tmp_path / "small", model, solved, storage_dtype=HALF, tokenizer=tokenizer)
    done = export_model(tmp_path / "small", tmp_path / "plain")
    assert not done.notes
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not list((tmp_path / "plain").glob("sgpt*"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.float32
    assert plain.generation_config.temperature == 0.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    zeros = [float((weight == 0).float().mean()) for name, weight in plain.named_parameters() if "fc1.weight" in name]
    assert zeros == pytest.approx([0.5] * len(zeros), abs=0.01)
    text = "import os\n"
    assert load_tokenizer(str(tmp_path / "plain"))(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_one_file_holds_every_name_and_tied_ones_once(coded, tmp_path):
    done = export_model(coded, tmp_path / "deep/model.safetensors", "state-dict")
    model = load_compressed(coded)
    stored = load_file(tmp_path / "deep/model.safetensors")
    assert model.state_dict().keys() - stored.keys() == {"lm_head.weight"}
    assert all(torch.equal(stored[name], model.state_dict()[name]) for name in stored)
    with safe_open(tmp_path / "deep/model.safetensors", "pt") as file:
        assert file.metadata()["lm_head.weight"] == "model.decoder.embed_tokens.weight"
    assert done.bytes == (tmp_path / "deep/model.safetensors").stat().st_size
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "deep/model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_that_changes_values_is_refused_with_their_number_unless_asked(dtype, coded, tmp_path):
    exact = [tensor.double() for tensor in load_compressed(coded, dtype="float32").parameters()]
    changed = sum(int((tensor.to(getattr(torch, dtype)).double() != tensor).sum()) for tensor in exact)
    total = sum(tensor.numel() for tensor in exact)
    assert 0 < changed < total
    with pytest.raises(ValueError, match=rf"{dtype} would change {changed:,} of {total:,} values.*--lossy"):
        export_model(coded, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    done = export_model(coded, tmp_path / "out", dtype=dtype, lossy=True)
    assert done.rounded == changed
    assert f"{changed:,} values were rounded to {dtype}" in summary(done)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(load_compressed(coded, dtype=dtype)))


def test_the_dtype_of_evaluation_is_taken_as_it_is_and_float32_holds_more(tmp_path):
    source = compressed(tmp_path / "half", "opt", CODED, torch.float16)
    assert export_model(source, tmp_path / "out").dtype == torch.float16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(load_compressed(source)))
    export_model(source, tmp_path / "exact", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    assert torch.equal(logits(plain), logits(load_compressed(source, dtype=torch.float32)))


def test_integers_in_16_bits_are_refused_with_the_dtype_that_holds_them(tmp_path):
    source = compressed(tmp_path / "half", "opt", Recipe(preset="gptq", target_avg_bits=4), torch.float16)
    with pytest.raises(
        ValueError, match="12 because some of its rows have no exact scale in float16, which the dtype float32"
    ):
        export_model(source, tmp_path / "out", "compressed-tensors")
    done = export_model(source, tmp_path / "out", "compressed-tensors", dtype="float32")
    assert len(done.integer_bits) == 12


def test_rounded_tables_that_other_programs_compute_anew_are_named(tmp_path):
    source = compressed(tmp_path / "half", "llama", CODED, torch.float16)
    assert "note: 1 tables" in summary(export_model(source, tmp_path / "out")).replace("2 tables", "1 tables")


# ------------------------------------------------------------------------------------------------ what stays in the way


@pytest.mark.parametrize("kind", ["dense-hf", "state-dict"])
def test_nothing_that_exists_is_replaced_not_even_the_model_itself(kind, coded, tmp_path):
    before = {path.name: path.read_bytes() for path in coded.iterdir()}
    (tmp_path / "file").write_text("mine")
    for place in (coded, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists already"):
            export_model(coded, place, kind)
    assert {path.name: path.read_bytes() for path in coded.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["dense-hf", "state-dict"])
def test_an_export_that_fails_leaves_nothing_behind(kind, coded, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_file", lambda path: {"other": torch.zeros(1)})
    with pytest.raises(OSError, match="did not read back as it was written"):
        export_model(coded, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named_before_anything_is_written(coded, tmp_path):
    with pytest.raises(ValueError, match="format must be one of dense-hf, compressed-tensors, state-dict"):
        export_model(coded, tmp_path / "out", "gguf")
    with pytest.raises(ValueError, match="dtype must be a floating-point"):
        export_model(coded, tmp_path / "out", dtype="int8")
    with pytest.raises(CheckpointError, match="is not a compressed model"):
        export_model(tmp_path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="is a directory: name a file"):
        export_model(coded, tmp_path, "state-dict")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_says_what_it_cost(integers, coded, tmp_path):
    printed = run_main("export", integers["partly"], tmp_path / "out", "--format", "compressed-tensors").out
    rows = {cells[1].strip(): cells[4].strip() for cells in (line.split("|") for line in printed.splitlines()[2:6])}
    assert rows == {
        "model.layers.0.self_attn.k_proj": "was not compressed",
        "model.layers.0.self_attn.q_proj": "read as one with model.layers.0.self_attn.k_proj, which stays dense",
        "model.layers.0.self_attn.v_proj": "read as one with model.layers.0.self_attn.k_proj, which stays dense",
        "model.layers.1.mlp.down_proj": "was not compressed",
    }
    assert "linears as integers: 10 at 4 bits; dense: 4" in printed
    size = (tmp_path / "out/model.safetensors").stat().st_size
    price = size - (integers["partly"] / "sgpt.safetensors").stat().st_size
    assert f"{tmp_path / 'out'}: weights {size / 1e6:.2f} MB in float32, {price:+,} bytes against" in printed
    refused = run_main("export", coded, tmp_path / "no", "--format", "compressed-tensors", status=2).err
    assert "holds none of the 12 linears" in refused
    assert (
        "exactly (12 because rate-coded: every input channel has a step of its own): use the format dense-hf" in refused
    )
    assert not (tmp_path / "no").exists()
