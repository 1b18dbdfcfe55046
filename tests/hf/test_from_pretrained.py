"""What `from_pretrained` of transformers makes of our directories: the model that was in memory, its weights packed."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from packed_models import CODED, FORMS, PROBE, described, load, logits, write
from safetensors import safe_open
from transformers import PreTrainedModel, pipeline

import sgpt_lightning.checkpoint.save
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format.resident import reside_together
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.packed.modules import Packed, PackedEmbedding, PackedLinear
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


FRESH = """
import sys
from pathlib import Path
import sgpt_lightning
assert not {"torch", "transformers"} & set(sys.modules), "importing the package is no heavy work"
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, *names = sys.argv[1:]
probe, found = torch.load(Path(root, "probe.pt")), {}
for name in names:
    for resident in ("packed", "coded"):
        model = AutoModelForCausalLM.from_pretrained(Path(root, name), resident=resident)
        with torch.no_grad():
            found[name, resident] = model(input_ids=probe).logits
torch.save(found, Path(root, "logits.pt"))
"""


def test_a_fresh_process_computes_the_same_logits_bit_for_bit(forms):
    root, expected = forms
    torch.save(PROBE, root / "probe.pt")
    command = [sys.executable, "-W", "error", "-c", FRESH, root, *expected]
    subprocess.run(command, check=True, timeout=120, cwd="/")
    found = torch.load(root / "logits.pt")
    assert len(found) == 2 * len(expected)
    assert [key for key, value in found.items() if not torch.equal(value, expected[key[0]])] == []


def test_loading_moves_no_global_state_and_makes_a_frozen_kind_of_model_in_eval_mode(forms):
    generator = torch.get_rng_state()
    model = load_compressed(forms[0] / "opt", resident="packed")
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.training
    assert not load(forms[0] / "opt")(input_ids=PROBE).logits.requires_grad  # or weights would be kept for a backward
    with pytest.raises(ValueError, match="was compressed before"):
        compress(model, [{"input_ids": PROBE}], Recipe())


@pytest.mark.parametrize("name", ["opt-partly", "llama", "gpt2-coded"])
def test_a_coded_resident_model_holds_the_tensors_of_the_file_and_no_others(name, forms):
    model = load(forms[0] / name, resident="coded")
    with safe_open(forms[0] / name / "sgpt.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    packed = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[2].startswith("weight_")}
    assert packed
    assert all(held[key].dtype == tensor.dtype and torch.equal(held[key], tensor) for key, tensor in packed.items())
    tables = {key for key in stored if key.endswith("inv_freq")}
    aliases = set(described(forms[0] / name)["aliases"]) & model.state_dict().keys()
    assert model.state_dict().keys() - aliases == stored.keys() - tables


def test_ordinary_modules_become_ours_and_special_ones_keep_their_own_forward(forms):
    opt = load(forms[0] / "opt-coded").model.decoder
    assert type(opt.layers[0].fc1) is PackedLinear
    assert type(opt.embed_tokens) is PackedEmbedding
    theirs, ours = type(opt.embed_positions).__mro__[1:3]
    assert (theirs.__name__, ours) == ("OPTLearnedPositionalEmbedding", PackedEmbedding)
    attention = load(forms[0] / "gpt2-coded").transformer.h[0].attn.c_attn
    assert [kind.__name__ for kind in type(attention).__mro__[:4]] == [
        "PackedConv1D",
        "PackedTransposed",
        "Packed",
        "Conv1D",
    ]
    assert all("weight" not in dict(module.named_parameters()) for module in (opt.layers[0].fc1, attention))


@pytest.mark.parametrize("resident", ["packed", "coded"])
@pytest.mark.parametrize("name", ["opt-coded", "gpt2-coded", "gemma2-coded"])
def test_a_tied_head_computes_with_the_packed_table_and_holds_nothing(name, resident, forms):
    model = load(forms[0] / name, resident=resident)
    head = model.get_output_embeddings()
    assert list(head.buffers()) == list(head.parameters()) == []
    assert torch.equal(head.weight, model.get_input_embeddings().weight)
    model.tie_weights()
    assert torch.equal(logits(model), forms[1][name])
    assert head.holder is model.get_input_embeddings()


@pytest.mark.parametrize("resident", ["packed", "coded", "dense"])
def test_copies_of_a_model_are_models_of_their_own(resident, forms):
    model = load(forms[0] / "opt-coded", resident=resident)
    twins = [copy.deepcopy(model)]
    if resident != "coded":  # torch cannot unpickle the 16-bit words of a stream
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(logits(twin), forms[1]["opt-coded"])
        for tensor in twin.buffers():
            tensor.zero_()
    assert torch.equal(logits(model), forms[1]["opt-coded"])


@pytest.mark.parametrize("name", ["opt", "gpt2-coded"])
def test_a_dense_resident_model_is_an_ordinary_one_that_is_saved_as_such(name, forms, tmp_path):
    model = load(forms[0] / name, resident="dense")
    assert not [module for module in model.modules() if isinstance(module, Packed)]
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").exists()
    assert torch.equal(logits(load(tmp_path / "dense")), forms[1][name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # both are tied


@pytest.mark.parametrize("resident", ["packed", "coded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "gemma2-coded"])
def test_a_dtype_is_that_of_the_computation_and_never_casts_what_is_packed(name, dtype, resident, forms):
    expected = logits(load_compressed(forms[0] / name, dtype=dtype))
    asked = load(forms[0] / name, dtype=dtype, resident=resident)
    assert asked.dtype == dtype
    assert torch.equal(logits(asked), expected)
    if name == "opt":  # whose tables need not be made in the dtype
        assert torch.equal(logits(load(forms[0] / name, resident=resident).to(dtype)), expected)


def test_attention_is_that_of_the_evaluation_unless_told_otherwise(tmp_path):
    write(tmp_path / "out", *FORMS["opt"], attn_implementation="eager")
    assert load(tmp_path / "out").config._attn_implementation == "eager"
    assert load(tmp_path / "out", attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_a_residence_that_is_none_is_refused(forms):
    for loader in (load, load_compressed):
        with pytest.raises(ValueError, match="resident must be one of packed, coded, dense, got 'memory'"):
            loader(forms[0] / "opt", resident="memory")


def test_shards_are_read_and_a_class_reads_what_the_auto_class_reads(forms, tmp_path, monkeypatch):
    monkeypatch.setattr(sgpt_lightning.checkpoint.save, "MAX_SHARD_SIZE", "20KB")
    expected = logits(write(tmp_path / "out", *FORMS["opt"]))
    assert len(list((tmp_path / "out").glob("sgpt-0*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    kind: type[PreTrainedModel] = type(load(forms[0] / "opt"))
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "out")), expected)


def test_text_is_generated_as_the_dense_model_does_alone_and_in_a_pipeline(tmp_path):
    tokenizer = load_tokenizer("opt-mini")
    write(tmp_path / "out", "opt", CODED, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "out")
    options = {"max_new_tokens": 6, "do_sample": False}
    dense = load_compressed(tmp_path / "out").generate(PROBE, **options)
    model = load(tmp_path / "out")
    assert torch.equal(model.generate(PROBE, **options), dense)
    model.generation_config.max_new_tokens = 6
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)("def f", do_sample=False)
    ids = tokenizer("def f", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load_compressed(tmp_path / "out").generate(ids, **options)[0]
    assert said[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_coded_weights_are_decoded_side_by_side_and_a_load_lets_go_of_their_bytes(forms, monkeypatch):
    decoded, stored, threads = [], [], []

    def watched(matrices):
        threads.append(torch.get_num_threads())
        gc.collect()
        assert not [reference for reference in stored if reference() is not None]  # those of the last call
        stored.extend(weakref.ref(packed.tensors["weight_stream"]) for packed in matrices)
        decoded.append(len(matrices))
        return reside_together(matrices)

    monkeypatch.setattr("sgpt_lightning.hf.quantizer.reside_together", watched)
    weights = described(forms[0] / "opt-coded")["packed"]
    load(forms[0] / "opt-coded")
    assert decoded == [len(weights)]
    stored.clear(), decoded.clear()
    monkeypatch.setattr("sgpt_lightning.format.packing.UNPACKED_AT_ONCE", 5_000)
    load(forms[0] / "opt-coded")
    assert sum(decoded) == len(weights)
    assert max(decoded) < len(weights)
    torch.set_num_threads(3)
    load(forms[0] / "opt-coded")
    assert set(threads) == {1}
    assert torch.get_num_threads() == 3
