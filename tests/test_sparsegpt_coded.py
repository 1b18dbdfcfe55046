"""Entropy coding in the drop-in class: the budget is true bits of the layer, and the solve is that of `compress`."""

import pytest
import torch
from models_for_tests import make_model
from oracles import correlated_inputs, output_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")
CODED = {"sparsity": 0, "coding": "entropy"}
SHAPE = (96, 192)


def make_layer(kind: str = "Linear", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    rows, columns = SHAPE
    layers = {
        "Linear": lambda: nn.Linear(columns, rows),
        "Conv1D": lambda: Conv1D(rows, columns),
        "Conv2d": lambda: nn.Conv2d(columns // 4, rows, (2, 2)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = layers[kind]()
        nn.init.normal_(layer.weight, std=0.1)
    inputs = correlated_inputs(400, columns)
    if kind == "Conv2d":
        inputs = correlated_inputs(8, 36 * columns // 4).view(8, columns // 4, 6, 6)
    return layer.requires_grad_(False).to(dtype), inputs


def solver_of(layer: nn.Module, inputs: Tensor, stats: QuantizationStats | None = None) -> SparseGPT:
    solver = SparseGPT(layer, "fc1", stats)
    solver.add_batch(inputs)
    return solver


@pytest.mark.parametrize("target", [2.0, 3.0, 4.5])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_the_target_is_met_from_below_in_true_bits_and_the_layer_holds_what_is_stored(kind, target):
    layer, inputs = make_layer(kind)
    solver = solver_of(layer, inputs)
    solver.fasterprune(**CODED, target_avg_bits=target)
    packed = pack_weight(solver.compressed.solution)
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert target * 0.97 < 8 * stored / (SHAPE[0] * SHAPE[1]) <= target  # a level's step is a few bytes in 4 to 10 kB
    assert (solver.report.bytes, solver.report.layout) == (stored, "coded")
    held = layer.weight.T if kind == "Conv1D" else layer.weight.flatten(1)
    assert torch.equal(held, unpack_weight(packed))
    assert solver.report.sparsity == pytest.approx(float((held == 0).double().mean()), abs=1e-12)  # float64 quotients


def test_more_bits_are_less_error_and_three_coded_bits_are_better_than_three_fixed_ones():
    errors = {}
    for settings in ({**CODED, "target_avg_bits": bits} for bits in (2.0, 3.0, 4.5)):
        layer, inputs = make_layer()
        dense = layer.weight.clone()
        solver = solver_of(layer, inputs)
        solver.fasterprune(**settings)
        errors[settings["target_avg_bits"]] = output_error(dense, layer.weight, inputs)
        # float32 products against float64
        assert solver.report.relative_error == pytest.approx(errors[settings["target_avg_bits"]], rel=1e-4)
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs)
    solver.quantizer = Quantizer()
    solver.quantizer.configure(3)
    solver.fasterprune(0)
    assert solver.report.bits_per_weight > 3
    assert errors[4.5] < errors[3.0] < errors[2.0]
    assert errors[3.0] < 0.7 * output_error(dense, layer.weight, inputs)  # the rows are Gaussian: 0.25 + 0.25 bits


def test_the_solve_is_that_of_compress_linears():
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs)
    recipe = Recipe(preset="sparsegpt", coding="entropy", target_bits_per_weight=3.0)
    (expected,) = compress_linears(
        [LinearToSolve(layer.weight.clone(), "fc1")], solver.statistics, recipe, coded_size=coded_size
    )
    solver.fasterprune(**CODED, target_avg_bits=3.0)
    assert torch.equal(layer.weight, expected.weight())
    assert solver.report.damp_percent == recipe.damp_percent == 0.03


@pytest.mark.parametrize(
    ("configured", "target", "expected"), [(None, None, 4.0), (3, None, 3.0), (3, 2.0, 2.0), ("no", 2.5, 2.5)]
)
def test_the_budget_is_the_target_or_else_the_quantizers_width_or_else_four_bits(configured, target, expected):
    solver = solver_of(*make_layer())
    if configured != "no":
        solver.quantizer = Quantizer()
        if configured:
            solver.quantizer.configure(configured)
    solver.fasterprune(**CODED, target_avg_bits=target)
    assert expected * 0.97 < solver.report.bits_per_weight <= expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_over_both_codings_gives_what_fresh_objects_give_and_keeps_one_row(dtype):
    stats = QuantizationStats()
    layer, inputs = make_layer(dtype=dtype)
    solver = solver_of(layer, inputs, stats)
    coded = [{**CODED, "target_avg_bits": bits} for bits in (3.0, 2.0)]
    for settings in (coded[0], {"sparsity": 0.5}, coded[1], coded[0]):
        solver.fasterprune(**settings)
        alone, _ = make_layer(dtype=dtype)
        fresh = solver_of(alone, inputs)
        fresh.fasterprune(**settings)
        assert torch.equal(layer.weight, alone.weight)
        assert solver.report == fresh.report
        assert stats.linears == [solver.report]
    assert stats.total_channels == SHAPE[1]
    assert "channels' bits" in stats.summary()


def test_asking_for_nothing_after_a_coded_solve_makes_the_layer_dense_again():
    stats = QuantizationStats()
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    solver = solver_of(layer, inputs, stats)
    solver.fasterprune(**CODED, target_avg_bits=3.0)
    assert not torch.equal(layer.weight, dense)
    solver.fasterprune(0)
    assert torch.equal(layer.weight, dense)
    assert (solver.report, solver.compressed, stats.linears) == (None, None, [])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsity": 0.5}, "sparsity=0.5"),
        ({"sparsity": 0, "prunen": 2, "prunem": 4}, "pattern='2:4'"),
        ({"sparsity": 0, "bit_allocation_method": "budget"}, "bit_allocation_method='budget'"),
    ],
)
def test_what_belongs_to_fixed_widths_is_refused_by_name_and_the_layer_left(settings, named):
    layer, inputs = make_layer()
    before = layer.weight.clone()
    solver = solver_of(layer, inputs)
    with pytest.raises(ValueError, match=f"fc1: coding='entropy' takes .*target_avg_bits; got {named}"):
        solver.fasterprune(**settings, coding="entropy", target_avg_bits=3.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.0, r"in \(0, 8\], got 0"), (-1.0, "got -1"), (8.5, "got 8.5"), (0.05, "fc1 takes .* before any code")],
)
def test_a_budget_that_no_codes_can_meet_is_refused(target, message):
    layer, inputs = make_layer()
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        solver_of(layer, inputs).fasterprune(**CODED, target_avg_bits=target)
    assert torch.equal(layer.weight, before)


def test_a_coding_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"coding must be one of fixed, entropy, got 'huffman'"):
        solver_of(*make_layer()).fasterprune(0, coding="huffman")


def test_layers_of_a_scripts_own_loop_are_stored_and_read_back_to_the_same_logits(tmp_path):
    model = make_model("opt")
    linears = {name: module for name, module in model.named_modules() if name.endswith(("fc1", "fc2"))}
    solved = {}
    for name, linear in linears.items():
        solver = SparseGPT(linear, name)
        solver.add_batch(correlated_inputs(200, linear.in_features))
        solver.fasterprune(**CODED, target_avg_bits=4.0)
        solved[name] = SolvedLinear(pack_weight(solver.compressed.solution), solver.report)
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float16)
    assert {report["layout"] for report in manifest.linears.values()} == {"coded"}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "out")(ids).logits, model(ids).logits)
