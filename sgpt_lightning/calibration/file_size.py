"""From the size that the whole weights file may have to the bits of the linears that are entropy-coded.

Everything else has its size before anything is solved, and is asked of those who write it: tensors of
`checkpoint/contents.py`, entries of `format/header.py`. What each linear's own entries take is known within some bytes
only: they are counted at most, and what is left of them goes to the linears that are solved later.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.rates import LEAST_RATE
from sgpt_lightning.checkpoint.contents import Content, unpacked_contents
from sgpt_lightning.core.budget import count_survivors
from sgpt_lightning.core.sizes import smallest_layout
from sgpt_lightning.format.header import FRAME_BYTES, entry_bytes
from sgpt_lightning.format.layout import CODED_STREAMS, PackedWeight
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.recipe import MAX_BITS, Recipe

SHARD_BYTES = 5 * 10**9
"""Bytes of tensors after which there is another file, with a header of its own."""


def entries_of(name: str, packed: PackedWeight, file_bytes: int) -> int:
    """Return the bytes that a packed weight's tensors take in the header, at most."""
    parts = packed.tensors.items()
    return sum(entry_bytes(f"{name}.{part}", tensor.dtype, tensor.shape, file_bytes) for part, tensor in parts)


def entries_at_most(name: str, shape: tuple[int, int], file_bytes: int) -> int:
    """Return the bytes that a coded matrix will take in the header, at most, whatever its codes are."""
    beside = {"level": (torch.float32, 1), "steps": (torch.uint8, shape[1]), "row_scales": (torch.uint8, shape[0])}
    parts = {**beside, **dict.fromkeys(CODED_STREAMS, (torch.uint16, file_bytes))}
    return sum(entry_bytes(f"{name}.weight_{part}", dtype, [size], file_bytes) for part, (dtype, size) in parts.items())


def packed_bytes_at_most(name: str, shape: tuple[int, int], bits: float, file_bytes: int) -> int:
    """Return the bytes that a coded matrix of so many bits in all takes in the file, at most, entries included."""
    return int(bits / 8) + entries_at_most(name, shape, file_bytes)


def rate_for_file(model: nn.Module, plans: Plans, storage_dtype: torch.dtype, limit: int) -> float:
    """Return the bits a weight of the linears that are entropy-coded with which the file meets its size.

    Args:
        model: the model, still dense.
        plans: what is to be done to each linear, and what is stored of embeddings.
        storage_dtype: dtype of what is not packed.
        limit: bytes of the whole weights file, at most.

    Raises:
        ValueError: no linear is entropy-coded, or the size is below what the rest of the file and the least for the
            linears take, or above what the most for them takes.
    """
    coded = [name for name, recipe in plans.recipes.items() if recipe.coding == "entropy"]
    if not coded:
        raise ValueError(f"target_size needs linears that are entropy-coded, the rules leave none, got {limit:,} bytes")
    shapes = [weight_matrix(plans.linears()[name]).shape for name in coded]
    rest = _rest_bytes(model, plans, storage_dtype, limit)
    entries = sum(entries_at_most(name, (s[0], s[1]), limit) for name, s in zip(coded, shapes, strict=True))
    weights = sum(map(math.prod, shapes))
    rate = 8 * (limit - rest - entries) / weights
    if not LEAST_RATE <= rate <= MAX_BITS:
        least, most = (math.ceil(rest + entries + each * weights / 8) for each in (LEAST_RATE, MAX_BITS))
        raise ValueError(
            f"target_size must be from {least:,} to {most:,} bytes for this model: all but the entropy-coded linears "
            f"take {rest:,} bytes, got {limit:,}"
        )
    return rate


def beside_packed(model: nn.Module, plans: Plans, storage_dtype: torch.dtype) -> Iterator[tuple[str, Content, int]]:
    """Yield what is stored beside packed weights by name, and the bytes that it takes when all is solved."""
    recipes = plans.recipes
    tensors, _ = unpacked_contents(model, {*recipes, *plans.embeddings}, storage_dtype)
    for name, content in tensors.items():
        owner, _, leaf = name.rpartition(".")
        shifted = leaf == "bias" and owner in recipes and recipes[owner].solve_parts.centre  # then it is rounded
        item = min(content.dtype.itemsize, storage_dtype.itemsize) if shifted else content.dtype.itemsize
        yield name, content, math.prod(content.shape) * item


def _rest_bytes(model: nn.Module, plans: Plans, storage_dtype: torch.dtype, limit: int) -> int:
    """Return the bytes of all but the entropy-coded linears, headers included."""
    total = (1 + limit // SHARD_BYTES) * FRAME_BYTES
    for name, content, nbytes in beside_packed(model, plans, storage_dtype):
        total += nbytes + entry_bytes(name, content.dtype, content.shape, limit)
    for name, bits in plans.embeddings.items():
        rows, columns = weight_matrix(model.get_submodule(name)).shape
        total += packed_bytes_at_most(name, (rows, columns), bits, limit)
    for name, recipe in plans.recipes.items():
        if recipe.coding == "fixed":
            rows, columns = weight_matrix(model.get_submodule(name)).shape
            total += _pruned_bytes(recipe, (rows, columns), storage_dtype)
            total += sum(entry_bytes(f"{name}.weight_{p}", storage_dtype, [rows, columns], limit) for p in _PRUNED)
    return total


_PRUNED = ("values", "mask")


def _pruned_bytes(recipe: Recipe, shape: tuple[int, int], storage_dtype: torch.dtype) -> int:
    """Return the bytes of a matrix that a rule prunes and leaves unquantized, at most."""
    weights, bits = math.prod(shape), 8 * storage_dtype.itemsize
    # A mask is exact in every block of columns, so each may keep one weight more than the whole would.
    survivors = count_survivors(recipe, shape) + math.ceil(shape[1] / recipe.block_size)
    return math.ceil(smallest_layout(bits * weights, bits * survivors, shape, recipe.n_m)[1] / 8)
