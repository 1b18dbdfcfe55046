"""Hidden states of all calibration batches, between two blocks: on the device, in the host's memory, or on disk.

They are what grows with the text: 128 windows of 2,048 tokens are 2.7 GB in float16 for OPT-13B, twice that where the
dense model is carried beside. A batch keeps the place that it was first given, and is the same to the last bit
wherever it is kept. With `auto` batches go to the device while they take no more than `DEVICE_SHARE` of what was free
there with the first of them, then to the host's memory up to `HOST_SHARE` of what was available, then to disk.

On CUDA the host's memory is pinned, and the next batch is fetched on a stream of its own: the host waits for nothing,
except where a batch goes to disk. The file has no name, so that the system removes it whatever happens, `kill -9`
included; the folder is Python's for temporary files, which the variable TMPDIR of the environment moves.

Left out: what blocks receive besides (masks, rotary angles) stays on the device; without padding batches share it.
"""

import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sgpt_lightning.arguments import check_choice

Activations = Literal["auto", "device", "cpu", "disk"]
DEVICE_SHARE = 0.25
"""Of the free memory of a GPU, for hidden states; the rest is for a block, its statistics and the solve."""
HOST_SHARE = 0.5
"""Of the available memory of the host."""


def free_bytes(device: torch.device) -> int:
    """Return the bytes that could be taken on a device: a GPU's free memory, elsewhere what Linux calls available.

    Where the system does not tell, that is 2^63 - 1.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63 - 1
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:")), 2**63 - 1)


class ScratchFile:
    """A file without a name that holds tensors, each in a place of its own.

    Raises:
        OSError: the folder for temporary files cannot be written, or is full; says which one it is.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="sgpt-")  # noqa: SIM115  # as long as this object
        self.close = weakref.finalize(self, self._file.close)
        """Removes the file; so does letting go of this object."""
        self.nbytes = 0
        """Of all places."""

    def add(self, tensor: Tensor) -> int:
        """Write a tensor into a new place; return where that is, in bytes."""
        place = self.nbytes
        self.nbytes += tensor.nbytes
        self.write(place, tensor)
        return place

    def write(self, place: int, tensor: Tensor) -> None:
        """Write a tensor into a place of its size."""
        left = _bytes_of(tensor.detach().cpu().contiguous())
        try:
            while len(left):
                written = os.pwrite(self._file.fileno(), left, place)
                left, place = left[written:], place + written
        except OSError as error:
            raise OSError(
                f"hidden states do not fit into {tempfile.gettempdir()}: {error}. Free {self.nbytes:,} bytes there, or "
                "set TMPDIR to another folder"
            ) from error

    def read(self, place: int, tensor: Tensor) -> None:
        """Fill a tensor on the CPU, contiguous, with what is in a place."""
        left = _bytes_of(tensor)
        while len(left):
            taken = os.preadv(self._file.fileno(), [left], place)
            assert taken, "the place was written"
            left, place = left[taken:], place + taken


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Kept(NamedTuple):
    """Where the hidden state of a batch is."""

    tier: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """Where it is computed with."""
    value: Tensor | int
    """The tensor, on the device or the host, or a place in the file."""
    written: Any = None
    """Event of CUDA behind which the host's copy is whole."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HiddenStates:
    """Hidden states by stream (a word) and batch.

    Args:
        activations: the tier, or `auto`.

    Raises:
        ValueError: it is none of these.
    """

    def __init__(self, activations: Activations = "auto") -> None:
        check_choice("activations", activations, Activations)
        self._asked = activations
        self._left: dict[str, float] | None = None
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._ahead: dict[tuple[str, int], tuple[Tensor, Any]] = {}
        self._file: ScratchFile | None = None
        self._side: Any = None

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that are kept by tier; a tensor that is two batches' counts twice."""
        found = dict.fromkeys(get_args(Activations)[1:], 0)
        for kept in self._kept.values():
            found[kept.tier] += kept.nbytes
        return found

    def put(self, stream: str, index: int, hidden: Tensor) -> None:
        """Keep the hidden state `[batch, time, hidden]` of a batch, in place of the one before."""
        key, hidden = (stream, index), hidden.detach()
        self._ahead.pop(key, None)
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype) != (hidden.shape, hidden.dtype):
            tier = self._tier_for(hidden) if kept is None else kept.tier
            kept = _Kept(tier, hidden.shape, hidden.dtype, hidden.device, -1)
        if kept.tier == "disk":
            self._file = self._file or ScratchFile()
            if kept.value == -1:
                kept = kept._replace(value=self._file.add(hidden))
            else:
                assert isinstance(kept.value, int)
                self._file.write(kept.value, hidden)
        elif kept.tier == "cpu" and hidden.is_cuda:
            kept = _to_host(kept, hidden)
        else:
            kept = kept._replace(value=hidden)
        self._kept[key] = kept

    def get(self, stream: str, index: int) -> Tensor:
        """Return the hidden state of a batch, on the device where it came from."""
        key = (stream, index)
        if key not in self._ahead:
            self.prefetch(stream, index)
        if key not in self._ahead:
            value = self._kept[key].value
            assert isinstance(value, Tensor)
            return value
        hidden, fetched = self._ahead.pop(key)
        if fetched is not None:
            current = torch.cuda.current_stream(hidden.device)
            current.wait_event(fetched)
            hidden.record_stream(current)
        return hidden

    def prefetch(self, stream: str, index: int) -> None:
        """Begin to fetch a batch that is asked for next; nothing if there is none, or it is on the device."""
        key = (stream, index)
        kept = self._kept.get(key)
        if kept is None or key in self._ahead or (isinstance(kept.value, Tensor) and kept.value.device == kept.device):
            return
        if isinstance(kept.value, Tensor):
            host = kept.value
        else:
            host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.device.type == "cuda")
            assert self._file is not None
            self._file.read(kept.value, host)
        if kept.device.type != "cuda":
            self._ahead[key] = host, None
            return
        self._side = self._side or torch.cuda.Stream(kept.device)
        if kept.written is not None:
            self._side.wait_event(kept.written)
        with torch.cuda.stream(self._side):
            hidden = host.to(kept.device, non_blocking=True)
        self._ahead[key] = hidden, self._side.record_event()

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._ahead.clear()
        self._left = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _tier_for(self, hidden: Tensor) -> str:
        """Return where a batch goes that is new, and count it there."""
        if self._asked != "auto":
            return self._asked
        self._left = self._left or _room(hidden.device)
        tier = next((tier for tier, left in self._left.items() if hidden.nbytes <= left), "disk")
        if tier != "disk":
            self._left[tier] -= hidden.nbytes
        return tier


