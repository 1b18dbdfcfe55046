"""The state of a run that was stopped: what a Lightning checkpoint holds of it, and whether another run may go on.

A checkpoint stands at the end of a stage (a block, or the gradients), whatever Lightning's loops had come to: what was
solved, packed as it will be stored, the biases, the plans, perplexities and settings. Weights of the model are not in
it: they are those of the dense model, of which it holds a digest. All of it is tensors and one text in JSON, so it is
read by torch's loading of weights only, and a setting that a command line has restricted is a plain number again.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sgpt_lightning.calibration.progress import PlanState, Progress
from sgpt_lightning.calibration.ranks import ALONE, Ranks
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.records import LinearReport, SolvedLinear
from sgpt_lightning.models.batches import real_tokens
from sgpt_lightning.models.identity import config_digest, weights_digest
from sgpt_lightning.report.run import versions
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.offload import on_device
from sgpt_lightning.trainer.protocols import text_protocols

VERSION = 2
"""Of the checkpoint's own part; another one is refused."""
_NO_STATE = "holds no state of a compression: a fit goes on from a checkpoint of a run of SparseGPTCallback only"
_UNNAMED = ("tokenizer",)
"""What a protocol says that may change: where the tokenizer was found; what it made of the text is compared."""


@dataclass(frozen=True)
class RunState:
    """How far a run has come. It is replaced at the end of a stage, as a whole; only measurements come in between."""

    settings: Mapping[str, Any]
    """What must not change until the run is complete, plain JSON values by name; see `run_settings`."""
    place: Mapping[str, Any] = field(default_factory=dict)
    """What decides the last bits of a result, by name; see `run_place`."""
    finished: int = 0
    """Stages that have ended."""
    label: str = ""
    """The last of them, for people."""
    solved: Mapping[str, SolvedLinear] = field(default_factory=dict)
    """What is stored of linears, and when all have been solved of embeddings too, by full name."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Biases of solved linears, `[out_features]`, on the CPU."""
    embeddings: Mapping[str, SolvedLinear] = field(default_factory=dict)
    """Embeddings that will be written with the last stage, by full name."""
    plans: PlanState | None = None
    """As they were when the stage ended; None before the first has."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """The calibration batches: see `BatchDigest.summary`."""
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    """By state of the model, then by data set."""
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "solve": 0.0, "evaluate": 0.0})
    """By what they were spent on."""
    block_seconds: tuple[float, ...] = ()
    """Of each block that was solved."""
    error: float | None = None
    """Mean relative error of the block before."""
    target: str | None = None
    """Where the model was written; then the run is complete."""

    def progress(self) -> Progress:
        """Return what the calibration goes on from; at least one stage has ended."""
        assert self.plans is not None
        return Progress(self.finished, int(self.text["batches"]), self.solved, self.biases, self.plans)

    def to_checkpoint(self) -> dict[str, Any]:
        """Return what `from_checkpoint` reads: tensors, and JSON in one text; of a complete run that it is complete."""
        if self.target is not None:
            return {"version": VERSION, "record": json.dumps({"target": self.target, "settings": self.settings})}
        stored = {**self.embeddings, **self.solved}
        plain = ("settings", "place", "finished", "label", "text", "perplexity", "seconds", "block_seconds", "error")
        record: dict[str, Any] = {name: getattr(self, name) for name in plain}
        record |= {
            "stored": {n: {"spec": s.packed.spec.to_dict(), "report": s.report.to_dict()} for n, s in stored.items()},
            "solved": list(self.solved),
            "embeddings": list(self.embeddings),
            "plans": None if self.plans is None else {"recipes": self.plans.recipes, "budget": self.plans.budget},
        }
        return {
            "version": VERSION,
            "record": json.dumps(record),
            "weights": {name: _own(linear.packed.tensors) for name, linear in stored.items()},
            "biases": _own(self.biases),
            "row_weights": _own(self.plans.row_weights if self.plans else {}),
        }

    @classmethod
    def from_checkpoint(cls, values: Any, path: str) -> "RunState":
        """Read what `to_checkpoint` gave.

        Raises:
            ValueError: it is something else, or of another version; names the path.
        """
        if not isinstance(values, dict) or "record" not in values:
            raise ValueError(f"{path} {_NO_STATE}")
        if values.get("version") != VERSION:
            raise ValueError(
                f"{path} is of version {values.get('version')!r} of run states, this package reads {VERSION}: finish "
                "the run with the package that began it, or leave ckpt_path out to begin again"
            )
        record = json.loads(values["record"])
        if "target" in record:
            return cls(record["settings"], target=record["target"])
        stored = {
            name: SolvedLinear(
                PackedWeight(WeightSpec.from_dict(entry["spec"]), values["weights"][name]),
                LinearReport.from_dict(entry["report"]),
            )
            for name, entry in record.pop("stored").items()
        }
        plans, solved, embeddings = (record.pop(key) for key in ("plans", "solved", "embeddings"))
        return cls(
            **record | {"block_seconds": tuple(record["block_seconds"])},
            solved={name: stored[name] for name in solved},
            embeddings={name: stored[name] for name in embeddings},
            biases=values["biases"],
            plans=None if plans is None else PlanState(plans["recipes"], plans["budget"], values["row_weights"]),
        )


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what they are views of: torch stores that with them."""
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }


