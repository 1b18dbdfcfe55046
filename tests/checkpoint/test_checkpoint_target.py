"""Where a model may be saved and where it is found: nothing that is not ours is removed, moved or overwritten."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_checkpoint_crash import files_of, loaded_logits, save

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.format.directory import MARKER, CheckpointError, check_target, find_directory, replacing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_target_that_is_not_ours_is_refused_and_untouched(kind, tmp_path):
    target = tmp_path / "out"
    held = target if kind == "file" else target / "thesis.tex"
    held.parent.mkdir(exist_ok=True)
    held.write_text("years of work")
    for act in (lambda: save(target, seed=1), lambda: check_target(target)):
        with pytest.raises(FileExistsError, match=r"out exists and is not a compressed model"):
            act()
    assert files_of(tmp_path) == {str(held.relative_to(tmp_path)): b"years of work"} | (
        {"out": None} if kind == "directory" else {}
    )


def test_a_file_that_somebody_put_into_our_directory_is_not_lost_with_the_old_model(tmp_path):
    save(tmp_path / "out", seed=1)
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "scores.txt").write_text("days of evaluation")
    before = files_of(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"out holds 1 files that sgpt_lightning did not write \(notes/scores.txt"
    ):
        save(tmp_path / "out", seed=2)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", [".out.previous", ".out.partial"])
@pytest.mark.parametrize("target", ["missing", "ours", "foreign"])
def test_a_foreign_directory_at_a_name_that_a_save_needs_is_refused_and_untouched(name, target, tmp_path):
    if target == "ours":
        save(tmp_path / "out", seed=1)
    elif target == "foreign":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "data.bin").write_text("x")
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    before = files_of(tmp_path)
    if target == "ours":
        load_compressed(tmp_path / "out")
    else:
        with pytest.raises(CheckpointError, match=r"out is not a compressed model"):
            load_compressed(tmp_path / "out")
    for act in (lambda: save(tmp_path / "out", seed=2), lambda: check_target(tmp_path / "out")):
        with pytest.raises(FileExistsError, match=r"out.* is not a compressed model"):
            act()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("before", ["empty", "ours", "link", "nothing"])
def test_an_empty_directory_one_of_ours_and_a_link_to_one_are_overwritten(before, tmp_path):
    target = tmp_path / "runs" / "out"
    if before == "empty":
        target.mkdir(parents=True)
    elif before in ("ours", "link"):
        save(target, seed=1)
    path = target
    if before == "link":
        path = tmp_path / "link"
        path.symlink_to(target)
    check_target(path)
    new = save(path, seed=2)
    for directory in (path, target):
        assert torch.equal(loaded_logits(directory), new)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert path.is_symlink() == (before == "link")


def test_a_second_save_to_the_same_target_waits_for_nobody_and_disturbs_nobody(tmp_path):
    with replacing(tmp_path / "out") as partial:
        (partial / "half").write_text("of a model")
        for act in (lambda: save(tmp_path / "out", seed=1), lambda: check_target(tmp_path / "out")):
            with pytest.raises(BlockingIOError, match=r"another process is saving to the output directory .*out"):
                act()
        assert (partial / "half").read_text() == "of a model"
    assert files_of(tmp_path) == {"out": None, "out/half": b"of a model"}


def test_a_model_that_was_moved_away_by_a_killed_save_is_not_hidden_by_an_empty_directory(tmp_path, monkeypatch):
    old = save(tmp_path / "out", seed=1)
    (tmp_path / "out").rename(tmp_path / ".out.previous")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("sgpt_lightning.checkpoint.save._verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "out", seed=2)
    assert torch.equal(loaded_logits(tmp_path / "out"), old)


def test_a_directory_that_is_being_removed_is_not_taken_for_a_model(tmp_path):
    save(tmp_path / "out", seed=1)
    (tmp_path / "out").rename(tmp_path / ".out.previous")
    assert find_directory(tmp_path / "out") == tmp_path / ".out.previous"
    (tmp_path / ".out.previous" / MARKER).touch()
    assert find_directory(tmp_path / "out") == tmp_path / "out"


def test_a_home_directory_is_expanded_by_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    new = save(Path("~/models/out"), seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert torch.equal(loaded_logits(Path("~/models/out")), new)
    assert torch.equal(load_compressed("~/models/out").lm_head.weight, load_compressed("models/out").lm_head.weight)
    assert check_compressed("~/models/out").files
    (tmp_path / "models" / "out" / "foreign").touch()
    with pytest.raises(FileExistsError, match="foreign"):
        check_target("~/models/out")


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_asks_for(umask, expected, tmp_path):
    before = os.umask(umask)
    try:
        save(tmp_path / "out", seed=1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "sgpt.safetensors", "sgpt_manifest.json", "config.json", "generation_config.json"} == set(
        modes
    )
    assert set(modes.values()) == {expected}


def test_a_target_below_a_file_or_with_too_little_room_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"file/deeper/out cannot be made: .*/file is a file"):
        check_target(tmp_path / "file" / "deeper" / "out")
    with pytest.raises(OSError, match=r"out needs 1,000,000,000,000,000 bytes, [\d,]+ are free: free space"):
        check_target(tmp_path / "out", 10**15)
    check_target(tmp_path / "not" / "yet" / "there", shutil.disk_usage(tmp_path).free // 2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_without_write_permission_is_refused_before_any_work():
    script = """
import os, sys
from sgpt_lightning.format.directory import check_target
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not hold for root
check_target(sys.argv[1] + "/out")
"""
    with tempfile.TemporaryDirectory() as directory:  # not pytest's, which only its owner can enter
        Path(directory).chmod(0o555)
        command = [sys.executable, "-c", script, directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert re.search("PermissionError: the output directory .*/out cannot be written: no permission", done.stderr)
