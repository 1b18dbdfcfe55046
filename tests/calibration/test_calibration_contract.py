"""What calibration refuses, and what it leaves as it was."""

import copy

import pytest
import torch
from models_for_tests import make_batches, make_model
from torch import nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import LayerRule, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ["sequential", "one-shot"]
RECIPE = Recipe(sparsity=0.5, target_avg_bits=4.0)


def is_untouched(model: nn.Module) -> bool:
    """Tell whether no hook and no replaced forward is left anywhere."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_raise_naming_linear_and_batch(value, mode):
    model = make_model("gpt2")
    model.transformer.h[1].ln_2.bias[3] = value  # what mlp.c_fc of the second block receives
    with pytest.raises(ValueError, match=r"^transformer\.h\.1\.mlp\.c_fc received NaN or inf in calibration batch 0$"):
        compress(model, make_batches(2), RECIPE, mode=mode)
    assert is_untouched(model)


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_with_the_nan_is_the_one_that_is_named(mode):
    model = make_model("llama")
    model.model.embed_tokens.weight[7] = float("nan")
    batches = make_batches(3)
    for index, batch in enumerate(batches):
        batch["input_ids"][batch["input_ids"] == 7] = 8
        if index == 2:
            batch["input_ids"][1, 3] = 7
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj received NaN or inf in calibration batch 2"):
        compress(model, batches, RECIPE, mode=mode)
    assert is_untouched(model)


@pytest.mark.parametrize("mode", MODES)
def test_no_hook_is_left_behind(mode):
    model = make_model("opt")
    compress(model, make_batches(2), RECIPE, mode=mode)
    assert is_untouched(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "phi"])
def test_only_the_weights_of_linears_in_blocks_change(family, mode):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    solved = compress(model, make_batches(2), RECIPE, mode=mode)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    biases = {f"{name}.bias" for name in solved if f"{name}.bias" in before}
    assert changed == {f"{name}.weight" for name in solved} | biases
    assert set(solved) == set(find_decoder_blocks(model).linears())


@pytest.mark.parametrize(
    ("recipe", "offenders"),
    [
        (Recipe(ignore=["*.fc9", "lm_head"], rules=[LayerRule("*.nope")]), ["*.fc9", "lm_head", "*.nope"]),
        (Recipe(pattern="3:5", ignore=["*.nope"]), ["*.nope", "0.self_attn.k_proj", "0.fc1", "and 5 more"]),
        (Recipe(sparsity=0, target_avg_bits=None), ["leaves every linear alone"]),
        (Recipe(ignore=["*"]), ["leaves every linear alone"]),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_recipe_that_does_not_fit_is_refused_before_any_batch_with_all_offenders(recipe, offenders, mode):
    with pytest.raises(ValueError, match="the recipe does not fit the model") as error:
        calibration_for(mode, make_model("opt"), recipe, torch.float32)
    assert [offender for offender in offenders if offender not in str(error.value)] == []


def test_an_already_quantized_model_is_refused():
    model = make_model("opt")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match=r"already quantized.*gptq"):
        compress(model, make_batches(1), RECIPE)
    integers = make_model("opt")
    codes = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
    integers.model.decoder.layers[1].fc1.weight = codes
    with pytest.raises(ValueError, match=r"already quantized.*layers\.1\.fc1"):
        compress(integers, make_batches(1), RECIPE)


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_that_never_runs_is_named(mode):
    model = make_model("llama")
    for block in model.model.layers:
        block.adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.adapter saw no token"):
        compress(model, make_batches(1), RECIPE, mode=mode)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="calibration must be one of sequential, one-shot, got 'greedy'"):
        compress(make_model("opt"), make_batches(1), RECIPE, mode="greedy")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", [True, False])
def test_global_state_is_as_it_was(grad, mode):
    model = make_model("opt")
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.set_grad_enabled(grad):
        compress(model, make_batches(2), RECIPE, mode=mode)
        assert torch.is_grad_enabled() == grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert not any(module.training for module in model.modules())
