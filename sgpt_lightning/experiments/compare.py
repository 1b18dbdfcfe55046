"""Ways to compress side by side: the published SparseGPT, the fork's three widths, five widths, ours; layer and model.

All but the rate-coded arms remove half of the weights and spend 4 bits, or a mean of 4, on what is left, which is what
the fork's comparison asks for; the thresholds have no budget and take what they take. The rate-coded arm gets the true
bits that `SparseGPT 50 % + 4 bit` needs for mask and codes, as near as two decimals.
"""

import math
import statistics
from pathlib import Path

from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.controls import thresholds
from sgpt_lightning.experiments.figures import write_bars
from sgpt_lightning.experiments.layer import layer_table, run_layers
from sgpt_lightning.experiments.report import StudyReport
from sgpt_lightning.experiments.rows import Journal
from sgpt_lightning.experiments.study import Setting, by_arm, run_study
from sgpt_lightning.experiments.tables import SPREAD, mean, study_table
from sgpt_lightning.recipe import Recipe

TRUE_BITS = 3.07
"""Bits per weight of opt-mini's linears at 50 % zeros and 4 bits: a mask of 1 bit, codes of 2, ranges."""
LAYER_SEEDS = (0, 1, 2)
MIXED = {"preset": "sparsegpt", "uniform_if_better": False}
THREE_WIDTHS = Recipe(preset="sparsegpt", allocation="quantile", uniform_if_better=False)
ARMS = (
    ours("SparseGPT 50 % + 4 bit", preset="sparsegpt"),
    Arm("50 % + 2/4/8 bit by threshold", THREE_WIDTHS, thresholds()),
    *(ours(f"50 % + mean 4 bit, {kind}", allocation=kind, **MIXED) for kind in ("quantile", "budget", "loss")),
    ours(f"rate-coded {TRUE_BITS}", coding="entropy", target_bits_per_weight=TRUE_BITS),
)
BEST = ours("best, 50 % + mean 4 bit")
"""Ours at fixed widths; left out of a quick run, where it alone would take a third of the time."""


def compare(setting: Setting, journal: Journal, quick: bool) -> StudyReport:
    """Compare all arms on random layers and on a model; arguments as the commands'."""
    arms = ARMS if quick else (*ARMS, BEST)
    layers = run_layers(arms, LAYER_SEEDS)
    outcome = run_study(setting, arms, journal)
    text = outcome.texts[0]

    def draw(path: Path) -> bool:
        dense = outcome.rows[0].perplexity[text]
        bars = {}
        for name, runs in list(by_arm(outcome.rows).items())[1:]:
            lost = [run.perplexity[text] - dense for run in runs]
            bars[f"{name}: {mean(runs, lambda run: run.bits_per_weight):.2f} bits"] = (
                statistics.fmean(lost),
                (max(lost) - min(lost)) / 2 if len(lost) > 1 else math.nan,
            )
        return write_bars(bars, f"perplexity on {text} above the dense model's {dense:.2f}", path)

    tables = f"{layer_table(layers)}\n\n{study_table(outcome)}\n\n{SPREAD}"
    failures = [f"FAILED: {row.arm}, random layer {row.seed}: {row.failure}" for row in layers if row.failure]
    return StudyReport(outcome, tables, draw, failures)
