"""A model of which some linears cannot be solved: an error by name, or rounded plainly and said everywhere."""

import pytest
import torch
from models_for_tests import BROKEN, make_batches, make_model, make_tokens, make_troubled

from sgpt_lightning.calibration import solving
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.fallbacks import Fallbacks
from sgpt_lightning.calibration.solving import mean_error
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core.nearest import round_plainly
from sgpt_lightning.core.solution import SolveError
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.models import linears
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import closing_line, linears_table, status_line

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ["sequential", "one-shot"]
RECIPES = {
    "gptq": {"preset": "gptq", "target_avg_bits": 4.0},
    "pruned": {"preset": "sparsegpt", "target_avg_bits": None},
    "best": {},
    "coded": {"coding": "entropy", "target_bits_per_weight": 5.0},
    "model scope": {"scope": "model", "target_bits_per_weight": 6.0},
}


CASES = [("gptq", "one-shot"), *((recipe, "sequential") for recipe in RECIPES)]


def test_the_troubled_model_computes_what_it_would():
    tokens = make_tokens(2, 10)
    assert torch.equal(make_troubled()(tokens).logits, make_model("opt")(tokens).logits)  # powers of two


@pytest.mark.parametrize(("recipe", "mode"), CASES)
def test_a_linear_that_cannot_be_solved_ends_the_run_by_name(recipe, mode):
    with pytest.raises(ValueError, match=rf"Hessian of {BROKEN} holds NaN or inf"):
        compress(make_troubled(), make_batches(2), Recipe(**RECIPES[recipe]), mode=mode)


@pytest.mark.parametrize(("recipe", "mode"), CASES)
def test_where_it_is_allowed_that_linear_alone_is_rounded_plainly_and_said_so(recipe, mode, tmp_path):
    settings = Recipe(**RECIPES[recipe], on_failure="round")
    model, dense = make_troubled(), make_troubled()
    with pytest.warns(UserWarning, match=rf"{BROKEN} is rounded plainly, since it cannot be solved: the Hessian of"):
        solved = compress(model, make_batches(2), settings, mode=mode)
    statuses = {name: linear.report.status for name, linear in solved.items()}
    assert statuses == {name: "rounded" if name == BROKEN else "ok" for name in solved}
    weight = dense.get_submodule(BROKEN).weight
    if recipe in ("gptq", "pruned"):  # whose linears have the same budget each
        expected = round_plainly(weight, settings, torch.float32, coded_size=coded_size).weight()
        assert torch.equal(model.get_submodule(BROKEN).weight, expected)
    found, weight = model.get_submodule(BROKEN).weight.double(), weight.double()
    assert float((found - weight).norm() / weight.norm()) < 0.5  # of half the weights, the small half may be gone
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float32)
    probe = make_tokens(2, 10, seed=9)
    assert torch.equal(load_compressed(tmp_path / "out")(probe).logits, model(probe).logits)
    if recipe == "coded":
        assert manifest.ledger.linear_bits_per_weight <= 5.0
    assert f"{BROKEN} (rounded plainly)" in status_line(manifest)
    assert "11 linears solved, 1 rounded plainly" in status_line(manifest)
    assert closing_line(manifest).endswith(", 1 of 12 linears rounded plainly")
    (row,) = [line for line in linears_table(manifest).splitlines() if BROKEN in line]
    assert "| rounded |" in " ".join(row.split())


@pytest.mark.parametrize(("share", "allowed"), [(0.1, False), (0.2, True), (0.0, False), (2 / 12, True)])
def test_more_than_the_set_share_fails_the_run_naming_them(share, allowed):
    model = make_troubled((0, 1))
    recipe = Recipe(preset="gptq", on_failure="round", max_rounded=share)
    names = [BROKEN.replace(".1.", ".0."), BROKEN]
    if allowed:
        with pytest.warns(UserWarning, match="rounded plainly"):
            solved = compress(model, make_batches(2), recipe)
        assert [name for name, linear in solved.items() if linear.report.status == "rounded"] == names
        return
    found = rf"{names[0]} \(the Hessian.*; {names[1]} \(" if share else rf"{names[0]} \("
    message = (
        rf"{2 if share else 1} of 12 linears cannot be solved, max_rounded={share:g} allows {int(12 * share)}.*{found}"
    )
    with pytest.warns(UserWarning, match="rounded plainly"), pytest.raises(SolveError, match=message):
        compress(model, make_batches(2), recipe)


