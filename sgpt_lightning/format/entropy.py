"""Integer codes as entropy-coded bytes, and how many there will be before any is written.

`encode` turns codes k, int32 `[out_features, in_features]`, into tensors of bytes, `decode` turns them back, and
`coded_size` says what `encode` will take. All arithmetic below is on whole numbers, `>>` and `//` round down, numbers
of several bytes start with the lowest, and bits are laid out as `bits.py` draws them. A tensor without elements is
absent; a matrix without codes has no tensors.

    tables   uint8   lanes (4 bytes); lowest level, highest level, breadth, base (2 bytes, two's complement), bits of a
                     row's level, bits of a column's, escape bits (1 byte each but base); then each table: 1 byte, the
                     largest magnitude T (0 to 127), plus 128 if there is an escape; and, unless that byte is 0, an
                     entry (0 to 127) for each magnitude 0 to T, and one for the escape if there is one
    rows     uint8   level of each row above the lowest row's, in the bits that the header says (0 bits: all are 0)
    columns  uint8   the same for columns
    stream   uint16  the streams, one behind the other
    offsets  int32   where the second, third, ... stream starts in `stream`, in words
    extra    uint8   bits that are not entropy-coded

*Table.* The level of a code is base + level of its row + level of its column, or lowest or highest where it is beyond.
Its table is number t = (level - lowest) // breadth, and there are (highest - lowest) // breadth + 1 tables. With
s = max((lowest + t * breadth) // 4 - 11, 0) and b = k + (2^s >> 1), the table is that of h = b >> s, and the low s
bits of b are extra bits. If |h| > T, the symbol is the escape.

*Frequencies.* Entry 0 has weight 0, entry i has weight floor(16 * 2^((i - 1) / 8)). Let n = 2 T + 1, plus 1 with an
escape. Each h from -T to T and the escape get 1 + weight * (4096 - n) // (sum of all n weights) slots, where h and -h
have the entry of their magnitude; if all weights are 0, 1 slot. Of the slots that are then left of 4,096, the
magnitudes 1, 2, ... T get one more for either sign, in this order, as long as two are left; h = 0 gets the rest. Slots
lie in the order of h from -T to T, and the escape last.

*Streams.* With up to 64 lanes there is one stream; otherwise lanes are a multiple of 64, and each stream has 64. All
streams take steps = ceil(codes / all lanes) steps, at most 16,384. Codes are counted row by row; a stream has steps *
its lanes of them, the last ones have what is left. Code i of a stream is decoded by lane i % lanes at step i // lanes.
A stream starts with the 32-bit state of each lane, the low word first. At each step each lane that has a code finds
the symbol that slot = state % 4096 belongs to, and goes to frequency of the symbol * (state >> 12) + slot - first slot
of the symbol; then, in lane order, each lane whose state is below 2^16 takes the next word of the stream and goes to
state * 2^16 + word. After the last step all states are 2^16. Behind the last stream there may be zeros.

*Extra bits.* Code by code, row by row: the low s bits of b; after an escape, as many bits as the header says, with
2 * (|h| - T - 1), plus 1 if h is negative.

The bytes depend on the codes alone. A code is at most 2^24 - 1 in magnitude. Beyond the entropy within the tables they
take 24 bits a lane, which has 8,192 bits and 2,048 codes to itself where there are as many, a byte per table and
magnitude, and some bits a row and column. Left out: checksums (the file has them), and what a code stands for (steps
and scales).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgpt_lightning.format import rans
from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.contexts import LEVELS, LIMIT, Contexts, contexts_of, level_of, shift_of, table_of
from sgpt_lightning.format.frequencies import COST_UNIT, LARGEST, Tables, tables_of
from sgpt_lightning.format.side import (
    ESCAPE,
    HEADER_BYTES,
    Header,
    pack_extra,
    read_tables,
    signed,
    unpack_extra,
    write_tables,
)  # fmt: skip

_DTYPES = {
    "tables": np.uint8, "rows": np.uint8, "columns": np.uint8, "stream": np.uint16, "offsets": np.int32,
    "extra": np.uint8,
}  # fmt: skip


class _Model(NamedTuple):
    """A matrix of codes and what is known before a bit is written, on the device of the codes."""

    contexts: Contexts
    chosen: Tensor
    """int16 `[out_features, in_features]`: the table of each code."""
    shifts: Tensor
    """int32 `[out_features, in_features]`: low bits that it leaves aside."""
    heads: Tensor
    """int32 `[out_features, in_features]`: codes without their low bits."""
    tables: Tables
    over: Tensor
    """int32 `[out_features, in_features]`: what an escape stores; negative where the table has the code."""


class _Sizes(NamedTuple):
    """What the tensors will hold; `table_bytes` counts the header, `words` the states."""

    header: Header
    table_bytes: int
    words: int
    extra_bits: int


def coded_size(codes: Tensor) -> int:
    """Return the bytes of all tensors of `encode(codes)`, without coding.

    It runs on the device of the codes and waits for it once (and where `torch.bincount` does). Codes that repeat in
    step with the lanes, such as one code everywhere that is not 0, can take up to 1 % more; for others it is exact.

    Args:
        codes: int32 `[out_features, in_features]`, at most 2^24 - 1 in magnitude.

    Raises:
        TypeError: the codes are not int32.
        ValueError: they are no matrix, or one is too large.
    """
    _check_codes(codes)
    if not codes.numel():
        return 0
    header, table_bytes, words, extra_bits = _sizes(codes, _model(codes))
    levels = packed_bytes(codes.shape[0], header.row_bits) + packed_bytes(codes.shape[1], header.column_bits)
    offsets = 4 * (rans.Split.of(codes.numel(), header.lanes).streams - 1)
    return table_bytes + levels + 2 * words + offsets + packed_bytes(extra_bits, 1)


def encode(codes: Tensor) -> dict[str, Tensor]:
    """Encode int32 `[out_features, in_features]` from any device into tensors of bytes, on the CPU.

    Raises:
        TypeError: the codes are not int32.
        ValueError: they are no matrix, or one is more than 2^24 - 1 in magnitude.
    """
    _check_codes(codes)
    if not codes.numel():
        return {}
    codes = codes.cpu()
    model = _model(codes)
    sizes = _sizes(codes, model)
    streams = _encode_streams(model, sizes.header)
    lengths = np.cumsum([stream.size for stream in streams])
    words = np.zeros(max(sizes.words, lengths[-1]), np.uint16)
    words[: lengths[-1]] = np.concatenate(streams)
    tables = np.frombuffer(sizes.header.to_bytes() + write_tables(model.tables, sizes.header), np.uint8)
    tensors = {
        "tables": torch.from_numpy(tables.copy()),
        "rows": _pack_levels(model.contexts.rows, sizes.header.row_bits),
        "columns": _pack_levels(model.contexts.columns, sizes.header.column_bits),
        "stream": torch.from_numpy(words),
        "offsets": torch.from_numpy(lengths[:-1].astype(np.int32)),
        "extra": torch.from_numpy(_encode_extra(codes, model, sizes.header)),
    }
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def decode(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Decode what `encode` made of a matrix of `shape` = (out_features, in_features), with numpy on the CPU.

    Memory and time are bounded by the shape and the bytes at hand, whatever the bytes say.

    Returns:
        int32 `[out_features, in_features]`.

    Raises:
        ValueError: a tensor is missing, unknown, or not what `encode` writes for a matrix of this shape. Damage that
            leads to other codes goes unseen: checksums are the file's.
    """
    given = _check_tensors(tensors)
    if not shape[0] * shape[1]:
        if tensors:
            raise ValueError(f"a matrix of shape {list(shape)} has no tensors, got {', '.join(tensors)}")
        return torch.zeros(shape, dtype=torch.int32)
    data = given["tables"].tobytes()
    header = Header.of(data, shape[0] * shape[1])
    largest, lookup = read_tables(data, header)
    rows = _unpack_levels("rows", given, header.row_bits, shape[0])
    columns = _unpack_levels("columns", given, header.column_bits, shape[1])
    levels = level_of(rows, columns, header.base)
    tables = table_of(levels, torch.tensor(header.lowest), torch.tensor(header.highest), header.breadth)
    split = rans.Split.of(shape[0] * shape[1], header.lanes)
    offsets = np.concatenate([[0], given["offsets"].astype(np.int64), [given["stream"].size]])
    if offsets.size != split.streams + 1 or np.any(np.diff(offsets) < 0):
        raise ValueError(f"offsets must lead to {split.streams} streams in {given['stream'].size} words")
    symbols = rans.decode(given["stream"], offsets, lookup, tables.view(-1).numpy(), split)
    codes = torch.from_numpy(symbols.astype(np.int32) - LARGEST)
    _add_extra(codes.numpy(), tables.view(-1).numpy(), largest, given["extra"], header)
    return codes.view(shape)


