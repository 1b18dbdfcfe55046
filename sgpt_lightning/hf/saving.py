"""A model that came from one of our directories writes it again: the same bytes where nothing was changed.

`save_pretrained` of transformers would call the weights `model.safetensors`, which everybody would take for dense ones,
and would leave the manifest behind. So the instance gets its own. Files are made from the model, as they were made
first; where what is made now is what would have been made when the model was loaded, the loaded bytes are written
(another version of transformers may have written them). Tokenizer files are copied while the source is there.
"""

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgpt_lightning.checkpoint.save import config_text, generation_text
from sgpt_lightning.format.description import CONFIG, GENERATION_CONFIG, SHARD_INDEX, Description
from sgpt_lightning.format.directory import MANIFEST, adding
from sgpt_lightning.format.manifest import FileEntry, Manifest
from sgpt_lightning.packed.modules import packed_modules

UNSUPPORTED = ("state_dict", "variant", "distributed_checkpoint", "push_to_hub")


@dataclass
class Source:
    """The directory that a model was loaded from, as far as it takes to write it again."""

    path: Path
    files: list[Path]
    """Of weights."""
    stored: dict[str, Tensor]
    """The tensors in them by name, without memory: what dtype they are stored in."""
    held: dict[str, list[str]]
    """The names of the tensors by the names of the files."""
    description: Description
    texts: dict[str, bytes]
    """Content of the small files."""
    made: dict[str, str] = field(default_factory=dict)
    """What would have been written for them when the model was loaded."""

    @classmethod
    def of(cls, path: Path, files: Sequence[Path], stored: dict[str, Tensor], description: Description) -> "Source":
        """Note what lies in a directory; the files were checked."""
        small = (CONFIG, GENERATION_CONFIG, MANIFEST, SHARD_INDEX)
        texts = {name: (path / name).read_bytes() for name in small if (path / name).is_file()}
        held = {}
        for file in files:
            with safe_open(file, framework="pt") as content:
                held[file.name] = list(content.keys())
        return cls(path, list(files), stored, held, description, texts)

    def read_tables(self, model: Any) -> dict[str, Tensor]:
        """Read the tensors that the model does not load, since it computes them itself."""
        names = self.stored.keys() - model.state_dict().keys()
        tables: dict[str, Tensor] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as content:
                tables |= {name: content.get_tensor(name) for name in self.held[file.name] if name in names}
        return tables

    def remember(self, model: Any) -> None:
        """Note what would be written for the model as it was loaded; in another dtype it is another model."""
        if model.dtype == getattr(torch, self.description.compute_dtype):
            self.made = self.small_files(model)

    def small_files(self, model: Any) -> dict[str, str]:
        """Return what is to be written beside the weights, by name."""
        description = replace(self.description, compute_dtype=str(model.dtype).removeprefix("torch."))
        made = {CONFIG: config_text(model.config, description)}
        if getattr(model, "generation_config", None) is not None and GENERATION_CONFIG in self.texts:
            made[GENERATION_CONFIG] = generation_text(model.generation_config)
        return made


def save_as_loaded(model: Any, source: Source) -> None:
    """Let `model.save_pretrained(directory)` write what the model was loaded from."""
    model.save_pretrained = functools.partial(_save, model, source)


def _save(model: Any, source: Source, save_directory: Any, is_main_process: bool = True, **options: Any) -> None:
    """Write the model; options of transformers that would make other files of it are refused.

    Raises:
        ValueError: one of `UNSUPPORTED` is given.
        OSError: the directory cannot be written.
    """
    odd = [name for name in UNSUPPORTED if options.get(name)]
    if odd:
        raise ValueError(
            f"save_pretrained of a compressed model does not take {', '.join(odd)}; for the hub, save it and "
            "then call push_to_hub"
        )
    if not is_main_process:
        return
    with adding(save_directory) as partial:
        tensors = _tensors(model, source)
        for name, held in source.held.items():
            save_file({key: tensors[key] for key in held}, partial / name, metadata={"format": "pt"})
        if SHARD_INDEX in source.texts:
            (partial / SHARD_INDEX).write_bytes(source.texts[SHARD_INDEX])
        for name, text in source.small_files(model).items():
            same = text == source.made.get(name)
            (partial / name).write_bytes(source.texts[name] if same else text.encode())
        if MANIFEST in source.texts:
            _write_manifest(partial, source)


def _tensors(model: Any, source: Source) -> dict[str, Tensor]:
    """Return the tensors of the files by name, on the CPU, in the dtype that they came in where that loses nothing."""
    state = model.state_dict() | dict(model.named_buffers())
    for name, module in packed_modules(model).items():
        if module.holder is module:
            state |= {f"{name}.{part}": tensor for part, tensor in module.packed_weight.tensors.items()}
    tensors = {}
    for name, stored in source.stored.items():
        tensor = state[name].detach().cpu().contiguous()
        small = tensor.to(stored.dtype)
        tensors[name] = small if torch.equal(small.to(tensor.dtype), tensor) else tensor
    return tensors


def _write_manifest(partial: Path, source: Source) -> None:
    """Write the manifest, and the files that it lists and that are not the model's own."""
    (partial / MANIFEST).write_bytes(source.texts[MANIFEST])
    manifest = Manifest.read(partial)
    files = {}
    for name, entry in manifest.files.items():
        if not (partial / name).exists() and (source.path / name).is_file():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, partial / name)
        if (partial / name).exists():
            found = FileEntry.of(partial / name)
            files[name] = entry if found == entry else found
    if files != manifest.files:
        replace(manifest, files=files).write(partial)
