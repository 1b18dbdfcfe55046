"""A compressed model on disk: written beside, checked, renamed; read back to the same logits.

A directory holds `config.json`, whose `quantization_config` names this format and its version and says what a reader
needs (`format/description.py`: a specification per packed weight, aliases of tied tensors, how the model was
evaluated), `sgpt.safetensors` (past 5 GB `sgpt-00001-of-0000N.safetensors` ... and an index), `sgpt_manifest.json`,
`generation_config.json`, the tokenizer's files, and `README.md`, the model card. Which tensors there are is written
down in `contents.py`. The manifest holds sizes and SHA-256 of all other files, and of itself (`format/manifest.py`),
and what a person wants to know (recipe, report per linear and embedding, ledger, perplexities with their protocols).

Where sgpt_lightning is not imported, transformers does not know the format: it would make up the linears at random. So
there is no `model.safetensors`, and `transformers_weights` in `config.json`, where it looks for the name of the
weights, says what to do instead. `resident` is there to be overridden, by `from_pretrained(..., resident="coded")`.

Of a model whose blocks are elsewhere no more is in memory at one time than is packed, and what one file holds besides.

Reading is `reading.py`'s and `load.py`'s, replacing a directory `format/directory.py`'s.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sgpt_lightning.checkpoint.contents import Content, check_names, contents
from sgpt_lightning.checkpoint.tensor_files import TensorFiles
from sgpt_lightning.format.description import (
    CONFIG,
    GENERATION_CONFIG,
    RESIDENT,
    SHARD_INDEX,
    WEIGHT_FILE,
    WEIGHTS,
    Description,
)
from sgpt_lightning.format.directory import MARKER, check_target, replacing
from sgpt_lightning.format.ledger import Ledger
from sgpt_lightning.format.manifest import FileEntry, Manifest
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.source import CARD, source_of
from sgpt_lightning.report.card import model_card

MAX_SHARD_SIZE = "5GB"
NO_PLAIN_WEIGHTS = "only sgpt_lightning reads this directory: import sgpt_lightning first, then load it again"
"""Where transformers looks for the name of the weights; it stops there and shows this text."""


def save_compressed(
    directory: str | Path,
    model: nn.Module,
    solved: Mapping[str, SolvedLinear],
    *,
    storage_dtype: torch.dtype = torch.float16,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a compressed model. A crash at any moment leaves the previous directory, or the new one, whole.

    Args:
        directory: created, or replaced if it is a compressed model already; `~` is expanded.
        model: the transformers model that holds the compressed weights.
        solved: what to store in place of the weights of linears and embeddings, by full name.
        storage_dtype: dtype for everything else, used where it loses nothing.
        tokenizer: a transformers tokenizer whose files go along.
        run: what else the manifest is to say.

    Raises:
        ValueError: a name or a shape is none of the model's, or a tensor holds NaN or infinite values.
        FileExistsError: `directory`, or a name beside it that a save needs, holds what this package did not write.
        OSError: the directory cannot be written; what was there is untouched.
    """
    check_target(directory)
    check_names(model, solved)
    solved = {name: replace(linear, report=replace(linear.report, name=name)) for name, linear in solved.items()}
    linears = find_decoder_blocks(model).linears()
    tensors, aliases = contents(model, solved, storage_dtype)
    with replacing(directory, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        description = Description(
            weights=write_weights(partial, tensors, MAX_SHARD_SIZE),
            compute_dtype=_dtype_name(next(model.parameters()).dtype),
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            packed={name: linear.packed.spec for name, linear in solved.items()},
            aliases=aliases,
        )
        (partial / CONFIG).write_text(config_text(model.config, description))
        if getattr(model, "generation_config", None) is not None:
            (partial / GENERATION_CONFIG).write_text(generation_text(model.generation_config))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        manifest = Manifest(
            storage_dtype=_dtype_name(storage_dtype),
            linears={name: linear.report.to_dict() for name, linear in solved.items() if name in linears},
            embeddings={name: table.report.to_dict() for name, table in solved.items() if name not in linears},
            ledger=_ledger(partial, model, tensors, solved),
            files={},
            run=dict(run or {}),
        )
        (partial / CARD).write_text(model_card(manifest, source_of(manifest.record.model, model)), encoding="utf-8")
        manifest = replace(manifest, files={name: FileEntry.of(partial / name) for name in _files(partial)})
        manifest.write(partial)
        _verify(partial, tensors)
    return manifest


def save_or_rescue(
    places: Sequence[Path], model: nn.Module, solved: Mapping[str, SolvedLinear], **options: Any
) -> Manifest:
    """Write a compressed model to the first of some places; where that fails, to the next, and raise all the same.

    Args:
        places: the directory that is meant, and others for what would be lost.
        model: as for `save_compressed`, and so are `solved` and the options.
        solved: what to store in place of the weights of linears and embeddings.
        options: keywords of `save_compressed`.

    Raises:
        OSError: the first place could not be written; says where the model is now.
    """
    target, *others = places
    try:
        return save_compressed(target, model, solved, **options)
    except OSError as error:
        for rescued in others:
            try:
                save_compressed(rescued, model, solved, **options)
            except OSError:
                continue
            raise OSError(
                f"the compressed model could not be written to {target} ({error}), but to {rescued}: move it"
            ) from error
        raise


def config_text(config: Any, description: Description) -> str:
    """Return the content of `config.json`, for a model's config (of which keys of ours are replaced)."""
    content = json.loads(config.to_json_string()) | {
        "quantization_config": description.to_dict(),
        "resident": RESIDENT,
        "transformers_weights": NO_PLAIN_WEIGHTS,
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def generation_text(generation_config: Any) -> str:
    """Return the content of `generation_config.json`.

    Not by save_pretrained, which refuses settings that published models have (a temperature without sampling).
    """
    return generation_config.to_json_string()


def write_weights(directory: Path, tensors: Mapping[str, Content], max_shard_size: int | str) -> str:
    """Write tensors to one file, or past a size to several and an index; return the name of the file or the index.

    Those of one file are made together, and let go of before the next.
    """
    sizes = {name: torch.empty(content.shape, dtype=content.dtype, device="meta") for name, content in tensors.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="sgpt{suffix}.safetensors", max_shard_size=max_shard_size
    )
    try:
        for filename, names in split.filename_to_tensors.items():
            save_file({name: tensors[name].make() for name in names}, directory / filename, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{filename} was not written ({error})") from error
    if not split.is_sharded:
        return WEIGHTS[0]
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / SHARD_INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return SHARD_INDEX


def _files(directory: Path) -> list[str]:
    """Names of all files there but the marker, which goes."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARKER)
    return [path.relative_to(directory).as_posix() for path in paths]


def _weight_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if WEIGHT_FILE.fullmatch(path.name))


def _ledger(
    directory: Path, model: nn.Module, tensors: Mapping[str, Content], solved: Mapping[str, SolvedLinear]
) -> Ledger:
    linears = find_decoder_blocks(model).linears()
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings |= {name for name, module in model.named_modules() if module is head}
    sizes = {"linears": 0, "embeddings": 0, "other": 0}
    kinds: Counter[str] = Counter()
    for name, content in tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = "linears" if owner in linears and leaf != "bias" else "embeddings" if owner in embeddings else "other"
        sizes[part] += content.nbytes
        if owner in solved and leaf.startswith("weight_"):
            kinds[leaf.removeprefix("weight_")] += content.nbytes
    return Ledger(
        **sizes,
        headers=sum(path.stat().st_size for path in _weight_files(directory)) - sum(sizes.values()),
        packed=dict(sorted(kinds.items())),
        linear_weights=sum(weight_matrix(linear).numel() for linear in linears.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _verify(directory: Path, tensors: Mapping[str, Content]) -> None:
    """Read everything back, one tensor at a time, before the directory may take its place."""
    Manifest.read(directory)
    try:
        files = TensorFiles(_weight_files(directory))
        wrong = [name for name, content in tensors.items() if not files.holds(name, content.make())]
    except ValueError as error:
        raise OSError(f"{directory} did not read back as it was written: {error}") from error
    if wrong or set(files) != set(tensors):
        raise OSError(f"{directory} did not read back as it was written: {', '.join(wrong[:4]) or 'extra tensors'}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
