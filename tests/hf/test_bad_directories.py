"""What is damaged, foreign or forged is a named error of `from_pretrained`, before anything of a model is there."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from forgery import CONFIG, FC1, MANIFEST, WEIGHTS, damage, edit_json, forge, forge_description
from packed_models import FORMS, load, logits, write
from safetensors.torch import load_file, save_file

import sgpt_lightning.checkpoint.save
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format.directory import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
Edit = Callable[[Path], None]


def write_bytes(name: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


def flip(content: bytes) -> bytes:
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def described_as(*path: str, value: Any) -> Edit:
    def edit(described: dict[str, Any]) -> None:
        for key in path[:-1]:
            described = described[key]
        described[path[-1]] = value

    return lambda directory: forge_description(directory, edit)


def with_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """Change tensors, under right checksums."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        forge(directory)

    return apply


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: len(tensor) // 2].clone()


def size_of_weights(manifest: dict[str, Any]) -> None:
    manifest["files"][WEIGHTS]["bytes"] += 8
    manifest["ledger"]["other"] += 8


def without_weights(manifest: dict[str, Any]) -> None:
    del manifest["files"][WEIGHTS]
    manifest["ledger"]["other"] = 0


def tied_norms(directory: Path) -> None:
    """Let two tensors be one that transformers does not tie."""
    other = "model.decoder.layers.0.final_layer_norm.weight"
    with_tensors(lambda tensors: tensors.pop(other))(directory)
    forge_description(directory, lambda described: described["aliases"].update({other: NORM}))


NORM, CODES = "model.decoder.final_layer_norm.weight", f"{FC1}.weight_codes"
FAULTS: dict[str, tuple[str, Edit]] = {
    "truncated": (WEIGHTS, write_bytes(WEIGHTS, lambda content: content[:-9])),
    "empty": (WEIGHTS, write_bytes(WEIGHTS, lambda content: b"")),
    "a bit flipped": (WEIGHTS, write_bytes(WEIGHTS, flip)),
    "a bit of the config flipped": (CONFIG, write_bytes(CONFIG, lambda c: c.replace(b'_dim": 64', b'_dim": 65'))),
    "something else": (WEIGHTS, write_bytes(WEIGHTS, lambda content: b"PK" * 999)),
    "missing": (WEIGHTS, lambda directory: (directory / WEIGHTS).unlink()),
    "a newer version": (CONFIG, described_as("format_version", value=8)),
    "an older version": ("load_compressed", described_as("format_version", value=5)),
    "a newer manifest": (MANIFEST, lambda d: forge(d, lambda manifest: manifest.update(format_version=8))),
    "a manifest that lies about sizes": (WEIGHTS, lambda directory: forge(directory, size_of_weights)),
    "a manifest without weights": (WEIGHTS, lambda d: forge(d, without_weights)),
    "a manifest without a linear": (FC1, lambda d: forge(d, lambda manifest: manifest["linears"].pop(FC1) and None)),
    "a wrong shape": (NORM, with_tensors(lambda tensors: tensors.update({NORM: half(tensors[NORM])}))),
    "codes too few": (FC1, with_tensors(lambda tensors: tensors.update({CODES: half(tensors[CODES])}))),
    "a tensor missing": (NORM, with_tensors(lambda tensors: tensors.pop(NORM))),
    "a tensor too many": ("more", with_tensors(lambda tensors: tensors.update(more=torch.zeros(1)))),
    "a spec of another shape": (FC1, described_as("packed", FC1, "shape", value=[64, 31])),
    "a spec of another width": (FC1, described_as("packed", FC1, "widths", value=[8])),
    "no description": (CONFIG, described_as("packed", value=None)),
    "other ties": ("are tied", tied_norms),
    "a norm for a linear": (NORM[:-7], described_as("packed", NORM[:-7], value=None)),
    "weights elsewhere": (CONFIG, described_as("weights", value="../sgpt.safetensors")),
    "weights in a pickle": (CONFIG, described_as("weights", value="pytorch_model.bin")),
    "a pickle beside them": ("pytorch_model.bin", lambda directory: (directory / "pytorch_model.bin").touch()),
    "1e9 layers": ("num_hidden_layers", lambda directory: edit_json(
        directory / CONFIG, lambda config: config.update(num_hidden_layers=10**9)) or forge(directory)),
    "an attention that is none": ("flashy", described_as("attn_implementation", value="flashy")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_named_error(fault, forms, tmp_path):
    shutil.copytree(forms[0] / "opt", tmp_path / "out")
    named, commit = FAULTS[fault]
    commit(tmp_path / "out")
    with pytest.raises((CheckpointError, ValueError) if "attention" in fault else CheckpointError) as error:
        load(tmp_path / "out")
    assert named in str(error.value)
    assert len(str(error.value)) < 2000


BARE = (
    "truncated", "something else", "a wrong shape", "codes too few", "a tensor missing", "other ties",
    "a tensor too many", "a spec of another shape", "a newer version", "weights elsewhere", "1e9 layers",
)  # fmt: skip


@pytest.mark.parametrize("fault", BARE)
def test_what_needs_no_checksum_is_found_without_a_manifest(fault, forms, tmp_path):
    shutil.copytree(forms[0] / "opt", tmp_path / "out")
    named, commit = FAULTS[fault]
    commit(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "out")
    assert named in str(error.value)


def test_a_directory_without_a_manifest_is_read_and_saved_and_load_compressed_asks_for_it(forms, tmp_path):
    shutil.copytree(forms[0] / "opt", tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), forms[1]["opt"])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), forms[1]["opt"])
    for resident in ("packed", "dense"):
        with pytest.raises(CheckpointError, match=f"has no {MANIFEST}"):
            load_compressed(tmp_path / "again", resident=resident)


