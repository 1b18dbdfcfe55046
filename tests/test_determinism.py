"""The same command gives the same bytes, whatever else the process did; and it leaves the process as it was."""

import contextlib
import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import make_batches, make_model, make_tokens
from runs_for_tests import make_trainer, weight_file
from torch import nn
from torch.utils.data import DataLoader

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {"best": Recipe(), "coded": Recipe(coding="entropy", target_bits_per_weight=5.0, ignore=["*.1.*"])}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(directory: Path, recipe: str, model: nn.Module | None = None) -> str:
    """Compress a model into a directory; return the digest of its weights."""
    model = model or make_model("opt")
    solved = compress(model, make_batches(2), RECIPES[recipe], storage_dtype=torch.float16)
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return digest(weight_file(directory))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.manual_seed(5)
from test_determinism import RECIPES, write
print(*(write(Path(sys.argv[1], recipe), recipe) for recipe in RECIPES))
"""


def test_a_process_with_another_seed_for_its_hashes_and_its_generators_writes_the_same_bytes(tmp_path):
    expected = [write(tmp_path / recipe, recipe) for recipe in RECIPES]
    here = Path(__file__).parent
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    script = [sys.executable, "-c", SCRIPT, str(tmp_path / "again")]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120, env=env)
    assert done.stdout.split() == expected
    assert len(set(expected)) == 2


def make_own_loader(seed: int) -> DataLoader:
    """Make a loader with a generator of its own: others draw a seed for their workers from the global one."""
    windows = [{"input_ids": row} for row in make_tokens(6, 24, seed)]
    return DataLoader(windows, batch_size=3, generator=torch.Generator())


def fit(root: Path, model: nn.Module) -> tuple[Path, str]:
    """Run a fit; return the weights file and what was printed."""
    trainer = make_trainer(root, SparseGPTCallback(save_dir=str(root / "out")))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.fit(CausalLMModule.from_model(model), make_own_loader(0), make_own_loader(1))
    return weight_file(root / "out"), printed.getvalue()


def state_of_the_process() -> dict[str, object]:
    """All of the process that a library may be tempted to set."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), matmul.fp32_precision, cudnn.conv.fp32_precision),
        "mkldnn": torch.backends.mkldnn.matmul.fp32_precision,
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
    }  # fmt: skip


@contextlib.contextmanager
def settings_of_a_user():
    """Settings that differ from torch's own."""
    before = torch.get_rng_state()
    torch.manual_seed(11)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.set_rng_state(before)


@pytest.fixture(scope="module")
def first_fit(tmp_path_factory) -> tuple[Path, str]:
    return fit(tmp_path_factory.mktemp("first"), make_model("opt"))


def test_a_fit_prints_the_digest_of_its_weights(first_fit):
    path, printed = first_fit
    assert f"sha256 {digest(path)}  {path.name}" in printed  # as sha256sum writes it


def test_the_settings_of_another_user_change_no_byte_and_are_not_changed(first_fit, tmp_path):
    model = make_model("opt")
    with settings_of_a_user():
        before = state_of_the_process()
        again, _ = fit(tmp_path, model)
        loaded = load_compressed(tmp_path / "out")
        after = state_of_the_process()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}
    assert again.read_bytes() == first_fit[0].read_bytes()
    expected = load_compressed(first_fit[0].parent).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_decoded_weights_do_not_depend_on_the_default_dtype(tmp_path):
    model = make_model("opt")
    write(tmp_path / "out", "coded")
    expected = load_compressed(tmp_path / "out").state_dict()
    with settings_of_a_user():
        found = load_compressed(tmp_path / "out").state_dict()
        assert digest(weight_file(tmp_path / "out")) == write(tmp_path / "again", "coded", model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
