"""The form of one packed weight in memory: what a layer computes with, a few tensors that a module moves about.

The file's form (`packing.py`) has the fewest bytes; this one has as many, save for a few in a thousand, and is laid out
so that a product can be taken straight from it. Coded weights, which nothing but their decoder can read, are decoded
once into codes of just enough bits. `stored` gives the file's bytes back.

Codes lie in words of 32 bits where kernels read them, and in bytes where a CPU does, which unpacks the whole matrix for
each product (`cpu_unpacking.py`); a weight that moves is laid out anew. `planes.py` and `layings.py` draw both.

Channels of one width are a run; runs lie one behind the other, the widest first. The tensors, all of them of whole
numbers so that `module.half()` leaves them alone (floats are kept as their bits):

    words         int32   codes. Without a mask, rows of fields, as `planes.py` draws them. With a mask, the survivors
                          of each run, row by row and within a row lane by lane, without gaps; a run starts on a word
    bytes         uint8   in the place of `words`: rows of fields as `layings.py` draws them. With a mask, the survivors
                          of each run, row by row and within a row byte by byte of the mask, laid as one row
    order         int16   the channels in the order of the runs, int32 where there are more than 2^15; absent where
                          there is one run
    span, origin          `weight_range` and `weight_offset` or `weight_zero_point`
    widths        uint8   `weight_widths`
    channel_scale         `weight_channel_scale`; kernels know nothing of it: they unpack in float32, what comes of that
                          is multiplied, and of a product x is
    mask          int32   `bitmap`: per run and row fields of a bit; `pattern`: per row the ranks of the groups as
                          fields, survivors then lie in the order of their columns; uint8 where codes are in bytes
    starts        int32   per run and row how many survivors of the run lie before; absent for a `pattern` of one run
    values                in the place of `words` where nothing is quantized; `[out_features, in_features]` without mask

and of coded weights, whose field is the code plus 2^(bits - 1),

    level, steps, row_scales      `weight_level`, `weight_steps`, `weight_row_scales`
    column_factors, row_factors   int32   what steps and row scales stand for, the columns in the order of the runs
    apart_at      int32   codes beyond their field, whose field holds 0: row * in_features + position of the column in
                          the order of the runs, ascending; int64 from 2^31 weights on
    apart         int32   the codes that stand there
    apart_tiles   int32   how many of them lie before row 0, 16, 32, ... and in all

What a kernel does with them is in `kernels/matvec.py`; here is the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sgpt_lightning.core.paths import MATVEC, UNPACK, gets_kernels, with_kernels
from sgpt_lightning.core.solution import Coded, Pruned, Quantized, Solution
from sgpt_lightning.format import fields, survivors
from sgpt_lightning.format.cpu_unpacking import unpack_on_cpu
from sgpt_lightning.format.launch import family_of, has_kernels, multiply, unpack
from sgpt_lightning.format.layings import BYTES, WORDS, Laying, laying_of
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.packing import pack_as, unpack_solutions
from sgpt_lightning.format.planes import Run

MOST_ROWS = 8
"""Rows of x that `matvec` takes: with more, unpacking once and a matrix product are faster."""


@dataclass(frozen=True)
class Resident:
    """A packed weight in memory. `spec` and `runs` are plain values; the tensors may be moved, never changed."""

    spec: WeightSpec
    """What the file says of the weight."""
    runs: tuple[Run, ...]
    """Where the words of each width are."""
    floats: dict[str, torch.dtype]
    """What the bits of a tensor are, by name, where they are floats."""
    tensors: dict[str, Tensor]
    """The tensors by name."""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Resident":
        """Return the same weight with tensors that were moved, all of them, by name: a module's buffers."""
        return Resident(self.spec, self.runs, self.floats, tensors)

    def to(self, device: torch.device | str) -> "Resident":
        """Return the same weight on another device, laid as suits it."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()}).suited()

    def suited(self) -> "Resident":
        """Return the same weight laid as suits the device where it is: itself, or laid out anew after a move."""
        laid = self.runs and self.device.type != "meta"
        if not laid or laying_of(self.tensors) is _suited(self.device):
            return self
        return lay_out(self._solution(None), PackedWeight(self.spec, fields.grid_in_file(self.spec, self._floats())))

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole matrix, `[out_features, in_features]`, bit for bit what `unpack_weight` returns.

        Args:
            dtype: what float32 is rounded to in the end.
        """
        if not self._has_kernels():
            return self._reference(dtype)
        parts = self.spec, self.runs, self._floats()
        family, scale = family_of(self.spec, UNPACK), parts[2].get("channel_scale")

        def unpacked(kernels: ModuleType) -> Tensor:
            if scale is None:
                return unpack(kernels, *parts, dtype)
            return unpack(kernels, *parts, torch.float32).mul_(scale.float()).to(dtype)

        return with_kernels(self.device, family, unpacked, lambda: self._reference(dtype))

    def _has_kernels(self) -> bool:
        return has_kernels(self.spec) and laying_of(self.tensors) is WORDS

    def _reference(self, dtype: torch.dtype) -> Tensor:
        weight = unpack_on_cpu(self.spec, self.runs, self._floats())
        return (self._solution(None).weight() if weight is None else weight).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows, float32 `[n, in_features]`, bit for bit `weight()[index]`; no others are unpacked.

        Args:
            index: int64 `[n]`, from 0 to out_features - 1, on the device of the tensors.
        """
        return self._solution(index).weight()

    def matvec(self, x: Tensor) -> Tensor:
        """Return x times the transposed weight, `[n, out_features]` in the dtype of x; products add up in float32.

        Args:
            x: float16, bfloat16 or float32 `[n, in_features]`, n at most `MOST_ROWS`, on the device of the tensors.

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.spec.shape[1] or len(x) > MOST_ROWS:
            raise ValueError(
                f"x must be [n, in_features] with n <= {MOST_ROWS} and in_features = {self.spec.shape[1]}, "
                f"got {list(x.shape)}"
            )
        if not self._has_kernels() or not len(x):
            return self._multiplied(x)
        parts = self.spec, self.runs, self._floats()
        family, scale = family_of(self.spec, MATVEC), parts[2].get("channel_scale")
        given = x if scale is None else x.float() * scale.float()

        def multiplied(kernels: ModuleType) -> Tensor:
            return multiply(kernels, given, *parts).to(x.dtype)

        return with_kernels(self.device, family, multiplied, lambda: self._multiplied(x))

    def _multiplied(self, x: Tensor) -> Tensor:
        return (x.float() @ self.weight().T).to(x.dtype)

    def stored(self) -> PackedWeight:
        """Return the file's form, byte for byte what this was made of; coded weights are encoded for it."""
        return pack_as(self._solution(None), self.spec)

    def _floats(self) -> dict[str, Tensor]:
        """Return the tensors, floats as such."""
        return {name: bits.view(self.floats.get(name, bits.dtype)) for name, bits in self.tensors.items()}

    def _solution(self, index: Tensor | None) -> Solution:
        """Return all rows, or some."""
        tensors = self._floats()
        if "mask" in tensors:
            return survivors.read(self.spec, self.runs, tensors, index)
        if "values" in tensors:
            return Pruned(tensors["values"] if index is None else tensors["values"][index])
        return fields.read(self.spec, self.runs, tensors, index)


