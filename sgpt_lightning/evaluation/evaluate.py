"""Perplexity of a model on windows, in one call and without Lightning."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.guards import evaluation_mode
from sgpt_lightning.models.batches import forwards, model_inputs, windows_per_batch


def add_batch(metric: Perplexity, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run a model on a batch and add it to a perplexity; nothing is read from the device.

    Args:
        metric: where it is added.
        model: a causal language model in eval mode.
        batch: `input_ids` int64 `[batch, time]` and, if there is padding, `attention_mask`; in as many forwards as
            their logits need, see `forwards`.
    """
    for part in forwards(model, batch):
        metric.update(model(**model_inputs(part)).logits, part["input_ids"], part.get("attention_mask"))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch_size: int | None = None) -> float:
    """Measure a causal language model on windows of equal length; dropout is off meanwhile.

    A figure means something only beside the protocol of its windows, see `text/windows.py`, and the model's dtype.

    Args:
        model: any causal language model of transformers.
        windows: token ids, int64 `[windows, time]`, on any device.
        batch_size: windows in a batch; it changes the result by rounding only. None takes as many as there are in
            2,048 tokens, one at least.

    Returns:
        exp of the mean cross-entropy of all tokens but the first of each window.

    Raises:
        ValueError: `windows` is not two-dimensional or holds nothing to predict.
    """
    if windows.dim() != 2 or len(windows) == 0:
        raise ValueError(f"windows must be [windows, time] with at least one window, got shape {list(windows.shape)}")
    device = next(model.parameters()).device
    metric = Perplexity().to(device)
    with evaluation_mode(model):
        for batch in windows.to(device).split(batch_size or windows_per_batch(windows.shape[1])):
            add_batch(metric, model, {"input_ids": batch})
    return float(metric.compute())
