"""Interleaved rANS: symbols with frequencies out of 4,096 to 16-bit words and back, by whole numbers only.

Asymmetric numeral systems (Duda, arXiv 1311.2540) with the interleaving of Giesen (arXiv 1402.3392): a lane is a coder
of its own with a 32-bit state, and all lanes of a stream share one sequence of words. Where the lanes of a stream
decode step by step, each takes its next word in lane order, so numpy over lanes, a loop over codes and a GPU program
with a prefix sum all read the same bytes. `format/entropy.py` says which code belongs to which lane.

It leaves out what the symbols mean and where frequencies come from (`format/contexts.py`).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
"""Frequencies of one table add up to this."""
FIRST_STATE = 1 << 16
"""A state below this takes a word; it is also what every lane starts to encode from and ends to decode at."""
LANES = 64
"""Lanes of a stream, where there is more than one stream."""
STREAMS_AT_ONCE = 32
"""Streams that numpy decodes side by side: 2,048 lanes keep its overhead small and its arrays in the cache."""


MAX_STEPS = 1 << 14
"""Most codes of one lane; it bounds the time that a damaged file can cost."""
_LANE_BITS = 8192
"""A lane costs 24 bits on average; with this many to itself that is 0.3 %."""
_LANE_CODES = 2048
"""Fewer codes a lane would make nothing faster that is not fast."""


def lanes_for(bits: int, count: int) -> int:
    """Choose the lanes for `count` codes that take `bits` bits."""
    lanes = max(min(bits // _LANE_BITS, count // _LANE_CODES), 1)
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

    The words that a lane asks for leave 0 to 16 bits in its state, 8 on average; the states of many lanes are
    independent, so the sum stays within 5 of its standard deviations (1 / sqrt(12) words a lane).
    """
    saved = lanes / 2 - min(lanes / 2, 1.5 * math.sqrt(lanes))
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

    def deal(self, codes: NDArray, idle: int) -> NDArray:
        """Arrange `[count]` as `[streams, steps, lanes]`; what is past the end is `idle`."""
        dealt = np.full(self.streams * self.steps * self.lanes, idle, codes.dtype)
        dealt[: codes.size] = codes
        return dealt.reshape(self.streams, self.steps, self.lanes)


class SlotTable(NamedTuple):
    """What a decoder looks up, table behind table."""

    moves: NDArray[np.uint64]
    """`[tables * 4096]`: the frequency of the symbol in the low half, slot - first slot of the symbol in the high."""
    symbols: NDArray[np.uint8]
    """`[tables * 4096]`: which symbol it is."""


def encode(frequencies: NDArray[np.uint32], starts: NDArray[np.uint32], split: Split) -> list[NDArray[np.uint16]]:
    """Encode codes that take slots [start, start + frequency) of 4,096 each.

    Args:
        frequencies: uint32 `[count]`, from 1 to 4,096.
        starts: uint32 `[count]`, so that start + frequency <= 4,096.
        split: how codes are dealt.

    Returns:
        The words of each stream: two for the state of each lane, low half first, and those that its lanes ask for.
    """
    step_frequencies = split.deal(frequencies, SLOTS).transpose(1, 0, 2)
    step_starts = split.deal(starts, 0).transpose(1, 0, 2)
    state = np.full((split.streams, split.lanes), FIRST_STATE, np.uint32)
    words = np.empty((split.streams, split.steps, split.lanes), np.uint16)
    asks = np.empty(words.shape, np.bool_)
    for step in reversed(range(split.steps)):
        frequency = np.ascontiguousarray(step_frequencies[step])
        full = (state >> np.uint32(32 - SLOT_BITS)) >= frequency
        words[:, step], asks[:, step] = state, full  # the low half; the cast cuts the rest
        state = np.where(full, state >> np.uint32(16), state)
        quotient = state // frequency
        state += quotient * (np.uint32(SLOTS) - frequency) + step_starts[step]
    heads = state.astype("<u4").view("<u2").reshape(split.streams, -1)
    return [np.concatenate([heads[s], words[s][asks[s]]]) for s in range(split.streams)]


