"""Integer codes as entropy-coded bytes, and how many there will be before any is written.

`encode` turns codes k, int32 `[out_features, in_features]`, into tensors of bytes, `decode` in `decoding.py` turns them
back, and `coded_size` says what `encode` will take. All arithmetic below is on whole numbers, `>>` and `//` round down,
numbers of several bytes start with the lowest, and bits are laid out as `bits.py` draws them. A tensor without elements
is absent; a matrix without codes has no tensors.

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
lie in the order of h = 0, 1, -1, 2, -2, ... T, -T, and the escape last.

*Streams.* With up to 64 lanes there is one stream; otherwise lanes are a multiple of 64, and each stream has 64. All
streams take steps = ceil(codes / all lanes) steps, at most 16,384. Codes are counted row by row; a stream has steps *
its lanes of them, the last ones have what is left. Code i of a stream is decoded by lane i % lanes at step i // lanes.
A stream starts with the 32-bit state of each lane, the low word first. At each step each lane that has a code finds
the symbol that slot = state % 4096 belongs to, and goes to frequency of the symbol * (state >> 12) + slot - first slot
of the symbol; then, in lane order, each lane whose state is below 2^16 takes the next word of the stream and goes to
state * 2^16 + word. After the last step all states are 2^16. Behind its words a stream may have zeros.

*Extra bits.* Code by code, row by row: the low s bits of b; for an escape the low s + escape bits, which hold all of b
in two's complement.

The bytes depend on the codes alone. A code is at most 2^24 - 1 in magnitude. Beyond the entropy within the tables they
take 24 bits a lane, which has 8,192 bits and 2,048 codes to itself where there are enough, a byte per table and
magnitude, and some bits a row and column. Left out: checksums (the file has them), and what a code stands for (steps
and scales).
"""

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgpt_lightning.core.paths import ENCODE, with_kernels
from sgpt_lightning.format import rans
from sgpt_lightning.format.bits import packed_bytes
from sgpt_lightning.format.contexts import LEVELS, LIMIT, Contexts, contexts_of, shift_of
from sgpt_lightning.format.frequencies import COST_UNIT, LARGEST, Tables, tables_of
from sgpt_lightning.format.side import ESCAPE, HEADER_BYTES, Header, pack_extra, pack_levels, signed, write_tables


class _Model(NamedTuple):
    """A matrix of codes and what is known before a bit is written, on the device of the codes."""

    contexts: Contexts
    chosen: Tensor
    """int16 `[out_features, in_features]`: the table of each code."""
    heads: Tensor
    """int32 `[out_features, in_features]`: codes without their low bits."""
    tables: Tables


class _Sizes(NamedTuple):
    """What the tensors will hold; `table_bytes` counts the header, `words` the states."""

    header: Header
    table_bytes: int
    words: int
    extra_bits: int


