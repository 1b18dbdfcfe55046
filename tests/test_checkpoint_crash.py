"""What a crash or a foreign directory does to a compressed model. Run as a script, this file is the crash."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_batches, make_model, make_tokens
from transformers import PreTrainedModel

import sgpt_lightning.checkpoint as checkpoint
from sgpt_lightning.calibration import SolvedLinear, compress
from sgpt_lightning.checkpoint import CheckpointError, load_compressed, save_compressed
from sgpt_lightning.recipe import Recipe

SCENES = ["overwriting", "creating"]
STEPS = [(checkpoint, "save_file"), (Path, "write_text"), (os, "fsync"), (Path, "rename"), (shutil, "rmtree")]
MOST_STEPS = 30


@cache
def compressed_model(seed: int) -> tuple[PreTrainedModel, dict[str, SolvedLinear]]:
    model = make_model("opt", seed=seed)
    return model, compress(model, make_batches(1), Recipe(), storage_dtype=torch.float16)


def save(directory: Path, seed: int) -> torch.Tensor:
    """Save a tiny model that depends on the seed, and return its logits."""
    model, solved = compressed_model(seed)
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return model(input_ids=make_tokens(1, 8)).logits


def loaded_logits(directory: Path) -> torch.Tensor:
    return load_compressed(directory)(input_ids=make_tokens(1, 8)).logits.detach()


def die_at(step: int) -> list[str]:
    """Let this process be killed before the call number `step` of those that change the disk; return the calls so far.

    A `save_file` or an `rmtree` is killed halfway as well: with a part written, or with the manifest removed first.
    """
    calls: list[str] = []

    def armed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            if len(calls) == step and name == "save_file":
                Path(args[1]).write_bytes(b"half a header")
            elif len(calls) == step and name == "rmtree":
                Path(args[0], checkpoint.MANIFEST).unlink(missing_ok=True)
            else:
                return original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for owner, name in STEPS:
        setattr(owner, name, armed(name, getattr(owner, name)))
    return calls


def kill_at_every_step(root: Path) -> None:
    """For both scenes and n = 0, 1, ...: fork, save the new model to `root/scene/n/out`, die at step n."""
    torch.set_num_threads(1)
    save(root / "old", seed=1)
    compressed_model(seed=2)
    for scene in SCENES:
        for step in range(MOST_STEPS):
            target = root / scene / str(step) / "out"
            target.parent.mkdir(parents=True)
            if scene == "overwriting":
                shutil.copytree(root / "old", target)
            child = os.fork()
            if child == 0:
                die_at(step)
                save(target, seed=2)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) == 0:
                break
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("crashes")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", __file__, root], check=True, timeout=120, env=environment)
    return root


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_model_and_the_next_save_cleans_up(scene, crashes, tmp_path):
    old, new = save(tmp_path / "old", seed=1), save(tmp_path / "new", seed=2)
    assert not torch.equal(old, new)
    found = []
    steps = sorted((crashes / scene).iterdir(), key=lambda path: int(path.name))
    for step in steps:
        shutil.copytree(step, tmp_path / step.name)  # saved to again without being loaded in between
        if scene == "creating" and not (step / "out").exists():
            with pytest.raises(CheckpointError, match=r"out is not a compressed model"):
                load_compressed(step / "out")
            found.append("none")
        else:
            logits = loaded_logits(step / "out")
            found.append("old" if torch.equal(logits, old) else "new" if torch.equal(logits, new) else "neither")
        for root in (step, tmp_path / step.name):
            save(root / "out", seed=2)
            assert torch.equal(loaded_logits(root / "out"), new), step
            assert [path.name for path in root.iterdir()] == ["out"]
    before = "old" if scene == "overwriting" else "none"
    switch = found.index("new")
    assert found == [before] * switch + ["new"] * (len(found) - switch)
    assert 8 < switch < len(found) < MOST_STEPS  # killed before and after the switch, and the last one went through


@pytest.mark.parametrize("failing", ["save_file", "_verify", "_sync", "_ledger"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(failing, tmp_path, monkeypatch):
    old = save(tmp_path / "out", seed=1)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "out", seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(loaded_logits(tmp_path / "out"), old)


def test_a_file_that_does_not_read_back_as_written_is_not_put_in_place(tmp_path, monkeypatch):
    written = checkpoint.save_file
    wrong = {"model.decoder.final_layer_norm.weight": torch.zeros(32)}
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, *rest, **more: written(tensors | wrong, *rest, **more))
    with pytest.raises(
        OSError, match=r"did not read back as it was written: model\.decoder\.final_layer_norm\.weight$"
    ):
        save(tmp_path / "out", seed=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_target_that_is_not_ours_is_refused_and_untouched(kind, tmp_path):
    target = tmp_path / "out"
    held = target if kind == "file" else target / "thesis.tex"
    held.parent.mkdir(exist_ok=True)
    held.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"out exists and is not a compressed model"):
        save(target, seed=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [held]
    assert held.read_text() == "years of work"


@pytest.mark.parametrize("before", ["empty", "ours", "link", "nothing"])
def test_an_empty_directory_one_of_ours_and_a_link_to_one_are_overwritten(before, tmp_path):
    target = tmp_path / "runs" / "out"
    if before == "empty":
        target.mkdir(parents=True)
    elif before in ("ours", "link"):
        save(target, seed=1)
        (target / "stale.txt").write_text("of the old model")
    path = target
    if before == "link":
        path = tmp_path / "link"
        path.symlink_to(target)
    new = save(path, seed=2)
    for directory in (path, target):
        assert torch.equal(loaded_logits(directory), new)
    assert not (target / "stale.txt").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert path.is_symlink() == (before == "link")


if __name__ == "__main__":
    kill_at_every_step(Path(sys.argv[1]))
