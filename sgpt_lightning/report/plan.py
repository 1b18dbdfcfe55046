"""The rate plan of a model: the true bits a weight of each linear, decoder block by kind of linear.

A linear's block is the first number in its name and its kind is what follows, so a plan needs no model. The experts of
a mixture are one kind. A name without a number, as a script of its own may give, has no place in a plan.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sgpt_lightning.format.records import LinearReport
from sgpt_lightning.report.tables import format_table, true_bits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLACE = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_INCHES_A_CELL, _INCHES_AROUND = (0.62, 0.3), (2.2, 1.3)
_PIXELS_AN_INCH = 110


class RatePlan(NamedTuple):
    """True bits a weight, as they were stored."""

    blocks: list[int]
    """Indices of the decoder blocks, ascending."""
    kinds: list[str]
    """Kinds of linears, in the order of the model."""
    bits: np.ndarray
    """float64 `[blocks, kinds]`; NaN where there is no such linear or it was left as it was."""

    @property
    def headings(self) -> list[str]:
        """The last part of each kind, where that tells them apart; else the kinds."""
        short = [kind.rpartition(".")[2] for kind in self.kinds]
        return short if len(set(short)) == len(short) else self.kinds


def rate_plan(linears: Iterable[LinearReport]) -> RatePlan | None:
    """Gather what each linear took; None if no name has a block in it."""
    cells: dict[tuple[int, str], list[LinearReport]] = {}
    for linear in linears:
        found = _PLACE.fullmatch(linear.name)
        if found:
            cells.setdefault((int(found[1]), _kind(found)), []).append(linear)
    if not cells:
        return None
    blocks, kinds = sorted({block for block, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
    bits = [[true_bits(cells[block, kind]) if (block, kind) in cells else np.nan for kind in kinds] for block in blocks]
    return RatePlan(blocks, kinds, np.array(bits))


def plan_table(linears: Iterable[LinearReport]) -> str:
    """Return the plan as a table of bits with one decimal, `-` where there is nothing; empty if there is no plan."""
    plan = rate_plan(linears)
    if plan is None:
        return ""
    rows = [
        (str(block), *("-" if np.isnan(bits) else f"{bits:.1f}" for bits in row))
        for block, row in zip(plan.blocks, plan.bits, strict=True)
    ]
    return format_table(("block, bits/weight", *plan.headings), rows)


def kind_table(linears: Iterable[LinearReport]) -> str:
    """Return a row per kind of linear: how many there are, their true bits a weight and their share of zeros.

    Empty if no name has a block in it.
    """
    kinds: dict[str, list[LinearReport]] = {}
    for linear in linears:
        if found := _PLACE.fullmatch(linear.name):
            kinds.setdefault(_kind(found), []).append(linear)
    rows = [(kind, str(len(its)), f"{true_bits(its):.2f}", f"{_zeros(its):.1%}") for kind, its in kinds.items()]
    return format_table(("linear", "number", "bits/weight", "zeros"), rows) if rows else ""


def _kind(place: re.Match[str]) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", place[2])


def _zeros(linears: Sequence[LinearReport]) -> float:
    return sum(linear.sparsity * linear.weights for linear in linears) / sum(linear.weights for linear in linears)


def plan_figure(linears: Iterable[LinearReport]) -> "Figure | None":
    """Draw the plan, a cell coloured by its bits; None if there is none, or no matplotlib to draw it with."""
    plan = rate_plan(linears)
    try:
        # Without pyplot, whose backend and open figures are the user's.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if plan is None:
        return None
    cells = (len(plan.kinds), len(plan.blocks))
    wide, high = (a * n + b for a, n, b in zip(_INCHES_A_CELL, cells, _INCHES_AROUND, strict=True))
    figure = Figure(figsize=(wide, high), dpi=_PIXELS_AN_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(plan.bits, cmap="viridis", aspect="auto", interpolation="nearest")
    middle = (np.nanmin(plan.bits) + np.nanmax(plan.bits)) / 2
    for (row, column), bits in np.ndenumerate(plan.bits):
        if not np.isnan(bits):
            color = "black" if bits > middle else "white"
            axes.text(column, row, f"{bits:.1f}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="linear", ylabel="decoder block")
    axes.set_xticks(range(cells[0]), plan.headings, rotation=30, ha="right")
    axes.set_yticks(range(cells[1]), list(map(str, plan.blocks)))
    figure.colorbar(image, label="true bits per weight")
    return figure


def plan_image(linears: Sequence[LinearReport]) -> np.ndarray | None:
    """Draw the plan as pixels, uint8 `[height, width, 3]`; None as for `plan_figure`."""
    figure = plan_figure(linears)
    if figure is None:
        return None
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]  # Agg's own


def write_plan(linears: Iterable[LinearReport], path: Path) -> bool:
    """Draw the plan into a PNG file; tell whether there was something to draw and something to draw it with."""
    figure = plan_figure(linears)
    if figure is not None:
        figure.savefig(path, format="png")
    return figure is not None
