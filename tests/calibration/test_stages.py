"""The stages of a calibration say what is solved when."""

import pytest
import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.recipe import LayerRule, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
BEST, PUBLISHED = Recipe(), Recipe(preset="sparsegpt", rules=[LayerRule("*.fc2", sparsity=0)], target_avg_bits=None)
Q_K_V = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("recipe", [BEST, PUBLISHED], ids=["best", "sparsegpt"])
def test_a_stage_lists_the_linears_that_are_solved_at_its_end(recipe, mode):
    calibration = calibration_for(mode, make_model("opt"), recipe, torch.float32)
    planned, solved = [set(stage.linears) for stage in calibration.stages], []
    for epoch in range(len(planned)):
        for index, batch in enumerate(make_batches(2)):
            calibration.observe(epoch, index, batch)
        solved.append(calibration.finish(epoch))
        assert sorted(solved[-1]) == sorted(calibration.stages[epoch].linears)
    assert [set(found) for found in solved] == planned
    assert calibration.stages[-1].blocks == 2
    names = [name for found in solved for name in found]
    assert len(names) == len(set(names)) == (12 if recipe is BEST else 10)  # 6 linears in each of 2 blocks


@pytest.mark.parametrize(
    ("recipe", "groups"),
    [(BEST, [Q_K_V, ["self_attn.out_proj"], ["fc1"], ["fc2"]]), (PUBLISHED, [[*Q_K_V, "self_attn.out_proj", "fc1"]])],
    ids=["true_sequential", "all at once"],
)
def test_the_groups_of_a_block_are_known_once_its_first_batch_has_run(recipe, groups):
    calibration = calibration_for("sequential", make_model("opt"), recipe, torch.float32)
    first = len(calibration.stages) - 2  # gradients come before
    for epoch in range(first + 1):
        for index, batch in enumerate(make_batches(2)):
            calibration.observe(epoch, index, batch)
        if epoch < first:
            assert calibration.stages[epoch] == ("gradients of the dense model", 0, ())
            calibration.finish(epoch)
    own, following = calibration.stages[first], calibration.stages[first + 1]
    found = [sorted(name.removeprefix("model.decoder.layers.0.") for name in group) for group in own.groups]
    assert found == [sorted(group) for group in groups]
    assert len(following.groups) == 1  # not run yet
    assert (own.label, following.label) == ("block 1 of 2", "block 2 of 2")
