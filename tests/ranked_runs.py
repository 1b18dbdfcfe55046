"""Runs of several processes: what each of them does, and how they are started without importing all anew.

Every process is forked from one that has imported what takes long, and is told its rank as a launcher would.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback
from models_for_tests import make_model
from runs_for_tests import make_trainer

from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer import run as run_module
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ranked_runs", "transformers.models.opt.modeling_opt"])
SEQ_LEN = 64


@dataclass(frozen=True)
class Job:
    """One run."""

    root: Path
    mode: str = "sequential"
    recipe: dict[str, Any] = field(default_factory=dict)
    windows: int = 5
    trouble: str = ""
    """What goes wrong, see `_Trouble`."""
    ckpt_path: str | None = None

    @property
    def target(self) -> Path:
        """Where the compressed model goes."""
        return self.root / "compressed"


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    error: str = ""
    seconds: float = 0.0
    printed: str = ""
    digest: str = ""
    """Of all weights that the process ends with."""
    perplexity: dict[str, Any] = field(default_factory=dict)


def start(job: Job, size: int) -> dict[int, Ended]:
    """Run a job in `size` processes, and return how each rank ended; one that was killed is missing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = FORKS.SimpleQueue()
    processes = [FORKS.Process(target=_work, args=(job, rank, size, port, reports)) for rank in range(size)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # where the process that forks finds what it imports
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(60)
            assert not process.is_alive(), "a process hangs"
    finally:
        for process in processes:
            process.kill()
    ended = {}
    while not reports.empty():
        rank, report = reports.get()
        ended[rank] = report
    return ended


def _work(job: Job, rank: int, size: int, port: int, reports: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    printed, started = io.StringIO(), time.monotonic()

    def report(**found: Any) -> None:
        seconds = time.monotonic() - float(os.environ.get("WENT_WRONG", started))
        reports.put((rank, Ended(**found, seconds=seconds, printed=printed.getvalue())))

    with contextlib.redirect_stdout(printed):
        try:
            found = run(job, size)
        except BaseException as error:
            report(error=f"{type(error).__name__}: {error}")
            raise
    report(**found)


def run(job: Job, size: int = 1) -> dict[str, Any]:
    """Run a job in this process, which is one of `size`."""
    tokenizer = load_tokenizer("opt-mini")
    model = make_model("opt", vocab_size=len(tokenizer), max_position_embeddings=SEQ_LEN)
    callback = SparseGPTCallback(Recipe(**job.recipe), calibration=job.mode, save_dir=str(job.target))
    kept = LastCheckpoint(share=1.0)
    trainer = make_trainer(
        job.root,
        *([_trouble(job.trouble)] if job.trouble else []),
        callback,
        kept,
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        enable_checkpointing=True,
    )
    data = TextDataModule(seq_len=SEQ_LEN, num_samples=job.windows, eval_windows=5, batch_size=1)
    trainer.fit(CausalLMModule.from_model(model, tokenizer, SEQ_LEN), datamodule=data, ckpt_path=job.ckpt_path)
    return {"digest": digest(model), "perplexity": callback.state.perplexity}


def digest(model: Any) -> str:
    """Return a hash of all weights of a model."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def _trouble(kind: str) -> Any:
    """Return a callback that makes trouble on one rank, at the second batch of the second epoch."""

    class Trouble(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if kind == "NaN" and trainer.global_rank == 1:  # the model of this rank alone
                pl_module.network.model.decoder.embed_tokens.weight[5:] = torch.nan
            if kind == "disk full":

                def no_room(*_: Any, **__: Any) -> None:
                    raise OSError(28, "No space left on device")

                run_module.save_or_rescue = no_room

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) != (1, 1):
                return
            os.environ["WENT_WRONG"] = str(time.monotonic())
            if kind == "stop":
                raise KeyboardInterrupt
            if kind == f"rank {trainer.global_rank} is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if trainer.global_rank == 1 and kind == "raises":
                raise LookupError("a callback of the user fails")

    return Trouble()
