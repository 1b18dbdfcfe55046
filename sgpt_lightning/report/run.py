"""A whole run in one place: the JSON report and the tables for people; for loggers see `trainer/logs.py`.

Everything is derived from the manifest that was written with the model, so the callback at the end of a run and
`sgpt inspect` years later print the same figures.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.records import LinearReport
from sgpt_lightning.report.plan import plan_table, write_plan
from sgpt_lightning.report.tables import (
    coded_weight,
    format_bytes,
    format_table,
    mean_bits,
    perplexity_figure,
    table_of_linears,
)

REPORT_KEYS = frozenset({"perplexity", "bytes", "bits_per_weight", "linears", "seconds", "recipe", "versions"})
"""What `report.json` holds, and by which it is known."""
VERSIONED = ("sgpt-lightning", "torch", "lightning", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the result; missing ones are left out."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def linear_reports(manifest: Manifest) -> list[LinearReport]:
    """Return the reports of the compressed linears, in the order of the model."""
    return [LinearReport.from_dict(report) for report in manifest.linears.values()]


def embedding_reports(manifest: Manifest) -> list[LinearReport]:
    """Return the reports of the embeddings that are coded; their error counts each token as often as it was read."""
    return [LinearReport.from_dict(report) for report in manifest.embeddings.values()]


def report_dict(manifest: Manifest) -> dict[str, Any]:
    """Return the content of `report.json`; sizes in bytes, times in seconds. The last three `bytes` make the first."""
    ledger, record = manifest.ledger, manifest.record
    return {
        "model": record.model,
        "calibration": record.calibration,
        "perplexity": record.to_dict()["perplexity"],
        "bytes": {
            "file": ledger.file,
            "linears": ledger.linears,
            "embeddings": ledger.embeddings,
            "other": ledger.other + ledger.headers,
        },
        "bits_per_weight": {"linears": ledger.linear_bits_per_weight, "whole_file": ledger.file_bits_per_weight},
        "linears": [linear.to_dict() for linear in linear_reports(manifest)],
        "embeddings": [table.to_dict() for table in embedding_reports(manifest)],
        "seconds": record.seconds,
        "recipe": record.recipe,
        "versions": record.versions,
    }


def write_report(path: Path, manifest: Manifest) -> None:
    """Write `report.json` and, where matplotlib is installed, the plan as `plan.png` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report_dict(manifest), indent=1) + "\n")
    write_plan(linear_reports(manifest), path.with_name("plan.png"))


def summary_table(manifest: Manifest) -> str:
    """Return the table a user came for: dense against compressed, in perplexity, bits per weight and bytes."""
    ledger = manifest.ledger
    perplexity = manifest.record.perplexity
    dense, compressed = perplexity.get("dense", {}), perplexity.get("compressed", {})
    names = sorted({*dense, *compressed})
    stored_bits = 8 * getattr(torch, manifest.storage_dtype).itemsize
    columns = ("", *(f"perplexity {name}" for name in names), "linears, bits/weight", "whole file")
    rows = [
        (
            f"dense, {manifest.storage_dtype}",
            *(perplexity_figure(dense.get(name)) for name in names),
            f"{stored_bits:.2f}",
            format_bytes(ledger.parameters * stored_bits / 8),
        ),
        (
            "compressed",
            *(perplexity_figure(compressed.get(name)) for name in names),
            f"{ledger.linear_bits_per_weight:.2f}",
            format_bytes(ledger.file),
        ),
    ]
    return format_table(columns, rows)


def closing_line(manifest: Manifest, measured: Mapping[str, float] | None = None) -> str:
    """Return a run in one line, such as `3.00 bits a weight, 3.6x smaller, perplexity +2.0 %`.

    The bits are true ones, of the linears in decoder blocks; `smaller` is the whole file against 16 bits for every
    parameter; perplexities are against the dense model's, each with the name of its data set if there are several.
    Linears that were not solved as asked for are counted, and a perplexity that `perplexity_alarm` tells of is told of.

    Args:
        manifest: of the compressed model.
        measured: perplexity of the compressed model by data set; what the manifest says if None. Data sets that were
            not measured on the dense model are left out.
    """
    ledger = manifest.ledger
    times = 2 * ledger.parameters / ledger.file
    changes = {name: f"{100 * (ratio - 1):+.1f} %" for name, ratio in _perplexity_ratios(manifest, measured).items()}
    several = len(changes) > 1
    shown = ", ".join(f"{change} on {name}" if several else change for name, change in changes.items())
    parts = [
        f"{ledger.linear_bits_per_weight:.2f} bits a weight",
        f"{times:.1f}x smaller" if times >= 1 else f"{1 / times:.1f}x larger",
        *([f"perplexity {shown}"] if shown else []),
    ]
    statuses = Counter(linear.status for linear in linear_reports(manifest))
    rounded, damped = statuses["rounded"], statuses["damped"] + statuses["float64"]
    of_all = f"of {statuses.total()} linears"
    parts += [f"{damped} {of_all} with more damping or precision than asked for"] if damped else []
    parts += [f"{rounded} {of_all} rounded plainly"] if rounded else []
    return "; ".join(filter(None, [", ".join(parts), perplexity_alarm(manifest, measured)]))


def _perplexity_ratios(manifest: Manifest, measured: Mapping[str, float] | None) -> dict[str, float]:
    """Return perplexities over those of the dense model, by data set, where both were measured."""
    perplexity = manifest.record.perplexity
    dense = perplexity.get("dense", {})
    compressed = perplexity.get("compressed", {}) if measured is None else measured
    return {name: value / dense[name] for name, value in compressed.items() if value is not None and dense.get(name)}


