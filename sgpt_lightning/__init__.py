"""One-shot pruning and mixed-width quantization of causal language models inside PyTorch Lightning.

Importing the package loads nothing and makes our directories known to transformers, for `from_pretrained`, as soon as
it is loaded itself; each name is fetched from its module when it is first used, so the tensor core
works where Lightning, datasets or jsonargparse are missing. A type checker sees the plain imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sgpt_lightning.hf.registration import register

if TYPE_CHECKING:
    from sgpt_lightning.calibration.compress import compress as compress
    from sgpt_lightning.checkpoint.any_model import load_model as load_model
    from sgpt_lightning.checkpoint.load import load_compressed as load_compressed
    from sgpt_lightning.checkpoint.save import save_compressed as save_compressed
    from sgpt_lightning.evaluation.evaluate import evaluate as evaluate
    from sgpt_lightning.evaluation.perplexity import Perplexity as Perplexity
    from sgpt_lightning.export.export import export_model as export_model
    from sgpt_lightning.format.directory import CheckpointError as CheckpointError
    from sgpt_lightning.models.adapters import register_model as register_model
    from sgpt_lightning.presets import ImportanceWeights as ImportanceWeights
    from sgpt_lightning.quant import Quantizer as Quantizer
    from sgpt_lightning.recipe import Recipe as Recipe
    from sgpt_lightning.report.stats import QuantizationStats as QuantizationStats
    from sgpt_lightning.rules import LayerRule as LayerRule
    from sgpt_lightning.sparsegpt import SparseGPT as SparseGPT
    from sgpt_lightning.trainer.callback import SparseGPTCallback as SparseGPTCallback
    from sgpt_lightning.trainer.data import TextDataModule as TextDataModule
    from sgpt_lightning.trainer.keep_sparsity import KeepSparsity as KeepSparsity
    from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint as LastCheckpoint
    from sgpt_lightning.trainer.module import CausalLMModule as CausalLMModule

_HOME = {
    "CausalLMModule": "trainer.module",
    "CheckpointError": "format.directory",
    "ImportanceWeights": "presets",
    "KeepSparsity": "trainer.keep_sparsity",
    "LastCheckpoint": "trainer.last_checkpoint",
    "LayerRule": "rules",
    "Perplexity": "evaluation.perplexity",
    "QuantizationStats": "report.stats",
    "Quantizer": "quant",
    "Recipe": "recipe",
    "SparseGPT": "sparsegpt",
    "SparseGPTCallback": "trainer.callback",
    "TextDataModule": "trainer.data",
    "compress": "calibration.compress",
    "evaluate": "evaluation.evaluate",
    "export_model": "export.export",
    "load_compressed": "checkpoint.load",
    "load_model": "checkpoint.any_model",
    "register_model": "models.adapters",
    "save_compressed": "checkpoint.save",
}
__all__ = list(_HOME)

register()

if not TYPE_CHECKING:  # a checker that sees it takes every name, misspelt ones too, for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
