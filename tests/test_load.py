"""Twenty compressions in a row in one process: what is left of them in memory, files, threads and hooks."""

import contextlib
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from models_for_tests import make_batches, make_model
from runs_for_tests import make_loader, make_trainer
from torch import nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")
GPTQ, CODED = (
    Recipe(preset="gptq"),
    Recipe(coding="entropy", target_bits_per_weight=6.0, ignore=["*.1.*", "*.self_attn.*"]),
)
RUNS, SETTLED = 20, 3


def compress_once(root: Path, number: int) -> nn.Module:
    """Compress a model in one of four ways, write it and read it; return the compressed one."""
    model = make_model("opt")
    if number % 4 == 3:
        trainer = make_trainer(
            root, SparseGPTCallback(GPTQ, save_dir=str(root / "out")), logger=TensorBoardLogger(root)
        )
        with contextlib.redirect_stdout(None):
            trainer.fit(CausalLMModule.from_model(model), make_loader(), make_loader(seed=1))
    else:
        recipe, mode = CODED if number % 4 == 2 else GPTQ, "one-shot" if number % 4 == 1 else "sequential"
        save_compressed(
            root / "out", model, compress(model, make_batches(2), recipe, mode=mode), storage_dtype=torch.half
        )
    load_compressed(root / "out")
    return model


def what_is_held() -> dict[str, int]:
    """Memory in bytes, open files, threads of Python and of the process, tensors and modules that are alive."""
    gc.collect()
    alive = gc.get_objects()
    return {
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in alive),
        "modules": sum(issubclass(type(one), nn.Module) for one in alive),
    }


def test_twenty_compressions_leave_no_memory_files_threads_or_hooks(tmp_path):
    compress_once(tmp_path, 3)  # a fit imports more than the others
    for number in range(RUNS):
        model = compress_once(tmp_path, number)
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]
        assert hooks == []
        del model, hooks
        if number + 1 == SETTLED:
            settled = what_is_held()
    last = what_is_held()
    assert last["memory"] <= 1.02 * settled["memory"]
    assert {key: last[key] - settled[key] for key in ("files", "threads", "tasks", "tensors", "modules")} == {
        "files": 0, "threads": 0, "tasks": 0, "tensors": 0, "modules": 0,
    }  # fmt: skip
