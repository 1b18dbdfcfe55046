"""Tensors of safetensors files, read one at a time and not mapped: what the process holds is what it asked for.

A mapped file counts as memory of the process where a limit is set, whatever is read of it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of tensors in the files that are read here, by the names that safetensors gives them."""
_LARGEST_HEADER = 100 << 20


class _Entry(NamedTuple):
    path: Path
    start: int
    """Byte of the file where the tensor begins."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """The tensors of safetensors files, by name; read one at a time.

    Args:
        paths: of the files.

    Raises:
        ValueError: a file is truncated or damaged; names it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._entries = {name: entry for path in paths for name, entry in _entries(path).items()}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor of this name is there, and is this one."""
        return name in self and self._entries[name].dtype == tensor.dtype and torch.equal(self.read(name), tensor)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all floating tensors in a dtype, and of the others as they are."""
        sizes = ((torch.Size(e.shape).numel(), e.dtype) for e in self._entries.values())
        return sum(count * (dtype if kind.is_floating_point else kind).itemsize for count, kind in sizes)

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            ValueError: the file has become shorter.
        """
        path, start, shape, dtype = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        with path.open("rb", buffering=0) as file:
            while len(left):
                taken = os.preadv(file.fileno(), [left], start)
                if not taken:
                    raise ValueError(f"{path} is truncated: {name} cannot be read")
                left, start = left[taken:], start + taken
        return tensor


def _entries(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    damaged = f"{path} is truncated or damaged; copy or download it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(damaged)
        try:
            header = json.loads(file.read(length))
            found = {name: _entry(path, 8 + length, e) for name, e in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{damaged} ({error})") from error
    ends = [e.start + torch.Size(e.shape).numel() * e.dtype.itemsize for e in found.values()]
    if max(ends, default=size) > size:
        raise ValueError(damaged)
    return found


def _entry(path: Path, offset: int, values: Mapping[str, Any]) -> _Entry:
    begin, end = values["data_offsets"]
    entry = _Entry(path, offset + begin, tuple(values["shape"]), DTYPES[values["dtype"]])
    if begin < 0 or end - begin != torch.Size(entry.shape).numel() * entry.dtype.itemsize:
        raise ValueError("a tensor has not the size that its shape says")
    return entry
