"""`pack-quantized`, the integer format of the compressed-tensors package, which transformers and vLLM read.

A linear's weight becomes, with u = d + zero (see `affine.py`) of 4 or 8 bits, no bits in between,

    weight_packed      int32 [out_features, ceil(in_features * bits / 32)]: u of a row, lowest bits first
    weight_scale       float [out_features, groups]
    weight_zero_point  int32 [ceil(out_features * bits / 32), groups]: zero, packed along the rows; absent where all
                       linears of the group have 2^(bits - 1), which the format calls symmetric
    weight_shape       int64 [2]

and the reader computes (u - zero) * scale in the dtype of the scale. Only 4 and 8 bits are written. At 3, 5, 6 and 7
bits versions of the package do not read each other: 0.9.4 puts 32 // bits codes into a word, 0.20 leaves no gaps (both
were run on random codes; at 1, 2, 4 and 8 bits their words are the same). vLLM took 4 and 8 bits alone for long; newer
sources list 2 to 8, and 4 and 8 where there are zero points (read, not run). Linears that vLLM fuses (q, k, v; gate,
up) get the widest width among them, or go dense together. Zeros of a mask are stored as the code of zero.

Where any linear needs a zero of its own, all are written with zeros and in one width: transformers 5.23 makes room for
unpacked zeros and refuses the file, unless it dequantizes at load, for which it takes one scheme for the whole model.
`dequantize` in the configuration asks it to; others ignore the word.

Written against compressed-tensors 0.20 (`compressors/pack_quantized`); the package is not needed to write.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.export.affine import Affine, NotAffineError, affine_form
from sgpt_lightning.format.bits import pack_bits
from sgpt_lightning.format.layout import PackedWeight

WIDTHS = (4, 8)
"""Bits that are written."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears of one module that a reader may make one linear of."""


class Scheme(NamedTuple):
    """How a linear is packed."""

    bits: int
    symmetric: bool
    group_size: int | None


class Packing(NamedTuple):
    """What becomes of the linears of a model."""

    schemes: dict[str, Scheme]
    """Of the linears that are packed, by name."""
    tensors: dict[str, Tensor]
    """What takes the place of their weights, by full name."""
    reasons: dict[str, str]
    """Why others stay dense, by name."""


def pack_linears(linears: Mapping[str, nn.Module], packed: Mapping[str, PackedWeight]) -> Packing:
    """Pack what the format holds exactly.

    Args:
        linears: the linears of the decoder blocks by full name, with the weights to keep.
        packed: their stored forms; those that are missing were not compressed.
    """
    found = Packing({}, {}, {})
    groups: list[dict[str, Affine]] = []
    for names in _fused_groups(list(linears)):
        forms: dict[str, Affine] = {}
        for name in names:
            try:
                forms[name] = _affine(linears[name], packed.get(name))
            except NotAffineError as error:
                found.reasons[name] = str(error)
        dense = [name for name in names if name not in forms]
        found.reasons.update({name: f"read as one with {dense[0]}, which stays dense" for name in forms if dense})
        groups += [forms] if forms and not dense else []
    needed = [_needed_width(list(forms.values())) for forms in groups]
    if not all(symmetric for _, symmetric in needed):  # transformers reads zero points with one scheme for all
        needed = [(max(bits for bits, _ in needed), False)] * len(needed)
    for forms, (bits, symmetric) in zip(groups, needed, strict=True):
        for name, form in forms.items():
            found.schemes[name] = Scheme(bits, symmetric, form.group_size)
            found.tensors.update({f"{name}.{leaf}": t for leaf, t in _tensors(form, bits, symmetric).items()})
    return found


def _affine(linear: nn.Module, packed: PackedWeight | None) -> Affine:
    if packed is None:
        raise NotAffineError("was not compressed")
    if not isinstance(linear, nn.Linear):
        raise NotAffineError(f"a {type(linear).__name__}, the format knows nn.Linear only")
    return affine_form(packed, linear.weight.detach())


def _fused_groups(names: Sequence[str]) -> list[list[str]]:
    """Return the names, those together that a reader may fuse, in their order."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        owner, _, kind = name.rpartition(".")
        fused = next((kinds for kinds in FUSED if kind in kinds), kind)
        groups.setdefault((owner, fused), []).append(name)
    return list(groups.values())


def _needed_width(forms: Sequence[Affine]) -> tuple[int, bool]:
    """Return the bits that hold all forms, and whether they do with a zero in the middle."""
    bounds = [form.bounds() for form in forms]
    low, high = min(int(low.min()) for low, _ in bounds), max(int(high.max()) for _, high in bounds)
    most = max(int((high - low).max()) for low, high in bounds)
    bits = next(bits for bits in WIDTHS if most < 1 << bits)
    return bits, -low <= 1 << (bits - 1) and high < 1 << (bits - 1)


def _tensors(form: Affine, bits: int, symmetric: bool) -> dict[str, Tensor]:
    low, _ = form.bounds()
    zero = torch.full_like(low, 1 << (bits - 1)) if symmetric else -low
    grouped = form.differences.view(*form.scale.shape, -1) + zero[..., None]
    tensors = {
        "weight_packed": _words(grouped.view(form.differences.shape), bits),
        "weight_scale": form.scale.contiguous(),
        "weight_shape": torch.tensor(form.differences.shape),
    }
    return tensors if symmetric else tensors | {"weight_zero_point": _words(zero.T, bits).T.contiguous()}


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into whole int32 words."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits))).to(torch.uint8)
    return pack_bits(padded, bits).view(torch.int32).view(len(codes), -1)


def quantization_config(packing: Packing, dense: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`.

    Args:
        packing: what is packed and how.
        dense: full names of all other modules that a reader could take for quantized ones: linears, the head.
    """
    groups = {}
    for number, scheme in enumerate(sorted(set(packing.schemes.values()), key=str)):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        targets = [name for name, its in packing.schemes.items() if its == scheme]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    zeros = not all(scheme.symmetric for scheme in packing.schemes.values())
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        **({"dequantize": True} if zeros else {}),
    }
