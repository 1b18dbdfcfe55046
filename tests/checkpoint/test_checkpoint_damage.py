"""A file that is missing, truncated, changed, foreign or of another version is an error that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "out"
    model = make_model("opt")
    solved = compress(model, make_batches(1), Recipe(), storage_dtype=torch.float16)
    save_compressed(directory, model, solved, storage_dtype=torch.float16, tokenizer=load_tokenizer("opt-mini"))
    return directory


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Set (or, with None, remove) keys of a JSON file."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | values
        (directory / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def flip(name: str, position: float) -> Callable[[Path], None]:
    """Flip one bit, at a fraction of the file's length."""

    def edit(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        (directory / name).write_bytes(content)

    return edit


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


WEIGHTS, CONFIG, MANIFEST = "sgpt.safetensors", "config.json", "sgpt_manifest.json"
TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"
DAMAGES = {
    "weights missing": (WEIGHTS, lambda directory: (directory / WEIGHTS).unlink()),
    "weights empty": (WEIGHTS, truncate(WEIGHTS, 0)),
    "weights truncated": (WEIGHTS, truncate(WEIGHTS, -1)),
    "weights flipped in the header": (WEIGHTS, flip(WEIGHTS, 0.01)),
    "weights flipped in the middle": (WEIGHTS, flip(WEIGHTS, 0.5)),
    "weights flipped at the end": (WEIGHTS, flip(WEIGHTS, 1.0)),
    "weights of something else": (WEIGHTS, lambda directory: (directory / WEIGHTS).write_bytes(b"PK" * 999) and None),
    "config missing": (CONFIG, lambda directory: (directory / CONFIG).unlink()),
    "config truncated": (CONFIG, truncate(CONFIG, 100)),
    "config flipped": (CONFIG, flip(CONFIG, 0.3)),
    "config of a dense model": (CONFIG, change(CONFIG, quantization_config=None)),
    "config with other heads": (CONFIG, change(CONFIG, num_attention_heads=8)),  # fits all tensors, other logits
    "tokenizer missing": (TOKENIZER, lambda directory: (directory / TOKENIZER).unlink()),
    "tokenizer changed": (TOKENIZER, flip(TOKENIZER, 0.5)),
    "generation settings missing": (GENERATION, lambda directory: (directory / GENERATION).unlink()),
    "generation settings changed": (GENERATION, change(GENERATION, top_k=1)),
    "manifest missing": (MANIFEST, lambda directory: (directory / MANIFEST).unlink()),
    "manifest truncated": (MANIFEST, truncate(MANIFEST, 900)),
    "manifest not of text": (MANIFEST, lambda directory: (directory / MANIFEST).write_bytes(b"\xff\xfe\x00") and None),
    "manifest a list": (MANIFEST, lambda directory: (directory / MANIFEST).write_text("[1]") and None),
    "manifest of another format": (MANIFEST, change(MANIFEST, format="gptq")),
    "manifest newer": (MANIFEST, change(MANIFEST, format_version=8)),
    "manifest that says it is older": (MANIFEST, change(MANIFEST, format_version=1)),
    "manifest of version 0": (MANIFEST, change(MANIFEST, format_version=0)),
    "manifest without version": (MANIFEST, change(MANIFEST, format_version=None)),
    "manifest with another figure": (MANIFEST, change(MANIFEST, run={"perplexity": {"dense": {"wiki": 1.0}}})),
    "manifest without checksum": (MANIFEST, change(MANIFEST, sha256=None)),
    "manifest without ledger": (MANIFEST, change(MANIFEST, ledger=None)),
    "manifest without linears": (MANIFEST, change(MANIFEST, linears=None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_file(damage, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    load_compressed(tmp_path / "out")  # whole until it is damaged
    named, do_damage = DAMAGES[damage]
    do_damage(tmp_path / "out")
    for read in (load_compressed, check_compressed):
        with pytest.raises(CheckpointError) as error:
            read(tmp_path / "out")
        assert named in str(error.value)
        assert str(tmp_path / "out") in str(error.value)


def test_a_directory_that_does_not_exist_is_not_a_compressed_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a compressed model.*sgpt fit"):
        load_compressed(tmp_path / "nowhere")