def _model(codes: Tensor) -> _Model:
    contexts = contexts_of(codes)
    chosen = contexts.tables()
    shifts = contexts.shifts()[chosen.int()]
    heads = (codes + ((1 << shifts) >> 1)) >> shifts
    tables = tables_of(heads, chosen)
    over = 2 * (heads.abs() - tables.largest.int()[chosen.int()] - 1) + (heads < 0)
    return _Model(contexts, chosen, shifts, heads, tables, over)


def _sizes(codes: Tensor, model: _Model) -> _Sizes:
    """Read all numbers that the sizes follow from, at once, and check the codes."""
    contexts, tables = model.contexts, model.tables
    used = torch.arange(LEVELS, device=codes.device) <= (contexts.highest - contexts.lowest) // contexts.breadth
    stored = tables.largest + 1 + (tables.escapes > 0)
    numbers = (
        codes.min(), codes.max(), contexts.matrix, contexts.lowest, contexts.highest,
        contexts.rows.min(), contexts.rows.max(), contexts.columns.min(), contexts.columns.max(),
        tables.cost(), (used * (1 + stored * (stored > 1))).sum(),
        (tables.counts.sum(1) * contexts.shifts()).sum(), tables.escapes.sum(), model.over.max(),
    )  # fmt: skip
    smallest, greatest, matrix, lowest, highest, *rest = torch.stack([number.long() for number in numbers]).tolist()
    low_row, high_row, low_column, high_column, cost, table_bytes, low_bits, escapes, over = rest
    if max(-smallest, greatest) > LIMIT:
        raise ValueError(f"codes must be from {-LIMIT} to {LIMIT}, got {smallest} to {greatest}")
    bits = -(-cost // COST_UNIT)
    lanes = rans.lanes_for(bits, codes.numel())
    row_bits, column_bits = (high_row - low_row).bit_length(), (high_column - low_column).bit_length()
    base, escape_bits = low_row + low_column - matrix, max(over, 0).bit_length()
    header = Header(lanes, lowest, highest, contexts.breadth, base, row_bits, column_bits, escape_bits)
    extra_bits = low_bits + escapes * header.escape_bits
    return _Sizes(header, HEADER_BYTES + table_bytes, rans.words_for(bits, lanes), extra_bits)


def _encode_streams(model: _Model, header: Header) -> list[NDArray[np.uint16]]:
    slots = signed(model.tables.slots().numpy()).astype(np.uint32)
    starts = np.cumsum(slots, 1, dtype=np.uint32) - slots
    symbol = torch.where(model.over < 0, model.heads + LARGEST, ESCAPE)
    place = (model.chosen.int() * slots.shape[1] + symbol).view(-1).numpy()
    split = rans.Split.of(place.size, header.lanes)
    return rans.encode(slots.reshape(-1)[place], starts.reshape(-1)[place], split)


def _encode_extra(codes: Tensor, model: _Model, header: Header) -> NDArray[np.uint8]:
    over, heads, shifts, code = (m.reshape(-1).numpy() for m in (model.over, model.heads, model.shifts, codes))
    stored = np.flatnonzero((shifts > 0) | (over >= 0))
    shift = shifts[stored].astype(np.int64)
    low = code[stored] + ((1 << shift) >> 1) - (heads[stored].astype(np.int64) << shift)
    escaped = over[stored] >= 0
    return pack_extra(
        low + (np.maximum(over[stored], 0).astype(np.int64) << shift), shift + header.escape_bits * escaped
    )


def _add_extra(codes: NDArray, tables: NDArray, largest: NDArray, extra: NDArray, header: Header) -> None:
    """Replace symbols by codes, in place: `codes` and `tables` are `[count]`."""
    shifts = shift_of(header.lowest + header.breadth * torch.arange(header.tables)).numpy()
    stored = np.flatnonzero((codes == ESCAPE - LARGEST) | (shifts > 0)[tables])
    table, head = tables[stored], codes[stored].astype(np.int64)
    escaped, shift = head == ESCAPE - LARGEST, shifts[table]
    values = unpack_extra(extra, shift + header.escape_bits * escaped)
    over = values >> shift
    beyond = (largest[table] + 1 + (over >> 1)) * (1 - 2 * (over & 1))
    found = (np.where(escaped, beyond, head) << shift) + (values & ((1 << shift) - 1)) - ((1 << shift) >> 1)
    if np.any(np.abs(found) > LIMIT):
        raise ValueError(f"a code is more than {LIMIT} in magnitude")
    codes[stored] = found


def _pack_levels(levels: Tensor, bits: int) -> Tensor:
    return pack_bits((levels - levels.min()).to(torch.uint8), bits) if bits else torch.zeros(0, dtype=torch.uint8)


def _unpack_levels(name: str, given: Mapping[str, NDArray], bits: int, count: int) -> Tensor:
    packed = given[name]
    if packed.size != packed_bytes(count, bits):
        raise ValueError(f"{name} must be {packed_bytes(count, bits)} bytes, got {packed.size}")
    if not bits:
        return torch.zeros(count, dtype=torch.int16)
    return unpack_bits(torch.from_numpy(packed), bits, count).short()


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int32:
        raise TypeError(f"codes must be int32, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [out_features, in_features], got shape {list(codes.shape)}")


def _check_tensors(tensors: Mapping[str, Tensor]) -> dict[str, NDArray]:
    given = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    wrong = [name for name, array in given.items() if _DTYPES.get(name) != array.dtype or array.ndim != 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no tensor of coded codes has this name, type and form")
    return {name: given.get(name, np.zeros(0, dtype)) for name, dtype in _DTYPES.items()}
