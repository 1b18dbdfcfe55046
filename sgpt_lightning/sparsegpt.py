"""The interface of the published SparseGPT code, on top of this package's solver.

A script that does `from sparsegpt import SparseGPT` and `from quant import Quantizer` keeps working when both come
from here. What changes: a mask has exactly the asked number of zeros, tokens are counted one by one, a Hessian that
cannot be inverted raises, widths can be mixed under a budget, and codes can be entropy-coded (`core/rate.py`). The
solve is the preset `sparsegpt` of `Recipe`: the parts that need more than one layer's inputs (dense stream, gradients)
have no place in this interface.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.records import LinearReport, describe_linear
from sgpt_lightning.models.linears import is_conv1d, set_weight_matrix, weight_matrix
from sgpt_lightning.presets import Allocation
from sgpt_lightning.recipe import Coding, Recipe
from sgpt_lightning.report.stats import QuantizationStats

DEFAULT_TARGET_AVG_BITS = 4.0
DEFAULT_ALLOCATION: Allocation = "quantile"


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

    Every solve starts from the dense weight and all inputs seen so far. The first one keeps a copy of the weight, on
    the layer's device and in its dtype (2 bytes a weight in 16 bits, until `free`), and later ones solve from that copy
    and replace the result, its report and its row of the statistics. So one object swept over budgets gives what a new
    object for each budget would give.

    Between two solves the layer may hold what the last one wrote, or the dense weight again. With any other weight,
    such as one that was fine-tuned, another solve raises ValueError, because nothing says which of the two is the
    truth; a new SparseGPT takes the layer as it is.

    Args:
        layer: nn.Linear, transformers.Conv1D or nn.Conv2d (ungrouped).
        layer_name: for error messages and statistics, which tell apart names that come twice.
        stats_collector: holds the report of the latest solve.
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
        self.seconds = 0.0
        self._dense: Tensor | None = None
        matrix = weight_matrix(layer)
        self.dev = matrix.device
        self.rows, self.columns = matrix.shape
        self.statistics: InputStatistics | None = InputStatistics(self.columns, self.dev)

    @property
    def nsamples(self) -> int:
        """Tokens seen (patches for Conv2d)."""
        return self._live_statistics().tokens

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """Add inputs to those that the next solve counts; `out` is unused.

        Args:
            inp: `[..., in_features]`, for Conv2d `[batch, channels, height, width]` or one image without `batch`;
                any floating dtype, on the device that the layer was on when this object was made.
            out: what the layer made of it, as hooks hand it over.

        Raises:
            TypeError: the inputs are no tensor of floating numbers.
            ValueError: they have another number of features or channels, are on another device, or hold NaN or inf;
                or this object was freed.
        """
        statistics = self._live_statistics()
        self._check_inputs(inp)
        if isinstance(self.layer, nn.Conv2d):
            inp = self._patches(inp if inp.dim() == 4 else inp[None])
        statistics.add(inp)

    def fasterprune(  # noqa: PLR0913  # the published signature, and what came to it
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float | None = None,
        target_avg_bits: float | None = None,
        bit_allocation_method: Allocation = DEFAULT_ALLOCATION,
        coding: Coding = "fixed",
    ) -> None:
        """Solve the layer from its dense weight and write the result into it.

        With neither pruning nor a quantizer asked for, the layer is left, or made again, as it was before.

        Args:
            sparsity: fraction to remove; unused when `prunen` is set.
            prunen: zeros in every `prunem` consecutive inputs, 0 for unstructured pruning.
            prunem: group size of the pattern.
            blocksize: columns per block.
            percdamp: damping as a fraction of the mean Hessian diagonal; None takes 0.01, for entropy coding 0.03.
            target_avg_bits: mean bits per surviving weight when a quantizer is set. None takes the quantizer's own
                width for every channel, as the published code does, or 4.0 if it was never configured. With entropy
                coding, which needs no quantizer: true bits per weight of the layer, side information included, at
                most.
            bit_allocation_method: how a given `target_avg_bits` is dealt to channels of fixed widths.
            coding: `fixed` for a mask and whole bit widths, or `entropy` for whole codes on a step per input channel,
                entropy-coded; zeros then come out of the solve.

        Raises:
            ValueError: a setting is out of range or belongs to the other coding, no batch was added, this object was
                freed, the layer was moved or changed since the last solve, or its weight or what came of it holds NaN
                or inf. The layer is then left as it was.
        """
        started = time.perf_counter()
        zeros = {"sparsity": sparsity} if (prunen, prunem) == (0, 0) else {"pattern": f"{prunen}:{prunem}"}
        if coding == "entropy":
            self._check_coded(**zeros, bit_allocation_method=bit_allocation_method)
        bits = self._coded_bits if coding == "entropy" else self._bits
        recipe = Recipe(
            preset="sparsegpt",
            coding=coding,
            uniform_if_better=False,
            **zeros,
            block_size=blocksize,
            damp_percent=percdamp,
            **bits(target_avg_bits, bit_allocation_method),
        )
        statistics, weight = self._live_statistics(), self._dense_weight()
        if not recipe.prunes and not recipe.quantizes:
            self._undo()
            return
        linear = LinearToSolve(weight, self.layer_name)
        (compressed,) = compress_linears([linear], statistics, recipe, weight.dtype, coded_size=coded_size)
        self._accept(compressed, weight)
        self.seconds = time.perf_counter() - started

    def free(self) -> None:
        """Drop the statistics and the copy of the dense weight; the report and what was solved stay."""
        self.statistics = self._dense = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _name(self) -> str:
        return self.layer_name or "the layer"

    def _dense_weight(self) -> Tensor:
        """Return the weight to solve from, `[out_features, in_features]`: the layer's own, once solved its copy."""
        weight = weight_matrix(self.layer)
        if weight.device != self.dev:
            raise ValueError(f"{self._name} must stay on {self.dev}, where its SparseGPT was made, got {weight.device}")
        if self._dense is None:
            return weight
        written = None if self.compressed is None else self.compressed.weight().to(self._dense.dtype)
        if not any(known is not None and _same(weight, known) for known in (written, self._dense)):
            raise ValueError(
                f"the weight of {self._name} was changed since it was solved, and is neither the dense one nor the "
                "result; make a new SparseGPT to solve it as it is"
            )
        return self._dense

    def _accept(self, compressed: CompressedLinear, dense: Tensor) -> None:
        """Write what `dense` was solved to into the layer, and report it; nothing is changed if it cannot be held."""
        report = describe_linear(self.layer_name, compressed, pack_weight(compressed.solution))
        kept = dense.clone() if self._dense is None else self._dense
        set_weight_matrix(self.layer, compressed.weight(), self._name)
        self._dense, self.compressed = kept, compressed
        self.report = report if self.stats_collector is None else self.stats_collector.add(report, self.report)

    def _undo(self) -> None:
        """Write the dense weight back and forget the solve, if there was one."""
        if self._dense is not None:
            set_weight_matrix(self.layer, self._dense)
        if self.report is not None and self.stats_collector is not None:
            self.stats_collector.remove(self.report)
        self._dense = self.compressed = self.report = None

    def _bits(self, target: float | None, allocation: str) -> dict[str, Any]:
        """Return the recipe's fields for what the quantizer and the arguments ask for together."""
        if self.quantizer is None:
            return {"target_avg_bits": None}
        if target is None and self.quantizer.bits is not None:
            bits = self.quantizer.bits
            return {"target_avg_bits": bits, "allocation": "uniform", "widths": (bits,)}
        return {"target_avg_bits": DEFAULT_TARGET_AVG_BITS if target is None else target, "allocation": allocation}

    def _coded_bits(self, target: float | None, allocation: str) -> dict[str, Any]:
        """Return the recipe's fields for entropy coding: true bits a weight."""
        if target is None and self.quantizer is not None:
            target = self.quantizer.bits
        return {"target_bits_per_weight": DEFAULT_TARGET_AVG_BITS if target is None else target}

    def _check_coded(self, **settings: object) -> None:
        """Raise ValueError, in this interface's words, for what has no meaning where codes are entropy-coded."""
        unused = {"sparsity": 0, "bit_allocation_method": DEFAULT_ALLOCATION}
        wrong = [f"{name}={value!r}" for name, value in settings.items() if value != unused.get(name)]
        if wrong:
            raise ValueError(
                f"{self._name}: coding='entropy' takes sparsity 0, no pattern and no bit_allocation_method, because "
                f"zeros and bits come out of the solve for target_avg_bits; got {', '.join(wrong)}"
            )

    def _live_statistics(self) -> InputStatistics:
        if self.statistics is None:
            raise ValueError(f"{self._name} was freed: its statistics are gone")
        return self.statistics

    def _check_inputs(self, inp: Tensor) -> None:
        """Raise TypeError or ValueError if the inputs are none of this layer's."""
        if not isinstance(inp, Tensor) or not inp.is_floating_point():
            found = inp.dtype if isinstance(inp, Tensor) else type(inp).__name__
            raise TypeError(f"inp of {self._name} must be a tensor of floating numbers, got {found}")
        if isinstance(self.layer, nn.Conv2d):
            fits = inp.dim() in (3, 4) and inp.shape[-3] == self.layer.in_channels
            rule = f"[batch, {self.layer.in_channels}, height, width]"
        else:
            fits, rule = inp.shape[-1:] == (self.columns,), f"[..., {self.columns}]"
        if not fits:
            raise ValueError(f"inp of {self._name} must be of shape {rule}, got {list(inp.shape)}")
        if inp.device != self.dev:
            raise ValueError(f"inp of {self._name} must be on {self.dev}, like the layer, got {inp.device}")
        if not bool(torch.isfinite(inp).all()):
            raise ValueError(f"{self._name} received NaN or inf")

    def _patches(self, images: Tensor) -> Tensor:
        """Return the patches that a Conv2d multiplies, `[batch * positions, in_features]`."""
        conv = self.layer
        assert isinstance(conv, nn.Conv2d)
        assert not isinstance(conv.padding, str)
        unfolded = nn.functional.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        return unfolded.transpose(1, 2).reshape(-1, self.columns)


def _same(weight: Tensor, known: Tensor) -> bool:
    return weight.dtype == known.dtype and torch.equal(weight, known)


def _check_conv2d(conv: nn.Conv2d, name: str) -> None:
    """Raise ValueError if `torch.nn.functional.unfold` would not give the patches that the layer multiplies."""
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"{name} is a Conv2d with groups={conv.groups}, padding={conv.padding!r} and "
            f"padding_mode={conv.padding_mode!r}; only groups=1, numbers and 'zeros' can be solved"
        )
