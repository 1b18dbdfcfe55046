"""What a run tells Lightning's loggers: scalars by block, histograms of widths, and the tables as text.

A perplexity that makes the model useless is told to everybody, as a warning.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import DecoderBlocks
from sgpt_lightning.recipe import MAX_BITS
from sgpt_lightning.report.plan import plan_image, plan_table
from sgpt_lightning.report.run import (
    ledger_table,
    linear_reports,
    linears_table,
    perplexity_alarm,
    status_line,
    summary_table,
)
from sgpt_lightning.report.tables import format_table, overall_histogram


def log_perplexity(loggers: Iterable[Logger], perplexity: Mapping[str, float], blocks: int) -> None:
    """Log perplexities with the number of compressed blocks as the step (0 = dense)."""
    for logger in loggers:
        logger.log_metrics({f"perplexity/{name}": value for name, value in perplexity.items()}, step=blocks)


def log_linears(loggers: Iterable[Logger], solved: Mapping[str, SolvedLinear], decoder: DecoderBlocks) -> None:
    """Log what was done to linears: one curve for each kind of linear, the step is the block, counted from 1."""
    for logger in loggers:
        for name, linear in solved.items():
            report, (index, kind) = linear.report, decoder.place(name)
            figures = {
                "sparsity": report.sparsity,
                "bytes": float(report.bytes),
                "bits_per_weight": report.bits_per_weight,
                "damp_percent": report.damp_percent,
                "rounded": float(report.status == "rounded"),
            }
            if report.relative_error is not None:
                figures["relative_error"] = report.relative_error
            if report.mean_bits is not None:
                figures["mean_bits"] = report.mean_bits
            if report.predicted_loss is not None:
                figures["predicted_loss"] = report.predicted_loss
            logger.log_metrics({f"{key}/{kind}": value for key, value in figures.items()}, step=index + 1)
            _log_histogram(logger, f"bits/{kind}", report.bits_histogram, index + 1)


def log_earlier(
    loggers: Sequence[Logger],
    perplexity: Mapping[str, Mapping[str, float]],
    solved: Mapping[str, SolvedLinear],
    decoder: DecoderBlocks,
) -> None:
    """Log what an earlier run did that this one goes on from; perplexities by state, as `RunRecord` has them."""
    for state, measured in perplexity.items():
        after = re.fullmatch(r"after (\d+) blocks", state)
        if state != "compressed":
            log_perplexity(loggers, measured, int(after[1]) if after else 0)
    linears = decoder.linears()
    log_linears(loggers, {name: linear for name, linear in solved.items() if name in linears}, decoder)


def log_run(loggers: Iterable[Logger], manifest: Manifest) -> None:
    """Log the overall histogram, recipe and tables as text, and hparams with final perplexity and size.

    Warns of a perplexity more than ten times the dense model's, whatever the loggers.
    """
    record, alarm = manifest.record, perplexity_alarm(manifest)
    if alarm:
        warnings.warn(alarm, stacklevel=2)
    recipe, final = record.recipe, record.perplexity.get("compressed", {})
    metrics = {f"final/perplexity/{name}": value for name, value in final.items()}
    metrics |= {
        "final/file_bytes": float(manifest.ledger.file),
        "final/bits_per_weight": manifest.ledger.linear_bits_per_weight,
    }
    blocks, linears = record.blocks, linear_reports(manifest)
    metrics["final/rounded_linears"] = float(sum(linear.status == "rounded" for linear in linears))
    for logger in loggers:
        _log_histogram(logger, "bits/all", overall_histogram(linears), blocks)
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(metrics, step=blocks)
            continue
        flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in recipe.items()}
        logger.log_hyperparams(flat, metrics, step=blocks)
        texts = {
            "recipe": format_table(("setting", "value"), [(key, str(value)) for key, value in recipe.items()]),
            "summary": summary_table(manifest),
            "ledger": ledger_table(manifest),
            "plan": plan_table(linears),
            "linears": linears_table(manifest),
            "status": "\n\n".join(filter(None, [status_line(manifest), alarm])),
        }
        for tag, text in texts.items():
            logger.experiment.add_text(tag, text, blocks)
        image = plan_image(linears)
        if image is not None:
            logger.experiment.add_image("plan", image, blocks, dataformats="HWC")


def _log_histogram(logger: Logger, tag: str, channels: Mapping[int, int], step: int) -> None:
    if channels:
        counts = {f"channels/{tag}/{bits}": float(count) for bits, count in channels.items()}
        logger.log_metrics(counts, step=step)
        if isinstance(logger, TensorBoardLogger):
            widths = torch.repeat_interleave(torch.tensor(list(channels)), torch.tensor(list(channels.values())))
            most = max(MAX_BITS, *channels)  # entropy-coded channels may have more, and may have 0
            logger.experiment.add_histogram(tag, widths, step, bins=[bits - 0.5 for bits in range(most + 2)])