def reside(packed: PackedWeight, device: torch.device | str | None = None) -> Resident:
    """Bring a packed weight into the form that it has in memory.

    Args:
        packed: the file's form.
        device: where the tensors shall be; where those of `packed` are if None. The work is done there.

    Raises:
        ValueError: as `unpack_weight` does.
    """
    return reside_together([packed if device is None else packed.to(device)])[0]


def reside_together(matrices: Sequence[PackedWeight]) -> list[Resident]:
    """Bring packed weights into the form in memory, where they are, as `reside` does one; coded ones side by side."""
    solved = unpack_solutions(matrices)
    return [lay_out(solution, packed) for solution, packed in zip(solved, matrices, strict=True)]


def lay_out(solution: Solution, packed: PackedWeight) -> Resident:
    """Bring a solved matrix into the form in memory, where it is; of `packed`, a coded one needs the specification."""
    runs: tuple[Run, ...] = ()
    if isinstance(solution, Pruned) and packed.spec.layout == "dense":
        tensors = {"values": solution.values}
    else:
        laying = _suited(solution.codes.device if not isinstance(solution, Pruned) else solution.values.device)
        if isinstance(solution, Coded):
            runs, tensors = fields.of_coded(solution, laying)
        elif packed.spec.layout != "dense":
            runs, tensors = survivors.of_masked(solution, packed, laying)
        else:
            assert isinstance(solution, Quantized)
            runs, tensors = fields.of_quantized(solution, packed, laying)
    floats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    return Resident(packed.spec, runs, floats, {name: _bits(tensor).contiguous() for name, tensor in tensors.items()})


def _suited(device: torch.device) -> Laying:
    """Return how fields shall lie on a device: in words where kernels read them, else in bytes."""
    return WORDS if gets_kernels(device) else BYTES


def _bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(whole[tensor.element_size()]) if tensor.is_floating_point() else tensor
