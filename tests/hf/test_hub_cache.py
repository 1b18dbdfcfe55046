"""Hub ids, against a cache that is made of copied files; nothing is asked of a network."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from huggingface_hub import constants
from models_for_tests import make_model
from packed_models import PROBE, load, logits

from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.format.directory import MANIFEST, CheckpointError
from sgpt_lightning.models import hub
from sgpt_lightning.packed.modules import Packed, packed_modules

pytestmark = pytest.mark.usefixtures("one_thread")
REPO, COMMIT, WEIGHTS = "some/opt", "0123456789" * 4, "sgpt.safetensors"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Callable[[Path], Path]:
    """Put a directory into the cache of a hub that cannot be reached, links and all; returns its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(directory: Path) -> Path:
        place = tmp_path / "hub" / "models--some--opt"
        snapshot = place / "snapshots" / COMMIT
        for folder in (snapshot, place / "refs", place / "blobs"):
            folder.mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        for file in directory.iterdir():
            shutil.copyfile(file, place / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        return snapshot

    return put


def flip(file: Path) -> None:
    """Flip a bit of a tensor."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("resident", ["packed", "coded", "dense"])
def test_a_hub_id_is_loaded_as_its_directory_would_be(resident, forms, cached):
    cached(forms[0] / "opt")
    model = load_model(REPO, resident=resident)
    parts = packed_modules(model).values()
    # Whether the packed parts have the form in memory; a dense model has no such parts.
    assert {part.resident is not None for part in parts} == {"packed": {True}, "coded": {False}, "dense": set()}[
        resident
    ]
    assert torch.equal(logits(model), forms[1]["opt"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_dense_model_of_the_hub_is_one_still(cached, tmp_path):
    dense = make_model("opt")
    dense.save_pretrained(tmp_path / "dense")
    cached(tmp_path / "dense")
    model = load_model(REPO, resident="packed")
    assert not [module for module in model.modules() if isinstance(module, Packed)]
    assert torch.equal(logits(model), logits(dense.eval()))


@pytest.mark.parametrize("loader", [load, load_model])
def test_a_flipped_bit_in_the_cache_is_found(loader, forms, cached):
    snapshot = cached(forms[0] / "opt")
    assert loader(REPO)(input_ids=PROBE).logits.shape[0] == len(PROBE)
    flip(snapshot / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not match the manifest's SHA-256"):
        loader(REPO)


def test_a_file_that_the_hub_has_not_is_named(forms, cached):
    (cached(forms[0] / "opt") / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing"):
        load_model(REPO)


def fetching(snapshot: Path, asked: list[str], monkeypatch) -> None:
    """Let files come into the cache when they are asked for, as they do from a hub."""
    held = {name: os.readlink(snapshot / name) for name in (WEIGHTS, MANIFEST)}
    for name in held:
        (snapshot / name).unlink()
    find = transformers.modeling_utils.cached_file

    def cached_file(repo: str, name: str, **options: object) -> str | None:
        asked.append(name)
        if name in held and not (snapshot / name).is_symlink():
            (snapshot / name).symlink_to(held[name])
        return find(repo, name, **options)

    monkeypatch.setattr(transformers.modeling_utils, "cached_file", cached_file)
    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)


def test_with_weights_that_are_fetched_comes_the_manifest_and_a_flipped_bit_is_found(forms, cached, monkeypatch):
    snapshot, asked = cached(forms[0] / "opt"), []
    flip(snapshot / WEIGHTS)
    fetching(snapshot, asked, monkeypatch)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not match the manifest's SHA-256"):
        load(REPO)
    assert asked[-2:] == [WEIGHTS, MANIFEST]


def test_nothing_is_fetched_beside_weights_that_were_there(forms, cached, monkeypatch):
    snapshot = cached(forms[0] / "opt")
    (snapshot / MANIFEST).unlink()  # as a reader without this package leaves the cache
    monkeypatch.setattr(hub, "_TICK", 0)  # the weights came a moment ago
    monkeypatch.setattr(hub, "file_of_hub", lambda *_: pytest.fail("the network was asked"))
    assert torch.equal(logits(load(REPO)), forms[1]["opt"])
