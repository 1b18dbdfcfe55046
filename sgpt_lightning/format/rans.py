"""Interleaved rANS: symbols with frequencies out of 4,096 to 16-bit words and back, by whole numbers only.

Asymmetric numeral systems (Duda, arXiv 1311.2540) with the interleaving of Giesen (arXiv 1402.3392): a lane is a coder
of its own with a 32-bit state, and all lanes of a stream share one sequence of words. Where the lanes of a stream
decode step by step, each takes its next word in lane order, so numpy over lanes, a loop over codes and a GPU program
with a prefix sum all read the same bytes. `format/entropy.py` says which code belongs to which lane.

It leaves out what the symbols mean and where frequencies come from (`format/contexts.py`).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
"""Frequencies of one table add up to this."""
FIRST_STATE = 1 << 16
"""A state below this takes a word; it is also what every lane starts to encode from and ends to decode at."""
LANES = 64
"""Lanes of a stream, where there is more than one stream."""
LANES_AT_ONCE = 3072
"""Lanes that numpy decodes side by side at most: its overhead is small, its arrays are in the cache. From 2,048 to
6,144 measures alike; a rest of a few lanes in a group of its own is what costs."""
ENCODED_AT_ONCE = 32
"""Streams that numpy encodes side by side."""
MAX_STEPS = 1 << 14
"""Most codes of one lane; it bounds the time that a damaged file can cost."""
_LANE_BITS = 8192
"""A lane costs 24 bits on average; with this many to itself that is 0.3 %. Lanes past `_MANY` have twice as many."""
_LANE_CODES = 2048
"""Fewer codes a lane would make nothing faster that is not fast."""
_MANY = 2048


def lanes_for(bits: int, count: int) -> int:
    """Choose the lanes for `count` codes that take `bits` bits."""
    lanes = min(bits // _LANE_BITS, count // _LANE_CODES)
    lanes = max(min(lanes, max(_MANY, bits // (2 * _LANE_BITS))), 1)
    if lanes > LANES:
        lanes = (lanes + LANES // 2) // LANES * LANES
    fewest = -(-count // MAX_STEPS)
    return max(lanes, fewest if fewest <= LANES else -(-fewest // LANES) * LANES)


def check_lanes(lanes: int, count: int) -> None:
    """Raise ValueError where `count` codes cannot be dealt to so many lanes."""
    if not 1 <= lanes <= count <= lanes * MAX_STEPS or (lanes > LANES and lanes % LANES):
        raise ValueError(f"{count} codes cannot be dealt to {lanes} lanes")


def words_for(bits: int, lanes: int) -> int:
    """Return the words that are set aside for codes of `bits` bits in all, states included.

    What a lane has beyond its words, 0 to 16 bits, 8 on average, stays in its state. The states of many lanes are
    independent, so the sum is within 5 of its standard deviations (1 / sqrt(12) words a lane). A step also rounds: it
    costs 0.0081 * (middle of the symbol's slots / 4096 - 1/2) bits on average (log2(e) / x over the states), nothing
    where symbols are as frequent as their slots; half a bit a lane is for what remains. Lanes of less than 64 bits
    may all have nothing in their states.
    """
    saved = lanes / 2 - min(lanes / 2, 1.5 * math.sqrt(lanes) + lanes / 32) if bits >= 64 * lanes else 0
    return 2 * lanes + max(math.ceil(bits / 16 - saved), 0) + 1


class Split(NamedTuple):
    """How codes are dealt: code i of a stream is decoded by lane i % lanes at step i // lanes."""

    streams: int
    lanes: int
    steps: int

    @classmethod
    def of(cls, count: int, all_lanes: int) -> "Split":
        """Deal `count` codes to `all_lanes` lanes, which are at most `LANES` or a multiple of it."""
        streams = -(-all_lanes // LANES)
        return cls(streams, all_lanes // streams, -(-count // all_lanes))

    def groups(self) -> list[slice]:
        """Return the streams that are encoded side by side."""
        firsts = range(0, self.streams, ENCODED_AT_ONCE)
        return [slice(first, min(first + ENCODED_AT_ONCE, self.streams)) for first in firsts]

    def deal(self, codes: NDArray, idle: int) -> NDArray:
        """Arrange `[count]` as `[streams, steps, lanes]`; what is past the end is `idle`."""
        dealt = np.full(self.streams * self.steps * self.lanes, idle, codes.dtype)
        dealt[: codes.size] = codes
        return dealt.reshape(self.streams, self.steps, self.lanes)


def encode(frequencies: NDArray[np.uint32], starts: NDArray[np.uint32], split: Split) -> list[NDArray[np.uint16]]:
    """Encode codes that take slots [start, start + frequency) of 4,096 each.

    Args:
        frequencies: uint32 `[count]`, from 1 to 4,096.
        starts: uint32 `[count]`, so that start + frequency <= 4,096.
        split: how codes are dealt.

    Returns:
        The words of each stream: two for the state of each lane, low half first, and those that its lanes ask for.
    """
    dealt = split.deal(frequencies, SLOTS), split.deal(starts, 0)
    streams = []
    for group in split.groups():
        words, asks, states = _encode_group(*(part[group] for part in dealt))
        heads = states.astype("<u4").view("<u2")
        streams += [np.concatenate([heads[s], words[s][asks[s]]]) for s in range(len(heads))]
    return streams


def _encode_group(frequencies: NDArray, starts: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Return the low half of each state before its step, whether it was put out, and the states to start with."""
    streams, steps, lanes = frequencies.shape
    by_step = frequencies.transpose(1, 0, 2).reshape(steps, -1), starts.transpose(1, 0, 2).reshape(steps, -1)
    state = np.full(streams * lanes, FIRST_STATE, np.uint32)
    words, asks = np.empty((steps, state.size), np.uint16), np.empty((steps, state.size), np.bool_)
    for step in reversed(range(steps)):
        frequency, start = by_step[0][step], by_step[1][step]
        full = np.greater_equal(state >> np.uint32(32 - SLOT_BITS), frequency, out=asks[step])
        words[step] = state  # the cast cuts the high half
        np.right_shift(state, np.uint32(16), out=state, where=full)
        state += state // frequency * (np.uint32(SLOTS) - frequency)
        state += start
    shape = (steps, streams, lanes)
    return words.reshape(shape).transpose(1, 0, 2), asks.reshape(shape).transpose(1, 0, 2), state.reshape(streams, -1)


def slot_table(frequencies: Tensor) -> Tensor:
    """Lay out what a decoder looks up per slot, on the device of the frequencies.

    Args:
        frequencies: int64 `[tables, symbols]`, in the order of their slots; each table adds up to 4,096.

    Returns:
        int32 `[tables * 4096]`, table behind table, the bits of a 32-bit number: the frequency of the slot's symbol
        less 1 (12 bits, the lowest), slot - first slot of the symbol (12 bits), the symbol (8 bits).
    """
    tables, symbols = frequencies.shape
    symbol = torch.arange(symbols, device=frequencies.device).expand(tables, -1)
    starts = frequencies.cumsum(1) - frequencies
    of_first = frequencies - 1 - (starts << SLOT_BITS) + (symbol << 2 * SLOT_BITS)
    entries = of_first.view(-1).repeat_interleave(frequencies.view(-1), output_size=tables * SLOTS).view(tables, SLOTS)
    entries += torch.arange(SLOTS, device=entries.device) << SLOT_BITS
    return entries.view(-1).to(torch.int32)


class Coded(NamedTuple):
    """The streams of a matrix, ready to be decoded."""

    words: NDArray[np.uint16]
    """`[words]`."""
    offsets: NDArray[np.int64]
    """`[streams + 1]`, ascending, first 0, last the number of words: stream s is words[offsets[s] : offsets[s + 1]]."""
    entries: NDArray[np.uint32]
    """Of `slot_table`."""
    chosen: NDArray
    """int `[count]`: the table of each code."""
    split: Split


def decode(matrices: Sequence[Coded]) -> list[NDArray[np.uint8]]:
    """Decode the streams of matrices side by side: small ones have too few lanes to be fast alone.

    Returns:
        The symbols of each matrix, uint8 `[count]`.

    Raises:
        ValueError: the words are not those of such codes.
    """
    # Idle lanes stay where they are: one symbol with all slots.
    idle = np.arange(SLOTS, dtype=np.uint64) << np.uint64(32) | np.uint64(SLOTS)
    entries = np.concatenate([matrix.entries for matrix in matrices])
    moves = np.concatenate([_moves(entries), idle])
    streams, dealt, first = [], [], 0
    for matrix in matrices:
        places = (matrix.chosen.astype(np.int32) << SLOT_BITS) + np.int32(first)
        dealt.append(matrix.split.deal(places, moves.size - SLOTS))
        edges = zip(matrix.offsets[:-1], matrix.offsets[1:], strict=True)
        streams += [_Stream(matrix.words[a:b], found) for (a, b), found in zip(edges, dealt[-1], strict=True)]
        first += matrix.entries.size
    streams.sort(key=lambda stream: -len(stream.places))
    for group in _side_by_side(streams):
        _decode_group(group, moves)
    symbols = (entries >> np.uint32(2 * SLOT_BITS)).astype(np.uint8)
    return [symbols[places.reshape(-1)[: m.chosen.size]] for places, m in zip(dealt, matrices, strict=True)]


def _moves(entries: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Take frequency (low half) and slot - first slot of the symbol (high half) apart, as `_run` adds them up."""
    inside = (entries >> np.uint32(SLOT_BITS)) & np.uint32(SLOTS - 1)
    return inside.astype(np.uint64) << np.uint64(32) | (entries & np.uint32(SLOTS - 1)) + np.uint64(1)


class _Stream(NamedTuple):
    words: NDArray[np.uint16]
    places: NDArray[np.int32]
    """`[steps, lanes]`: where in all slots the table of a code starts; once decoded, where the code was."""


def _side_by_side(streams: Sequence[_Stream]) -> Iterator[Sequence[_Stream]]:
    """Cut streams into groups of about as many lanes each, those that numpy takes at once."""
    before = np.cumsum([0, *(stream.places.shape[1] for stream in streams)])
    groups = -(-before[-1] // LANES_AT_ONCE)
    edges = [*np.flatnonzero(np.diff(before[:-1] * groups // before[-1], prepend=-1)), len(streams)]
    return (streams[first:last] for first, last in itertools.pairwise(edges))


def _decode_group(streams: Sequence[_Stream], moves: NDArray[np.uint64]) -> None:
    """Decode streams side by side, the one with the most steps first; their `places` are replaced."""
    lanes = np.array([stream.places.shape[1] for stream in streams])
    if any(stream.words.size < 2 * stream.places.shape[1] for stream in streams):
        raise ValueError("a stream is shorter than the states of its lanes")
    edges = np.concatenate([[0], np.cumsum(lanes)])
    found = np.full((len(streams[0].places), edges[-1]), moves.size - SLOTS, np.int32)
    for edge, stream in zip(edges, streams, strict=False):
        found[: len(stream.places), edge : edge + stream.places.shape[1]] = stream.places
    words = np.concatenate([stream.words for stream in streams])
    ends = np.cumsum([stream.words.size for stream in streams])
    state = np.concatenate([s.words[: 2 * s.places.shape[1]].view("<u4") for s in streams]).astype(np.uint32)
    cursor = _run(words, np.concatenate([[0], ends[:-1]]) + 2 * lanes, moves, found, state, edges)
    rests = (words[start:end] for start, end in zip(cursor, ends, strict=True))
    if np.any(state != FIRST_STATE) or np.any(cursor > ends) or any(rest.any() for rest in rests):
        raise ValueError(f"words of {len(streams)} streams do not end where their codes do")
    for edge, stream in zip(edges, streams, strict=False):
        stream.places[:] = found[: len(stream.places), edge : edge + stream.places.shape[1]]


def _run(
    words: NDArray, cursor: NDArray, moves: NDArray, found: NDArray, state: NDArray, edges: NDArray
) -> NDArray[np.int64]:
    """Take all steps; `found` `[steps, lanes]` and `state` `[lanes]` change in place. Return where each stream ends."""
    move, slot = np.empty(state.size, np.uint64), np.empty(state.size, np.uint32)
    frequency, inside = move.view(np.uint32)[0::2], move.view(np.uint32)[1::2]
    hand_out = (_OneStream if cursor.size == 1 else _Streams)(words, cursor, edges)
    slots, bits, half, full = map(np.uint32, (SLOTS - 1, SLOT_BITS, 16, FIRST_STATE))
    for place in found:
        place += np.bitwise_and(state, slots, out=slot).view(np.int32)
        moves.take(place, out=move, mode="clip")
        np.right_shift(state, bits, out=state)
        np.multiply(state, frequency, out=state)
        np.add(state, inside, out=state)
        asks = (state < full).nonzero()[0]
        state[asks] = state.take(asks) << half | hand_out.next(asks)
    return hand_out.cursor


class _OneStream:
    """The words of a stream alone: those of a step lie side by side."""

    def __init__(self, words: NDArray, cursor: NDArray, edges: NDArray) -> None:
        self._words = np.concatenate([words, np.zeros(edges[-1], words.dtype)])
        self._last, self._at = words.size, int(cursor[0])

    def next(self, asks: NDArray) -> NDArray:
        first = min(self._at, self._last)
        self._at += asks.size
        return self._words[first : first + asks.size]

    @property
    def cursor(self) -> NDArray:
        return np.array([self._at])


class _Streams:
    """The words of streams side by side."""

    def __init__(self, words: NDArray, cursor: NDArray, edges: NDArray) -> None:
        self._words, self.cursor, self._edges = words, cursor, edges
        self._ranks, self._stream_of = np.arange(edges[-1]), np.repeat(np.arange(cursor.size), np.diff(edges))

    def next(self, asks: NDArray) -> NDArray:
        bounds = asks.searchsorted(self._edges)
        taken = (self.cursor - bounds[:-1]).take(self._stream_of.take(asks))
        taken += self._ranks[: asks.size]
        self.cursor += bounds[1:]
        self.cursor -= bounds[:-1]
        return self._words.take(taken, mode="clip")
