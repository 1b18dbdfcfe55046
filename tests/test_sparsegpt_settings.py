"""What the drop-in class can be told beside a budget: symmetric grids, score weights, widths, shares, a line."""

import re

import numpy as np
import pytest
import torch
from oracles import correlated_inputs, damped, output_error, second_moment, sparsegpt
from torch import Tensor, nn

from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = 60


def make_layer(rows: int = 24) -> tuple[nn.Linear, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(CHANNELS, rows)
        nn.init.normal_(layer.weight, std=0.1)
        layer.weight.data *= 1 + torch.rand(CHANNELS)  # columns differ in size as well
    return layer.requires_grad_(False), correlated_inputs(300, CHANNELS)


def solver_of(layer: nn.Module, inputs: Tensor, bits: int | None = None, sym: bool = False, **settings) -> SparseGPT:
    solver = SparseGPT(layer, "fc1", **settings)
    solver.quantizer = Quantizer()
    solver.quantizer.sym = sym
    if bits:
        solver.quantizer.configure(bits, sym=sym)
    solver.add_batch(inputs)
    return solver


def widths_of(solver: SparseGPT) -> list[int]:
    return solver.compressed.solution.widths.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sparsity", "n_m"), [(0.0, None), (0.5, None), (0.5, (2, 4))])
def test_a_symmetric_grid_is_solved_on_as_well_as_in_the_papers_loop(bits, sparsity, n_m):
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    solver = solver_of(layer, inputs, bits, sym=True)
    solver.fasterprune(sparsity, *(n_m or ()), blocksize=20)
    reference = sparsegpt(
        dense,
        second_moment(inputs),
        sparsity=sparsity,
        n_m=n_m,
        bits=bits,
        block_size=20,
        symmetric=True,
    )
    ours, paper = (output_error(dense, weight, inputs) for weight in (layer.weight, reference.weight))
    assert ours < 1.005 * paper  # float32 and float64 may break near-ties differently
    step = 2 * dense.abs().amax(1, keepdim=True).half().double() / (2**bits - 1)
    codes = layer.weight.double() / step
    assert (codes - codes.round()).abs().max() < 1e-4  # the range is kept in float16, products are float32
    assert codes.round().min() == -(2 ** (bits - 1))  # a level more below zero than above
    assert codes.round().max() == 2 ** (bits - 1) - 1


def test_narrower_widths_of_a_symmetric_grid_are_symmetric_too():
    layer, inputs = make_layer()
    reach = 2 * layer.weight.abs().amax(1, keepdim=True).half().double()
    solver = solver_of(layer, inputs, sym=True, shares=(0.2,) * 5)
    solver.fasterprune(0)
    steps = 2.0 ** torch.tensor(widths_of(solver)) - 1
    codes = layer.weight.double() / (reach / steps)
    assert (codes - codes.round()).abs().max() < 1e-3  # up to 128 steps in float32
    assert (codes.round() >= -(steps + 1) / 2).all()
    assert (codes.round() <= (steps - 1) / 2).all()


def test_a_row_without_negative_weights_has_a_symmetric_grid_and_a_row_of_zeros_stays_zero():
    layer, inputs = make_layer()
    layer.weight[3].abs_()
    layer.weight[4] = 0
    solver = solver_of(layer, inputs, 4, sym=True)
    solver.fasterprune(0)
    assert solver.compressed.solution.grid.origin.unique().tolist() == [8]
    assert layer.weight[3].max() > 0
    assert not layer.weight[4].any()


def test_an_entropy_coded_solve_is_the_same_with_and_without_sym():
    weights = []
    for sym in (False, True):
        layer, inputs = make_layer()
        solver_of(layer, inputs, 4, sym=sym).fasterprune(0, coding="entropy")
        weights.append(layer.weight)
    assert torch.equal(*weights)


def test_a_bit_alone_has_no_symmetric_grid():
    with pytest.raises(ValueError, match=r"fc1: widths must be from 2 with sym=True, got \[1, 4\]"):
        solver_of(*make_layer(), sym=True, widths=(1, 4)).fasterprune(0, target_avg_bits=2)


def test_the_weights_of_the_scores_decide_which_channels_get_bits():
    layer, inputs = make_layer()
    orders = {
        "weight": layer.weight.abs().mean(0),
        "activation": inputs.abs().mean(0),
        "stability": inputs.var(0),
    }
    for kept, score in orders.items():
        layer, inputs = make_layer()
        only = {name: float(name == kept) for name in ("activation", "hessian", "weight", "output", "stability")}
        solver = solver_of(layer, inputs, importance=only)
        solver.fasterprune(0, target_avg_bits=4)
        by_score = torch.tensor(widths_of(solver))[score.argsort()]
        assert (by_score.diff() >= 0).all()
        assert len(by_score.unique()) == 5


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        ({"activation": 0.5}, ValueError, "fc1: importance weights must sum to 1, got 1.25"),
        ({"activation": -0.25, "hessian": 0.75}, ValueError, "fc1: importance weights must not be negative"),
        ({"magnitude": 1.0}, ValueError, "fc1: importance must name scores among activation, .*, got magnitude"),
        ([0.2] * 5, TypeError, "fc1: importance must be a mapping"),
    ],
)
def test_score_weights_that_break_their_rule_are_refused_at_once(importance, error, message):
    with pytest.raises(error, match=message):
        SparseGPT(make_layer()[0], "fc1", importance=importance)