class BatchDigest:
    """The calibration batches in short: how many, of which shape, how much text, and a hash of it."""

    def __init__(self) -> None:
        self.windows = 0
        """Windows of the text; padding is not counted."""
        self.tokens = 0
        self._hash = hashlib.sha256()
        self._batches = 0
        self._shape: list[int] = []

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Add a batch: `input_ids` `[batch, time]`, and where `attention_mask` hides something the mask."""
        shown, _ = real_tokens(batch)
        ids, mask = shown["input_ids"], shown.get("attention_mask")
        self._shape = self._shape or list(ids.shape)
        self._batches += 1
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.windows += int(real.any(1).sum())
        self.tokens += int(real.sum())
        self._hash.update(repr(list(ids.shape)).encode() + ids.long().cpu().contiguous().numpy().tobytes())
        if mask is not None:
            self._hash.update(mask.bool().cpu().contiguous().numpy().tobytes())

    def summary(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Return plain JSON values: `batches`, `shape` of the first, `windows` and `tokens` of all, and `sha256`.

        Windows and tokens are those of all processes together, and so is the hash; each has as many batches.
        """
        every = ranks.gather((self.windows, self.tokens, self._hash.hexdigest()))
        windows, tokens, hashes = zip(*every, strict=True)
        digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        counts = {"batches": self._batches, "windows": sum(windows), "tokens": sum(tokens)}
        return counts | {"shape": self._shape, "sha256": digest}


