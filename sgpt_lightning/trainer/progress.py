"""What a user sees of a run: a bar for a terminal, lines for a log file, both on stderr.

Both count blocks instead of epochs, name data sets instead of loaders, and say which state of the model a perplexity is
of, because the one on show during a run is that of the dense model. Stdout is left to the table at the end.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only

from sgpt_lightning.report.tables import format_duration
from sgpt_lightning.trainer.module import CausalLMModule


def seconds_left(finished: Sequence[float], running: float, remaining: int, closing: float = 0.0) -> float | None:
    """Estimate how long a run still takes; it falls by a second a second while blocks take what they took before.

    Args:
        finished: seconds that each finished block took, from one end to the next.
        running: seconds since the last of them ended.
        remaining: blocks that are not finished, the running one included.
        closing: seconds that what comes after the last block will take, such as measuring perplexity.

    Returns:
        Seconds, or None before the first block has ended.
    """
    if not finished:
        return None
    usual = fmean(finished)
    running_block = max(usual - running, 0.0) if remaining else 0.0
    return running_block + usual * max(remaining - 1, 0) + closing


class CompressionProgressBar(TQDMProgressBar):
    """Shows `block k of n`, with the error of the block before and the time left, as the callback logs them."""

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

    def init_train_tqdm(self) -> Tqdm:
        """Draw on stderr, and go when the run ends: the table stays."""
        with contextlib.redirect_stdout(sys.stderr):
            bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """Draw on stderr, and go when the measurement ends."""
        with contextlib.redirect_stdout(sys.stderr):
            bar = super().init_validation_tqdm()
        bar.leave = False
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the block."""
        super().on_train_epoch_start(trainer, *args)
        if title := _title(trainer):
            self.train_progress_bar.set_description(title)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Name the data set."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if batch_idx == 0 and isinstance(pl_module, CausalLMModule):
            name = pl_module.evaluation_names()[dataloader_idx]
            self.val_progress_bar.set_description(f"perplexity on {name} {pl_module.measured_state}".strip())

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar: time left first, since a narrow terminal cuts the end off."""
        shown = super().get_metrics(trainer, pl_module)
        metrics: dict[str, int | str | float | dict[str, float]] = {}
        left = shown.get("seconds_left")
        if isinstance(left, int | float):
            metrics["left"] = format_duration(left)
        if "error" in shown:
            metrics["error"] = shown["error"]
        if isinstance(pl_module, CausalLMModule):
            for name, measured in pl_module.measured.items():
                metrics[f"{pl_module.measured_state} {name}".strip()] = f"{measured.perplexity:.3f}"
        return metrics


class ProgressLines(Callback):
    """Prints a line on stderr for each block and each perplexity, where a bar cannot be drawn or is not wanted."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is compressed, and where."""
        _print(f"compressing {getattr(pl_module, 'path', 'the model')} on {trainer.strategy.root_device}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run goes on, if an earlier one began it."""
        stages = pl_module.stages if isinstance(pl_module, CausalLMModule) else {}
        if stages and trainer.ckpt_path is not None and trainer.current_epoch > min(stages):
            _print(f"going on with {stages[trainer.current_epoch].label}, from {trainer.ckpt_path}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the block, its error, its seconds and the time left."""
        parts = [_title(trainer) or f"epoch {trainer.current_epoch + 1}"]
        shown = trainer.progress_bar_metrics
        if "error" in shown:
            parts.append(f"error {shown['error']:.4f}")
        parts.append(f"{time.perf_counter() - self._started:.1f} s")
        if "seconds_left" in shown:
            parts.append(f"{format_duration(shown['seconds_left'])} left")
        _print(", ".join(parts))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the perplexities."""
        if isinstance(pl_module, CausalLMModule):
            for name, measured in pl_module.measured.items():
                _print(f"perplexity on {name} {pl_module.measured_state}".strip() + f": {measured.perplexity:.3f}")


def _title(trainer: Trainer) -> str:
    """Return what the epoch is about; empty outside of a calibration."""
    module = trainer.lightning_module
    stage = module.stages.get(trainer.current_epoch) if isinstance(module, CausalLMModule) else None
    return "" if stage is None else stage.label


@rank_zero_only
def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