def _room(device: torch.device) -> dict[str, float]:
    """Return the bytes that `auto` may fill, by tier."""
    host = HOST_SHARE * free_bytes(torch.device("cpu"))
    if device.type != "cuda":  # one memory
        return {"device": host, "cpu": 0}
    return {"device": DEVICE_SHARE * free_bytes(device), "cpu": host}


def split_over_tiers(activations: Activations, device: torch.device, nbytes: int, count: int) -> dict[str, int]:
    """Return the bytes that `count` hidden states of `nbytes` each would take in each tier."""
    room = _room(device) if activations == "auto" else {activations: float("inf")}
    found = dict.fromkeys(get_args(Activations)[1:], 0)
    for tier in found:
        here = min(count, int(min(room.get(tier, 0.0 if tier != "disk" else float("inf")), 2**62) // max(nbytes, 1)))
        found[tier] = here * nbytes
        count -= here
    return found


def _to_host(kept: _Kept, hidden: Tensor) -> _Kept:
    """Copy to pinned memory without waiting; the buffer of the batch is used again."""
    host = kept.value
    if not isinstance(host, Tensor):
        host = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=True)
    host.copy_(hidden, non_blocking=True)
    return kept._replace(value=host, written=torch.cuda.current_stream(hidden.device).record_event())
