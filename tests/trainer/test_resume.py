"""A run that was stopped goes on from its checkpoint, and ends in the files of one that was not."""

import contextlib
import csv
import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from models_for_tests import make_model, make_padded_batches
from readme_runs import ROOT, SIZES, blocks, cut_down, run_main
from runs_for_tests import make_loader, make_trainer
from torch.utils.data import DataLoader

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.models.identity import config_digest, weights_digest
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.checkpoint_io import WholeCheckpointIO
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.setup import IncompleteRunError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer"),
]
PRUNED = Recipe(preset="sparsegpt", target_avg_bits=None)
BEST = Recipe(sparsity=0.5, target_avg_bits=4.0)
MODEL_SCOPE = Recipe(scope="model", target_bits_per_weight=4.0, sparsity=0.5, ignore=["*attn*"])
SIZED = Recipe(coding="entropy", target_size=40_000, embedding_bits=5.0)
LAYERS = 3


class Stop(Callback):
    """Ends the run after so many epochs and batches of the next, as `max_time` does."""

    def __init__(self, epochs, batches=0):
        self.epochs, self.batches = epochs, batches

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.batches and trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epochs and batch_idx + 1 == self.batches:
            trainer.should_stop = True


class FirstEpoch(Callback):
    """Notes where a fit begins, and what it measures."""

    def __init__(self):
        self.epoch, self.step, self.measured = None, None, []

    def on_train_epoch_start(self, trainer, pl_module):
        if self.epoch is None:
            self.epoch, self.step = trainer.current_epoch, trainer.global_step

    def on_validation_start(self, trainer, pl_module):
        self.measured.append(pl_module.measured_state)


def module(seed=0, **settings):
    return CausalLMModule.from_model(make_model("opt", seed=seed, num_hidden_layers=LAYERS, **settings))


def fit(root, recipe, *callbacks, mode="sequential", model=None, calibrates=None, **settings):
    """Run a fit that keeps its last state under `root`; return its callback."""
    callback = SparseGPTCallback(recipe, mode, save_dir=str(root / "model"))
    kept = [] if any(isinstance(other, ModelCheckpoint) for other in callbacks) else [LastCheckpoint()]
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make_trainer(root, callback, *callbacks, *kept, enable_checkpointing=True, **settings)
    trainer.fit(model or module(), calibrates or make_loader(), make_loader(seed=1), ckpt_path=ckpt_path)
    return callback


def stop(root, recipe, *callbacks, epochs=1, batches=0, **settings):
    """Run a fit that is ended early; return what it raised."""
    with pytest.raises(IncompleteRunError) as raised:
        fit(root, recipe, Stop(epochs, batches), *callbacks, **settings)
    return raised.value


def written(root):
    """What a run wrote: bytes by name, of the manifest what does not tell the time."""
    files = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    manifest = json.loads(files.pop("sgpt_manifest.json"))
    del manifest["run"]["seconds"], manifest["sha256"]
    return files, manifest


# ------------------------------------------------------------------------------------------------------- the same files


@pytest.mark.parametrize(
    ("recipe", "mode", "epochs", "batches"),
    [
        (BEST, "sequential", 1 + 2, 1),  # an epoch of gradients comes first
        (MODEL_SCOPE, "sequential", 1 + 1, 0),
        (SIZED, "sequential", 1 + 2, 1),
        (BEST, "one-shot", 1, 0),
        (MODEL_SCOPE, "one-shot", 1 + 1, 0),
    ],
    ids=["two streams", "plan of the model", "size of the file", "one-shot", "one-shot, block 2"],
)
def test_a_run_that_was_stopped_ends_in_the_files_of_one_that_was_not(tmp_path, recipe, mode, epochs, batches):
    whole, parts, seen = tmp_path / "whole", tmp_path / "parts", FirstEpoch()
    padded = DataLoader(make_padded_batches(3), batch_size=None)
    fit(whole, recipe, mode=mode, calibrates=padded)
    stop(parts, recipe, epochs=epochs, batches=batches, mode=mode, calibrates=padded)
    assert not (parts / "model").exists()
    fit(parts, recipe, seen, mode=mode, calibrates=padded, ckpt_path="last")
    assert written(parts) == written(whole)
    assert (seen.epoch, seen.step) == (epochs, 3 * epochs)
    assert seen.measured == ["compressed"]  # the dense model is not measured twice


