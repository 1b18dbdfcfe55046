"""Memory and time of what is tried, one thing after another, by name."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from sgpt_lightning.evaluation.peak_memory import PeakMemory, peak_memory, return_free_memory

Announce = Callable[[str], None]
"""Is told by its name what begins; what was running before it has ended then."""


def nobody(what: str) -> None:
    """Be told of nothing."""


class Meter:
    """Most memory, on the device and of the process, and seconds of everything that was tried.

    Args:
        device: where models compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        """By name, one for each time that it was begun."""
        self.aside = 0
        """Bytes of the process that are there because something is only tried; they are not counted."""
        self._most: dict[str, dict[str, int | None]] = {}
        self._running: tuple[str, float, ExitStack, PeakMemory, PeakMemory] | None = None

    def stage(self, what: str) -> None:
        """Begin something that uses nothing of what was tried before; what the system can have back it is given.

        Within a stage it is not, as in earnest: what an allocator keeps between two batches is taken.
        """
        self.end()
        return_free_memory()
        self.begin(what)

    def begin(self, what: str) -> None:
        """Begin something, and end what was running."""
        self.end()
        marks = ExitStack()
        host, device = marks.enter_context(peak_memory("cpu")), marks.enter_context(peak_memory(self.device))
        self._running = what, time.perf_counter(), marks, host, device

    def end(self) -> None:
        """End what is running; nothing if that is nothing."""
        if self._running is None:
            return
        what, started, marks, host, device = self._running
        self._running = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.setdefault(what, []).append(time.perf_counter() - started)
        marks.close()
        found = {"cpu": None if host.nbytes is None else host.nbytes - self.aside}
        if self.device.type != "cpu":
            found[self.device.type] = device.nbytes
        before = self._most.get(what, {})
        self._most[what] = {kind: _most(before.get(kind, 0), nbytes) for kind, nbytes in found.items()}

    def last(self, what: str) -> float:
        """Return the seconds of something when it was begun last; 0 if it never was."""
        return self.seconds.get(what, [0.0])[-1]

    def peak(self, kind: str, later: Mapping[str, int]) -> int | None:
        """Return the most bytes of all that was tried, of a kind of device, each with what will come on top of it.

        None where the system does not tell.
        """
        found = [(most[kind], later.get(what, 0)) for what, most in self._most.items()]
        return None if None in dict(found) else max((value or 0) + more for value, more in found)


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)
