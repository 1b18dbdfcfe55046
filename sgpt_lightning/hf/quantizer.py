"""transformers builds and fills our models by itself: what it asks of a quantizer, and when.

`from_pretrained` first shows the config to the quantizer, then looks for the weights, builds the model without memory,
lets the quantizer change its modules, fills it, and lets the quantizer finish. Everything is checked before the first
tensor is read: checksums where the manifest lies beside the files, then the sizes and shapes in their headers.

The config is shown by a method that transformers 5.23 calls `update_attn_implementation`; 5.17 calls `update_tp_plan`
in the same place. Whatever it is called, this is where `transformers_weights` gets the true name of the file.
"""

import copy
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.checkpoint.load import fill_tables
from sgpt_lightning.checkpoint.reading import (
    check_counts,
    check_shapes,
    naming,
    read_description,
    read_headers,
    some_together,
    take_packed,
)
from sgpt_lightning.format.description import CONFIG, RESIDENT, SHARD_INDEX, WEIGHT_FILE, Description, Residence
from sgpt_lightning.format.directory import MANIFEST, CheckpointError
from sgpt_lightning.format.packing import unpack_weights
from sgpt_lightning.format.resident import reside_together
from sgpt_lightning.hf.saving import Source, save_as_loaded
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.hub import fetch_beside
from sgpt_lightning.packed.modules import pack_model, packed_modules, tied_to_packed, unpack_model

OF_A_MODEL = re.compile(rf"{WEIGHT_FILE.pattern}|{re.escape(SHARD_INDEX)}|(generation_)?config\.json")
"""Files that are read here; a tokenizer's are its own, and a card may be edited."""


