"""Batches through a model one block at a time: for models whose blocks come to the device one at a time.

Each block is brought once for all batches, as in sequential calibration, and not once for each. Perplexity is measured
so (`perplexity_by_block.py`), gradients are taken so (`gradients_by_block.py`), and a plan for the whole model gathers
its statistics so. Hidden states and logits are those of a forward of the whole model, to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sgpt_lightning.calibration.hidden_states import Activations, HiddenStates
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.placement import placement_of
from sgpt_lightning.models.replay import BlockCall, BlockReplay, forwards_replaced, run_block

BATCHES = "batches"
"""The stream in which batches enter."""


class BatchesByBlock:
    """Some batches, all as far in a model.

    Args:
        model: a causal language model in eval mode.
        activations: where hidden states are between blocks.
    """

    def __init__(self, model: nn.Module, activations: Activations = "auto") -> None:
        self.decoder = find_decoder_blocks(model)
        self.hidden = HiddenStates(activations)
        self.parts: list[Mapping[str, Tensor]] = []
        """What entered, see `enter`."""
        self._model = model
        self._placement = placement_of(model)
        self._replay = BlockReplay(model, self.decoder.blocks)
        self._calls: list[Sequence[BlockCall]] = []

    def enter(self, part: Mapping[str, Tensor], stream: str = BATCHES) -> None:
        """Bring one more batch to the entrance of the first block.

        Args:
            part: `input_ids` int64 `[batch, time]` and, if there is padding, `attention_mask`, on the model's device;
                no more than one forward takes, see `forwards`.
            stream: where its hidden state is put.
        """
        entered, calls = self._replay.prologue(part)
        self.hidden.put(stream, len(self.parts), entered)
        self.parts.append(part)
        self._calls.append(calls)

    def each(self, block: int, do: Callable[..., None], *streams: str) -> None:
        """Do something with every batch while a block is at work.

        Args:
            block: which one.
            do: called with the batch's index, a function that runs the block on a hidden state
                `[batch, time, hidden]`, and the hidden states of the batch.
            streams: of these hidden states.
        """
        with self._placement.at_work(block):
            for index, calls in enumerate(self._calls):
                hidden = [self.hidden.get(stream, index) for stream in streams]
                for stream in streams:
                    self.hidden.prefetch(stream, index + 1)
                do(index, self._running(block, calls[block]), *hidden)

    def carry(self, block: int) -> None:
        """Carry all batches through a block."""

        def do(index: int, run: Callable[[Tensor], Tensor], entered: Tensor) -> None:
            self.hidden.put(BATCHES, index, run(entered))

        self.each(block, do, BATCHES)

    def logits(self, index: int, left: Tensor) -> Tensor:
        """Return a batch's logits `[batch, time, words]`, given what left the last block, `[batch, time, hidden]`."""
        called = iter(self._replay.returns_tuple or [])

        def stub(*args: Any, **kwargs: Any) -> Any:
            return (left, None) if next(called) else left

        with forwards_replaced(self.decoder.blocks, lambda forward: stub):
            return self._model(**model_inputs(self.parts[index])).logits

    def clear(self) -> None:
        """Let go of all batches.

        Raises:
            RuntimeError: the blocks were called with arguments that depend on the tokens after all.
        """
        self.hidden.clear()
        self.parts.clear()
        self._calls.clear()
        self._replay.check()

    def _running(self, block: int, call: BlockCall) -> Callable[[Tensor], Tensor]:
        return lambda hidden: run_block(self.decoder.blocks[block], hidden, call)
