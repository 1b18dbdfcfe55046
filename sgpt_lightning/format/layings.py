"""Two ways to lay rows of b-bit fields into memory: in words for a GPU's threads, in bytes for a CPU's vectors.

`planes.py` draws the words. In bytes, a width is cut into pieces of 8, 4, 2 and 1 bits, the widest first and lowest
(3 = 2 + 1, 13 = 8 + 4 + 1), and of a row each piece lies alone: `size` = ceil(n w / 8) bytes for n fields of w bits,
where byte i holds the fields i, i + size, i + 2 size and so on, the first of them in its lowest bits. For b = 3 and
n = 10:

    byte     0         1       2       3           4
    fields   0 3 6 9   1 4 7   2 5 8   0 2 4 6 8   1 3 5 7 9
    bits     0 and 1 of each           2 of each

So a shift and a mask of a whole piece give fields that are neighbours in the matrix, and a row is a whole number of
bytes. Measured on one core, 512 columns of 4 bits come out of bytes in 0.1 ns a field, out of words in 0.7.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.planes import lane_order, lay_fields, lift_fields, row_words

BYTE = 8


class Laying(NamedTuple):
    """How fields, masks and survivors lie."""

    name: str
    """Of the tensor that holds codes."""
    dtype: torch.dtype
    """Of that tensor and of masks."""
    size: Callable[[int, int], int]
    """Elements of a row: of how many fields, of how many bits."""
    lay: Callable[[Tensor, int], Tensor]
    """`[rows, count]` whole numbers below 2^bits -> `[rows, size]`."""
    lift: Callable[[Tensor, int, int], Tensor]
    """The fields of `[rows, size]`, bits, count -> `[rows, count]`; int32, or uint8 where bytes hold at most 8 bits."""
    order: Callable[[int, torch.device], Tensor]
    """The columns of a row as its survivors lie, int64: those of one word or byte of the mask, then of the next."""
    lay_stream: Callable[[Tensor, int], Tensor]
    """`[count]` codes of at most 8 bits, which are no rows, -> a stream of elements."""
    lift_stream: Callable[[Tensor, int, int], Tensor]
    """The codes of a stream, bits, count -> uint8 `[count]`."""
    lift_some: Callable[[Tensor, int, Tensor], Tensor]
    """The codes of a stream whose numbers are asked for: stream, bits, int64 `[n]` -> uint8 `[n]`."""


def laying_of(tensors: Mapping[str, Tensor]) -> Laying:
    """Return how the tensors of a resident weight are laid."""
    of_bytes = "bytes" in tensors or ("mask" in tensors and tensors["mask"].dtype == torch.uint8)
    return BYTES if of_bytes else WORDS


def _pieces(bits: int) -> list[tuple[int, int]]:
    """Return the pieces of a width and how far up they go."""
    found, shift = [(BYTE, BYTE * number) for number in range(bits // BYTE)], bits // BYTE * BYTE
    for piece in (4, 2, 1):
        if bits & piece:
            found.append((piece, shift))
            shift += piece
    return found


def row_bytes(count: int, bits: int) -> int:
    """Bytes that a row of `count` fields of `bits` bits takes."""
    return sum(packed_bytes(count, piece) for piece, _ in _pieces(bits))


def lay_bytes(fields: Tensor, bits: int) -> Tensor:
    """Lay rows of fields, whole numbers below 2^bits `[rows, count]`, into uint8 `[rows, row_bytes(count, bits)]`."""
    laid = []
    for piece, shift in _pieces(bits):
        size = packed_bytes(fields.shape[1], piece)
        part = (fields.int() >> shift & (1 << piece) - 1).to(torch.uint8)
        part = torch.nn.functional.pad(part, (0, BYTE // piece * size - part.shape[1]))
        whole = part[:, :size].clone()
        for number in range(1, BYTE // piece):
            whole |= part[:, number * size : (number + 1) * size] << number * piece
        laid.append(whole)
    return torch.cat(laid, 1)


def lift_bytes(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the fields that `lay_bytes` laid, `[rows, count]`: uint8, or int32 where they have more than 8 bits."""
    fields, first = None, 0
    for piece, shift in _pieces(bits):
        size = packed_bytes(count, piece)
        part = _lift(data[:, first : first + size], piece, shift % BYTE).flatten(1)[:, :count]
        part = part if bits <= BYTE else part.int() << shift // BYTE * BYTE
        fields = part if fields is None else fields.bitwise_or_(part)
        first += size
    assert fields is not None
    return fields


