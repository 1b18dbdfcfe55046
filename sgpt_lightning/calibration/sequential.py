"""Sequential calibration: one block per epoch, on the outputs of the blocks that are already compressed.

Hidden states are carried through the compressed blocks, so that each linear is solved for the inputs it will really
receive (GPTQ, arXiv 2210.17323, section 4). Over a whole run each batch passes 2L - 1 blocks, against L^2 for
re-running the half-compressed model.

Where the recipe asks for it (`true_sequential`), the linears of a block are solved in the order in which they run, and
the block is run again for each group of linears that share an input. Where the target is asymmetric (`alpha` > 0), the
dense model's hidden states are carried beside, through a copy of each block made before it is compressed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.collector import (
    DenseReference,
    InputCollector,
    ResidualStream,
    input_groups,
    watched_inputs,
)
from sgpt_lightning.calibration.hidden_states import Activations, HiddenStates
from sgpt_lightning.calibration.meter import Announce, nobody
from sgpt_lightning.calibration.plan import Plans
from sgpt_lightning.calibration.progress import Progress
from sgpt_lightning.calibration.solving import check_everywhere, check_stored, solve_linears
from sgpt_lightning.calibration.stages import BatchCount, Stage
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.batches import real_tokens
from sgpt_lightning.models.blocks import mark_compressed
from sgpt_lightning.models.placement import copy_of, placement_of
from sgpt_lightning.models.replay import BlockCall, BlockReplay, residual_writers, run_block

OURS, DENSE = "compressed", "dense"
"""Streams of hidden states: what the compressed blocks give, and what the dense model's do."""


