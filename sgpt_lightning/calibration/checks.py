"""What is refused before a calibration begins: models, recipes and batches that do not fit each other."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sgpt_lightning.arguments import parse_size
from sgpt_lightning.calibration.embeddings import plan_embeddings
from sgpt_lightning.calibration.fallbacks import Fallbacks
from sgpt_lightning.calibration.file_size import rate_for_file
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.rates import BitBudget
from sgpt_lightning.core.budget import least_bits
from sgpt_lightning.core.checks import check_pattern
from sgpt_lightning.models.blocks import find_decoder_blocks, is_marked_compressed
from sgpt_lightning.models.embeddings import find_embeddings
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.placement import BlocksElsewhere, placement_of
from sgpt_lightning.recipe import Recipe


def check_batch(model: nn.Module, batch: Mapping[str, Tensor], what: str) -> None:
    """Refuse a batch that the model cannot run.

    Args:
        model: a causal language model.
        batch: `input_ids` integers `[batch, time]`, and whatever else.
        what: what to call the batch in messages, such as `calibration batch 3`.

    Raises:
        TypeError: it is no mapping with `input_ids`, or they are no integers.
        ValueError: `input_ids` is not `[batch, time]`, longer than the model has positions, or holds an id that is not
            in its vocabulary.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise TypeError(f"{what} must be a mapping with `input_ids`, got {type(batch).__name__}")
    ids, config = batch["input_ids"], getattr(model, "config", None)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"input_ids of {what} must be integers, got {ids.dtype}")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids of {what} must be [batch, time], got shape {list(ids.shape)}")
    positions, words = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(f"{what} has windows of {ids.shape[1]} tokens, the model has {positions} positions")
    if words is not None:
        low, high = torch.stack(ids.aminmax()).tolist()  # one read, should they be on a GPU
        if not 0 <= low <= high < words:
            raise ValueError(f"input_ids of {what} must be below the vocabulary's {words}, got {low} to {high}")


def plan_linears(model: nn.Module, recipe: Recipe, storage_dtype: torch.dtype) -> Plans:
    """Resolve the recipe for every linear and embedding, and refuse, with all offenders, what would fail later.

    Args:
        model: a dense model; it stays as it is.
        recipe: what is asked.
        storage_dtype: dtype of what will not be packed.

    Raises:
        ValueError: no decoder blocks, mixtures of experts, a quantized or compressed model, an ignore pattern or rule
            that matches nothing, nothing left to compress, N:M groups that do not fit a linear, embeddings that do not
            fit into their bits, or a size of the file that cannot be met.
    """
    decoder = find_decoder_blocks(model)
    linears = decoder.linears()
    if is_marked_compressed(model):
        raise ValueError("the model was compressed before, or begun to be; start from a dense one")
    if recipe.scaling.fold and isinstance(placement_of(model), BlocksElsewhere):
        raise ValueError("scaling.fold needs all of the model in memory, its blocks are kept elsewhere: do not offload")
    quantized = getattr(getattr(model, "config", None), "quantization_config", None)
    odd = [name for name, linear in linears.items() if not weight_matrix(linear).is_floating_point()]
    if quantized is not None or odd:
        raise ValueError(f"the model is already quantized ({quantized or ', '.join(odd[:4])}); start from a dense one")
    names = [*linears, *(find_embeddings(model) if recipe.embedding_bits is not None else ())]
    offenders = [f"{pattern!r} of ignore or rules matches no linear" for pattern in recipe.unmatched(names)]
    recipes: dict[str, Recipe] = {}
    for name, linear in linears.items():
        try:
            resolved = recipe.for_linear(name)
            if resolved is not None:
                check_pattern(resolved, weight_matrix(linear).shape[1], name)
                recipes[name] = resolved
        except ValueError as error:
            offenders.append(f"{name}: {error}")
    if not recipes and not offenders:
        offenders.append("the recipe leaves every linear alone: set sparsity, pattern or target_avg_bits")
    if offenders:
        shown = offenders[:8] + ([f"and {len(offenders) - 8} more"] if len(offenders) > 8 else [])
        raise ValueError("the recipe does not fit the model:\n  " + "\n  ".join(shown))
    plans = Plans(
        decoder, recipes, embeddings=plan_embeddings(model, recipe), fallbacks=Fallbacks(recipe, recipes.keys())
    )
    return _with_budget(model, plans, recipe, storage_dtype)


def _with_budget(model: nn.Module, plans: Plans, recipe: Recipe, storage_dtype: torch.dtype) -> Plans:
    """Give each linear that is entropy-coded its bits, alike for each weight; those that follow from a size as well."""
    recipes, linears, limit = plans.recipes, plans.linears(), None
    if recipe.target_size is not None:
        limit = parse_size("target_size", recipe.target_size)
        rate = rate_for_file(model, plans, storage_dtype, limit)
        recipes = {
            name: replace(resolved, target_size=None, target_bits_per_weight=rate)
            if resolved.coding == "entropy"
            else resolved
            for name, resolved in recipes.items()
        }
    bits = {
        name: resolved.target_bits_per_weight * weight_matrix(linears[name]).numel()
        for name, resolved in recipes.items()
        if resolved.coding == "entropy" and resolved.target_bits_per_weight is not None
    }
    return replace(plans, recipes=recipes, budget=BitBudget(bits), file_bytes=limit)


def least_bytes(model: nn.Module, plans: Plans, storage_dtype: torch.dtype) -> int:
    """Return how many bytes the compressed model's file will have at least, whatever the solve finds."""
    matrices = {name: weight_matrix(linear).shape for name, linear in plans.decoder.linears().items()}
    storage_bits = 8 * storage_dtype.itemsize
    bits = sum(
        least_bits(plans.recipes.get(name), (rows, columns), storage_bits) for name, (rows, columns) in matrices.items()
    )
    tables = [weight_matrix(model.get_submodule(name)).shape for name in plans.embeddings]
    packed = sum(map(math.prod, [*matrices.values(), *tables]))
    rest = sum(parameter.numel() for parameter in model.parameters()) - packed
    return int(bits + _LEAST_OF_TABLES * sum(plans.embeddings.values())) // 8 + rest * storage_dtype.itemsize


_LEAST_OF_TABLES = 0.9
"""Part of an embedding's bits that is spent at least."""
