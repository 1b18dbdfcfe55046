"""What a fit needs of the user's Trainer: settings that it can work with, some that it borrows, and where it writes."""

import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sized
from inspect import signature
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.ranks import Ranks, joined
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.report.run import REPORT_KEYS
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.offload import validate_by_block


class IncompleteRunError(RuntimeError):
    """A run that ended before all linears were solved; no model was written."""

    @classmethod
    def after(cls, done: int, planned: int, linears: int, target: Path, *, kept: bool) -> "IncompleteRunError":
        """Say how many epochs were done and linears solved, where nothing was written, and whether all that is lost."""
        lost = "" if kept or not linears else ". They are lost: a LastCheckpoint among the callbacks keeps them"
        return cls(
            f"the run ended after {done} of {planned} epochs, {linears} linears solved, and nothing was written to "
            f"{target}: trainer.max_time or a callback stopped it, or there was no batch{lost}"
        )


class TrainerSettings(NamedTuple):
    """What a fit sets for itself and gives back."""

    max_epochs: int | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float
    log_every_n_steps: int

    @classmethod
    def of(cls, trainer: Trainer) -> "TrainerSettings":
        """Read the settings as they are."""
        log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set late, by a connector
        return cls(trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.num_sanity_val_steps, log_every)

    def apply(self, trainer: Trainer) -> None:
        """Set them."""
        trainer.fit_loop.max_epochs = self.max_epochs
        trainer.check_val_every_n_epoch = self.check_val_every_n_epoch
        trainer.num_sanity_val_steps = self.num_sanity_val_steps
        trainer.log_every_n_steps = self.log_every_n_steps  # type: ignore[attr-defined]


def run_directory(trainer: Trainer) -> Path:
    """Return the directory of the run: the logger's, or the Trainer's root; to be asked by every process, or none."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def check_trainer(trainer: Trainer) -> None:
    """Raise ValueError for mixed precision, another strategy than DDP, or a limit that would end the run early."""
    if str(trainer.precision).endswith("-mixed"):
        raise ValueError(
            f"trainer.precision must not be mixed, got {trainer.precision!r}: the Hessians would be gathered in "
            "another dtype than the file is made for. Set the model's dtype instead"
        )
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"trainer.strategy must be ddp, or auto with one device, got {type(strategy).__name__}: every process "
            "needs the whole model, one block at a time"
        )
    ends = {
        "fast_dev_run": trainer.fast_dev_run,  # type: ignore[attr-defined]  # set late, by a connector
        "max_steps": trainer.max_steps != -1 and trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches == 0 and "0",
    }
    early = [f"trainer.{name}={value}" for name, value in ends.items() if value]
    if early:
        raise ValueError(
            f"{', '.join(early)} would end the run before every block is solved; leave it at its default "
            "(data.num_samples and ignore make a run short)"
        )


def use_processes(trainer: Trainer) -> Ranks:
    """Return the processes of the run; from here on every one of them must do the same."""
    ranks = joined()
    if isinstance(trainer.strategy, DDPStrategy):
        # Buffers are what they were: to send them before every forward only costs time, and waits for ranks that died.
        known, given = signature(DistributedDataParallel).parameters, trainer.strategy._ddp_kwargs
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        if not {"forward_sync_buffers", "broadcast_buffers"} & given.keys():
            given[name] = False
    return ranks


def check_dealt(trainer: Trainer, loader: object, what: str) -> None:
    """Refuse data of which Lightning's own sampler gives some windows to two processes.

    Raises:
        ValueError: a dataset that cannot be dealt evenly; `what` names it.
    """
    sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    repeats = isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__
    if repeats and isinstance(dataset, Sized) and len(dataset) % trainer.world_size:
        raise ValueError(
            f"{what} has {len(dataset)} windows, which {trainer.world_size} processes would share by counting some of "
            "them twice: use a TextDataModule or a loader with its InOrderSampler, or a multiple of the processes"
        )


def check_report_path(path: Path) -> None:
    """Raise ValueError if there is a file that is not a report of ours."""
    if not path.exists():
        return
    try:
        ours = set(json.loads(path.read_text())) >= REPORT_KEYS
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and is no report of sgpt_lightning: move it or set trainer.default_root_dir")


def rescue_places(directory: Path) -> list[Path]:
    """Return where a model goes that cannot be written to its target; `directory` is that of the run."""
    return [folder / f"rescued-{os.getpid()}" for folder in (directory, Path(tempfile.gettempdir()))]


def network_of(pl_module: LightningModule) -> nn.Module:
    """Return the model of a `CausalLMModule` that is configured."""
    assert isinstance(pl_module, CausalLMModule)
    assert pl_module.network is not None, "configure_model() comes first"
    return pl_module.network


def count_tokens(trainer: Trainer) -> TokenCounts:
    """Count the tokens of the training data; the global generators, which loaders draw from, stay as they are.

    Raises:
        TypeError: a batch is no mapping with `input_ids`, or they are no integers.
        ValueError: they are not what the model takes.
    """
    assert trainer.train_dataloader is not None
    counts = TokenCounts()
    with own_random_state():
        for index, batch in enumerate(itertools.islice(trainer.train_dataloader, int(trainer.num_training_batches))):
            check_batch(network_of(trainer.lightning_module), batch, f"calibration batch {index}")
            counts.add(batch)
    return counts


def validate_now(trainer: Trainer, activations: Activations) -> None:
    """Run the Trainer's validation loop in the middle of a fit, if there is anything to validate on.

    A model whose blocks come to the device one at a time is measured block by block instead, without the loop.
    """
    module = trainer.lightning_module
    if isinstance(module, CausalLMModule) and placement_of(network_of(module)).moves:
        module.take_measured(validate_by_block(trainer, network_of(module), activations))
    elif trainer.enable_validation:
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating = True
        loop.setup_data()
        loaders = trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            check_dealt(trainer, loader, "the evaluation data")
        if not loop.skip:
            loop.run()
        trainer.training = True


def warn_of_few_tokens(tokens: int, linears: Mapping[str, nn.Module]) -> None:
    """Warn where there are fewer calibration tokens than a linear has inputs."""
    widest = max(linears, key=lambda name: weight_matrix(linears[name]).shape[1])
    inputs = weight_matrix(linears[widest]).shape[1]
    if tokens < inputs:
        warnings.warn(
            f"{tokens} calibration tokens are fewer than the {inputs} in_features of {widest}: its Hessian will be "
            "singular and rest on damping alone; raise data.num_samples",
            stacklevel=2,
        )
