"""How to run a model's prologue, and one decoder block alone.

A block is run alone by replay: every block's `forward` is stubbed, the model's own prologue (embeddings, positions,
masks, rotary tables) runs, and the arguments that reach each block are recorded. They are replayed, never named, so
nothing here depends on a model family; only the hidden state (the first of them, or what `adapters.py` was told) is
known and replaced. They are recorded per block, because families with sliding windows hand different masks to
different blocks.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.models.adapters import adapter_of
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.linears import find_linears
from sgpt_lightning.models.placement import copy_of


class BlockCall(NamedTuple):
    """What a block receives besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None
    """The keyword under which the hidden state is passed, or None if it is a positional argument."""
    hidden_position: int = 0
    """Where among the positional arguments it is, if it is one of them."""


class PrologueOutput(NamedTuple):
    """What enters the first block for one batch, and how each block is to be called with it."""

    hidden: Tensor
    calls: Sequence[BlockCall]


class _PrologueDone(Exception):
    """Ends a forward once the last block has been reached."""


class BlockReplay:
    """Runs a model's prologue, and its blocks one at a time.

    Args:
        model: any decoder-only model; called as `model(**model_inputs(batch))`.
        blocks: its decoder blocks.

    Raises:
        ValueError: a block has no parameter of the name that was registered for the hidden state, or, from the first
            prologue on, what is taken for the hidden state is no floating tensor.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model = model
        self._blocks = blocks
        adapter = adapter_of(model)
        self._hidden = [None if adapter is None else _parameter(block, adapter.hidden) for block in blocks]
        self.returns_tuple: list[bool] | None = None
        self._calls_by_shape: dict[tuple[int, ...], Sequence[BlockCall] | None] = {}
        self._strayed: Tensor | None = None

    @torch.no_grad()
    def prologue(self, batch: Mapping[str, Tensor]) -> PrologueOutput:
        """Run the model up to its first block; hidden state `[batch, time, hidden]`.

        No value is read from the device but for the first batch of a shape.
        """
        inputs = model_inputs(batch)
        if self.returns_tuple is None:
            self.returns_tuple = self._observe_return_types(inputs)
        hidden, recorded = self._record(inputs)
        # Without padding, masks and positions follow from the shape: keep one copy.
        calls = None if "attention_mask" in inputs else self._calls_of_shape(inputs, recorded)
        return PrologueOutput(hidden, recorded if calls is None else calls)

    def check(self) -> None:
        """Raise RuntimeError if batches of one shape were not called alike after all; reads one value."""
        if self._strayed is not None and bool(self._strayed):
            raise RuntimeError(
                "the blocks of this model are called with arguments that depend on the tokens, though not for the "
                "first batch: it cannot be calibrated block by block; use calibration one-shot"
            )

    def _calls_of_shape(self, inputs: dict[str, Any], recorded: Sequence[BlockCall]) -> Sequence[BlockCall] | None:
        """Return how blocks are called with batches of this shape; None if that depends on the tokens.

        It is tried out once, with other tokens: Gemma 4 hands every block embeddings of its own. That later batches
        are called alike is noted on the device, see `check`.
        """
        ids = inputs["input_ids"]
        shape = tuple(ids.shape)
        if shape not in self._calls_by_shape:
            _, others = self._record({**inputs, "input_ids": torch.where(ids == 0, 1, 0)})
            alike = not any(map(bool, _differences(recorded, others, set())))
            self._calls_by_shape[shape] = recorded if alike else None
            return self._calls_by_shape[shape]
        known = self._calls_by_shape[shape]
        if known is None:
            return None
        for differs in _differences(known, recorded, set()):
            if not isinstance(differs, Tensor):
                return None  # seen without reading a tensor
            self._strayed = differs if self._strayed is None else self._strayed | differs
        return known

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
        first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        try:
            self._model(**first)  # one window: its logits are for nothing
        finally:
            for handle in handles:
                handle.remove()
        return returns_tuple

    def _record(self, inputs: dict[str, Any]) -> tuple[Tensor, list[BlockCall]]:
        recorded: list[tuple[Tensor, BlockCall]] = []
        assert self.returns_tuple is not None
        returns_tuple = self.returns_tuple

        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _taken_apart(args, kwargs, self._hidden[len(recorded)])
            if not (isinstance(hidden, Tensor) and hidden.is_floating_point()):
                raise ValueError(
                    f"{type(self._blocks[len(recorded)]).__name__} receives {type(hidden).__name__} where its hidden "
                    "state is expected: say which parameter it is with sgpt_lightning.register_model"
                )
            recorded.append((hidden, call))
            if len(recorded) == len(self._blocks):
                raise _PrologueDone
            return (hidden, None) if returns_tuple[len(recorded) - 1] else hidden

        with forwards_replaced(self._blocks, lambda forward: stub), suppress(_PrologueDone):
            self._model(**inputs)
        return recorded[0][0], [call for _, call in recorded]


class _Parameter(NamedTuple):
    """A parameter of a function."""

    name: str
    position: int


def _parameter(block: nn.Module, name: str | None) -> _Parameter | None:
    """Return the parameter of a block's forward that takes the hidden state; None for its first argument."""
    if name is None:
        return None
    names = list(inspect.signature(block.forward).parameters)
    if name not in names:
        raise ValueError(
            f"the hidden state was registered as {name!r}, but {type(block).__name__}.forward takes {', '.join(names)}"
        )
    return _Parameter(name, names.index(name))


