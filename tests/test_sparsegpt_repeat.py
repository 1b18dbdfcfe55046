"""Several solves on one object: each starts from the dense weight, and nothing is counted twice."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from oracles import correlated_inputs, output_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")

SWEEP = [
    {"sparsity": 0.5, "target_avg_bits": 2.5},
    {"sparsity": 0.5, "target_avg_bits": 4.0, "bit_allocation_method": "budget"},
    {"sparsity": 0.0, "prunen": 2, "prunem": 4, "target_avg_bits": 3.0, "percdamp": 0.1},
    {"sparsity": 0.0, "target_avg_bits": 6.0, "bit_allocation_method": "uniform", "blocksize": 16},
    {"sparsity": 0.5, "target_avg_bits": 2.5},
]


def make_layer(kind: str = "Linear", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = {"Linear": nn.Linear(64, 24), "Conv1D": Conv1D(24, 64), "Conv2d": nn.Conv2d(16, 24, (2, 2))}[kind]
        nn.init.normal_(layer.weight, std=0.1)
    inputs = correlated_inputs(3, 16 * 36).view(3, 16, 6, 6) if kind == "Conv2d" else correlated_inputs(200, 64)
    return layer.requires_grad_(False).to(dtype), inputs


def solver_of(
    layer: nn.Module, inputs: Tensor, name: str = "fc1", stats: QuantizationStats | None = None, bits: bool = True
) -> SparseGPT:
    solver = SparseGPT(layer, name, stats)
    solver.quantizer = Quantizer() if bits else None
    solver.add_batch(inputs)
    return solver


@pytest.mark.parametrize("bits", [True, False], ids=["quantized", "pruned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_a_sweep_on_one_object_gives_what_fresh_objects_give(kind, dtype, bits):
    layer, inputs = make_layer(kind, dtype)
    solver = solver_of(layer, inputs, bits=bits)
    sweep = SWEEP if bits else [{"sparsity": s} for s in (0.25, 0.75, 0.25)]
    results = []
    for settings in sweep:
        solver.fasterprune(**settings)
        alone, _ = make_layer(kind, dtype)
        fresh = solver_of(alone, inputs, bits=bits)
        fresh.fasterprune(**settings)
        assert torch.equal(layer.weight, alone.weight)
        assert solver.report == fresh.report
        results.append(layer.weight.clone())
    assert torch.equal(results[0], results[-1])
    assert not torch.equal(results[0], results[1])


def test_the_reported_error_of_a_second_solve_is_against_the_dense_weight():
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    solver = solver_of(layer, inputs)
    for settings in SWEEP:
        solver.fasterprune(**settings)
        # float32 products against float64
        assert solver.report.relative_error == pytest.approx(output_error(dense, layer.weight, inputs), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_putting_the_dense_weight_back_between_solves_changes_nothing(dtype):
    layer, inputs = make_layer(dtype=dtype)
    dense = layer.weight.clone()
    solver = solver_of(layer, inputs)
    solver.fasterprune(0.5)
    once = layer.weight.clone()
    layer.weight.copy_(dense)
    solver.fasterprune(0.5)
    assert torch.equal(layer.weight, once)


def test_a_layer_that_was_changed_after_a_solve_is_refused_by_name_and_kept():
    for change in (
        lambda layer: layer.weight[3].mul_(1.01),
        lambda layer: layer.weight.fill_(float("nan")),
        lambda layer: layer.to(torch.bfloat16),
    ):
        for settings in ({"sparsity": 0.3}, {"sparsity": 0.0}):
            layer, inputs = make_layer()
            solver = solver_of(layer, inputs, bits=False)
            solver.fasterprune(0.5)
            report = solver.report
            change(layer)
            tuned = layer.weight.clone()
            with pytest.raises(ValueError, match="the weight of fc1 was changed since it was solved"):
                solver.fasterprune(**settings)
            assert torch.equal(layer.weight.nan_to_num(7), tuned.nan_to_num(7))
            assert solver.report is report


def test_a_weight_that_changes_before_the_first_solve_is_the_one_that_is_solved():
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs)
    layer.weight.mul_(2)
    dense = layer.weight.clone()
    with pytest.raises(ValueError, match="sparsity must be"):
        solver.fasterprune(1.5)
    layer.weight.mul_(2)  # a failed call has not kept anything
    for target in (3, 4):
        solver.fasterprune(0.5, target_avg_bits=target)
        error = output_error(2 * dense, layer.weight, inputs)
        assert solver.report.relative_error == pytest.approx(error, rel=1e-4)  # float32 products against float64
        assert error < 0.5


def test_a_failed_solve_leaves_the_earlier_one_in_place():
    layer, inputs = make_layer()
    stats = QuantizationStats()
    solver = solver_of(layer, inputs, stats=stats)
    solver.fasterprune(0.5, target_avg_bits=3)
    weight, report = layer.weight.clone(), solver.report
    with pytest.raises(ValueError, match="fc1 has 64"):
        solver.fasterprune(0, prunen=2, prunem=5)
    assert torch.equal(layer.weight, weight)
    assert solver.report is report
    assert stats.linears == [report]
    assert solver.compressed.weight().equal(weight)


def test_inputs_added_after_a_solve_count_in_the_next_one_with_those_before():
    parts = correlated_inputs(300, 64).split(100)
    layer, _ = make_layer()
    solver = solver_of(layer, parts[0])
    solver.fasterprune(0.5, target_avg_bits=3)
    for part in parts[1:]:
        solver.add_batch(part)
    assert solver.nsamples == 300
    solver.fasterprune(0.5, target_avg_bits=3)
    alone, _ = make_layer()
    fresh = SparseGPT(alone, "fc1")
    fresh.quantizer = Quantizer()
    for part in parts:
        fresh.add_batch(part)
    fresh.fasterprune(0.5, target_avg_bits=3)
    assert torch.equal(layer.weight, alone.weight)
    assert solver.report == fresh.report


def test_asking_for_nothing_after_a_solve_makes_the_layer_dense_again_and_drops_its_row():
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    stats = QuantizationStats()
    solver = solver_of(layer, inputs, stats=stats, bits=False)
    for sparsity in (0.5, 0.0, 0.0, 0.75, 0.0):
        solver.fasterprune(sparsity)
        assert torch.equal(layer.weight, dense) == (sparsity == 0)
        assert (solver.report is None) == (solver.compressed is None) == (sparsity == 0)
        assert len(stats.linears) == (sparsity > 0)
    layer.weight.mul_(2)  # the layer is dense and nobody's result: it may change
    solver.fasterprune(0.5)
    # float32 products against float64
    assert solver.report.relative_error == pytest.approx(output_error(2 * dense, layer.weight, inputs), rel=1e-4)


def test_a_repeated_solve_takes_over_its_row_and_no_channel_is_counted_twice():
    stats = QuantizationStats()
    solvers = [solver_of(*make_layer(), name=name, stats=stats) for name in ("fc1", "fc1", "")]
    for target, order in ((3, (0, 1, 2)), (4, (2, 0, 1)), (5, (1, 2, 0))):
        for index in order:
            solvers[index].fasterprune(0.5, target_avg_bits=target, bit_allocation_method="budget")
        assert [linear.name for linear in stats.linears] == ["fc1", "fc1 #2", "unnamed"]
        assert [solver.report for solver in solvers] == stats.linears
        assert stats.total_channels == 3 * 64
        assert target - 0.1 < stats.mean_bits <= target
    assert "Layers solved: 3" in stats.summary()


def test_reports_go_to_the_collector_that_is_set_when_they_are_made():
    first, second = QuantizationStats(), QuantizationStats()
    solver = solver_of(*make_layer(), stats=first)
    solver.fasterprune(0.5)
    solver.stats_collector = second
    solver.fasterprune(0.25)
    assert [linear.sparsity for linear in first.linears] == [0.5]
    assert [linear.sparsity for linear in second.linears] == [0.25]


def copies_of(weight: Tensor) -> int:
    """Tensors alive that hold the same numbers in memory of their own."""
    alive = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == weight.shape]
    return sum(torch.equal(tensor, weight) for tensor in alive if tensor.data_ptr() != weight.data_ptr())


def test_one_copy_of_the_dense_weight_lives_from_the_first_solve_until_free_and_the_result_stays():
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    stats = QuantizationStats()
    solver = solver_of(layer, inputs, stats=stats)
    moment = weakref.ref(solver.statistics.second_moment)
    assert copies_of(dense) == 0  # the layer's own is a Parameter
    for target in (3, 4):
        solver.fasterprune(0.5, target_avg_bits=target)
        assert copies_of(dense) == 1
    result, report = layer.weight.clone(), replace(solver.report)
    solver.free()
    assert copies_of(dense) == 0
    assert moment() is None
    assert torch.equal(layer.weight, result)
    assert torch.equal(solver.compressed.weight(), result)
    assert solver.report == report
    assert stats.linears == [report]
    for sparsity in (0.5, 0.0):
        with pytest.raises(ValueError, match="fc1 was freed"):
            solver.fasterprune(sparsity)
    assert torch.equal(layer.weight, result)


def test_statistics_keep_no_layer_alive():
    stats = QuantizationStats()
    solver = solver_of(*make_layer(), stats=stats)
    solver.fasterprune(0.5)
    held = weakref.ref(solver.compressed)
    del solver
    assert held() is None
    assert len(stats.linears) == 1
