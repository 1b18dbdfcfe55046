"""One budget for the whole model: which linear is pruned how much, and how many bits it gets.

For each linear and each sparsity on offer (none and the recipe's among them) one cheap solve on the dense model's
inputs measures, row by row, what pruning costs and what rounding to one width adds, in units of the model's loss
(`gradients.py`). Rounding errors fall by four with every bit, so that solve stands for all widths: dealing bits to the
rows in order of gain gives the linear's whole curve of loss over bits. A choice of one point on one curve for each
linear, within the budget and with the least sum, is a multiple-choice knapsack; it is solved exactly by dynamic
programming over budget units (`allocation.py`).

Every point is priced in true bits: codes, mask, ranges, offsets and the width of each row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.fallbacks import Fallbacks
from sgpt_lightning.calibration.ranks import ALONE, Ranks
from sgpt_lightning.calibration.rates import BitBudget, RateCurve, rate_curve, rates_at_one_price
from sgpt_lightning.core.allocation import choose_points, greedy_curve
from sgpt_lightning.core.budget import count_survivors, fixed_bits
from sgpt_lightning.core.hessian import HessianError
from sgpt_lightning.core.linear import relative_weights
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.rate import rate_problem
from sgpt_lightning.core.solver import LinearToSolve, pose_dense, try_width
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.models.blocks import DecoderBlocks
from sgpt_lightning.recipe import Recipe

SPARSITIES = (0.0, 0.2, 0.35, 0.5, 0.65)
POINTS_PER_BIT = 8
TRIAL_BITS = 3
Choices = TypeVar("Choices")


@dataclass(frozen=True)
class Plans:
    """What is to be done to each linear of a model, made once, before the first block."""

    decoder: DecoderBlocks
    """The model's decoder blocks."""
    recipes: Mapping[str, Recipe]
    """Settings resolved for each linear, by full name; linears that are left alone are missing."""
    row_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """What an error of each output channel costs the loss, `[out_features]`; empty if gradients were not asked for."""
    budget: BitBudget = field(default_factory=lambda: BitBudget({}))
    """True bits of the linears whose codes are entropy-coded, kept while they are solved."""
    embeddings: Mapping[str, float] = field(default_factory=dict)
    """Bits that each embedding may take in all, by full name; those that stay as they are are missing."""
    file_bytes: int | None = None
    """Bytes that the whole weights file may have, where the budget follows from them."""
    fallbacks: Fallbacks = field(default_factory=lambda: Fallbacks(Recipe(), ()))
    """Linears that could not be solved and were rounded plainly, kept while linears are solved."""
    ranks: Ranks = ALONE
    """The processes of the run."""

    def linears(self, block: int | None = None) -> dict[str, nn.Module]:
        """Return the linears of one block, or of all, that something is to be done to."""
        return {name: linear for name, linear in self.decoder.linears(block).items() if name in self.recipes}


@dataclass(frozen=True)
class LinearJob:
    """What is known of one linear before the plan."""

    weight: Tensor
    """`[out_features, in_features]`."""
    statistics: InputStatistics | None
    """Of the dense model's inputs; None if another process holds them."""
    recipe: Recipe
    """What layer scope would do; its cost sets the budget where only `target_avg_bits` is given."""
    row_weights: Tensor
    """E[g_i^2], `[out_features]`."""


class _Point(NamedTuple):
    bits: float
    loss: float
    recipe: Recipe


class _Offer(NamedTuple, Generic[Choices]):
    """What the plan over the model has to know of one linear; small, whatever the linear is."""

    budget: float
    """Bits that the recipe allows for it."""
    weights: int
    choices: Choices


def plan_model(some: Iterable[Mapping[str, LinearJob]], ranks: Ranks = ALONE) -> dict[str, Recipe]:
    """Choose sparsity and mean bits for every linear.

    Args:
        some: the linears, by name, those that share an input beside each other; all, or some at a time, of which
            nothing is held when the next are asked for.
        ranks: the processes that hold the statistics; the choice is the same on all.

    Returns:
        A recipe per linear with `scope="layer"`.

    Raises:
        ValueError: the budget is below what the cheapest choice for every linear takes.
    """
    alone: dict[str, Recipe] = {}

    def noted(jobs: Mapping[str, LinearJob]) -> Mapping[str, LinearJob]:
        alone.update({name: replace(job.recipe, scope="layer", allocation="rows") for name, job in jobs.items()})
        return jobs

    offers = _offers(map(noted, some), _points, ranks)
    points = {name: offer.choices for name, offer in offers.items()}
    budget = sum(offer.budget for offer in offers.values())
    least = sum(min(point.bits for point in choices) for choices in points.values())
    weights = sum(offer.weights for offer in offers.values())
    if least > budget:
        raise ValueError(
            f"target_bits_per_weight must be at least {least / weights:.3f} for this model and these widths, "
            f"got {budget / weights:.3f}"
        )
    chosen = choose_points(
        [np.array([point.bits for point in choices]) for choices in points.values()],
        [np.array([point.loss for point in choices]) for choices in points.values()],
        budget,
    )
    return alone | {name: points[name][index].recipe for name, index in zip(points, chosen, strict=True)}


