"""A compressed model on disk: written beside, checked, renamed; read back to the same logits.

A directory holds `config.json` (with a `quantization_config` that names this format and its version),
`model.safetensors` (several shards past 5 GB), `sgpt_manifest.json`, and the tokenizer's files. Per linear the tensors
are those of `packed.py`, under the linear's own name; everything else is stored as it is, in the storage dtype where
that loses nothing. Tensors that the model ties are stored once. The manifest holds what a reader needs (one weight
specification per linear, aliases of tied tensors, sizes and SHA-256 of the other files that it reads), and what a
person wants to know (recipe, report per linear, ledger, perplexities with their protocols).

Left out: registration with transformers, so that `from_pretrained` reads the directory by itself.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgpt_lightning.blocks import find_decoder_blocks, is_conv1d, mark_compressed, weight_matrix
from sgpt_lightning.calibration import SolvedLinear
from sgpt_lightning.packed import PackedWeight, WeightSpec, unpack_weight

FORMAT = "sgpt"
FORMAT_VERSION = 2
CONFIG = "config.json"
MANIFEST = "sgpt_manifest.json"
SHARD_INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"


class CheckpointError(ValueError):
    """A directory that is not a compressed model, or not a whole one; the message names the file and the remedy."""


@dataclass(frozen=True)
class Ledger:
    """Where the bytes of the weight files went; the four parts add up to the size of the files."""

    linears: int
    """Weights of the linears in decoder blocks: codes, values, masks, ranges, zero points, widths."""
    embeddings: int
    """Token and position embeddings and an untied output head."""
    other: int
    """Biases, norms and whatever else the model holds."""
    headers: int
    """Names, shapes and offsets, as safetensors writes them."""
    linear_weights: int
    """Entries of the linears' matrices, removed ones included."""
    parameters: int
    """Entries of all parameters of the dense model, tied ones once."""

    @property
    def file(self) -> int:
        """Bytes of all weight files."""
        return self.linears + self.embeddings + self.other + self.headers

    @property
    def linear_bits_per_weight(self) -> float:
        """True bits per weight over the linears of decoder blocks."""
        return 8 * self.linears / max(self.linear_weights, 1)

    @property
    def file_bits_per_weight(self) -> float:
        """True bits per parameter over the whole file."""
        return 8 * self.file / max(self.parameters, 1)


@dataclass(frozen=True)
class Manifest:
    """What `sgpt_manifest.json` says."""

    compute_dtype: str
    """dtype that the model was evaluated in."""
    storage_dtype: str
    """dtype of what is not packed, where that loses nothing."""
    attn_implementation: str | None
    """Attention implementation that the model was evaluated with."""
    aliases: dict[str, str]
    """Tied tensors: name in the model -> name in the file."""
    linears: dict[str, dict[str, Any]]
    """Per compressed linear: `spec` (how to unpack it) and `report` (how it went)."""
    ledger: Ledger
    files: dict[str, dict[str, Any]]
    """Weight files: `bytes` and `sha256`."""
    config: dict[str, Any]
    """The same of `config.json`, where one digit makes another model of the same weights."""
    run: dict[str, Any]
    """Recipe, perplexities, protocols, versions: whatever the writer adds."""

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest; raises CheckpointError."""
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory} is not a compressed model: it has no {MANIFEST}. Give a directory that `sgpt fit` wrote"
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); compress the model again") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path} is not a manifest of the format {FORMAT!r}")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} is of format version {version}, this package reads {FORMAT_VERSION}; upgrade it"
            )
        try:
            odd = [key for key in ("aliases", "linears", "files", "config", "run") if not isinstance(values[key], dict)]
            if odd:
                raise TypeError(f"no mapping in {', '.join(odd)}")
            return cls(**{**values, "ledger": Ledger(**values["ledger"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is incomplete ({error}); compress the model again") from error

    def write(self, directory: Path) -> None:
        """Write the manifest."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def is_compressed_dir(directory: Path) -> bool:
    """Tell whether a directory was written by `save_compressed`."""
    return (directory / MANIFEST).is_file()


def check_target(directory: Path) -> None:
    """Raise FileExistsError if saving to `directory` would overwrite something that is not a compressed model."""
    is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_empty and not is_compressed_dir(directory):
        raise FileExistsError(
            f"the output directory {directory} exists and is not a compressed model: choose another or remove it"
        )


