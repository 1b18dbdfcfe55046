"""Solve linears with the statistics of their inputs, and write what will be stored back into the model."""

import copy
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.calibration.file_size import entries_at_most, entries_of
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.progress import biases_of, write_stored
from sgpt_lightning.calibration.ranks import Ranks, deal
from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solution import CompressedLinear, SolveError
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import pack_weight, some_at_once, unpack_weights
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.identity import exact_digest
from sgpt_lightning.models.linears import add_to_bias, set_weight_matrix, weight_matrix
from sgpt_lightning.recipe import Recipe


def solve_linears(
    linears: Mapping[str, nn.Module],
    collector: InputCollector,
    plans: Plans,
    storage_dtype: torch.dtype,
) -> dict[str, SolvedLinear]:
    """Solve each linear, write stored weight and bias into the module, and return what to store (see `check_stored`).

    Biases that take over a mean error are rounded to `storage_dtype`; they are stored with the rest of the model. Where
    the run has several processes, each solves what `owners_of` deals to it, and all end with the same linears.

    Raises:
        RankError: another process failed.
        HessianError: a Hessian cannot be inverted, and the recipe's `on_failure` is `error`.
        SolveError: a result is no number or does not fit the model's dtype, and `on_failure` is `error`; or more
            linears had to be rounded plainly than the recipe allows.
    """
    ranks = plans.ranks
    with ranks.outcome():
        together = list(_solved_together(linears, collector, plans))
    solved: dict[str, SolvedLinear] = {}
    owners: dict[str, int] = {}
    for some in _rounds(together, plans):
        names = [name for names in some for name in names]
        new = owners_of(
            {name: linears[name] for name in names if collector.leader(name) not in owners}, collector, ranks
        )
        collector.reduce(new, ranks)
        owners |= new
        own = [names for names in some if owners[collector.leader(names[0])] == ranks.rank]
        with ranks.outcome():
            written = _solve_own(linears, own, _bits_of(some, plans), collector, plans, storage_dtype)
        every = _share({name: linears[name] for name in names}, written, ranks)
        solved |= {name: linear.solved for name, linear in every.items()}
        _account(every, plans)
    return solved


IN_A_ROUND = 4
"""Sets of linears, for each of several processes, that are solved before what they left of the budget is known. Four
are what a block has; what the last ones leave is lost to the file."""


class _Written(NamedTuple):
    """What became of one linear, for the processes that did not solve it."""

    solved: SolvedLinear
    failure: str | None
    """Why it is rounded plainly, if it is."""
    bias: Tensor | None = None
    """`[out_features]`, on the CPU, if it has one and others are to know it."""


def owners_of(linears: Mapping[str, nn.Module], collector: InputCollector, ranks: Ranks) -> dict[str, int]:
    """Deal the inputs of some linears to the processes of a run, by what it costs to solve what receives them.

    A Cholesky takes in^3 operations, a sweep of a weight out in^2.

    Returns:
        The rank of each distinct input, by the name of the first linear that receives it.
    """
    costs: dict[str, float] = {}
    for name, linear in linears.items():
        leader, (rows, columns) = collector.leader(name), weight_matrix(linear).shape
        costs[leader] = costs.get(leader, float(columns) ** 3) + float(rows) * columns**2
    return dict(zip(costs, deal(list(costs.values()), ranks.size), strict=True))


def _rounds(together: Sequence[list[str]], plans: Plans) -> Iterator[Sequence[list[str]]]:
    """Split the sets of linears into those that are solved side by side, by several processes."""
    coded = any(plans.recipes[name].coding == "entropy" for names in together for name in names)
    several = IN_A_ROUND * plans.ranks.size if coded else max(len(together), 1)
    at_once = 1 if plans.ranks.size == 1 else several
    return (together[start : start + at_once] for start in range(0, len(together), at_once))


def _bits_of(together: Sequence[list[str]], plans: Plans) -> dict[str, float]:
    """Return the bits that each linear may take, of those that are entropy-coded."""
    coded = [name for names in together for name in names if plans.recipes[name].coding == "entropy"]
    return dict(zip(coded, plans.budget.of(coded), strict=True)) if coded else {}


