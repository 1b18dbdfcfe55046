"""A run that was stopped goes on from its checkpoint, and ends in the files of one that was not."""

import json

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models_for_tests import make_model
from runs_for_tests import make_loader, make_trainer

from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.setup import IncompleteRunError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer"),
]
PRUNED = Recipe(preset="sparsegpt", target_avg_bits=None)
BEST = Recipe(sparsity=0.5, target_avg_bits=4.0)
MODEL_SCOPE = Recipe(scope="model", target_bits_per_weight=3.5, sparsity=0.5)
CODED = Recipe(coding="entropy", target_bits_per_weight=4.0, embedding_bits=5.0)
SIZED = Recipe(coding="entropy", target_size=40_000, embedding_bits=5.0)
LAYERS = 3


class StopAfter(Callback):
    """Ends the run after so many epochs, as `max_time` does."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def module(seed=0, **settings):
    return CausalLMModule.from_model(make_model("opt", seed=seed, num_hidden_layers=LAYERS, **settings))


def fit(root, recipe, *callbacks, mode="sequential", model=None, loaders=None, **settings):
    """Run a fit that keeps its last state under `root`; return the callback."""
    callback = SparseGPTCallback(recipe, mode, save_dir=str(root / "model"))
    kept = [LastCheckpoint()] if not any(isinstance(c, ModelCheckpoint) for c in callbacks) else []
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make_trainer(root, callback, *callbacks, *kept, enable_checkpointing=True, **settings)
    trainer.fit(model or module(), *(loaders or (make_loader(), make_loader(seed=1))), ckpt_path=ckpt_path)
    return callback


def written(root):
    """What a run wrote: bytes by name, of the manifest what does not tell the time."""
    files = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    manifest = json.loads(files.pop("sgpt_manifest.json"))
    del manifest["run"]["seconds"], manifest["sha256"]
    return files, manifest


RUNS = {
    "best": (BEST, "sequential"),
    "model-scope": (MODEL_SCOPE, "sequential"),
    "coded": (CODED, "sequential"),
    "sized": (SIZED, "sequential"),
    "one-shot": (BEST, "one-shot"),
    "one-shot-coded": (CODED, "one-shot"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each recipe's run writes when nothing stops it, made when it is first asked for."""
    done = {}

    def of(name):
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            recipe, mode = RUNS[name]
            fit(root, recipe, mode=mode)
            done[name] = written(root)
        return done[name]

    return of


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("best", 2), ("model-scope", 2), ("coded", 1), ("coded", 3), ("sized", 2), ("one-shot", 1), ("one-shot-coded", 1)],
)
def test_a_run_that_was_stopped_between_two_epochs_ends_in_the_same_files(whole, tmp_path, name, epochs):
    recipe, mode = RUNS[name]
    with pytest.raises(IncompleteRunError):
        fit(tmp_path, recipe, StopAfter(epochs), mode=mode)
    assert not (tmp_path / "model").exists()
    resumed = fit(tmp_path, recipe, mode=mode, ckpt_path="last")
    assert written(tmp_path) == whole(name)
    assert resumed.manifest is not None
