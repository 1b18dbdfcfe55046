"""What linears that receive one input share: the same result as alone, and nothing computed twice."""

import pytest
import torch
from models_for_tests import make_batches, make_model
from oracles import correlated_inputs, random_weight
from torch.utils._python_dispatch import TorchDispatchMode

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solver import LinearToSolve, compress_linear, compress_linears
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Decompositions(TorchDispatchMode):
    """Counts Cholesky factorizations and eigendecompositions."""

    def __init__(self):
        super().__init__()
        self.found = {"linalg_cholesky_ex": 0, "_linalg_eigh": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.found:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def statistics(dense=None):
    seen = InputStatistics(24)
    seen.add(correlated_inputs(200, 24), dense)
    return seen


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("preset", ["best", "sparsegpt"])
def test_a_linear_is_solved_the_same_beside_others_as_alone(preset, has_bias):
    seen = statistics(correlated_inputs(200, 24) * 1.1)
    shared, recipe = SharedInput(seen), Recipe(preset=preset, target_avg_bits=3)
    for seed in range(3):
        weight = random_weight(8, 24, seed)
        together = compress_linear(weight, shared, recipe, has_bias=has_bias)
        alone = compress_linear(weight, seen, recipe, has_bias=has_bias)
        assert torch.equal(together.weight(), alone.weight())
        assert together.relative_error == alone.relative_error


@pytest.mark.parametrize(
    ("preset", "factors"),
    [("sparsegpt", 1), ("best", 2 + 6)],  # `best` factors the Hessian in act order too, and with each of six penalties
)
def test_three_linears_of_one_input_take_the_decompositions_of_one(preset, factors):
    linears = [LinearToSolve(random_weight(8, 24, seed)) for seed in range(3)]
    with Decompositions() as decompositions:
        compress_linears(linears, SharedInput(statistics()), Recipe(preset=preset), has_bias=True)
    assert decompositions.found == {"linalg_cholesky_ex": factors, "_linalg_eigh": 0}


@pytest.mark.parametrize(("family", "inputs"), [("opt", 4), ("llama", 4), ("gpt2", 4)])
@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
def test_a_block_is_factored_once_for_each_distinct_input(family, inputs, mode):
    model = make_model(family)
    with Decompositions() as decompositions:
        compress(model, make_batches(4), Recipe(preset="sparsegpt", target_avg_bits=None), mode=mode)
    assert decompositions.found["linalg_cholesky_ex"] == 2 * inputs  # of two blocks; OPT has six linears in each


def test_each_way_to_centre_and_damp_has_a_problem_of_its_own():
    shared = SharedInput(statistics())
    plain = shared.problem(centred=False, damp_percent=0.01)
    assert shared.problem(centred=False, damp_percent=0.01) is plain
    centred = shared.problem(centred=True, damp_percent=0.01)
    more = shared.problem(centred=False, damp_percent=0.1)
    assert not torch.equal(centred.hessian, plain.hessian)
    assert (more.damped.diagonal() > plain.damped.diagonal()).all()
