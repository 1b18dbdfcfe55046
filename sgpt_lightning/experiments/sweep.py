"""The bit-budget curve: mean bits from 2.5 to 5, file bytes and perplexity, per method.

Fixed widths remove half of the weights and spend the mean on the survivors; `rate-coded` spends as many true bits as
`budget` does at the same place of the sweep, counted for the layers of opt-mini: a mask of one bit, half of the codes.
A curve is monotone when no larger budget gives a worse perplexity; it is said where one does, and by how much.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.figures import write_curves
from sgpt_lightning.experiments.report import StudyReport
from sgpt_lightning.experiments.rows import Journal, Row
from sgpt_lightning.experiments.study import Outcome, Setting, by_arm, run_study
from sgpt_lightning.experiments.tables import SPREAD, mean, study_table

BITS, QUICK_BITS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0), (2.5, 3.5, 5.0)
METHODS = ("quantile", "budget", "loss", "rate-coded")


def arm_of(method: str, bits: float) -> Arm:
    """Return the arm of a method at mean bits per survivor, or for `rate-coded` at about as many true bits."""
    name = f"{method}, {bits:g}"
    if method == "rate-coded":
        true_bits = 1 + bits / 2 + 0.07
        return ours(name, coding="entropy", target_bits_per_weight=true_bits)
    settings = {"preset": "sparsegpt", "target_avg_bits": bits, "uniform_if_better": False}
    return ours(name, allocation=method, **settings)


def sweep(setting: Setting, journal: Journal, quick: bool) -> StudyReport:
    """Measure all methods at all budgets; arguments as the commands'."""
    budgets = QUICK_BITS if quick else BITS
    arms = {method: [arm_of(method, bits) for bits in budgets] for method in METHODS}
    outcome = run_study(setting, [arm for some in arms.values() for arm in some], journal)
    text, rows = outcome.texts[0], by_arm(outcome.rows)
    lines = [
        monotone_line(method, [(arm.name, rows[arm.name]) for arm in some if arm.name in rows], text)
        for method, some in arms.items()
    ]

    def draw(path: Path) -> bool:
        return write_curves(_curves(outcome, arms), f"perplexity on {text}", path, outcome.rows[0].perplexity[text])

    return StudyReport(outcome, f"{study_table(outcome)}\n\n{SPREAD}\n\n" + "\n".join(lines), draw)


def monotone_line(method: str, points: Sequence[tuple[str, Sequence[Row]]], text: str) -> str:
    """Say whether more bits never cost more perplexity, means over the seeds, and more bytes always were taken.

    Args:
        method: name of the curve.
        points: name of the arm and its rows, by ascending budget.
        text: whose perplexity counts.
    """
    if len(points) < 2:
        return f"{method}: no curve, fewer than two of its arms ran"
    wrong = []
    for (_, before), (name, after) in itertools.pairwise(points):
        rise = mean(after, lambda row: row.perplexity[text]) - mean(before, lambda row: row.perplexity[text])
        grown = mean(after, lambda row: row.file_bytes) - mean(before, lambda row: row.file_bytes)
        if rise > 0:
            wrong.append(f"perplexity rises by {rise:.2f} up to {name}")
        if grown <= 0:
            wrong.append(f"bytes do not rise up to {name}")
    return f"{method}: " + ("monotone" if not wrong else "NOT monotone, " + ", ".join(wrong))


def _curves(outcome: Outcome, arms: Mapping[str, Sequence[Arm]]) -> dict[str, list[tuple[float, float]]]:
    rows, text = by_arm(outcome.rows), outcome.texts[0]
    return {
        method: [
            (
                mean(rows[arm.name], lambda row: row.bits_per_weight),
                mean(rows[arm.name], lambda row: row.perplexity[text]),
            )
            for arm in some
            if arm.name in rows
        ]
        for method, some in arms.items()
    }
