"""Packed weights of every kind, without a solver, for the tests of their form in memory and of its kernels."""

from typing import Any

import torch
from oracles import generator
from torch import Tensor

from sgpt_lightning.core.grids import Grid, count_segments
from sgpt_lightning.core.solution import Coded, Pruned, Quantized, Solution

MIXED = (2, 3, 4, 6, 8)
QUANTIZED: list[dict[str, Any]] = [
    *({"widths": (bits,), "kind": "zero-point"} for bits in range(1, 9)),
    *({"widths": (bits,), "kind": kind, "mask": 0.5} for bits in (1, 3, 4, 7, 8) for kind in ("zero-free", "offset")),
    *({"widths": (bits,), "kind": "zero-free", "mask": (2, 4)} for bits in (2, 3, 4, 5)),
    {"widths": (4,), "kind": "zero-point", "mask": (1, 4)},
    {"widths": (3,), "kind": "offset", "mask": (4, 8)},
    {"widths": (4,), "kind": "zero-free", "mask": (3, 5)},
    {"widths": (4,), "kind": "zero-free", "mask": (15, 16)},
    *({"widths": (4,), "kind": kind} for kind in ("offset", "zero-free")),
    *({"widths": MIXED, "kind": kind} for kind in ("zero-point", "offset", "zero-free")),
    *({"widths": tuple(range(1, 9)), "kind": kind, "mask": 0.4} for kind in ("zero-point", "offset", "zero-free")),
    *({"widths": (3, 4), "kind": "zero-free", "mask": (2, 4), "axis": axis} for axis in ("input", "output")),
    *({"widths": MIXED, "kind": kind, "axis": "output"} for kind in ("zero-point", "offset")),
    {"widths": (5,), "kind": "zero-point", "axis": "output"},
    *({"widths": MIXED, "kind": kind, "axis": "output", "mask": 0.6} for kind in ("zero-point", "zero-free")),
    *({"widths": (4,), "kind": kind, "group": 24} for kind in ("zero-point", "offset", "zero-free")),
    *({"widths": MIXED, "kind": kind, "group": 13} for kind in ("zero-point", "zero-free")),
    *({"widths": (4,), "kind": "zero-free", "group": 16, "mask": mask} for mask in (0.5, (2, 4))),
    {"widths": MIXED, "kind": "zero-free", "group": 16, "mask": 0.5, "axis": "output"},
]


def _mask(rows: int, columns: int, mask: float | tuple[int, int] | None, g: torch.Generator) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, tuple):
        return ~(torch.rand(rows, columns // mask[1], mask[1], generator=g).argsort(2) < mask[0]).view(rows, columns)
    return torch.rand(rows, columns, generator=g) >= mask


def quantized(rows: int, columns: int, widths, kind, mask=None, axis="input", group=None) -> Quantized:
    """Random codes on random grids; `columns` is cut to a multiple of M."""
    g = generator()
    n_m = mask if isinstance(mask, tuple) else None
    columns = columns // n_m[1] * n_m[1] if n_m else columns
    channels = rows if axis == "output" else columns
    # Every width is in use, so that the runs are those that were asked for.
    of = torch.tensor(widths)[
        torch.cat([torch.arange(len(widths)), torch.randint(len(widths), (channels,), generator=g)])
    ]
    of = of[:channels][torch.randperm(channels, generator=g)].to(torch.uint8)
    used = sorted(set(of.tolist()))
    segments = count_segments(kind, axis, used, columns, group)
    span = (torch.rand(rows, segments, generator=g) + 0.1).half()
    top = (1 << used[-1]) - 1
    origin = torch.rand(rows, segments, generator=g)
    origin = (origin * top).round().to(torch.uint8) if kind == "zero-point" else (origin - 0.3).half()
    per_weight = of[:, None] if axis == "output" else of[None, :]
    codes = (torch.rand(rows, columns, generator=g) * 2.0**per_weight).floor().to(torch.uint8)
    keep = _mask(rows, columns, mask, g)
    codes = codes if keep is None else codes * keep
    return Quantized(codes, of, Grid(kind, span, origin, used[-1], group, axis), keep, n_m)


def coded(rows: int, columns: int, spread: float = 1.3, far: int = 0, seed: int = 0) -> Coded:
    """Codes whose size depends on the row and on the column; `far` of them as far out as a code can be."""
    g = generator(seed)
    size = torch.exp(torch.randn(rows, 1, generator=g) * 0.3 + torch.randn(1, columns, generator=g) * 0.2)
    codes = (spread * size * torch.randn(rows, columns, generator=g)).round().int()
    places = torch.randint(rows * columns, (far,), generator=g)
    codes.view(-1)[places] = torch.tensor([1 - 2**24, 2**24 - 1], dtype=torch.int32).repeat(far)[:far]
    steps, row_scales = (torch.randint(0, 60, (n,), generator=g, dtype=torch.uint8) for n in (columns, rows))
    # So that float16 holds what comes of them.
    return Coded(codes, torch.tensor([1e-4 if far else 0.0173]), steps, row_scales)


def pruned(rows: int, columns: int, mask, dtype=torch.float16, seed: int = 0) -> Pruned:
    g = generator(seed)
    keep = _mask(rows, columns, mask, g)
    values = torch.randn(rows, columns, generator=g)
    values = values if keep is None else values.masked_fill(~keep, 0)
    return Pruned(values.to(dtype), keep, mask if isinstance(mask, tuple) else None)


def solutions(rows: int, columns: int) -> dict[str, Solution]:
    """One of each kind, about `rows` by `columns`."""
    made: dict[str, Solution] = {str(case): quantized(rows, columns, **case) for case in QUANTIZED}
    made |= {f"pruned {mask}": pruned(rows, columns // 4 * 4, mask) for mask in (None, 0.5, (2, 4))}
    made |= {f"pruned {dtype}": pruned(rows, columns, 0.5, dtype) for dtype in (torch.bfloat16, torch.float32)}
    made |= {f"coded {spread}": coded(rows, columns, spread) for spread in (0.0, 0.3, 1.3, 20.0, 3e3)}
    return made | {"coded, some apart": coded(rows, columns, 1.3, 1 + rows * columns // 100)}
