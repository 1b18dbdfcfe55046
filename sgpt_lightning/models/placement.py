"""Decoder blocks that are elsewhere while nobody computes with them, so that a model need not fit on its device.

At rest a block is on the CPU, or the weights of its linears are nowhere in memory (on torch's `meta` device): they are
read from the model's files, or unpacked from what is stored of them once they are solved. A block is brought to the
device for as long as somebody is at work with it, and for each of its forwards otherwise, so that such a model can be
called as any other. All that is no block is on the device all along.

Parameters are exchanged, not their contents: what autograd has kept of a block stays what it was.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import some_at_once, unpack_weights
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import is_conv1d

Read = Callable[[str], Tensor]
"""Returns a tensor of the dense model by its full name, on the CPU."""


class Placement:
    """Blocks that stay where they are."""

    moves = False
    """Whether blocks come and go."""

    def device_of(self, linear: nn.Module) -> torch.device:
        """Return where a linear is when it is at work."""
        weight = linear.weight
        assert isinstance(weight, Tensor)
        return weight.device

    def bring(self, index: int) -> None:
        """Bring a block to the device, until it is put back; nothing if it is there."""

    def put_back(self, index: int) -> None:
        """Put a block to rest; nothing if it is."""

    def keep(self, index: int, packed: Mapping[str, PackedWeight]) -> None:
        """Note that a block, which is at work, was solved, and what is stored of its linears, by full name."""

    def forget(self) -> None:
        """Put all blocks to rest, as they were before any was solved."""

    def read(self, name: str) -> Tensor:
        """Return a tensor of the dense model that is nowhere in memory, on the CPU, by its full name."""
        raise NotImplementedError

    @contextmanager
    def at_work(self, index: int) -> Iterator[None]:
        """Have a block on the device while the body runs."""
        yield


class _Slot(NamedTuple):
    """A parameter or buffer of a block."""

    name: str
    """Its full name."""
    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.leaf)

    def hold(self, tensor: Tensor) -> None:
        """Put a tensor in place of the one that is there."""
        held = self.module._parameters if self.leaf in self.module._parameters else self.module._buffers
        held[self.leaf] = tensor  # type: ignore[assignment]


class BlocksElsewhere(Placement):
    """Blocks that come to a device one at a time; see the module's docstring.

    Args:
        model: a model in eval mode, frozen; what is no block goes to `device` at once.
        device: where it computes.
        read: where weights on the `meta` device come from; None for a model that is on the CPU as a whole.
    """

    moves = True

    def __init__(self, model: nn.Module, device: torch.device | str, read: Read | None = None) -> None:
        self._decoder = find_decoder_blocks(model)
        self._device = torch.device(device)
        self._read = read
        self._resting: dict[int, list[tuple[_Slot, Tensor]]] = {}
        self._solved: set[int] = set()
        self._packed: dict[str, PackedWeight] = {}
        for index, block in enumerate(self._decoder.blocks):
            block.__dict__["forward"] = self._brought(index, block.forward)
            block.__dict__["_apply"] = _staying(block)
        model.__dict__[_KEY] = self
        model.to(self._device)

    def device_of(self, linear: nn.Module) -> torch.device:
        """Return where a linear is when it is at work."""
        return self._device

    def bring(self, index: int) -> None:
        """Bring a block to the device, until it is put back; nothing if it is there."""
        if index in self._resting:
            return
        resting = [(slot, slot.tensor) for slot in self._slots(index)]
        unpacked = self._unpacked([slot for slot, tensor in resting if tensor.is_meta])
        for slot, tensor in resting:
            here = unpacked.get(slot.name)
            if here is None:
                there = self.read(slot.name) if tensor.is_meta else tensor
                here = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device).copy_(there)
            slot.hold(nn.Parameter(here, requires_grad=False) if isinstance(tensor, nn.Parameter) else here)
        self._resting[index] = resting

    @torch.no_grad()
    def put_back(self, index: int) -> None:
        """Put a block to rest; nothing if it is."""
        for slot, tensor in self._resting.pop(index, []):
            if index in self._solved and not tensor.is_meta:
                tensor.copy_(slot.tensor)
            slot.hold(tensor)
        self._solved.discard(index)

    def keep(self, index: int, packed: Mapping[str, PackedWeight]) -> None:
        """Note that a block, which is at work, was solved, and what is stored of its linears, by full name."""
        self._solved.add(index)
        if self._read is not None:
            self._packed |= packed

    def forget(self) -> None:
        """Put all blocks to rest, as they were before any was solved; tensors that are at rest stay as they are."""
        self._solved.clear()
        self._packed.clear()
        for index in list(self._resting):
            self.put_back(index)

    def read(self, name: str) -> Tensor:
        """Return a tensor of the dense model that is nowhere in memory, on the CPU, by its full name."""
        assert self._read is not None
        return self._read(name)

    @contextmanager
    def at_work(self, index: int) -> Iterator[None]:
        """Have a block on the device while the body runs; if it was there, it stays."""
        was_there = index in self._resting
        try:
            self.bring(index)
            yield
        finally:
            if not was_there:
                self.put_back(index)

    def release(self, model: nn.Module) -> None:
        """Put all blocks to rest, and make the model one as any other, on the CPU.

        Raises:
            ValueError: its weights are nowhere in memory.
        """
        if self._read is not None:
            raise ValueError("a model whose weights are on disk cannot be made one in memory; load it again")
        for index, block in enumerate(self._decoder.blocks):
            self.put_back(index)
            _let_go(block)
        del model.__dict__[_KEY]
        model.to("cpu")

    def _slots(self, index: int) -> list[_Slot]:
        block, prefix = self._decoder.blocks[index], self._decoder.name(index)
        return [
            _Slot(f"{prefix}.{path}.{leaf}" if path else f"{prefix}.{leaf}", module, leaf)
            for path, module in block.named_modules()
            for held in (module._parameters, module._buffers)
            for leaf, tensor in held.items()
            if tensor is not None
        ]

    def _unpacked(self, slots: list[_Slot]) -> dict[str, Tensor]:
        """Return the weights that are solved, on the device, by full name."""
        owners = {slot.name.removesuffix(".weight"): slot for slot in slots}
        known = {name: self._packed[name] for name in owners if name in self._packed}
        found = {}
        for names in some_at_once(known):
            weights = unpack_weights([known[name].to(self._device) for name in names])
            for name, weight in zip(names, weights, strict=True):
                slot = owners[name]
                turned = weight.T if is_conv1d(slot.module) else weight
                found[slot.name] = turned.to(slot.tensor.dtype).reshape(slot.tensor.shape).contiguous()
        return found

    def _brought(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def brought(*args: Any, **kwargs: Any) -> Any:
            with self.at_work(index):
                return forward(*args, **kwargs)

        return brought


def _staying(block: nn.Module) -> Callable[..., nn.Module]:
    """Return a block's `_apply` for as long as it is placed: `model.to(device)` leaves it where it is."""

    def stay(fn: Any, recurse: bool = True) -> nn.Module:
        return block

    return stay


def _let_go(block: nn.Module) -> None:
    if "_apply" in block.__dict__:
        del block.__dict__["_apply"], block.__dict__["forward"]


def copy_of(block: nn.Module) -> nn.Module:
    """Return a copy of a block, which is at work, that stays where it is."""
    twin = copy.deepcopy(block)
    _let_go(twin)
    return twin


def placement_of(model: nn.Module) -> Placement:
    """Return where a model's blocks are kept."""
    return model.__dict__.get(_KEY, Placement())


def in_memory(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a model's `state_dict`; if it is on the `meta` device, what the dense model's files say."""
    return placement_of(model).read(name).to(tensor.dtype) if tensor.is_meta else tensor


_KEY = "_sgpt_placement"
