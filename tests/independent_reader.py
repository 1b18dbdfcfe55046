"""A second reader of the file format, version 1: numpy and safetensors, written from the description in `packed.py`.

Bits within bytes are those of `bitpack.py`'s drawing, scale and zero point those of `grids.py`'s first paragraph.
Nothing of the package is imported, so that a reader and a writer who are wrong in the same way are found out.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]


def read_dense(directory: Path) -> tuple[dict[str, Array], set[str]]:
    """Return the tensors by name, linears as float32 `[out_features, in_features]`, and the linears' names."""
    manifest = json.loads((directory / "sgpt_manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("sgpt", 1)
    tensors: dict[str, Array] = {}
    for file in manifest["files"]:
        tensors |= load_file(directory / file)
    for name, entry in manifest["linears"].items():
        parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.weight_")}
        tensors[f"{name}.weight"] = _weight(
            entry["spec"], {key.rpartition(".")[2]: part for key, part in parts.items()}
        )
    tensors |= {alias: tensors[name] for alias, name in manifest["aliases"].items()}
    return tensors, set(manifest["linears"])


def _weight(spec: dict[str, Any], parts: dict[str, Array]) -> Array:
    rows, columns = spec["shape"]
    keep = _mask(spec, parts.get("weight_mask"))
    weight = np.zeros((rows, columns), dtype=np.float32)
    if spec["widths"] is None:
        weight[keep] = parts["weight_values"].reshape(-1)  # row by row
        return weight
    widths = _widths(spec, parts.get("weight_widths"))
    row_range = parts["weight_range"].astype(np.float32)
    zero_at_widest = parts["weight_zero_point"].astype(np.float32)
    bits_read = 0
    for bits in reversed(spec["widths"]):  # widest run first
        chosen = keep & (widths == bits)[None, :]
        count = int(chosen.sum())
        bits_read += -bits_read % 8  # each run starts on a byte
        codes = _unpack(parts["weight_codes"], bits, count, bits_read)
        bits_read += bits * count
        top = 2**bits - 1
        scale = row_range / np.float32(top)
        zero = np.round(zero_at_widest * np.float32(top / (2 ** spec["widths"][-1] - 1)))  # half to even
        row = np.nonzero(chosen)[0]  # numpy walks row by row, as the file does
        weight[chosen] = scale[row] * (codes.astype(np.float32) - zero[row])
    assert math.ceil(bits_read / 8) == parts["weight_codes"].size
    return weight


def _mask(spec: dict[str, Any], stored: Array | None) -> Array:
    rows, columns = spec["shape"]
    if spec["layout"] == "dense":
        return np.ones((rows, columns), dtype=bool)
    assert stored is not None
    if spec["layout"] == "bitmap":
        return _unpack(stored, 1, rows * columns).astype(bool).reshape(rows, columns)
    n, m = spec["n_m"]
    places = [[place not in zeros for place in range(m)] for zeros in itertools.combinations(range(m), n)]
    ranks = _unpack(stored, math.ceil(math.log2(len(places))), rows * columns // m)
    return np.array(places)[ranks].reshape(rows, columns)


def _widths(spec: dict[str, Any], stored: Array | None) -> Array:
    used = np.array(spec["widths"])
    if stored is None:
        assert len(used) == 1
        return np.repeat(used, spec["shape"][1])
    return used[_unpack(stored, math.ceil(math.log2(len(used))), spec["shape"][1])]


def _unpack(packed: Array, bits: int, count: int, first_bit: int = 0) -> Array:
    """Code i takes the bits from b * i on, the lowest bit of a byte and of a code first."""
    stream = np.unpackbits(packed, bitorder="little")[first_bit : first_bit + bits * count]
    return stream.reshape(count, bits) @ (1 << np.arange(bits))
