"""Is mutual information a good reason to group channels? Groups by it against random ones of the same sizes.

The rule was fixed beforehand. The difference between groups by mutual information and random groups of the same sizes
is taken seed by seed and draw by draw, at equal true bytes, in perplexity and in the linears' output error. Information
is better where the mean of these differences is below zero by two of their standard deviations; unless it is so in
both figures and in most cases, grouping stays an experiment. Groups sorted by the largest weight of a column,
contiguous groups and no groups at all, the bytes spent on widths of single channels, say what else the bytes are good
for.

Cases are 3 and 4 bits, dense (GPTQ's solve) and with half of the weights removed (SparseGPT's).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sgpt_lightning.experiments.ablate import spread_of
from sgpt_lightning.experiments.arms import Arm
from sgpt_lightning.experiments.figures import write_bars
from sgpt_lightning.experiments.group_rule import Grouped, InformedGroups, Kind, Share, grouped
from sgpt_lightning.experiments.report import StudyReport
from sgpt_lightning.experiments.rows import Journal, Row
from sgpt_lightning.experiments.study import Outcome, Setting, by_arm, run_study
from sgpt_lightning.experiments.tables import mean
from sgpt_lightning.presets import Preset
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table

COUNTS: Mapping[Share, int] = {"grid": 4, "width": 8}
"""Groups of a linear."""
DRAWS = 5
"""Random groupings with each seed."""
NONE, INFORMATION, RANDOM = "no groups", "mutual information", "random"
DEVIATIONS = 2
Read = Callable[[Row], float]


class Case(NamedTuple):
    """What is done besides grouping."""

    name: str
    preset: Preset
    bits: int

    def arms(self, informed: InformedGroups, draws: int) -> list[Arm]:
        """Return no groups, then all ways to group, then other uses of the bytes."""
        uniform: dict[str, Any] = {"preset": self.preset, "target_avg_bits": self.bits}
        mixed = uniform | {"uniform_if_better": False}
        loss, one = Recipe(allocation="loss", **mixed), Recipe(allocation="uniform", **uniform)
        by_group = one if informed.share == "grid" else loss

        def arm(name: str, recipe: Recipe, kind: Kind, draw: int = 0) -> Arm:
            return Arm(f"{self.name}, {name}", recipe, grouped(kind, informed, draw))

        arms = [Arm(f"{self.name}, {NONE}", one), arm(INFORMATION, by_group, "information")]
        arms += [arm(f"{RANDOM} {draw}", by_group, "random", draw) for draw in range(draws)]
        arms += [arm("sorted", by_group, "sorted"), arm("contiguous", by_group, "contiguous")]
        arms.append(arm("a width per channel, loss", loss, "channels"))
        if informed.share == "grid":
            budget = Recipe(allocation="budget", **mixed)
            arms.append(arm("a width per channel, budget", budget, "channels"))
            arms.append(arm("one bit more, random", replace(budget, widths=(self.bits, self.bits + 1)), "shuffled"))
        return arms


CASES = (
    Case("dense 3 bit", "gptq", 3),
    Case("dense 4 bit", "gptq", 4),
    Case("50 % + 3 bit", "sparsegpt", 3),
    Case("50 % + 4 bit", "sparsegpt", 4),
)


def compare_groups(setting: Setting, journal: Journal, quick: bool, *, share: Share) -> StudyReport:
    """Compare groupings in all cases; arguments as the commands', and what a group shares."""
    cases, draws = (CASES[:1], 2) if quick else (CASES, DRAWS)
    informed = InformedGroups(COUNTS[share], share)
    outcome = run_study(setting, [arm for case in cases for arm in case.arms(informed, draws)], journal)
    text = outcome.texts[0]
    sections = [f"{group_table(outcome, case.name, text)}\n\n{verdict(outcome, case.name, text)}" for case in cases]
    said = (
        "Differences are against random groups of the same sizes, seed by seed and draw by draw; ± is their standard "
        "deviation."
    )

    def draw(path: Path) -> bool:
        bars: dict[str, tuple[float, float]] = {}
        for case in cases:
            for name in _rows(outcome, case.name):
                values = against_random(outcome, case.name, name, _perplexity(text))
                bars |= {f"{case.name}, {name}": spread_of(values)} if values and name not in (NONE, RANDOM) else {}
        return write_bars(bars, f"perplexity on {text} above random groups'", path)

    return StudyReport(outcome, "\n\n".join([*sections, said, structure_table(informed.seen)]), draw)


