"""Perplexity one block at a time over all windows: for models whose blocks come to the device one at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.by_block import BATCHES, BatchesByBlock
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.models.batches import forwards


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
    text = BatchesByBlock(model, activations)
    for batch in batches:
        for part in forwards(model, batch):
            text.enter(part)
    for block in range(len(text.decoder.blocks)):
        text.carry(block)
    for index, entered in enumerate(text.parts):
        logits = text.logits(index, text.hidden.get(BATCHES, index))
        metric.update(logits, entered["input_ids"], entered.get("attention_mask"))
    text.clear()
