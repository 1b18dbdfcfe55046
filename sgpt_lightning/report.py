"""What was done and what it cost, as numbers and as tables."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sgpt_lightning.packed import PackedWeight
from sgpt_lightning.solver import CompressedLinear


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
    relative_error: float
    """Squared output error as a fraction of the squared output."""
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

    The name and `print_summary` are those of the enhanced SparseGPT fork, so that its scripts keep working.
    """

    def __init__(self) -> None:
        self.linears: list[LinearReport] = []

    def add(self, linear: LinearReport) -> None:
        """Add one linear."""
        self.linears.append(linear)

    @property
    def total_channels(self) -> int:
        """Quantized input channels of all linears."""
        return sum(sum(linear.bits_histogram.values()) for linear in self.linears)

    @property
    def channels_per_width(self) -> dict[int, int]:
        """Input channels per bit width over all linears."""
        return overall_histogram(self.linears)

    @property
    def mean_bits(self) -> float | None:
        """Mean code bits per surviving weight over all quantized linears; None if nothing was quantized."""
        return mean_bits(self.linears)

    def summary(self) -> str:
        """Return the whole summary as text."""
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
        unquantized = [linear.name for linear in self.linears if linear.mean_bits is None]
        if average is not None and unquantized:
            lines.append(f"Layers that were not quantized ({len(unquantized)}): {', '.join(unquantized)}")
        rows = [linear_row(linear) for linear in self.linears]
        return "\n".join([*lines, format_table(LINEAR_COLUMNS, rows)])

    def print_summary(self) -> None:
        """Print the summary."""
        print(self.summary())


def overall_histogram(linears: Iterable[LinearReport]) -> dict[int, int]:
    """Input channels per bit width, summed over linears."""
    total: Counter[int] = Counter()
    for linear in linears:
        total.update(linear.bits_histogram)
    return dict(sorted(total.items()))


def mean_bits(linears: Iterable[LinearReport]) -> float | None:
    """Mean code bits per surviving weight, over the quantized linears; None if there is none."""
    quantized = [linear for linear in linears if linear.mean_bits is not None]
    survivors = [linear.weights * (1 - linear.sparsity) for linear in quantized]
    if not sum(survivors):
        return None
    return statistics.fmean([linear.mean_bits or 0.0 for linear in quantized], weights=survivors)


LINEAR_COLUMNS = (
    "layer",
    "sparsity",
    "mean bits",
    "true bits/weight",
    "importance",
    "rel. error",
    "damping",
    "layout",
    "widths",
)


def linear_row(linear: LinearReport) -> tuple[str, ...]:
    """One row of the per-layer table, for `LINEAR_COLUMNS`."""
    low, high = linear.importance_range
    return (
        linear.name,
        f"{linear.sparsity:.1%}",
        "16+" if linear.mean_bits is None else f"{linear.mean_bits:.2f}",
        f"{linear.bits_per_weight:.2f}",
        f"{low:.3g} to {high:.3g}",
        f"{linear.relative_error:.4f}",
        f"{linear.damp_percent:g}" + ("" if linear.status == "ok" else f" ({linear.status})"),
        linear.layout,
        linear.allocation or "",
    )


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
