"""What the drop-in class says and what it refuses."""

import pytest
import torch
from oracles import correlated_inputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.report.stats import QuantizationStats
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
    assert "not quantized (16+ in the table): 2" in printed
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


def test_a_solve_without_inputs_is_refused_by_name_and_leaves_the_layer():
    layer, inputs = make_layer()
    before = layer.weight.clone()
    solver = SparseGPT(layer, "fc1")
    solver.add_batch(inputs[:0])  # a batch of no tokens
    with pytest.raises(ValueError, match="fc1 saw no token"):
        solver.fasterprune(0.5)
    assert torch.equal(layer.weight, before)
    assert solver.report is None


ODD_INPUTS = {
    "features": ("Linear", lambda x: x[:, :63], ValueError, r"shape \[\.\.\., 64\], got \[99, 63\]"),
    "transposed": ("Conv1D", lambda x: x.T, ValueError, r"shape \[\.\.\., 64\], got \[64, 99\]"),
    "scalar": ("Linear", lambda x: x[0, 0], ValueError, r"shape \[\.\.\., 64\], got \[\]"),
    "channels": ("Conv2d", lambda x: x[:, :3], ValueError, r"\[batch, 4, height, width\], got \[3, 3, 12, 12\]"),
    "tokens for images": ("Conv2d", lambda x: x[0, 0], ValueError, r"\[batch, 4, height, width\], got \[12, 12\]"),
    "device": ("Linear", lambda x: x.to("meta"), ValueError, "on cpu, like the layer, got meta"),
    "whole numbers": ("Linear", lambda x: x.long(), TypeError, "a tensor of floating numbers, got torch.int64"),
    "tuple of a hook": ("Linear", lambda x: (x,), TypeError, "a tensor of floating numbers, got tuple"),
}


@pytest.mark.parametrize("odd", ODD_INPUTS)
def test_inputs_of_another_layer_device_or_kind_are_refused_by_name_and_not_added(odd):
    kind, spoil, error, message = ODD_INPUTS[odd]
    layer, inputs = make_layer(kind)
    solver = SparseGPT(layer, "fc1")
    solver.add_batch(inputs)
    seen, moment = solver.nsamples, solver.statistics.second_moment.clone()
    with pytest.raises(error, match=f"inp of fc1 must be .*{message}"):
        solver.add_batch(spoil(inputs))
    assert solver.nsamples == seen
    assert torch.equal(solver.statistics.second_moment, moment)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_floating_dtype_count_as_the_same_numbers_in_float32(kind, dtype):
    seen = []
    for as_float32 in (False, True):
        layer, inputs = make_layer(kind)
        inputs = inputs.to(dtype)
        solver = SparseGPT(layer, "fc1")
        solver.add_batch(inputs.float() if as_float32 else inputs)
        seen.append(solver.statistics.second_moment)
    assert torch.equal(*seen)


@pytest.mark.parametrize("solved", [False, True])
def test_a_layer_that_moved_to_another_device_is_refused_by_name(solved):
    layer, inputs = make_layer()
    solver = SparseGPT(layer, "fc1")
    solver.add_batch(inputs)
    if solved:
        solver.fasterprune(0.5)
    layer.to("meta")
    with pytest.raises(ValueError, match="fc1 must stay on cpu, where its SparseGPT was made, got meta"):
        solver.fasterprune(0.5)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_left_as_it_is(kind, value, bits):
    layer, inputs = make_layer(kind)
    layer.weight.view(-1)[77] = value
    before = layer.weight.clone()
    stats = QuantizationStats()
    solver = SparseGPT(layer, "fc1", stats)
    solver.add_batch(inputs)
    if bits:
        solver.quantizer = Quantizer()
        solver.quantizer.configure(bits)
    with pytest.raises(ValueError, match=r"fc1.*NaN or inf|NaN or inf.*fc1"):
        solver.fasterprune(0.5)
    assert torch.equal(layer.weight.nan_to_num(7), before.nan_to_num(7))
    assert (solver.report, solver.compressed, stats.linears) == (None, None, [])


def test_inputs_whose_squares_overflow_are_refused_by_name():
    layer, inputs = make_layer()
    before = layer.weight.clone()
    solver = SparseGPT(layer, "fc1")
    solver.add_batch(inputs * 1e25)  # finite in float32, and the squares are not
    with pytest.raises(ValueError, match="fc1 holds NaN or inf"):
        solver.fasterprune(0.5)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("bits", [None, 2])
def test_a_result_that_the_layers_dtype_cannot_hold_is_refused_by_name_and_not_written(bits):
    layer, inputs = make_layer()
    layer.half()
    # The largest float16 is 65504. A survivor that makes up for its neighbours, and a 2-bit grid from -1.5 to 1.5 times
    # that (its zero is rounded up), both go beyond.
    layer.weight.copy_(layer.weight.sign() * 60000)
    before = layer.weight.clone()
    solver = SparseGPT(layer, "fc1")
    solver.add_batch(inputs)
    if bits:
        solver.quantizer = Quantizer()
        solver.quantizer.configure(bits)
    with pytest.raises(ValueError, match="fc1"):
        solver.fasterprune(0.5)
    assert torch.equal(layer.weight, before)
    assert solver.report is None


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


@pytest.mark.parametrize("settings", [{"perchannel": False}, {"mse": True}])
def test_quantizer_settings_that_are_not_implemented_are_refused(settings):
    with pytest.raises(ValueError, match=f"only perchannel=True.*{'='.join(map(str, *settings.items()))}"):
        Quantizer().configure(4, **settings)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_widths_outside_of_1_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
        Quantizer().configure(bits)
    with pytest.raises(ValueError, match="bits must be from 2 to 8 with sym=True, got 1"):
        Quantizer().configure(1, sym=True)
