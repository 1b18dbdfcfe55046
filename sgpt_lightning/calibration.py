"""Gathers input statistics block by block (or all at once) and solves the linears; knows nothing of Lightning.

`SequentialCalibration` handles one block per epoch: hidden states are carried through the blocks that are already
compressed, so that each linear is solved for the inputs it will really receive (GPTQ, arXiv 2210.17323, section 4).
Over a whole run each batch passes 2L - 1 blocks, against L^2 for re-running the half-compressed model.

`OneShotCalibration` watches every block during one pass of the dense model. It is cheaper and less exact: errors of
earlier blocks are not seen by later ones, and all Hessians are held at once.

Both have the same three steps, so the Lightning callback and `compress` drive them alike: `epochs`, `observe` for
every batch, `finish` after the last batch of an epoch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sgpt_lightning.blocks import (
    BlockReplay,
    PrologueOutput,
    find_decoder_blocks,
    model_inputs,
    set_weight_matrix,
    weight_matrix,
)
from sgpt_lightning.packed import PackedWeight, pack_weight, unpack_weight
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report import LinearReport, describe_linear
from sgpt_lightning.solver import check_pattern, compress_linear
from sgpt_lightning.statistics import InputStatistics

Mode = Literal["sequential", "one-shot"]


@dataclass(frozen=True)
class SolvedLinear:
    """One linear after the solve: what will be stored (on the CPU) and how it went."""

    packed: PackedWeight
    report: LinearReport


class InputCollector:
    """Gathers statistics of the inputs of some linears; linears that receive the same tensor share one.

    Args:
        linears: the linears to watch, by full name.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, InputStatistics] = {}

    def statistics(self, name: str) -> InputStatistics:
        """Return what the linear called `name` has seen; raises ValueError if it was never run."""
        if name not in self._leader:
            raise ValueError(f"{name} saw no token during calibration")
        return self._statistics[self._leader[name]]

    @contextmanager
    def collecting(self, batch_index: int, token_mask: Tensor | None = None) -> Iterator[None]:
        """Watch the linears while the body runs.

        Args:
            batch_index: for error messages.
            token_mask: bool `[batch, time]`, False for tokens that count nowhere (padding).
        """
        seen: list[tuple[Tensor, str]] = []  # holds the inputs, so that no address is used twice in one pass

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0]
                if name not in self._leader:
                    self._leader[name] = next((leader for tensor, leader in seen if tensor is inputs), name)
                    seen.append((inputs, name))
                if self._leader[name] == name:
                    self._add(name, inputs.detach(), batch_index, token_mask)

            return hook

        handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, inputs: Tensor, batch_index: int, token_mask: Tensor | None) -> None:
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError(f"{name} received NaN or inf in calibration batch {batch_index}")
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if token_mask is not None:
            tokens = tokens[token_mask.reshape(-1)]
        if name not in self._statistics:
            self._statistics[name] = InputStatistics(tokens.shape[-1], tokens.device)
        self._statistics[name].add(tokens)


class Calibration(Protocol):
    """What the callback and `compress` need of a way to calibrate."""

    epochs: int

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Take in one batch: `input_ids` `[batch, time]` and optionally `attention_mask`."""

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve what the epoch was about, write it into the model, and return it by full name."""


class SequentialCalibration:
    """One block per epoch, on inputs that the compressed blocks before it produce.

    Tokens are read in epoch 0 only; in later epochs batch i is what has become of batch i of epoch 0.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, storage_dtype: torch.dtype) -> None:
        self._decoder = find_decoder_blocks(model)
        self._replay = BlockReplay(model, self._decoder.blocks)
        self._recipe = recipe
        self._storage_dtype = storage_dtype
        self._inputs: list[PrologueOutput] = []
        self._token_masks: list[Tensor | None] = []
        self._collector = self._collector_of(0)
        self.epochs = len(self._decoder.blocks)

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Carry the batch to the entrance of block `epoch`, then through it under watch."""
        if epoch == 0:
            self._inputs.append(self._replay.prologue(batch))
            self._token_masks.append(padding_mask(batch))
        else:
            hidden, calls = self._inputs[batch_index]
            self._inputs[batch_index] = PrologueOutput(self._replay.run(epoch - 1, hidden, calls[epoch - 1]), calls)
        hidden, calls = self._inputs[batch_index]
        with self._collector.collecting(batch_index, self._token_masks[batch_index]):
            self._replay.run(epoch, hidden, calls[epoch])

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve the linears of block `epoch`."""
        solved = solve_linears(self._linears(epoch), self._collector, self._recipe, self._storage_dtype)
        if epoch + 1 < self.epochs:
            self._collector = self._collector_of(epoch + 1)
        else:
            self._inputs.clear()
            self._token_masks.clear()
        return solved

    def _linears(self, index: int) -> dict[str, nn.Module]:
        return _touched(self._recipe, self._decoder.linears(index))

    def _collector_of(self, index: int) -> InputCollector:
        return InputCollector(self._linears(index))


class OneShotCalibration:
    """All blocks in one epoch, on the dense model's inputs."""

    epochs = 1

    def __init__(self, model: nn.Module, recipe: Recipe, storage_dtype: torch.dtype) -> None:
        self._model = model
        self._linears = _touched(recipe, find_decoder_blocks(model).linears())
        self._recipe = recipe
        self._storage_dtype = storage_dtype
        self._collector = InputCollector(self._linears)

    @torch.no_grad()
    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the whole model under watch."""
        with self._collector.collecting(batch_index, padding_mask(batch)):
            self._model(**model_inputs(batch))

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve every linear."""
        return solve_linears(self._linears, self._collector, self._recipe, self._storage_dtype)


