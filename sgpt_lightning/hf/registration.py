"""Makes our format known to transformers without importing it: once its module of quantizers is imported.

A finder at the head of `sys.meta_path` waits for that one module and adds our two entries to its tables after it ran.
It stays there, so that they come back if the module is imported anew; importing this package anew replaces it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sgpt_lightning.format.directory import FORMAT

AWAITED = "transformers.quantizers.auto"


class _Waiting(MetaPathFinder):
    """Finds what the others find, and sees to it that the awaited module is told of us after it ran."""

    waits_for = AWAITED

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        others = (finder for finder in sys.meta_path if getattr(finder, "waits_for", None) != AWAITED)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            tell(module)

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def tell(quantizers: Any) -> None:
    """Enter our quantizer and its config in the tables of `transformers.quantizers.auto`, in place of older ones."""
    ours = importlib.import_module("sgpt_lightning.hf.quantizer")
    quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING[FORMAT] = ours.SgptConfig
    quantizers.AUTO_QUANTIZER_MAPPING[FORMAT] = ours.SgptQuantizer


def register() -> None:
    """Make our format known to transformers, now if it is there, else as soon as it is."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "waits_for", None) != AWAITED]
    sys.meta_path.insert(0, _Waiting())
    if AWAITED in sys.modules:
        tell(sys.modules[AWAITED])