def bits_of(mask: Tensor) -> Tensor:
    """Take bytes apart, uint8 `[rows, bytes]`, bit by bit: uint8 `[8, rows, bytes]`, the lowest bits of all first."""
    return _lift(mask.reshape(1, -1), 1, 0).view(BYTE, *mask.shape)


def _lift(data: Tensor, piece: int, shift: int) -> Tensor:
    """Return the pieces of bytes, `shift` bits up, uint8 `[rows, pieces of a byte, bytes]`."""
    fields = torch.empty(len(data), BYTE // piece, data.shape[1], dtype=torch.uint8, device=data.device)
    # Eight bytes at once take half of the time: what a shift drags over from the next byte is masked.
    aligned = not any(number % BYTE for number in (data.storage_offset(), data.stride(0), data.shape[1]))
    dtype = torch.int64 if aligned else torch.uint8
    source, target = data.view(dtype), fields.view(dtype)
    for number in range(BYTE // piece):
        down = number * piece - shift
        move = torch.bitwise_right_shift if down >= 0 else torch.bitwise_left_shift
        move(source, abs(down), out=target[:, number])
    mask = ((1 << piece) - 1) << shift
    if mask < (1 << BYTE) - 1:
        target.bitwise_and_(int.from_bytes(bytes([mask] * dtype.itemsize), "little", signed=dtype == torch.int64))
    return fields


def _byte_order(count: int, device: torch.device) -> Tensor:
    columns = torch.arange(-(-count // BYTE) * BYTE, device=device).view(BYTE, -1).T.reshape(-1)
    return columns[columns < count]


def _stream_of_bytes(codes: Tensor, bits: int) -> Tensor:
    """Lay codes as one row of eights, so that the sizes of its pieces follow from its own."""
    return lay_bytes(torch.nn.functional.pad(codes, (0, -len(codes) % BYTE))[None], bits)[0]


def _some_of_bytes(stream: Tensor, bits: int, numbers: Tensor) -> Tensor:
    found, first = torch.zeros(len(numbers), dtype=torch.uint8, device=stream.device), 0
    for piece, shift in _pieces(bits):
        size = len(stream) // bits * piece
        place, number = first + numbers % max(size, 1), numbers // max(size, 1)
        found |= (stream[place] >> number * piece & (1 << piece) - 1).to(torch.uint8) << shift
        first += size
    return found


def _stream_of_words(codes: Tensor, bits: int) -> Tensor:
    packed = pack_bits(codes, bits)
    return torch.nn.functional.pad(packed, (0, -packed.numel() % 4)).view(torch.int32)


def _some_of_words(stream: Tensor, bits: int, numbers: Tensor) -> Tensor:
    at = numbers * bits
    word = at >> 5
    low, high = (stream[place.clamp(max=len(stream) - 1)].long() & 0xFFFFFFFF for place in (word, word + 1))
    return ((low | high << 32) >> (at & 31) & ((1 << bits) - 1)).to(torch.uint8)


WORDS = Laying(
    "words", torch.int32, row_words, lay_fields, lift_fields, lane_order, _stream_of_words,
    lambda stream, bits, count: unpack_bits(stream.view(torch.uint8)[: packed_bytes(count, bits)], bits, count),
    _some_of_words,
)  # fmt: skip
BYTES = Laying(
    "bytes", torch.uint8, row_bytes, lay_bytes, lift_bytes, _byte_order, _stream_of_bytes,
    lambda stream, bits, count: lift_bytes(stream[None], bits, len(stream) // bits * BYTE)[0, :count],
    _some_of_bytes,
)  # fmt: skip
