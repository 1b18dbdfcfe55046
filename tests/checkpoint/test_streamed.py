"""Models whose blocks come one at a time, from the CPU or from files: the same bits as of a model that is whole."""

import json
import shutil

import pytest
import torch
from models_for_tests import FAMILIES, make_batches, make_model, make_tokens
from safetensors.torch import load_file, save_file
from torch import nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_dense
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.checkpoint.streamed import load_streamed
from sgpt_lightning.checkpoint.tensor_files import TensorFiles
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.identity import weights_digest
from sgpt_lightning.models.placement import BlocksElsewhere
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {
    "best": Recipe(scope="layer"),
    "ignored": Recipe(preset="gptq", ignore=["*.1.*"]),
    "sized": Recipe(coding="entropy", target_size=75_000, ignore=["*.1.*"]),
    "planned": Recipe(target_bits_per_weight=3.6, sparsity=0.5, scope="model", ignore=["*.1.*"]),
}


def make_directory(directory, family, **settings):
    model = make_model(family)
    model.save_pretrained(directory, **settings)
    return directory


def at_rest(model):
    """How many of the linears' weights are nowhere in memory."""
    return sum(linear.weight.is_meta for linear in find_decoder_blocks(model).linears().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_read_block_by_block_computes_the_same_logits(family, tmp_path):
    directory = make_directory(tmp_path / "dense", family)
    expected, model = load_dense(str(directory), dtype=torch.float32), load_streamed(str(directory))
    linears = len(find_decoder_blocks(model).linears())
    assert at_rest(model) == linears > 0
    tokens = make_tokens(2, 12)
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    assert at_rest(model) == linears
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert weights_digest(model) == weights_digest(expected)


def test_shards_and_another_dtype_are_read_as_transformers_reads_them(tmp_path):
    directory = make_directory(tmp_path / "dense", "llama", max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    tokens = make_tokens(1, 12)
    for dtype in (torch.float32, torch.bfloat16):
        expected, model = load_dense(str(directory), dtype=dtype), load_streamed(str(directory), dtype)
        assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
        assert model.dtype == dtype


def compressed(directory, model, recipe, mode="sequential"):
    """Compress and save; return the file and the biases and norms that the model is left with."""
    solved = compress(model, make_batches(3), recipe, mode=mode, storage_dtype=torch.float16)
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return load_file(next(directory.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("family", "recipe", "mode"),
    [
        ("opt", "best", "sequential"),
        ("gpt2", "best", "one-shot"),
        ("gpt2", "ignored", "sequential"),
        ("opt", "sized", "sequential"),
        ("llama", "planned", "one-shot"),
    ],
)
def test_blocks_from_the_cpu_and_from_files_are_compressed_to_the_same_bytes(family, recipe, mode, tmp_path):
    directory = make_directory(tmp_path / "dense", family)
    whole = load_dense(str(directory), dtype=torch.float32)
    on_host = load_dense(str(directory), dtype=torch.float32)
    BlocksElsewhere(on_host, "cpu")
    models = {"none": whole, "cpu": on_host, "disk": load_streamed(str(directory))}
    found = {name: compressed(tmp_path / name, model, RECIPES[recipe], mode) for name, model in models.items()}
    tokens = make_tokens(2, 12)
    for name in ("cpu", "disk"):
        assert found[name].keys() == found["none"].keys()
        assert [key for key, tensor in found[name].items() if not torch.equal(tensor, found["none"][key])] == []
        assert torch.equal(models[name](input_ids=tokens).logits, whole(input_ids=tokens).logits)
    assert at_rest(models["disk"]) == len(find_decoder_blocks(whole).linears())


def test_no_more_than_two_blocks_and_a_copy_are_in_memory_at_one_time(tmp_path, monkeypatch):
    directory = make_directory(tmp_path / "dense", "opt")
    most, resting = [], BlocksElsewhere.bring

    def bring(self, index):
        resting(self, index)
        most.append(len(self._resting))

    monkeypatch.setattr(BlocksElsewhere, "bring", bring)
    compress(load_streamed(str(directory)), make_batches(2), Recipe(scope="layer"))
    assert max(most) == 2


def test_a_model_whose_blocks_were_elsewhere_is_an_ordinary_one_again():
    model, expected = make_model("opt"), make_model("opt")
    hidden = BlocksElsewhere(model, "cpu")
    compress(model, make_batches(2), RECIPES["best"])
    hidden.release(model)
    compress(expected, make_batches(2), RECIPES["best"])
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [module for module in model.modules() if {"forward", "_apply"} & module.__dict__.keys()] == []
    assert next(model.half().model.decoder.layers[0].parameters()).dtype == torch.float16


def test_model_to_leaves_blocks_where_they_are():
    model = make_model("opt")
    BlocksElsewhere(model, "cpu")
    model.to(torch.float64)
    assert model.model.decoder.embed_tokens.weight.dtype == torch.float64
    assert {p.dtype for p in model.model.decoder.layers.parameters()} == {torch.float32}


def test_files_that_do_not_hold_the_model_are_refused_by_name(tmp_path):
    directory = make_directory(tmp_path / "dense", "opt")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.decoder.layers.1.fc1.weight"]
    tensors["model.decoder.layers.0.fc2.bias"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot read model.decoder.layers.0.fc2.bias, model.decoder.layers.1.fc1.w"):
        load_streamed(str(directory))
    path.unlink()
    with pytest.raises(ValueError, match=r"reads safetensors files, .*dense holds none"):
        load_streamed(str(directory))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = make_directory(tmp_path / "dense", "opt") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
        TensorFiles([path])


def test_what_a_header_says_is_checked(tmp_path):
    path = make_directory(tmp_path / "dense", "opt") / "model.safetensors"
    shutil.copy(path, tmp_path / "model.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for change in ({"dtype": "F31"}, {"shape": [10**9]}, {"data_offsets": [-4, 0]}, {"data_offsets": "x"}):
        name = "model.decoder.layers.0.fc1.weight"
        text = json.dumps(header | {name: header[name] | change}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
            TensorFiles([path])


def test_a_copy_of_a_block_does_not_run_the_block(tmp_path):
    model = make_model("opt")
    BlocksElsewhere(model, "cpu")
    from sgpt_lightning.models.placement import copy_of

    block = model.model.decoder.layers[0]
    twin = copy_of(block)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert isinstance(twin, nn.Module)
    assert torch.equal(twin(torch.ones(1, 2, 32)), torch.ones(1, 2, 32))
