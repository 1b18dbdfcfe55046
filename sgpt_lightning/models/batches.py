"""A batch of tokens: how a model is called with it, which tokens are real, and how many windows one forward takes.

A batch is a mapping with `input_ids`, int64 `[batch, time]`, and, where there is padding, an `attention_mask` of the
same shape. On a GPU a value that the host reads stops both until all queued work is done, so a mask that hides nothing
is best left out before a batch goes there. Of the functions here only `real_tokens` reads one, and only of a mask.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS_PER_BATCH = 2048
"""Tokens of a batch where nothing else is asked for. On one core opt-mini takes as long with 512 to 2,048 of them, and
with 4,096 and 8,192 tokens 12 % and 23 % longer for perplexity and a peak of 2.1 and 3.3 GB instead of 1.6 GB."""
LOGIT_BYTES = 2**29
"""What the logits of one forward may take, in float32: 2,669 tokens of OPT's 50,272 words. One window always runs."""


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of a forward without cache.

    A window that is padding as a whole is shown to the model unmasked, since attention without any key is NaN.

    Args:
        batch: `input_ids` int64 `[batch, time]` and, if there is padding, `attention_mask` of the same shape.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    mask = batch.get("attention_mask")
    if mask is not None:
        mask = mask.bool()
        inputs["attention_mask"] = (mask | ~mask.any(1, keepdim=True)).long()
    return inputs


def real_tokens(batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Return a batch without a mask that hides nothing, and which tokens are real.

    Args:
        batch: `input_ids` `[batch, time]` and optionally `attention_mask`, of which values are read.

    Returns:
        The batch, and the positions of real tokens among all, int64 `[tokens]`; None if all are.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch, None
    positions = mask.reshape(-1).nonzero().squeeze(1)
    if len(positions) < mask.numel():
        return batch, positions
    return {name: value for name, value in batch.items() if name != "attention_mask"}, None


def windows_per_batch(time: int, tokens: int = TOKENS_PER_BATCH) -> int:
    """Return how many windows of `time` tokens a budget of `tokens` allows: one at least."""
    return max(1, tokens // time)


def forwards(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Split a batch into parts whose logits fit into `LOGIT_BYTES`; a window is never cut.

    Args:
        model: a causal language model; a config that does not say `vocab_size` leaves the batch whole.
        batch: `input_ids` `[batch, time]` and optionally `attention_mask`; other keys are left out.
    """
    windows, time = batch["input_ids"].shape
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if words is not None:
        windows = windows_per_batch(time, LOGIT_BYTES // (words * torch.float32.itemsize))
    tensors = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    for start in range(0, len(batch["input_ids"]), windows):
        yield {name: value[start : start + windows] for name, value in tensors.items()}
