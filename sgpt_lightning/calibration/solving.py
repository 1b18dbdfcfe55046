"""Solve linears with the statistics of their inputs, and write what will be stored back into the model."""

import copy
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.file_size import entries_at_most, entries_of
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solution import CompressedLinear, SolveError
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import pack_weight, some_at_once, unpack_weights
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.linears import add_to_bias, set_weight_matrix, weight_matrix
from sgpt_lightning.recipe import Recipe


def solve_linears(
    linears: Mapping[str, nn.Module],
    collector: InputCollector,
    plans: Plans,
    storage_dtype: torch.dtype,
) -> dict[str, SolvedLinear]:
    """Solve each linear, write stored weight and bias into the module, and return what to store (see `check_stored`).

    Biases that take over a mean error are rounded to `storage_dtype`; they are stored with the rest of the model.

    Raises:
        HessianError: a Hessian cannot be inverted, and the recipe's `on_failure` is `error`.
        SolveError: a result is no number or does not fit the model's dtype, and `on_failure` is `error`; or more
            linears had to be rounded plainly than the recipe allows.
    """
    solved: dict[str, SolvedLinear] = {}
    inputs: SharedInput | None = None
    for names in _solved_together(linears, collector, plans):
        inputs = SharedInput.of(collector.statistics(names[0]), inputs)
        recipe, has_bias = plans.recipes[names[0]], _has_bias(linears[names[0]])
        bits = plans.budget.of(names) if recipe.coding == "entropy" else [None] * len(names)
        matrices = [
            LinearToSolve(weight_matrix(linears[name]), name, plans.row_weights.get(name), limit)
            for name, limit in zip(names, bits, strict=True)
        ]
        compressed = compress_linears(matrices, inputs, recipe, storage_dtype, has_bias=has_bias, coded_size=coded_size)
        for matrix, result in zip(matrices, compressed, strict=True):
            solved[matrix.name] = _write(linears[matrix.name], matrix, result, plans, storage_dtype)
        if recipe.coding == "entropy":
            plans.budget.took({name: _bits_taken(name, solved[name].packed, plans.file_bytes) for name in names})
    return solved


def _solved_together(linears: Mapping[str, nn.Module], collector: InputCollector, plans: Plans) -> Iterator[list[str]]:
    """Yield the names of linears that stand beside each other, share an input, and are to be solved alike."""

    def alike(name: str) -> tuple[int, bool, Recipe]:
        return id(collector.statistics(name)), _has_bias(linears[name]), plans.recipes[name]

    return (list(names) for _, names in itertools.groupby(linears, alike))


def _bits_taken(name: str, packed: PackedWeight, file_bytes: int | None) -> float:
    """Return what a linear took of the budget; bytes that were kept for its entries in the header are given back."""
    kept = 0
    if file_bytes is not None:
        kept = entries_at_most(name, packed.spec.shape, file_bytes) - entries_of(name, packed, file_bytes)
    return 8 * (packed.nbytes - kept)


def _has_bias(linear: nn.Module) -> bool:
    return getattr(linear, "bias", None) is not None


def _write(
    linear: nn.Module, matrix: LinearToSolve, result: CompressedLinear, plans: Plans, storage_dtype: torch.dtype
) -> SolvedLinear:
    """Write a solution back, or where the model's dtype cannot hold it and the recipe allows it, a plain rounding."""
    name, recipe = matrix.name, plans.recipes[matrix.name]
    if recipe.on_failure == "error":
        return _write_back(linear, name, result, storage_dtype)
    dense = copy.deepcopy(linear.state_dict())
    try:
        solved = _write_back(linear, name, result, storage_dtype)
    except SolveError as error:
        linear.load_state_dict(dense)
        rounded = round_plainly(
            matrix.weight, recipe, storage_dtype, bits=matrix.bits, coded_size=coded_size, name=name
        )
        result = replace(rounded, failure=str(error))
        solved = _write_back(linear, name, result, storage_dtype)
    if result.failure is not None:
        plans.fallbacks.add(name, result.failure)
    return solved


def _write_back(linear: nn.Module, name: str, compressed: CompressedLinear, storage_dtype: torch.dtype) -> SolvedLinear:
    packed = pack_weight(compressed.solution)
    set_weight_matrix(linear, compressed.weight(), name)
    if compressed.bias_shift is not None:
        add_to_bias(linear, compressed.bias_shift, storage_dtype, name)
    return SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))


def check_stored(linears: Mapping[str, nn.Module], solved: Mapping[str, SolvedLinear]) -> None:
    """Unpack what is stored of some linears, on their device, and compare it with the weights that they compute with.

    Side by side: one by one it took opt-mini five times as long, as long as all its sweeps.

    Raises:
        RuntimeError: they differ; names the linear.
    """
    for names in some_at_once({name: linear.packed for name, linear in solved.items()}):
        weights = [weight_matrix(linears[name]) for name in names]
        stored = unpack_weights(
            [solved[name].packed.to(weight.device) for name, weight in zip(names, weights, strict=True)]
        )
        for name, weight, unpacked in zip(names, weights, stored, strict=True):
            if not torch.equal(unpacked.to(weight.dtype), weight):
                raise RuntimeError(f"what is stored of {name} does not unpack to the weights that it was solved to")


def mean_error(solved: Iterable[SolvedLinear]) -> float | None:
    """Mean relative error of some solved linears, one at least; None if that of none is known."""
    errors = [linear.report.relative_error for linear in solved]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known or not errors else None
