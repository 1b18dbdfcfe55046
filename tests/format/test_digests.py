"""The bytes of each layout are what they were: a change of the format is a new version, never an accident.

Codes, masks and widths are whole numbers from a seed and ranges are sums of powers of two, so no CPU rounds otherwise.
"""

import hashlib
import json

import pytest
import torch

from sgpt_lightning.core.grids import Grid, count_segments
from sgpt_lightning.core.solution import Quantized
from sgpt_lightning.format.packing import pack_weight

SHAPE = (24, 32)
CASES = {
    "dense": ("zero-point", (3,), None, None, "input", "2012f8bf5a6c4ac8"),
    "bitmap": ("zero-free", (4,), 0.5, None, "input", "d488e34d5f61f327"),
    "pattern": ("zero-free", (4,), (2, 4), None, "input", "a1573605c8fa096d"),
    "column widths": ("offset", (2, 3, 4, 6, 8), None, None, "input", "22c86746daad2181"),
    "row widths": ("zero-free", (2, 4, 8), 0.5, None, "output", "bd24c1c855168ccc"),
    "groups": ("zero-point", (3,), None, 8, "input", "71ea4625263209a6"),
}


def made(kind, widths, zeros, group_size, axis) -> Quantized:
    g = torch.Generator().manual_seed(0)
    channels = SHAPE[axis == "input"]
    bits = torch.tensor(widths, dtype=torch.uint8)[torch.randint(len(widths), (channels,), generator=g)]
    bits[: len(widths)] = torch.tensor(widths, dtype=torch.uint8)
    levels = 2 ** bits.long()
    codes = torch.randint(256, SHAPE, generator=g) % (levels if axis == "input" else levels[:, None])
    keep = None
    if zeros == 0.5:
        keep = torch.randint(2, SHAPE, generator=g).bool()
    elif zeros is not None:
        keep = torch.rand(SHAPE[0], SHAPE[1] // 4, 4, generator=g).argsort(2).argsort(2).ge(2).view(SHAPE)
    segments = count_segments(kind, axis, widths, SHAPE[1], group_size)
    span = torch.randint(1, 64, (SHAPE[0], segments), generator=g).half() / 32
    origin = torch.randint(0, 8, (SHAPE[0], segments), generator=g)
    origin = origin.to(torch.uint8) if kind == "zero-point" else origin.half() / 16
    grid = Grid(kind, span, origin, widths[-1], group_size, axis)
    return Quantized(codes.to(torch.uint8), bits, grid, keep, zeros if isinstance(zeros, tuple) else None)


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_a_layout_are_those_of_its_version(case):
    *settings, expected = CASES[case]
    packed = pack_weight(made(*settings))
    content = hashlib.sha256(json.dumps(packed.spec.to_dict()).encode())
    for name in sorted(packed.tensors):
        content.update(name.encode() + packed.tensors[name].numpy().tobytes())
    assert content.hexdigest()[:16] == expected