class SgptConfig(QuantizationConfigMixin):
    """The `quantization_config` of a `config.json` as it is; `SgptQuantizer` reads it, where the file is known."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = values.get("quant_method")
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        """Return what stood in the file."""
        return copy.deepcopy(self.values)


class SgptQuantizer(HfQuantizer):
    """Builds models with packed modules from our directories; it quantizes nothing, which `compress` does."""

    requires_calibration = True
    quantization_config: Any
    description: Description | None = None
    """What the config says of the weights; None until it was shown."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checked: Path | None = None
        self._shown = time.time_ns()
        self._resident = ""
        self._source: Source | None = None
        self._ties: list[tuple[Any, str, Any]] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Read the description, and put into the config what it says of the weights' file, dtype and attention.

        Raises:
            CheckpointError: the description is odd or of another version; files do not agree with the manifest.
            ValueError: `resident` is not a `Residence`.
        """
        if self.description is not None:
            return config
        path = Path(config.name_or_path or CONFIG)
        with naming(path / CONFIG):
            self.description = Description.from_dict(self.quantization_config.values)
        self._resident = config.__dict__.pop("resident", RESIDENT)
        check_choice("resident", self._resident, Residence)
        if (path / MANIFEST).is_file():
            self._check(path, OF_A_MODEL.fullmatch)
        if (path / CONFIG).is_file():
            _check_counts(path)
        config.transformers_weights = self.description.weights
        config.dtype = getattr(torch, self.description.compute_dtype)
        if config._attn_implementation is None:
            config._attn_implementation = self.description.attn_implementation
        return config

    update_tp_plan = update_ep_plan = update_attn_implementation

    def _check(self, path: Path, checked: Callable[[str], Any]) -> None:
        """Check files of a directory against its manifest, once."""
        if self._checked != path.resolve():
            read_description(path, checked)
            self._checked = path.resolve()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Turn modules into packed ones, without memory, after the sizes of what will be read were checked."""
        assert self.description is not None
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files or not all(WEIGHT_FILE.fullmatch(file.name) for file in files):
            raise ValueError(f"a compressed model is loaded from the files of its directory, got {files!r}")
        path = files[0].parent
        fetch_beside(files[0], MANIFEST, self._shown)
        if (path / MANIFEST).is_file():
            names = {file.name for file in files}  # in the hub's cache the others need not be there
            self._check(path, names.__contains__)
        stored = read_headers(files)
        rest = dict(stored)
        packed = take_packed(rest, self.description, path / CONFIG)
        check_shapes(model, rest, packed, self.description.aliases, path)
        self._check_ties(model, path)
        with naming(path / CONFIG):
            pack_model(model, packed, self.description.aliases)
        for module in packed_modules(model).values():
            module.veil(True)  # transformers initializes the weights of modules that it did not fill
        tied = {f"{name}.weight" for name in tied_to_packed(packed, self.description.aliases)}
        self._ties = _forget_ties(model, tied)
        tables = set(rest) - set(model.state_dict())
        # Looked for on the instance: tables are read when all else is.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), *(f"^{re.escape(name)}$" for name in tables)
        }  # fmt: skip
        self._source = Source.of(path, files, stored, self.description)
        return model

    def _check_ties(self, model: Any, path: Path) -> None:
        """Raise CheckpointError if tensors are tied that transformers would not tie: it would make them up."""
        assert self.description is not None
        known = {frozenset(pair) for pair in model.all_tied_weights_keys.items()}
        packed = {f"{name}.weight" for name in self.description.packed}
        odd = [
            alias
            for alias, name in self.description.aliases.items()
            if name not in packed and frozenset((alias, name)) not in known
        ]
        if odd:
            raise CheckpointError(
                f"{path / CONFIG} says that {', '.join(odd[:4])} are tied, which transformers does not do: use "
                "sgpt_lightning.load_compressed"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Fill in stored tables, give the model the residence that was asked for, and let it save itself as it came."""
        assert self.description is not None
        assert self._source is not None
        for module in packed_modules(model).values():
            module.veil(False)
        if model.dtype == getattr(torch, self.description.compute_dtype):
            fill_tables(model, self._source.read_tables(model))
        model.config.__dict__.pop("transformers_weights", None)
        mark_compressed(model)
        modules, specs = packed_modules(model), self.description.packed
        file = self._source.path / CONFIG
        if self._resident == "dense":
            weights = some_together(unpack_weights, specs, lambda name: modules[name].packed_weight, file)
            return self._dequantize(model, unpacked=weights)
        if self._resident == "packed":
            for name, form in some_together(reside_together, specs, lambda name: modules[name].packed_weight, file):
                modules[name].reside(form)
        model.requires_grad_(False)  # or autograd keeps every weight that a forward unpacks
        self._source.remember(model)
        save_as_loaded(model, self._source)
        return model

    def _dequantize(
        self, model: Any, dtype: torch.dtype | None = None, unpacked: Iterable[tuple[str, torch.Tensor]] | None = None
    ) -> nn.Module:
        """Make an ordinary model of it, in the dtype that it computes in."""
        unpack_model(model, unpacked)
        for part, attribute, keys in self._ties:
            setattr(part, attribute, keys)
        model.config.__dict__.pop("_is_quantized", None)
        model.__dict__.pop("save_pretrained", None)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Tell that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that packed weights cannot be trained."""
        return False


def _check_counts(path: Path) -> None:
    """Compare the counts in a directory's config with its weights, if they are there: transformers believes it all."""
    headers = read_headers([file for file in path.iterdir() if WEIGHT_FILE.fullmatch(file.name)])
    with naming(path / CONFIG):
        if headers:
            check_counts(json.loads((path / CONFIG).read_bytes()), headers)


def _forget_ties(model: Any, tied: set[str]) -> list[tuple[Any, str, Any]]:
    """Keep transformers from tying parameters that packed modules do not have; return what stood where."""
    before = []
    for prefix, part in model.named_modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(part, attribute, None)
            if isinstance(keys, dict):
                names = {key: f"{prefix}.{key}" if prefix else key for key in keys}
                before.append((part, attribute, keys))
                setattr(part, attribute, {key: keys[key] for key in keys if names[key] not in tied})
    return before