@pytest.mark.parametrize("method", ["quantile", "budget"])
def test_the_widths_that_are_dealt_are_the_ones_that_were_given(method):
    solver = solver_of(*make_layer(), widths=[2, 5, 7])
    solver.fasterprune(0.5, target_avg_bits=4.5, bit_allocation_method=method)
    assert set(widths_of(solver)) == ({2, 5, 7} if method == "quantile" else {2, 5})  # none is worth 7 to `budget`
    assert 4.4 < solver.report.mean_bits <= 4.5


@pytest.mark.parametrize("widths", [[], [4, 2], [2, 9], [2, 2]])
def test_widths_that_break_their_rule_are_refused_at_once(widths):
    with pytest.raises(ValueError, match="fc1: widths must be"):
        SparseGPT(make_layer()[0], "fc1", widths=widths)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_shares_cut_the_ranking_where_they_say_whatever_mean_that_makes(bits, sparsity):
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs, bits, shares=(0.2, 0.2, 0.2, 0.2, 0.2))
    total, _ = solver.compute_importance_scores()
    solver.fasterprune(sparsity)
    ranked = [widths_of(solver)[channel] for channel in np.argsort(total.numpy())]
    assert ranked == [2] * 12 + [3] * 12 + [4] * 12 + [6] * 12 + [8] * 12
    if not sparsity:
        assert solver.report.mean_bits == pytest.approx(4.6, abs=1e-12)  # a mean of whole numbers


def test_uneven_shares_belong_to_the_widths_in_their_order_and_may_be_nothing():
    solver = solver_of(*make_layer(), widths=(2, 4, 8), shares=(0.75, 0, 0.25))
    solver.fasterprune(0)
    assert solver.report.bits_histogram == {2: 45, 8: 15}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.5, 0.5), r"fc1: shares must be one fraction for each of the widths \[2, 3, 4, 6, 8\], got \[0.5, 0.5\]"),
        ((0.5, 0.5, 0.5, 0, -0.5), "fc1: shares must be one fraction"),
        ((float("nan"), 0, 0, 0, 1), "fc1: shares must be one fraction"),
        ((0.2, 0.4, 0.6, 0.8, 1.0), "fc1: shares must sum to 1, got 3"),  # cut points instead of shares
    ],
)
def test_shares_that_break_their_rule_are_refused_at_once(shares, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(make_layer()[0], "fc1", shares=shares)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_avg_bits": 4.0},
            r"fc1: shares fix the mean \(4.6 bits\), so target_avg_bits must be left out, got 4",
        ),
        ({"bit_allocation_method": "budget"}, "fc1: shares belong to the method quantile, got 'budget'"),
    ],
)
def test_shares_beside_what_they_replace_are_refused_and_the_layer_is_left(settings, message):
    layer, inputs = make_layer()
    before = layer.weight.clone()
    solver = solver_of(layer, inputs, shares=(0.2,) * 5)
    with pytest.raises(ValueError, match=message):
        solver.fasterprune(0.5, **settings)
    scores = torch.ones(CHANNELS)
    with pytest.raises(ValueError, match=message):
        solver.allocate_bits(scores, settings.get("target_avg_bits"), settings.get("bit_allocation_method", "quantile"))
    assert torch.equal(layer.weight, before)


def test_scores_are_those_of_numpy_and_need_no_solve():
    layer, inputs = make_layer()
    weights = {"activation": 0.3, "hessian": 0.2, "weight": 0.15, "output": 0.25, "stability": 0.1}
    solver = solver_of(layer, inputs, importance=weights)
    before = layer.weight.clone()
    total, scores = solver.compute_importance_scores()
    assert torch.equal(layer.weight, before)
    w, x = layer.weight.double().numpy(), inputs.double().numpy()
    inverse = np.linalg.inv(damped(second_moment(inputs)).numpy())
    size = np.abs(x).mean(0)
    expected = {
        "activation": size,
        "hessian": 1 / inverse.diagonal(),
        "weight": np.abs(w).mean(0),
        "output": np.sqrt((w**2).mean(0)) * size,
        "stability": x.var(0),
    }
    expected = {name: score / score.mean() for name, score in expected.items()}
    assert list(scores) == list(weights)
    for name, score in expected.items():
        assert scores[name].numpy() == pytest.approx(score, rel=1e-3)  # a float32 factor, condition number 1e3
    combined = sum(weights[name] * score for name, score in expected.items())
    assert total.numpy() == pytest.approx(combined, rel=1e-3)  # the same
    assert solver.compute_importance_scores(percdamp=0.5)[1]["hessian"].std() < scores["hessian"].std()
    solver.fasterprune(0.5, target_avg_bits=3)
    assert torch.equal(solver.compute_importance_scores()[0], total)  # of the dense weight, also after a solve
    assert solver.report.importance_range == (float(total.min()), float(total.max()))


