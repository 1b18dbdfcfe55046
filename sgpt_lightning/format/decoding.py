"""Entropy-coded bytes back to codes: by numpy on the CPU, by a Triton kernel where the tensors are on a GPU.

`entropy.py` says what the bytes mean, `rans.py` and `kernels/decode.py` take the streams apart, and agree on every code
and on what is damaged. What is special about single codes (escapes, low bits) is done here, for both.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgpt_lightning.core.paths import DECODE, with_kernels
from sgpt_lightning.format import rans
from sgpt_lightning.format.contexts import LIMIT, level_of, shift_of, table_of
from sgpt_lightning.format.side import CODES, ESCAPED, Header, read_tables, unpack_extra, unpack_levels

_DTYPES = {
    "tables": torch.uint8, "rows": torch.uint8, "columns": torch.uint8, "stream": torch.uint16, "offsets": torch.int32,
    "extra": torch.uint8,
}  # fmt: skip

Encoded = tuple[Mapping[str, Tensor], tuple[int, int]]
"""What `encode` made of a matrix, and its shape, (out_features, in_features)."""


class _Matrix(NamedTuple):
    """A matrix that has codes, ready to be decoded."""

    shape: tuple[int, int]
    header: Header
    split: rans.Split
    slots: Tensor
    """int64 `[tables, ESCAPE + 1]`, on the CPU."""
    rows: Tensor
    """int16 `[out_features]`, levels above the lowest, on the CPU."""
    columns: Tensor
    """int16 `[in_features]`, on the CPU."""
    stream: Tensor
    offsets: Tensor
    extra: Tensor

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.shape[0] * self.shape[1]

    def chosen(self, device: torch.device) -> Tensor:
        """Return the table of each code, int16 `[count]`."""
        levels = level_of(self.rows.to(device), self.columns.to(device), self.header.base)
        lowest, highest = torch.tensor([self.header.lowest, self.header.highest], device=levels.device)
        return table_of(levels, lowest, highest, self.header.breadth).view(-1)


def decode(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Decode what `encode` made of a matrix of `shape` = (out_features, in_features), on the device of the tensors.

    Memory and time are bounded by the shape and the bytes at hand, whatever the bytes say.

    Returns:
        int32 `[out_features, in_features]`.

    Raises:
        ValueError: a tensor is missing, unknown, on a device of its own, or not what `encode` writes for a matrix of
            this shape. Damage that leads to other codes goes unseen: checksums are the file's.
    """
    return decode_all([(tensors, shape)])[0]


def decode_all(matrices: Sequence[Encoded]) -> list[Tensor]:
    """Decode matrices side by side, as `decode` does one: small ones have too few lanes to be fast alone.

    On the CPU it needs about 28 bytes a code for all of them at once, so a large model is decoded part by part. On a
    GPU the codes share one piece of memory; Python waits for the device twice, and three times more for each matrix
    that has codes beyond its tables.
    """
    given = [_check_tensors(tensors, shape) for tensors, shape in matrices]
    devices = {tensor.device for tensors, _ in matrices for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"tensors of codes must be on one device, got {', '.join(sorted(map(str, devices)))}")
    device = next(iter(devices), torch.device("cpu"))
    coded = [number for number, (_, shape) in enumerate(matrices) if shape[0] * shape[1]]
    parsed = _parse([given[number] for number in coded], [matrices[number][1] for number in coded])
    found = with_kernels(device, DECODE, lambda k: _by_kernel(k, parsed), lambda: _by_numpy(parsed)) if parsed else []
    decoded = [torch.zeros(shape, dtype=torch.int32, device=device) for _, shape in matrices if not shape[0] * shape[1]]
    for number, matrix, codes in zip(coded, parsed, found, strict=True):
        _add_extra(codes, matrix)
        decoded.insert(number, codes.view(matrix.shape))
    return decoded