def _taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: _Parameter | None) -> tuple[Tensor, BlockCall]:
    """Split a block's arguments into the hidden state and the rest."""
    position = 0 if hidden is None else hidden.position
    if len(args) > position:
        return args[position], BlockCall(args[:position] + args[position + 1 :], kwargs, None, position)
    keyword = next(iter(kwargs)) if hidden is None else hidden.name
    return kwargs[keyword], BlockCall(args, {k: v for k, v in kwargs.items() if k != keyword}, keyword)


def _differences(known: Any, other: Any, compared: set[tuple[int, int]]) -> Iterator[bool | Tensor]:
    """Yield where nested arguments differ: True, or for two tensors whether they do, a bool scalar on their device.

    Objects of unknown types are equal only to themselves. Blocks share most of their arguments: a pair of tensors is
    compared once, and noted in `compared` by its ids.
    """
    for one, two in itertools.zip_longest(_leaves(known), _leaves(other)):
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            if (one.shape, one.dtype) != (two.shape, two.dtype):
                yield True
            elif (id(one), id(two)) not in compared:
                compared.add((id(one), id(two)))
                yield (one != two).any()
        elif one is not two and not (type(one) is type(two) and isinstance(one, _PLAIN) and one == two):
            yield True


_PLAIN = (bool, int, float, str, tuple)
"""Types of leaves that are compared by value; a tuple is what `_leaves` says of a container."""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested containers hold, and before it of which type and size each container is."""
    if isinstance(value, Mapping):
        yield type(value), *value
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, list | tuple):
        yield type(value), len(value)
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run a block, or a copy of one, on a hidden state `[batch, time, hidden]` and return the next one."""
    if call.hidden_keyword is None:
        before, behind = call.args[: call.hidden_position], call.args[call.hidden_position :]
        output = block(*before, hidden, *behind, **call.kwargs)
    else:
        output = block(*call.args, **{call.hidden_keyword: hidden}, **call.kwargs)
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def residual_writers(block: nn.Module, hidden: Tensor, call: BlockCall) -> dict[str, nn.Module]:
    """Find the linears whose outputs a block adds to its hidden state, and nothing else, by name within the block.

    A pre-norm block returns hidden + attention output + feed-forward output; which linears these are is found by
    trying: the sum must reproduce the block's output. Blocks that do anything else to the stream (norms behind the
    sum, scaled residuals) have none. A 16-bit block is tried as a copy in float32: its sums are rounded more coarsely
    than the tolerance, by up to the whole of what is added where the hidden state is a hundred times as large.

    Args:
        block: a decoder block in eval mode.
        hidden: any hidden state, `[batch, time, hidden]`.
        call: the rest of the block's arguments.
    """
    linears = find_linears(block)
    if hidden.dtype in (torch.float16, torch.bfloat16):
        wide = call._replace(args=_floats(call.args), kwargs=_floats(call.kwargs))
        return {name: linears[name] for name in residual_writers(copy_of(block).float(), hidden.float(), wide)}
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


def _floats(value: Any) -> Any:
    """Return nested arguments with floating tensors as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _floats(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_floats, value))
    return value


@contextmanager
def forwards_replaced(
    blocks: Sequence[nn.Module], replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give each block another `forward` while the body runs, made of its own."""
    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = replacement(block.forward)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.__dict__.pop("forward", None)
            if original is not None:
                block.forward = original
