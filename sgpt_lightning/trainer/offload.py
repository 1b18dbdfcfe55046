"""Where the weights of a fit's model are while nobody computes with them, and how it is measured then."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.hidden_states import Activations, free_bytes
from sgpt_lightning.calibration.perplexity_by_block import add_batches
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.streamed import load_streamed
from sgpt_lightning.checkpoint.tensor_files import TensorFiles
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.format.description import Residence
from sgpt_lightning.format.directory import is_compressed_dir
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.names import resolve_model
from sgpt_lightning.models.placement import BlocksElsewhere

Offload = Literal["auto", "none", "cpu", "disk"]
MEMORY_SHARE = 0.5
"""Of a device's free memory, what a model may take before `auto` offloads it: statistics and the solve want theirs."""


def load_offloaded(
    path: str,
    offload: Offload,
    device: torch.device,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    resident: Residence,
) -> nn.Module:
    """Load a model as `load_model` does, or so that its blocks come to the device one at a time.

    Args:
        path: as for `load_model`; so are the last three.
        offload: `none`; `cpu`, where blocks wait on the CPU; `disk`, where a dense model's are read when their turn
            comes, see `load_streamed`; or `auto`, which takes the first of them that has room.
        device: where it computes.
        dtype: compute dtype.
        attn_implementation: as in transformers.
        resident: of a compressed directory.

    Raises:
        ValueError: a compressed directory is to be read from disk block by block; what the loaders raise as well.
    """
    directory = Path(resolve_model(path)).expanduser()
    compressed = is_compressed_dir(directory)
    if compressed and offload == "disk":
        raise ValueError(f"offload disk is for dense models, {path} is compressed; --model.resident packed takes less")
    if offload == "auto":
        offload = "none" if compressed else _first_with_room(directory, dtype or torch.float32, device)
    if offload == "none":
        return load_model(path, dtype, attn_implementation, resident)
    with torch.device("cpu"):  # Lightning lets a GPU be the default
        if offload == "disk":
            return load_streamed(path, dtype or torch.float32, attn_implementation, device)
        model = load_model(path, dtype, attn_implementation, resident)
        BlocksElsewhere(model, device)
    return model


def _first_with_room(directory: Path, dtype: torch.dtype, device: torch.device) -> Offload:
    """Return where a dense model fits; `none` for what is not read from safetensors files here."""
    paths = list(directory.glob("*.safetensors"))
    if not paths:
        return "none"
    try:
        needed = TensorFiles(paths).nbytes(dtype)
    except ValueError:  # damaged, which the loader says better
        return "none"
    if needed <= MEMORY_SHARE * free_bytes(device):
        return "none"
    fits = device.type != "cpu" and needed <= MEMORY_SHARE * free_bytes(torch.device("cpu"))
    return "cpu" if fits else "disk"


def validate_by_block(trainer: Trainer, network: nn.Module, activations: Activations) -> list[Perplexity]:
    """Measure a model on the Trainer's validation data, one block at a time over all windows of a data set.

    Returns:
        What was measured, by data set; empty if there is nothing to validate on.

    Raises:
        TypeError, ValueError: the model cannot run a batch; see `check_batch`.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation:
        return []
    loop.setup_data()
    if loop.skip:
        return []
    metrics = []
    assert loop._combined_loader is not None
    for loader, limit in zip(loop._combined_loader.flattened, loop.max_batches, strict=True):
        metric = Perplexity().to(trainer.strategy.root_device)
        with own_random_state():
            add_batches(metric, network, _checked(trainer, network, loader, int(limit)), activations)
        metrics.append(metric)
    return metrics


def _checked(trainer: Trainer, network: nn.Module, loader: Any, limit: int) -> Any:
    for index, batch in enumerate(itertools.islice(loader, limit)):
        check_batch(network, batch, f"evaluation batch {index}")
        yield on_device(trainer, batch)


def on_device(trainer: Trainer, batch: Any) -> Mapping[str, Tensor]:
    """Return a batch as the steps of the Trainer's module receive it."""
    module: Any = trainer.lightning_module
    prepared = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    if hasattr(module, "sent"):
        module.sent = None
    return trainer.strategy.batch_to_device(prepared, dataloader_idx=0)
