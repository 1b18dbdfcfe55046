"""Gathers statistics of what linears receive while a model, or one block of it, runs.

Linears that receive the same tensor (q, k and v) share one `InputStatistics`. They are found by identity of the tensor
and not by name, and the order in which such groups run is the order in which true-sequential calibration solves them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.ranks import Ranks
from sgpt_lightning.core.moments import InputStatistics


class _AllSeen(Exception):
    """Ends a forward once every watched linear has been reached."""


@contextmanager
def watched_inputs(linears: Mapping[str, nn.Module], *, end_early: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that fills with what each linear receives, by name, in the order in which they run.

    With `end_early` the body ends, without an error, when all have been reached: the last of them is not computed.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]
            if end_early and len(seen) == len(linears):
                raise _AllSeen

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield seen
    except _AllSeen as reached:
        # contextlib of Python 3.12 keeps an exception that is swallowed here in a cycle until garbage is collected, and
        # by its traceback all that the forward had computed: 384 MiB a batch for a block of OPT-125M.
        reached.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()


def input_groups(inputs: Mapping[str, Tensor], linears: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Group linears by the tensor that they receive, in the order in which they run.

    Args:
        inputs: what `watched_inputs` yielded.
        linears: all linears, by name; those that did not run come in a group of their own, last.
    """
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), {})[name] = linears[name]
    idle = {name: linear for name, linear in linears.items() if name not in inputs}
    return [*groups.values(), *([idle] if idle else [])]


class ResidualStream:
    """The residual stream while a block runs: what entered the block, and what its writers have added so far.

    Args:
        entered: hidden state at the block's entrance, `[batch, time, hidden]`.
    """

    def __init__(self, entered: Tensor) -> None:
        self._value = entered
        self.before: dict[str, Tensor] = {}
        """The stream when a writer starts, by its name."""

    @contextmanager
    def following(self, writers: Mapping[str, nn.Module]) -> Iterator["ResidualStream"]:
        """Follow the stream while the body runs the block; `writers` are its linears that write into it."""

        def start(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.before[name] = self._value

            return hook

        def wrote(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._value = self._value + output.detach().view_as(self._value)

        handles = [linear.register_forward_pre_hook(start(name)) for name, linear in writers.items()]
        handles += [linear.register_forward_hook(wrote) for linear in writers.values()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class DenseReference:
    """What the uncompressed model did with a batch, to compare with while the compressed one runs."""

    inputs: Mapping[str, Tensor]
    """What each linear received, by name."""
    dense_stream: ResidualStream | None = None
    stream: ResidualStream | None = None
    """The same stream in the model that is being compressed."""

    def input_of(self, name: str) -> Tensor | None:
        """Return what the linear received in the uncompressed model."""
        return self.inputs.get(name)

    def gap_at(self, name: str) -> Tensor | None:
        """Return how far the stream is behind where the linear writes into it; None if it does not."""
        if self.stream is None or self.dense_stream is None or name not in self.stream.before:
            return None
        return self.dense_stream.before[name] - self.stream.before[name]


class FiniteFlags:
    """Notes on the device whether what linears received was finite, and reads it once for many batches."""

    ROOM = 4096
    """Flags for which memory is taken at once: flags of their own, left behind between the tensors of a forward, kept
    the allocator from using that memory again (1.13 -> 1.45 GB for opt-mini's gradients on the CPU)."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, int]] = []
        self._flags = torch.empty(0, dtype=torch.bool)

    def note(self, name: str, batch_index: int, finite: Tensor) -> None:
        """Note a bool scalar on the device: whether what the linear received in a batch is finite."""
        if len(self._noted) == len(self._flags) or not self._noted:
            room = finite.new_empty(self.ROOM)
            self._flags = torch.cat([self._flags, room]) if self._noted else room
        self._flags[len(self._noted)] = finite
        self._noted.append((name, batch_index))

    def check(self) -> None:
        """Read all that was noted since the last check.

        Raises:
            ValueError: a linear received NaN or inf; the first one is named, and the batch.
        """
        noted, finite = self._noted, self._flags[: len(self._noted)].tolist()
        self._noted = []
        for (name, batch_index), fine in zip(noted, finite, strict=True):
            if not fine:
                raise ValueError(f"{name} received NaN or inf in calibration batch {batch_index}")


class InputCollector:
    """Statistics of the inputs of some linears. Nothing is read from the device before `check`.

    Args:
        linears: the linears to watch, by full name.
        tf32: see `InputStatistics`.
    """

    def __init__(self, linears: Mapping[str, nn.Module], tf32: bool = False) -> None:
        self.linears = linears
        self._tf32 = tf32
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._finite = FiniteFlags()

    def statistics(self, name: str) -> InputStatistics:
        """Return what the linear called `name` has seen; raises ValueError if it was never run."""
        if name not in self._leader:
            raise ValueError(f"{name} saw no token during calibration: nothing calls it; put it into `ignore`")
        return self._statistics[self._leader[name]]

    def leader(self, name: str) -> str:
        """Return the first linear that receives what this one does; raises ValueError if it was never run."""
        self.statistics(name)
        return self._leader[name]

    def reduce(self, owners: Mapping[str, int], ranks: Ranks) -> None:
        """Sum statistics over the processes of a run, each on the rank that owns it; others keep nothing of it.

        Args:
            owners: ranks by the names of leaders, the same everywhere.
            ranks: the processes.
        """
        if ranks.size == 1:
            return
        places = ranks.gather({name: self._statistics[name].held() for name in owners})
        for name, owner in owners.items():
            held, total = [place[name] for place in places], partial(ranks.reduce, owner=owner)
            self._statistics[name].reduced(held, total)

    def check(self) -> None:
        """Raise ValueError, naming linear and batch, if a real token was NaN or inf; to be called before a solve."""
        self._finite.check()

    @contextmanager
    def collecting(
        self,
        batch_index: int,
        real: Tensor | None = None,
        reference: "DenseReference | None" = None,
    ) -> Iterator[None]:
        """Watch the linears while the body runs.

        Args:
            batch_index: for error messages.
            real: positions of the tokens that count, int64 `[tokens]`, see `real_tokens`; None if all do.
            reference: the uncompressed model beside, if it is run.
        """
        seen: list[tuple[Tensor, str]] = []  # holds the inputs, so that no address is used twice in one pass

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0]
                if name not in self._leader:
                    self._leader[name] = next((leader for tensor, leader in seen if tensor is inputs), name)
                    seen.append((inputs, name))
                if self._leader[name] == name:
                    self._add(name, inputs.detach(), batch_index, real, reference or DenseReference({}))

            return hook

        handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(
        self, name: str, inputs: Tensor, batch_index: int, real: Tensor | None, reference: "DenseReference"
    ) -> None:
        tokens = _tokens(inputs, real)
        if name not in self._statistics:
            self._statistics[name] = InputStatistics(tokens.shape[-1], tokens.device, self._tf32)
        statistics, dense, gap = self._statistics[name], reference.input_of(name), reference.gap_at(name)
        statistics.add(
            tokens,
            None if dense is None else _tokens(dense, real),
            None if gap is None else _tokens(gap, real),
        )
        self._finite.note(name, batch_index, statistics.is_finite)


def _tokens(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows `[tokens, channels]` that count; by position, since a mask as an index would be read."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if real is None else rows.index_select(0, real)
