"""What the disk holds of a model, believed as little as possible; the format is written down in `save.py`.

First everything is read, with checksums; then the counts in `config.json` and the sizes of all weights are compared
with the bytes that are there, on a model without memory; only then may a model be allocated. No code is loaded, and no
file from elsewhere. Every fault is a CheckpointError that names the file.
"""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sgpt_lightning.format.description import CONFIG, GENERATION_CONFIG, Description
from sgpt_lightning.format.directory import MANIFEST, CheckpointError, read_settled
from sgpt_lightning.format.layout import PackedWeight, WeightSpec, check_sizes
from sgpt_lightning.format.manifest import Manifest, check_files, read_manifest
from sgpt_lightning.format.packing import some_at_once
from sgpt_lightning.guards import one_thread
from sgpt_lightning.messages import told
from sgpt_lightning.models.linears import is_conv1d

MAX_BUFFER_BYTES = 16 << 20
"""Bytes of tables that a model may compute for itself (rotary angles), past the bytes of its parameters."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that run code when they are read."""
OURS = ("resident", "transformers_weights")
"""Keys at the top of `config.json` that are no settings of the model."""
Made = TypeVar("Made")


class Stored(NamedTuple):
    """All that the disk holds of a model, in memory."""

    path: Path
    manifest: Manifest
    description: Description
    described_in: Path
    """The file that says how weights are packed."""
    config: Any
    generation_config: Any
    tensors: dict[str, Tensor]


def check_compressed(directory: str | Path) -> Manifest:
    """Check the manifest of a compressed model and all files against it, and return it.

    Args:
        directory: what `save_compressed` wrote, found as by `find_directory`.

    Raises:
        CheckpointError: the directory is not a compressed model, or a file is missing, truncated or changed.
    """
    return read_settled(directory, lambda path: read_description(path).manifest)


class Described(NamedTuple):
    """What a directory says of its files, and of the weights in them."""

    manifest: Manifest
    description: Description
    described_in: Path
    """The file that says how weights are packed."""


def read_description(path: Path, checked: Callable[[str], bool] = lambda name: True) -> Described:
    """Read the manifest and what `config.json` says of the weights, and check the files against them.

    Args:
        path: a compressed model's directory, of any version.
        checked: tells whether a file is to be checked, by its name; `config.json` always is.

    Raises:
        CheckpointError: there is no manifest, files are missing, truncated or changed, disagree, or bring code.
    """
    manifest, description = read_manifest(path)
    file = path / MANIFEST
    check_files(path, manifest, [name for name in manifest.files if name == CONFIG or checked(name)])
    code = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if code:
        raise CheckpointError(
            f"{path} holds {', '.join(code[:4])}, which run code when they are read and are no part of a compressed "
            "model: remove them"
        )
    if description is None:
        with naming(path / CONFIG):
            description = Description.from_dict(json.loads((path / CONFIG).read_bytes())["quantization_config"])
        file = path / CONFIG
        if description.weights not in manifest.files:
            raise CheckpointError(f"{path / MANIFEST} does not list {description.weights}; copy both again")
    _check_agreement(path, manifest, description)
    return Described(manifest, description, file)


def _check_agreement(path: Path, manifest: Manifest, description: Description) -> None:
    reports = manifest.reports
    faults = [f"{name} has no report" for name in description.packed if name not in reports]
    faults += [f"{name} is not packed, its report says so" for name in reports if name not in description.packed]
    for name, spec in description.packed.items():
        weights = spec.shape[0] * spec.shape[1]
        if name in reports and reports[name].weights != weights:
            faults.append(f"{name} has {weights} weights, its report {reports[name].weights}")
    if faults:
        raise CheckpointError(f"{path / MANIFEST} and {CONFIG} disagree: {'; '.join(faults[:4])}; copy both again")


