"""Coded embeddings and a size of the file in a fit: what is measured before, and what is left if it fails."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from models_for_tests import make_model
from runs_for_tests import make_dense_directory, make_loader, make_trainer, weight_file

from sgpt_lightning.calibration.sequential import SequentialCalibration
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.models.blocks import is_marked_compressed
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.setup import IncompleteRunError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(preset="sparsegpt", target_avg_bits=3, embedding_bits=6)
TABLES = ["model.decoder.embed_tokens", "model.decoder.embed_positions"]


def test_a_fit_measures_the_dense_model_first_and_writes_the_tables_and_the_size_that_were_asked_for(tmp_path):
    dense = str(make_dense_directory(tmp_path / "dense"))
    module, data = CausalLMModule(dense, seq_len=32), TextDataModule(seq_len=32, num_samples=12, eval_windows=4)
    callback = SparseGPTCallback(Recipe(coding="entropy", target_size="228kB", embedding_bits=6))
    fit = make_trainer(tmp_path, callback)
    random_state = torch.get_rng_state()
    fit.fit(module, data)
    assert torch.equal(random_state, torch.get_rng_state()), "the user's generator moved"
    windows = torch.stack([batch["input_ids"] for batch in data.val_dataloader()[0].dataset])
    before = CausalLMModule(dense, seq_len=32)
    before.configure_model()
    report = json.loads((callback.target(fit).parent / "report.json").read_text())
    assert report["perplexity"]["dense"]["python-docs"] == pytest.approx(evaluate(before.network, windows, 4), rel=1e-6)
    assert [table["name"] for table in report["embeddings"]] == TABLES
    assert {linear["name"] for linear in report["linears"]}.isdisjoint(TABLES)
    # A vocabulary of 8,192 on 32 channels leaves the linears a tenth of the file, in headers and tables for the most.
    assert 228_000 * 0.995 <= weight_file(callback.target(fit)).stat().st_size <= 228_000
    loaded = load_compressed(callback.target(fit))
    state = module.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def fit_that_ends(network, root, error):
    """Fit, and raise at the end of the first epoch, before anything is solved."""
    callback = SparseGPTCallback(RECIPE, save_dir=str(root / "out"))
    with pytest.raises(type(error), match=str(error)):
        make_trainer(root, callback).fit(CausalLMModule.from_model(network), make_loader())


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_a_fit_that_fails_before_the_first_block_leaves_a_dense_model(tmp_path, monkeypatch):
    network = make_model("opt")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    held = []

    def fail(calibration, epoch):
        held.append(torch.equal(network.get_input_embeddings().weight, before["lm_head.weight"]))
        raise ValueError("the disk is on fire")

    monkeypatch.setattr(SequentialCalibration, "finish", fail)
    fit_that_ends(network, tmp_path, ValueError("the disk is on fire"))
    assert held == [True]  # tables are written last
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not is_marked_compressed(network)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    callback = SparseGPTCallback(RECIPE, save_dir=str(tmp_path / "out"))
    make_trainer(tmp_path, callback).fit(CausalLMModule.from_model(network), make_loader())
    assert list(callback.manifest.embeddings) == TABLES


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_a_fit_that_is_stopped_early_leaves_the_tables_dense(tmp_path):
    network = make_model("opt")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    class Stopping(SparseGPTCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.fit_loop.max_epochs = 0
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = 1

    with pytest.raises(IncompleteRunError, match=r"0 linears solved, and nothing was written"):
        make_trainer(tmp_path, Stopping(RECIPE, save_dir=str(tmp_path / "out"))).fit(
            CausalLMModule.from_model(network), make_loader()
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_a_batch_that_cannot_be_used_is_refused_and_the_tables_stay(tmp_path):
    network = make_model("opt", vocab_size=64)
    before = network.get_input_embeddings().weight.clone()
    fit_that_ends(network, tmp_path, ValueError("calibration batch 0 must be below the vocabulary's 64"))
    assert torch.equal(network.get_input_embeddings().weight, before)


def test_a_config_and_the_command_line_ask_for_both(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {path: opt-mini}\nsgpt: {recipe: {coding: entropy, target_size: 4.5MB, embedding_bits: 5}}\n"
    )
    command = [sys.executable, "-m", "sgpt_lightning", "fit", "--config", str(tmp_path / "run.yaml"), "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    recipe = yaml.safe_load(done.stdout)["sgpt"]["recipe"]
    assert (recipe["target_size"], recipe["embedding_bits"]) == ("4.5MB", 5.0)
    command[-1:] = ["--sgpt.recipe.target_size", "5.5mb"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "unit of target_size must be one of B, kB, MB" in done.stderr