class SequentialCalibration:
    """One block per epoch, on inputs that the compressed blocks before it produce.

    Tokens are read in epoch 0 only; in later epochs batch i is what has become of batch i of epoch 0.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Plans,
        storage_dtype: torch.dtype,
        tf32: bool = False,
        activations: Activations = "auto",
    ) -> None:
        self.announce: Announce = nobody
        self._model = model
        self._decoder = plans.decoder
        self._replay = BlockReplay(model, self._decoder.blocks)
        self._placement = placement_of(model)
        self.plans = plans
        self._storage_dtype = storage_dtype
        self._tf32 = tf32
        self._hidden = HiddenStates(activations)
        self._calls: list[Sequence[BlockCall]] = []
        self._count = BatchCount()
        self._real: list[Tensor | None] = []
        self._follows_dense = any(plan.solve_parts.alpha > 0 for plan in plans.recipes.values())
        self._dense_block: nn.Module | None = None
        self._dense_runs: dict[int, _DenseRun] = {}
        self._writers: dict[str, nn.Module] = {}
        self._collector = InputCollector({})
        blocks = len(self._decoder.blocks)
        self.stages = [
            Stage(f"block {index + 1} of {blocks}", index + 1, (tuple(plans.linears(index)),))
            for index in range(blocks)
        ]

    def observe(self, epoch: int, batch_index: int, batch: Mapping[str, Tensor]) -> None:
        """Carry the batch to the entrance of block `epoch`, then through it under watch."""
        self._count.add(epoch, batch_index)
        hidden = self._enter(batch) if epoch == 0 else self._carry_on(epoch - 1, batch_index)
        if batch_index == 0:
            self._placement.bring(epoch)
            self._begin(epoch, hidden)
        self._collect(epoch, batch_index, hidden, last=len(self.stages[epoch].groups) == 1)

    def finish(self, epoch: int) -> dict[str, SolvedLinear]:
        """Solve the linears of block `epoch`."""
        ranks = self.plans.ranks
        with ranks.outcome():
            self._count.check(epoch)
            self._replay.check()
            self._check_inputs()
        self._placement.put_back(epoch - 1)
        mark_compressed(self._model)
        solved: dict[str, SolvedLinear] = {}
        groups = self.stages[epoch].groups
        for position, names in enumerate(groups):
            last = position + 1 == len(groups)
            if position:
                self.announce("again")
                self._collector = self._watching(epoch, names)
                with ranks.outcome():
                    for batch_index in range(len(self._calls)):
                        entered = self._entered(batch_index)
                        self._collect(epoch, batch_index, entered, last=last)
                    self._check_inputs()
            self.announce("solve last" if last else "solve")
            solved |= solve_linears(self._collector.linears, self._collector, self.plans, self._storage_dtype)
        linears = self.plans.linears(epoch)
        with ranks.outcome():
            check_stored(linears, solved)
        check_everywhere(linears, ranks, self.stages[epoch].label)
        self._placement.keep(epoch, {name: linear.packed for name, linear in solved.items()})
        self._dense_block = None
        self._dense_runs.clear()
        if epoch + 1 == len(self.stages):
            self._placement.put_back(epoch)
            self._hidden.clear()
            self._calls.clear()
            self._real.clear()
        return {name: solved[name] for name in self._decoder.linears(epoch) if name in solved}

    def _check_inputs(self) -> None:
        """Raise ValueError if a linear received NaN or inf, unless it may be rounded for that."""
        if not self.plans.fallbacks.allowed:
            self._collector.check()

    def resume(self, progress: Progress, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Write what was solved, and carry the batches, in both models, as far as they were."""
        device = self._placement.device_of(next(iter(self.plans.linears().values())))
        self.plans = progress.plans.restored(self.plans, device)
        self.plans.fallbacks.take_up(progress.solved)
        if not progress.finished:
            return
        mark_compressed(self._model)
        self._count.expect(progress.batches)
        if progress.finished == len(self.stages):
            for block in range(progress.finished):
                with self._placement.at_work(block):
                    self._write(block, progress)
            return
        for batch in batches:
            self._enter(batch)
        for block in range(progress.finished):
            self._placement.put_back(block - 1)
            self._placement.bring(block)
            for index, calls in enumerate(self._calls if self._follows_dense else ()):
                self._hidden.put(DENSE, index, self._replay.run(block, self._hidden.get(DENSE, index), calls[block]))
            self._write(block, progress)
            for index in range(len(self._calls) if block + 1 < progress.finished else 0):
                self._carry_on(block, index)  # `observe` does it for the last

    def _write(self, block: int, progress: Progress) -> None:
        """Write what was solved of a block, which is at work."""
        linears = self.plans.linears(block)
        progress.write(linears)
        self._placement.keep(block, {name: progress.solved[name].packed for name in linears if name in progress.solved})

    def _enter(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Bring one more batch to the entrance of the first block, and return what enters it."""
        batch, real = real_tokens(batch)
        hidden, calls = self._replay.prologue(batch)
        for stream in (OURS, DENSE) if self._follows_dense else (OURS,):
            self._hidden.put(stream, len(self._calls), hidden)
        self._calls.append(calls)
        self._real.append(real)
        return hidden

    def _entered(self, batch_index: int) -> Tensor:
        """Return what has become of a batch, and have the next one fetched; behind the last comes the first."""
        hidden = self._hidden.get(OURS, batch_index)
        following = (batch_index + 1) % len(self._calls)
        for stream in (OURS, DENSE) if self._follows_dense else (OURS,):
            self._hidden.prefetch(stream, following)
        return hidden

    def _carry_on(self, block: int, batch_index: int) -> Tensor:
        """Carry a batch through a block that is compressed, and return what has become of it."""
        hidden = self._replay.run(block, self._entered(batch_index), self._calls[batch_index][block])
        self._hidden.put(OURS, batch_index, hidden)
        return hidden

    def _watching(self, epoch: int, names: Sequence[str]) -> InputCollector:
        """Return a collector for some linears of block `epoch`."""
        linears = self.plans.linears(epoch)
        return InputCollector({name: linears[name] for name in names}, self._tf32)

    def _begin(self, epoch: int, hidden: Tensor) -> None:
        """Find out which linears of the block share an input and when they run; keep a copy of the block."""
        linears, call = self.plans.linears(epoch), self._calls[0][epoch]
        if any(self.plans.recipes[name].solve_parts.true_sequential for name in linears):
            with watched_inputs(linears) as inputs:
                self._replay.run(epoch, hidden, call)
            groups = tuple(tuple(group) for group in input_groups(inputs, linears))
            self.stages[epoch] = self.stages[epoch]._replace(groups=groups)
        self._collector = self._watching(epoch, self.stages[epoch].groups[0])
        if self._follows_dense:
            block = self._decoder.blocks[epoch]
            self._dense_block = copy_of(block)
            writers = residual_writers(block, hidden, call)
            self._writers = {f"{self._decoder.name(epoch)}.{name}": linear for name, linear in writers.items()}

    def _collect(self, epoch: int, batch_index: int, hidden: Tensor, *, last: bool) -> None:
        """Run the block under watch, and its dense copy beside it; `last` if no more groups of the block follow."""
        linears, reference, stream = self._collector.linears, None, ResidualStream(hidden)
        if self._dense_block is not None:
            reference = self._follow_dense(epoch, batch_index, stream, last=last)
        if not linears:
            return
        with (
            stream.following(self._writers),
            self._collector.collecting(batch_index, self._real[batch_index], reference),
            watched_inputs(linears),
        ):
            self._replay.run(epoch, hidden, self._calls[batch_index][epoch])

    def _follow_dense(self, epoch: int, batch_index: int, stream: ResidualStream, *, last: bool) -> DenseReference:
        """Return what the block's dense copy does with a batch; for the last group, carry its output on.

        Where there is room it is run once, to its end, for all groups: of opt-mini's forwards that took a fifth away.
        """
        run = self._dense_runs.get(batch_index)
        if run is None:
            keeps = not last and sum(run.nbytes for run in self._dense_runs.values()) < KEPT_BYTES
            linears = self.plans.linears(epoch) if keeps else self._collector.linears
            run = self._run_dense(epoch, batch_index, linears, to_its_end=keeps or last)
            if keeps:
                self._dense_runs[batch_index] = run
        if last:
            self._hidden.put(DENSE, batch_index, run.left)
            self._dense_runs.pop(batch_index, None)
        return DenseReference(run.inputs, run.stream, stream)

    @torch.no_grad()
    def _run_dense(
        self, epoch: int, batch_index: int, linears: Mapping[str, nn.Module], *, to_its_end: bool
    ) -> "_DenseRun":
        """Run the block's dense copy as far as these linears, or to its end."""
        block, prefix = self._dense_block, f"{self._decoder.name(epoch)}."
        assert block is not None

        def copies(linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            return {name: block.get_submodule(name.removeprefix(prefix)) for name in linears}

        entered, call = self._hidden.get(DENSE, batch_index), self._calls[batch_index][epoch]
        stream, left = ResidualStream(entered), entered
        with stream.following(copies(self._writers)), watched_inputs(copies(linears), end_early=not to_its_end) as seen:
            left = run_block(block, entered, call)
        return _DenseRun(seen, stream, left)


class _DenseRun(NamedTuple):
    """What a block of the uncompressed model did with one batch."""

    inputs: Mapping[str, Tensor]
    """What each linear received, by name."""
    stream: ResidualStream
    left: Tensor
    """What left the block, `[batch, time, hidden]`; what entered it, if the run was ended early."""

    @property
    def nbytes(self) -> int:
        """What is kept of it in memory, tensors that are one counted once."""
        tensors = [self.left, *self.inputs.values(), *self.stream.before.values()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


KEPT_BYTES = 2**29
"""What is kept in memory of the runs of one uncompressed block; past it, it is run again for each group of linears."""
