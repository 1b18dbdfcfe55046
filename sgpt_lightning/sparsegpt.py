"""The interface of the published SparseGPT code, on top of this package's solver.

A script that does `from sparsegpt import SparseGPT` and `from quant import Quantizer` keeps working when both come
from here. What changes: a mask has exactly the asked number of zeros, tokens are counted one by one, a Hessian that
cannot be inverted raises, widths can be mixed under a budget, and codes can be entropy-coded (`core/rate.py`). The
solve is the preset `sparsegpt` of `Recipe`: the parts that need more than one layer's inputs (dense stream, gradients)
have no place in this interface.
"""

import time
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sgpt_lightning.core.checks import check_linear
from sgpt_lightning.core.importance import channel_scores, weighted_sum
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.problem import SharedInput
from sgpt_lightning.core.solution import CompressedLinear
from sgpt_lightning.core.solver import LinearToSolve, compress_linears
from sgpt_lightning.format.entropy import coded_size
from sgpt_lightning.format.layout import PackedWeight
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.records import LinearReport, SolvedLinear, describe_linear
from sgpt_lightning.models.layer_inputs import check_layer, checked_inputs
from sgpt_lightning.models.linears import set_weight_matrix, weight_matrix
from sgpt_lightning.presets import Allocation, ImportanceWeights
from sgpt_lightning.quant import DEFAULT_ALLOCATION, ChannelBits, Quantizer
from sgpt_lightning.recipe import Coding, Recipe
from sgpt_lightning.report.stats import QuantizationStats, solve_line