def _check_tensors(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    wrong = [name for name, tensor in tensors.items() if _DTYPES.get(name) != tensor.dtype or tensor.dim() != 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no tensor of coded codes has this name, type and form")
    if tensors and not shape[0] * shape[1]:
        raise ValueError(f"a matrix of shape {list(shape)} has no tensors, got {', '.join(tensors)}")
    device = next((tensor.device for tensor in tensors.values()), None)
    absent = {name: torch.empty(0, dtype=dtype, device=device) for name, dtype in _DTYPES.items()}
    return absent | {name: tensor.detach() for name, tensor in tensors.items()}


def _parse(given: Sequence[Mapping[str, Tensor]], shapes: Sequence[tuple[int, int]]) -> list[_Matrix]:
    """Read headers and tables of all matrices, with one wait for their device, and check sizes against them."""
    if not given:
        return []
    small = [tensors[name] for tensors in given for name in ("tables", "rows", "columns")]
    parts = iter(torch.cat(small).cpu().split([part.numel() for part in small]))
    parsed = []
    for tensors, shape in zip(given, shapes, strict=True):
        data, rows, columns = next(parts).numpy().tobytes(), next(parts), next(parts)
        header = Header.of(data, shape[0] * shape[1])
        rows = unpack_levels("rows", rows, header.row_bits, shape[0])
        columns = unpack_levels("columns", columns, header.column_bits, shape[1])
        split, stream, offsets = rans.Split.of(shape[0] * shape[1], header.lanes), tensors["stream"], tensors["offsets"]
        if offsets.numel() != split.streams - 1:
            raise ValueError(f"offsets must lead to {split.streams} streams, got {offsets.numel()} offsets")
        slots = read_tables(data, header)
        parsed.append(_Matrix(shape, header, split, slots, rows, columns, stream, offsets, tensors["extra"]))
    return parsed


def _by_numpy(matrices: Sequence[_Matrix]) -> list[Tensor]:
    """Decode on the CPU; codes are int32 `[count]`, on the device of the tensors, `ESCAPED` for the escape."""
    coded = []
    for matrix in matrices:
        words, offsets = matrix.stream.cpu().numpy(), matrix.offsets.cpu().numpy().astype(np.int64)
        edges = np.concatenate([[0], offsets, [words.size]])
        if np.any(np.diff(edges) < 0):
            raise ValueError(f"offsets must lead to {matrix.split.streams} streams in {words.size} words")
        entries = rans.slot_table(matrix.slots).numpy().view(np.uint32)
        coded.append(rans.Coded(words, edges, entries, matrix.chosen(torch.device("cpu")).numpy(), matrix.split))
    return [torch.from_numpy(CODES.take(found)).to(matrices[0].stream.device) for found in rans.decode(coded)]


def _by_kernel(kernels: ModuleType, matrices: Sequence[_Matrix]) -> list[Tensor]:
    """Decode on the device of the tensors, like `_by_numpy`."""
    device = matrices[0].stream.device
    widest = max(matrix.shape[1] for matrix in matrices)
    if widest > kernels.MOST_COLUMNS:
        raise ValueError(f"a GPU decodes matrices of at most {kernels.MOST_COLUMNS} columns, got {widest}")
    described, ends = [], kernels.Matrix(*[0] * len(kernels.Matrix._fields))
    for matrix in matrices:
        described.append(
            ends._replace(
                word_count=matrix.stream.numel(), streams=matrix.split.streams, steps=matrix.split.steps,
                lanes=matrix.split.lanes, code_count=matrix.size, columns=matrix.shape[1], base=matrix.header.base,
                lowest=matrix.header.lowest, highest=matrix.header.highest, breadth=matrix.header.breadth,
            )
        )  # fmt: skip
        ends = ends._replace(
            words=ends.words + matrix.stream.numel(), offsets=ends.offsets + matrix.offsets.numel(),
            first=ends.first + matrix.split.streams, codes=ends.codes + matrix.size,
            row_levels=ends.row_levels + matrix.shape[0], column_levels=ends.column_levels + matrix.shape[1],
            entries=ends.entries + rans.SLOTS * len(matrix.slots),
        )  # fmt: skip
    counts = torch.tensor([matrix.split.streams for matrix in matrices])
    streams = kernels.Streams(
        torch.cat([matrix.stream.view(torch.int16) for matrix in matrices]),
        torch.cat([matrix.offsets for matrix in matrices]),
        rans.slot_table(torch.cat([matrix.slots for matrix in matrices]).to(device)),
        torch.cat([matrix.rows for matrix in matrices]).to(device),
        torch.cat([matrix.columns for matrix in matrices]).to(device),
        torch.tensor(described).to(device),
        torch.arange(len(matrices), dtype=torch.int32).repeat_interleave(counts).to(device),
    )
    codes, faults = kernels.decode_streams(streams, ends.codes)
    wrong = int(faults.sum())
    if wrong:
        raise ValueError(f"words of {wrong} of {ends.first} streams do not end where their codes do")
    return list(codes.split([matrix.size for matrix in matrices]))


def _add_extra(codes: Tensor, matrix: _Matrix) -> None:
    """Put extra bits into codes, int32 `[count]`, in place."""
    header = matrix.header
    shifts = shift_of(header.lowest + header.breadth * torch.arange(header.tables))
    if bool(shifts[-1]):
        chosen, shifts = matrix.chosen(codes.device).int(), shifts.to(codes.device)
        stored = ((codes == ESCAPED) | (shifts > 0)[chosen]).nonzero().view(-1)
        shift = shifts[chosen[stored]]
    elif bool(matrix.slots[:, -1].any()):
        stored = (codes == ESCAPED).nonzero().view(-1)
        shift = torch.zeros_like(stored)
    else:
        unpack_extra(matrix.extra.cpu(), torch.zeros(0, dtype=torch.int64))
        return
    head = codes[stored].long()
    escaped = head == ESCAPED
    widths = shift + header.escape_bits * escaped
    values = unpack_extra(matrix.extra, widths)
    above = torch.where(escaped, -(values >> (widths - 1).clamp(min=0)) << widths, head << shift)
    found = above + values - ((1 << shift) >> 1)
    if bool((found.abs() > LIMIT).any()):
        raise ValueError(f"a code is more than {LIMIT} in magnitude")
    codes[stored] = found.int()
