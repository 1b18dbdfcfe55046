"""What the drop-in class says and what it refuses."""

import pytest
import torch
from oracles import correlated_inputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.report import QuantizationStats
from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(kind: str = "Linear") -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = {"Linear": nn.Linear(64, 24), "Conv1D": Conv1D(24, 64), "Conv2d": nn.Conv2d(4, 24, (2, 3))}[kind]
    inputs = correlated_inputs(36, 48).view(3, 4, 12, 12) if kind == "Conv2d" else correlated_inputs(99, 64)
    return layer.requires_grad_(False), inputs


@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_a_sparsity_of_zero_without_quantizer_leaves_every_bit_alone(sparsity):
    layer, inputs = make_layer()
    before = layer.weight.clone()
    stats = QuantizationStats()
    solver = SparseGPT(layer, "fc", stats)
    solver.add_batch(inputs)
    solver.fasterprune(sparsity)
    assert torch.equal(layer.weight, before) == (sparsity == 0)
    assert (layer.weight == 0).sum() == sparsity * 24 * 64
    assert len(stats.linears) == (sparsity > 0)


def test_the_summary_says_when_nothing_was_solved_or_quantized_and_lists_every_layer(capsys):
    stats = QuantizationStats()
    stats.print_summary()
    assert "no layer was solved" in capsys.readouterr().out
    for name, quantized in (("fc1", False), ("fc2", False), ("proj", True)):
        layer, inputs = make_layer()
        solver = SparseGPT(layer, name, stats)
        solver.add_batch(inputs)
        solver.quantizer = Quantizer() if quantized else None
        solver.fasterprune(0.5)
        stats.print_summary()
        printed = capsys.readouterr().out
        assert ("Nothing was quantized" in printed) == (not quantized)
        assert all(f"| {linear.name} " in printed for linear in stats.linears)
    assert "not quantized (2): fc1, fc2" in printed
    assert f"Layers solved: {len(stats.linears)}" in printed


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_and_not_added(kind, value):
    layer, inputs = make_layer(kind)
    solver = SparseGPT(layer, "fc1")
    inputs.view(-1)[5] = value
    with pytest.raises(ValueError, match="fc1 received NaN or inf"):
        solver.add_batch(inputs)
    assert solver.nsamples == 0
    with pytest.raises(ValueError, match="fc1 saw no token"):
        solver.fasterprune(0.5)


def test_a_freed_object_raises():
    layer, inputs = make_layer()
    solver = SparseGPT(layer)
    solver.add_batch(inputs)
    solver.free()
    for use in (lambda: solver.add_batch(inputs), lambda: solver.fasterprune(0.5), lambda: solver.nsamples):
        with pytest.raises(ValueError, match="was freed"):
            use()


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(2, 3, 1), nn.Embedding(3, 2), nn.LayerNorm(3), nn.ConvTranspose2d(2, 3, 1)]
)
def test_other_layers_are_a_type_error(layer):
    with pytest.raises(TypeError, match=f"odd must be Linear, Conv1D or Conv2d, got {type(layer).__name__}"):
        SparseGPT(layer, "odd")


@pytest.mark.parametrize(
    "settings", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_a_conv2d_whose_patches_unfold_does_not_give_is_refused_at_once(settings):
    key, value = list(settings.items())[-1]
    with pytest.raises(ValueError, match=f"^conv is a Conv2d with .*{key}={value!r}"):
        SparseGPT(nn.Conv2d(2, 4, 3, **settings), "conv")


@pytest.mark.parametrize("settings", [{"perchannel": False}, {"sym": True}, {"mse": True}])
def test_quantizer_settings_that_are_not_implemented_are_refused(settings):
    with pytest.raises(ValueError, match=f"only perchannel=True.*{'='.join(map(str, *settings.items()))}"):
        Quantizer().configure(4, **settings)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_widths_outside_of_1_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        Quantizer().configure(bits)