class SparseGPT:
    """Prunes and quantizes one layer from the inputs it was shown.

    Every solve starts from the dense weight and all inputs seen so far. The first one keeps a copy of the weight, on
    the layer's device and in its dtype (2 bytes a weight in 16 bits, until `free`), and later ones solve from that copy
    and replace the result, its report and its row of the statistics. So one object swept over budgets gives what a new
    object for each budget would give.

    Between two solves the layer may hold what the last one wrote, or the dense weight again. With any other weight,
    such as one that was fine-tuned, another solve raises ValueError, because nothing says which of the two is the
    truth; a new SparseGPT takes the layer as it is.

    What a reader of the enhanced fork may not expect:

    - `fasterprune` without `target_avg_bits` gives every channel the quantizer's width, as the published code does.
    - Without a quantizer nothing is quantized. Settings that do nothing in a solve are warned of, or refused.
    - `quantile` meets the target, and only `shares` cut at fixed points; `budget` is spent over the whole layer.
    - Means are over the weights that survive, and code bits only; `report.bits_per_weight` counts mask and ranges too.
    - `sym=True` is a symmetric grid per row; in the fork it halved the positive weights.
    - A name that comes twice in a collector is numbered (`fc1 #2`).

    Args:
        layer: nn.Linear, transformers.Conv1D or nn.Conv2d (ungrouped).
        layer_name: for messages and statistics, which tell apart names that come twice.
        stats_collector: holds the report of the latest solve.
        importance: weights of the five channel scores by name (`ImportanceWeights`), non-negative and with the sum 1;
            a name that is left out keeps its default.
        widths: bit widths to deal to the channels, ascending; None takes 2, 3, 4, 6 and 8.
        shares: for `quantile`, the fraction of the channels at each width, ascending like these and with the sum 1: cut
            points .2, .4, .6, .8 are `(.2, .2, .2, .2, .2)`. They fix the mean over channels (4.6; higher over the
            weights that survive), so leave out `target_avg_bits`. Without shares the cuts move to meet the target.
        verbose: print a line per solve: name, channels per width, mean bits, zeros, relative output error, seconds.

    Raises:
        TypeError: the layer is none of these, or a setting is of another type.
        ValueError: a setting breaks its rule, or the Conv2d is one that cannot be solved.
    """

    def __init__(
        self,
        layer: nn.Module,
        layer_name: str = "",
        stats_collector: QuantizationStats | None = None,
        *,
        importance: Mapping[str, float] | ImportanceWeights | None = None,
        widths: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
        verbose: bool = False,
    ) -> None:
        check_layer(layer, layer_name or "layer")
        self.layer = layer
        self.layer_name = layer_name
        self.stats_collector = stats_collector
        self.channel_bits = ChannelBits(layer_name or "the layer", importance, widths, shares)
        self.verbose = verbose
        self.quantizer: Quantizer | None = None
        self.report: LinearReport | None = None
        self.compressed: CompressedLinear | None = None
        self.seconds = 0.0
        self._packed: PackedWeight | None = None
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
        self._live_statistics().add(checked_inputs(self.layer, inp, self.dev, self._name))

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
        zeros = {"pattern": f"{prunen}:{prunem}"} if prunen or prunem else {"sparsity": sparsity}
        if coding == "entropy":
            settings = {**zeros, "bit_allocation_method": bit_allocation_method}
            bits = self.channel_bits.coded_fields(self.quantizer, target_avg_bits, settings)
        else:
            bits = self.channel_bits.fields(self.quantizer, target_avg_bits, bit_allocation_method)
            if unused := self.channel_bits.unused(self.quantizer, target_avg_bits, bit_allocation_method):
                warnings.warn(unused, UserWarning, stacklevel=2)
        asked = zeros | bits | {"coding": coding, "uniform_if_better": False}
        recipe = Recipe(preset="sparsegpt", block_size=blocksize, damp_percent=percdamp, **asked)
        inputs, weight = SharedInput(self._live_statistics()), self._dense_weight()
        if not recipe.prunes and not recipe.quantizes:
            self._undo()
            if self.verbose:
                print(f"[{self._name}] left dense: neither zeros nor bits were asked for")
            return
        linear = LinearToSolve(weight, self.layer_name)
        if coding == "fixed" and self.quantizer is not None:
            widths = None if self.channel_bits.shares is None else self._by_shares(inputs, recipe)
            linear = linear._replace(widths=widths, symmetric=self.quantizer.sym)
        (compressed,) = compress_linears([linear], inputs, recipe, weight.dtype, coded_size=coded_size)
        report = self._accept(compressed, weight)
        self.seconds = time.perf_counter() - started
        if self.verbose:
            print(solve_line(report, float((weight_matrix(self.layer) == 0).double().mean()), self.seconds))

    def compute_importance_scores(self, percdamp: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the input channels by the dense weight and all inputs seen so far (`core/importance.py`).

        Args:
            percdamp: damping, as for `fasterprune`; None takes 0.01.

        Returns:
            The weighted sum of the five scores, float64 `[in_features]`, and each of them by name (`activation`,
            `hessian`, `weight`, `output`, `stability`), float64 `[in_features]` with mean 1.

        Raises:
            ValueError: no batch was added, this object was freed, or the layer cannot be solved as it is.
        """
        recipe = Recipe(preset="sparsegpt", target_avg_bits=None, damp_percent=percdamp)
        return self._scores(SharedInput(self._live_statistics()), recipe)

    def allocate_bits(
        self, scores: Tensor, target_avg_bits: float | None = None, method: str = DEFAULT_ALLOCATION
    ) -> Tensor:
        """Deal this object's widths to channels by their scores, as a solve of the dense layer would.

        Every channel counts alike. A solve that prunes counts what survives in each channel instead, so that its mean
        is one over the weights that are stored.

        Args:
            scores: importance, `[in_features]`.
            target_avg_bits: mean bits, at most; None takes 4.0, or with `shares` what they make.
            method: `quantile` or `budget`.

        Returns:
            Bits per channel, int32 `[in_features]`.

        Raises:
            ValueError: the scores have another shape or are not finite, or a setting is out of range.
        """
        if tuple(scores.shape) != (self.columns,) or not bool(torch.isfinite(scores).all()):
            raise ValueError(f"scores of {self._name} must be finite, [{self.columns}], got {list(scores.shape)}")
        return self.channel_bits.deal(scores, target_avg_bits, method).int()

    @property
    def solved(self) -> SolvedLinear:
        """What the latest solve stores of the layer, on the CPU, for `save_compressed` under the layer's full name.

        `torch.save(model.state_dict())` would write the same weights as they lie in memory: as large as dense ones.

        Raises:
            ValueError: nothing was solved, or the layer no longer holds what was solved (as after fine-tuning), so that
                the file would be another model.
        """
        if self.compressed is None or self.report is None or self._packed is None:
            raise ValueError(f"{self._name} was not solved: call fasterprune first")
        weight = weight_matrix(self.layer)
        if not torch.equal(self.compressed.weight().to(weight), weight):
            raise ValueError(f"the weight of {self._name} was changed since it was solved: the file would hold another")
        return SolvedLinear(self._packed, self.report)

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

    def _accept(self, compressed: CompressedLinear, dense: Tensor) -> LinearReport:
        """Write what `dense` was solved to into the layer, and report it; nothing is changed if it cannot be held."""
        packed = pack_weight(compressed.solution)
        report = describe_linear(self.layer_name, compressed, packed)
        kept = dense.clone() if self._dense is None else self._dense
        set_weight_matrix(self.layer, compressed.weight(), self._name)
        self._dense, self.compressed, self._packed = kept, compressed, packed.to("cpu")
        self.report = report if self.stats_collector is None else self.stats_collector.add(report, self.report)
        return self.report

    def _undo(self) -> None:
        """Write the dense weight back and forget the solve, if there was one."""
        if self._dense is not None:
            set_weight_matrix(self.layer, self._dense)
        if self.report is not None and self.stats_collector is not None:
            self.stats_collector.remove(self.report)
        self._dense = self.compressed = self.report = self._packed = None

    def _scores(self, inputs: SharedInput, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
        """Return importance and the five scores as a solve by the recipe sees them."""
        weight = self._dense_weight()
        check_linear(weight, self.layer_name, inputs, recipe)
        factor = inputs.problem(centred=False, damp_percent=recipe.damping, name=self._name).factor
        scores = channel_scores(weight.float(), inputs.statistics, factor.inverse_diagonal)
        return weighted_sum(scores, self.channel_bits.importance), scores

    def _by_shares(self, inputs: SharedInput, recipe: Recipe) -> Tensor:
        """Return the widths that the shares deal, uint8 `[in_features]`."""
        return self.channel_bits.deal(self._scores(inputs, recipe)[0], None, DEFAULT_ALLOCATION)

    def _live_statistics(self) -> InputStatistics:
        if self.statistics is None:
            raise ValueError(f"{self._name} was freed: its statistics are gone")
        return self.statistics


def _same(weight: Tensor, known: Tensor) -> bool:
    return weight.dtype == known.dtype and torch.equal(weight, known)