def test_a_real_process_that_is_killed_anywhere_goes_on_to_the_same_bytes():
    """While calibrating, solving, writing a checkpoint, writing the model, replacing it, and at random."""
    command = [sys.executable, str(ROOT / "scripts/kill_and_resume.py"), "--kills", "1", "--runs", "coded"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = [cell.strip() for cell in done.stdout.splitlines()[2].split("|")[1:-1]]
    assert (row[0], row[1], row[-1]) == ("coded", "6", "0")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_lightnings_own_checkpoint_keeps_every_block_and_goes_on_too(tmp_path):
    own = tmp_path / "own"
    stop(tmp_path, PRUNED, ModelCheckpoint(own, "block", save_last=True), epochs=2)
    fit(tmp_path, PRUNED, ModelCheckpoint(own, "block", save_last=True), ckpt_path="last")
    fit(tmp_path / "whole", PRUNED)
    assert written(tmp_path) == written(tmp_path / "whole")


def test_the_logs_of_a_run_that_goes_on_are_those_of_the_whole_run(tmp_path):
    def log(root, *others, **settings):
        logger = CSVLogger(root, name=None)
        callback = SparseGPTCallback(PRUNED, save_dir=str(root / "model"), validate_every_block=True)
        callbacks = [callback, LastCheckpoint(), *others]
        trainer = make_trainer(root, *callbacks, logger=logger, enable_checkpointing=True)
        with contextlib.suppress(IncompleteRunError):
            trainer.fit(module(), make_loader(), make_loader(seed=1), **settings)
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
        return [(int(row["step"]), name, row[name]) for row in rows for name in row if row[name] and name != "step"]

    whole, begun = log(tmp_path / "whole"), log(tmp_path / "parts", Stop(2))
    went_on = log(tmp_path / "parts", ckpt_path="last")
    assert len(begun) < len(whole)
    assert sorted(went_on) == sorted(whole)


def test_a_run_that_was_stopped_before_its_first_block_ended_begins_anew(tmp_path):
    error = stop(tmp_path, PRUNED, epochs=0, batches=1)
    assert "0 of 3 epochs" in str(error)
    assert not hasattr(error, "__notes__")
    assert not (tmp_path / "checkpoints").exists()


# -------------------------------------------------------------------------------------------------- what is in the file


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its first block, and what it raised."""
    root = tmp_path_factory.mktemp("stopped")
    return root, stop(root, PRUNED, epochs=1)


def test_the_checkpoint_holds_what_was_solved_and_no_model(stopped):
    root, _ = stopped
    kept = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    assert kept["state_dict"] == {}
    state = kept["callbacks"]["SparseGPTCallback"]
    assert set(state["weights"]) == set(state["biases"]) == {
        f"model.decoder.layers.0.{name}"
        for name in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2")
    }  # fmt: skip
    assert (root / "checkpoints/last.ckpt").stat().st_size < 60_000  # 8,192 weights, half of them in 32 bits


def test_the_error_says_how_to_go_on(stopped):
    root, error = stopped
    path = root / "checkpoints/last.ckpt"
    assert error.__notes__ == [f"all up to block 1 of 3 is kept: fit(..., ckpt_path={str(path)!r}) goes on from there"]
    with pytest.raises(ValueError, match=r"was stopped holds no whole model; fit\(ckpt_path=\.\.\.\) ends it"):
        make_trainer(root).validate(module(), make_loader(), ckpt_path=path)


def test_a_new_run_in_the_same_place_warns_before_it_replaces_the_checkpoint(tmp_path, stopped):
    (tmp_path / "checkpoints").mkdir()
    kept = (stopped[0] / "checkpoints/last.ckpt").read_bytes()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(kept)
    with pytest.warns(UserWarning, match="stopped after block 1 of 3; this run begins anew"):
        stop(tmp_path, PRUNED, epochs=0, batches=1)
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == kept


def test_a_complete_run_says_so_and_nothing_else_is_kept_of_it(tmp_path):
    fit(tmp_path, PRUNED)
    assert (tmp_path / "checkpoints/last.ckpt").stat().st_size < 10_000
    with pytest.raises(ValueError, match=f"is complete, and its model was written to {tmp_path / 'model'}"):
        fit(tmp_path, PRUNED, ckpt_path="last")
    with pytest.warns(UserWarning, match="is complete and was another one: this one begins"):
        fit(tmp_path, PRUNED, mode="one-shot", ckpt_path="last")
    fit(tmp_path, PRUNED)  # and does not warn


class FailAtTheEnd(Callback):
    """Stands for a reader of stdout that has gone away."""

    def on_fit_end(self, trainer, pl_module):
        raise BrokenPipeError("nobody reads on")

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            raise BrokenPipeError("nobody reads on")


def test_what_fails_after_the_model_was_written_changes_no_checkpoint(tmp_path):
    callback = SparseGPTCallback(PRUNED, save_dir=str(tmp_path / "model"))
    trainer = make_trainer(tmp_path, callback, FailAtTheEnd(), LastCheckpoint(), enable_checkpointing=True)
    compressed = module()
    with pytest.raises(BrokenPipeError) as raised:
        trainer.fit(compressed, make_loader(), make_loader(seed=1))
    assert not hasattr(raised.value, "__notes__")
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    with pytest.raises(BrokenPipeError):
        trainer.validate(compressed, make_loader())
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before
    assert len(before) < 10_000


def test_blocks_are_not_kept_where_that_would_cost_more_than_its_share(tmp_path, monkeypatch):
    writes = []

    def slow(self, checkpoint, path, storage_options=None):
        writes.append(checkpoint["callbacks"]["SparseGPTCallback"].get("weights"))
        monkeypatch.setattr("sgpt_lightning.trainer.last_checkpoint.time.monotonic", lambda: 1e6 + 100 * len(writes))

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", slow)
    fit(tmp_path, PRUNED)  # of three blocks the first is written, in 100 s of a clock that stands still between writes
    assert [None if kept is None else len(kept) for kept in writes] == [6, None]


# ------------------------------------------------------------------------------------------------------ what is refused


def others(tmp_path):
    """What a run may change, and what is said then."""
    return {
        "recipe": ({"recipe": Recipe(preset="sparsegpt", sparsity=0.4, damp_percent=0.02, target_avg_bits=None)},
                   ["sgpt.recipe.sparsity: was 0.5, is 0.4", "sgpt.recipe.damp_percent: was 0.01, is 0.02"]),
        "mode": ({"mode": "one-shot"}, ["sgpt.calibration: was 'sequential', is 'one-shot'"]),
        "weights": ({"model": module(seed=5)}, ["model.weights: was '"]),
        "dtype": ({"model": CausalLMModule.from_model(module().network.bfloat16())},
                  [f"model.{name}: was 'torch.float32', is 'torch.bfloat16'" for name in ("dtype", "storage_dtype")]),
        "attention": ({"model": module(attn_implementation="eager")},
                      ["model.attn_implementation: was 'sdpa', is 'eager'"]),
        "text": ({"calibrates": make_loader(seed=3)}, ["calibration batches, sha256: was '"]),
        "batches": ({"calibrates": make_loader(batch_size=2)},
                    ["calibration batches, batches: was 2, is 3",
                     "calibration batches, shape: was [3, 24], is [2, 24]",
                     "calibration batches, sha256: was '"]),
    }  # fmt: skip


@pytest.mark.parametrize("changed", ["recipe", "mode", "weights", "dtype", "attention", "text", "batches"])
def test_another_setting_model_or_text_is_refused_by_name(stopped, tmp_path, changed):
    settings, said = others(tmp_path)[changed]
    recipe, path = settings.pop("recipe", PRUNED), stopped[0] / "checkpoints/last.ckpt"
    before = path.read_bytes()
    seen = FirstEpoch()
    with pytest.raises(ValueError, match=f"the run of {path} cannot go on") as raised:
        fit(tmp_path, recipe, seen, ckpt_path=path, **settings)
    lines = str(raised.value).splitlines()[1:]
    assert all(any(line.strip().startswith(text) for line in lines) for text in said)
    assert len(lines) == len(said)
    assert seen.epoch is None
    assert path.read_bytes() == before


def test_another_place_is_warned_of_and_the_run_goes_on(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("sgpt_lightning.trainer.resume.versions", lambda: {"torch": "9.9"})
    with pytest.warns(UserWarning, match=rf"another place .*\(torch was {re.escape(torch.__version__)}, is 9.9\)"):
        fit(tmp_path, PRUNED, ckpt_path=stopped[0] / "checkpoints/last.ckpt")
    load_compressed(tmp_path / "model")


def test_a_checkpoint_of_something_else_or_a_part_of_one_is_refused_by_name(stopped, tmp_path):
    kept = torch.load(stopped[0] / "checkpoints/last.ckpt", weights_only=True)
    path = tmp_path / "other.ckpt"
    for change, message in (
        ({"callbacks": {}}, "holds no state of a compression"),
        ({"callbacks": {"SparseGPTCallback": {"version": 9, "record": "{}"}}}, "is of version 9 of run states"),
        (None, "cannot be read as a checkpoint"),
    ):
        torch.save(kept | (change or {}), path)
        if change is None:
            path.write_bytes(path.read_bytes()[:20_000])
        with pytest.raises(ValueError, match=f"{path} {message}"):
            fit(tmp_path, PRUNED, ckpt_path=path)


def test_a_digest_tells_weights_and_configs_apart_and_nothing_else():
    model = make_model("gpt2")
    digests = weights_digest(model), config_digest(model.config)
    again = make_model("gpt2")
    again.config._name_or_path = "elsewhere"
    assert (weights_digest(again), config_digest(again.config)) == digests
    with torch.no_grad():
        weight = again.transformer.h[0].attn.c_attn.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert weights_digest(again) != digests[0]
    again.config.activation_function = "relu"
    assert config_digest(again.config) != digests[1]


# -------------------------------------------------------------------------------------------------- disks that are full


class FillDisk(Callback):
    """From the end of an epoch on, no file may be larger than so many bytes: the kernel refuses to write on."""

    def __init__(self, epoch, size):
        self.epoch, self.size = epoch, size

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.fixture
def endless_disk_again():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("endless_disk_again")
def test_a_full_disk_is_warned_of_and_the_earlier_checkpoint_goes_on(tmp_path):
    with pytest.warns(
        UserWarning, match="last.ckpt was not written .*; the earlier one, of block 1 of 3, is as it was"
    ):
        error = stop(tmp_path, PRUNED, FillDisk(1, 20_000), epochs=2)
    assert re.match("all up to block 1 of 3 is kept", error.__notes__[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen = FirstEpoch()
    fit(tmp_path, PRUNED, seen, ckpt_path="last")
    assert seen.epoch == 1


def test_a_place_that_cannot_be_written_is_warned_of_and_the_run_is_completed(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.warns(UserWarning, match="last.ckpt was not written .*; there is none yet"):
        fit(tmp_path, PRUNED)
    load_compressed(tmp_path / "model")


# ----------------------------------------------------------------------------------------------------- what a user sees


@pytest.mark.filterwarnings("always:ckpt_path='last'")
def test_the_readmes_command_is_stopped_goes_on_and_is_complete(readme_runs, two_blocks, tmp_path, monkeypatch):
    """With the bytes of the demo that nobody stopped."""
    (line,) = (line for block in blocks("bash") for line in block.splitlines() if "ckpt_path" in line)
    command = [*shlex.split(line)[1:], *SIZES]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def stop_in_block_2(self, trainer, *args, **kwargs):
        trainer.should_stop = trainer.current_epoch == 1

    with cut_down(two_blocks):
        with monkeypatch.context() as patch:
            patch.setattr(Timer, "on_train_batch_end", stop_in_block_2)
            begun = run_main(*command, status=2).err
        went_on = run_main(*command)
        complete = run_main(*command, status=2).err
    assert "sgpt: warning: ckpt_path='last': there is no checkpoint yet, the run begins anew\n" in begun
    again = shlex.join(["sgpt", *(part for part in command if part not in ("--ckpt_path", "last"))])
    assert f"all up to block 1 of 2 is kept, and `{again} --ckpt_path last` goes on from there; " in begun
    assert "going on with block 2 of 2, from runs/demo/checkpoints/last.ckpt\n" in went_on.err
    assert "block 1 of 2" not in went_on.err
    assert "is complete, and its model was written to runs/demo/lightning_logs/version_1/compressed" in complete
    whole, parts = (
        root / "runs/demo/lightning_logs" / version / "compressed"
        for root, version in ((readme_runs[0], "version_0"), (tmp_path, "version_1"))
    )
    for name in ("config.json", "sgpt.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    report = json.loads((parts.parent / "report.json").read_text())
    assert report["perplexity"] == json.loads((whole.parent / "report.json").read_text())["perplexity"]
