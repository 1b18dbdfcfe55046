"""From what a forecast has tried to what a run takes: seconds by batches and blocks, and bytes that come later."""

import math
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
    together: int | None,
) -> dict[str, dict[str, int]]:
    """Return the bytes that will come on top of what was tried, by tier and then by its name.

    Args:
        model: the model.
        probed: the batches that were tried.
        work: how much text there will be.
        plans: what is to be done to it.
        runs: bytes that are kept of an uncompressed block's run, a batch.
        together: batches of which gradients are taken together; None if there are none, or each is for itself.
    """
    names = ("gradients", "plan", "enter", "block", "again", "solve", "solve last")
    found: dict[str, dict[str, int]] = {tier: dict.fromkeys(names, 0) for tier in ("device", "cpu", "disk")}
    hidden = _hidden_bytes(model, probed[0])
    streams = 2 if any(plan.solve_parts.alpha > 0 for plan in plans.recipes.values()) else 1
    counts = dict.fromkeys(names[2:], streams if work.mode == "sequential" else 0)
    if together is not None:  # what enters every block is kept
        counts["gradients"] = len(plans.decoder.blocks) + 2
    device = probed[0]["input_ids"].device
    for what, of_each in counts.items():
        batches = min(work.batches, together) if what == "gradients" and together is not None else work.batches
        more = split_over_tiers(work.activations, device, hidden, of_each * batches)
        for tier, nbytes in more.items():
            found[tier][what] += nbytes if tier == "disk" else max(0, nbytes - len(probed) * of_each * hidden)
    # The uncompressed block's runs are gone when the last group is solved.
    for what in ("enter", "block", "again", "solve"):
        most = (min(KEPT_BYTES, runs * count) for count in (work.batches, len(probed)))
        found["device"][what] += max(0, next(most) - next(most))
    return found


def gradients_together(model: nn.Module, plans: Plans, batch: Mapping[str, Tensor]) -> int:
    """Return of how many batches like this one gradients are taken together, where blocks come one at a time."""
    kept = (len(plans.decoder.blocks) + 2) * _hidden_bytes(model, batch)
    return max(1, int(room_for_hidden(model) // max(1, kept)))


def seconds_by_part(
    meter: Meter, work: Workload, alike: float, probed: int, together: int | None, *, once_more: bool
) -> dict[str, float]:
    """Return seconds by part.

    Args:
        meter: what was tried; `fetch` is to bring the block that was tried last, where blocks come and go.
        work: how much text there will be.
        alike: as many blocks as that which was tried last are in the model.
        probed: batches that were tried.
        together: as for `bytes_later`.
        once_more: whether the batches pass the dense model once more for the plan over the model, where `together`.
    """
    gradients, again = (sum(meter.seconds.get(what, [])) for what in ("gradients", "again"))
    entered, fetch = meter.last("block") or meter.last("enter"), alike * meter.last("fetch")
    # Whatever runs block by block brings the model once more before: see `BlockReplay`.
    if "fetch" in meter.seconds:  # all batches pass a block that was brought once
        each = max(0.0, meter.last("evaluate") - 2 * fetch) / probed
        evaluate = work.evaluation_batches * each + (2 * fetch if work.evaluation_batches else 0.0)
    else:
        evaluate = work.evaluation_batches * meter.last("evaluate")
    if together is None:
        guided = work.batches * meter.last("gradients")
    else:
        each = max(0.0, gradients - (3 + once_more) * fetch) / probed
        guided = work.batches * each + (1 + 2 * math.ceil(work.batches / together) + once_more) * fetch
    return {
        "evaluate": 2 * evaluate,
        "gradients": guided + sum(meter.seconds.get("plan", [])) + meter.last("embeddings"),
        "calibrate": work.batches * (meter.last("enter") + (alike - 1) * entered + alike * again / probed) + 2 * fetch,
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
