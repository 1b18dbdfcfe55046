"""Kill runs with SIGKILL, at random moments and at the worst ones, let each go on, and count the bytes that differ.

    python scripts/kill_and_resume.py --kills 40
    python scripts/kill_and_resume.py --kills 40 --model ../shared/models/opt-small --runs coded

A run is a process of its own: `Trainer.fit` with the callback and a `LastCheckpoint`, and every time but the first
`ckpt_path="last"`. It is killed until it ends before its turn to be killed comes; then the next one begins. What it has
written must be what a run writes that nobody kills, byte for byte (of the manifest, all but seconds). Before the random
kills, each run is killed once in the middle of calibrating, of solving, of writing a checkpoint, of writing the model,
and between the two renames that put it in its place.

Processes are forked from this one, which has imported everything and computed nothing: a new interpreter would spend
most of its life on imports. The model is a random one with three blocks, a run takes about a second.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, OPTConfig

from sgpt_lightning.calibration import collector, solving
from sgpt_lightning.checkpoint import save
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.format import directory
from sgpt_lightning.format.manifest import MANIFEST
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table
from sgpt_lightning.trainer import checkpoint_io
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule

RUNS: dict[str, tuple[Recipe, Any]] = {
    "coded": (Recipe(coding="entropy", target_bits_per_weight=4.0, embedding_bits=5.0), "sequential"),
    "fixed": (Recipe(sparsity=0.5, target_avg_bits=4.0), "sequential"),
    "one-shot": (Recipe(coding="entropy", target_bits_per_weight=4.0), "one-shot"),
}
MOMENTS: dict[str, tuple[Any, str]] = {
    "calibrating": (collector.InputCollector, "_add"),
    "solving": (solving, "set_weight_matrix"),
    "writing a checkpoint": (checkpoint_io.torch, "save"),
    "writing the model": (save, "_verify"),
    "replacing the model": (directory.os, "rename"),
}
"""Where a run is in the middle of something: a function that it calls, by the name of what it is about."""
VOCABULARY, LAYERS, TOKENS = 128, 3, 24


def die(*_: Any) -> NoReturn:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def deadly(original: Callable[..., Any], nth: int) -> Callable[..., Any]:
    """Return a function that does the same, and kills the process in its call number `nth`, counted from 1."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < nth:
            return original(*args, **kwargs)
        if original is torch.save:
            args[1].write(b"half of a checkpoint" * 1000)  # torch writes in many pieces
            args[1].flush()
        return die()

    return call


