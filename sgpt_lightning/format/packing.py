"""The stored form of one weight matrix: tensors of bytes, and how many there are.

Survivors are stored run by run, one run per bit width, widest first. A run holds the columns (or the rows, where
`width_axis` is `output`) of its width in their own order, row by row; with a mask, only the survivors. Each run is
packed without gaps and starts on a byte.

    weight_codes       uint8   the runs, one behind the other                (quantized)
    weight_values      float   the survivors, row by row                     (not quantized)
    weight_mask        uint8   `bitmap`: 1 bit a weight, 1 = survives
                               `pattern`: per group of M the rank of its zeros among all N-subsets of M, in
                               lexicographic order, ceil(log2(C(M, N))) bits
    weight_range       float   [out_features, segments]: the interval that the codes of a row and segment span
    weight_zero_point  uint8   [out_features, segments]: the code of zero at the widest width  (grid `zero-point`)
    weight_offset      float   [out_features, segments]: the lowest value or magnitude (grids `offset`, `zero-free`)
    weight_widths      uint8   per column (row): position in the ascending list of widths, ceil(log2(n)) bits;
                               absent when there is one width
    weight_channel_scale float16 [in_features]: what the values of a column are multiplied by; absent without scales

and, in the layout `coded`, whole codes k of any size,

    weight_level       float32 [1]: the coarsest step
    weight_steps       uint8   [in_features]
    weight_row_scales  uint8   [out_features]
    weight_tables, weight_rows, weight_columns, weight_stream, weight_offsets, weight_extra
                               the codes, as `entropy.py` draws them

Matrices are `[out_features, in_features]`, also where the model holds them transposed (Conv1D). Bits are laid out as
`bits.py` draws them. A segment is `group_size` consecutive columns; without groups it is the columns of one width,
narrowest first, or all columns in the grid `zero-point` and where rows have widths. At `b` bits a code c stands for,
in float32, each operation rounded,

    zero-point  range / (2^b - 1) * (c - zero)         zero = round(zero_point * (2^b - 1) / (2^B - 1)), ties to even,
                                                       with B the widest width in use
    offset      range / (2^b - 1) * c + offset
    zero-free   range / (2^(b-1) - 1) * k + offset     with k = c mod 2^(b-1); negated if c >= 2^(b-1); at 1 bit k = 0
    coded       (k * (level * 2^(-step / 16))) * 2^(-row scale / 8), the powers of two being float32 as well

and, where columns have scales, that times `weight_channel_scale`.

No permutation is stored: the runs follow from the widths, and the order in which the columns were solved leaves no
trace in the result. For masks and widths three layouts are priced and the cheapest is taken: `dense` (no mask; removed
weights hold the zero point, which only the grid `zero-point` has), `bitmap`, and `pattern` for N:M.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sgpt_lightning.core.grids import Grid
from sgpt_lightning.core.sizes import Layout, code_bits, index_bits, smallest_layout
from sgpt_lightning.core.solution import Coded, Pruned, Quantized, Solution
from sgpt_lightning.format.bits import pack_bits, packed_bytes, unpack_bits
from sgpt_lightning.format.decoding import decode_all
from sgpt_lightning.format.entropy import encode
from sgpt_lightning.format.layout import CODED_STREAMS, PackedWeight, WeightSpec, check_sizes, origin_name
from sgpt_lightning.format.masks import pack_mask, unpack_mask

UNPACKED_AT_ONCE = 2 << 20
"""Weights that are unpacked side by side: 60 MB at work; with eight times as many, small linears are 10 % faster."""


def pack_weight(solution: Solution) -> PackedWeight:
    """Pack a solved matrix in its cheapest layout."""
    if isinstance(solution, Coded):
        return pack_as(solution, WeightSpec(solution.shape, "coded", None, None))
    layout = cheapest_layout(solution)
    n_m = solution.n_m if layout == "pattern" else None
    if isinstance(solution, Pruned):
        return pack_as(solution, WeightSpec(solution.shape, layout, None, n_m))
    grid, used = solution.grid, tuple(sorted(set(solution.widths.tolist())))
    spec = WeightSpec(solution.shape, layout, used, n_m, grid.kind, grid.group_size, grid.axis)
    return pack_as(solution, spec if solution.channel_scale is None else replace(spec, scaled=True))


def pack_as(solution: Solution, spec: WeightSpec) -> PackedWeight:
    """Pack a solved matrix as a specification says that fits it."""
    if isinstance(solution, Coded):
        return _pack_coded(solution, spec)
    keep = None if spec.layout == "dense" else solution.keep
    if isinstance(solution, Pruned):
        tensors = {"weight_values": solution.values if keep is None else solution.values[keep]}
    else:
        tensors = _quantized_tensors(solution, keep, spec)
    if keep is not None:
        tensors["weight_mask"] = pack_mask(keep, spec.n_m)
    return PackedWeight(spec, {name: tensor.contiguous() for name, tensor in tensors.items()})


def _pack_coded(solution: Coded, spec: WeightSpec) -> PackedWeight:
    tensors = {f"weight_{name}": tensor for name, tensor in encode(solution.codes).items()}
    tensors |= {"weight_level": solution.level, "weight_steps": solution.steps, "weight_row_scales": solution.rows}
    return PackedWeight(spec, tensors)


def _decode_coded(matrices: Sequence[PackedWeight]) -> list[Coded]:
    for packed in matrices:
        level = packed.tensors["weight_level"]
        if not bool(torch.isfinite(level).all()):
            raise ValueError(f"weight_level must be a finite number, got {float(level)}")
    decoded = decode_all([(_streams(packed), packed.spec.shape) for packed in matrices])
    return [_coded(codes, packed.tensors) for codes, packed in zip(decoded, matrices, strict=True)]


def _streams(packed: PackedWeight) -> dict[str, Tensor]:
    names = {name: f"weight_{name}" for name in CODED_STREAMS}
    return {name: packed.tensors[stored] for name, stored in names.items() if stored in packed.tensors}


def _coded(codes: Tensor, tensors: Mapping[str, Tensor]) -> Coded:
    level = tensors["weight_level"]
    return Coded(codes.to(level.device), level, tensors["weight_steps"], tensors["weight_row_scales"])


def _quantized_tensors(solution: Quantized, keep: Tensor | None, spec: WeightSpec) -> dict[str, Tensor]:
    widths, used = solution.widths, spec.widths
    assert used is not None
    tensors = {
        "weight_codes": _pack_runs(solution.codes, keep, widths, spec),
        "weight_range": solution.grid.span,
        origin_name(spec): solution.grid.origin,
    }
    if solution.channel_scale is not None:
        tensors["weight_channel_scale"] = solution.channel_scale
    if len(used) > 1:
        positions = torch.searchsorted(torch.tensor(used, device=widths.device), widths.long())
        tensors["weight_widths"] = pack_bits(positions.to(torch.uint8), index_bits(len(used)))
    return tensors


def unpack_weight(packed: PackedWeight) -> Tensor:
    """Return the matrix that the model computes with, float32 `[out_features, in_features]`, where its tensors are.

    Raises:
        ValueError: a tensor is missing or its size does not fit the specification.
    """
    return unpack_weights([packed])[0]


def unpack_weights(matrices: Sequence[PackedWeight]) -> list[Tensor]:
    """Unpack matrices as `unpack_weight` does one; small coded ones take a fifth of the time side by side."""
    return [solution.weight() for solution in unpack_solutions(matrices)]


def some_at_once(packed: Mapping[str, PackedWeight]) -> Iterator[list[str]]:
    """Yield names, in order, of as many matrices as may be unpacked at once: `UNPACKED_AT_ONCE` weights, or one."""
    names: list[str] = []
    room = UNPACKED_AT_ONCE
    for name, weight in packed.items():
        size = math.prod(weight.spec.shape)
        if names and size > room:
            yield names
            names, room = [], UNPACKED_AT_ONCE
        names.append(name)
        room -= size
    if names:
        yield names


def unpack_solutions(matrices: Sequence[PackedWeight]) -> list[Solution]:
    """Return what `pack_as` made packed forms of: codes or values, mask, widths and grid, where their tensors are.

    Codes of removed weights are 0, unless the layout is `dense`: it has no mask, and they are codes like others.

    Raises:
        ValueError: a tensor is missing or its size does not fit the specification.
    """
    for packed in matrices:
        check_sizes(packed)
    coded = iter(_decode_coded([packed for packed in matrices if packed.spec.layout == "coded"]))
    return [next(coded) if packed.spec.layout == "coded" else _fixed(packed) for packed in matrices]


def _fixed(packed: PackedWeight) -> Pruned | Quantized:
    spec, tensors = packed
    keep = None if spec.layout == "dense" else unpack_mask(tensors["weight_mask"], spec.shape, spec.n_m)
    if spec.widths is None:
        values = tensors["weight_values"]
        if keep is None:
            return Pruned(values.view(spec.shape), None, spec.n_m)
        if values.numel() != int(keep.sum()):
            raise ValueError(f"the mask and the number of survivors ({values.numel()}) disagree")
        spread = torch.zeros(spec.shape, dtype=values.dtype, device=values.device).masked_scatter_(keep, values)
        return Pruned(spread, keep, spec.n_m)
    widths = _unpack_widths(tensors, spec)
    assert spec.grid is not None
    codes = _unpack_runs(tensors["weight_codes"], keep, widths, spec)
    span, origin = tensors["weight_range"], tensors[origin_name(spec)]
    grid = Grid(spec.grid, span, origin, spec.widths[-1], spec.group_size, spec.width_axis)
    return Quantized(codes, widths, grid, keep, spec.n_m, tensors.get("weight_channel_scale"))


def cheapest_layout(solution: Pruned | Quantized) -> Layout:
    """Price the layouts that can hold the matrix and return the cheapest."""
    keep, shape = solution.keep, solution.shape
    if keep is None:
        return "dense"
    if isinstance(solution, Pruned):
        dense, masked = (8 * solution.values.element_size() * int(n) for n in (keep.numel(), keep.sum()))
        return smallest_layout(dense, masked, shape, solution.n_m)[0]
    widths, by_rows = solution.widths.cpu(), solution.grid.axis == "output"
    kept = keep.sum(1 if by_rows else 0).cpu()
    used = {bits: widths == bits for bits in torch.unique(widths).tolist()}
    dense = code_bits({bits: shape[by_rows] * int(channels.sum()) for bits, channels in used.items()})
    masked = code_bits({bits: int(kept[channels].sum()) for bits, channels in used.items()})
    zero_is_a_code = solution.grid.kind == "zero-point"
    return smallest_layout(dense, masked, shape, solution.n_m, zero_is_a_code=zero_is_a_code)[0]


def _pack_runs(codes: Tensor, keep: Tensor | None, widths: Tensor, spec: WeightSpec) -> Tensor:
    runs = []
    assert spec.widths is not None
    for bits in reversed(spec.widths):
        run = _of_width(codes, widths == bits, spec)
        runs.append(pack_bits(run if keep is None else run[_of_width(keep, widths == bits, spec)], bits))
    return torch.cat(runs)


def _unpack_runs(packed: Tensor, keep: Tensor | None, widths: Tensor, spec: WeightSpec) -> Tensor:
    codes = torch.zeros(spec.shape, dtype=torch.uint8, device=packed.device)
    stored = torch.ones_like(codes, dtype=torch.bool) if keep is None else keep
    offset = 0
    assert spec.widths is not None
    for bits in reversed(spec.widths):
        channels = widths == bits
        run_keep = _of_width(stored, channels, spec)
        count = int(run_keep.sum())
        size = packed_bytes(count, bits)
        run = unpack_bits(packed[offset : offset + size], bits, count)
        offset += size
        spread = torch.zeros_like(run_keep, dtype=torch.uint8).masked_scatter_(run_keep, run)
        if spec.width_axis == "output":
            codes[channels] = spread
        else:
            codes[:, channels] = spread
    if offset != packed.numel():
        raise ValueError(f"the codes take {offset} bytes, got {packed.numel()} bytes")
    return codes


def _of_width(matrix: Tensor, channels: Tensor, spec: WeightSpec) -> Tensor:
    """Return the columns, or the rows, of one width."""
    return matrix[channels] if spec.width_axis == "output" else matrix[:, channels]


def _unpack_widths(tensors: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    assert spec.widths is not None
    used = torch.tensor(spec.widths, dtype=torch.uint8, device=tensors["weight_codes"].device)
    if len(spec.widths) == 1:
        return used.expand(spec.shape[spec.width_axis == "input"])
    channels = spec.shape[spec.width_axis == "input"]
    positions = unpack_bits(tensors["weight_widths"], index_bits(len(spec.widths)), channels)
    if int(positions.max()) >= len(spec.widths):
        raise ValueError(f"a channel names width {int(positions.max())} of {len(spec.widths)}")
    return used[positions.long()]