def read_stored(path: Path) -> Stored:
    """Read all files of a compressed model; raises CheckpointError, `read_settled` may then try again."""
    described = read_description(path)
    manifest = described.manifest
    tensors: dict[str, Tensor] = {}
    for name in manifest.weight_files:
        try:
            tensors |= load_file(path / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: it shrank while it was mapped
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return Stored(path, *described, _config(path, tensors), _generation_config(path, manifest), tensors)


def read_headers(files: Collection[str | Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files by name, without their memory; raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(f"{path} holds {name} in {part.get_dtype()}, which is not ours")
                    tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    return tensors


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "BOOL": torch.bool,
}  # fmt: skip


def _generation_config(path: Path, manifest: Manifest) -> Any:
    from transformers import GenerationConfig

    if GENERATION_CONFIG not in manifest.files:
        return None
    with naming(path / GENERATION_CONFIG):
        return GenerationConfig.from_pretrained(path, local_files_only=True)


def _config(path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Read `config.json`, whose counts must be believable for so many tensors and bytes."""
    from transformers import AutoConfig

    with naming(path / CONFIG):
        check_counts(json.loads((path / CONFIG).read_bytes()), tensors)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        for key in OURS:  # which older versions lack
            config.__dict__.pop(key, None)
    return config


def check_counts(content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Compare the counts in a config with the tensors that are there; raises ValueError.

    transformers makes lists and modules of these numbers before it allocates any tensor.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    for key, count in _counts(content):
        if count > (len(tensors) if re.search("layers?$", key) else size):
            raise ValueError(f"{key} is {count}, but there are {len(tensors)} tensors of {size} bytes")


def _counts(content: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of things in a config: `num_...`, `n_layer`."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, int | float) and re.match("num_|n_.*layers?$", key):
            yield key, value
        yield from _counts(value)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever is made of a file's content, by transformers too, into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} does not describe a model that can be built ({told(error)})") from error


@contextlib.contextmanager
def blaming(file: Path, name: str) -> Iterator[None]:
    """Turn a ValueError about a packed weight into a CheckpointError that names it and the file that describes it."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{file} does not describe {name}: {error}") from error


def some_together(
    work: Callable[[list[PackedWeight]], list[Made]],
    specs: Mapping[str, WeightSpec],
    weight_of: Callable[[str], PackedWeight],
    file: Path,
) -> Iterator[tuple[str, Made]]:
    """Do work on packed weights, some side by side, and yield what it makes of each, by name.

    Args:
        work: as `unpack_weights`; raises ValueError.
        specs: of the weights, by the names of their modules.
        weight_of: gives a weight by name; none is kept.
        file: what describes them.

    Raises:
        CheckpointError: the work fails; names the first weight with which it does.
    """
    for names in some_at_once({name: PackedWeight(spec, {}) for name, spec in specs.items()}):
        try:
            with one_thread():  # decoding is numpy's work, in steps
                made = work([weight_of(name) for name in names])
        except ValueError:
            for name in names:
                with blaming(file, name):
                    work([weight_of(name)])
            raise
        yield from zip(names, made, strict=True)


def take_packed(tensors: dict[str, Tensor], description: Description, file: Path) -> dict[str, PackedWeight]:
    """Take the packed weights out of the stored tensors; sizes are checked, nothing is unpacked."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in description.packed}
    for key in list(tensors):
        owner, _, leaf = key.rpartition(".")
        if owner in parts and leaf.startswith("weight_"):
            tensor = tensors.pop(key)
            one_segment = leaf in ("weight_range", "weight_zero_point") and tensor.dim() == 1  # format version 1
            parts[owner][leaf] = tensor.unsqueeze(1) if one_segment else tensor
    packed = {name: PackedWeight(spec, parts[name]) for name, spec in description.packed.items()}
    for name, weight in packed.items():
        with blaming(file, name):
            check_sizes(weight)
    return packed


def check_shapes(
    model: nn.Module,
    rest: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    aliases: Mapping[str, str],
    path: Path,
) -> None:
    """Compare a model as `config.json` describes it, without memory, with the tensors that are there.

    Args:
        model: built on the meta device.
        rest: the tensors that are not packed, by name.
        packed: the packed weights, by the names of their modules.
        aliases: tied tensors, name in the model -> name in the file.
        path: the directory, for messages.

    Raises:
        CheckpointError: tensors are missing, too many or of another shape, or the model asks for large tables.
    """
    state = model.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in rest.items()}
    state |= {name: table for name, table in model.named_buffers() if name in found}
    for name, weight in packed.items():
        turned = f"{name}.weight" in state and is_conv1d(model.get_submodule(name))
        found[f"{name}.weight"] = weight.spec.shape[::-1] if turned else weight.spec.shape
    found |= {alias: found[name] for alias, name in aliases.items() if name in found}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, not {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if found.get(name) != tuple(tensor.shape)
    ] + [f"{name} is too many" for name in found if name not in state]
    if wrong:
        raise CheckpointError(f"{path} does not hold the tensors that its {CONFIG} asks for: {'; '.join(wrong[:4])}")
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    tables = sum(tensor.nbytes for name, tensor in model.named_buffers() if name not in state)
    if tables > parameters + MAX_BUFFER_BYTES:
        raise CheckpointError(f"{path / CONFIG} asks for {tables} bytes of tables for {parameters} of parameters")
