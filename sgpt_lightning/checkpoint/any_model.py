"""One loader for every model: embedded, local or from the hub, dense or compressed."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format.description import Residence
from sgpt_lightning.format.directory import MANIFEST, is_compressed_dir
from sgpt_lightning.format.manifest import read_manifest
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.hub import file_of_hub
from sgpt_lightning.models.names import find_model, resolve_model


def load_dense(name: str, **options: Any) -> nn.Module:
    """Load the weights of a dense model, frozen and in eval mode.

    Args:
        name: as in `find_model`.
        options: for `from_pretrained` of transformers.

    Raises:
        ValueError: a file of weights is truncated or damaged; what `find_model` raises as well.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    directory = find_model(name)
    try:
        with own_random_state():  # transformers may initialize before it loads
            model = AutoModelForCausalLM.from_pretrained(str(directory or name), trust_remote_code=False, **options)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of model path {name!r} cannot be read, a file is truncated or damaged: {error}; "
            "copy or download it again"
        ) from error
    return model.requires_grad_(False).eval()


def load_model(
    path: str,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    resident: Residence = "dense",
) -> nn.Module:
    """Load a dense or compressed model on the CPU, frozen and in eval mode.

    Args:
        path: the embedded `opt-mini`, a model directory (dense or compressed), or the hub id of either.
        dtype: compute dtype; None takes float32, for a compressed directory the one that it was evaluated in.
        attn_implementation: as in transformers; None takes the model's own, or the one that it was evaluated with.
        resident: how packed weights of a compressed directory live in memory, see `load_compressed`; a dense model has
            none.

    Raises:
        ValueError: a path that does not exist, or damaged files.
        ConnectionError: a hub id, and the hub cannot be reached.
    """
    directory = Path(resolve_model(path)).expanduser()
    if not is_compressed_dir(directory) and find_model(path) is None:
        directory = _snapshot(path) or directory
    if is_compressed_dir(directory):
        return load_compressed(
            directory, dtype=dtype, attn_implementation=attn_implementation, resident=resident
        ).requires_grad_(False)
    return load_dense(path, dtype=dtype or torch.float32, attn_implementation=attn_implementation)


def _snapshot(repo: str) -> Path | None:
    """Return the directory of the hub's cache that holds all files of a compressed model; None if it is a dense one."""
    manifest = file_of_hub(repo, MANIFEST)
    if manifest is None:
        return None
    for name in read_manifest(manifest.parent)[0].files:
        file_of_hub(repo, name, manifest.parent.name)  # one that is missing is named where it is read
    return manifest.parent
