"""A whole run in one place: the JSON report, the tables for people, and the scalars for TensorBoard.

Everything is derived from the manifest that was written with the model, so the callback at the end of a run and
`sgpt inspect` years later print the same figures.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from sgpt_lightning.calibration import SolvedLinear
from sgpt_lightning.checkpoint import Manifest
from sgpt_lightning.report import (
    LinearReport,
    format_bytes,
    format_table,
    mean_bits,
    overall_histogram,
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
    return [LinearReport.from_dict(entry["report"]) for entry in manifest.linears.values()]


def report_dict(manifest: Manifest) -> dict[str, Any]:
    """Return the content of `report.json`; sizes in bytes, times in seconds. The last three `bytes` make the first."""
    ledger = manifest.ledger
    return {
        "perplexity": manifest.run.get("perplexity", {}),
        "bytes": {
            "file": ledger.file,
            "linears": ledger.linears,
            "embeddings": ledger.embeddings,
            "other": ledger.other + ledger.headers,
        },
        "bits_per_weight": {"linears": ledger.linear_bits_per_weight, "whole_file": ledger.file_bits_per_weight},
        "linears": [linear.to_dict() for linear in linear_reports(manifest)],
        "seconds": manifest.run.get("seconds", {}),
        "recipe": manifest.run.get("recipe", {}),
        "versions": manifest.run.get("versions", {}),
    }


def summary_table(manifest: Manifest) -> str:
    """Return the table a user came for: dense against compressed, in perplexity, bits per weight and bytes."""
    ledger = manifest.ledger
    perplexity = manifest.run.get("perplexity", {})
    dense, compressed = perplexity.get("dense", {}), perplexity.get("compressed", {})
    names = sorted({*dense, *compressed})
    stored_bits = 8 * getattr(torch, manifest.storage_dtype).itemsize
    columns = ("", *(f"perplexity {name}" for name in names), "linears, bits/weight", "whole file")
    rows = [
        (
            f"dense, {manifest.storage_dtype}",
            *(_figure(dense.get(name)) for name in names),
            f"{stored_bits:.2f}",
            format_bytes(ledger.parameters * stored_bits / 8),
        ),
        (
            "compressed",
            *(_figure(compressed.get(name)) for name in names),
            f"{ledger.linear_bits_per_weight:.2f}",
            format_bytes(ledger.file),
        ),
    ]
    return format_table(columns, rows)


def ledger_table(manifest: Manifest) -> str:
    """Return where the bytes of the weight files went."""
    ledger = manifest.ledger
    parts = (
        ("linears", ledger.linears, f"{ledger.linear_bits_per_weight:.3f}"),
        ("embeddings", ledger.embeddings, ""),
        ("other (biases, norms)", ledger.other, ""),
        ("file headers", ledger.headers, ""),
        ("whole file", ledger.file, f"{ledger.file_bits_per_weight:.3f}"),
    )
    rows = [(name, f"{count:,}", f"{count / ledger.file:.1%}", bits) for name, count, bits in parts]
    return format_table(("", "bytes", "share", "bits/weight"), rows)


def linears_table(manifest: Manifest) -> str:
    """Return one row per compressed linear."""
    return table_of_linears(linear_reports(manifest), details=True)


def status_line(linears: Sequence[LinearReport]) -> str:
    """Return how many linears were solved, and which needed more than the recipe's damping."""
    odd = [
        f"{linear.name} ({linear.status}, damping {linear.damp_percent:g})"
        for linear in linears
        if linear.status != "ok"
    ]
    average = mean_bits(linears)
    bits = "nothing quantized" if average is None else f"mean {average:.3f} code bits per surviving weight"
    return f"{len(linears)} linears solved, {bits}; " + (
        "all as asked" if not odd else f"not as asked: {', '.join(odd)}"
    )


def log_perplexity(loggers: Iterable[Logger], perplexity: Mapping[str, float], blocks: int) -> None:
    """Log perplexities with the number of compressed blocks as the step (0 = dense)."""
    for logger in loggers:
        logger.log_metrics({f"perplexity/{name}": value for name, value in perplexity.items()}, step=blocks)


def log_linears(loggers: Iterable[Logger], solved: Mapping[str, SolvedLinear], blocks: int) -> None:
    """Log what was done to the linears of one block; the step is the number of compressed blocks."""
    for logger in loggers:
        for name, linear in solved.items():
            report = linear.report
            figures = {
                "sparsity": report.sparsity,
                "relative_error": report.relative_error,
                "bytes": float(report.bytes),
                "bits_per_weight": report.bits_per_weight,
            }
            if report.mean_bits is not None:
                figures["mean_bits"] = report.mean_bits
            logger.log_metrics({f"{key}/{name}": value for key, value in figures.items()}, step=blocks)
            _log_histogram(logger, f"bits/{name}", report.bits_histogram, blocks)


def log_run(loggers: Iterable[Logger], manifest: Manifest) -> None:
    """Log the overall histogram, recipe and tables as text, and hparams with final perplexity and size."""
    recipe = manifest.run.get("recipe", {})
    final = manifest.run.get("perplexity", {}).get("compressed", {})
    metrics = {f"final/perplexity/{name}": value for name, value in final.items()}
    metrics |= {
        "final/file_bytes": float(manifest.ledger.file),
        "final/bits_per_weight": manifest.ledger.linear_bits_per_weight,
    }
    blocks = manifest.run.get("blocks", 0)
    for logger in loggers:
        _log_histogram(logger, "bits/all", overall_histogram(linear_reports(manifest)), blocks)
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(metrics, step=blocks)
            continue
        flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in recipe.items()}
        logger.log_hyperparams(flat, metrics, step=blocks)
        texts = {
            "recipe": format_table(("setting", "value"), [(key, str(value)) for key, value in recipe.items()]),
            "summary": summary_table(manifest),
            "ledger": ledger_table(manifest),
            "linears": linears_table(manifest),
        }
        for tag, text in texts.items():
            logger.experiment.add_text(tag, text, blocks)


def _log_histogram(logger: Logger, tag: str, channels: Mapping[int, int], step: int) -> None:
    if channels:
        counts = {f"channels/{tag}/{bits}": float(count) for bits, count in channels.items()}
        logger.log_metrics(counts, step=step)
        if isinstance(logger, TensorBoardLogger):
            widths = torch.repeat_interleave(torch.tensor(list(channels)), torch.tensor(list(channels.values())))
            logger.experiment.add_histogram(tag, widths, step, bins=[bits - 0.5 for bits in range(1, 10)])


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
