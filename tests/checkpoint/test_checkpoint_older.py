"""Directories of older versions.

`format-1/model` was written by commit 08975c7, and its logits and weights by that commit's own reader.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from forgery import MANIFEST, edit_json, forge, make_older, write_model

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.format.directory import CheckpointError

FIRST = Path(__file__).parent / "format-1"


def test_a_model_in_format_version_1_is_read_as_its_own_reader_read_it():
    expected = json.loads((FIRST / "expected.json").read_text())
    model = load_compressed(FIRST / "model")
    state = model.state_dict()
    found = {
        name: hashlib.sha256(state[f"{name}.weight"].numpy().tobytes()).hexdigest() for name in expected["weights"]
    }
    assert found == expected["weights"]  # 12 linears in all three layouts, to the last bit
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(expected["input_ids"])).logits[0]
    # Float32 sums of 16 to 32 terms of order 1, in the order of another CPU.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)
    layouts = {report["layout"] for report in check_compressed(FIRST / "model").linears.values()}
    assert layouts == {"dense", "bitmap", "pattern"}


@pytest.mark.parametrize("version", [3, 4])
def test_a_manifest_from_before_losses_were_predicted_is_read_and_says_that_none_was(version, tmp_path):
    write_model(tmp_path / "out")
    make_older(tmp_path / "out", version)
    reports = check_compressed(tmp_path / "out").linears.values()
    assert [report["predicted_loss"] for report in reports] == [None] * 12
    forge(tmp_path / "out", lambda manifest: manifest.update(format_version=5))  # and so must not be of version 5
    with pytest.raises(CheckpointError, match="is incomplete"):
        check_compressed(tmp_path / "out")


@pytest.mark.parametrize("field", ["files", "config", "linears", "ledger"])
@pytest.mark.parametrize("value", [None, 3, [], {}, {"x": 1}, {"x": {"spec": 2}}])
def test_a_fault_in_an_older_manifest_is_an_error_that_names_it(field, value, tmp_path):
    shutil.copytree(FIRST / "model", tmp_path / "out")
    edit_json(tmp_path / "out" / "sgpt_manifest.json", lambda manifest: manifest.update({field: value}))
    with pytest.raises(CheckpointError, match=r"out"):
        load_compressed(tmp_path / "out")


@pytest.mark.parametrize("version", [3, 4, 5])
def test_versions_that_described_weights_in_the_manifest_are_read(version, tmp_path):
    """3 and 4 have no `embeddings` and do not say what packed weights consist of."""
    write_model(tmp_path / "out")
    state = load_compressed(tmp_path / "out").state_dict()
    make_older(tmp_path / "out", version)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["format_version"] == version
    loaded = load_compressed(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


@pytest.mark.parametrize("value", [None, {"wte": 3}, {"model.decoder.embed_tokens": {"spec": {}, "report": {}}}])
@pytest.mark.parametrize("version", [5, 6])
def test_embeddings_that_are_no_packed_weights_are_an_error_that_names_the_manifest(version, value, tmp_path):
    write_model(tmp_path / "out")
    if version == 5:
        make_older(tmp_path / "out", 5, lambda manifest: manifest.update(embeddings=value))
    else:
        forge(tmp_path / "out", lambda manifest: manifest.update(embeddings=value))
    with pytest.raises(CheckpointError, match=r"sgpt_manifest\.json is incomplete or odd"):
        load_compressed(tmp_path / "out")
