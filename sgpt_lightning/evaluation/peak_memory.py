"""The most memory that something took while it ran.

On a GPU that is what torch's allocator held for tensors; on the CPU it is what the whole process held, Python and its
libraries included, which Linux alone tells and lets one start anew (`/proc/self/clear_refs`, man 5 proc).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """What `peak_memory` found out."""

    nbytes: int | None = None
    """Bytes at most at one time; None before the body has ended, and where the system does not tell."""
    before: int | None = None
    """Bytes that were held when the body began; None where the system does not tell."""

    @property
    def growth(self) -> int | None:
        """What of the peak came on top of what was held before; None where the system does not tell."""
        return None if self.nbytes is None or self.before is None else self.nbytes - self.before


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[PeakMemory]:
    """Measure the most memory that is held while the body runs, what was there before it included.

    Args:
        device: whose memory; anything but CUDA counts as the CPU.
    """
    device, peak = torch.device(device), PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    starts_anew = _start_anew()
    peak.before = _resident_at_most() if starts_anew else None
    yield peak
    peak.nbytes = _resident_at_most() if starts_anew else None


def return_free_memory() -> None:
    """Give the system back what the C library keeps of the process's memory for later, where it is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _start_anew() -> bool:
    """Set the process's mark to what it holds now; False where that cannot be done."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_at_most() -> int | None:
    """Return the mark in bytes, `VmHWM` of the process's status, which is in KiB."""
    lines = (_PROCESS / "status").read_text().splitlines()
    marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(marks[0]) * 2**10 if marks else None