def test_what_belongs_to_a_tokenizer_or_a_reader_may_be_edited_and_load_compressed_tells(forms, tmp_path):
    shutil.copytree(forms[0] / "opt", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("a card")
    entry = {"bytes": 6, "sha256": ""}
    forge(tmp_path / "out", lambda manifest: manifest["files"].update({"README.md": entry}))
    (tmp_path / "out" / "README.md").write_text("an edited card")
    assert torch.equal(logits(load(tmp_path / "out")), forms[1]["opt"])
    with pytest.raises(CheckpointError, match=r"README\.md has 14 bytes"):
        load_compressed(tmp_path / "out")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_missing_shard_is_an_error_that_names_it(with_manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(sgpt_lightning.checkpoint.save, "MAX_SHARD_SIZE", "20KB")
    write(tmp_path / "out", *FORMS["opt"])
    shards = sorted((tmp_path / "out").glob("sgpt-0*.safetensors"))
    shards[1].unlink()
    if not with_manifest:
        (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load(tmp_path / "out")


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_a_damaged_stream_is_found_without_a_manifest_when_it_is_decoded(resident, forms, tmp_path):
    shutil.copytree(forms[0] / "opt-coded", tmp_path / "out")
    with_tensors(lambda tensors: tensors[f"{FC1}.weight_stream"].view(torch.int16)[2:3].bitwise_xor_(1))(
        tmp_path / "out"
    )
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=rf"{CONFIG} does not describe {FC1}: words of 1 streams"):
        load(tmp_path / "out", resident=resident)


def test_links_of_the_hubs_cache_are_followed_and_need_not_be_all_there(forms, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(forms[0] / "opt" / name)
    assert torch.equal(logits(load(snapshot)), forms[1]["opt"])
    assert "sgpt" in json.loads((snapshot / CONFIG).read_text())["quantization_config"].values()


DAMAGES = 60  # 250 found no third outcome


def outcome(directory: Path) -> torch.Tensor | str:
    """Return the logits, or the message of an error that is allowed: a config that transformers cannot read is its."""
    try:
        return logits(load(directory))
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return str(error) if CONFIG in str(error) else f"nothing is named by {error!r}"


def test_random_damage_is_a_named_error_or_the_same_logits(forms, tmp_path):
    chance, errors = random.Random(0), 0
    for number in range(DAMAGES):
        name = chance.choice(["opt", "llama", "opt-coded"])
        directory = tmp_path / str(number)
        shutil.copytree(forms[0] / name, directory)
        what = damage(chance, directory, [forms[0] / other for other in ("gpt2", "gpt2-coded")])
        found = outcome(directory)
        if isinstance(found, str):
            errors += 1
            assert str(directory) in found, what
        else:
            assert torch.equal(found, forms[1][name]), what
        shutil.rmtree(directory)
    assert 0.5 * DAMAGES < errors < DAMAGES  # files that are not read here may be damaged
