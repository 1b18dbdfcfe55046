"""The interface of the published SparseGPT code, on top of this package's solver.

A script that does `from sparsegpt import SparseGPT` and `from quant import Quantizer` keeps working when both come
from here. What changes: a mask has exactly the asked number of zeros, tokens are counted one by one, a Hessian that
cannot be inverted raises, and widths can be mixed under a budget. The solve is the preset `sparsegpt` of `Recipe`: the
parts that need more than one layer's inputs (dense stream, gradients) have no place in this interface.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.blocks import is_conv1d, set_weight_matrix, weight_matrix
from sgpt_lightning.packed import pack_weight
from sgpt_lightning.recipe import Allocation, Recipe
from sgpt_lightning.report import LinearReport, QuantizationStats, describe_linear
from sgpt_lightning.solver import CompressedLinear, compress_linear
from sgpt_lightning.statistics import InputStatistics

DEFAULT_TARGET_AVG_BITS = 4.0


class Quantizer:
    """Says that a layer is to be quantized, and to how many bits; the published code's `quant.Quantizer`.

    Only per-channel asymmetric min-max grids are implemented; other settings are refused, not ignored.
    """

    def __init__(self) -> None:
        self.bits: int | None = None

    def configure(self, bits: int, perchannel: bool = True, sym: bool = False, mse: bool = False) -> None:
        """Set the width.

        Args:
            bits: from 1 to 8.
            perchannel: must be True.
            sym: must be False.
            mse: must be False.

        Raises:
            ValueError: a setting that is not implemented, or bits out of range.
        """
        if not perchannel or sym or mse:
            raise ValueError(
                f"only perchannel=True, sym=False, mse=False is implemented, got {perchannel=}, {sym=}, {mse=}"
            )
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, got {bits}")
        self.bits = bits


class SparseGPT:
    """Prunes and quantizes one layer from the inputs it was shown.

    Args:
        layer: nn.Linear, transformers.Conv1D or nn.Conv2d (ungrouped).
        layer_name: for error messages and statistics.
        stats_collector: receives a report per solve.
    """

    def __init__(
        self, layer: nn.Module, layer_name: str = "", stats_collector: QuantizationStats | None = None
    ) -> None:
        if not isinstance(layer, nn.Linear | nn.Conv2d) and not is_conv1d(layer):
            raise TypeError(f"{layer_name or 'layer'} must be Linear, Conv1D or Conv2d, got {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d):
            _check_conv2d(layer, layer_name or "layer")
        self.layer = layer
        self.layer_name = layer_name
        self.stats_collector = stats_collector
        self.quantizer: Quantizer | None = None
        self.report: LinearReport | None = None
        self.compressed: CompressedLinear | None = None
        matrix = weight_matrix(layer)
        self.dev = matrix.device
        self.rows, self.columns = matrix.shape
        self.statistics: InputStatistics | None = InputStatistics(self.columns, self.dev)

    @property
    def nsamples(self) -> int:
        """Tokens seen (patches for Conv2d)."""
        return self._live_statistics().tokens

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """Add inputs, `[..., in_features]` (`[batch, channels, height, width]` for Conv2d); `out` is unused.

        Raises:
            ValueError: the inputs hold NaN or inf.
        """
        if not bool(torch.isfinite(inp).all()):
            raise ValueError(f"{self.layer_name or 'the layer'} received NaN or inf")
        if isinstance(self.layer, nn.Conv2d):
            inp = self._patches(inp if inp.dim() == 4 else inp[None])
        self._live_statistics().add(inp)

    def fasterprune(
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
        target_avg_bits: float | None = None,
        bit_allocation_method: Allocation = "quantile",
    ) -> None:
        """Solve the layer and write the result into it.

        Args:
            sparsity: fraction to remove; unused when `prunen` is set.
            prunen: zeros in every `prunem` consecutive inputs, 0 for unstructured pruning.
            prunem: group size of the pattern.
            blocksize: columns per block.
            percdamp: damping as a fraction of the mean Hessian diagonal.
            target_avg_bits: mean bits per surviving weight when a quantizer is set. None takes the quantizer's own
                width for every channel, as the published code does, or 4.0 if it was never configured.
            bit_allocation_method: how a given `target_avg_bits` is dealt to channels.

        Raises:
            ValueError: a setting is out of range, or no batch was added.
        """
        started = time.perf_counter()
        recipe = Recipe(
            preset="sparsegpt",
            uniform_if_better=False,
            sparsity=sparsity,
            pattern=None if (prunen, prunem) == (0, 0) else f"{prunen}:{prunem}",
            block_size=blocksize,
            damp_percent=percdamp,
            **self._bits(target_avg_bits, bit_allocation_method),
        )
        if not recipe.prunes and not recipe.quantizes:
            return
        weight = weight_matrix(self.layer)
        compressed = compress_linear(weight, self._live_statistics(), recipe, self.layer_name, weight.dtype)
        set_weight_matrix(self.layer, compressed.weight())
        self.compressed = compressed
        self.report = describe_linear(self.layer_name, compressed, pack_weight(compressed))
        self.seconds = time.perf_counter() - started
        if self.stats_collector is not None:
            self.stats_collector.add(self.report)

    def free(self) -> None:
        """Drop the statistics."""
        self.statistics = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    def _bits(self, target: float | None, allocation: str) -> dict[str, Any]:
        """Return the recipe's fields for what the quantizer and the arguments ask for together."""
        if self.quantizer is None:
            return {"target_avg_bits": None}
        if target is None and self.quantizer.bits is not None:
            bits = self.quantizer.bits
            return {"target_avg_bits": bits, "allocation": "uniform", "widths": (bits,)}
        return {"target_avg_bits": DEFAULT_TARGET_AVG_BITS if target is None else target, "allocation": allocation}

    def _live_statistics(self) -> InputStatistics:
        if self.statistics is None:
            raise ValueError(f"{self.layer_name or 'the layer'} was freed: its statistics are gone")
        return self.statistics

    def _patches(self, images: Tensor) -> Tensor:
        """Return the patches that a Conv2d multiplies, `[batch * positions, in_features]`."""
        conv = self.layer
        assert isinstance(conv, nn.Conv2d)
        assert not isinstance(conv.padding, str)
        unfolded = nn.functional.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        return unfolded.transpose(1, 2).reshape(-1, self.columns)


def _check_conv2d(conv: nn.Conv2d, name: str) -> None:
    """Raise ValueError if `torch.nn.functional.unfold` would not give the patches that the layer multiplies."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"{name} is a Conv2d with groups={conv.groups}, padding={conv.padding!r} and "
            f"padding_mode={conv.padding_mode!r}; only groups=1, numbers and 'zeros' can be solved"
        )