@pytest.mark.parametrize("method", ["quantile", "budget"])
@pytest.mark.parametrize("target", [None, 3.1])
def test_bits_by_scores_are_those_of_a_solve_that_prunes_nothing(method, target):
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs)
    bits = solver.allocate_bits(solver.compute_importance_scores()[0], *([target] if target else []), method=method)
    assert bits.dtype == torch.int32
    assert (target or 4.0) - 2 / CHANNELS < float(bits.double().mean()) <= (target or 4.0)  # one step of two bits
    solver.fasterprune(0, target_avg_bits=target, bit_allocation_method=method)
    assert bits.tolist() == widths_of(solver)


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        (torch.ones(7), {}, r"scores of fc1 must be finite, \[60\], got \[7\]"),
        (torch.full((CHANNELS,), float("nan")), {}, "scores of fc1 must be finite"),
        (torch.ones(CHANNELS), {"method": "loss"}, "fc1: method must be one of quantile, budget, got 'loss'"),
        (torch.ones(CHANNELS), {"target_avg_bits": 9.0}, "fc1: target_avg_bits must lie between"),
    ],
)
def test_scores_and_settings_that_give_no_bits_are_refused(scores, settings, message):
    with pytest.raises(ValueError, match=message):
        SparseGPT(make_layer()[0], "fc1").allocate_bits(scores, **settings)


def test_scores_of_a_layer_that_saw_nothing_are_refused():
    with pytest.raises(ValueError, match="fc1 saw no token"):
        SparseGPT(make_layer()[0], "fc1").compute_importance_scores()


UNUSED = {
    "no quantizer": (
        {},
        {"target_avg_bits": 3.0},
        None,
        "without a quantizer nothing is quantized; unused: target_avg",
    ),
    "no quantizer, widths": ({"widths": (2, 4)}, {}, None, "without a quantizer .*; unused: widths$"),
    "own width": (
        {"importance": {}},
        {},
        4,
        "without target_avg_bits every channel gets .* 4 bits; unused: importance$",
    ),
    "own width, method": (
        {"widths": (2, 4)},
        {"bit_allocation_method": "budget"},
        4,
        "unused: widths, bit_allocation_method$",
    ),
    "by loss": (
        {"importance": {}},
        {"target_avg_bits": 3.0, "bit_allocation_method": "loss"},
        4,
        "unused: importance$",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_settings_that_do_nothing_are_named_in_a_warning(case):
    settings, arguments, bits, message = UNUSED[case]
    layer, inputs = make_layer()
    solver = solver_of(layer, inputs, bits, **settings)
    if bits is None:
        solver.quantizer = None
    with pytest.warns(UserWarning, match=f"^fc1: .*{message}") as caught:
        solver.fasterprune(0.5, **arguments)
    assert [warning.filename for warning in caught] == [__file__]
    assert (solver.report.mean_bits is None) == (bits is None)


@pytest.mark.parametrize("coding", ["fixed", "entropy"])
def test_the_quantizer_of_another_program_is_refused_by_name(coding):
    solver = SparseGPT(*make_layer()[:1], "fc1")
    solver.quantizer = nn.Identity()
    with pytest.raises(TypeError, match=r"fc1: quantizer must be .*Quantizer or None, got torch\.nn\..*Identity"):
        solver.fasterprune(0, coding=coding)


def test_entropy_coding_refuses_what_deals_widths():
    solver = solver_of(*make_layer(), widths=(2, 4), shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"fc1: coding='entropy' takes .*; got widths, shares$"):
        solver.fasterprune(0, coding="entropy")


def test_a_line_a_solve_says_what_the_layer_holds(capsys):
    layer, inputs = make_layer()
    dense = layer.weight.clone()
    solver = solver_of(layer, inputs, verbose=True)
    solver.fasterprune(0.5, target_avg_bits=4.0)
    (line,) = capsys.readouterr().out.splitlines()
    counts = {int(bits): int(count) for bits, count in re.findall(r"(\d) bit\((\d+)\)", line)}
    assert counts == {bits: widths_of(solver).count(bits) for bits in (2, 3, 4, 6, 8)}
    zeros = float((layer.weight == 0).double().mean())
    assert f"| zeros {zeros:.1%} |" in line  # more than half: some survivors are rounded to zero
    assert zeros > 0.52
    survivors = solver.compressed.solution.keep.sum(0)
    mean = float((survivors * torch.tensor(widths_of(solver))).sum() / survivors.sum())
    assert f"| mean {mean:.2f} bits |" in line
    assert f"| error {output_error(dense, layer.weight, inputs):.4f} |" in line
    assert re.search(r"^\[fc1\] .* \| \d+\.\d\d s$", line)
    solver.quantizer = None
    solver.fasterprune(0.5)
    assert "bit(" not in capsys.readouterr().out
    solver.fasterprune(0)
    assert capsys.readouterr().out == "[fc1] left dense: neither zeros nor bits were asked for\n"
    solver_of(*make_layer()).fasterprune(0.5)
    assert capsys.readouterr().out == ""
