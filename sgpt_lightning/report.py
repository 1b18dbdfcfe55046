"""What was done and what it cost, as numbers and as tables."""

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import torch

from sgpt_lightning.hessian import DampStatus
from sgpt_lightning.layout import Layout
from sgpt_lightning.packed import PackedWeight
from sgpt_lightning.recipe import MAX_BITS, Allocation
from sgpt_lightning.solution import CompressedLinear


@dataclass(frozen=True)
class LinearReport:
    """One compressed linear."""

    name: str
    weights: int
    """Entries of the matrix, removed ones included."""
    sparsity: float
    """Fraction removed."""
    mean_bits: float | None
    """Mean code bits per surviving weight; None if not quantized."""
    bits_histogram: dict[int, int]
    """Channels per bit width (output channels for the allocation `rows`, else input); empty if not quantized."""
    importance_range: tuple[float, float]
    """Lowest and highest channel importance."""
    relative_error: float | None
    """Squared output error as a fraction of the squared output; None where no inputs were seen to measure it on."""
    damp_percent: float
    """Damping used, a fraction of the mean Hessian diagonal."""
    status: str
    """`ok`, `damped` or `float64`."""
    bytes: int
    """Bytes stored for the weight: codes, mask, ranges, zero points and widths."""
    layout: str
    """`dense`, `bitmap` or `pattern`."""
    allocation: str | None
    """How widths were dealt in the end; `uniform` where one width did better than what was asked for."""

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: all bytes stored, over all weights."""
        return 8 * self.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "LinearReport":
        """Read what `to_dict` gave, also after it went through JSON (which turns keys into text, tuples into lists).

        Raises:
            ValueError: a field is missing, unknown, or holds what no solve can have given, such as NaN.
        """
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"the report of a linear needs the fields {', '.join(_RULES)}, got {values!r:.200}")
        for name, (rule, holds) in _RULES.items():
            if not holds(values[name]):
                raise ValueError(f"report of {values['name']!r:.80}: {name} must be {rule}, got {values[name]!r:.80}")
        if (values["mean_bits"] is None) != (not values["bits_histogram"]):
            raise ValueError(
                f"report of {values['name']!r:.80}: mean_bits and bits_histogram must both be there or not, "
                f"got {values['mean_bits']!r} and {values['bits_histogram']!r}"
            )
        histogram = {int(bits): count for bits, count in values["bits_histogram"].items()}
        low, high = values["importance_range"]
        return cls(**(values | {"bits_histogram": histogram, "importance_range": (low, high)}))


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_number(value: Any, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_histogram(value: Any) -> bool:
    widths = {str(bits) for bits in range(1, MAX_BITS + 1)}
    return isinstance(value, dict) and all(str(key) in widths and _is_whole(value[key], 1) for key in value)


def _is_range(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("text", lambda value: isinstance(value, str)),
    "weights": ("a whole number from 1", lambda value: _is_whole(value, 1)),
    "sparsity": ("a fraction in [0, 1]", lambda value: _is_number(value, 0, 1)),
    "mean_bits": (f"None or in [0, {MAX_BITS}]", lambda value: value is None or _is_number(value, 0, MAX_BITS)),
    "bits_histogram": (f"channels per width from 1 to {MAX_BITS}", _is_histogram),
    "importance_range": ("two finite numbers, ascending", _is_range),
    "relative_error": ("None or a finite number", lambda value: value is None or _is_number(value)),
    "damp_percent": ("a finite number from 0", lambda value: _is_number(value, 0)),
    "status": (f"one of {', '.join(get_args(DampStatus))}", lambda value: value in get_args(DampStatus)),
    "bytes": ("a whole number from 1", lambda value: _is_whole(value, 1)),
    "layout": (f"one of {', '.join(get_args(Layout))}", lambda value: value in get_args(Layout)),
    "allocation": (
        f"None or one of {', '.join(get_args(Allocation))}",
        lambda value: value is None or value in get_args(Allocation),
    ),
}
"""What `LinearReport.from_dict` asks of each field, in words and as a test."""


@dataclass(frozen=True)
class SolvedLinear:
    """One linear after the solve: what will be stored (on the CPU) and how it went."""

    packed: PackedWeight
    report: LinearReport


def describe_linear(name: str, compressed: CompressedLinear, packed: PackedWeight) -> LinearReport:
    """Gather the figures of one solved linear."""
    shape = packed.spec.shape
    keep = torch.ones(shape, dtype=torch.bool) if compressed.keep is None else compressed.keep.cpu()
    kept = int(keep.sum())
    mean_bits = None
    histogram: dict[int, int] = {}
    if compressed.widths is not None:
        bits = compressed.widths.cpu().long()
        spent = int((bits * keep.sum(1 if packed.spec.width_axis == "output" else 0)).sum())
        mean_bits = spent / max(kept, 1)
        histogram = dict(sorted(Counter(bits.tolist()).items()))
    return LinearReport(
        name=name,
        weights=keep.numel(),
        sparsity=1 - kept / keep.numel(),
        mean_bits=mean_bits,
        bits_histogram=histogram,
        importance_range=compressed.importance_range,
        relative_error=compressed.relative_error,
        damp_percent=compressed.damp_percent,
        status=compressed.status,
        bytes=packed.nbytes,
        layout=packed.spec.layout,
        allocation=compressed.allocation,
    )


class QuantizationStats:
    """Collects one report per linear and sums them up.

    The name and `print_summary` are those of the enhanced SparseGPT fork, so that its scripts keep working; what this
    package calls a linear is a layer there, and in the summary.
    """

    def __init__(self) -> None:
        self.linears: list[LinearReport] = []

    def add(self, linear: LinearReport, replaces: LinearReport | None = None) -> LinearReport:
        """Add one linear under a name that no other has.

        Args:
            linear: the report. A second `fc1` is kept as `fc1 #2`, and so on in the order in which they come, which
                is that of the blocks in a script that names its layers within the block; one without a name is
                `unnamed`.
            replaces: what `add` returned for an earlier solve of the same linear: its row is taken over, so that no
                channel is counted twice.

        Returns:
            The report as it is kept.
        """
        others = [known for known in self.linears if known is not replaces]
        kept = replace(linear, name=_free_name(linear.name or "unnamed", {known.name for known in others}))
        if len(others) == len(self.linears):
            self.linears.append(kept)
        else:
            self.linears = [kept if known is replaces else known for known in self.linears]
        return kept

    def remove(self, linear: LinearReport) -> None:
        """Take out what `add` returned, for a linear that is dense again; nothing happens if it is not there."""
        self.linears = [known for known in self.linears if known is not linear]

    @property
    def total_channels(self) -> int:
        """Channels that have a width, of all linears."""
        return sum(self.channels_per_width.values())

    @property
    def channels_per_width(self) -> dict[int, int]:
        """Channels per bit width over all linears."""
        return overall_histogram(self.linears)

    @property
    def mean_bits(self) -> float | None:
        """Mean code bits per surviving weight over all quantized linears; None if nothing was quantized."""
        return mean_bits(self.linears)

    def summary(self) -> str:
        """Return the whole summary as text: totals, and a table with one row per layer."""
        if not self.linears:
            return "Nothing was compressed: no layer was solved."
        lines = [f"Layers solved: {len(self.linears)}"]
        average = self.mean_bits
        if average is None:
            lines.append("Nothing was quantized: no layer had a quantizer. Survivors keep their 16 or 32 bits.")
        else:
            total = self.total_channels
            lines += [f"Mean bits per surviving weight: {average:.3f}", f"Quantized channels: {total}"]
            lines += [f"  {bits} bit: {n:8d} channels, {n / total:6.1%}" for bits, n in self.channels_per_width.items()]
        unquantized = sum(linear.mean_bits is None for linear in self.linears)
        if average is not None and unquantized:
            lines.append(f"Layers that were not quantized (16+ in the table): {unquantized}")
        prefix = _shared_prefix([linear.name for linear in self.linears]) if len(self.linears) > 1 else ""
        if prefix:
            lines.append(f"Layers of {prefix.removesuffix('.')}:")
        shown = [replace(linear, name=linear.name.removeprefix(prefix)) for linear in self.linears]
        return "\n".join([*lines, table_of_linears(shown, "layer")])

    def print_summary(self) -> None:
        """Print the summary."""
        print(self.summary())


def _free_name(name: str, taken: set[str]) -> str:
    """Return the name, or the first of `name #2`, `name #3`, ... that is not taken."""
    candidates = itertools.chain([name], (f"{name} #{count}" for count in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _shared_prefix(names: Sequence[str]) -> str:
    """Return the parents that all names have, with the dot behind them; empty if there is none."""
    parents = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    return "".join(f"{level[0]}." for level in shared)


def overall_histogram(linears: Iterable[LinearReport]) -> dict[int, int]:
    """Channels per bit width, summed over linears."""
    total: Counter[int] = Counter()
    for linear in linears:
        total.update(linear.bits_histogram)
    return dict(sorted(total.items()))


def mean_bits(linears: Iterable[LinearReport]) -> float | None:
    """Mean code bits per surviving weight, over the quantized linears; None if there is none or nothing survived."""
    means: list[float] = []
    survivors: list[float] = []
    for linear in linears:
        if linear.mean_bits is not None:
            means.append(linear.mean_bits)
            survivors.append(linear.weights * (1 - linear.sparsity))
    return statistics.fmean(means, weights=survivors) if sum(survivors) else None


def table_of_linears(linears: Sequence[LinearReport], first: str = "linear", *, details: bool = False) -> str:
    """Lay out one row per linear: how much is left, at what widths, in how many bytes, and how well it does.

    `bits/weight` counts all bytes stored. The channels per width stand in one column under their widths, such as
    `2/3/4 bit`. `error` is the squared output error as a fraction of the squared output. With five widths, counts of
    three digits and no details, a row is 93 columns and the longest name.

    Args:
        linears: what to show.
        first: heading of the names.
        details: show the range of importance and the layout as well.
    """
    columns: dict[str, Callable[[LinearReport], str]] = {
        first: lambda linear: linear.name,
        "sparsity": lambda linear: f"{linear.sparsity:.1%}",
        "mean bits": lambda linear: "16+" if linear.mean_bits is None else f"{linear.mean_bits:.2f}",
        "bits/weight": lambda linear: f"{linear.bits_per_weight:.2f}",
    }
    widths = overall_histogram(linears)
    if widths:
        columns["/".join(map(str, widths)) + " bit"] = _channel_counts(linears, list(widths))
    columns |= {
        "error": lambda linear: "" if linear.relative_error is None else f"{linear.relative_error:.4f}",
        "damping": lambda linear: f"{linear.damp_percent:g}" + ("" if linear.status == "ok" else f" ({linear.status})"),
        "widths": lambda linear: linear.allocation or "",
    }
    if details:
        columns["importance"] = lambda linear: "{:.3g} to {:.3g}".format(*linear.importance_range)
        columns["layout"] = lambda linear: linear.layout
    return format_table(list(columns), [[cell(linear) for cell in columns.values()] for linear in linears])


def _channel_counts(linears: Sequence[LinearReport], widths: Sequence[int]) -> Callable[[LinearReport], str]:
    """Return what writes a linear's channels per width as `149/ 77/301`, each count as wide as its largest."""
    digits = {bits: max(len(str(linear.bits_histogram.get(bits, 0))) for linear in linears) for bits in widths}

    def write(linear: LinearReport) -> str:
        counts = "/".join(str(linear.bits_histogram.get(bits, 0)).rjust(digits[bits]) for bits in widths)
        return counts if linear.bits_histogram else ""

    return write


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table for the terminal that is Markdown as well; the first column is left-aligned."""
    cells = [list(columns), *(list(row) for row in rows)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (sizes[0] + 2), *("-" * (size + 1) + ":" for size in sizes[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def format_bytes(count: float) -> str:
    """Bytes in decimal megabytes, as disks count them."""
    return f"{count / 1e6:.2f} MB"
