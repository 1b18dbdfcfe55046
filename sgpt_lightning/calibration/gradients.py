"""What an error at a linear's output costs the model's loss, from one backward pass of the dense model.

To second order, and with the Fisher matrix in place of the Hessian of the loss, an output error e of row i costs
E[g_i^2] E[e_i^2] / 2 a token, where g_i is the gradient of the summed next-token cross-entropy at that output (rows
taken as independent; compare the empirical Fisher of WoodFisher, arXiv 2004.14340, section 3). The squared gradients
differ by orders of magnitude between rows and between linears, so they tell where zeros and bits are cheap.

Going backwards needs what each block computed forwards. Where that is too much to keep, only what enters the blocks is
kept, and each block runs once more when its turn comes (Chen et al., arXiv 1604.06174). Blocks that come to the device
one at a time are run by `gradients_by_block.py`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sgpt_lightning.calibration.collector import FiniteFlags
from sgpt_lightning.calibration.ranks import Ranks
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.replay import forwards_replaced

KEPT_BYTES = 2**30
"""What the outputs of all watched linears may take in one batch before blocks are run twice."""


class OutputGradients:
    """Running mean of squared gradients at the outputs of linears.

    Args:
        model: a causal language model in eval mode, with `get_input_embeddings`; its parameters get no gradients.
        linears: the linears to watch, by name.
        blocks: its decoder blocks, which run twice where memory would not hold them all.
    """

    def __init__(self, model: Any, linears: Mapping[str, nn.Module], blocks: Sequence[nn.Module] = ()) -> None:
        self._model = model
        self._linears = linears
        self._blocks = blocks
        self._token_bytes = sum(
            weight_matrix(linear).shape[0] * weight_matrix(linear).element_size() for linear in linears.values()
        )
        self._sums: dict[str, Tensor] = {}
        self._finite = FiniteFlags()
        self.tokens = 0

    def observe(self, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the model forwards and backwards.

        Args:
            batch_index: for error messages.
            batch: `input_ids` int64 `[batch, time]` and optionally `attention_mask`; padding counts nowhere.
        """
        entered: list[Tensor] = []

        def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            entered.append(output.detach().requires_grad_())
            return entered[-1]

        handles = [self._model.get_input_embeddings().register_forward_hook(enter)]
        handles += [
            linear.register_forward_hook(self._watch(name, batch_index)) for name, linear in self._linears.items()
        ]
        kept = batch["input_ids"].numel() * self._token_bytes
        try:
            with torch.enable_grad(), _run_twice(self._blocks) if kept > KEPT_BYTES else nullcontext():
                torch.autograd.grad(summed_loss(self._model(**model_inputs(batch)).logits, batch), entered)
        finally:
            for handle in handles:
                handle.remove()
        self._count(batch)

    def end(self) -> None:
        """Run the model on what was taken in and held back: nothing, here."""

    def check(self) -> None:
        """Raise ValueError, naming linear and batch, if a linear received NaN or inf."""
        self._finite.check()

    def reduce(self, ranks: Ranks) -> None:
        """Sum over the processes of a run; every one gets the very same numbers."""
        if ranks.size > 1:
            self.tokens = sum(ranks.gather(self.tokens))
            self._sums = {name: ranks.sum(self._sums[name]) for name in self._linears if name in self._sums}

    def row_weights(self, name: str) -> Tensor:
        """Return E[g_i^2] per output channel of a linear, float32 `[out_features]`.

        Raises:
            ValueError: no gradient reached the linear, or it is not finite.
        """
        if name not in self._sums:
            raise ValueError(f"{name} saw no token during calibration")
        weights = self._sums[name] / max(self.tokens, 1)
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"the gradient of the loss at {name} holds NaN or inf; switch the part `gradients` off")
        return weights

    def _count(self, batch: Mapping[str, Tensor]) -> None:
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None else int(mask.bool().sum())

    def _add(self, name: str, gradient: Tensor) -> None:
        squares = gradient.detach().float().square().flatten(0, -2).sum(0)
        self._sums[name] = squares if name not in self._sums else self._sums[name] + squares

    def _watch(self, name: str, batch_index: int) -> Any:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            self._finite.note(name, batch_index, torch.isfinite(args[0].detach()).all())
            output.register_hook(partial(self._add, name))

        return forward


def summed_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the next-token cross-entropy of a batch, summed over its real tokens.

    Args:
        logits: `[batch, time, words]`.
        batch: `input_ids` int64 `[batch, time]` and optionally `attention_mask`.
    """
    labels, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask[:, 1:] == 0, -100)
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="sum")


def _run_twice(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Keep nothing of what the blocks compute but what enters them."""
    return forwards_replaced(
        blocks, lambda forward: partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    )
