"""Entropy-coded linears are decoded some at a time: the model is the same, and damage is one linear's."""

import pytest
import torch
from forgery import CONFIG, WEIGHTS, forge, write_model
from safetensors.torch import load_file, save_file

from sgpt_lightning.checkpoint import load
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format import packing
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.recipe import Recipe


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("coded") / "model"
    write_model(directory, recipe=Recipe(coding="entropy", target_bits_per_weight=7.0))
    return directory


def test_however_many_are_unpacked_at_once_the_model_is_the_same(coded, monkeypatch):
    batches = []
    plain = load.unpack_weights
    monkeypatch.setattr(load, "unpack_weights", lambda some: (batches.append(len(some)), plain(some))[1])
    states = []
    for weights in (1, 10_000, 1 << 30):
        monkeypatch.setattr(packing, "UNPACKED_AT_ONCE", weights)
        states.append(load_compressed(coded).state_dict())
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    linears = batches[-1]
    assert batches[:linears] == [1] * linears
    assert len(batches) > linears + 2
    assert sum(batches) == 3 * linears


@pytest.mark.parametrize("weights", [1, 1 << 30])
@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_stream_is_an_error_that_names_its_linear(coded, tmp_path, monkeypatch, weights, number):
    (tmp_path / "model").mkdir()
    for file in coded.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model" / WEIGHTS
    tensors = load_file(path)
    streams = [name for name in tensors if name.endswith(".weight_stream")]
    assert len(streams) > 1
    tensors[streams[number]].view(torch.int16)[2] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    forge(tmp_path / "model")
    monkeypatch.setattr(packing, "UNPACKED_AT_ONCE", weights)
    owner = streams[number].removesuffix(".weight_stream")
    with pytest.raises(CheckpointError, match=rf"{CONFIG} does not describe {owner}: words of 1 streams"):
        load_compressed(tmp_path / "model")
