"""Where a model's decoder blocks are, which linears they hold, and how to run one block alone.

A block is run alone by replay: every block's `forward` is stubbed, the model's own prologue (embeddings, positions,
masks, rotary tables) runs, and the arguments that reach each block are recorded. They are replayed, never named, so
nothing here depends on a model family; only the first of them, the hidden state, is known and replaced. They are
recorded per block, because families with sliding windows hand different masks to different blocks.

Torch only: `transformers.Conv1D` is told by its attributes.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class DecoderBlocks(NamedTuple):
    """The decoder blocks of a model and the name of the list that holds them."""

    path: str
    blocks: Sequence[nn.Module]

    def name(self, index: int) -> str:
        """Return the full name of one block."""
        return f"{self.path}.{index}"

    def linears(self, only: int | None = None) -> dict[str, nn.Module]:
        """Return the linears of one block, or of all, by full name."""
        return {
            name: linear
            for index, block in enumerate(self.blocks)
            if only is None or index == only
            for name, linear in find_linears(block, self.name(index)).items()
        }


def find_decoder_blocks(model: nn.Module) -> DecoderBlocks:
    """Find the list of decoder blocks: the longest outermost `nn.ModuleList` of one class whose members hold linears.

    A model that says where its decoder is (`get_decoder` of transformers) is searched there only: a vision tower is
    left alone.

    Raises:
        ValueError: there is none, or a block holds a mixture of experts: a list of modules with linears of their own,
            or weights of three dimensions.
    """
    lists = _lists_with_linears(model)
    outermost = {path: blocks for path, blocks in lists.items() if not any(path.startswith(f"{p}.") for p in lists)}
    uniform = {path: blocks for path, blocks in outermost.items() if len({type(block) for block in blocks}) == 1}
    if not uniform:
        mixed = f"; {', '.join(outermost)} holds blocks of several classes, which is not supported" if outermost else ""
        raise ValueError(
            f"{type(model).__name__} has no decoder blocks: no nn.ModuleList of modules of one class that hold "
            f"linears{mixed}"
        )
    path = max(uniform, key=lambda path: len(uniform[path]))
    found = DecoderBlocks(path, list(uniform[path]))
    experts = [nested for nested in lists if nested.startswith(f"{path}.")] + _weights_of_three_dimensions(found)
    if experts:
        raise ValueError(
            "mixtures of experts and other linears in lists or in 3-D parameters within a block are not supported, "
            f"found {', '.join(experts[:4])}" + (f" and {len(experts) - 4} more" if len(experts) > 4 else "")
        )
    return found


def _lists_with_linears(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules below the model's decoder in which every module holds linears, by full name."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    return {
        path: module
        for path, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) and all(find_linears(block) for block in module)
    }


def _weights_of_three_dimensions(found: DecoderBlocks) -> list[str]:
    return [
        f"{found.name(index)}.{name}"
        for index, block in enumerate(found.blocks)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3 and not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]


def mark_compressed(model: nn.Module) -> None:
    """Leave a mark on a model whose linears are, or begin to be, compressed; it goes with the object and its copies."""
    model.__dict__[_MARK] = True


def is_marked_compressed(model: nn.Module) -> bool:
    """Tell whether a model in memory was compressed, or begun to be: it is nobody's dense model any more."""
    return _MARK in model.__dict__


_MARK = "_sgpt_compressed"


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the linears (nn.Linear and transformers.Conv1D) below a module, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) or is_conv1d(child)
    }


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `transformers.Conv1D`: a linear that holds its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_matrix(linear: nn.Module) -> Tensor:
    """Return the weight as `[out_features, in_features]` (a view), whatever the module calls its axes."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.T if is_conv1d(linear) else weight.flatten(1)


@torch.no_grad()
def add_to_bias(linear: nn.Module, shift: Tensor, storage_dtype: torch.dtype, name: str = "the linear") -> None:
    """Add `[out_features]` to the module's bias and round the sum to the dtype that it will be stored in.

    Raises:
        ValueError: the dtype cannot hold a value; nothing is written, and `name` is in the message.
    """
    bias = linear.bias
    assert isinstance(bias, Tensor)
    stored = (bias.float() + shift).to(storage_dtype).to(bias.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"the bias of {name} would be inf or NaN in {storage_dtype} or {bias.dtype}")
    bias.copy_(stored)


@torch.no_grad()
def set_weight_matrix(linear: nn.Module, matrix: Tensor, name: str = "the linear") -> None:
    """Write `[out_features, in_features]` into the module's weight, in its own dtype and layout.

    Raises:
        ValueError: the dtype cannot hold a value; nothing is written, and `name` is in the message.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    stored = matrix.to(weight.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"{name} was solved to weights that {weight.dtype} cannot hold: they would be inf or NaN")
    weight.copy_(stored.T if is_conv1d(linear) else stored.view(weight.shape))


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