def test_those_of_the_part_before_a_run_was_stopped_count_too():
    recipe = Recipe(preset="gptq", on_failure="round")
    with pytest.warns(UserWarning, match="rounded plainly"):
        solved = compress(make_troubled(), make_batches(2), recipe)
    later = Fallbacks(recipe, solved.keys())
    later.take_up(solved)
    assert list(later.reasons) == [BROKEN]
    with (
        pytest.warns(UserWarning, match="fc2 is rounded plainly"),
        pytest.raises(SolveError, match=rf"2 of 12 linears cannot be solved.*{BROKEN} \(before.*fc2 \(overflow\)"),
    ):
        later.add(BROKEN.replace("fc1", "fc2"), "overflow")


@pytest.mark.parametrize("mode", MODES)
def test_activations_that_are_not_finite_count_as_linears_that_cannot_be_solved(mode):
    def make():
        model = make_model("opt")
        model.model.decoder.layers[1].final_layer_norm.bias[3] = float("inf")
        return model

    recipe, names = Recipe(preset="gptq", on_failure="round", max_rounded=0.2), {BROKEN, BROKEN.replace("fc1", "fc2")}
    with pytest.raises(ValueError, match=rf"{BROKEN} received NaN or inf in calibration batch 0"):
        compress(make(), make_batches(2), Recipe(preset="gptq"), mode=mode)
    with pytest.warns(UserWarning, match="rounded plainly"):
        solved = compress(make(), make_batches(2), recipe, mode=mode)
    assert {name for name, linear in solved.items() if linear.report.status == "rounded"} == names
    with pytest.raises(ValueError, match="received NaN or inf"):  # no gradient is finite then, of any linear
        compress(make(), make_batches(2), Recipe(on_failure="round", max_rounded=1.0), mode=mode)


def test_a_solution_that_the_models_dtype_cannot_hold_is_taken_back_and_the_weight_rounded(monkeypatch):
    model, dense = make_model("opt"), make_model("opt")

    def add_to_bias(linear, shift, dtype, name):
        if name == BROKEN:  # after the weight was written
            raise SolveError(f"the bias of {name} would be inf")
        return linears.add_to_bias(linear, shift, dtype, name)

    monkeypatch.setattr(solving, "add_to_bias", add_to_bias)
    recipe = Recipe(sparsity=0.5, target_avg_bits=4.0, on_failure="round")
    with pytest.warns(UserWarning, match=rf"{BROKEN} is rounded plainly.*bias of {BROKEN} would be inf"):
        solved = compress(model, make_batches(2), recipe)
    assert [name for name, linear in solved.items() if linear.report.status == "rounded"] == [BROKEN]
    expected = round_plainly(dense.get_submodule(BROKEN).weight, recipe, torch.float32)
    assert torch.equal(model.get_submodule(BROKEN).weight, expected.weight())
    assert torch.equal(model.get_submodule(BROKEN).bias, dense.get_submodule(BROKEN).bias)


def test_the_error_of_linears_that_were_all_rounded_is_unknown_and_that_of_none_is_no_perfect_score():
    with pytest.warns(UserWarning, match="rounded plainly"):
        solved = compress(make_troubled(), make_batches(2), Recipe(preset="gptq", on_failure="round"))
    assert mean_error([solved[BROKEN]]) is None
    assert mean_error(solved.values()) == mean_error(linear for name, linear in solved.items() if name != BROKEN)
