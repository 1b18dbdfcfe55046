"""A compressed directory as something that other programs read, with the values it has here.

    dense-hf            a directory for plain transformers: dense weights, zeros and grid values as they are
    compressed-tensors  the same, with linears of integers where the format of that package holds them exactly
                        (`pack_quantized.py`), for transformers with the package, and vLLM
    state-dict          one safetensors file, a tensor for each name of the model's `state_dict()`, ties once

Values are those of `load_compressed(directory, dtype=...)`. A dtype that cannot hold what the file states is refused,
unless it is the one that the model was evaluated in, or rounding is asked for. What is written is read back and
compared before it takes its place. An export never replaces anything.

Left out: writing back (an export is not a compressed model of ours any more), formats without zero points, GGUF.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.checkpoint.contents import unpacked_contents
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import Described, read_description, read_stored, take_packed
from sgpt_lightning.export.outputs import check_output, new_directory, new_file
from sgpt_lightning.export.pack_quantized import Packing, pack_linears, quantization_config
from sgpt_lightning.format.description import CONFIG, GENERATION_CONFIG, SHARD_INDEX
from sgpt_lightning.format.directory import find_directory, read_settled
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import find_linears
from sgpt_lightning.models.source import CARD, source_on_card
from sgpt_lightning.report.card import model_card

ExportFormat = Literal["dense-hf", "compressed-tensors", "state-dict"]
FORMATS = get_args(ExportFormat)
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class DenseLinear:
    """A linear that an integer format could not take."""

    reason: str
    bytes: int
    """As exported."""
    packed_bytes: int
    """In the compressed directory."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    output: Path
    bytes: int
    """Of its weight files."""
    compressed_bytes: int
    """Of the weight files of the compressed directory."""
    dtype: torch.dtype
    """Of its floating-point tensors."""
    rounded: int = 0
    """Values that the dtype could not hold; 0 unless rounding was asked for."""
    integer_bits: dict[str, int] = field(default_factory=dict)
    """Bits of the linears that were packed, by name."""
    dense: dict[str, DenseLinear] = field(default_factory=dict)
    """Linears that went dense where integers were asked for, by name."""
    notes: tuple[str, ...] = ()
    """What a reader has to know."""


def export_model(
    directory: str | Path,
    output: str | Path,
    format: ExportFormat = "dense-hf",
    *,
    dtype: torch.dtype | str | None = None,
    lossy: bool = False,
) -> Exported:
    """Write a compressed model for other programs.

    Args:
        directory: what `save_compressed` wrote.
        output: a directory to make, or for `state-dict` a file; `~` is expanded, nothing that exists is replaced.
        format: `dense-hf`, `compressed-tensors` or `state-dict`.
        dtype: of floating-point tensors; None for the one that the model was evaluated in.
        lossy: round values that `dtype` cannot hold, instead of refusing it.

    Raises:
        CheckpointError: `directory` is not a compressed model, or is damaged.
        FileExistsError: `output` exists.
        ValueError: an unknown format or dtype; `dtype` would change values; integers hold no linear exactly.
        OSError: `output` cannot be written, or did not read back as it was written.
    """
    check_choice("format", format, ExportFormat)
    place = check_output(output)
    described = read_settled(directory, read_description)
    manifest = described.manifest
    wanted = _dtype(dtype, described)
    rounded = _values_changed(directory, wanted, described)
    if rounded and not lossy:
        raise ValueError(
            f"dtype {_name(wanted)} would change {rounded:,} of {manifest.ledger.parameters:,} values: "
            "choose float32, or ask for rounding (lossy=True, --lossy)"
        )
    model = load_compressed(directory, dtype=wanted)
    packing = _packing(directory, model) if format == "compressed-tensors" else Packing({}, {}, {})
    if format == "state-dict":
        with new_file(place) as path:
            _write_file(path, model)
    else:
        size = sum(tensor.nbytes for tensor in model.parameters())
        with new_directory(place, size) as partial:
            _write_directory(partial, model, packing, getattr(torch, manifest.storage_dtype))
            _copy_others(find_directory(directory), partial, manifest)
            source = source_on_card(find_directory(directory), manifest.record.model)
            (partial / CARD).write_text(model_card(manifest, source, format), encoding="utf-8")
    return _summary(place, model, manifest, packing, rounded)


def _dtype(dtype: torch.dtype | str | None, described: Described) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        found = getattr(torch, described.description.compute_dtype)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype or the name of one, got {dtype!r}")
    return found


