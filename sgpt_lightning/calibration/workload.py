"""From what a forecast has tried to what a run takes: seconds by batches and blocks, and bytes that come later."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sgpt_lightning.calibration.gradients_by_block import room_for_hidden
from sgpt_lightning.calibration.hidden_states import Activations, split_over_tiers
from sgpt_lightning.calibration.meter import Meter
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.schedules import Mode
from sgpt_lightning.calibration.sequential import KEPT_BYTES
from sgpt_lightning.models.linears import weight_matrix

TRIED_BLOCKS = 2
"""Blocks that are solved."""


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


def bytes_later(
    model: nn.Module,
    probed: Sequence[Mapping[str, Tensor]],
    work: Workload,
    plans: Plans,
    runs: int,
    *,
    held_back: bool,
) -> dict[str, dict[str, int]]:
    """Return the bytes that will come on top of what was tried, by tier and then by its name.

    Args:
        model: the model.
        probed: the batches that were tried.
        work: how much text there will be.
        plans: what is to be done to it.
        runs: bytes that are kept of an uncompressed block's run, a batch.
        held_back: whether gradients are taken of several batches together.
    """
    names = ("gradients", "plan", "enter", "block", "again", "solve", "solve last")
    found: dict[str, dict[str, int]] = {tier: dict.fromkeys(names, 0) for tier in ("device", "cpu", "disk")}
    hidden = _hidden_bytes(model, probed[0])
    streams = 2 if any(plan.solve_parts.alpha > 0 for plan in plans.recipes.values()) else 1
    counts = dict.fromkeys(names[2:], streams if work.mode == "sequential" else 0)
    if held_back:  # what enters every block is kept of some batches
        counts["gradients"] = len(plans.decoder.blocks) + 2
    device = probed[0]["input_ids"].device
    for what, of_each in counts.items():
        batches = work.batches
        if what == "gradients":
            batches = min(batches, max(1, int(room_for_hidden(model) // max(1, hidden * of_each))))
        more = split_over_tiers(work.activations, device, hidden, of_each * batches)
        for tier, nbytes in more.items():
            found[tier][what] += nbytes if tier == "disk" else max(0, nbytes - len(probed) * of_each * hidden)
    # The uncompressed block's runs are gone when the last group is solved.
    for what in ("enter", "block", "again", "solve"):
        most = (min(KEPT_BYTES, runs * count) for count in (work.batches, len(probed)))
        found["device"][what] += max(0, next(most) - next(most))
    return found


def seconds_by_part(meter: Meter, work: Workload, alike: float, probed: int, *, held_back: bool) -> dict[str, float]:
    """Return seconds by part.

    Args:
        meter: what was tried.
        work: how much text there will be.
        alike: as many blocks as that which was tried last are in the model.
        probed: batches that were tried.
        held_back: whether gradients are taken of several batches together.
    """
    gradients, again = (meter.seconds.get(what, []) for what in ("gradients", "again"))
    each = sum(gradients) / probed if held_back else meter.last("gradients")
    entered = meter.last("block") or meter.last("enter")
    return {
        "evaluate": 2 * work.evaluation_batches * meter.last("evaluate"),
        "gradients": work.batches * each + sum(meter.seconds.get("plan", [])) + meter.last("embeddings"),
        "calibrate": work.batches * (meter.last("enter") + (alike - 1) * entered + alike * sum(again) / probed),
        "solve": alike * sum(sum(meter.seconds.get(what, [])) for what in ("solve", "solve last")),
    }


def blocks_alike(linears: Callable[[int | None], Mapping[str, nn.Module]], blocks: int) -> float:
    """Return how many blocks like the last of those that are tried the model has, by weights that are solved."""
    counts = [sum(weight_matrix(linear).numel() for linear in linears(block).values()) for block in range(blocks)]
    tried = counts[min(TRIED_BLOCKS, blocks) - 1]
    return sum(counts) / tried if tried else float(blocks)


def _hidden_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the bytes of the hidden state of one batch."""
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or 0
    return batch["input_ids"].numel() * width * next(model.parameters()).element_size()
