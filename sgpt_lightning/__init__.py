"""One-shot pruning and mixed-width quantization of causal language models inside PyTorch Lightning.

Importing the package loads nothing; each name is fetched from its module when it is first used, so the tensor core
works where Lightning, datasets or jsonargparse are missing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CausalLMModule": "module",
    "CheckpointError": "checkpoint",
    "ImportanceWeights": "recipe",
    "LayerRule": "recipe",
    "Perplexity": "metrics",
    "QuantizationStats": "report",
    "Quantizer": "sparsegpt",
    "Recipe": "recipe",
    "SparseGPT": "sparsegpt",
    "SparseGPTCallback": "callback",
    "TextDataModule": "data",
    "compress": "calibration",
    "load_compressed": "checkpoint",
    "save_compressed": "checkpoint",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
