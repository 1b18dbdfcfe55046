"""One run of the callback: the calibration, and the state that checkpoints keep of it, moved on together."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings, write_embeddings
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.progress import PlanState, biases_of
from sgpt_lightning.calibration.schedules import Calibration
from sgpt_lightning.calibration.solving import mean_error
from sgpt_lightning.core.paths import loop_path
from sgpt_lightning.format.records import RunRecord, SolvedLinear
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import versions
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.protocols import calibration_protocol, evaluation_protocols
from sgpt_lightning.trainer.resume import BatchDigest, RunState, batches_on_device, check_same_text
from sgpt_lightning.trainer.setup import count_tokens, validate_now, warn_of_few_tokens


class Run:
    """A calibration and the state of its last finished stage.

    Args:
        state: new, or that of an earlier run of the same settings.
        calibration: new, of the dense model.
        model: the model.
    """

    def __init__(self, state: RunState, calibration: Calibration, model: nn.Module) -> None:
        self.state = state
        self.calibration = calibration
        self._model = model
        self._text = BatchDigest()
        self.stage_started = time.perf_counter()
        self.measure_seconds = 0.0
        """Of the last measurement."""

    @property
    def stages(self) -> int:
        """How many stages there are, finished or not."""
        return len(self.calibration.stages)

    @property
    def solves_all(self) -> bool:
        """Whether all stages have ended."""
        return self.state.finished == self.stages

    def start(self, trainer: Trainer) -> None:
        """Code embeddings, or bring model and calibration to where the earlier run left them.

        Raises:
            ValueError: the calibration batches are not those of the earlier run, or an embedding cannot be coded.
        """
        started = time.perf_counter()
        plans = self.calibration.plans
        if self.state.finished:
            check_same_text(trainer, self.state.text)
            self.calibration.resume(self.state.progress(), batches_on_device(trainer))
            if self.solves_all:
                write_embeddings(self._model, self.state.embeddings)
            self.state.seconds["calibrate"] += time.perf_counter() - started
        else:
            counts = count_tokens(trainer) if plans.embeddings else TokenCounts()
            self.state = replace(self.state, embeddings=code_embeddings(self._model, plans, counts))
        self.stage_started = time.perf_counter()

    def observe(self, stage: int, batch_idx: int, batch: Mapping[str, Tensor], loaded: Any) -> None:
        """Show a batch to the calibration; `loaded` is the same batch on the host, if that is known."""
        started = time.perf_counter()
        if stage == 0:
            check_batch(self._model, loaded, f"calibration batch {batch_idx}")
            self._text.add(loaded)
        self.calibration.observe(stage, batch_idx, batch)
        self.state.seconds["calibrate"] += time.perf_counter() - started

    def finish(self, stage: int) -> dict[str, SolvedLinear]:
        """Solve what a stage was about, take down how far the run has come, and return what was solved by name."""
        calibration, decoder = self.calibration, self.calibration.plans.decoder
        if stage == 0:
            warn_of_few_tokens(self._text.tokens, calibration.plans.linears())
        started = time.perf_counter()
        solved = calibration.finish(stage)
        self.state.seconds["solve"] += time.perf_counter() - started
        state, linears = self.state, decoder.linears()
        all_solved = {**state.solved, **solved}
        if stage == self.stages - 1:
            write_embeddings(self._model, state.embeddings)
            all_solved |= state.embeddings
        now = time.perf_counter()
        if calibration.stages[stage].linears:
            took = (*state.block_seconds, now - self.stage_started)
            state = replace(state, error=mean_error(solved.values()), block_seconds=took)
        self.state = replace(
            state,
            finished=stage + 1,
            label=calibration.stages[stage].label,
            solved=all_solved,
            biases={**state.biases, **biases_of({name: linears[name] for name in solved})},
            plans=PlanState.of(calibration.plans),
            text=state.text or self._text.summary(),
        )
        self.stage_started = now
        return solved

    def measure(
        self, label: str, trainer: Trainer, pl_module: CausalLMModule, activations: Activations
    ) -> dict[str, float]:
        """Measure the model on the validation data, and keep the perplexities by data set; none without such data."""
        started = time.perf_counter()
        pl_module.measured_state = label
        validate_now(trainer, activations)
        measured = {name: measured.perplexity for name, measured in pl_module.measured.items()}
        self.state.perplexity[label] = measured
        self.measure_seconds = time.perf_counter() - started
        self.state.seconds["evaluate"] += self.measure_seconds
        return measured

    def record(
        self, trainer: Trainer, pl_module: CausalLMModule, recipe: Recipe, calibration: Mapping[str, Any]
    ) -> RunRecord:
        """Return what the manifest says of the run; `calibration` are the callback's own settings of it."""
        text = calibration_protocol(trainer, self.state.text["windows"])
        return RunRecord(
            model=pl_module.path,
            calibration={**calibration, "column_loops": loop_path(pl_module.device), "protocol": text},
            recipe=asdict(recipe),
            perplexity=self.state.perplexity,
            protocols=evaluation_protocols(trainer, pl_module),
            seconds=self.state.seconds,
            blocks=len(self.calibration.plans.decoder.blocks),
            versions=versions(),
        )