def _own(jobs: Mapping[str, LinearJob]) -> Iterator[tuple[str, LinearJob, SharedInput]]:
    """Yield the jobs of which this process holds the statistics."""
    inputs: SharedInput | None = None
    for name, job in jobs.items():
        if job.statistics is not None:
            inputs = SharedInput.of(job.statistics, inputs)
            yield name, job, inputs


@contextmanager
def _unless_it_will_be_rounded(job: LinearJob) -> Iterator[None]:
    """Leave a linear out whose Hessian cannot be inverted, where the recipe allows it: it keeps bits of its own."""
    try:
        yield
    except (HessianError, torch.linalg.LinAlgError):
        if job.recipe.on_failure == "error":
            raise


def plan_rates(some: Iterable[Mapping[str, LinearJob]], ranks: Ranks = ALONE) -> dict[str, float]:
    """Choose the true bits of every linear whose codes are entropy-coded.

    Args:
        some: as for `plan_model`.
        ranks: the processes that hold the statistics; the choice is the same on all.

    Raises:
        ValueError: the budget is below what all linears take at the least.
    """
    offers = _offers(some, _curve, ranks)
    curves = {name: offer.choices for name, offer in offers.items()}
    return rates_at_one_price(curves, sum(offer.budget for offer in offers.values())) if curves else {}


def _offers(
    some: Iterable[Mapping[str, LinearJob]], choices: Callable[[str, LinearJob, SharedInput], Choices], ranks: Ranks
) -> dict[str, _Offer[Choices]]:
    """Return what each linear is offered, in order; those that will be rounded are missing."""

    def offers_of(jobs: Mapping[str, LinearJob]) -> dict[str, _Offer[Choices]]:
        own: dict[str, _Offer[Choices]] = {}
        with ranks.outcome():
            for name, job, inputs in _own(jobs):
                with _unless_it_will_be_rounded(job):
                    own[name] = _Offer(_budget(job), job.weight.numel(), choices(name, job, inputs))
        return ranks.merge(own, list(jobs))

    return {name: offer for offers in map(offers_of, some) for name, offer in offers.items()}


def _curve(name: str, job: LinearJob, inputs: SharedInput) -> RateCurve:
    relative, mean = relative_weights(job.row_weights, job.weight), float(job.row_weights.mean())
    problem = pose_dense(LinearToSolve(job.weight, name, relative), inputs, job.recipe)
    return rate_curve(rate_problem(problem), mean, coded_size)


def _budget(job: LinearJob) -> float:
    """Return the bits that the recipe allows for one linear."""
    recipe, weights = job.recipe, job.weight.numel()
    if recipe.target_bits_per_weight is not None:
        return recipe.target_bits_per_weight * weights
    assert recipe.target_avg_bits is not None
    return _price(job, recipe, recipe.target_avg_bits, (1,))


def _price(job: LinearJob, recipe: Recipe, mean_bits: float, widths: Sequence[int]) -> float:
    """Return the true bits of a linear at a mean of so many code bits a survivor; `widths` are those in use."""
    shape = (job.weight.shape[0], job.weight.shape[1])
    return fixed_bits(recipe, shape, "output", widths) + mean_bits * count_survivors(recipe, shape)


def _points(name: str, job: LinearJob, inputs: SharedInput) -> list[_Point]:
    """Return what can be done to a linear, with its price and its loss."""
    recipe = replace(job.recipe, scope="layer", target_bits_per_weight=None, allocation="rows")
    masks = [replace(recipe, sparsity=sparsity, pattern=None) for sparsity in sorted({*SPARSITIES, recipe.zeros})]
    if recipe.pattern is not None:
        masks = [recipe, replace(recipe, sparsity=0.0, pattern=None)]
    elif not recipe.prunes:
        masks = [recipe]
    trial_bits = min(recipe.widths, key=lambda bits: abs(bits - TRIAL_BITS))
    points = []
    for masked in masks:
        trial = try_width(LinearToSolve(job.weight, name, job.row_weights), inputs, masked, trial_bits)
        errors = trial.rounding.clamp_min(0).cpu().numpy() * 4.0**trial_bits
        curve = greedy_curve(errors, trial.survivors.cpu().numpy(), recipe.widths)
        low, high = recipe.widths[0], recipe.widths[-1]
        for mean in np.linspace(low, high, (high - low) * POINTS_PER_BIT + 1).tolist():
            loss = float(trial.pruning.sum()) + curve(mean)
            bits = _price(job, masked, mean, recipe.widths)
            points.append(_Point(bits, loss, replace(masked, target_avg_bits=mean)))
    return points
