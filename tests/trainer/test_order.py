"""What happens when during a fit: what validates, what state the network is in, what is let go of."""

import copy
import gc

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from models_for_tests import make_model
from runs_for_tests import make_loader, make_trainer
from torch import Tensor

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNE = Recipe(preset="sparsegpt", target_avg_bits=None)


class Diary(Callback):
    """Writes down which loops ran, and which blocks had zeros in them when a validation began."""

    def __init__(self):
        self.events, self.compressed = [], []

    def on_sanity_check_start(self, *args):
        self.events.append("sanity")

    def on_validation_start(self, trainer, pl_module):
        self.events.append("validation")
        blocks = pl_module.network.model.decoder.layers
        self.compressed.append(sum(bool((block.fc1.weight == 0).any()) for block in blocks))

    def on_train_epoch_start(self, *args):
        self.events.append("epoch")


@pytest.mark.parametrize(
    "settings", [{}, {"val_check_interval": 1}, {"num_sanity_val_steps": -1}, {"max_epochs": 7}], ids=str
)
def test_a_fit_validates_the_dense_model_and_the_finished_one_and_nothing_between(settings, tmp_path):
    diary, network = Diary(), make_model("opt", num_hidden_layers=3)
    fit = make_trainer(tmp_path, SparseGPTCallback(PRUNE), diary, **settings)
    fit.fit(CausalLMModule.from_model(network), make_loader(), make_loader(seed=1))
    assert diary.events == ["validation", "epoch", "epoch", "epoch", "validation"]
    assert diary.compressed == [0, 3]


def test_validation_between_blocks_sees_every_block_that_is_solved_and_none_that_is_not(tmp_path):
    diary, network = Diary(), make_model("opt", num_hidden_layers=3)
    fit = make_trainer(tmp_path, SparseGPTCallback(PRUNE, validate_every_block=True), diary)
    fit.fit(CausalLMModule.from_model(network), make_loader(), make_loader(seed=1))
    assert diary.events == ["validation", *["epoch", "validation"] * 3]
    assert diary.compressed == [0, 1, 2, 3]


@pytest.mark.parametrize("calibration", ["sequential", "one-shot"])
def test_a_fit_gives_the_weights_of_compress_in_eval_mode_although_the_model_has_dropout(calibration, tmp_path):
    """The same operations on the same batches: equal bits. Validation text or dropout in the Hessians would show."""
    network = make_model("opt", dropout=0.5, attention_dropout=0.5)
    expected = copy.deepcopy(network)
    compress(expected, list(make_loader()), Recipe(), mode=calibration)
    callback = SparseGPTCallback(calibration=calibration, validate_every_block=True)
    module = CausalLMModule.from_model(network)
    module.train()
    make_trainer(tmp_path, callback).fit(module, make_loader(), make_loader(seed=1))
    assert not any(part.training for part in network.modules())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_strategies_that_cut_the_model_up_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    callback, module = SparseGPTCallback(), CausalLMModule()
    trainer = make_trainer(tmp_path, callback)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match=r"strategy must be ddp.*got FSDPStrategy"):
        callback.setup(trainer, module, "fit")
    assert module.network is None


HIDDEN, FFN, BATCH, TIME = 24, 40, 3, 22
"""Sizes that tell hidden states and Hessians from weights: no parameter is [3, 22, 24], [40, 40] or [66, 24]."""


def alive(*shape: int) -> int:
    """How many floating-point tensors of a shape somebody still holds."""
    gc.collect()
    return sum(type(one) is Tensor and one.shape == shape and one.is_floating_point() for one in gc.get_objects())


class Census(Callback):
    """Counts hidden states when the finished model is about to be measured."""

    def __init__(self):
        self.states = []

    def on_validation_start(self, trainer: Trainer, *args):
        self.states.append(alive(BATCH, TIME, HIDDEN))


def fit_small_sizes(tmp_path, recipe, calibration, *callbacks):
    network = make_model("opt", hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=FFN)
    callback, module = SparseGPTCallback(recipe, calibration), CausalLMModule.from_model(network)
    fit = make_trainer(tmp_path, callback, *callbacks)
    fit.fit(module, make_loader(12, TIME, BATCH), make_loader(8, TIME, 4, seed=1))
    return fit, callback, module


@pytest.mark.parametrize("recipe", [Recipe(), PRUNE], ids=["best", "sparsegpt"])
def test_hidden_states_are_gone_before_the_finished_model_is_measured(recipe, tmp_path):
    census = Census()
    held = fit_small_sizes(tmp_path, recipe, "sequential", census)
    assert census.states == [0, 0]
    del held


@pytest.mark.parametrize("calibration", ["sequential", "one-shot"])
def test_after_a_fit_neither_hidden_states_nor_hessians_are_held(calibration, tmp_path):
    held = fit_small_sizes(tmp_path, Recipe(), calibration)
    assert alive(BATCH, TIME, HIDDEN) == 0
    assert alive(FFN, FFN) == 0
    del held


@pytest.mark.parametrize("calibration", ["sequential", "one-shot"])
def test_after_a_failed_fit_neither_hidden_states_nor_hessians_are_held(calibration, tmp_path):
    network = make_model("opt", hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=FFN)
    network.model.decoder.layers[1].final_layer_norm.weight[0] = float("nan")
    callback, module = SparseGPTCallback(PRUNE, calibration), CausalLMModule.from_model(network)
    fit = make_trainer(tmp_path, callback)
    with pytest.raises(ValueError, match="received NaN"):
        fit.fit(module, make_loader(12, TIME, BATCH), make_loader(8, TIME, 4, seed=1))
    assert alive(BATCH, TIME, HIDDEN) == 0
    assert alive(FFN, FFN) == 0
    assert not any(part.training for part in network.modules())
