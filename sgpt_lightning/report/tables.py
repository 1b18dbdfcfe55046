"""Tables for people, in the terminal and as Markdown."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from sgpt_lightning.format.records import LinearReport


def overall_histogram(linears: Iterable[LinearReport]) -> dict[int, int]:
    """Channels per bit width, summed over linears."""
    total: Counter[int] = Counter()
    for linear in linears:
        total.update(linear.bits_histogram)
    return dict(sorted(total.items()))


def mean_bits(linears: Iterable[LinearReport]) -> float | None:
    """Mean code bits per surviving weight, over the quantized linears; None if there is none or nothing survived."""
    means: list[float] = []
    stored: list[float] = []
    for linear in linears:
        if linear.mean_bits is not None:
            means.append(linear.mean_bits)
            stored.append(linear.stored_weights)
    return statistics.fmean(means, weights=stored) if sum(stored) else None


def coded_weight(linears: Sequence[LinearReport]) -> str:
    """Return what `mean_bits` is a mean over, in words: zeros have no code of their own unless they are coded."""
    return "weight" if all(map(_is_coded, linears)) else "surviving weight"


def true_bits(linears: Iterable[LinearReport]) -> float:
    """All bytes stored for some linears, one at least, in bits per weight."""
    pairs = [(linear.bytes, linear.weights) for linear in linears]
    return 8 * sum(count for count, _ in pairs) / sum(weights for _, weights in pairs)


def table_of_linears(linears: Sequence[LinearReport], first: str = "linear", *, details: bool = False) -> str:
    """Lay out one row per linear: how much is left, at what widths, in how many bytes, and how well it does.

    `bits/weight` counts all bytes stored. The channels per width stand in one column under their widths, such as `2/3/4
    bit`. Entropy-coded channels have any number of bits, so where there are some, the column is `channels' bits` and
    has the fewest, the median and the most, rounded to whole ones. `error` is the squared output error as a fraction of
    the squared output; `share of loss` is the linear's part of what all of them are predicted to add to the model's
    loss; a linear that was not solved but rounded plainly has `rounded` for its damping. A column that no linear fills
    is left out. With five widths, counts of three digits and no details, a row is 93 columns and the longest name.

    Args:
        linears: what to show.
        first: heading of the names.
        details: show the range of importance and the layout as well.
    """
    columns: dict[str, Callable[[LinearReport], str]] = {
        first: lambda linear: linear.name,
        "zeros" if all(map(_is_coded, linears)) else "sparsity": lambda linear: f"{linear.sparsity:.1%}",
        "mean bits": lambda linear: "16+" if linear.mean_bits is None else f"{linear.mean_bits:.2f}",
        "bits/weight": lambda linear: f"{linear.bits_per_weight:.2f}",
    }
    widths = overall_histogram(linears)
    if any(map(_is_coded, linears)):
        columns["channels' bits"] = _spread_of_bits
    elif widths:
        columns["/".join(map(str, widths)) + " bit"] = _channel_counts(linears, list(widths))
    columns["error"] = lambda linear: "" if linear.relative_error is None else f"{linear.relative_error:.4f}"
    total = sum(linear.predicted_loss or 0.0 for linear in linears)
    if total > 0:
        columns["share of loss"] = lambda linear: _share(linear.predicted_loss, total)
    columns["damping"] = _damping
    if not all(map(_is_coded, linears)):
        columns["widths"] = lambda linear: linear.allocation or ""
    if details:
        columns["importance"] = lambda linear: "{:.3g} to {:.3g}".format(*linear.importance_range)
        columns["layout"] = lambda linear: linear.layout
    return format_table(list(columns), [[cell(linear) for cell in columns.values()] for linear in linears])


def _is_coded(linear: LinearReport) -> bool:
    return linear.layout == "coded"


def _damping(linear: LinearReport) -> str:
    if linear.status == "rounded":
        return "rounded"
    return f"{linear.damp_percent:g}" + ("" if linear.status == "ok" else f" ({linear.status})")


def _share(loss: float | None, total: float) -> str:
    return "" if loss is None else f"{loss / total:.1%}"


def _spread_of_bits(linear: LinearReport) -> str:
    """Return the fewest, the median and the most bits of a linear's channels as `0-3-5`."""
    histogram = sorted(linear.bits_histogram.items())
    if not histogram:
        return ""
    channels = list(Counter(dict(histogram)).elements())
    return f"{channels[0]}-{statistics.median_low(channels)}-{channels[-1]}"


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


def format_duration(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`, rounded to seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def perplexity_figure(value: float | None) -> str:
    """Return a perplexity as tables show it."""
    return "not measured" if value is None else f"{value:.3f}"


def perplexity_texts(perplexity: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the texts on which a model was measured, dense or compressed, by name."""
    return sorted({name for state in ("dense", "compressed") for name in perplexity.get(state) or {}})


def perplexity_table(perplexity: Mapping[str, Mapping[str, float]], shown: Callable[[str], str] = str) -> str:
    """Return a row for each text on which a model was measured, dense and compressed; empty where there is none.

    Args:
        perplexity: by state of the model, then by text, as in `RunRecord`.
        shown: what a text is called.
    """
    states = [perplexity.get(state) or {} for state in ("dense", "compressed")]
    rows = [
        (shown(name), *(perplexity_figure(state.get(name)) for state in states))
        for name in perplexity_texts(perplexity)
    ]
    return format_table(("perplexity on", "dense", "compressed"), rows) if rows else ""
