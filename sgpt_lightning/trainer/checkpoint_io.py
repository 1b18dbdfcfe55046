"""Checkpoints of Lightning that are written whole or not at all, and read with a message where they cannot be.

Lightning writes a checkpoint to the system's directory for temporary files and moves it, which from one file system to
another is a copy: a process that is killed meanwhile leaves a part of a file in the place of a whole one. Here it is
written beside, and renamed.
"""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes local files beside their place and renames them; reads as Lightning does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. Whatever happens, what was at `path` is there, or the whole new one.

        Raises:
            OSError: the file cannot be written; names it.
        """
        if storage_options is not None or "file" not in get_filesystem(path).protocol:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = Path(f"{path}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a disk that is full
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if not isinstance(error.__context__, Exception | None):
                raise error.__context__ from None  # or of an interrupt
            raise OSError(f"the checkpoint {path} was not written ({error})") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or no checkpoint; names it.
        """
        try:
            return super().load_checkpoint(path, map_location or "cpu", weights_only)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0] if str(error) else error!r})"
            ) from error


def keep_blocks(trainer: Trainer) -> None:
    """Have the Trainer's checkpoints written whole, and by a `ModelCheckpoint` at the end of every epoch.

    It would wait for Lightning's own validation, which is off, as long as nothing else is asked of it.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._save_on_train_epoch_end is None:
            callback._save_on_train_epoch_end = True
