"""A compressed directory -> a model in memory that computes with dense weights; the checks are `reading.py`'s."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.checkpoint.reading import (
    Stored,
    check_shapes,
    naming,
    read_stored,
    some_together,
    take_packed,
)
from sgpt_lightning.format.description import CONFIG, Residence
from sgpt_lightning.format.directory import CheckpointError, read_settled
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.manifest import read_manifest
from sgpt_lightning.format.packing import unpack_weights
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.linears import is_conv1d

SMALL_TABLE = 1024
"""Entries of a table that is always stored."""


def stored_tables(model: nn.Module) -> dict[str, Tensor]:
    """Return the tables that a model computes for itself (rotary angles) and that are stored all the same, by name.

    Small ones cost nothing and are then the same in every version of transformers; large ones that are not float32 were
    rounded when the model was cast as a whole, which `from_pretrained` does not do.
    """
    persistent = model.state_dict().keys()
    return {
        name: table
        for name, table in model.named_buffers()
        if name not in persistent
        and table.is_floating_point()
        and (table.numel() <= SMALL_TABLE or table.dtype != torch.float32)
    }


def load_compressed(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    resident: Residence = "dense",
) -> nn.Module:
    """Read a compressed model as a transformers model in eval mode.

    Args:
        directory: what `save_compressed` wrote, found as by `find_directory`.
        dtype: compute dtype; the one the model was evaluated in if None, which gives the same logits bit for bit.
        attn_implementation: as in transformers; the one the model was evaluated with if None.
        resident: how weights live in memory: `dense` makes an ordinary model. `packed` (codes of just enough bits per
            channel) and `coded` (the stored tensors as they are) keep them packed, and a forward unpacks one at a time;
            it is then what `from_pretrained` of transformers gives.

    Returns:
        The model, on the CPU.

    Raises:
        CheckpointError: the directory is not a compressed model, or a file is missing, truncated or changed, or it is
            of a version before 6 and not to be `dense`.
        ValueError: `dtype` or `resident` is not one.
    """
    compute_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(compute_dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or the name of one, got {dtype!r}")
    check_choice("resident", resident, Residence)
    if resident != "dense":
        options = {"dtype": compute_dtype, "attn_implementation": attn_implementation, "resident": resident}
        return read_settled(directory, lambda path: _load_packed(path, options))
    stored = read_settled(directory, read_stored)
    packed = take_packed(stored.tensors, stored.description, stored.described_in)
    _check_shapes(stored, packed)
    evaluated_in = getattr(torch, stored.description.compute_dtype)
    model = _allocate(stored, compute_dtype or evaluated_in, attn_implementation)
    _fill(model, stored, packed)
    if compute_dtype in (None, evaluated_in):
        fill_tables(model, {name: stored.tensors[name] for name in stored.tensors.keys() - model.state_dict().keys()})
    if stored.generation_config is not None:
        model.generation_config = stored.generation_config
    mark_compressed(model)
    return model.eval()


def _load_packed(path: Path, options: Mapping[str, Any]) -> nn.Module:
    """Let transformers load a directory, whose manifest has to be there."""
    from transformers import AutoModelForCausalLM

    read_manifest(path)
    given = {name: value for name, value in options.items() if value is not None}
    with own_random_state():
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False, **given)


def _check_shapes(stored: Stored, packed: Mapping[str, PackedWeight]) -> None:
    from transformers import AutoModelForCausalLM

    with naming(stored.path / CONFIG), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(stored.config), trust_remote_code=False)
    check_shapes(model, stored.tensors, packed, stored.description.aliases, stored.path)


def _allocate(stored: Stored, dtype: torch.dtype, attn_implementation: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    attention = attn_implementation or stored.description.attn_implementation
    try:
        with torch.device("cpu"), own_random_state():
            return AutoModelForCausalLM.from_config(
                stored.config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        if attn_implementation is not None:
            raise
        raise CheckpointError(
            f"{stored.described_in} asks for the attention {attention!r}, which does not work here ({error}); "
            "give attn_implementation"
        ) from error


def _fill(model: nn.Module, stored: Stored, packed: Mapping[str, PackedWeight]) -> None:
    """Copy the stored tensors into the model, packed weights some at a time."""
    wanted: dict[str, list[Tensor]] = {name: [] for name in packed}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source = stored.description.aliases.get(name, name)
            owner = source.removesuffix(".weight")
            if owner in packed:
                wanted[owner].append(tensor)
            else:
                tensor.copy_(stored.tensors[source])
        specs = stored.description.packed
        for name, weight in some_together(unpack_weights, specs, packed.__getitem__, stored.described_in):
            for tensor in wanted[name]:
                tensor.copy_(weight.T if is_conv1d(model.get_submodule(name)) else weight)


def fill_tables(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Put stored tables, by name, in the place of those that the model has computed."""
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        holder.register_buffer(leaf, table.to(holder.get_buffer(leaf).device), persistent=False)
