"""How to run a model's prologue, and one decoder block alone.

A block is run alone by replay: every block's `forward` is stubbed, the model's own prologue (embeddings, positions,
masks, rotary tables) runs, and the arguments that reach each block are recorded. They are replayed, never named, so
nothing here depends on a model family; only the first of them, the hidden state, is known and replaced. They are
recorded per block, because families with sliding windows hand different masks to different blocks.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.models.linears import find_linears


class BlockCall(NamedTuple):
    """What a block receives besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None
    """The keyword under which the hidden state is passed, or None if it is the first positional argument."""


class PrologueOutput(NamedTuple):
    """What enters the first block for one batch, and how each block is to be called with it."""

    hidden: Tensor
    calls: Sequence[BlockCall]


class _PrologueDone(Exception):
    """Ends a forward once the last block has been reached."""


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of a forward without cache; a mask without padding is left out.

    A window that is padding as a whole is shown to the model unmasked, since attention without any key is NaN.

    Args:
        batch: `input_ids` int64 `[batch, time]` and, if there is padding, `attention_mask` of the same shape.
    """
    mask = batch.get("attention_mask")
    if mask is not None:
        mask = mask.bool() | ~mask.bool().any(1, keepdim=True)
        mask = None if bool(mask.all()) else mask.long()
    return {"input_ids": batch["input_ids"], "use_cache": False} | ({} if mask is None else {"attention_mask": mask})


class BlockReplay:
    """Runs a model's prologue, and its blocks one at a time.

    Args:
        model: any decoder-only model; called as `model(**model_inputs(batch))`.
        blocks: its decoder blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model = model
        self._blocks = blocks
        self._returns_tuple: list[bool] | None = None
        self._calls_by_shape: dict[tuple[int, ...], Sequence[BlockCall]] = {}

    @torch.no_grad()
    def prologue(self, batch: Mapping[str, Tensor]) -> PrologueOutput:
        """Run the model up to its first block; hidden state `[batch, time, hidden]`."""
        inputs = model_inputs(batch)
        if self._returns_tuple is None:
            self._returns_tuple = self._observe_return_types(inputs)
        hidden, recorded = self._record(inputs)
        calls: Sequence[BlockCall] = recorded
        if "attention_mask" not in inputs:  # without padding, masks and positions follow from the shape: keep one copy
            known = self._calls_by_shape.setdefault(tuple(inputs["input_ids"].shape), recorded)
            calls = known if _equal(known, recorded) else recorded  # Gemma 4 hands every block embeddings of its own
        return PrologueOutput(hidden, calls)

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Run one block on a hidden state `[batch, time, hidden]` and return the next one."""
        return run_block(self._blocks[index], hidden, call)

    def _observe_return_types(self, inputs: dict[str, Any]) -> list[bool]:
        """Run the model once for real: some families return a tuple from a block, others a tensor."""
        returns_tuple = [False] * len(self._blocks)

        def hook(index: int) -> Callable[..., None]:
            def remember(module: nn.Module, args: Any, output: Any) -> None:
                returns_tuple[index] = isinstance(output, tuple | list)

            return remember

        handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(self._blocks)]
        try:
            self._model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return returns_tuple

    def _record(self, inputs: dict[str, Any]) -> tuple[Tensor, list[BlockCall]]:
        recorded: list[tuple[Tensor, BlockCall]] = []
        assert self._returns_tuple is not None
        returns_tuple = self._returns_tuple

        def stub(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, call = args[0], BlockCall(args[1:], kwargs, None)
            else:
                keyword = next(iter(kwargs))
                hidden, call = (
                    kwargs[keyword],
                    BlockCall((), {k: v for k, v in kwargs.items() if k != keyword}, keyword),
                )
            recorded.append((hidden, call))
            if len(recorded) == len(self._blocks):
                raise _PrologueDone
            return (hidden, None) if returns_tuple[len(recorded) - 1] else hidden

        with _forward_replaced(self._blocks, stub), suppress(_PrologueDone):
            self._model(**inputs)
        return recorded[0][0], [call for _, call in recorded]


def _equal(known: Any, other: Any) -> bool:
    """Compare nested arguments by value; objects of unknown types are equal only to themselves."""
    if type(known) is not type(other):
        return False
    if isinstance(known, Tensor):
        return torch.equal(known, other)
    if isinstance(known, Mapping):
        return known.keys() == other.keys() and all(_equal(known[key], other[key]) for key in known)
    if isinstance(known, list | tuple):
        return len(known) == len(other) and all(map(_equal, known, other))
    return known is other or (isinstance(known, bool | int | float | str) and known == other)


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run a block, or a copy of one, on a hidden state `[batch, time, hidden]` and return the next one."""
    if call.hidden_keyword is None:
        output = block(hidden, *call.args, **call.kwargs)
    else:
        output = block(*call.args, **{call.hidden_keyword: hidden}, **call.kwargs)
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def residual_writers(block: nn.Module, hidden: Tensor, call: BlockCall) -> dict[str, nn.Module]:
    """Find the linears whose outputs a block adds to its hidden state, and nothing else, by name within the block.

    A pre-norm block returns hidden + attention output + feed-forward output; which linears these are is found by
    trying: the sum must reproduce the block's output. Blocks that do anything else to the stream (norms behind the
    sum, scaled residuals) have none.

    Args:
        block: a decoder block in eval mode.
        hidden: any hidden state, `[batch, time, hidden]`.
        call: the rest of the block's arguments.
    """
    linears = find_linears(block)
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel() == hidden.numel() and output.shape[-1] == hidden.shape[-1]:
                outputs[name] = output.view_as(hidden).clone()  # Falcon adds to it in place

        return hook

    handles = [linear.register_forward_hook(remember(name)) for name, linear in linears.items()]
    try:
        change = run_block(block, hidden, call) - hidden
    finally:
        for handle in handles:
            handle.remove()
    tolerance = 1e-3 * change.float().norm()
    for size in range(1, min(len(outputs), 4) + 1):
        for names in itertools.combinations(outputs, size):
            if (change - sum(outputs[name] for name in names)).float().norm() <= tolerance:
                return {name: linears[name] for name in names}
    return {}


@contextmanager
def _forward_replaced(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = stub
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            del block.forward
            if original is not None:
                block.forward = original


def padding_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens are real, bool `[batch, time]`, or None if all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()
