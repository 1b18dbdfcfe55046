"""`sgpt fit --dry_run`: what a fit would take, on its own model, text and settings."""

import itertools

from lightning.pytorch import Trainer

from sgpt_lightning.calibration.forecast import PROBED, Forecast, forecast
from sgpt_lightning.calibration.workload import Workload
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.setup import network_of


def forecast_fit(
    trainer: Trainer, pl_module: CausalLMModule, data: TextDataModule, callback: SparseGPTCallback
) -> Forecast:
    """Say what `trainer.fit(pl_module, data)` would take; nothing is written, and the model is loaded.

    Raises:
        ValueError, TypeError, OSError: what the fit would raise before its first block is solved.
    """
    pl_module.trainer = trainer
    data.trainer = trainer
    device = trainer.strategy.root_device
    pl_module.configure_model()
    pl_module.to(device)
    data.prepare_data()
    data.setup("fit")
    loader, evaluation = data.train_dataloader(), data.val_dataloader()
    probed = [
        {name: value.to(device) for name, value in batch.items() if name != "attention_mask"}
        for batch in itertools.islice(loader, PROBED)
    ]
    work = Workload(
        batches=_limited(len(loader), trainer.limit_train_batches),
        evaluation_batches=sum(_limited(len(one), trainer.limit_val_batches) for one in evaluation),
        mode=callback.calibration,
        activations=callback.activations,
        tf32_moments=callback.tf32_moments,
    )
    return forecast(network_of(pl_module), probed, callback.recipe, work, storage_dtype=pl_module.storage_dtype)


def _limited(batches: int, limit: float | int | None) -> int:
    """Return how many batches a Trainer runs: a whole number is a limit, a fraction a part."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
