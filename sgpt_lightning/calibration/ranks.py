"""What the processes of a run share: sums of tensors, values, and whether one of them has failed.

Tensors are reduced in the group that Lightning made (gloo, NCCL), where they are. Values and outcomes go over a gloo
group of our own beside it: so they need no GPU, and a process that has died is noticed at once, by its connection,
where NCCL would wait. A process that fails alone cannot tell the others, who are computing; it leaves its message in
the store of the run and lets go of the group, and they find both when they next want to hear from it.

Every method is to be called by every rank, in the same order. One process is the rank `ALONE`, for which all is free.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sgpt_lightning.messages import told

Value = TypeVar("Value")


class RankError(RuntimeError):
    """Another process of the run has failed, or cannot be reached."""


class Ranks:
    """The processes of a run, and which of them this one is.

    Args:
        rank: this one, from 0.
        size: how many there are.
        group: a gloo group of all of them, for values; None if there is but one.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._store: Any = None
        self._left = False
        if size > 1:
            self._store = dist.distributed_c10d._get_default_store()
            with suppress(RuntimeError):
                self._store.delete_key(_key(rank))  # of an earlier run

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Return what every rank gave, by rank; values are pickled.

        Raises:
            RankError: a rank has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(found, _packed(value), group=self._group)
        return [_unpacked(content) for content in found]

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """Return what the rank `source` gave; raises RankError if a rank has ended."""
        if self.size == 1:
            return value
        held: list[Any] = [_packed(value) if self.rank == source else None]
        with self._connected():
            dist.broadcast_object_list(held, src=source, group=self._group, device=torch.device("cpu"))
        return value if self.rank == source else _unpacked(held[0])

    def merge(self, values: Mapping[str, Value], order: Sequence[str]) -> dict[str, Value]:
        """Return the entries of all ranks; each is given by one rank, and `order` names them all in order."""
        if self.size == 1:
            return dict(values)
        found: dict[str, Value] = {}
        for source in range(self.size):
            found |= self.broadcast(dict(values), source)
        return {name: found[name] for name in order if name in found}

    def reduce(self, tensor: Tensor, scale: float, owner: int) -> Tensor:
        """Sum a floating tensor, times a factor of each rank, over all ranks, on one of them.

        On the CPU sums are made in float64, on a GPU in the dtype that the tensor is held in.

        Returns:
            The sum, dtype and device of `tensor`; on ranks other than the owner an empty tensor.
        """
        if self.size == 1:
            return tensor * scale
        part = (tensor if tensor.is_cuda else tensor.double()) * scale
        with self._connected():
            dist.reduce(part, owner)
        return part.to(tensor.dtype) if self.rank == owner else tensor.new_empty(0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a floating tensor over all ranks, as `reduce` does; every rank gets the very same numbers."""
        if self.size == 1:
            return tensor
        total = self.reduce(tensor, 1.0, 0)
        total = total if self.is_first else torch.empty_like(tensor)
        with self._connected():
            dist.broadcast(total, 0)
        return total

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Run the body on every rank, and go on only if none of them failed in it.

        Raises:
            RankError: another rank failed; with its message. The one that failed raises its own error.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1:
                with suppress(RankError):
                    self.gather(told(error))
            raise
        if self.size == 1:
            return
        for rank, message in enumerate(self.gather("")):
            if message:
                raise RankError(f"process {rank} of {self.size} failed: {message}")

    def check_same(self, value: object, what: str) -> None:
        """Raise RuntimeError, on every rank, if ranks hold different values; `what` names them."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise RuntimeError(f"{what} differ between the processes of the run: {found}")

    def leave(self, error: BaseException) -> None:
        """Let the others know that this rank ends, and why; nothing can be shared after that."""
        if self.size == 1 or self._left:
            return
        self._left = True
        if not isinstance(error, RankError):
            if left := self._message():  # then this is an error of gloo or NCCL, in a collective of Lightning's
                error.add_note(left)
            with suppress(RuntimeError):
                self._store.set(_key(self.rank), told(error))
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group(self._group)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            if self._left:
                raise RuntimeError("this process has left the run")
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # gloo and NCCL have no errors of their own
            raise RankError(self._what_happened(error)) from error

    def _what_happened(self, error: Exception) -> str:
        """Return the message that a rank left, or what is known without one."""
        return self._message() or (
            f"another process of the run ended without a word, or cannot be reached; this is process {self.rank} of "
            f"{self.size}, and nothing can be solved without all ({str(error).splitlines()[0]})"
        )

    def _message(self) -> str:
        """Return why another rank has left; empty if none has, or none can tell."""
        for rank in range(self.size):
            with suppress(RuntimeError):
                if rank != self.rank and self._store.check([_key(rank)]):
                    return f"process {rank} of {self.size} failed: {self._store.get(_key(rank)).decode()}"
        return ""


ALONE = Ranks()
"""A run of one process."""


def joined() -> Ranks:
    """Return the processes that torch.distributed has brought together, or `ALONE`; called by all of them, or none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    world = dist.group.WORLD
    if not _known or _known[0][0] is not world or _known[0][1]._left:
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        _known[:] = [(world, Ranks(dist.get_rank(), dist.get_world_size(), group))]
    return _known[0][1]


_known: list[tuple[Any, Ranks]] = []
"""The group of this process and its ranks, once they are known."""


def deal(costs: Sequence[float], size: int) -> list[int]:
    """Deal jobs to ranks: the dearest first, each to the rank with the least so far; the same on every rank.

    Args:
        costs: of each job, in any unit.
        size: number of ranks.

    Returns:
        The rank of each job.
    """
    owners, loads = [0] * len(costs), [0.0] * size
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def _packed(value: object) -> bytes:
    """Return a value as bytes; what torch.distributed pickles itself may hold no tensor of uint16."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _unpacked(content: bytes) -> Any:
    """Return a value that another process of the same run packed."""
    return torch.load(io.BytesIO(content), weights_only=False)


def _key(rank: int) -> str:
    return f"sgpt_lightning/failed/{rank}"
