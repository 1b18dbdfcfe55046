"""What a compression will take, before it is run: memory on the device, on the CPU and on disk, bytes, and time.

Nothing is estimated that can be tried out: the dense model is run on a batch, the gradients (where the recipe uses
them) on the first batches, and the first block is calibrated, solved and packed, all by the code that does it in
earnest, while the most memory that is held is noted. From there it is multiplication: hidden states by batches, results
by blocks, seconds by both. The block is then what it was before.

Left out: what libraries, loggers and a Trainer take. On the CPU memory is that of the whole process, others' included.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings
from sgpt_lightning.calibration.hidden_states import Activations, split_over_tiers
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.schedules import Mode, calibration_for
from sgpt_lightning.calibration.sequential import KEPT_BYTES, SequentialCalibration
from sgpt_lightning.calibration.stages import Calibration
from sgpt_lightning.checkpoint.contents import unpacked_contents
from sgpt_lightning.evaluation.evaluate import add_batch
from sgpt_lightning.evaluation.peak_memory import peak_memory, return_free_memory
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.blocks import unmark_compressed
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.recipe import Recipe

PROBED = 2
"""Batches that are run."""
CARRIED = 0.5
"""What carrying a batch through a block takes, of what observing it there does."""


@dataclass(frozen=True)
class Workload:
    """How much text a compression is to be run on."""

    batches: int
    """Of calibration, all as large as those that are tried."""
    evaluation_batches: int = 0
    """Of the same size, for each perplexity; there are two."""
    mode: Mode = "sequential"
    activations: Activations = "auto"
    tf32_moments: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a compression is expected to take."""

    device: str
    """Of the model: `cuda:0`, `cpu`."""
    device_bytes: int | None
    """Most memory on the device, the model's included; None where that is the CPU's and the system does not tell."""
    cpu_bytes: int | None
    """Most memory of the process; None where the system does not tell."""
    disk_bytes: int
    """Hidden states on disk, and the compressed model while it is written."""
    result_bytes: int
    """Of the compressed model's weights."""
    seconds: float
    """Of the whole, without reading the model and the text."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part."""

    def lines(self) -> str:
        """Return it for people."""
        device = [] if self.device == "cpu" else [(f"peak memory on {self.device}", _shown(self.device_bytes))]
        rows = [
            *device,
            ("peak memory of the process", _shown(self.cpu_bytes)),
            ("disk", _shown(self.disk_bytes)),
            ("compressed weights", _shown(self.result_bytes)),
            ("time", f"{self.seconds:,.0f} s ({', '.join(f'{k} {v:,.0f} s' for k, v in self.parts.items())})"),
        ]
        return "\n".join(f"{name:<28} {value}" for name, value in rows)


def _shown(nbytes: int | None) -> str:
    return "not known here" if nbytes is None else f"{nbytes / 1e6:,.1f} MB"


class _Meter:
    """Most memory and time of what is tried, by its name; on the device and of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.most: dict[str, dict[str, int | None]] = {}

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Measure the body; memory is the most of all bodies of the name."""
        self._settle()
        started = time.perf_counter()
        with peak_memory("cpu") as host, peak_memory(self.device) as device:
            yield
            self._wait()
        self.seconds.setdefault(what, []).append(time.perf_counter() - started)
        found = {"cpu": host.nbytes, self.device.type: device.nbytes}
        before = self.most.get(what, {})
        self.most[what] = {k: _most(before.get(k), v) if k in before else v for k, v in found.items()}

    def _settle(self) -> None:
        """Wait for the device, and give the system back what is free: else what was tried before would count twice."""
        self._wait()
        return_free_memory()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, kind: str, extra: Mapping[str, int]) -> int | None:
        """Return the most of all that was tried, each with bytes that will come on top of it."""
        found = [(most[kind], extra.get(what, 0)) for what, most in self.most.items()]
        return None if None in dict(found) else max((value or 0) + more for value, more in found)


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


def forecast(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
    work: Workload,
    *,
    storage_dtype: torch.dtype | None = None,
) -> Forecast:
    """Say what `compress` would take, after trying its parts once; the model stays as it is.

    Args:
        model: as for `compress`.
        batches: the first of the calibration batches, `PROBED` at most are run.
        recipe: what would be done.
        work: how many batches there are, and how they would be calibrated on.
        storage_dtype: as for `compress`.

    Raises:
        ValueError, TypeError: what `compress` would raise.
    """
    probed = list(batches)[:PROBED]
    for index, batch in enumerate(probed):
        check_batch(model, batch, f"calibration batch {index}")
    if not probed:
        raise ValueError("batches must hold at least one batch, got none")
    storage_dtype = storage_dtype or next(model.parameters()).dtype
    device = probed[0]["input_ids"].device
    meter = _Meter(device)
    with evaluation_mode(model):
        metric = Perplexity().to(device)
        for _ in range(2):  # the first takes what libraries keep
            with meter.trying("evaluate"), torch.no_grad():
                add_batch(metric, model, probed[0])
        tier = _tier_of(work.activations)
        calibration = calibration_for(work.mode, model, recipe, storage_dtype, work.tf32_moments, activations=tier)
        blocks = range(len(calibration.plans.decoder.blocks)) if work.mode == "one-shot" else range(1)
        with _undone(model, [f"{calibration.plans.decoder.name(block)}." for block in blocks]):
            return _try(calibration, model, probed, work, meter, storage_dtype)


def _tier_of(activations: Activations) -> Activations:
    """Return where the few batches that are tried are kept: `auto` would find room for them on the device."""
    return "device" if activations == "auto" else activations


