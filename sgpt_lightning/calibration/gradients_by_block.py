"""Gradients at the outputs of linears, one block at a time: for models whose blocks come to the device one at a time.

Batches are carried forwards with what enters each block kept in the tiers of `hidden_states.py`. On the way back each
block is brought again, runs once more, and hands what it owes to the block before it. So a block is brought twice for
as many batches as are on their way together, and not twice for each; their hidden states take no more than
`SHARE_OF_MODEL` of what the weights do. The sums are those of `gradients.py`, to the last bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.by_block import BatchesByBlock
from sgpt_lightning.calibration.gradients import OutputGradients, summed_loss

SHARE_OF_MODEL = 1.0
"""Of the bytes of the model's weights: what hidden states may take while batches are on their way. One always may."""
_OWED = "gradient"
"""The stream of gradients of the loss with respect to what left a block."""


class GradientsByBlock(OutputGradients):
    """Running mean of squared gradients at the outputs of linears, one block at a time.

    Args:
        model: as for `OutputGradients`.
        linears: the linears to watch, by name, all in decoder blocks.
        text: an empty one of the model; it is empty again after `end`.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module], text: BatchesByBlock) -> None:
        super().__init__(model, linears)
        self._text = text
        self._numbers: list[int] = []
        self._room = room_for_hidden(model)

    def observe(self, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Take in a batch as `OutputGradients` does; the model is run when there is no room for another one."""
        self._text.enter(batch, _entering(0))
        self._numbers.append(batch_index)
        self._count(batch)
        kept = sum(self._text.hidden.nbytes().values())
        if (kept + kept // len(self._numbers)) * (len(self._text.decoder.blocks) + 2) > self._room:
            self.end()

    def end(self) -> None:
        """Run the model on the batches that were taken in."""
        text, last = self._text, len(self._text.decoder.blocks)
        with torch.enable_grad():
            for block in range(last if self._numbers else 0):
                with self._hooked(block, self._note):
                    text.each(block, partial(self._forwards, block), _entering(block))
            for index, part in enumerate(text.parts):
                left = _leaf(text.hidden.get(_entering(last), index))
                self._owe(index, summed_loss(text.logits(index, left), part), left)
            for block in reversed(range(last if self._numbers else 0)):
                with self._hooked(block, self._square):
                    text.each(block, self._backwards, _entering(block), _OWED)
        text.clear()
        self._numbers.clear()

    def _forwards(self, block: int, index: int, run: Callable[[Tensor], Tensor], entered: Tensor) -> None:
        self._number = self._numbers[index]
        # With gradients, as on the way back: attention may take another path without.
        self._text.hidden.put(_entering(block + 1), index, run(_leaf(entered)))

    def _backwards(self, index: int, run: Callable[[Tensor], Tensor], entered: Tensor, owed: Tensor) -> None:
        leaf = _leaf(entered)
        self._owe(index, run(leaf), leaf, owed)

    def _owe(self, index: int, output: Tensor, leaf: Tensor, owed: Tensor | None = None) -> None:
        (gradient,) = torch.autograd.grad(output, leaf, owed)
        self._text.hidden.put(_OWED, index, gradient)

    def _note(self, name: str) -> Any:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            self._finite.note(name, self._number, torch.isfinite(args[0].detach()).all())

        return forward

    def _square(self, name: str) -> Any:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(partial(self._add, name))

        return forward

    @contextmanager
    def _hooked(self, block: int, hook: Callable[[str], Any]) -> Iterator[None]:
        watched = {name: linear for name, linear in self._text.decoder.linears(block).items() if name in self._linears}
        with ExitStack() as hooks:
            for name, linear in watched.items():
                hooks.enter_context(linear.register_forward_hook(hook(name)))
            yield


def room_for_hidden(model: nn.Module) -> float:
    """Return the bytes that hidden states may take while batches are on their way; those of one batch always may."""
    return SHARE_OF_MODEL * sum(parameter.nbytes for parameter in model.parameters())


def _entering(block: int) -> str:
    """Return the stream of what enters a block; behind the last one comes what left it."""
    return f"block {block}"


def _leaf(hidden: Tensor) -> Tensor:
    return hidden.detach().requires_grad_()