def _solve_own(
    linears: Mapping[str, nn.Module],
    together: Iterable[list[str]],
    bits: Mapping[str, float],
    collector: InputCollector,
    plans: Plans,
    storage_dtype: torch.dtype,
) -> dict[str, _Written]:
    """Solve the sets of linears of which this process has the statistics."""
    written: dict[str, _Written] = {}
    inputs: SharedInput | None = None
    for names in together:
        inputs = SharedInput.of(collector.statistics(names[0]), inputs)
        recipe, has_bias = plans.recipes[names[0]], _has_bias(linears[names[0]])
        matrices = [
            LinearToSolve(weight_matrix(linears[name]), name, plans.row_weights.get(name), bits.get(name))
            for name in names
        ]
        compressed = compress_linears(matrices, inputs, recipe, storage_dtype, has_bias=has_bias, coded_size=coded_size)
        for matrix, result in zip(matrices, compressed, strict=True):
            written[matrix.name] = _write(linears[matrix.name], matrix, result, recipe, storage_dtype)
    return written


def _share(linears: Mapping[str, nn.Module], own: Mapping[str, _Written], ranks: Ranks) -> dict[str, _Written]:
    """Give to the other processes what this one solved, and write what they did; return all, in order."""
    if ranks.size == 1:
        return dict(own)
    biases = biases_of({name: linears[name] for name in own})
    every = ranks.merge({name: linear._replace(bias=biases.get(name)) for name, linear in own.items()}, list(linears))
    others = {name: linear for name, linear in every.items() if name not in own}
    with ranks.outcome():
        given = {name: linear.bias for name, linear in others.items() if linear.bias is not None}
        write_stored(linears, {name: linear.solved.packed for name, linear in others.items()}, given)
    return every


def _account(written: Mapping[str, _Written], plans: Plans) -> None:
    """Note what linears took of the budget, and those that were rounded plainly; alike in every process."""
    for name, linear in written.items():
        if linear.failure is not None:
            plans.fallbacks.add(name, linear.failure, warn=plans.ranks.is_first)
    coded = [name for name in written if plans.recipes[name].coding == "entropy"]
    plans.budget.took({name: _bits_taken(name, written[name].solved.packed, plans.file_bytes) for name in coded})


def _solved_together(linears: Mapping[str, nn.Module], collector: InputCollector, plans: Plans) -> Iterator[list[str]]:
    """Yield the names of linears that stand beside each other, share an input, and are to be solved alike."""

    def alike(name: str) -> tuple[str, bool, Recipe]:
        return collector.leader(name), _has_bias(linears[name]), plans.recipes[name]

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
    linear: nn.Module, matrix: LinearToSolve, result: CompressedLinear, recipe: Recipe, storage_dtype: torch.dtype
) -> _Written:
    """Write a solution back, or where the model's dtype cannot hold it and the recipe allows it, a plain rounding."""
    name = matrix.name
    dense = copy.deepcopy(linear.state_dict()) if recipe.on_failure != "error" else {}
    try:
        solved = _write_back(linear, name, result, storage_dtype)
    except SolveError as error:
        if recipe.on_failure == "error":
            raise
        linear.load_state_dict(dense)
        rounded = round_plainly(
            matrix.weight, recipe, storage_dtype, bits=matrix.bits, coded_size=coded_size, name=name
        )
        result = replace(rounded, failure=str(error))
        solved = _write_back(linear, name, result, storage_dtype)
    failure = None if recipe.on_failure == "error" else result.failure
    return _Written(solved, failure)


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


def check_everywhere(linears: Mapping[str, nn.Module], ranks: Ranks, what: str) -> None:
    """Compare weights and biases of some linears over the processes of a run, by a digest of all their bytes.

    Raises:
        RuntimeError: they differ; `what` names them.
    """
    if ranks.size == 1:
        return
    tensors = ((name, tensor) for name, linear in linears.items() for tensor in linear.state_dict().values())
    ranks.check_same(exact_digest(tensors), what)


def mean_error(solved: Iterable[SolvedLinear]) -> float | None:
    """Mean relative error of some solved linears, one at least; None if that of none is known."""
    errors = [linear.report.relative_error for linear in solved]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known or not errors else None
