"""Fixtures that more than one test file needs. References that share no code with the package are in `oracles.py`."""

import os
import random

# Triton's kernels are interpreted on CPU tensors. Triton asks for this when it is first imported, as transformers does.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models_for_tests import make_model
from readme_runs import Run, cut_down, run_readme
from torch import Tensor

from sgpt_lightning.checkpoint.any_model import load_dense
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.presets import PRESETS
from sgpt_lightning.recipe import Recipe


def _collect(inputs: Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1])
    statistics.add(inputs)
    return statistics


def _plain_recipe(**settings) -> Recipe:
    """The published solve, nothing to do unless asked; parts are switched by their names.

    Small blocks, so that the lazy update of the sweep is at work.
    """
    parts = {name: settings.pop(name) for name in list(settings) if hasattr(PRESETS["best"].parts, name)}
    defaults = {
        "preset": "sparsegpt",
        "sparsity": None if "pattern" in settings else 0.0,
        "target_avg_bits": None,
        "widths": tuple(range(1, 9)),
    }
    return Recipe(**(defaults | {"block_size": 32, "uniform_if_better": False, "parts": parts} | settings))


def _solve(weight: Tensor, inputs: Tensor, name: str = "", **settings) -> CompressedLinear:
    return compress_linear(weight, _collect(inputs), _plain_recipe(**settings), name, torch.float32)


@pytest.fixture
def collect() -> Callable[[Tensor], InputStatistics]:
    """Statistics of some inputs."""
    return _collect


@pytest.fixture
def plain_recipe() -> Callable[..., Recipe]:
    """A recipe that does only what its keywords say."""
    return _plain_recipe


@pytest.fixture
def solve() -> Callable[..., CompressedLinear]:
    """Solve a weight against inputs, survivors stored as float32; keywords are those of the recipe."""
    return _solve


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory) -> Path:
    """A model directory: the first two blocks of opt-mini, and its tokenizer."""
    directory = tmp_path_factory.mktemp("package") / "opt-mini"
    model = load_dense("opt-mini", dtype=torch.float16)
    model.model.decoder.layers = model.model.decoder.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(directory)
    load_tokenizer("opt-mini").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random OPT of two blocks, with opt-mini's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-opt"
    tokenizer = load_tokenizer("opt-mini")
    make_model("opt", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> tuple[Path, Path]:
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
def readme_runs(two_blocks, tmp_path_factory) -> tuple[Path, list[Run]]:
    """The directory in which the README's commands were run, cut down, and what they printed."""
    directory = tmp_path_factory.mktemp("readme")
    with cut_down(two_blocks):
        return directory, run_readme(directory)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For loops over small tensors, where a second thread only waits: 12 s became 2 s on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
