"""A tiny model directory and a text, for studies that take a second."""

import random

import pytest
from models_for_tests import make_model

from sgpt_lightning.experiments.study import Setting
from sgpt_lightning.models.names import load_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random OPT of two blocks, with opt-mini's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-opt"
    tokenizer = load_tokenizer("opt-mini")
    make_model("opt", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two files of words in random order: what `python-docs` says takes a second to tokenize."""
    words, directory = (
        ["one", "two", "shoe", "boot", "lost", "in", "the", "snow", "and", "found", "again", "by", "a", "fox"],
        tmp_path_factory.mktemp("t"),
    )
    draw = random.Random(0)
    for name in ("calibration", "held-out"):
        (directory / f"{name}.txt").write_text(" ".join(draw.choices(words, k=1000)))
    return directory / "calibration.txt", directory / "held-out.txt"


@pytest.fixture(scope="session")
def setting(tiny, texts):
    """Two seeds of four windows, and two held-out windows."""
    sizes = {"seeds": (0, 1), "windows": 4, "eval_windows": 2, "seq_len": 32, "device": "cpu"}
    calibration, held_out = map(str, texts)
    return Setting(model=str(tiny), calibration=calibration, evaluation=(held_out,), **sizes)
