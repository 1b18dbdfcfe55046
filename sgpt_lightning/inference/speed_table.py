"""A benchmark for people: what each residence takes, tokens a second, and plainly where packed is slower."""

from sgpt_lightning.inference.benchmark import Benchmark, names_of, slower
from sgpt_lightning.report.tables import format_bytes, format_table, perplexity_table


def speed_tables(found: Benchmark) -> str:
    """Return what `sgpt benchmark` prints."""
    dense, *others = found.measured
    memory = [
        (
            measured.resident,
            format_bytes(measured.file_bytes),
            format_bytes(measured.weight_bytes),
            "not known" if measured.peak_bytes is None else format_bytes(measured.peak_bytes),
        )
        for measured in found.measured
    ]
    columns = ["tokens/s", dense.resident]
    columns += [heading for other in others for heading in (other.resident, f"{other.resident}/dense")]
    rows = []
    for index, name in enumerate(names_of(dense.speeds)):
        reference = dense.speeds[index].tokens_per_second
        cells = [name, f"{reference:,.1f}"]
        for other in others:
            speed = other.speeds[index].tokens_per_second
            cells += [f"{speed:,.1f}", f"{speed / reference:.2g}"]
        rows.append(cells)
    return "\n\n".join(
        [
            f"{found.directory}: {found.device}, {found.dtype}, median of {found.repeats}, seed {found.seed}",
            perplexity_table(found.perplexity) or "perplexity: the run that compressed it measured none",
            format_table(("", "file", "weights in memory", "peak memory"), memory),
            format_table(columns, rows),
            "\n".join(_verdict(found)),
        ]
    )


def _verdict(found: Benchmark) -> list[str]:
    """Return a line per phase and batch in which a residence is slower than dense, or that there is none."""
    lost = slower(found)
    lines = [
        f"{resident} is slower than dense: {name}: {share:.2g} of its tokens a second"
        for resident, speed, share in lost
        for name in names_of([speed])
    ]
    good = [other.resident for other in found.measured[1:] if other.resident not in {resident for resident, *_ in lost}]
    return lines + [f"{resident} is nowhere slower than dense" for resident in good]
