"""What a crash or a foreign directory does to a compressed model. Run as a script, this file is the crash."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_batches, make_model, make_tokens
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

import sgpt_lightning.checkpoint.save as checkpoint
import sgpt_lightning.format.directory as directory
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.format.directory import CheckpointError, is_compressed_dir
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.names import resolve_model
from sgpt_lightning.recipe import Recipe

SCENES = ["overwriting", "creating"]
STEPS = [(checkpoint, "save_file"), (os, "fsync")]
STEPS += [(Path, name) for name in ("mkdir", "write_text", "touch", "rename", "unlink", "rmdir")]
MOST_STEPS = 60
SECONDS = 2.5


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

    A `save_file` is killed halfway as well, with a part written.
    """
    calls: list[str] = []

    def armed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            if len(calls) == step and name == "save_file":
                Path(args[1]).write_bytes(b"half a header")
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
    compressed_model(2)  # by position, as save does: a cache takes a keyword for another call
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


def read_beside_a_saver(target: Path) -> None:
    """Load again and again while another process saves two models in turn, and print how often which was found."""
    expected = [save(target, seed) for seed in (1, 2)]
    stop = time.monotonic() + SECONDS
    child = os.fork()
    if child == 0:
        saves = 0
        while time.monotonic() < stop:
            save(target, seed=1 + saves % 2)
            saves += 1
        os._exit(0 if saves > 2 else 1)
    found = Counter()
    while time.monotonic() < stop:
        logits = loaded_logits(target)
        found[next((n for n, known in enumerate(expected) if torch.equal(logits, known)), "neither")] += 1
        assert check_compressed(target).files
    _, status = os.waitpid(child, 0)
    print(json.dumps({"saver": os.waitstatus_to_exitcode(status), "found": found}))


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("crashes")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", __file__, root]
    done = subprocess.run(command, check=True, timeout=120, env=environment, stdout=subprocess.PIPE, text=True)
    (root / "beside.json").write_text(done.stdout)
    return root


def files_of(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_model_and_the_next_save_cleans_up(scene, crashes, tmp_path):
    old, new = save(tmp_path / "old", seed=1), save(tmp_path / "new", seed=2)
    assert not torch.equal(old, new)
    found = []
    steps = sorted((crashes / scene).iterdir(), key=lambda path: int(path.name))
    for step in steps:
        before = files_of(step)
        if scene == "creating" and not (step / "out").exists():
            for read in (load_compressed, check_compressed):
                with pytest.raises(CheckpointError, match=r"out is not a compressed model"):
                    read(step / "out")
            assert not is_compressed_dir(step / "out")
            found.append("none")
        else:
            logits = loaded_logits(step / "out")
            found.append("old" if torch.equal(logits, old) else "new" if torch.equal(logits, new) else "neither")
            assert is_compressed_dir(step / "out")
            assert check_compressed(step / "out").linears
            assert AutoConfig.from_pretrained(resolve_model(str(step / "out"))).model_type == "opt"
        assert files_of(step) == before  # readers write nothing
        save(step / "out", seed=2)
        assert torch.equal(loaded_logits(step / "out"), new), step
        assert [path.name for path in step.iterdir()] == ["out"]
    first = "old" if scene == "overwriting" else "none"
    switch = found.index("new")
    assert found == [first] * switch + ["new"] * (len(found) - switch)
    assert 8 < switch < len(found) < MOST_STEPS  # killed before and after the switch, and the last one went through


def test_a_reader_beside_a_saver_finds_one_of_the_two_models_each_time_and_the_saver_notices_nothing(crashes):
    outcome = json.loads((crashes / "beside.json").read_text())
    assert outcome["saver"] == 0
    assert set(outcome["found"]) == {"0", "1"}
    assert sum(outcome["found"].values()) >= 4
    assert [path.name for path in (crashes / "beside").iterdir()] == ["out"]


FAILURES = {
    "weights": (checkpoint, "save_file", SafetensorError("I/O error: no space left on device")),
    "reading back": (checkpoint, "_verify", OSError("no space left on device")),
    "config": (checkpoint, "config_text", OSError("no space left on device")),
    "sync": (directory, "_sync", OSError("no space left on device")),
}


@pytest.mark.parametrize("failing", FAILURES)
def test_a_save_that_fails_says_what_to_do_and_leaves_the_old_model_and_nothing_else(failing, tmp_path, monkeypatch):
    owner, name, error = FAILURES[failing]
    old = save(tmp_path / "out", seed=1)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=r"cannot save the model to .*/out: .*no space left.*untouched; free space"):
        save(tmp_path / "out", seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(loaded_logits(tmp_path / "out"), old)


def test_a_file_that_does_not_read_back_as_written_is_not_put_in_place(tmp_path, monkeypatch):
    written = checkpoint.save_file
    wrong = {"model.decoder.final_layer_norm.weight": torch.zeros(32)}
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, *rest, **more: written(tensors | wrong, *rest, **more))
    with pytest.raises(
        OSError, match=r"did not read back as it was written: model\.decoder\.final_layer_norm\.weight\. What"
    ):
        save(tmp_path / "out", seed=1)
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    kill_at_every_step(Path(sys.argv[1]))
    read_beside_a_saver(Path(sys.argv[1], "beside", "out"))
