"""One-shot pruning and mixed-width quantization of causal language models inside PyTorch Lightning.

Importing the package loads nothing; each name is fetched from its module when it is first used, so the tensor core
works where Lightning, datasets or jsonargparse are missing. A type checker sees the plain imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgpt_lightning.calibration import compress as compress
    from sgpt_lightning.callback import SparseGPTCallback as SparseGPTCallback
    from sgpt_lightning.checkpoint import CheckpointError as CheckpointError
    from sgpt_lightning.checkpoint import load_compressed as load_compressed
    from sgpt_lightning.checkpoint import save_compressed as save_compressed
    from sgpt_lightning.data import TextDataModule as TextDataModule
    from sgpt_lightning.metrics import Perplexity as Perplexity
    from sgpt_lightning.module import CausalLMModule as CausalLMModule
    from sgpt_lightning.recipe import ImportanceWeights as ImportanceWeights
    from sgpt_lightning.recipe import LayerRule as LayerRule
    from sgpt_lightning.recipe import Recipe as Recipe
    from sgpt_lightning.report import QuantizationStats as QuantizationStats
    from sgpt_lightning.sparsegpt import Quantizer as Quantizer
    from sgpt_lightning.sparsegpt import SparseGPT as SparseGPT

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

if not TYPE_CHECKING:  # a checker that sees it takes every name, misspelt ones too, for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
