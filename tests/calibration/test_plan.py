"""One budget over linears: priced in bytes that packing then takes, and better than the same for all."""

import pytest
import torch
from models_for_tests import make_batches, make_model
from oracles import correlated_inputs, damped, random_weight, row_errors, second_moment

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.plan import LinearJob, plan_model
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.recipe import LayerRule, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"wide": (48, 64), "tall": (96, 48), "small": (32, 64), "cheap": (64, 64)}
COSTS = {"wide": 1.0, "tall": 0.05, "small": 20.0, "cheap": 1e-4}


def jobs(collect, recipe: Recipe) -> dict[str, LinearJob]:
    made = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        spread = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) + 0.1
        statistics = collect(correlated_inputs(300, shape[1], seed))
        made[name] = LinearJob(random_weight(*shape, seed), statistics, recipe, COSTS[name] * spread)
    return made


def outcome(work: dict[str, LinearJob], recipes: dict[str, Recipe]) -> tuple[float, float]:
    """True bits per weight, and the sum of row errors by their cost, in float64."""
    bits, loss = 0, 0.0
    for name, job in work.items():
        solved = compress_linear(job.weight, job.statistics, recipes[name], name, row_weights=job.row_weights)
        bits += 8 * pack_weight(solved.solution).nbytes
        hessian = damped(second_moment(correlated_inputs(300, job.weight.shape[1], list(SHAPES).index(name))))
        loss += float((row_errors(solved.weight(), job.weight, hessian) * job.row_weights).sum())
    return bits / sum(job.weight.numel() for job in work.values()), loss


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("target", [3.6, 4.0, 5.0])
def test_a_plan_is_within_its_true_bytes_and_loses_less_than_the_same_for_all(collect, target, sparsity):
    recipe = Recipe(target_bits_per_weight=target, sparsity=sparsity, scope="model")
    work = jobs(collect, recipe)
    alike = {name: Recipe(target_bits_per_weight=target, sparsity=sparsity) for name in work}
    (bits, loss), (alike_bits, alike_loss) = outcome(work, plan_model([work])), outcome(work, alike)
    assert alike_bits <= target
    assert target - 0.1 < bits <= target
    assert loss < 0.6 * alike_loss


def test_a_mean_of_code_bits_is_turned_into_the_bytes_that_it_takes(collect):
    recipe = Recipe(target_avg_bits=4.0, sparsity=0.5, scope="model")
    work = jobs(collect, recipe)
    alike = {name: Recipe(target_avg_bits=4, sparsity=0.5, allocation="uniform") for name in work}
    (bits, loss), (alike_bits, alike_loss) = outcome(work, plan_model([work])), outcome(work, alike)
    assert bits <= alike_bits
    assert loss < alike_loss


def test_what_costs_more_gets_more_bits_and_fewer_zeros(collect):
    plan = plan_model([jobs(collect, Recipe(target_bits_per_weight=4.0, scope="model"))])
    code_bits = {name: recipe.target_avg_bits * (1 - recipe.sparsity) for name, recipe in plan.items()}
    assert sorted(code_bits, key=code_bits.get) == ["cheap", "tall", "wide", "small"]
    assert {recipe.scope for recipe in plan.values()} == {"layer"}
    assert {recipe.allocation for recipe in plan.values()} == {"rows"}


def test_a_linear_may_go_without_a_mask_and_another_be_pruned(collect):
    plan = plan_model([jobs(collect, Recipe(target_bits_per_weight=3.4, scope="model"))])
    assert min(recipe.sparsity for recipe in plan.values()) == 0
    assert max(recipe.sparsity for recipe in plan.values()) >= 0.5
    assert len({recipe.target_avg_bits for recipe in plan.values()}) > 1


def test_a_pattern_is_kept_or_left_out_whole(collect):
    plan = plan_model([jobs(collect, Recipe(target_bits_per_weight=3.4, pattern="2:4", scope="model"))])
    assert {recipe.n_m for recipe in plan.values()} == {None, (2, 4)}
    assert all(recipe.prunes == (recipe.n_m is not None) for recipe in plan.values())


def test_a_dense_recipe_is_not_pruned(collect):
    plan = plan_model([jobs(collect, Recipe(target_bits_per_weight=4.0, sparsity=0.0, scope="model"))])
    assert not any(recipe.prunes for recipe in plan.values())


def test_a_wider_budget_never_loses_more(collect):
    losses = []
    for target in (3.2, 3.6, 4.0, 4.5, 5.0, 6.0):
        work = jobs(collect, Recipe(target_bits_per_weight=target, scope="model"))
        losses.append(outcome(work, plan_model([work]))[1])
    assert losses == sorted(losses, reverse=True)


def test_a_budget_below_the_cheapest_choice_is_refused_with_the_least_that_would_do(collect):
    work = jobs(collect, Recipe(target_bits_per_weight=1.0, scope="model"))
    with pytest.raises(ValueError, match=r"target_bits_per_weight must be at least ([\d.]+) .*got 1\.000") as error:
        plan_model([work])
    least = float(str(error.value).split("at least ")[1].split()[0])
    enough = jobs(collect, Recipe(target_bits_per_weight=least + 0.001, scope="model"))
    assert outcome(enough, plan_model([enough]))[0] <= least + 0.001


def test_a_linear_that_is_not_quantized_stays_out_of_the_models_budget():
    model = make_model("opt")
    recipe = Recipe(
        scope="model", target_bits_per_weight=5.0, rules=[LayerRule("*.fc1", quantize=False, sparsity=0.25)]
    )
    solved = compress(model, make_batches(4), recipe)
    for name, linear in solved.items():
        assert (linear.report.mean_bits is None) == name.endswith("fc1")
        assert not name.endswith("fc1") or linear.report.sparsity == 0.25
    quantized = [linear for name, linear in solved.items() if not name.endswith("fc1")]
    assert 8 * sum(x.packed.nbytes for x in quantized) <= 5.0 * sum(x.report.weights for x in quantized)