def slot_table(frequencies: NDArray) -> SlotTable:
    """Lay out what a decoder looks up per slot.

    Args:
        frequencies: int `[tables, symbols]`, in the order of their slots; each table adds up to 4,096.
    """
    symbols = np.tile(np.arange(frequencies.shape[1]), len(frequencies))
    flat = frequencies.reshape(-1)
    starts = (np.cumsum(frequencies, 1) - frequencies).reshape(-1)
    inside = np.tile(np.arange(SLOTS), len(frequencies)) - np.repeat(starts, flat)
    moves = inside.astype(np.uint64) << np.uint64(32) | np.repeat(flat, flat).astype(np.uint64)
    return SlotTable(moves, np.repeat(symbols, flat).astype(np.uint8))


def decode(
    words: NDArray[np.uint16], offsets: NDArray[np.int64], table: SlotTable, chosen: NDArray, split: Split
) -> NDArray[np.uint8]:
    """Decode the streams of a matrix.

    Args:
        words: uint16 `[words]`.
        offsets: int64 `[streams + 1]`, ascending, first 0: stream s is words[offsets[s] : offsets[s + 1]]. What the
            last stream leaves of its words must be 0.
        table: of `slot_table`.
        chosen: int `[count]`, the table of each code.
        split: how codes are dealt.

    Returns:
        The symbols, uint8 `[count]`.

    Raises:
        ValueError: the words are not those of such codes.
    """
    # Idle lanes stay where they are: one symbol with all slots.
    idle = np.arange(SLOTS, dtype=np.uint64) << np.uint64(32) | np.uint64(SLOTS)
    moves = np.concatenate([table.moves, idle])
    dealt = split.deal(chosen.astype(np.int32) << SLOT_BITS, table.moves.size)
    for first in range(0, split.streams, STREAMS_AT_ONCE):
        group = slice(first, min(first + STREAMS_AT_ONCE, split.streams))
        dealt[group] = _decode_group(words, offsets[group.start : group.stop + 1], moves, dealt[group])
    return table.symbols[dealt.reshape(-1)[: chosen.size]]


def _decode_group(words: NDArray, offsets: NDArray, moves: NDArray, dealt: NDArray) -> NDArray[np.int32]:
    """Return where in `moves` each code was, like `dealt`, which says where its table starts."""
    streams, steps, lanes = dealt.shape
    if np.any(np.diff(offsets) < 2 * lanes):
        raise ValueError(f"stream {int(np.diff(offsets).argmin())} is shorter than the {lanes} states of its lanes")
    found = np.ascontiguousarray(dealt.transpose(1, 0, 2)).reshape(steps, -1)
    state = np.ascontiguousarray(words[offsets[:-1, None] + np.arange(2 * lanes)]).view("<u4").reshape(-1)
    last = (offsets[:-1, None] + 2 * lanes - 1).astype(np.int64)
    move = np.empty(state.size, np.uint64)
    frequency, inside = move.view(np.uint32)[0::2], move.view(np.uint32)[1::2]
    for place in found:
        place += (state & np.uint32(SLOTS - 1)).view(np.int32)
        moves.take(place, out=move, mode="clip")
        state >>= np.uint32(SLOT_BITS)
        state *= frequency
        state += inside
        asks = state < np.uint32(FIRST_STATE)
        taken = asks.reshape(streams, lanes).cumsum(1)
        taken += last
        last = taken[:, -1:]
        word = words.take(taken.reshape(-1)[asks], mode="clip")
        state[asks] = (state[asks] << np.uint32(16)) | word
    cursor = last[:, 0] + 1
    rest = words[cursor[-1] : offsets[-1]]
    if np.any(state != FIRST_STATE) or np.any(cursor[:-1] != offsets[1:-1]) or cursor[-1] > offsets[-1] or rest.any():
        raise ValueError(f"words of {streams} streams do not end where their {dealt.size} codes do")
    return found.reshape(steps, streams, lanes).transpose(1, 0, 2)
