"""Perplexity as one number over all tokens: exp of summed next-token cross-entropy over counted tokens.

The function does the arithmetic, the metric only adds up, so that ranks and batches of any size give one figure.
`torchmetrics.text.Perplexity` is not used: it updates in place, which fails on validate -> fit -> validate because
Lightning validates in inference mode; it gives inf on fp16 logits; and it copies all logits several times.

Left out on purpose: how the text was made into windows (see `text/windows.py`), without which no perplexity means
anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torch.nn import Module

ROWS = 256
"""Logit rows held as fp32 at a time: 51 MB for OPT's vocabulary of 50,272."""


@torch.no_grad()
def next_token_nll(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of every token given those before it.

    The shift is made here: position t predicts token t + 1, so a window of 1,024 tokens has 1,023 targets. Entropies
    are fp32 whatever the dtype of the logits, and summed in float64. No value is read back from the device.

    Args:
        logits: `[batch, time, vocab]`, any floating dtype.
        tokens: `[batch, time]`, integers.
        mask: bool or 0/1 `[batch, time]`; a target counts when it and the position that predicts it are both
            unmasked. None counts all.

    Returns:
        The sum (float64 scalar, nats) and the number of targets counted (int64 scalar).

    Raises:
        ValueError: the shapes do not fit together.
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be [batch, time, vocab] and tokens [batch, time], "
            f"got {tuple(logits.shape)} and {tuple(tokens.shape)}"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(mask.shape)}")
    targets = tokens[:, 1:].to(logits.device, torch.int64)
    if mask is None:
        counted = torch.ones_like(targets, dtype=torch.bool)
    else:
        unmasked = mask.to(logits.device, torch.bool)
        counted = unmasked[:, 1:] & unmasked[:, :-1]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row in range(tokens.shape[0]):
        for start in range(0, targets.shape[1], ROWS):
            stop = min(start + ROWS, targets.shape[1])
            scores = logits[row, start:stop].float()
            # Not `cross_entropy`: torch's fp32 kernel for the CPU is biased by -1.5e-6 nats a token at 8,192 words.
            chosen = scores.gather(1, targets[row, start:stop, None]).squeeze(1)
            nll = torch.logsumexp(scores, 1) - chosen
            # Not a product: a masked window may well have NaN logits, and 0 * NaN is NaN.
            total += torch.where(counted[row, start:stop], nll, 0).sum(dtype=torch.float64)
    return total, counted.sum()


class Perplexity(torchmetrics.Metric):
    """exp(mean cross-entropy of the next token), the mean taken over tokens, never over windows, batches or ranks."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    nll: Tensor
    """Summed cross-entropy, float64 scalar, nats."""
    tokens: Tensor
    """Targets counted, int64 scalar."""
    windows: Tensor
    """Windows with at least one unmasked token, int64 scalar."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("windows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        # Follow the module to its device, never to its dtype. torchmetrics already ignores `.half()`, but obeys
        # `.to(torch.bfloat16)`: a sum of 1e6 nats would keep three digits.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        return super()._apply(move, exclude_state)

    def update(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; the arguments are those of `next_token_nll`."""
        nll, count = next_token_nll(logits, tokens, mask)
        # Out of place: the state may be an inference tensor of an earlier validation.
        self.nll = self.nll + nll
        self.tokens = self.tokens + count
        self.windows = self.windows + (len(tokens) if mask is None else mask.bool().any(1).sum())

    def compute(self) -> Tensor:
        """Return the perplexity as a float64 scalar.

        Raises:
            ValueError: no token was counted.
        """
        if self.tokens == 0:
            raise ValueError(
                "perplexity of no tokens: update() with a window of two unmasked tokens or more comes first"
            )
        return torch.exp(self.nll / self.tokens)
