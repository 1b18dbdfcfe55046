"""Pictures of studies; matplotlib is optional, and who has none is told so by the caller.

Without pyplot, whose backend and open figures are the user's.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NO_PICTURE = "no picture: matplotlib is not installed (pip install 'sgpt-lightning[plots]')"
COLORS = {"rival": "tab:gray", "ours": "tab:orange"}
_WIDTH, _PIXELS_AN_INCH = 8.0, 110


class Point(NamedTuple):
    """An arm in a figure."""

    name: str
    family: str
    bits: float
    """True bits per weight."""
    value: float
    """Perplexity."""


def _write(path: Path, draw: Callable[[Any], None], height: float = 5.0) -> bool:
    """Let a picture be drawn on a pair of axes, `height` inches high, and write it; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(_WIDTH, height), dpi=_PIXELS_AN_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    figure.savefig(path, format="png")
    return True


def write_front(points: Sequence[Point], dense: float, text: str, path: Path, most_bits: float = 5.0) -> bool:
    """Draw perplexity over true bits per weight: all points, and a curve through the best of each family.

    Args:
        points: arms, without the dense model.
        dense: perplexity of the dense model.
        text: what the perplexity was measured on.
        path: PNG file to write.
        most_bits: points beyond are left out.

    Returns:
        Whether there is a picture; False without matplotlib.
    """

    def draw(axes: Any) -> None:
        for family, color in COLORS.items():
            shown = sorted((p.bits, p.value, p.name) for p in points if p.family == family and p.bits <= most_bits)
            front = [point for point in shown if all(point[1] <= other[1] for other in shown if other[0] <= point[0])]
            axes.plot(*_columns([point[:2] for point in front]), "o-", color=color, label=f"{family}, best at its bits")
            axes.scatter(*_columns([point[:2] for point in shown]), color=color, s=12, alpha=0.5)
            for bits, value, name in front:
                axes.annotate(name, (bits, value), textcoords="offset points", xytext=(4, 4), fontsize=7, color=color)
        _finish(axes, f"perplexity on {text}", dense)

    return _write(path, draw)


def write_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], label: str, path: Path, dense: float | None = None
) -> bool:
    """Draw one curve of (true bits per weight, value) for each method.

    Args:
        curves: points by method.
        label: what the values are.
        path: PNG file to write.
        dense: value of the dense model, if it has one.

    Returns:
        Whether there is a picture; False without matplotlib.
    """

    def draw(axes: Any) -> None:
        for name, points in curves.items():
            axes.plot(*_columns(points), "o-", label=name)
        _finish(axes, label, dense)

    return _write(path, draw)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [bits for bits, _ in points], [value for _, value in points]


def _finish(axes: Any, label: str, dense: float | None) -> None:
    axes.margins(x=0.12)
    axes.set(xlabel="true bits per weight of the linears", ylabel=label, yscale="log")
    if dense is not None:
        axes.axhline(dense, color="black", linestyle=":", label=f"dense, 16 bits: {dense:.2f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.legend(loc="upper right", fontsize=8)


def write_bars(bars: Mapping[str, tuple[float, float]], label: str, path: Path) -> bool:
    """Draw a bar with a whisker for each name.

    Args:
        bars: value and standard deviation by name.
        label: what the values are.
        path: PNG file to write.

    Returns:
        Whether there is a picture; False without matplotlib.
    """

    def draw(axes: Any) -> None:
        values, spreads = [value for value, _ in bars.values()], [spread for _, spread in bars.values()]
        axes.barh(list(bars), values, xerr=spreads, color="tab:orange", ecolor="black", capsize=3)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=label)

    return _write(path, draw, max(2.0, 0.3 * len(bars) + 1))