def save_compressed(
    directory: str | Path,
    model: nn.Module,
    solved: Mapping[str, SolvedLinear],
    *,
    storage_dtype: torch.dtype,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a compressed model. A crash at any moment leaves the previous directory, or the new one, whole.

    Args:
        directory: created, or replaced if it is a compressed model already.
        model: the transformers model that holds the compressed weights.
        solved: what to store in place of the linears' weights, by full name.
        storage_dtype: dtype for everything else, used where it loses nothing.
        tokenizer: a transformers tokenizer whose files go along.
        run: what else the manifest is to say.

    Raises:
        FileExistsError: `directory` exists and is not a compressed model.
    """
    target = Path(directory).resolve()  # renaming a symbolic link would leave its directory behind
    recover_interrupted_save(target)
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_config(partial, model, tokenizer)
        tensors, aliases = _tensors_to_store(model, solved, storage_dtype)
        _write_weights(partial, tensors)
        config = model.config
        manifest = Manifest(
            compute_dtype=_dtype_name(next(model.parameters()).dtype),
            storage_dtype=_dtype_name(storage_dtype),
            attn_implementation=getattr(config, "_attn_implementation", None),
            aliases=aliases,
            linears={
                name: {"spec": linear.packed.spec.to_dict(), "report": linear.report.to_dict()}
                for name, linear in solved.items()
            },
            ledger=_ledger(partial, model, tensors, solved),
            files={path.name: _fingerprint(path) for path in _weight_files(partial)},
            config=_fingerprint(partial / CONFIG),
            run=dict(run or {}),
        )
        manifest.write(partial)
        _verify(partial, tensors)
        _sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace_directory(partial, target)
    return manifest


def load_compressed(
    directory: str | Path, *, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> nn.Module:
    """Read a compressed model as an ordinary transformers model that computes with dense weights, in eval mode.

    Args:
        directory: what `save_compressed` wrote.
        dtype: compute dtype; the one the model was evaluated in if None, which gives the same logits bit for bit.
        attn_implementation: as in transformers; the one the model was evaluated with if None.

    Raises:
        CheckpointError: the directory is not a compressed model, or a file is missing, truncated or changed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(directory).resolve()
    recover_interrupted_save(path)
    manifest = Manifest.read(path)
    _check_files(path, manifest)
    compute_dtype = getattr(torch, manifest.compute_dtype) if dtype is None else dtype
    compute_dtype = getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from error
    del config.quantization_config
    with torch.random.fork_rng():  # random initialization must not move the user's generators
        model = AutoModelForCausalLM.from_config(
            config, dtype=compute_dtype, attn_implementation=attn_implementation or manifest.attn_implementation
        )
    stored = {name: tensor for file in manifest.files for name, tensor in load_file(path / file).items()}
    try:
        model.load_state_dict(_dense_state(stored, manifest, model, path), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the tensors that its config.json asks for: {error}") from error
    mark_compressed(model)
    return model.eval()


def recover_interrupted_save(target: Path) -> None:
    """Bring back the previous directory if a save was killed between moving it away and moving the new one in."""
    previous = _previous(target)
    if not previous.exists():
        return
    if target.exists():
        shutil.rmtree(previous)
    else:
        previous.rename(target)


def _write_config(directory: Path, model: Any, tokenizer: Any) -> None:
    config = copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": FORMAT, "format_version": FORMAT_VERSION}
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _tensors_to_store(
    model: nn.Module, solved: Mapping[str, SolvedLinear], storage_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the file by name, on the CPU, and the aliases of tied ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in solved:
            tensors |= {f"{owner}.{part}": value for part, value in solved[owner].packed.tensors.items()}
            continue
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first_name:
            aliases[name] = first_name[key]
            continue
        first_name[key] = name
        tensors[name] = _smallest_lossless(tensor.detach(), storage_dtype).cpu().contiguous()
    return tensors, aliases


def _smallest_lossless(tensor: Tensor, storage_dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() <= storage_dtype.itemsize:
        return tensor
    small = tensor.to(storage_dtype)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor


def _write_weights(directory: Path, tensors: dict[str, Tensor]) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_SIZE)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / SHARD_INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("model*.safetensors"))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _ledger(
    directory: Path, model: nn.Module, tensors: dict[str, Tensor], solved: Mapping[str, SolvedLinear]
) -> Ledger:
    linears = find_decoder_blocks(model).linears()
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings |= {name for name, module in model.named_modules() if module is head}
    sizes = {"linears": 0, "embeddings": 0, "other": 0}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = "linears" if owner in linears and leaf != "bias" else "embeddings" if owner in embeddings else "other"
        sizes[part] += tensor.nbytes
    return Ledger(
        **sizes,
        headers=sum(path.stat().st_size for path in _weight_files(directory)) - sum(sizes.values()),
        linear_weights=sum(weight_matrix(linear).numel() for linear in linears.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _verify(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Read everything back before the directory may take its place."""
    read = {name: tensor for path in _weight_files(directory) for name, tensor in load_file(path).items()}
    wrong = [name for name, tensor in tensors.items() if name not in read or not torch.equal(read[name], tensor)]
    if wrong or len(read) != len(tensors):
        raise OSError(f"{directory} did not read back as it was written: {', '.join(wrong[:4]) or 'extra tensors'}")


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _replace_directory(partial: Path, target: Path) -> None:
    """Move `partial` to `target`; what was there is kept beside until the move is done (see recovery above)."""
    if target.exists():
        target.rename(_previous(target))
    partial.rename(target)
    _sync_path(target.parent)
    shutil.rmtree(_previous(target), ignore_errors=True)


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, expected in {CONFIG: manifest.config, **manifest.files}.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the whole directory again")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}: truncated or replaced"
            )
        if _fingerprint(path) != expected:
            raise CheckpointError(f"{path} does not match the manifest's SHA-256: it was changed or damaged")


def _dense_state(stored: dict[str, Tensor], manifest: Manifest, model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Unpack the linears and expand the aliases."""
    state = dict(stored)
    for name, entry in manifest.linears.items():
        parts = {key: key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.weight_")}
        try:
            packed = PackedWeight(
                WeightSpec.from_dict(entry["spec"]), {part: state.pop(key) for key, part in parts.items()}
            )
            weight = unpack_weight(packed)
            linear = model.get_submodule(name)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / MANIFEST} does not describe {name}: {error}") from error
        state[f"{name}.weight"] = weight.T if is_conv1d(linear) else weight
    return state | {alias: state[name] for alias, name in manifest.aliases.items() if name in state}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
