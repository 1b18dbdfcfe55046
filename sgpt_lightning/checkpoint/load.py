"""A compressed directory -> a model in memory; the format is written down in `save.py`.

A directory is believed as little as possible. First everything is read, with checksums; then the counts in
`config.json` and the sizes of all weights are compared with the bytes that were there, on a model without memory; only
then is the model allocated. No code is loaded, and no file from elsewhere. Every fault is a CheckpointError.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sgpt_lightning.format.directory import FORMAT, MANIFEST, CheckpointError, read_settled
from sgpt_lightning.format.layout import PackedWeight, check_sizes
from sgpt_lightning.format.manifest import CONFIG, GENERATION_CONFIG, Manifest, check_files
from sgpt_lightning.format.packing import some_at_once, unpack_weight, unpack_weights
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.linears import is_conv1d

MAX_BUFFER_BYTES = 16 << 20
"""Bytes of tables that a model may compute for itself (rotary angles), past the bytes of its parameters."""
SMALL_TABLE = 1024
"""Entries of a table that is always stored."""


def stored_tables(model: nn.Module) -> dict[str, Tensor]:
    """Return the tables that a model computes for itself (rotary angles) and that are stored all the same, by name.

    Small ones cost nothing and are then the same in every version of transformers; large ones that are not float32 were
    rounded when the model was cast as a whole, which `from_pretrained` does not do.
    """
    persistent = model.state_dict().keys()
    return {
        name: table
        for name, table in model.named_buffers()
        if name not in persistent
        and table.is_floating_point()
        and (table.numel() <= SMALL_TABLE or table.dtype != torch.float32)
    }


def check_compressed(directory: str | Path) -> Manifest:
    """Check the manifest of a compressed model and all files against it, and return it.

    Args:
        directory: what `save_compressed` wrote, found as by `find_directory`.

    Raises:
        CheckpointError: the directory is not a compressed model, or a file is missing, truncated or changed.
    """
    return read_settled(directory, _read_manifest)


def load_compressed(
    directory: str | Path, *, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> nn.Module:
    """Read a compressed model as an ordinary transformers model that computes with dense weights, in eval mode.

    Args:
        directory: what `save_compressed` wrote, found as by `find_directory`.
        dtype: compute dtype; the one the model was evaluated in if None, which gives the same logits bit for bit.
        attn_implementation: as in transformers; the one the model was evaluated with if None.

    Returns:
        The model, on the CPU.

    Raises:
        CheckpointError: the directory is not a compressed model, or a file is missing, truncated or changed.
        ValueError: `dtype` is not one.
    """
    compute_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(compute_dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or the name of one, got {dtype!r}")
    stored = read_settled(directory, _read)
    packed = _packed_weights(stored)
    _check_shapes(stored, packed)
    model = _allocate(stored, compute_dtype or getattr(torch, stored.manifest.compute_dtype), attn_implementation)
    _fill(model, stored, packed)
    if compute_dtype in (None, getattr(torch, stored.manifest.compute_dtype)):
        _fill_tables(model, stored)
    if stored.generation_config is not None:
        model.generation_config = stored.generation_config
    mark_compressed(model)
    return model.eval()


def packed_weights(directory: str | Path) -> dict[str, PackedWeight]:
    """Read the packed weights of a compressed model by the names of their modules; nothing is unpacked.

    Raises:
        CheckpointError: as `load_compressed`.
    """
    return _packed_weights(read_settled(directory, _read))


class _Stored(NamedTuple):
    """All that the disk holds of a model, in memory."""

    path: Path
    manifest: Manifest
    config: Any
    generation_config: Any
    tensors: dict[str, Tensor]


def _read_manifest(path: Path) -> Manifest:
    manifest = Manifest.read(path)
    check_files(path, manifest)
    return manifest


def _read(path: Path) -> _Stored:
    from transformers import GenerationConfig

    manifest = _read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for name in manifest.weight_files:
        try:
            tensors |= load_file(path / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: it shrank while it was mapped
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    generation_config = None
    if GENERATION_CONFIG in manifest.files:
        with _naming(path / GENERATION_CONFIG):
            generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return _Stored(path, manifest, _read_config(path, tensors), generation_config, tensors)


def _read_config(path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Read `config.json`, whose counts must be believable for so many tensors and bytes."""
    from transformers import AutoConfig

    size = sum(tensor.nbytes for tensor in tensors.values())
    with _naming(path / CONFIG):
        content = json.loads((path / CONFIG).read_bytes())
        if content["quantization_config"]["quant_method"] != FORMAT:
            raise ValueError(f"its quantization_config does not name the method {FORMAT!r}")
        for key, count in _counts(content):
            # transformers makes lists and modules of these numbers before it allocates any tensor.
            if count > (len(tensors) if re.search("layers?$", key) else size):
                raise ValueError(f"{key} is {count}, but there are {len(tensors)} tensors of {size} bytes")
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        config.__dict__.pop("transformers_weights", None)  # which older versions lack
    return config


