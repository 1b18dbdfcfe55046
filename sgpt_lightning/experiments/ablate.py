"""What a part is worth: leave out one importance score, or switch off one part of the solve, and see what changes.

Scores are ablated where they decide most, in `budget` allocation of five widths in the published solve (50 % zeros,
mean of 4 bits). The controls say how much any ranking is worth: the same scores given to other channels at random,
magnitude alone (the score `weight`), and one width for all. Parts are switched off one at a time in the preset `best`
at 50 % zeros and a mean of 4 bits.

Every difference is taken seed by seed, on the same windows; beside its mean stands the standard deviation of these
differences over the seeds, which is what tells an effect from the draw of the windows.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.controls import shuffled_scores
from sgpt_lightning.experiments.figures import write_bars
from sgpt_lightning.experiments.report import StudyReport
from sgpt_lightning.experiments.rows import Journal, Row
from sgpt_lightning.experiments.study import Outcome, Setting, by_arm, run_study
from sgpt_lightning.experiments.tables import mean
from sgpt_lightning.presets import ImportanceWeights, Parts
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table

SCORES = tuple(f.name for f in fields(ImportanceWeights))
ALL_SCORES, ALL_PARTS = "all five scores", "all parts"
_BY_SCORES: dict[str, Any] = {"preset": "sparsegpt", "allocation": "budget", "uniform_if_better": False}
DIFFERENCE = "Differences are against the first row, seed by seed; ± is their standard deviation over the seeds."


def score_arms() -> list[Arm]:
    """Return the baseline, each score left out, each alone, and the controls."""
    weights = asdict(ImportanceWeights())
    arms = [ours(ALL_SCORES, **_BY_SCORES)]
    for left_out in SCORES:
        rest = {name: weight / (1 - weights[left_out]) for name, weight in weights.items()} | {left_out: 0.0}
        arms.append(ours(f"without {left_out}", importance=ImportanceWeights(**rest), **_BY_SCORES))
    for kept in SCORES:
        name = f"{kept} alone" + (" (magnitude)" if kept == "weight" else "")
        only = {score: float(score == kept) for score in SCORES}
        arms.append(ours(name, importance=ImportanceWeights(**only), **_BY_SCORES))
    shuffled = Arm("random scores (shuffled)", Recipe(**_BY_SCORES), shuffled_scores())
    return [*arms, shuffled, ours("no scores: 4 bits for all", preset="sparsegpt", allocation="uniform")]


def part_arms() -> list[Arm]:
    """Return the baseline and each part of the solve switched off: False for a switch, 0 for a number."""
    off = {f.name: type(getattr(Parts(), f.name))(0) for f in fields(Parts)}
    return [ours(ALL_PARTS), *(ours(f"without {name}", parts={name: value}) for name, value in off.items())]


def ablate(setting: Setting, journal: Journal, quick: bool) -> StudyReport:
    """Measure all of them; arguments as the commands'."""
    scores, parts = score_arms(), part_arms()
    outcome = run_study(setting, [*scores, *parts], journal)
    text = outcome.texts[0]
    tables = [difference_table(outcome, [arm.name for arm in arms], text) for arms in (scores, parts)]
    titles = ("importance scores, budget allocation", "parts of the solve, preset best")
    sections = [f"{title}:\n\n{table}" for title, table in zip(titles, tables, strict=True)]

    def draw(path: Path) -> bool:
        bars: dict[str, tuple[float, float]] = {}
        for baseline, *others in (scores, parts):
            for arm in others:
                values = differences(outcome, baseline.name, arm.name, lambda row: row.perplexity[text])
                bars |= {arm.name: spread_of(values)} if values else {}
        return write_bars(bars, f"change of perplexity on {text}", path)

    return StudyReport(outcome, "\n\n".join([*sections, DIFFERENCE]), draw)


def differences(outcome: Outcome, baseline: str, arm: str, read: Callable[[Row], float]) -> list[float]:
    """Return by how much a figure of an arm is above the baseline's, a number for each seed with which both ran."""
    rows = by_arm(outcome.rows)
    base = {row.seed: read(row) for row in rows.get(baseline, [])}
    return [read(row) - base[row.seed] for row in rows.get(arm, []) if row.seed in base]


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (of a sample, n - 1); NaN for the deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def difference_table(outcome: Outcome, names: Sequence[str], text: str) -> str:
    """Return one Markdown row per arm, of which the first is the baseline; failed arms are left out."""
    measured, baseline = by_arm(outcome.rows), names[0]

    def perplexity(row: Row) -> float:
        return row.perplexity[text]

    def cells(name: str, read: Callable[[Row], float], digits: int) -> tuple[str, str]:
        values = [] if name == baseline else differences(outcome, baseline, name, read)
        return f"{mean(measured[name], read):.{digits}f}", _difference(values, digits + 1)

    rows = [
        (
            name,
            f"{mean(measured[name], lambda run: run.bits_per_weight):.3f}",
            *cells(name, perplexity, 2),
            *cells(name, _error, 4),
        )
        for name in names
        if name in measured
    ]
    return format_table(("arm", "bits/weight", text, "difference", "output error", "difference"), rows)


def _error(row: Row) -> float:
    assert row.output_error is not None
    return row.output_error


def _difference(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation; of a single value no deviation, and nothing of none."""
    if not values:
        return ""
    average, deviation = spread_of(values)
    return f"{average:+.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")