def _values_changed(directory: str | Path, dtype: torch.dtype, described: Described) -> int:
    """Count the values of the file that a dtype cannot hold; 0 for the one in which the model was evaluated."""
    evaluated = getattr(torch, described.description.compute_dtype)
    stated = torch.promote_types(evaluated, torch.float32)
    if dtype == evaluated or torch.promote_types(dtype, stated) == dtype:
        return 0
    model = load_compressed(directory, dtype=stated)
    return sum(int((tensor.to(dtype).to(stated) != tensor).sum()) for tensor in model.parameters())


def _packing(directory: str | Path, model: nn.Module) -> Packing:
    linears = find_decoder_blocks(model).linears()
    packing = pack_linears(linears, read_settled(directory, _read_packed))
    if not packing.schemes:
        reasons = [f"{count} because {reason}" for reason, count in Counter(packing.reasons.values()).items()]
        raise ValueError(
            f"compressed-tensors holds none of the {len(linears)} linears of {directory} exactly "
            f"({'; '.join(reasons)}): use the format dense-hf"
        )
    return packing


def _read_packed(path: Path) -> dict[str, PackedWeight]:
    stored = read_stored(path)
    return take_packed(stored.tensors, stored.description, stored.described_in)


def _write_file(path: Path, model: nn.Module) -> None:
    """Write all tensors of the state; the names of tied ones that are left out stand in the metadata."""
    found, aliases = unpacked_contents(model, (), torch.float64)  # smaller than which nothing is made
    tensors = {name: found[name].make() for name in model.state_dict() if name in found}
    try:
        save_file(tensors, path, metadata={"format": "pt", **aliases})
    except SafetensorError as error:
        raise OSError(f"{path} was not written ({error})") from error
    _check_read_back(load_file(path), tensors)


def _write_directory(directory: Path, model: Any, packing: Packing, storage_dtype: torch.dtype) -> None:
    """Write config and weights as transformers does.

    Beside integers, what is dense takes the storage dtype where that loses nothing: readers widen it again.
    """
    from transformers import GenerationConfig

    state = model.state_dict()
    if packing.schemes:
        rest, _ = unpacked_contents(model, packing.schemes, storage_dtype)
        state = {name: content.make() for name, content in rest.items() if name in state} | packing.tensors
        dense = [name for name in find_linears(model) if name not in packing.schemes]
        model.config.quantization_config = quantization_config(packing, dense)
    model.generation_config = GenerationConfig()  # the model's own is copied: transformers refuses what some publish
    model.save_pretrained(directory, state_dict=dict(state), max_shard_size=MAX_SHARD_SIZE)
    _check_read_back(
        {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}, state
    )


def _check_read_back(read: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """Compare what the disk holds with the tensors that were to go there; of tied ones, one is enough."""
    present = {tensor.data_ptr() for name, tensor in written.items() if name in read}
    wrong = [name for name, tensor in written.items() if name in read and not torch.equal(read[name], tensor)]
    wrong += [name for name, t in written.items() if name not in read and t.data_ptr() not in present]
    wrong += [name for name in read if name not in written]
    if wrong:
        raise OSError(f"the export did not read back as it was written: {', '.join(wrong[:4])}")


def _copy_others(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy the tokenizer's files and the generation settings; only what the manifest vouches for."""
    own = {CONFIG, SHARD_INDEX, CARD, *manifest.weight_files}
    if GENERATION_CONFIG not in manifest.files:
        (target / GENERATION_CONFIG).unlink(missing_ok=True)
    for name in manifest.files:
        if name not in own:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _summary(place: Path, model: nn.Module, manifest: Manifest, packing: Packing, rounded: int) -> Exported:
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    dense = {}
    for name, reason in packing.reasons.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        own = manifest.linears[name]["bytes"] if name in manifest.linears else weight.nbytes
        dense[name] = DenseLinear(reason, weight.nbytes, own)
    return Exported(
        output=place,
        bytes=sum(path.stat().st_size for path in files),
        compressed_bytes=manifest.ledger.file,
        dtype=next(model.parameters()).dtype,
        rounded=rounded,
        integer_bits={name: scheme.bits for name, scheme in packing.schemes.items()},
        dense=dense,
        notes=_notes(model),
    )


def _notes(model: nn.Module) -> tuple[str, ...]:
    persistent = model.state_dict().keys()
    rounded = [
        name
        for name, table in model.named_buffers()
        if name not in persistent and table.is_floating_point() and table.dtype != torch.float32
    ]
    if not rounded:
        return ()
    return (
        f"{len(rounded)} tables that the model computes for itself ({rounded[0]}, ...) were rounded when it was "
        "compressed; other programs compute them in float32, so their logits differ in the last bits",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
