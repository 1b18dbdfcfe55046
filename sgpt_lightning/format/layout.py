"""The stored form of one weight matrix as a value: its specification, and tensors whose sizes fit it.

What the tensors hold is written down in `packing.py`.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from sgpt_lightning.core.grids import GridKind, WidthAxis, count_segments
from sgpt_lightning.core.sizes import MAX_GROUP, Layout, index_bits, mask_bits
from sgpt_lightning.format.bits import packed_bytes


@dataclass(frozen=True)
class WeightSpec:
    """What a reader must know besides the tensors; plain values, kept in `config.json`."""

    shape: tuple[int, int]
    """(out_features, in_features)."""
    layout: Layout
    """How zeros are stored."""
    widths: tuple[int, ...] | None
    """Bit widths in use, ascending; None if not quantized."""
    n_m: tuple[int, int] | None
    """(N, M) of the `pattern` layout."""
    grid: GridKind | None = None
    """What codes stand for; None if not quantized."""
    group_size: int | None = None
    """Columns per segment; None if a row is not divided into groups."""
    width_axis: WidthAxis = "input"
    """What has a width of its own: `input` channels (columns) or `output` channels (rows)."""
    scaled: bool = False
    """Whether columns have scales, which what codes stand for is multiplied by; not said before version 7."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `scaled` only where it is so."""
        values = asdict(self)
        return values if self.scaled else {name: value for name, value in values.items() if name != "scaled"}

    @classmethod
    def from_dict(cls, values: Any) -> "WeightSpec":
        """Read what `to_dict` wrote; raises ValueError on anything else."""
        if not _is_spec(values):
            raise ValueError(f"not a weight specification: {values}")
        lists = {key: None if values[key] is None else tuple(values[key]) for key in ("shape", "widths", "n_m")}
        return cls(**(values | lists))


def _is_spec(values: Any) -> bool:
    if not isinstance(values, dict) or {*values, "scaled"} != {field.name for field in fields(WeightSpec)}:
        return False
    shape, widths, n_m = (values[key] for key in ("shape", "widths", "n_m"))
    for numbers in (shape, widths, n_m):
        if numbers is not None and not (isinstance(numbers, list | tuple) and all(type(n) is int for n in numbers)):
            return False
    if shape is None or len(shape) != 2 or min(shape) < 1 or not _is_grid(values):
        return False
    if values["layout"] != "pattern":
        return n_m is None and values["layout"] in get_args(Layout)
    if n_m is None or len(n_m) != 2 or not 0 < n_m[0] < n_m[1] <= MAX_GROUP or shape[1] % n_m[1]:
        return False
    return "pattern" in mask_bits(tuple(shape), tuple(n_m))


def _is_grid(values: dict[str, Any]) -> bool:
    widths, grid, group_size = values["widths"], values["grid"], values["group_size"]
    scaled = values.get("scaled", False)
    if values["width_axis"] not in get_args(WidthAxis) or type(scaled) is not bool:
        return False
    if widths is None:
        return grid is None and group_size is None and not scaled
    if not widths or list(widths) != sorted({w for w in widths if 1 <= w <= 8}) or grid not in get_args(GridKind):
        return False
    return group_size is None or (type(group_size) is int and group_size >= 1)


class PackedWeight(NamedTuple):
    """A packed weight matrix: its specification and its tensors, by the names in the module's docstring."""

    spec: WeightSpec
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take, in memory and in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "PackedWeight":
        """Return the same weight on another device."""
        return PackedWeight(self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()})


def check_sizes(packed: PackedWeight) -> None:
    """Compare the stored tensors with the specification, before anything of the matrix's size is allocated.

    A matrix that passes has at most 26 weights per byte stored: the leanest form is 15 zeros in 16 and 1-bit codes. A
    coded one has at most 4,096, which `decoding.decode` sees to: a lane is 4 bytes and decodes 16,384 codes.

    Raises:
        ValueError: a tensor is missing or one too many, or its dtype or size cannot be right.
    """
    spec, tensors = packed
    if spec.layout == "coded":
        _check_coded(packed)
        return
    expected = _expected_tensors(spec)
    if set(expected) != set(tensors):
        raise ValueError(f"a {spec.layout} weight needs the tensors {sorted(expected)}, got {sorted(tensors)}")
    for name, (is_float, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype not in (_FLOATS if is_float else (torch.uint8,)):
            raise ValueError(f"{name} must be {'a float' if is_float else 'uint8'}, got {tensor.dtype}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for a weight of {spec.shape}, got {tuple(tensor.shape)}")
    codes = tensors["weight_values" if spec.widths is None else "weight_codes"]
    survivors = math.prod(spec.shape)
    if spec.n_m is not None:
        survivors = survivors // spec.n_m[1] * (spec.n_m[1] - spec.n_m[0])
    least, most = (0 if spec.layout == "bitmap" else survivors), survivors
    if spec.widths is not None:
        least, most = packed_bytes(least, spec.widths[0]), packed_bytes(most, spec.widths[-1]) + len(spec.widths)
    if not least <= codes.numel() <= most or (spec.widths is not None and codes.dim() != 1):
        what = "values" if spec.widths is None else "bytes of codes"
        raise ValueError(f"a weight of {spec.shape} takes from {least} to {most} {what}, got {tuple(codes.shape)}")


CODED_STREAMS = ("tables", "rows", "columns", "stream", "offsets", "extra")
"""What `entropy.py` makes of codes; without the prefix `weight_`."""


def _check_coded(packed: PackedWeight) -> None:
    """Check what stands beside the codes; `decoding.decode` checks its own tensors against the shape."""
    spec, tensors = packed
    beside = {"weight_level": (torch.float32, 1), "weight_steps": (torch.uint8, spec.shape[1])}
    beside["weight_row_scales"] = (torch.uint8, spec.shape[0])
    known = {*beside, *(f"weight_{name}" for name in CODED_STREAMS)}
    if not set(beside) <= set(tensors) <= known:
        raise ValueError(f"a coded weight needs the tensors {sorted(beside)} and codes, got {sorted(tensors)}")
    for name, (dtype, count) in beside.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != (count,):
            raise ValueError(f"{name} must be {dtype} [{count}], got {tensor.dtype} {list(tensor.shape)}")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _expected_tensors(spec: WeightSpec) -> dict[str, tuple[bool, tuple[int, ...] | None]]:
    """Return, by name, whether a tensor is of floats and its shape; None where the shape depends on others."""
    expected: dict[str, tuple[bool, tuple[int, ...] | None]] = {}
    if spec.layout != "dense":
        expected["weight_mask"] = False, (mask_bits(spec.shape, spec.n_m)[spec.layout] // 8,)
    if spec.widths is None:
        return expected | {"weight_values": (True, None)}
    assert spec.grid is not None
    segments = count_segments(spec.grid, spec.width_axis, spec.widths, spec.shape[1], spec.group_size)
    expected["weight_codes"] = False, None
    expected["weight_range"] = True, (spec.shape[0], segments)
    expected[origin_name(spec)] = spec.grid != "zero-point", (spec.shape[0], segments)
    if spec.scaled:
        expected["weight_channel_scale"] = True, (spec.shape[1],)
    if len(spec.widths) > 1:
        channels = spec.shape[spec.width_axis == "input"]
        expected["weight_widths"] = False, (packed_bytes(channels, index_bits(len(spec.widths))),)
    return expected


def origin_name(spec: WeightSpec) -> str:
    """Return the name of the tensor that says where a row's grid begins."""
    return "weight_zero_point" if spec.grid == "zero-point" else "weight_offset"
