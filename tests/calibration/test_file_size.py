"""A size for the whole weights file: met from below by the file on disk, and refused before anything is solved."""

import pytest
import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import LayerRule, Recipe
from sgpt_lightning.text.windows import calibration_windows

pytestmark = pytest.mark.usefixtures("one_thread")
GRADIENTS_OFF = {"gradients": False}


@pytest.fixture(scope="module")
def batches(two_blocks):
    drawn = calibration_windows("python-docs", load_tokenizer(str(two_blocks)), 64, 16, 0).ids
    return [{"input_ids": ids} for ids in drawn.split(8)]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_size": "2.2MB", "embedding_bits": 5},
        {"target_size": 5_200_000},
        {"target_size": "2 MiB", "embedding_bits": 5, "parts": GRADIENTS_OFF},
        {"target_size": "5900kB", "ignore": ["*.fc2"], "parts": GRADIENTS_OFF},
        {"target_size": "5.3MB", "rules": [LayerRule("*.fc2", quantize=False, sparsity=0.5)], "parts": GRADIENTS_OFF},
    ],
    ids=str,
)
def test_the_file_ends_within_a_five_hundredth_below_its_size(settings, two_blocks, batches, tmp_path):
    model = load_model(str(two_blocks))
    solved = compress(model, batches, Recipe(coding="entropy", **settings), storage_dtype=torch.float16)
    save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float16)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    size = {"2.2MB": 2_200_000, "2 MiB": 2 << 20, "5900kB": 5_900_000, "5.3MB": 5_300_000}
    limit = size.get(settings["target_size"], settings["target_size"])
    assert limit * 0.998 <= file.stat().st_size <= limit


@pytest.mark.parametrize(("family", "limit"), [("llama", 110_000), ("gpt2", 110_000), ("phi", 112_000)])
def test_a_float32_model_whose_biases_are_rounded_on_the_way_keeps_to_its_size_too(family, limit, tmp_path):
    model = make_model(family, hidden_size=64, n_embd=64)
    recipe = Recipe(coding="entropy", target_size=limit, parts=GRADIENTS_OFF)
    solved = compress(model, make_batches(2), recipe, storage_dtype=torch.float16)
    ledger = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float16).ledger
    # Headers of some bytes a tensor weigh much beside matrices of some thousand weights, and so do their tables.
    assert limit * 0.97 <= ledger.file <= limit


@pytest.mark.parametrize(("size", "got"), [("40kB", "40,000"), ("3MB", "3,000,000")])
def test_a_size_that_cannot_be_met_is_refused_with_both_numbers_and_the_model_stays(size, got):
    model = make_model("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(coding="entropy", target_size=size)
    with pytest.raises(
        ValueError, match=rf"target_size must be from [\d,]+ to [\d,]+ bytes.*take [\d,]+ bytes, got {got}$"
    ):
        compress(model, make_batches(2), recipe, storage_dtype=torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rules_that_leave_nothing_to_code_are_refused():
    recipe = Recipe(coding="entropy", target_size="1MB", rules=[LayerRule("*", quantize=False, sparsity=0.5)])
    with pytest.raises(ValueError, match="target_size needs linears that are entropy-coded"):
        compress(make_model("opt"), make_batches(2), recipe)
