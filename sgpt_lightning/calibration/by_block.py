"""Perplexity one block at a time over all windows: for models whose blocks come to the device one at a time.

Each block is brought once for all batches, as in sequential calibration, and not once for each. The logits are those of
a forward of the whole model, to the last bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.hidden_states import Activations, HiddenStates
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.models.batches import forwards, model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.models.replay import BlockCall, BlockReplay, forwards_replaced


@torch.no_grad()
def add_batches(
    metric: Perplexity, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], activations: Activations = "auto"
) -> None:
    """Run a model on batches and add them to a perplexity.

    Args:
        metric: where they are added.
        model: a causal language model in eval mode.
        batches: `input_ids` int64 `[batch, time]` and, if there is padding, `attention_mask`, on the model's device;
            cut where their logits need it, see `forwards`.
        activations: where hidden states are between blocks.
    """
    blocks, placement, hidden = find_decoder_blocks(model).blocks, placement_of(model), HiddenStates(activations)
    replay = BlockReplay(model, blocks)
    parts: list[Mapping[str, Tensor]] = []
    calls: list[Sequence[BlockCall]] = []
    for batch in batches:
        for part in forwards(model, batch):
            entered, call = replay.prologue(part)
            hidden.put("", len(parts), entered)
            parts.append(part)
            calls.append(call)
    for block in range(len(blocks)):
        with placement.at_work(block):
            for index, call in enumerate(calls):
                entered = hidden.get("", index)
                hidden.prefetch("", (index + 1) % len(calls))
                hidden.put("", index, replay.run(block, entered, call[block]))
    replay.check()
    for index, cut in enumerate(parts):
        logits = _behind_blocks(model, blocks, cut, hidden.get("", index), replay.returns_tuple or [])
        metric.update(logits, cut["input_ids"], cut.get("attention_mask"))
    hidden.clear()


def _behind_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], part: Mapping[str, Tensor], left: Tensor, tuples: Sequence[bool]
) -> Tensor:
    """Return a model's logits `[batch, time, words]`, given what left its last block, `[batch, time, hidden]`."""
    called = iter(tuples)

    def stub(*args: Any, **kwargs: Any) -> Any:
        return (left, None) if next(called) else left

    with forwards_replaced(blocks, lambda forward: stub):
        return model(**model_inputs(part)).logits
