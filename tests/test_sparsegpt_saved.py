"""What a script's own loop over the drop-in class made is saved in one call, under the model's names or not at all."""

import numpy as np
import pytest
import torch
from independent_reader import read_dense
from models_for_tests import make_model
from oracles import correlated_inputs
from torch import nn
from transformers import PreTrainedModel

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.linears import find_linears, weight_matrix
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = (
    ({}, {"sparsity": 0.5}),
    ({"sym": True}, {"sparsity": 0.5}),
    ({"sym": True}, {"sparsity": 0, "target_avg_bits": 4.0}),
    ({}, {"sparsity": 0, "prunen": 2, "prunem": 4, "target_avg_bits": 3.5, "bit_allocation_method": "budget"}),
    (None, {"sparsity": 0.25}),
    (None, {"sparsity": 0, "coding": "entropy", "target_avg_bits": 6.0}),
)
"""What the quantizer and the solve of the first, second, ... linear are told; None is no quantizer."""


def solve_all(model: PreTrainedModel) -> dict[str, SparseGPT]:
    """Solve every linear within the blocks, each in another way; keys are full names."""
    stats, gpts = QuantizationStats(), {}
    linears = {name: linear for name, linear in find_linears(model).items() if name != "lm_head"}
    for position, (name, linear) in enumerate(linears.items()):
        told, settings = SETTINGS[position % len(SETTINGS)]
        gpts[name] = SparseGPT(linear, name.rpartition(".")[2], stats)  # a bare name, as in the published loop
        if told is not None:
            gpts[name].quantizer = Quantizer()
            gpts[name].quantizer.configure(4, **told)
        gpts[name].add_batch(correlated_inputs(100, weight_matrix(linear).shape[1], position))
        gpts[name].fasterprune(**settings)
        gpts[name].free()
    return gpts


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_loop_is_saved_in_one_call_and_read_back_to_the_same_logits(family, tmp_path):
    model, tokenizer = make_model(family), load_tokenizer("opt-mini")
    gpts = solve_all(model)
    assert len(gpts) >= len(SETTINGS)
    solved = {name: gpt.solved for name, gpt in gpts.items()}
    manifest = save_compressed(tmp_path / "out", model, solved, tokenizer=tokenizer)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "out")(ids).logits, model(ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    tensors, linears = read_dense(tmp_path / "out")
    assert linears == set(gpts)
    for name, gpt in gpts.items():
        assert np.array_equal(tensors[f"{name}.weight"], weight_matrix(gpt.layer).numpy())
        assert manifest.linears[name]["name"] == name  # in tables, whatever the script called it


def test_names_that_are_no_linears_of_the_model_are_refused_together_and_nothing_is_written(tmp_path):
    model = make_model("opt")
    gpts = solve_all(model)
    one = "model.decoder.layers.0.fc1"
    solved = {"fc1": gpts[one].solved, "layers.9.fc2": gpts[one].solved, "model.decoder.layers": gpts[one].solved}
    named = r"got 'fc1' \(short for model.decoder.layers.0.fc1\?\), 'layers.9.fc2', 'model.decoder.layers'$"
    with pytest.raises(ValueError, match=f"full names, {named}"):
        save_compressed(tmp_path / "out", model, solved | {one: gpts[one].solved})
    swapped = {"model.decoder.layers.0.fc2": gpts[one].solved}
    with pytest.raises(ValueError, match=r"'model.decoder.layers.0.fc2' of shape \[64, 32\] instead of \[32, 64\]"):
        save_compressed(tmp_path / "out", model, swapped)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_is_not_what_was_solved_is_not_saved():
    layer = nn.Linear(32, 8).requires_grad_(False)
    dense = layer.weight.clone()
    gpt = SparseGPT(layer, "fc1")
    with pytest.raises(ValueError, match="fc1 was not solved: call fasterprune first"):
        _ = gpt.solved
    gpt.add_batch(correlated_inputs(100, 32))
    gpt.fasterprune(0.5)
    weight = layer.weight.clone()
    assert gpt.solved.report == gpt.report
    for other in (dense, weight * 1.001, torch.full_like(dense, float("nan"))):
        layer.weight.copy_(other)
        with pytest.raises(ValueError, match="the weight of fc1 was changed since it was solved"):
            _ = gpt.solved
    layer.weight.copy_(weight)
    gpt.fasterprune(0)  # dense again
    with pytest.raises(ValueError, match="fc1 was not solved"):
        _ = gpt.solved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_of_a_layer_in_16_bits_is_what_the_layer_holds(dtype):
    layer = nn.Linear(32, 8).requires_grad_(False).to(dtype)
    gpt = SparseGPT(layer, "fc1")
    gpt.quantizer = Quantizer()
    gpt.add_batch(correlated_inputs(100, 32))
    for settings in ({"sparsity": 0.5}, {"sparsity": 0, "target_avg_bits": 3.0}):
        gpt.fasterprune(**settings)
        assert gpt.solved.packed.nbytes == gpt.report.bytes
    layer.float()  # the file would hold values that 16 bits have rounded
    with pytest.raises(ValueError, match="the weight of fc1 was changed"):
        _ = gpt.solved
