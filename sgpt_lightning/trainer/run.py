"""One run of the callback: the calibration, and the state that checkpoints keep of it, moved on together."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from sgpt_lightning.calibration.checks import check_batch
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings, write_embeddings
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.progress import PlanState, biases_of
from sgpt_lightning.calibration.schedules import Calibration
from sgpt_lightning.calibration.solving import check_everywhere, mean_error
from sgpt_lightning.checkpoint.save import save_or_rescue
from sgpt_lightning.core.paths import loop_path
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.records import RunRecord, SolvedLinear
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import closing_line, run_tables, versions, write_report
from sgpt_lightning.trainer.logs import log_run
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.protocols import calibration_protocol, evaluation_protocols
from sgpt_lightning.trainer.resume import BatchDigest, RunState, batches_on_device, check_same_text
from sgpt_lightning.trainer.setup import (
    check_dealt,
    count_tokens,
    rescue_places,
    validate_now,
    warn_of_few_tokens,
)


class Run:
    """A calibration and the state of its last finished stage.

    Args:
        state: new, or that of an earlier run of the same settings.
        calibration: new, of the dense model.
        model: the model.

    Raises:
        ValueError: scales are to be folded into norms, of which a state that is gone on from holds nothing.
    """

    def __init__(self, state: RunState, calibration: Calibration, model: nn.Module) -> None:
        if any(recipe.scaling.fold for recipe in calibration.plans.recipes.values()):
            raise ValueError("scaling.fold is for sgpt_lightning.compress, a fit stores scales: got scaling.fold=True")
        self.state = state
        self.calibration = calibration
        self._model = model
        self._text = BatchDigest()
        self._summary: Mapping[str, Any] = {}
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
            ValueError: the calibration batches are not those of the earlier run, or cannot be dealt to processes, or an
                embedding cannot be coded.
        """
        check_dealt(trainer, trainer.train_dataloader, "the calibration data")
        started = time.perf_counter()
        plans, ranks = self.calibration.plans, self.calibration.plans.ranks
        if self.state.finished:
            check_same_text(trainer, self.state.text, ranks)
            self.calibration.resume(self.state.progress(), batches_on_device(trainer))
            if self.solves_all:
                write_embeddings(self._model, self.state.embeddings)
            self.state.seconds["calibrate"] += time.perf_counter() - started
        else:
            with ranks.outcome():
                counts = count_tokens(trainer) if plans.embeddings else TokenCounts()
            self.state = replace(self.state, embeddings=code_embeddings(self._model, plans, counts.over(ranks)))
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
        started, ranks = time.perf_counter(), calibration.plans.ranks
        if stage == 0:
            self._summary = self._text.summary(ranks)
            if ranks.is_first:
                warn_of_few_tokens(self._summary["tokens"], calibration.plans.linears())
        solved = calibration.finish(stage)
        self.state.seconds["solve"] += time.perf_counter() - started
        state, linears = self.state, decoder.linears()
        all_solved = {**state.solved, **solved}
        if stage == self.stages - 1:
            write_embeddings(self._model, state.embeddings)
            tables = {name: self._model.get_submodule(name) for name in state.embeddings}
            check_everywhere(tables, ranks, "embeddings")
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
            text=state.text or self._summary,
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

    def save(
        self, trainer: Trainer, pl_module: CausalLMModule, record: RunRecord, target: Path, report: Path
    ) -> Manifest:
        """Write the compressed model and the report, and log them: the first process does; return the manifest.

        Raises:
            OSError: they cannot be written; the model is in another place then, see `save_or_rescue`.
            RankError: the first process failed.
        """
        ranks, manifest = self.calibration.plans.ranks, None
        with ranks.outcome():
            if ranks.is_first:
                manifest = save_or_rescue(
                    [target, *rescue_places(report.parent)],
                    self._model,
                    self.state.solved,
                    storage_dtype=pl_module.storage_dtype,
                    tokenizer=pl_module.tokenizer,
                    run=record.to_dict(),
                )
                write_report(report, manifest)
                log_run(trainer.loggers, manifest)
        manifest = ranks.broadcast(manifest)
        assert manifest is not None
        return manifest


@rank_zero_only
def print_results(manifest: Manifest, target: Path, report: Path) -> None:
    """Print the tables of a run, where its files are, and the closing line."""
    print(f"\n{run_tables(manifest)}")
    print(f"compressed model: {target}\nreport: {report}")
    print(closing_line(manifest))
