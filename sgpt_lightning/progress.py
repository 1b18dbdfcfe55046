"""A Lightning progress bar that counts blocks instead of epochs and names data sets instead of loaders."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from sgpt_lightning.module import CausalLMModule


class CompressionProgressBar(TQDMProgressBar):
    """Shows `block k of n`, with the error of the block before and the time left, as the callback logs them."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the block."""
        super().on_train_epoch_start(trainer, *args)
        titles = getattr(trainer.lightning_module, "epoch_titles", ())
        if titles:
            self.train_progress_bar.set_description(f"calibrate and solve, {titles[trainer.current_epoch]}")

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
            self.val_progress_bar.set_description(f"perplexity on {name}")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Leave out the version number of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
