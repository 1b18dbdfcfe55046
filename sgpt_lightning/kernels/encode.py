"""Codes to entropy-coded streams as a Triton kernel: what `decode.py` reads, a program a stream, the last step first.

The format is that of `format/entropy.py`, the words are those of `format/rans.py` to the last bit. A stream is written
from the end of a room that would hold a word for each of its codes. Importing this needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgpt_lightning.kernels.columns import FAILURES as FAILURES
from sgpt_lightning.kernels.decode import LANES, OPTIONS


def encode_streams(places: Tensor, entries: Tensor, streams: int, steps: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Encode codes on their device, without waiting for it.

    Args:
        places: int32 `[count]`, at most streams * steps * lanes: where in `entries` the symbol of each code is.
        entries: int32: frequency - 1 | first slot << 12.
        streams: how codes are dealt, as in `rans.Split`.
        steps: codes of a lane at most.
        lanes: of a stream, at most `LANES`.

    Returns:
        Words, int16 `[streams, (steps + 2) * lanes]`, of which each stream takes the last ones; and, int32
        `[streams]`, where it starts.
    """
    words = torch.empty(streams, (steps + 2) * lanes, dtype=torch.int16, device=places.device)
    starts = torch.empty(streams, dtype=torch.int32, device=places.device)
    _encode[(streams,)](places, entries, words, starts, places.numel(), steps, lanes, LANES=LANES, **OPTIONS)
    return words, starts


@triton.jit(do_not_specialize=["count", "steps", "lanes"])
def _encode(places, entries, words, starts, count, steps, lanes, LANES: tl.constexpr):
    stream = tl.program_id(0)
    before = stream.to(tl.int64) * (steps * lanes)
    places += before
    own = tl.minimum(count - before, steps * lanes).to(tl.int32)
    room = (steps + 2) * lanes
    words += stream.to(tl.int64) * room
    lane = tl.arange(0, LANES)
    state = tl.full([LANES], 65536, tl.uint32)
    cursor = room
    code = (steps - 1) * lanes + lane
    entry = _entry(places, entries, code, (lane < lanes) & (code < own))
    for _ in range(steps):
        here = (lane < lanes) & (code < own)
        before_it = code - lanes
        onward = _entry(places, entries, before_it, (lane < lanes) & (before_it >= 0) & (before_it < own))
        frequency = (entry & 4095) + 1
        full = here & ((state >> 20) >= frequency)
        order = tl.cumsum(full.to(tl.int32), axis=0)
        cursor -= tl.sum(full.to(tl.int32), axis=0)
        tl.store(words + (cursor + order - 1), (state & 0xFFFF).to(tl.int16), mask=full)
        state = tl.where(full, state >> 16, state)
        grown = state + state // frequency * (4096 - frequency) + ((entry >> 12) & 4095)
        state = tl.where(here, grown, state)
        code, entry = before_it, onward
    cursor -= 2 * lanes
    head = words + (cursor + 2 * lane)
    tl.store(head, (state & 0xFFFF).to(tl.int16), mask=lane < lanes)
    tl.store(head + 1, (state >> 16).to(tl.int16), mask=lane < lanes)
    tl.store(starts + stream, cursor)


@triton.jit
def _entry(places, entries, code, mask):
    place = tl.load(places + code, mask=mask, other=0)
    return tl.load(entries + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
