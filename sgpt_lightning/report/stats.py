"""What the drop-in class collects over layers, and its summary: the interface of the enhanced SparseGPT fork."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from sgpt_lightning.format.records import LinearReport
from sgpt_lightning.report.tables import coded_weight, mean_bits, overall_histogram, table_of_linears, true_bits

BAR = 50
"""Characters of a histogram's bar that stand for all channels."""


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
            total, coded = self.total_channels, any(linear.layout == "coded" for linear in self.linears)
            lines += [
                f"Mean bits per {coded_weight(self.linears)}: {average:.3f}",
                f"Bits per weight, all bytes stored: {true_bits(self.linears):.3f}",
                f"Quantized channels: {total}" + (", by their bits rounded to whole ones" if coded else ""),
            ]
            lines += [
                f"  {bits} bit: {n:8d} channels, {n / total:6.1%} {'#' * round(BAR * n / total)}".rstrip()
                for bits, n in self.channels_per_width.items()
            ]
        unquantized = sum(linear.mean_bits is None for linear in self.linears)
        if average is not None and unquantized:
            lines.append(f"Layers that were not quantized (16+ in the table): {unquantized}")
        names = {linear.name for linear in self.linears}
        if any(base in names for base, number, _ in (name.rpartition(" #") for name in names) if number):
            lines.append(
                "A name that came twice is numbered, in the order of the solves; full names tell blocks apart."
            )
        prefix = _shared_prefix([linear.name for linear in self.linears]) if len(self.linears) > 1 else ""
        if prefix:
            lines.append(f"Layers of {prefix.removesuffix('.')}:")
        shown = [replace(linear, name=linear.name.removeprefix(prefix)) for linear in self.linears]
        return "\n".join([*lines, table_of_linears(shown, "layer")])

    def print_summary(self) -> None:
        """Print the summary."""
        print(self.summary())


def solve_line(linear: LinearReport, zeros: float, seconds: float) -> str:
    """Say on one line what a solve made of one layer.

    Channels per width are input channels, or output channels for the allocation `rows`; of entropy-coded ones, bits are
    rounded to whole ones.

    Args:
        linear: its report.
        zeros: fraction of zeros in the weight, survivors that are rounded to zero included.
        seconds: that the solve took.
    """
    parts = [f"zeros {zeros:.1%}", f"{linear.bits_per_weight:.2f} bits/weight"]
    if linear.mean_bits is not None:
        widths = " ".join(f"{bits} bit({count})" for bits, count in linear.bits_histogram.items())
        parts = [widths, f"mean {linear.mean_bits:.2f} bits", *parts]
    parts.append("error unknown" if linear.relative_error is None else f"error {linear.relative_error:.4f}")
    return f"[{linear.name or 'unnamed'}] {' | '.join([*parts, f'{seconds:.2f} s'])}"


def _free_name(name: str, taken: set[str]) -> str:
    """Return the name, or the first of `name #2`, `name #3`, ... that is not taken."""
    candidates = itertools.chain([name], (f"{name} #{count}" for count in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _shared_prefix(names: Sequence[str]) -> str:
    """Return the parents that all names have, with the dot behind them; empty if there is none."""
    parents = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    return "".join(f"{level[0]}." for level in shared)
