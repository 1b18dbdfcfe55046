"""What `SparseGPT.report` and the summary say, against numpy and against figures counted from the layer itself."""

import numpy as np
import pytest
import torch
from models_for_tests import make_model, make_tokens
from oracles import correlated_inputs
from torch import Tensor, nn

from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.sparsegpt import Quantizer, SparseGPT

pytestmark = pytest.mark.usefixtures("one_thread")


def solver_for(inputs: Tensor, out_features: int = 12, bits: int | None = None, **settings) -> SparseGPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(inputs.shape[-1], out_features).requires_grad_(False)
    solver = SparseGPT(layer, "fc1", QuantizationStats())
    if bits:
        solver.quantizer = Quantizer()
        solver.quantizer.configure(bits)
    solver.add_batch(inputs)
    solver.fasterprune(**({"sparsity": 0.5} | settings))
    return solver


def twins() -> Tensor:
    """Eight tokens of 1 and -1 whose channels are orthogonal but for the last, which repeats the one before it.

    Every product and sum is exact in float32, so the second moment is the identity and a pair of rows that are equal,
    to the last bit and on every machine.
    """
    signs = torch.ones(1, 1)
    for _ in range(3):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return torch.cat([signs[:, 1:7], signs[:, 6:7]], 1)


def damping_that_numpy_needs(inputs: Tensor, asked: float) -> float:
    """The first of asked, 10 asked, 100 asked, ... with which numpy factors the second moment in float32."""
    x = inputs.numpy().astype(np.float32)
    moment = x.T @ x / np.float32(len(x))
    damping = asked
    while True:
        try:
            np.linalg.cholesky(
                moment + np.float32(damping) * moment.diagonal().mean() * np.eye(len(moment), dtype="f4")
            )
            return damping
        except np.linalg.LinAlgError:
            damping *= 10


# A share of 3e-8 of the diagonal is below half of float32's last digit (6e-8): the pair stays singular. With 3e-7 it
# has a pivot of 6e-7, five last digits, whatever the order of the operations.
@pytest.mark.parametrize(("asked", "needed"), [(3e-9, 3e-7), (3e-8, 3e-7), (3e-7, 3e-7), (0.01, 0.01), (0.5, 0.5)])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_report_gives_the_damping_that_was_used_and_says_when_it_is_more_than_asked(asked, needed, bits):
    inputs = twins()
    assert damping_that_numpy_needs(inputs, asked) == pytest.approx(needed, rel=1e-9)  # the oracle, by powers of ten
    solver = solver_for(inputs, bits=bits, percdamp=asked)
    assert solver.report.damp_percent == pytest.approx(needed, rel=1e-9)
    assert solver.report.status == ("ok" if asked == needed else "damped")
    row = [cell.strip() for cell in solver.stats_collector.summary().splitlines()[-1].split("|")]
    assert (f"{needed:g}" in row, f"{needed:g} (damped)" in row) == (asked == needed, asked != needed)


@pytest.mark.parametrize("seed", range(3))
def test_the_reported_importance_runs_from_the_least_to_the_most_important_channel(seed):
    inputs = correlated_inputs(400, 40, seed)
    solver = solver_for(inputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        w = nn.Linear(40, 12).weight.detach().double().numpy()
    x = inputs.double().numpy()
    moment = x.T @ x / len(x)
    inverse = np.linalg.inv(moment + 0.01 * moment.diagonal().mean() * np.eye(40))
    size = np.abs(x).mean(0)
    weighted = {
        0.25: [size, 1 / inverse.diagonal(), np.sqrt((w**2).mean(0)) * size],
        0.15: [np.abs(w).mean(0)],
        0.10: [x.var(0)],
    }
    importance = sum(share * score / score.mean() for share, scores in weighted.items() for score in scores)
    assert importance.max() > 2 * importance.min()  # the oracle tells the two ends apart
    # a float32 factor of a matrix with a condition number of about 1e3
    assert solver.report.importance_range == pytest.approx((importance.min(), importance.max()), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"target_avg_bits": 3.2}, {"target_avg_bits": 5, "sparsity": 0}], ids=str)
def test_the_report_counts_what_is_in_the_layer(settings):
    solver = solver_for(correlated_inputs(200, 40), bits=4, **settings)
    report, keep = solver.report, solver.compressed.solution.keep
    survivors = torch.ones(12, 40) if keep is None else keep.float()
    widths = solver.compressed.solution.widths.float()
    assert report.weights == 480
    assert report.sparsity == pytest.approx(1 - float(survivors.mean()), rel=1e-6)  # float32 quotient
    assert report.mean_bits == pytest.approx(float((survivors * widths).sum() / survivors.sum()), rel=1e-6)  # the same
    assert report.bits_histogram == {int(b): int((widths == b).sum()) for b in widths.unique()}
    assert report.allocation == ("quantile" if settings else "uniform")


def test_hooks_that_name_layers_within_their_block_give_a_row_per_layer_and_block():
    model = make_model("opt", num_hidden_layers=3)
    stats = QuantizationStats()
    expected = []
    for block in model.model.decoder.layers:  # the loop of the enhanced fork's guide
        gpts = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                gpts[name] = SparseGPT(module, layer_name=name, stats_collector=stats)
                gpts[name].quantizer = Quantizer()
        handles = [
            gpt.layer.register_forward_hook(lambda _, inp, out, gpt=gpt: gpt.add_batch(inp[0].data, out.data))
            for gpt in gpts.values()
        ]
        model(make_tokens(2, 20))
        for handle in handles:
            handle.remove()
        for name, gpt in gpts.items():
            gpt.fasterprune(0.5, target_avg_bits=4.0)
            gpt.free()
            before = sum(known == name for known, _ in expected)
            expected.append((name, name if not before else f"{name} #{before + 1}"))
            assert gpt.report.name == expected[-1][1]
    assert [linear.name for linear in stats.linears] == [shown for _, shown in expected]
    assert len({shown for _, shown in expected}) == 18
    assert stats.total_channels == 3 * (5 * 32 + 64)
    rows = [line for line in stats.summary().splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == [shown for _, shown in expected]
    assert "A name that came twice is numbered, in the order of the solves" in stats.summary()


def test_the_summary_shows_the_channels_per_width_of_each_layer_and_no_word_of_names_that_came_once():
    stats, expected = QuantizationStats(), {}
    for seed, target in enumerate((3.0, 4.0, 5.0)):
        solver = SparseGPT(nn.Linear(40, 12).requires_grad_(False), f"block #{seed}.fc1", stats)
        solver.quantizer = Quantizer()
        solver.add_batch(correlated_inputs(200, 40, seed))
        solver.fasterprune(0.5, target_avg_bits=target)
        widths = solver.compressed.solution.widths.tolist()
        expected[f"block #{seed}.fc1"] = [widths.count(bits) for bits in (2, 3, 4, 6, 8)]
    header, _, *rows = [line.split("|") for line in stats.summary().splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in header].index("2/3/4/6/8 bit")
    shown = {row[1].strip(): [int(count) for count in row[column].split("/")] for row in rows}
    assert shown == expected
    assert "numbered" not in stats.summary()
