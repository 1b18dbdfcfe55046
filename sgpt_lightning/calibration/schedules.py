"""The order of a calibration: which block is watched when, and when it is solved.

`SequentialCalibration` handles one block per epoch: hidden states are carried through the blocks that are already
compressed, so that each linear is solved for the inputs it will really receive (GPTQ, arXiv 2210.17323, section 4).
Over a whole run each batch passes 2L - 1 blocks, against L^2 for re-running the half-compressed model.

Where the recipe asks for it (`true_sequential`), the linears of a block are solved in the order in which they run, and
the block is run again for each group of linears that share an input. Where the target is asymmetric (`alpha` > 0), the
dense model's hidden states are carried beside, through a copy of each block made before it is compressed.

`OneShotCalibration` watches every block during one pass of the dense model. It is cheaper and less exact: errors of
earlier blocks are not seen by later ones, and all Hessians are held at once. Both settings above are without effect:
there is one pass, and it is the dense model's.

Both have the same three steps, so the Lightning callback and `compress` drive them alike: `stages`, `observe` for
every batch, `finish` after the last batch of an epoch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import plan_linears
from sgpt_lightning.calibration.collector import (
    DenseReference,
    InputCollector,
    ResidualStream,
    input_groups,
    watched_inputs,
)
from sgpt_lightning.calibration.gradients import OutputGradients
from sgpt_lightning.calibration.plan import LinearJob, Plans, plan_model
from sgpt_lightning.calibration.solving import solve_linears
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.replay import (
    BlockReplay,
    PrologueOutput,
    model_inputs,
    padding_mask,
    residual_writers,
    run_block,
)
from sgpt_lightning.recipe import Recipe

Mode = Literal["sequential", "one-shot"]


class Stage(NamedTuple):
    """One pass over the calibration batches, an epoch of the Trainer."""

    label: str
    """What it is about, for people."""
    blocks: int
    """Decoder blocks that are compressed when it has ended."""


class Calibration(Protocol):
    """What the callback and `compress` need of a way to calibrate."""

    plans: Plans
    """What is to be done to each linear."""
    stages: Sequence[Stage]
    """What each epoch is about, in order."""

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Take in one batch: `input_ids` `[batch, time]` and optionally `attention_mask`."""

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve what the epoch was about, write it into the model, and return it by full name."""


class SequentialCalibration:
    """One block per epoch, on inputs that the compressed blocks before it produce.

    Tokens are read in epoch 0 only; in later epochs batch i is what has become of batch i of epoch 0.
    """

    def __init__(self, model: nn.Module, plans: Plans, storage_dtype: torch.dtype) -> None:
        self._model = model
        self._decoder = plans.decoder
        self._replay = BlockReplay(model, self._decoder.blocks)
        self.plans = plans
        self._storage_dtype = storage_dtype
        self._inputs: list[PrologueOutput] = []
        self._observed = 0
        self._token_masks: list[Tensor | None] = []
        self._follows_dense = any(plan.solve_parts.alpha > 0 for plan in plans.recipes.values())
        self._dense_hidden: list[Tensor] = []
        self._dense_block: nn.Module | None = None
        self._groups: list[dict[str, nn.Module]] = []
        self._writers: dict[str, nn.Module] = {}
        self._collector = InputCollector({})
        blocks = len(self._decoder.blocks)
        self.stages: Sequence[Stage] = [Stage(f"block {k} of {blocks}", k) for k in range(1, blocks + 1)]

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Carry the batch to the entrance of block `epoch`, then through it under watch."""
        if epoch == 0:
            self._inputs.append(self._replay.prologue(batch))
            self._token_masks.append(padding_mask(batch))
            if self._follows_dense:
                self._dense_hidden.append(self._inputs[-1].hidden)
        else:
            if batch_index >= len(self._inputs):
                raise other_count(epoch, batch_index + 1, len(self._inputs))
            hidden, calls = self._inputs[batch_index]
            self._inputs[batch_index] = PrologueOutput(self._replay.run(epoch - 1, hidden, calls[epoch - 1]), calls)
        if batch_index == 0:
            self._begin(epoch)
        self._collect(epoch, batch_index, last=len(self._groups) == 1)
        self._observed = batch_index + 1

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve the linears of block `epoch`."""
        if self._observed != len(self._inputs):
            raise other_count(epoch, self._observed, len(self._inputs))
        mark_compressed(self._model)
        solved: dict[str, SolvedLinear] = {}
        for position, group in enumerate(self._groups):
            if position:
                self._collector = InputCollector(group)
                for batch_index in range(len(self._inputs)):
                    self._collect(epoch, batch_index, last=position + 1 == len(self._groups))
            solved |= solve_linears(group, self._collector, self.plans, self._storage_dtype)
        self._dense_block = None
        if epoch + 1 == len(self.stages):
            for kept in (self._inputs, self._token_masks, self._dense_hidden):
                kept.clear()
        return {name: solved[name] for name in self._decoder.linears(epoch) if name in solved}

    def _begin(self, epoch: int) -> None:
        """Find out which linears of the block share an input and when they run; keep a copy of the block."""
        linears = self.plans.linears(epoch)
        self._groups = [linears]
        if any(self.plans.recipes[name].solve_parts.true_sequential for name in linears):
            hidden, calls = self._inputs[0]
            with watched_inputs(linears) as inputs:
                self._replay.run(epoch, hidden, calls[epoch])
            self._groups = input_groups(inputs, linears)
        self._collector = InputCollector(self._groups[0] if self._groups else {})
        if self._follows_dense:
            block, (hidden, calls) = self._decoder.blocks[epoch], self._inputs[0]
            self._dense_block = copy.deepcopy(block)
            writers = residual_writers(block, hidden, calls[epoch])
            self._writers = {f"{self._decoder.name(epoch)}.{name}": linear for name, linear in writers.items()}

    def _collect(self, epoch: int, batch_index: int, *, last: bool) -> None:
        """Run the block under watch, and its dense copy beside it; `last` if no more groups of the block follow."""
        hidden, calls = self._inputs[batch_index]
        linears, reference, stream = self._collector.linears, None, ResidualStream(hidden)
        if self._dense_block is not None:
            reference = self._follow_dense(epoch, batch_index, stream, last=last)
        if not linears:
            return
        with (
            stream.following(self._writers),
            self._collector.collecting(batch_index, self._token_masks[batch_index], reference),
            watched_inputs(linears),
        ):
            self._replay.run(epoch, hidden, calls[epoch])

    def _follow_dense(self, epoch: int, batch_index: int, stream: ResidualStream, *, last: bool) -> DenseReference:
        """Run the block's dense copy as far as it is watched, or for the last group to its end and carry on."""
        block, prefix = self._dense_block, f"{self._decoder.name(epoch)}."
        assert block is not None

        def copies(linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            return {name: block.get_submodule(name.removeprefix(prefix)) for name in linears}

        entered, call = self._dense_hidden[batch_index], self._inputs[batch_index].calls[epoch]
        dense_stream = ResidualStream(entered)
        watching = watched_inputs(copies(self._collector.linears), end_early=not last)
        with dense_stream.following(copies(self._writers)), watching as inputs:
            left = run_block(block, entered, call)
        if last:
            self._dense_hidden[batch_index] = left
        return DenseReference(inputs, dense_stream, stream)


class OneShotCalibration:
    """All blocks in one epoch, on the dense model's inputs."""

    def __init__(self, model: nn.Module, plans: Plans, storage_dtype: torch.dtype) -> None:
        self._model = model
        self.plans = plans
        self._storage_dtype = storage_dtype
        self.stages: Sequence[Stage] = [Stage("all blocks", len(plans.decoder.blocks))]
        self._collector = InputCollector(plans.linears())

    @torch.no_grad()
    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the whole model under watch."""
        with self._collector.collecting(batch_index, padding_mask(batch)):
            self._model(**model_inputs(batch))

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve every linear."""
        mark_compressed(self._model)
        return solve_linears(self._collector.linears, self._collector, self.plans, self._storage_dtype)


class GuidedCalibration:
    """One epoch of gradients and plans on the dense model, then another calibration that follows them."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plans: Plans,
        then: Callable[[Plans], Calibration],
    ) -> None:
        linears = plans.linears()
        self._recipe = recipe
        self.plans = plans
        self._then = then
        self._next = then(plans)
        self._batches = self._repeated = 0
        self._gradients = OutputGradients(model, linears)
        self._collector = InputCollector(linears if recipe.scope == "model" else {})
        self.stages: Sequence[Stage] = [Stage("gradients of the dense model", 0), *self._next.stages]

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Run the dense model forwards and backwards in epoch 0; hand later epochs on."""
        if epoch == 1:
            self._repeated = batch_index + 1
        if epoch:
            self._next.observe(epoch - 1, batch_index, batch)
            return
        self._batches = batch_index + 1
        with self._collector.collecting(batch_index, padding_mask(batch)):
            self._gradients.observe(batch_index, batch)

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Plan at the end of epoch 0; solve at the end of later ones."""
        if epoch == 1 and self._repeated != self._batches:
            raise other_count(epoch, self._repeated, self._batches)
        if epoch:
            return self._next.finish(epoch - 1)
        weights = {name: self._gradients.row_weights(name) for name in self.plans.recipes}
        recipes = self.plans.recipes
        if self._recipe.scope == "model":
            jobs = {
                name: LinearJob(weight_matrix(linear), self._collector.statistics(name), recipes[name], weights[name])
                for name, linear in self._collector.linears.items()
                if recipes[name].scope == "model"
            }
            recipes = {**recipes, **plan_model(jobs)}
        self.plans = Plans(self.plans.decoder, recipes, weights)
        self._next = self._then(self.plans)
        return {}


def calibration_for(mode: Mode, model: nn.Module, recipe: Recipe, storage_dtype: torch.dtype) -> Calibration:
    """Make the calibration called `mode`."""
    kinds: dict[Mode, type[SequentialCalibration] | type[OneShotCalibration]] = {
        "sequential": SequentialCalibration,
        "one-shot": OneShotCalibration,
    }
    if mode not in kinds:
        raise ValueError(f"calibration must be one of {', '.join(kinds)}, got {mode!r}")
    plans = plan_linears(model, recipe)

    def start(plans: Plans) -> Calibration:
        return kinds[mode](model, plans, storage_dtype)

    if recipe.scope == "model" or any(plan.uses_gradients for plan in plans.recipes.values()):
        return GuidedCalibration(model, recipe, plans, start)
    return start(plans)


def other_count(epoch: int, batches: int, first: int) -> ValueError:
    """Return the error for an epoch whose batches cannot be those of the first."""
    return ValueError(
        f"epoch {epoch} has {batches} batches or more, the first had {first}: every epoch must bring the same batches "
        "in the same order"
    )
