"""What a calibration hands over to be stored is proved to hold the weights that the model computes with."""

import dataclasses

import pytest
import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration import solving
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.core.solution import Coded
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {
    "coded": Recipe(coding="entropy", target_bits_per_weight=7.0),
    "fixed": Recipe(preset="sparsegpt", sparsity=0.0, target_avg_bits=4.0),
}


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_what_is_stored_unpacks_to_the_models_weights(family, recipe, mode):
    model = make_model(family)
    solved = compress(model, make_batches(1), recipe, storage_dtype=torch.float16, mode=mode)
    assert len(solved) > 3
    for name, linear in solved.items():
        assert torch.equal(unpack_weight(linear.packed), weight_matrix(model.get_submodule(name))), name


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_one_wrong_code_among_those_stored_ends_the_run_with_the_linears_name(recipe, mode, monkeypatch):
    packed = 0

    def pack_wrongly(solution):
        nonlocal packed
        packed += 1
        if packed == 5:
            codes = solution.codes.clone()
            codes[3, 4] += 1 if isinstance(solution, Coded) or codes[3, 4] == 0 else -1
            solution = dataclasses.replace(solution, codes=codes)
        return pack_weight(solution)

    monkeypatch.setattr(solving, "pack_weight", pack_wrongly)
    model = make_model("opt")
    named = r"what is stored of model\.decoder\.layers\.0\.fc1 does not unpack to the weights that it was solved to"
    with pytest.raises(RuntimeError, match=named):
        compress(model, make_batches(1), recipe, storage_dtype=torch.float16, mode=mode)
