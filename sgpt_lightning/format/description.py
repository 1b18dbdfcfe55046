"""What `config.json` says to a reader of the weights, in its `quantization_config`: plain values, checked one by one.

A model is built before its tensors are read, so all that building needs stands here: which weights are packed and how,
which tensors are tied, how the model was evaluated, and where the tensors are. Everything else, reports and checksums
(of `config.json` too), is the manifest's. Before version 6 the manifest said this as well, see `older.py`; version 6
knows no scales of columns.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sgpt_lightning.format.directory import FORMAT
from sgpt_lightning.format.layout import WeightSpec

FORMAT_VERSION, FIRST_DESCRIBED = 7, 6
"""The version that is written, and the first in which `config.json` describes the weights."""
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SHARD_INDEX = "sgpt.safetensors.index.json"
WEIGHT_FILE = re.compile(r"(sgpt|model)(-\d{5}-of-\d{5})?\.safetensors")
WEIGHTS = ("sgpt.safetensors", SHARD_INDEX)
Residence = Literal["packed", "coded", "dense"]
"""How packed weights live in memory: codes of just enough bits, the stored tensors as they are, or unpacked."""
RESIDENT: Residence = "packed"
"""Unless `from_pretrained` is told otherwise."""
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Description:
    """How to read the weights of a model, and how to compute with them."""

    weights: str
    """Name of the file that holds all tensors, or of the index of several."""
    compute_dtype: str
    """dtype that the model was evaluated in."""
    attn_implementation: str | None
    """Attention implementation that the model was evaluated with."""
    packed: dict[str, WeightSpec]
    """How to unpack the weight of each packed module, by the module's full name."""
    aliases: dict[str, str]
    """Tied tensors: name in the model -> name in the file."""

    @classmethod
    def from_dict(cls, values: Any) -> "Description":
        """Read the `quantization_config` of a `config.json`.

        Raises:
            ValueError: it is of another method or version, or a field is missing, unknown or odd.
        """
        if not isinstance(values, dict) or values.get("quant_method") != FORMAT:
            raise ValueError(f"its quantization_config does not name the method {FORMAT!r}")
        version = values.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"it is of format version {version!r}, this package reads 1 to {FORMAT_VERSION}: upgrade it"
            )
        if version < FIRST_DESCRIBED:
            raise ValueError(
                f"it is of format version {version}, which transformers cannot build: read it with "
                "sgpt_lightning.load_compressed, which makes it dense, or compress the model again"
            )
        fields = {key: value for key, value in values.items() if key not in ("quant_method", "format_version")}
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Description":
        """Check the fields and read the specifications; raises ValueError on the first that is odd."""
        for name, holds in _RULES.items():
            if name not in fields:
                raise ValueError(f"its quantization_config has no field {name}")
            if not holds(fields[name]):
                raise ValueError(f"its quantization_config says that {name} is {str(fields[name])[:80]!r}")
        unknown = sorted(set(fields) - set(_RULES))
        if unknown:
            raise ValueError(f"its quantization_config has the unknown fields {', '.join(map(str, unknown))[:80]}")
        return cls(**{**fields, "packed": {name: _spec(name, spec) for name, spec in fields["packed"].items()}})

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config`, plain JSON values."""
        return {
            "quant_method": FORMAT,
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "compute_dtype": self.compute_dtype,
            "attn_implementation": self.attn_implementation,
            "packed": {name: spec.to_dict() for name, spec in self.packed.items()},
            "aliases": dict(self.aliases),
        }


def _spec(name: str, values: Any) -> WeightSpec:
    try:
        return WeightSpec.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for pair in value.items() for name in pair)


_RULES = {
    "weights": lambda value: value in WEIGHTS,
    "compute_dtype": lambda value: value in DTYPES,
    "attn_implementation": lambda value: value is None or isinstance(value, str),
    "packed": lambda value: isinstance(value, dict),
    "aliases": _is_names,
}