ALARMING_RATIO = 10
"""Perplexity over the dense model's, above which a compressed model is called broken."""


def perplexity_alarm(manifest: Manifest, measured: Mapping[str, float] | None = None) -> str:
    """Return what to cry out where a perplexity is more than ten times the dense model's, or no number; else nothing.

    Args:
        manifest: of the compressed model.
        measured: as for `closing_line`.
    """
    broken = {name: ratio for name, ratio in _perplexity_ratios(manifest, measured).items()
              if not ratio <= ALARMING_RATIO}  # fmt: skip
    if not broken:
        return ""
    each = ", ".join(f"{ratio:.3g}x on {name}" for name, ratio in broken.items())
    return f"THE MODEL IS BROKEN: perplexity is more than {ALARMING_RATIO}x the dense model's ({each})"


def ledger_table(manifest: Manifest) -> str:
    """Return where the bytes of the weight files went, and of what packed weights consist."""
    ledger = manifest.ledger
    parts = (
        ("linears", ledger.linears, f"{ledger.linear_bits_per_weight:.3f}"),
        ("embeddings", ledger.embeddings, ""),
        ("other (biases, norms)", ledger.other, ""),
        ("file headers", ledger.headers, ""),
        ("whole file", ledger.file, f"{ledger.file_bits_per_weight:.3f}"),
    )
    kinds = [
        (f"packed weights: {title}", sum(ledger.packed.get(name, 0) for name in names), "")
        for title, names in _PACKED.items()
    ]
    shown = [*parts, *(kind for kind in kinds if kind[1])]
    rows = [(name, f"{count:,}", f"{count / ledger.file:.1%}", bits) for name, count, bits in shown]
    return format_table(("", "bytes", "share", "bits/weight"), rows)


def plan_of_run(manifest: Manifest) -> str:
    """Return the true bits a weight of every linear, a row per decoder block."""
    return plan_table(linear_reports(manifest))


_PACKED = {
    "codes": ("stream", "extra", "offsets", "codes"),
    "tables of the coder": ("tables", "rows", "columns"),
    "steps, scales, ranges": (
        "level",
        "steps",
        "row_scales",
        "range",
        "zero_point",
        "offset",
        "widths",
        "channel_scale",
    ),
    "masks": ("mask",),
    "unquantized values": ("values",),
}
"""Kinds of tensors, by the names in `format/packing.py` without `weight_`."""


def linears_table(manifest: Manifest) -> str:
    """Return one row per compressed linear."""
    return table_of_linears(linear_reports(manifest), details=True)


def status_line(manifest: Manifest) -> str:
    """Return how many linears were solved, which of them not as asked, and how much was left alone.

    Not as asked are those that needed more than the recipe's damping, and those that were rounded plainly.
    """
    linears = linear_reports(manifest)
    odd = [
        f"{linear.name} (rounded plainly)"
        if linear.status == "rounded"
        else f"{linear.name} ({linear.status}, damping {linear.damp_percent:g})"
        for linear in linears
        if linear.status != "ok"
    ]
    average = mean_bits(linears)
    rounded = sum(linear.status == "rounded" for linear in linears)
    parts = [
        f"{len(linears) - rounded} linears solved",
        *([f"{rounded} rounded plainly"] if rounded else []),
        "nothing quantized" if average is None else f"mean {average:.3f} code bits per {coded_weight(linears)}",
    ]
    left = 1 - sum(linear.weights for linear in linears) / max(manifest.ledger.linear_weights, 1)
    if left > 0:
        parts.append(f"{left:.1%} of the linears' weights left as they were")
    return ", ".join(parts) + ("; all as asked" if not odd else f"; not as asked: {', '.join(odd)}")


def digest_lines(manifest: Manifest) -> str:
    """Return the SHA-256 of the weight files, as `sha256sum` writes them: the same command gives the same on a CPU."""
    return "\n".join(f"sha256 {manifest.files[name].sha256}  {name}" for name in manifest.weight_files)


def run_tables(manifest: Manifest) -> str:
    """Return what `sgpt fit` shows at its end: summary, plan, whether all went as asked, digests, and any alarm."""
    state = "\n".join(filter(None, [status_line(manifest), digest_lines(manifest)]))
    return "\n\n".join(
        filter(None, [summary_table(manifest), plan_of_run(manifest), state, perplexity_alarm(manifest)])
    )


def inspection(directory: Path, manifest: Manifest) -> str:
    """Return all that `sgpt inspect` shows of a directory."""
    record = manifest.record
    embeddings = embedding_reports(manifest)
    settings = ", ".join(f"{key}={value}" for key, value in record.recipe.items())
    protocols = [_protocol_line(name, protocol) for name, protocol in record.protocols.items()]
    parts = [
        f"{directory}: {record.model or 'model'} compressed by sgpt_lightning\nrecipe: {settings}",
        summary_table(manifest),
        ledger_table(manifest),
        plan_of_run(manifest),
        linears_table(manifest),
        *([table_of_linears(embeddings, "embedding", details=True)] if embeddings else []),
        "\n".join([status_line(manifest), digest_lines(manifest), *protocols]),
        closing_line(manifest),
    ]
    return "\n\n".join(filter(None, parts))


def _protocol_line(name: str, protocol: Mapping[str, Any]) -> str:
    return f"protocol of {name}: " + ", ".join(f"{key}={value!r}" for key, value in protocol.items())
