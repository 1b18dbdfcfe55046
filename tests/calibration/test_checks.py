import shutil
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_batches, make_model
from runs_for_tests import make_loader, make_trainer
from torch import nn

from sgpt_lightning.calibration.checks import least_bytes, plan_linears
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import add_to_bias, set_weight_matrix
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNED = Recipe(preset="sparsegpt", target_avg_bits=None)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda: iter(make_batches(2)), TypeError, "must be a list or a loader, got a list_iterator"),
        (lambda: (batch for batch in make_batches(2)), TypeError, "got a generator"),
        (lambda: [torch.zeros(1, 4)], TypeError, "batch 0 must be a mapping with `input_ids`, got Tensor"),
        (lambda: [*make_batches(1), {"labels": torch.zeros(1, 4)}], TypeError, "batch 1 must be a mapping"),
        (lambda: [{"input_ids": torch.zeros(4, dtype=torch.long)}], ValueError, r"batch 0 must be \[batch, time\]"),
        (lambda: make_batches(1, time=65), ValueError, "windows of 65 tokens, the model has 64 positions"),
        (lambda: [], ValueError, "at least one batch"),
        (lambda: [{"input_ids": torch.zeros(1, 4)}], TypeError, r"batch 0 must be integers, got torch\.float32"),
        (lambda: [{"input_ids": torch.full((1, 4), 128)}], ValueError, "below the vocabulary's 128, got 128 to 128"),
        (lambda: [{"input_ids": torch.full((1, 4), -1)}], ValueError, "got -1 to -1"),
    ],
)
def test_batches_that_cannot_be_used_are_refused_and_the_model_stays_as_it_was(batches, error, message):
    model = make_model("opt")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message):
        compress(model, batches(), PRUNED)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    compress(model, make_batches(1), PRUNED)  # and it was not marked


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
@pytest.mark.parametrize("preset", ["best", "sparsegpt"])
def test_dropout_is_off_while_a_model_in_train_mode_is_compressed(mode, preset):
    models = [make_model("opt", dropout=0.5, attention_dropout=0.5) for _ in range(2)]
    models[1].train()
    for model in models:
        compress(model, make_batches(3), Recipe(preset=preset), mode=mode)
    assert models[1].training
    expected = models[0].state_dict()
    assert all(torch.equal(expected[name], value) for name, value in models[1].state_dict().items())


@pytest.mark.parametrize("second", [1, 3])
@pytest.mark.parametrize("recipe", [PRUNED, Recipe()], ids=["sparsegpt", "best"])
def test_an_epoch_with_other_batches_than_the_first_is_refused(second, recipe):
    calibration = calibration_for("sequential", make_model("opt"), recipe, torch.float32)
    for index, batch in enumerate(make_batches(2)):
        calibration.observe(0, index, batch)
    calibration.finish(0)

    def go_on():
        for index, batch in enumerate(make_batches(second)):
            calibration.observe(1, index, batch)
        calibration.finish(1)

    with pytest.raises(ValueError, match=rf"epoch 1 has {second} batches or more, the first had 2"):
        go_on()


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))


class Tower(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(layers))


class SeeingModel(nn.Module):
    """A vision tower with more layers than the language model."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = Tower(5), Tower(2)

    def get_decoder(self):
        return self.text


def test_experts_in_a_list_are_not_taken_for_decoder_blocks():
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(experts=6) for _ in range(2))
    with pytest.raises(ValueError, match=r"mixtures of experts.*layers\.0\.experts, layers\.1\.experts"):
        find_decoder_blocks(model)


def test_the_blocks_are_those_of_the_language_model():
    assert find_decoder_blocks(SeeingModel()).names == ["text.layers.0", "text.layers.1"]


def test_blocks_of_several_classes_are_named_as_such():
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(0), Tower(1)])
    with pytest.raises(ValueError, match="layers holds blocks of several classes"):
        find_decoder_blocks(model)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"target_avg_bits": 4}, 0.6),  # ranges weigh much at 32 columns
        ({"target_bits_per_weight": 6}, 0.8),
        ({"target_avg_bits": None}, 0.8),
        ({"preset": "gptq", "ignore": ["*.fc1"]}, 0.8),
        ({"scope": "model", "target_bits_per_weight": 6}, 0.5),
    ],
    ids=str,
)
def test_the_predicted_bytes_are_a_lower_bound_and_not_far_below(settings, share, tmp_path):
    model, recipe = make_model("opt").half().float(), Recipe(**settings)
    predicted = least_bytes(model, plan_linears(model, recipe, torch.float16), torch.float16)
    solved = compress(model, make_batches(3), recipe, storage_dtype=torch.float16)
    ledger = save_compressed(tmp_path / "model", model, solved, storage_dtype=torch.float16).ledger
    stored = ledger.file - ledger.headers
    assert share * stored <= predicted <= stored


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_a_disk_that_is_too_small_is_named_before_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    dense = make_model("opt")
    before = [parameter.clone() for parameter in dense.parameters()]
    callback = SparseGPTCallback(PRUNED, save_dir=str(tmp_path / "out"))
    with pytest.raises(OSError, match=r"out needs [\d,]+ bytes, 1,000 are free"):
        make_trainer(tmp_path, callback).fit(CausalLMModule.from_model(dense), make_loader())
    assert all(torch.equal(*pair) for pair in zip(before, dense.parameters(), strict=True))
    assert not (tmp_path / "out").exists()


def test_what_the_models_dtype_cannot_hold_is_refused_by_name_and_not_written():
    linear = nn.Linear(4, 3).half()
    weight, bias = linear.weight.clone(), linear.bias.clone()
    with pytest.raises(ValueError, match=r"layers\.7\.fc1 was solved to weights that torch\.float16 cannot hold"):
        set_weight_matrix(linear, torch.full((3, 4), 1e5), "layers.7.fc1")
    with pytest.raises(ValueError, match=r"bias of layers\.7\.fc1 would be inf"):
        add_to_bias(linear, torch.full((3,), 1e5), torch.float16, "layers.7.fc1")
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)
