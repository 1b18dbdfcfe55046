"""What `format/entropy.py` stores beside its streams: header, frequency tables and bits that are not entropy-coded."""

import struct
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgpt_lightning.format import rans
from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.contexts import LEVELS, LIMIT
from sgpt_lightning.format.frequencies import ENTRIES, LARGEST, Tables, slots_of

ESCAPE = 2 * LARGEST + 1
"""The symbol that stands for all that is not in the table; others are 0, 1, -1, 2, -2, ... in this order."""
ESCAPED = LARGEST + 1
"""Stands among decoded codes where the escape was."""
CODES = np.array([0, *(sign * size for size in range(1, LARGEST + 1) for sign in (1, -1)), ESCAPED], np.int32)
"""The code that each symbol stands for."""
_HEADER = struct.Struct("<IBBBhBBB")
_MOST_ESCAPE_BITS = LIMIT.bit_length() + 1


class Header(NamedTuple):
    """The first bytes of `tables`, in their order."""

    lanes: int
    lowest: int
    highest: int
    breadth: int
    base: int
    row_bits: int
    column_bits: int
    escape_bits: int

    @property
    def tables(self) -> int:
        """Number of tables."""
        return (self.highest - self.lowest) // self.breadth + 1

    def to_bytes(self) -> bytes:
        """Write the header."""
        return _HEADER.pack(*self)

    @classmethod
    def of(cls, data: bytes, count: int) -> "Header":
        """Read the header of `count` codes.

        Raises:
            ValueError: a number in it is none that such codes can have.
        """
        if len(data) < _HEADER.size:
            raise ValueError(f"tables must be at least {_HEADER.size} bytes, got {len(data)}")
        header = cls(*_HEADER.unpack_from(data))
        rans.check_lanes(header.lanes, count)
        if not (
            header.lowest <= header.highest < LEVELS
            and header.breadth > 0
            and abs(header.base) <= 2 * LEVELS
            and max(header.row_bits, header.column_bits) <= 8
            and header.escape_bits <= _MOST_ESCAPE_BITS
        ):
            raise ValueError(f"the tables start with numbers out of range: {header}")
        return header


HEADER_BYTES = _HEADER.size


def write_tables(tables: Tables, header: Header) -> bytes:
    """Write the tables in use."""
    written = bytearray()
    for table in range(header.tables):
        largest, escapes = int(tables.largest[table]), int(tables.escapes[table]) > 0
        entries = tables.entries[table].tolist()
        written.append(largest + 128 * escapes)
        if written[-1]:
            written += bytes(entries[: largest + 1] + entries[-1:] * escapes)
    return bytes(written)


def read_tables(data: bytes, header: Header) -> Tensor:
    """Read the tables behind the header.

    Returns:
        Slots of each symbol, int64 `[tables, ESCAPE + 1]`; each table's add up to 4,096.

    Raises:
        ValueError: there are more or fewer bytes than the tables take, or an entry is too large.
    """
    entries = np.zeros((header.tables, LARGEST + 2), np.int64)
    kinds = np.zeros(len(entries), np.int64)
    place = HEADER_BYTES
    for table in range(len(entries)):
        kind = kinds[table] = data[place] if place < len(data) else 0
        largest, escapes = kind % 128, kind // 128
        stored = data[place + 1 : place + 1 + (largest + 1 + escapes if kind else 0)]
        place += 1 + (largest + 1 + escapes if kind else 0)
        if place > len(data) or max(stored, default=0) >= ENTRIES:
            raise ValueError(f"table {table} of {len(entries)} is cut off or has an entry above {ENTRIES - 1}")
        entries[table, : min(len(stored), largest + 1)] = list(stored[: largest + 1])
        if escapes:
            entries[table, -1] = stored[-1]
    if place != len(data):
        raise ValueError(f"the tables take {place} bytes, got {len(data)} bytes")
    kinds_, entries_ = torch.from_numpy(kinds), torch.from_numpy(entries)
    return signed(slots_of(entries_, kinds_ % 128, kinds_ >= 128))


def signed(slots: Tensor) -> Tensor:
    """Turn slots per magnitude and escape, `[tables, LARGEST + 2]`, into slots per symbol, `[tables, ESCAPE + 1]`."""
    return torch.cat([slots[:, :1], slots[:, 1:-1].repeat_interleave(2, 1), slots[:, -1:]], 1)


def pack_extra(values: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pack numbers of `widths` bits (at most 63, at least 1) back to back, lowest bit first."""
    place = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
    return np.packbits((np.repeat(values, widths) >> place & 1).astype(np.uint8), bitorder="little")


def unpack_extra(packed: Tensor, widths: Tensor) -> Tensor:
    """Unpack numbers of `widths` bits (int64, at most 49), int64 like `widths`, on their device.

    Raises:
        ValueError: there are more or fewer bytes than these take.
    """
    total = int(widths.sum())
    if packed.numel() != packed_bytes(total, 1):
        raise ValueError(f"extra must be {packed_bytes(total, 1)} bytes, got {packed.numel()}")
    padded = torch.nn.functional.pad(packed, (0, 8))
    starts = widths.cumsum(0) - widths
    first, values = starts >> 3, torch.zeros_like(widths)
    for byte in range(7):
        values |= padded[first + byte].long() << (8 * byte)
    return values >> (starts & 7) & ((1 << widths) - 1)


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Pack levels of rows or columns above the lowest of them; nothing where all are equal."""
    return pack_bits((levels - levels.min()).to(torch.uint8), bits) if bits else torch.zeros(0, dtype=torch.uint8)


def unpack_levels(name: str, packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack `count` levels, int16; raises ValueError, naming the tensor, if there are more or fewer bytes."""
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(f"{name} must be {packed_bytes(count, bits)} bytes, got {packed.numel()}")
    if not bits:
        return torch.zeros(count, dtype=torch.int16, device=packed.device)
    return unpack_bits(packed, bits, count).short()