def run_settings(trainer: Trainer, pl_module: CausalLMModule, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the result of a run, plain JSON values by the names of the settings.

    Args:
        trainer: with its data set up.
        pl_module: with its model loaded and dense.
        own: settings of the callback.
    """
    network = pl_module.network
    assert network is not None
    model = {
        "config": config_digest(getattr(network, "config", None)),
        "weights": weights_digest(network),
        "dtype": str(next(network.parameters()).dtype),
        "storage_dtype": str(pl_module.storage_dtype),
        "attn_implementation": getattr(getattr(network, "config", None), "_attn_implementation", None),
        "seq_len": pl_module.seq_len,
    }
    calibration, evaluation = text_protocols(trainer)
    named = {"model": model, "sgpt": own, "data.calibration": calibration}
    named |= {f"data.evaluation.{name}": protocol for name, protocol in evaluation.items()}
    flat = {f"{group}.{name}": value for group, values in named.items() for name, value in values.items()}
    if trainer.world_size > 1:
        flat["trainer.processes"] = trainer.world_size  # windows are dealt out to them
    kept = {name: value for name, value in flat.items() if name.rpartition(".")[2] not in _UNNAMED}
    return json.loads(json.dumps(kept))


def run_place(trainer: Trainer) -> dict[str, Any]:
    """Return what may change, though not without changing the last bits of a result: kind of device, versions."""
    device = trainer.strategy.root_device.type
    threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
    return {"device": device, **threads, **versions()}


def begin(trainer: Trainer, settings: Mapping[str, Any], resumed: RunState | None) -> RunState:
    """Return the state with which a run of these settings begins, or goes on from the Trainer's checkpoint.

    Warns if the checkpoint is of another run that is complete, and if it goes on in another place: then its files may
    differ from those of a run that was not stopped.

    Raises:
        ValueError: there is a checkpoint, but no state in it, or of a run that is complete, or that had other settings.
    """
    if trainer.ckpt_path is None:
        return RunState(settings, run_place(trainer))
    if resumed is None:
        raise ValueError(f"{trainer.ckpt_path} {_NO_STATE}")
    if resumed.target is not None and resumed.settings != settings:
        warnings.warn(f"the run of {trainer.ckpt_path} is complete and was another one: this one begins", stacklevel=2)
        return RunState(settings, run_place(trainer))
    if resumed.target is not None:
        raise ValueError(
            f"the run of {trainer.ckpt_path} is complete, and its model was written to {resumed.target}. Leave "
            "ckpt_path out to begin another"
        )
    check_same(resumed.settings, settings, str(trainer.ckpt_path))
    place = run_place(trainer)
    if not resumed.finished:  # then nothing says on which batches embeddings were coded
        return RunState(settings, place, perplexity=resumed.perplexity, seconds=resumed.seconds)
    changed = [f"{name} was {resumed.place.get(name)}, is {value}" for name, value in place.items()]
    changed = [text for text, name in zip(changed, place, strict=True) if resumed.place.get(name) != place[name]]
    if changed:
        warnings.warn(
            f"the run goes on in another place than it was begun in ({', '.join(changed)}): its files may differ in "
            "their last bits from those of a run that was not stopped",
            stacklevel=2,
        )
    return resumed


def check_same(was: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Compare settings with those of a checkpoint.

    Raises:
        ValueError: they differ; every difference is named, with both values.
    """
    names = [name for name in {**was, **now} if was.get(name) != now.get(name) or (name in was) != (name in now)]
    if "model.dtype" in names and "model.weights" in names:
        names.remove("model.weights")  # the same ones are others in another dtype
    if names:
        changed = "\n  ".join(f"{name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in names)
        raise ValueError(
            f"the run of {path} cannot go on with other settings, model or data; set these back, or leave ckpt_path "
            f"out to begin again:\n  {changed}"
        )


def check_same_text(trainer: Trainer, was: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
    """Go through the calibration batches, and compare them with those of the run's beginning.

    Raises:
        ValueError: they are others.
    """
    digest = BatchDigest()
    for batch in _batches(trainer):
        digest.add(batch)
    prefix = "calibration batches"
    now = digest.summary(ranks)
    named = [{f"{prefix}, {name}": value for name, value in text.items()} for text in (was, now)]
    check_same(named[0], named[1], str(trainer.ckpt_path))


def batches_on_device(trainer: Trainer) -> Iterator[Mapping[str, Tensor]]:
    """Yield the calibration batches as `training_step` receives them."""
    for batch in _batches(trainer):
        yield on_device(trainer, batch)


def _batches(trainer: Trainer) -> Iterator[Mapping[str, Tensor]]:
    assert trainer.train_dataloader is not None
    yield from itertools.islice(trainer.train_dataloader, int(trainer.num_training_batches))


def pass_epochs(trainer: Trainer, epochs: int, text: Mapping[str, Any]) -> None:
    """Count epochs as if the Trainer had run them; `text` is a summary of their batches."""
    if epochs:
        steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for progress, number in ((trainer.fit_loop.epoch_progress, epochs), (steps, epochs * text["batches"])):
            for counts in (progress.total, progress.current):
                counts.load_state_dict({name: count + number for name, count in counts.state_dict().items()})