def _rows(outcome: Outcome, case: str) -> dict[str, list[Row]]:
    """Return the rows of a case by the name of the arm within it; random draws have one name."""
    found: dict[str, list[Row]] = {}
    for name, rows in by_arm(outcome.rows).items():
        if name.startswith(f"{case}, "):
            inner = name.removeprefix(f"{case}, ")
            found.setdefault(RANDOM if inner.startswith(f"{RANDOM} ") else inner, []).extend(rows)
    return found


def _perplexity(text: str) -> Read:
    return lambda row: row.perplexity[text]


def _error(row: Row) -> float:
    assert row.output_error is not None
    return row.output_error


def against_random(outcome: Outcome, case: str, name: str, read: Read) -> list[float]:
    """Return by how much a figure of an arm is above that of random groups, for each seed and draw that ran.

    Args:
        outcome: of the study.
        case: the name of a case.
        name: of the arm, within the case.
        read: a figure of a row.
    """
    rows = _rows(outcome, case)
    base = {row.seed: read(row) for row in rows.get(name, [])}
    return [base[row.seed] - read(row) for row in rows.get(RANDOM, []) if row.seed in base]


def is_better(differences: Sequence[float]) -> bool:
    """Tell whether differences are below zero by `DEVIATIONS` of their standard deviations; False for a single one."""
    average, deviation = spread_of(differences)
    return average + DEVIATIONS * deviation < 0


def verdict(outcome: Outcome, case: str, text: str) -> str:
    """Return what the rule says of a case, a line for each figure."""
    figures = {"perplexity": (_perplexity(text), 2), "output error": (_error, 5)}
    return "\n".join(f"- {case}: {_judged(outcome, case, name, *figures[name])}" for name in figures)


def _judged(outcome: Outcome, case: str, figure: str, read: Read, digits: int) -> str:
    values = against_random(outcome, case, INFORMATION, read)
    if len(values) < 2:
        return f"no verdict on {figure}, {len(values)} pairs of {INFORMATION} and {RANDOM} groups ran"
    return (
        f"{figure} by {INFORMATION} is {_in_words(values, digits)} from that of {RANDOM} groups, lower in "
        f"{sum(value < 0 for value in values)} of {len(values)} pairs: "
        f"{'better' if is_better(values) else 'NOT better'} by {DEVIATIONS} standard deviations"
    )


def group_table(outcome: Outcome, case: str, text: str) -> str:
    """Return one Markdown row per arm of a case; failed ones are left out."""
    lines = []
    for name, rows in _rows(outcome, case).items():
        cells = [name, f"{mean(rows, lambda row: row.bits_per_weight):.3f}"]
        for read, digits in ((_perplexity(text), 2), (_error, 5)):
            cells.append(f"{mean(rows, read):.{digits}f}")
            values = [] if name == RANDOM else against_random(outcome, case, name, read)
            cells.append(_in_words(values, digits))
        lines.append((*cells, f"{mean(rows, lambda row: row.seconds):.1f}"))
    return format_table((case, "bits/weight", text, "difference", "output error", "difference", "seconds"), lines)


def structure_table(seen: Mapping[str, Grouped]) -> str:
    """Return what groups by mutual information are like, a Markdown row for each kind of linear, means over blocks."""
    if not seen:
        return "The groups are not shown: all rows were measured before."
    kinds: dict[str, list[Grouped]] = {}
    for name, groups in seen.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(groups)
    lines = []
    for kind, found in kinds.items():
        sizes = [sorted(groups.sizes) for groups in found]
        means = [(len(some), some[0], some[-1]) for some in sizes]
        count, least, most = (statistics.fmean(values) for values in zip(*means, strict=True))
        figures = [statistics.fmean(getattr(groups, part) for groups in found) for part in Grouped._fields[1:]]
        lines.append((kind, f"{count:.1f}", f"{least:.0f}", f"{most:.0f}", *(f"{figure:.4f}" for figure in figures)))
    head = ("input of", "groups", "smallest", "largest", "nats inside a group", "nats between groups", "silhouette")
    return format_table(head, lines)


def _in_words(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return "".join(f"{value:+.{digits}f}" for value in values)
    average, deviation = spread_of(values)
    return f"{average:+.{digits}f} ± {deviation:.{digits}f}"
