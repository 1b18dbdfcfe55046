"""A second reader of the file format, version 7, in numpy: written from the description in `format/packing.py`.

Files and checksums are those of the descriptions in `checkpoint/save.py`, `format/description.py` and
`format/manifest.py`, bits within bytes
those of `format/bits.py`'s drawing. Nothing of the package is imported, so that a reader and a writer who are wrong in
the same way are found out.
"""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from entropy_reader import read_codes
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]


def read_dense(directory: Path) -> tuple[dict[str, Array], set[str]]:
    """Return the tensors by name, linears as float32 `[out_features, in_features]`, and the linears' names."""
    manifest = json.loads((directory / "sgpt_manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("sgpt", 7)
    described = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["format_version"]) == ("sgpt", 7)
    assert manifest.pop("sha256") == _checksum(manifest)
    tensors: dict[str, Array] = {}
    for file, entry in manifest["files"].items():
        content = (directory / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        if file.startswith("sgpt") and file.endswith(".safetensors"):
            tensors |= load_file(directory / file)
    for name, spec in described["packed"].items():
        parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.weight_")}
        tensors[f"{name}.weight"] = _weight(spec, {key.rpartition(".")[2]: part for key, part in parts.items()})
    tensors |= {alias: tensors[name] for alias, name in described["aliases"].items()}
    return tensors, set(manifest["linears"])


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key not in ("format", "format_version")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _weight(spec: dict[str, Any], parts: dict[str, Array]) -> Array:
    rows, columns = spec["shape"]
    if spec["layout"] == "coded":
        return _coded(spec, parts)
    keep = _mask(spec, parts.get("weight_mask"))
    weight = np.zeros((rows, columns), dtype=np.float32)
    if spec["widths"] is None:
        weight[keep] = parts["weight_values"].reshape(-1)  # row by row
        return weight
    widths = _widths(spec, parts.get("weight_widths"))
    by_rows = spec["width_axis"] == "output"
    width_of = np.broadcast_to(widths[:, None] if by_rows else widths[None, :], (rows, columns))
    if spec["group_size"]:
        segment_of = np.arange(columns) // spec["group_size"]
    elif by_rows or spec["grid"] == "zero-point":
        segment_of = np.zeros(columns, dtype=int)
    else:
        segment_of = np.searchsorted(spec["widths"], widths)
    span = parts["weight_range"].astype(np.float32)
    origin = parts["weight_zero_point" if spec["grid"] == "zero-point" else "weight_offset"].astype(np.float32)
    bits_read = 0
    for bits in reversed(spec["widths"]):  # widest run first
        chosen = keep & (width_of == bits)
        count = int(chosen.sum())
        bits_read += -bits_read % 8  # each run starts on a byte
        codes = _unpack(parts["weight_codes"], bits, count, bits_read)
        bits_read += bits * count
        row, column = np.nonzero(chosen)  # numpy walks row by row, as the file does
        at = row, segment_of[column]
        weight[chosen] = _values(spec, bits, codes, span[at], origin[at])
    assert math.ceil(bits_read / 8) == parts["weight_codes"].size
    assert spec.get("scaled", False) == ("weight_channel_scale" in parts)
    return weight * parts["weight_channel_scale"].astype(np.float32) if spec.get("scaled") else weight


def _coded(spec: dict[str, Any], parts: dict[str, Array]) -> Array:
    beside = {"weight_level", "weight_steps", "weight_row_scales"}
    streams = {name.removeprefix("weight_"): parts[name] for name in parts if name not in beside}
    data = {name: part.tolist() for name, part in streams.items()}
    codes = np.array(read_codes(data, tuple(spec["shape"])), dtype=np.float32)
    fine, scale = (
        np.exp2(-parts[name].astype(np.float64) / octave).astype(np.float32)
        for name, octave in (("weight_steps", 16), ("weight_row_scales", 8))
    )
    return codes * (parts["weight_level"] * fine) * scale[:, None]


def _values(spec: dict[str, Any], bits: int, codes: Array, span: Array, origin: Array) -> Array:
    if spec["grid"] == "zero-point":
        top = 2**bits - 1
        zero = np.round(origin * np.float32(top / (2 ** spec["widths"][-1] - 1)))  # half to even
        return span / np.float32(top) * (codes.astype(np.float32) - zero)
    if spec["grid"] == "offset":
        return span / np.float32(2**bits - 1) * codes.astype(np.float32) + origin
    half = 2 ** (bits - 1)
    size = span / np.float32(max(half - 1, 1)) * (codes % half).astype(np.float32) + origin
    return np.where(codes >= half, -size, size)


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
    channels = spec["shape"][0 if spec["width_axis"] == "output" else 1]
    if stored is None:
        assert len(used) == 1
        return np.repeat(used, channels)
    return used[_unpack(stored, math.ceil(math.log2(len(used))), channels)]


def _unpack(packed: Array, bits: int, count: int, first_bit: int = 0) -> Array:
    """Code i takes the bits from b * i on, the lowest bit of a byte and of a code first."""
    stream = np.unpackbits(packed, bitorder="little")[first_bit : first_bit + bits * count]
    return stream.reshape(count, bits) @ (1 << np.arange(bits))