def calibration_for(mode: Mode, model: nn.Module, recipe: Recipe, storage_dtype: torch.dtype) -> Calibration:
    """Make the calibration called `mode`."""
    kinds: dict[Mode, type[SequentialCalibration] | type[OneShotCalibration]] = {
        "sequential": SequentialCalibration,
        "one-shot": OneShotCalibration,
    }
    if mode not in kinds:
        raise ValueError(f"calibration must be one of {', '.join(kinds)}, got {mode!r}")
    check_model(model, recipe)
    return kinds[mode](model, recipe, storage_dtype)


def compress(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    recipe: Recipe,
    *,
    storage_dtype: torch.dtype | None = None,
    mode: Mode = "sequential",
) -> dict[str, SolvedLinear]:
    """Compress a model in place, without Lightning.

    Args:
        model: a decoder-only model in eval mode, on the device where it is to be solved.
        batches: calibration batches, `input_ids` int64 `[batch, time]`, on that device; gone through once a block.
        recipe: what to do.
        storage_dtype: dtype of unquantized survivors; the model's own if None.
        mode: `sequential` or `one-shot`.

    Returns:
        What to store, by the full name of the linear.

    Raises:
        ValueError: the model and the recipe do not fit, or calibration met NaN or inf.
    """
    calibration = calibration_for(mode, model, recipe, storage_dtype or next(model.parameters()).dtype)
    solved: dict[str, SolvedLinear] = {}
    for epoch in range(calibration.epochs):
        for index, batch in enumerate(batches):
            calibration.observe(epoch, index, batch)
        solved |= calibration.finish(epoch)
    return solved


def check_model(model: nn.Module, recipe: Recipe) -> None:
    """Refuse, with the whole list of offenders, what would fail later.

    Raises:
        ValueError: no decoder blocks, experts as 3-D parameters, an already quantized model, an ignore pattern or
            rule that matches nothing, nothing left to compress, or N:M groups that do not fit a linear.
    """
    linears = find_decoder_blocks(model).linears()
    quantized = getattr(getattr(model, "config", None), "quantization_config", None)
    odd = [name for name, linear in linears.items() if not weight_matrix(linear).is_floating_point()]
    if quantized is not None or odd:
        raise ValueError(f"the model is already quantized ({quantized or ', '.join(odd[:4])}); start from a dense one")
    offenders = [f"{pattern!r} of ignore or rules matches no linear" for pattern in recipe.unmatched(list(linears))]
    plans = []
    for name, linear in linears.items():
        try:
            plans.append(recipe.for_linear(name))
            if plans[-1] is not None:
                check_pattern(plans[-1], weight_matrix(linear).shape[1], name)
        except ValueError as error:
            offenders.append(f"{name}: {error}")
    if not any(plans) and not offenders:
        offenders.append("the recipe leaves every linear alone: set sparsity, pattern or target_avg_bits")
    if offenders:
        shown = offenders[:8] + ([f"and {len(offenders) - 8} more"] if len(offenders) > 8 else [])
        raise ValueError("the recipe does not fit the model:\n  " + "\n  ".join(shown))


def solve_linears(
    linears: Mapping[str, nn.Module], collector: InputCollector, recipe: Recipe, storage_dtype: torch.dtype
) -> dict[str, SolvedLinear]:
    """Solve each linear, write the stored weight back into the module, and return what to store."""
    solved = {}
    for name, linear in linears.items():
        plan = recipe.for_linear(name)
        assert plan is not None
        compressed = compress_linear(weight_matrix(linear), collector.statistics(name), plan, name, storage_dtype)
        packed = pack_weight(compressed)
        set_weight_matrix(linear, unpack_weight(packed))
        solved[name] = SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))
    return solved


def _touched(recipe: Recipe, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: linear for name, linear in linears.items() if recipe.for_linear(name) is not None}


def padding_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens are real, bool `[batch, time]`, or None if all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def mean_error(solved: Iterable[SolvedLinear]) -> float:
    """Mean relative error of some solved linears."""
    errors = [linear.report.relative_error for linear in solved]
    return sum(errors) / max(len(errors), 1)