def _try(
    calibration: Calibration,
    model: nn.Module,
    probed: Sequence[Mapping[str, Tensor]],
    work: Workload,
    meter: _Meter,
    storage_dtype: torch.dtype,
) -> Forecast:
    counts = TokenCounts()
    for batch in probed:
        counts.add(batch)
    plans = calibration.plans
    with meter.trying("embeddings"):
        embeddings = code_embeddings(model, plans, counts)
    solved: dict[str, SolvedLinear] = {}
    blocks = len(plans.decoder.blocks)
    for epoch, stage in enumerate(calibration.stages):
        name = "block" if stage.blocks else "gradients"
        for index, batch in enumerate(probed):
            with meter.trying(name):
                calibration.observe(epoch, index, batch)
        runs = _dense_runs(calibration)
        with meter.trying(f"solve {name}"):
            solved |= calibration.finish(epoch)
        if stage.blocks:
            break
    streams = 2 if any(plan.solve_parts.alpha > 0 for plan in plans.recipes.values()) else 1
    hidden = _hidden_bytes(model, probed[0]) if work.mode == "sequential" else 0
    share = 1.0 if work.mode == "one-shot" else _share_of_first(plans.linears, blocks)
    budget = calibration.plans.budget.state()["bits"]  # what is entropy-coded meets it, whatever the first block took
    packed = sum(linear.packed.nbytes for name, linear in solved.items() if name not in budget) / share
    packed += sum(budget.values()) / 8 + sum(table.packed.nbytes for table in embeddings.values())
    result = int(packed) + _rest_bytes(model, calibration.plans, storage_dtype)
    tiers = split_over_tiers(work.activations, meter.device, hidden, streams * work.batches)
    left_out = {tier: max(0, nbytes - len(probed) * streams * hidden) for tier, nbytes in tiers.items()}
    runs_more = max(0, min(KEPT_BYTES, runs * work.batches) - min(KEPT_BYTES, runs * len(probed)))
    # The uncompressed block's runs are gone when the last group is solved, which is where most memory is held.
    later = {"block": runs_more, "solve block": 0}
    seconds = _seconds(meter, work, share, groups=len(calibration.stages[epoch].groups))
    if meter.device.type == "cuda":
        on_device = meter.peak("cuda", {name: more + left_out["device"] for name, more in later.items()})
        on_cpu = meter.peak("cpu", dict.fromkeys(later, left_out["cpu"] + int(packed)))
    else:
        held = left_out["device"] + left_out["cpu"] + int(packed)
        on_device = on_cpu = meter.peak("cpu", {name: more + held for name, more in later.items()})
    return Forecast(
        str(meter.device), on_device, on_cpu, tiers["disk"] + result, result, sum(seconds.values()), seconds
    )


def _rest_bytes(model: nn.Module, plans: Plans, storage_dtype: torch.dtype) -> int:
    """Return the bytes of what is stored beside packed weights; biases that take over an error are rounded."""
    rest, _ = unpacked_contents(model, {*plans.recipes, *plans.embeddings}, storage_dtype)
    total = 0
    for name, tensor in rest.items():
        owner, _, leaf = name.rpartition(".")
        rounded = leaf == "bias" and owner in plans.recipes and plans.recipes[owner].solve_parts.centre
        item = min(tensor.dtype.itemsize, storage_dtype.itemsize) if rounded else tensor.dtype.itemsize
        total += math.prod(tensor.shape) * item
    return total


def _seconds(meter: _Meter, work: Workload, share: float, groups: int) -> dict[str, float]:
    """Return seconds by part; the last of what was tried several times counts, the first takes what is done once.

    A block runs on the batches once for each group of linears, the first time while it is observed, and once more to
    carry them on, which takes about half of that: nothing is watched, and there is no uncompressed block beside.
    """

    def last(what: str) -> float:
        return meter.seconds.get(what, [0.0])[-1]

    return {
        "evaluate": 2 * work.evaluation_batches * last("evaluate"),
        "gradients": work.batches * last("gradients") + last("solve gradients") + last("embeddings"),
        "calibrate": work.batches * last("block") * (groups + CARRIED) / share,
        "solve": max(last("solve block") - PROBED * (groups - 1) * last("block"), 0.0) / share,
    }


def _share_of_first(linears: Callable[[int | None], Mapping[str, nn.Module]], blocks: int) -> float:
    """Return the part of all weights that are to be solved that the first block has."""
    counts = [sum(weight_matrix(linear).numel() for linear in linears(block).values()) for block in range(blocks)]
    return counts[0] / sum(counts) if counts[0] else 1 / blocks


def _hidden_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the bytes of the hidden state of one batch."""
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or 0
    return batch["input_ids"].numel() * width * next(model.parameters()).element_size()


def _dense_runs(calibration: Calibration) -> int:
    """Return the bytes that are kept of the uncompressed block's run, a batch."""
    inner = getattr(calibration, "_next", calibration)
    if not isinstance(inner, SequentialCalibration) or not inner._dense_runs:
        return 0
    return max(run.nbytes for run in inner._dense_runs.values())


@contextmanager
def _undone(model: nn.Module, prefixes: Sequence[str]) -> Iterator[None]:
    """Give a model's blocks, by the beginnings of their names, their weights back, and take the mark away."""

    def weights() -> dict[str, Tensor]:
        state = model.state_dict().items()
        return {name: value for name, value in state if name.startswith(tuple(prefixes)) and not value.is_meta}

    kept = {name: tensor.to("cpu", copy=True) for name, tensor in weights().items()}
    try:
        yield
    finally:
        placement_of(model).forget()
        with torch.no_grad():
            for name, tensor in weights().items():
                tensor.copy_(kept[name])
        unmark_compressed(model)