def coded_size(codes: Tensor) -> int:
    """Return the bytes of all tensors of `encode(codes)`, without coding.

    It runs on the device of the codes and waits for it twice, and where `torch.bincount` does. It is exact, save for
    codes that repeat in step with the lanes or all cost the same (a checkerboard, a ramp, a constant that is not 0):
    these can take up to 1 % more.

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


def channel_bits(codes: Tensor) -> Tensor:
    """Return the mean bits that the codes of each input channel take, float32 `[in_features]`.

    Tables, levels and states are not counted; arguments and errors as for `coded_size`.
    """
    _check_codes(codes)
    if not codes.numel():
        return torch.zeros(codes.shape[1], dtype=torch.float32, device=codes.device)
    model = _model(codes)
    chosen, header = model.chosen.int(), _sizes(codes, model).header
    escaped = model.heads.abs() > model.tables.largest[chosen]
    bits = model.tables.symbol_bits()[chosen, torch.where(escaped, LARGEST + 1, model.heads.abs())]
    return (bits + model.contexts.shifts()[chosen] + header.escape_bits * escaped).mean(0)


def encode(codes: Tensor) -> dict[str, Tensor]:
    """Encode int32 `[out_features, in_features]` from any device into tensors of bytes, on the CPU.

    Raises:
        TypeError: the codes are not int32.
        ValueError: they are no matrix, or one is more than 2^24 - 1 in magnitude.
    """
    _check_codes(codes)
    if not codes.numel():
        return {}
    codes = codes.contiguous()
    model = _model(codes)
    sizes = _sizes(codes, model)
    escaped = model.heads.abs() > model.tables.largest.int()[model.chosen.int()]
    streams, lengths = _encode_streams(model, escaped, sizes.header)
    ends = np.cumsum(lengths)
    words = np.zeros(max(sizes.words, streams.size), np.uint16)
    words[: streams.size] = streams
    stored_tables = Tables(*(part.cpu() for part in model.tables))
    tables = np.frombuffer(sizes.header.to_bytes() + write_tables(stored_tables, sizes.header), np.uint8)
    tensors = {
        "tables": torch.from_numpy(tables.copy()),
        "rows": pack_levels(model.contexts.rows.cpu(), sizes.header.row_bits),
        "columns": pack_levels(model.contexts.columns.cpu(), sizes.header.column_bits),
        "stream": torch.from_numpy(words),
        "offsets": torch.from_numpy(ends[:-1].astype(np.int32)),
        "extra": torch.from_numpy(_encode_extra(codes, model, escaped, sizes.header)),
    }
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _model(codes: Tensor) -> _Model:
    contexts = contexts_of(codes)
    chosen = contexts.tables()
    heads = codes
    if shift_of(contexts.highest):
        shifts = contexts.shifts()[chosen.int()]
        heads = (codes + ((1 << shifts) >> 1)) >> shifts
    return _Model(contexts, chosen, heads, tables_of(heads, chosen))


def _sizes(codes: Tensor, model: _Model) -> _Sizes:
    """Read all numbers that the sizes follow from, at once, and check the codes."""
    contexts, tables = model.contexts, model.tables
    used = torch.arange(LEVELS, device=codes.device) <= (contexts.highest - contexts.lowest) // contexts.breadth
    stored = tables.largest + 1 + (tables.escapes > 0)
    numbers = (
        *codes.aminmax(), *model.heads.aminmax(), contexts.matrix, contexts.lowest, contexts.highest,
        contexts.rows.min(), contexts.rows.max(), contexts.columns.min(), contexts.columns.max(),
        tables.cost(), (used * (1 + stored * (stored > 1))).sum(),
        (tables.counts.sum(1) * contexts.shifts()).sum(), tables.escapes.sum(),
    )  # fmt: skip
    smallest, greatest, *rest = torch.stack([number.long() for number in numbers]).tolist()
    low_head, high_head, matrix, lowest, highest, low_row, high_row, low_column, high_column, *rest = rest
    cost, table_bytes, low_bits, escapes = rest
    if max(-smallest, greatest) > LIMIT:
        raise ValueError(f"codes must be from {-LIMIT} to {LIMIT}, got {smallest} to {greatest}")
    bits = -(-cost // COST_UNIT)
    lanes = rans.lanes_for(bits, codes.numel())
    row_bits, column_bits = (high_row - low_row).bit_length(), (high_column - low_column).bit_length()
    escape_bits = max(high_head, -low_head - 1).bit_length() + 1 if escapes else 0
    base = low_row + low_column - matrix
    header = Header(lanes, lowest, highest, contexts.breadth, base, row_bits, column_bits, escape_bits)
    extra_bits = low_bits + escapes * header.escape_bits
    return _Sizes(header, HEADER_BYTES + table_bytes, rans.words_for(bits, lanes), extra_bits)


class _Symbols(NamedTuple):
    """What rANS encodes, on the device of the codes."""

    places: Tensor
    """int32 `[count]`: where in the tables the symbol of each code is."""
    slots: Tensor
    """int64 `[LEVELS, ESCAPE + 1]`."""
    starts: Tensor
    """int64, like `slots`: the first slot of each symbol."""
    split: rans.Split


def _encode_streams(model: _Model, escaped: Tensor, header: Header) -> tuple[NDArray[np.uint16], NDArray]:
    """Return the words of all streams, one behind the other, and how many each has."""
    slots = signed(model.tables.slots())
    symbol = torch.where(escaped, ESCAPE, 2 * model.heads.abs() - (model.heads > 0).int())
    places = (model.chosen.int() * slots.shape[1] + symbol).view(-1)
    symbols = _Symbols(places, slots, slots.cumsum(1) - slots, rans.Split.of(places.numel(), header.lanes))
    return with_kernels(places.device, ENCODE, lambda k: _by_kernel(k, symbols), lambda: _by_numpy(symbols))


def _by_numpy(symbols: _Symbols) -> tuple[NDArray[np.uint16], NDArray]:
    places = symbols.places.cpu().numpy()
    slots, starts = (part.cpu().numpy().astype(np.uint32).reshape(-1) for part in (symbols.slots, symbols.starts))
    streams = rans.encode(slots[places], starts[places], symbols.split)
    return np.concatenate(streams), np.array([stream.size for stream in streams])


def _by_kernel(kernels: ModuleType, symbols: _Symbols) -> tuple[NDArray[np.uint16], NDArray]:
    entries = (symbols.slots - 1 | symbols.starts << rans.SLOT_BITS).to(torch.int32).view(-1)
    words, starts = kernels.encode_streams(
        symbols.places, entries, symbols.split.streams, symbols.split.steps, symbols.split.lanes
    )
    used = torch.arange(words.shape[1], device=words.device) >= starts[:, None]
    return words[used].cpu().numpy().view(np.uint16), (words.shape[1] - starts).cpu().numpy()


def _encode_extra(codes: Tensor, model: _Model, escapes: Tensor, header: Header) -> NDArray[np.uint8]:
    shifts = model.contexts.shifts().long()
    stored = (escapes | (shifts > 0)[model.chosen.int()]).view(-1).nonzero().view(-1)
    kept = (codes.reshape(-1)[stored], shifts[model.chosen.view(-1)[stored].int()], escapes.view(-1)[stored])
    code, shift, escaped = (part.cpu().numpy() for part in kept)
    widths = shift + header.escape_bits * escaped
    return pack_extra(code + ((1 << shift) >> 1) & ((1 << widths) - 1), widths)


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int32:
        raise TypeError(f"codes must be int32, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [out_features, in_features], got shape {list(codes.shape)}")
