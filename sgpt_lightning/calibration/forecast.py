"""What a compression will take, before it is run: memory on the device, on the CPU and on disk, bytes, and time.

Nothing is estimated that can be tried out: the dense model is run on a batch, the gradients (where the recipe uses
them) on the first batches, and the first two blocks are calibrated, solved and packed, all by the code that does it in
earnest, while the most memory that is held is noted. From there it is multiplication: hidden states by batches, results
by blocks, seconds by both; of the seconds those of the second block, since the first takes what is done once, and of a
block's those that grow with the text apart from those that do not. The blocks are then what they were before.

Left out: what libraries, loggers and a Trainer take. On the CPU memory is that of the whole process, others' included.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings
from sgpt_lightning.calibration.file_size import beside_packed
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.meter import Meter
from sgpt_lightning.calibration.perplexity_by_block import add_batches
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.calibration.sequential import SequentialCalibration
from sgpt_lightning.calibration.stages import Calibration
from sgpt_lightning.calibration.workload import (
    TRIED_BLOCKS,
    Workload,
    blocks_alike,
    bytes_later,
    gradients_together,
    seconds_by_part,
)
from sgpt_lightning.evaluation.evaluate import add_batch
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.blocks import unmark_compressed
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.recipe import Recipe

PROBED = 2
"""Batches that are run."""


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
    meter = Meter(device)
    with evaluation_mode(model):
        if work.evaluation_batches:
            _try_evaluation(model, probed, meter)
        tier = _tier_of(work.activations)
        calibration = calibration_for(work.mode, model, recipe, storage_dtype, work.tf32_moments, activations=tier)
        decoder = calibration.plans.decoder
        tried = [f"{name}." for name in decoder.names[:TRIED_BLOCKS]]
        with _undone(model, tried, meter):
            return _try(calibration, model, probed, work, meter, storage_dtype)


def _try_evaluation(model: nn.Module, probed: Sequence[Mapping[str, Tensor]], meter: Meter) -> None:
    """Measure one batch twice, since the first takes what libraries keep; all of them where blocks come and go."""
    metric = Perplexity().to(meter.device)
    for shown in (probed[:1], probed if placement_of(model).moves else probed[:1]):
        meter.stage("evaluate")
        with torch.no_grad():
            if placement_of(model).moves:
                add_batches(metric, model, shown, "device")
            else:
                add_batch(metric, model, shown[0])
    meter.end()


def _tier_of(activations: Activations) -> Activations:
    """Return where the few batches that are tried are kept: `auto` would find room for them on the device."""
    return "device" if activations == "auto" else activations


def _try(
    calibration: Calibration,
    model: nn.Module,
    probed: Sequence[Mapping[str, Tensor]],
    work: Workload,
    meter: Meter,
    storage_dtype: torch.dtype,
) -> Forecast:
    plans = calibration.plans
    embeddings = _try_what_is_beside(model, plans, probed, meter)
    solved, runs = _try_stages(calibration, probed, meter)
    blocks = len(plans.decoder.blocks)
    alike = blocks_alike(plans.linears, blocks)
    budget = calibration.plans.budget.state()["bits"]  # what is entropy-coded meets it, whatever the first blocks took
    last = plans.linears(min(TRIED_BLOCKS, blocks) - 1)
    packed = alike * sum(solved[name].packed.nbytes for name in last if name not in budget)
    packed += sum(budget.values()) / 8 + sum(table.packed.nbytes for table in embeddings.values())
    result = int(packed) + sum(nbytes for *_, nbytes in beside_packed(model, calibration.plans, storage_dtype))
    held_back = "gradients" in meter.seconds and placement_of(model).moves
    together = gradients_together(model, plans, probed[0]) if held_back else None
    once_more = any(recipe.scope == "model" for recipe in plans.recipes.values())
    seconds = seconds_by_part(meter, work, alike, len(probed), together, once_more=once_more)
    later = bytes_later(model, probed, work, plans, runs, together)
    for what in ("solve", "solve last", "again", "block"):
        held = {**embeddings, **solved}.values()
        later["cpu"][what] += max(0, int(packed) - sum(one.packed.nbytes for one in held))
    if meter.device.type == "cuda":
        on_device, on_cpu = meter.peak("cuda", later["device"]), meter.peak("cpu", later["cpu"])
    else:
        both = {what: more + later["cpu"][what] for what, more in later["device"].items()}
        on_device = on_cpu = meter.peak("cpu", both)
    disk = max(later["disk"].values()) + result
    return Forecast(str(meter.device), on_device, on_cpu, disk, result, sum(seconds.values()), seconds)


def _try_what_is_beside(
    model: nn.Module, plans: Plans, probed: Sequence[Mapping[str, Tensor]], meter: Meter
) -> dict[str, SolvedLinear]:
    """Code embeddings, and bring a block where blocks come and go."""
    counts = TokenCounts()
    for batch in probed:
        counts.add(batch)
    meter.stage("embeddings")
    coded = code_embeddings(model, plans, counts)
    if placement_of(model).moves:
        meter.stage("fetch")
        with placement_of(model).at_work(min(TRIED_BLOCKS, len(plans.decoder.blocks)) - 1):
            meter.end()
    return coded


def _try_stages(
    calibration: Calibration, probed: Sequence[Mapping[str, Tensor]], meter: Meter
) -> tuple[dict[str, SolvedLinear], int]:
    """Run the stages that are tried; return what they solved, and what is kept of an uncompressed block's run, a batch.

    What is measured: `gradients` and `plan`; `enter` the first block, `block` and `again` for each batch, and `solve`,
    for the last group of a block `solve last`.
    """
    solved: dict[str, SolvedLinear] = {}
    runs, first = 0, True
    for epoch, stage in enumerate(calibration.stages):
        inner = getattr(calibration, "_next", calibration)
        if not stage.blocks:
            calibration.announce = meter.begin
        inner.announce = meter.begin
        for name in ("again", "solve", "solve last"):
            meter.seconds.pop(name, None)  # the last block counts
        what = "gradients" if not stage.blocks else "enter" if first else "block"
        for index, batch in enumerate(probed):
            (meter.begin if index else meter.stage)(what)
            calibration.observe(epoch, index, batch)
        runs = max(runs, _dense_runs(calibration))
        meter.begin("solve" if stage.blocks else "plan")
        solved |= calibration.finish(epoch)
        meter.end()
        first = first and not stage.blocks
        if stage.blocks >= TRIED_BLOCKS:
            break
    return solved, runs


def _dense_runs(calibration: Calibration) -> int:
    """Return the bytes that are kept of the uncompressed block's run, a batch."""
    inner = getattr(calibration, "_next", calibration)
    if not isinstance(inner, SequentialCalibration) or not inner._dense_runs:
        return 0
    return max(run.nbytes for run in inner._dense_runs.values())


@contextmanager
def _undone(model: nn.Module, prefixes: Sequence[str], meter: Meter) -> Iterator[None]:
    """Give a model's blocks, by the beginnings of their names, their weights back, and take the mark away."""

    def weights() -> dict[str, Tensor]:
        state = model.state_dict().items()
        return {name: value for name, value in state if name.startswith(tuple(prefixes)) and not value.is_meta}

    kept = {name: tensor.to("cpu", copy=True) for name, tensor in weights().items()}
    meter.aside = sum(tensor.nbytes for tensor in kept.values())
    try:
        yield
    finally:
        placement_of(model).forget()
        with torch.no_grad():
            for name, tensor in weights().items():
                tensor.copy_(kept[name])
        unmark_compressed(model)