def _counts(content: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of things in a config: `num_...`, `n_layer`."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, int | float) and re.match("num_|n_.*layers?$", key):
            yield key, value
        yield from _counts(value)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever transformers makes of a file's content into a CheckpointError that names the file."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} does not describe a model that can be built ({reason})") from error


def _packed_weights(stored: _Stored) -> dict[str, PackedWeight]:
    """Take the packed weights out of the stored tensors; sizes are checked, nothing is unpacked."""
    specs = stored.manifest.packed
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in specs}
    for key in list(stored.tensors):
        owner, _, leaf = key.rpartition(".")
        if owner in parts and leaf.startswith("weight_"):
            tensor = stored.tensors.pop(key)
            one_segment = leaf in ("weight_range", "weight_zero_point") and tensor.dim() == 1  # format version 1
            parts[owner][leaf] = tensor.unsqueeze(1) if one_segment else tensor
    packed = {}
    for name, spec in specs.items():
        packed[name] = PackedWeight(spec, parts[name])
        with _blaming_the_manifest(stored, name):
            check_sizes(packed[name])
    return packed


@contextlib.contextmanager
def _blaming_the_manifest(stored: _Stored, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{stored.path / MANIFEST} does not describe {name}: {error}") from error


def _check_shapes(stored: _Stored, packed: Mapping[str, PackedWeight]) -> None:
    """Compare what `config.json` describes, built without memory, with the tensors that are there."""
    from transformers import AutoModelForCausalLM

    with _naming(stored.path / CONFIG), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(stored.config), trust_remote_code=False)
    state = model.state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    state |= {name: table for name, table in model.named_buffers() if name in found}
    for name, weight in packed.items():
        turned = f"{name}.weight" in state and is_conv1d(model.get_submodule(name))
        found[f"{name}.weight"] = weight.spec.shape[::-1] if turned else weight.spec.shape
    found |= {alias: found[name] for alias, name in stored.manifest.aliases.items() if name in found}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, not {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if found.get(name) != tuple(tensor.shape)
    ] + [f"{name} is too many" for name in found if name not in state]
    if wrong:
        raise CheckpointError(
            f"{stored.path} does not hold the tensors that its {CONFIG} asks for: {'; '.join(wrong[:4])}"
        )
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    tables = sum(tensor.nbytes for name, tensor in model.named_buffers() if name not in state)
    if tables > parameters + MAX_BUFFER_BYTES:
        raise CheckpointError(
            f"{stored.path / CONFIG} asks for {tables} bytes of tables for {parameters} of parameters"
        )


def _allocate(stored: _Stored, dtype: torch.dtype, attn_implementation: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    attention = attn_implementation or stored.manifest.attn_implementation
    try:
        with torch.device("cpu"), own_random_state():
            return AutoModelForCausalLM.from_config(
                stored.config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        if attn_implementation is not None:
            raise
        raise CheckpointError(
            f"{stored.path / MANIFEST} asks for the attention {attention!r}, which does not work here ({error}); "
            "give attn_implementation"
        ) from error


def _fill(model: nn.Module, stored: _Stored, packed: Mapping[str, PackedWeight]) -> None:
    """Copy the stored tensors into the model, packed weights some at a time."""
    wanted: dict[str, list[Tensor]] = {name: [] for name in packed}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source = stored.manifest.aliases.get(name, name)
            owner = source.removesuffix(".weight")
            if owner in packed:
                wanted[owner].append(tensor)
            else:
                tensor.copy_(stored.tensors[source])
        for names in some_at_once(packed):
            for name, weight in zip(names, _unpacked(stored, names, packed), strict=True):
                for tensor in wanted[name]:
                    tensor.copy_(weight.T if is_conv1d(model.get_submodule(name)) else weight)


def _unpacked(stored: _Stored, names: Sequence[str], packed: Mapping[str, PackedWeight]) -> list[Tensor]:
    """Unpack some weights side by side; what is wrong with them is found out one by one."""
    try:
        return unpack_weights([packed[name] for name in names])
    except ValueError:
        for name in names:
            with _blaming_the_manifest(stored, name):
                unpack_weight(packed[name])
        raise


def _fill_tables(model: nn.Module, stored: _Stored) -> None:
    """Put the stored tables in the place of those that the model has computed."""
    for name in stored.tensors.keys() - model.state_dict().keys():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, stored.tensors[name], persistent=False)