def make_model() -> torch.nn.Module:
    """Return a random OPT of three blocks, always the same."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class _Windows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index]}


def fit(root: Path, name: str, model: str | None, ckpt_path: str | None) -> None:
    """Run a fit in this process; its files go under `root`."""
    recipe, mode = RUNS[name]
    network: Any = make_model() if model is None else load_model(model)
    words = network.config.vocab_size
    tokens = torch.randint(3, words, (16, TOKENS), generator=torch.Generator().manual_seed(1))
    calibration, evaluation = (DataLoader(_Windows(part), batch_size=4) for part in (tokens[:12], tokens[12:]))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseGPTCallback(recipe, mode, save_dir=str(root / "model")), LastCheckpoint()],
    )
    trainer.fit(CausalLMModule.from_model(network), calibration, evaluation, ckpt_path=ckpt_path)


def forked(root: Path, work: Callable[[], None]) -> int:
    """Start a process that does some work and return its id; what it prints goes to `log` under `root`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with (root / "log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            os.dup2(log.fileno(), 2)
            work()
            (root / "modules").write_text("\n".join(sys.modules))
        status = 0
    finally:
        os._exit(status)


def import_all(names: list[str]) -> None:
    """Import what a run has imported, so that the next ones need not."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):
                import_module(name)


class Run:
    """One run, of as many processes as it takes.

    Args:
        root: an empty directory.
        name: which of `RUNS`.
        model: directory of the model; None for the random one.
    """

    def __init__(self, root: Path, name: str, model: str | None) -> None:
        self.root, self.name, self.model = root, name, model
        self.seconds = 0.0
        """That the last process took."""

    def go(self, seconds: float | None = None, moment: str | None = None, nth: int = 1) -> bool:
        """Begin the run or go on with it, in a new process; tell whether it came to its end.

        Args:
            seconds: when to kill the process; None for never.
            moment: of `MOMENTS`, at the call of which the process kills itself.
            nth: the number of that call, counted from 1.

        Raises:
            RuntimeError: the process failed by itself; holds what it printed.
        """
        kept = self.root / "checkpoints" / "last.ckpt"
        path = "last" if kept.exists() else None

        def work() -> None:
            with contextlib.ExitStack() as stack:
                if moment is not None:
                    owner, attribute = MOMENTS[moment]
                    replaced = deadly(getattr(owner, attribute), nth)
                    if isinstance(owner, type):  # a method: the calls of all instances count
                        stack.enter_context(mock.patch.object(owner, attribute, lambda *args: replaced(*args)))
                    else:
                        stack.enter_context(mock.patch.object(owner, attribute, replaced))
                fit(self.root, self.name, self.model, path)

        started = time.monotonic()
        pid = forked(self.root, work)
        ended = _wait(pid, seconds)
        self.seconds = time.monotonic() - started
        if ended is None:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL:
            return False
        if os.waitstatus_to_exitcode(ended):
            raise RuntimeError(f"the run failed: {(self.root / 'log').read_text()[-3000:]}")
        return True

    def written(self) -> dict[str, bytes]:
        """Return what the run wrote, by name of the file; of the manifest what does not tell the time."""
        files = {path.name: path.read_bytes() for path in (self.root / "model").iterdir()}
        manifest = json.loads(files[MANIFEST])
        del manifest["run"]["seconds"], manifest["sha256"]
        return files | {MANIFEST: json.dumps(manifest).encode()}


def _wait(pid: int, seconds: float | None) -> int | None:
    """Return how a process ended; None if it has not after so many seconds."""
    if seconds is None:
        return os.waitpid(pid, 0)[1]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    return None


def bytes_that_differ(one: dict[str, bytes], other: dict[str, bytes]) -> int:
    """Count bytes at which files differ; those of a file that only one of them has, or of its longer end, count."""
    total = 0
    for name in {*one, *other}:
        mine, its = one.get(name, b""), other.get(name, b"")
        total += abs(len(mine) - len(its)) + sum(a != b for a, b in zip(mine, its, strict=False))
    return total


def main() -> None:
    """Kill, go on, compare, print a table; the exit status is 1 if a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="kills at random moments, of all runs together")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--moments", nargs="*", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--model", help="directory of a model; a random one is made if there is none")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(arguments.seed)
    rows, differing = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for position, name in enumerate(arguments.runs):

            def new(what: str, name: str = name) -> Run:
                root = Path(scratch) / f"{name}-{what}"
                root.mkdir()
                return Run(root, name, arguments.model)

            whole = new("whole")
            assert whole.go()
            import_all((whole.root / "modules").read_text().split("\n"))
            took = whole.seconds
            share = arguments.kills // len(arguments.runs) + (position < arguments.kills % len(arguments.runs))
            kills, complete, differ = _kill_one(new("moments"), whole, arguments.moments), 1, 0
            differ += kills.pop("differ")
            while kills["random"] < share:
                run, killed = new(f"random-{complete}"), 0
                while kills["random"] < share and not run.go(seconds=dice.random() * took):
                    kills["random"] += 1
                    killed += 1
                if not killed:
                    took = run.seconds  # imports are done, and other work may have begun or ended
                if kills["random"] >= share and not (run.root / "model").exists():
                    assert run.go()
                differ += bytes_that_differ(run.written(), whole.written())
                complete += 1
            rows.append((name, str(kills.total()), str(kills["random"]), str(complete), f"{took:.1f}", str(differ)))
            differing += differ
    print(format_table(("run", "kills", "at random", "runs", "seconds of one", "bytes that differ"), rows))
    sys.exit(differing > 0)


def _kill_one(run: Run, whole: Run, moments: list[str]) -> Counter[str]:
    """Kill a run at each moment in turn and let it end; count the kills, and under `differ` the bytes that do."""
    kills: Counter[str] = Counter({"random": 0})
    ended = False
    for moment in moments:
        # In the first block, not in the first linear; at the second checkpoint, so that there is one; else at once.
        nth = {"calibrating": 30, "solving": 3, "writing a checkpoint": 2}.get(moment, 1)
        ended = ended or run.go(moment=moment, nth=nth)
        kills[moment] += not ended
    assert ended or run.go()
    kills["differ"] = bytes_that_differ(run.written(), whole.written())
    return kills


if __name__ == "__main__":
    main()
