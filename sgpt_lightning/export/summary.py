"""What an export says of itself: how large it became, and which linears went dense at what price."""

from collections import Counter

from sgpt_lightning.export.export import Exported
from sgpt_lightning.report.tables import format_bytes, format_table


def summary(exported: Exported) -> str:
    """Return what `sgpt export` prints: a table of the linears that went dense, then a line for each other fact."""
    parts = []
    if exported.dense:
        rows = [
            (name, f"{linear.bytes:,}", f"{linear.packed_bytes:,}", linear.reason)
            for name, linear in exported.dense.items()
        ]
        parts.append(format_table(("stays dense", "bytes", "compressed", "because"), rows) + "\n")
    if exported.integer_bits:
        widths = sorted(Counter(exported.integer_bits.values()).items())
        counts = ", ".join(f"{count} at {bits} bits" for bits, count in widths)
        parts.append(f"linears as integers: {counts}; dense: {len(exported.dense)}")
    if exported.rounded:
        parts.append(f"{exported.rounded:,} values were rounded to {_dtype(exported)}")
    parts += [f"note: {note}" for note in exported.notes]
    price = exported.bytes - exported.compressed_bytes
    parts.append(
        f"{exported.output}: weights {format_bytes(exported.bytes)} in {_dtype(exported)}, {price:+,} bytes against "
        f"the compressed directory, {exported.bytes / exported.compressed_bytes:.2f}x"
    )
    return "\n".join(parts)


def _dtype(exported: Exported) -> str:
    return str(exported.dtype).removeprefix("torch.")
