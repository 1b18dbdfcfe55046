"""A study on paper: Markdown tables, CSV and JSON."""

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from sgpt_lightning.experiments.figures import Point
from sgpt_lightning.experiments.rows import Row, columns, package_version
from sgpt_lightning.experiments.study import Outcome, by_arm
from sgpt_lightning.report.tables import format_table

SPREAD = "± is half of the range over the seeds; in brackets what was lost against the dense model."


def mean(rows: Sequence[Row], read: Callable[[Row], float | None]) -> float:
    """Return the mean of a figure over rows, one of which has it at least."""
    return statistics.fmean(value for value in map(read, rows) if value is not None)


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and, of several values, half of their range."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def study_table(outcome: Outcome) -> str:
    """Return one Markdown row per arm: true bytes, perplexities with what was lost against dense, and costs."""
    dense = outcome.rows[0]
    rows = []
    for name, runs in by_arm(outcome.rows).items():
        cells = [name, f"{mean(runs, _bits):.2f}", f"{mean(runs, _megabytes):.2f}"]
        for text in outcome.texts:
            values = [run.perplexity[text] for run in runs]
            lost = "" if runs[0] is dense else f" (+{statistics.fmean(values) - dense.perplexity[text]:.2f})"
            cells.append(with_spread(values) + lost.replace("+-", "-"))
        cells += [f"{mean(runs, lambda run: run.output_error):.4f}", f"{mean(runs, lambda run: run.zeros):.1%}"]
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        rows.append((*cells, f"{mean(runs, _seconds):.0f}", f"{max(peaks) / 1e6:.0f}" if peaks else "-"))
    head = ("method", "bits/weight", "file, MB", *outcome.texts, "output error", "zeros", "seconds", "peak, MB")
    return format_table(head, rows)


def _bits(row: Row) -> float | None:
    return row.bits_per_weight


def _megabytes(row: Row) -> float | None:
    return None if row.file_bytes is None else row.file_bytes / 1e6


def _seconds(row: Row) -> float:
    return row.seconds


def points_of(outcome: Outcome, text: str) -> list[Point]:
    """Return the arms of a study as points of a figure, means over the seeds."""
    return [
        Point(name, runs[0].family, mean(runs, _bits), mean(runs, lambda run: run.perplexity[text]))
        for name, runs in by_arm(outcome.rows).items()
        if runs[0] is not outcome.rows[0]
    ]


def protocol_lines(outcome: Outcome) -> str:
    """Return what the figures were measured on, a line for each thing."""
    setting = outcome.setting
    calibrated = next(iter(outcome.calibration.values()), None)
    lines = [f"model {setting.model} on {setting.device}, seeds {', '.join(map(str, setting.seeds))}"]
    if setting.blocks is not None:
        some = f"the first {setting.blocks} of {outcome.blocks} decoder blocks"
        lines.append(f"only {some} are compressed; bits per weight are theirs")
    if calibrated is not None:
        lines.append(
            f"calibration on {setting.calibration}: {calibrated['windows']} windows of {calibrated['seq_len']} tokens"
        )
    for name, protocol in outcome.protocols.items():
        lines.append(
            f"perplexity on {name}: {protocol['windows']} windows of {protocol['seq_len']} tokens "
            f"({protocol['selection']}), split {protocol['split']}, text {protocol['sha256'][:12]}"
        )
    return "\n".join(f"- {line}" for line in lines)


def failure_lines(outcome: Outcome) -> str:
    """Return a line for each arm that failed; empty if none did."""
    return "\n".join(f"FAILED: {row.arm}, seed {row.seed}: {row.error}" for row in outcome.failed)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row; what was not measured is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(row.flat() for row in rows)


def write_json(outcome: Outcome, path: Path) -> None:
    """Write setting, protocols, version and rows."""
    content = {
        "setting": asdict(outcome.setting),
        "calibration": outcome.calibration,
        "evaluation": outcome.protocols,
        "version": package_version(),
        "rows": [row.flat() for row in outcome.rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
