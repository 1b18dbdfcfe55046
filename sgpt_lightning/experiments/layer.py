"""One layer on random data: arms without a model, where the true inputs are known and as many as one likes.

The weight is Gaussian with output channels of different sizes; inputs are Gaussian with channels of different sizes
that a random rotation of a few directions makes depend on each other, so that there is something to rank and to
compensate. What is measured is what a model cannot tell: the error on inputs that no solve has seen.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.experiments.arms import Arm
from sgpt_lightning.experiments.study import FAILURES
from sgpt_lightning.experiments.tables import with_spread
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.messages import told
from sgpt_lightning.report.tables import format_table

SHAPE, TOKENS = (256, 512), 4096
"""(out_features, in_features) of the layer, and tokens that a solve sees; as many others measure it."""


class LayerRow(NamedTuple):
    """One arm on one random layer."""

    arm: str
    seed: int
    bits_per_weight: float
    """True bits, everything that is stored counted."""
    error: float
    """Squared output error as a fraction of the squared output, on unseen inputs."""
    zeros: float
    """Fraction of zeros."""
    seconds: float
    failure: str | None = None
    """Why the arm failed; the figures are NaN then."""


def random_layer(seed: int, shape: tuple[int, int] = SHAPE, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight `[out_features, in_features]` and two sets of inputs `[tokens, in_features]`, all float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    outputs, inputs = shape
    weight = normal(outputs, inputs) * (0.5 * normal(outputs, 1)).exp() / inputs**0.5
    sizes, mixing = normal(inputs).exp(), normal(inputs // 8, inputs) / 2
    draws = [(normal(tokens, inputs) + normal(tokens, inputs // 8) @ mixing) * sizes for _ in range(2)]
    return weight, draws[0], draws[1]


def run_layers(arms: Sequence[Arm], seeds: Sequence[int]) -> list[LayerRow]:
    """Solve a random layer per seed with every arm; a failed arm is a row with its failure."""
    rows = []
    for seed in seeds:
        weight, seen, unseen = random_layer(seed)
        statistics = InputStatistics(weight.shape[1])
        statistics.add(seen)
        rows += [_run(arm, weight, statistics, unseen, seed) for arm in arms]
    return rows


def _run(arm: Arm, weight: Tensor, statistics: InputStatistics, unseen: Tensor, seed: int) -> LayerRow:
    started = time.perf_counter()
    try:
        solution = arm.solve(weight, statistics, seed).solution
    except FAILURES as error:
        nan = float("nan")
        return LayerRow(arm.name, seed, nan, nan, nan, nan, told(error))
    seconds = time.perf_counter() - started
    stored, bits = solution.weight(), 8 * pack_weight(solution).nbytes / weight.numel()
    lost = (unseen @ (stored - weight).T).square().sum() / (unseen @ weight.T).square().sum()
    return LayerRow(arm.name, seed, bits, float(lost), float((stored == 0).float().mean()), seconds)


def layer_table(rows: Sequence[LayerRow]) -> str:
    """Return one Markdown row per arm that did not fail; ± as in `with_spread`."""
    cells = []
    for name in dict.fromkeys(row.arm for row in rows if row.failure is None):
        runs = [row for row in rows if row.arm == name and row.failure is None]
        bits, errors, zeros, seconds = zip(*(run[2:6] for run in runs), strict=True)
        count = len(runs)
        cells.append(
            (
                name,
                f"{sum(bits) / count:.2f}",
                with_spread(errors, 5),
                f"{sum(zeros) / count:.1%}",
                f"{sum(seconds) / count:.2f}",
            )
        )
    return format_table(("one layer, random data", "bits/weight", "error", "zeros", "seconds"), cells)
