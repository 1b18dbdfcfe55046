"""The Lightning callback: when to watch, when to solve, when to measure, and where the results go.

Epoch k is block k (one epoch in all when calibration is one-shot), after one epoch of gradients where the recipe uses
them. The solve runs when the last batch of an epoch has ended and not in `on_train_epoch_end`: Lightning validates
before that hook, so perplexities would lag one block and validation text would leak into the Hessians. Lightning's own
schedule of validation is off for the same reason; the callback runs the Trainer's validation loop itself.
"""

import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sgpt_lightning.calibration.checks import check_batch, least_bytes
from sgpt_lightning.calibration.embeddings import TokenCounts, code_embeddings, write_embeddings
from sgpt_lightning.calibration.schedules import Calibration, Mode, calibration_for
from sgpt_lightning.calibration.solving import mean_error
from sgpt_lightning.checkpoint.save import save_or_rescue
from sgpt_lightning.core.paths import loop_path
from sgpt_lightning.format.directory import check_target, is_compressed_dir
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.records import RunRecord, SolvedLinear
from sgpt_lightning.models.blocks import is_marked_compressed
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import closing_line, run_tables, versions, write_report
from sgpt_lightning.trainer.logs import log_linears, log_perplexity, log_run
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.progress import seconds_left
from sgpt_lightning.trainer.protocols import TextSeen, calibration_protocol, evaluation_protocols
from sgpt_lightning.trainer.setup import (
    IncompleteRunError,
    TrainerSettings,
    check_report_path,
    check_trainer,
    count_tokens,
    network_of,
    report_path,
    rescue_places,
    run_directory,
    warn_of_few_tokens,
)

DEFAULT_RECIPE = Recipe()


class SparseGPTCallback(Callback):
    """Compresses the model of a `CausalLMModule` during `trainer.fit`.

    Give it to any Trainer: it sets the number of epochs itself, measures perplexity on the validation data before and
    after, and writes the compressed model and `report.json`.

    Args:
        recipe: what to do to which linear.
        calibration: `sequential` (one block per epoch, on the compressed blocks' outputs) or `one-shot` (one epoch).
        save_dir: where the compressed model goes; None for `compressed` in the run directory.
        validate_every_block: also measure perplexity after each block.
        tf32_moments: multiply the inputs of a float32 model as TF32 on CUDA; faster, and Hessians are 5e-4 off.

    Raises:
        TypeError: `recipe` is no `Recipe`.
        ValueError: an unknown way to calibrate.
    """

    def __init__(
        self,
        recipe: Recipe = DEFAULT_RECIPE,
        calibration: Mode = "sequential",
        save_dir: str | None = None,
        validate_every_block: bool = False,
        tf32_moments: bool = False,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {recipe!r} ({type(recipe).__name__})")
        if calibration not in get_args(Mode):
            raise ValueError(f"calibration must be one of {', '.join(get_args(Mode))}, got {calibration!r}")
        self.recipe = recipe
        self.calibration = calibration
        self.save_dir = save_dir
        self.validate_every_block = validate_every_block
        self.tf32_moments = tf32_moments
        self.solved: dict[str, SolvedLinear] = {}
        self.manifest: Manifest | None = None
        self._calibration: Calibration | None = None
        self._embeddings: dict[str, SolvedLinear] = {}
        self._settings: TrainerSettings | None = None
        self._first_epoch = 0
        self._seen = TextSeen(0, 0)
        self._perplexity: dict[str, dict[str, float]] = {}
        self._seconds: dict[str, float] = {}
        self._last_error: float | None = None
        self._block_seconds: list[float] = []
        self._block_started = 0.0
        self._measure_seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model is loaded.

        Raises:
            TypeError: the module is not a `CausalLMModule`.
            ValueError: mixed precision, several processes, a limit that would end the run early, a compressed model, or
                a foreign `report.json` where the report is to go.
            FileExistsError: the output directory exists and is not a compressed model.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLMModule):
            raise TypeError(f"SparseGPTCallback needs a CausalLMModule, got {type(pl_module).__name__}")
        check_trainer(trainer)
        in_memory = pl_module.network
        if is_compressed_dir(Path(pl_module.path)) or (in_memory is not None and is_marked_compressed(in_memory)):
            raise ValueError(f"the model {pl_module.path} is already compressed; start from a dense one")
        check_target(self.target(trainer))
        check_report_path(report_path(trainer))
        self._settings = TrainerSettings.of(trainer)
        # Nothing is logged by step, but Lightning warns of epochs shorter than `log_every_n_steps`.
        self._settings._replace(num_sanity_val_steps=0, log_every_n_steps=1).apply(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the recipe against the model, all of it, and the disk, and set the number of epochs."""
        network = network_of(pl_module)
        assert isinstance(pl_module, CausalLMModule)
        self.solved, self.manifest, self._perplexity, self._last_error = {}, None, {}, None
        self._seconds = {"calibrate": 0.0, "solve": 0.0, "evaluate": 0.0}
        self._seen, self._block_seconds = TextSeen(0, 0), []
        storage = pl_module.storage_dtype
        self._calibration = calibration_for(self.calibration, network, self.recipe, storage, self.tf32_moments)
        check_target(self.target(trainer), least_bytes(network, self._calibration.plans, storage))
        self._first_epoch = trainer.current_epoch  # not 0 when a Trainer fits for the second time
        pl_module.stages = dict(enumerate(self._calibration.stages, self._first_epoch))
        pl_module.measured = {}
        trainer.fit_loop.max_epochs = self._first_epoch + len(self._calibration.stages)
        trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs + 1  # never, counted from the first epoch of all
        network.train()  # Lightning warns of a network in eval mode here; on_train_start puts it back

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the dense model, and code its embeddings.

        Raises:
            ValueError: the training data has no length.
        """
        network_of(pl_module).eval()
        if trainer.num_training_batches == float("inf"):
            raise ValueError("the training data must have a length: every block is calibrated on the same batches")
        self._measure("dense", trainer, pl_module, 0)
        assert self._calibration is not None
        plans = self._calibration.plans
        counts = count_tokens(trainer) if plans.embeddings else TokenCounts()
        self._embeddings = code_embeddings(network_of(pl_module), plans, counts)
        self._block_started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch to the calibration."""
        assert self._calibration is not None
        started = time.perf_counter()
        epoch = trainer.current_epoch - self._first_epoch
        assert isinstance(pl_module, CausalLMModule)
        loaded = pl_module.as_loaded(batch)
        if epoch == 0:
            check_batch(network_of(pl_module), loaded, f"calibration batch {batch_idx}")
            self._seen = self._seen.with_batch(loaded)
        self._calibration.observe(epoch, batch_idx, batch)
        self._seconds["calibrate"] += time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Solve after the last batch of an epoch; show error and time left after every one."""
        assert self._calibration is not None
        stages, done = self._calibration.stages, trainer.current_epoch - self._first_epoch
        if trainer.is_last_batch:
            if done == 0:
                warn_of_few_tokens(self._seen.tokens, self._calibration.plans.linears())
            started = time.perf_counter()
            solved = self._calibration.finish(done)
            self._seconds["solve"] += time.perf_counter() - started
            self.solved |= solved
            if done == len(stages) - 1:
                write_embeddings(network_of(pl_module), self._embeddings)
                self.solved |= self._embeddings
            now = time.perf_counter()
            if stages[done].linears:
                self._last_error = mean_error(solved.values())
                self._block_seconds.append(now - self._block_started)
                log_linears(trainer.loggers, solved, self._calibration.plans.decoder)
            self._block_started = now
            done += 1
        self._show(pl_module, len(stages) - done)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model with the block that was just solved, the last time always."""
        assert self._calibration is not None
        stages, current = self._calibration.stages, trainer.current_epoch - self._first_epoch
        blocks = stages[current].blocks
        if current == len(stages) - 1:
            self._measure("compressed", trainer, pl_module, blocks)
        elif self.validate_every_block and blocks:
            self._measure(f"after {blocks} blocks", trainer, pl_module, blocks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the compressed model and the report, and log them.

        Raises:
            IncompleteRunError: something ended the run before its last epoch.
        """
        assert isinstance(pl_module, CausalLMModule)
        self._check_complete(trainer)
        assert self._calibration is not None
        record = RunRecord(
            model=pl_module.path,
            calibration={
                "mode": self.calibration,
                "tf32_moments": self.tf32_moments,
                "column_loops": loop_path(pl_module.device),
                "protocol": calibration_protocol(trainer, self._seen),
            },
            recipe=asdict(self.recipe),
            perplexity=self._perplexity,
            protocols=evaluation_protocols(trainer, pl_module),
            seconds=self._seconds,
            blocks=len(self._calibration.plans.decoder.blocks),
            versions=versions(),
        )
        self.manifest = save_or_rescue(
            [self.target(trainer), *rescue_places(trainer)],
            network_of(pl_module),
            self.solved,
            storage_dtype=pl_module.storage_dtype,
            tokenizer=pl_module.tokenizer,
            run=record.to_dict(),
        )
        write_report(report_path(trainer), self.manifest)
        log_run(trainer.loggers, self.manifest)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tables, after the progress bar has ended; IncompleteRunError if there was not a single batch."""
        self._check_complete(trainer)
        assert self.manifest is not None
        print(f"\n{run_tables(self.manifest)}")
        print(f"compressed model: {self.target(trainer)}\nreport: {report_path(trainer)}")
        print(closing_line(self.manifest))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go as `teardown` does, which Lightning does not call then, and do not call a signal a success."""
        self.teardown(trainer, pl_module, "fit")
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the calibration's tensors, and give the Trainer its settings and the network its mode back."""
        self._calibration = None
        if self._settings is not None:
            self._settings.apply(trainer)
            self._settings = None
        if isinstance(pl_module, CausalLMModule):
            pl_module.stages, pl_module.measured_state = {}, ""
            if pl_module.network is not None:
                pl_module.network.eval()

    def target(self, trainer: Trainer) -> Path:
        """Return the directory that the compressed model is written to."""
        return Path(self.save_dir).expanduser() if self.save_dir is not None else run_directory(trainer) / "compressed"

    def _check_complete(self, trainer: Trainer) -> None:
        """Raise IncompleteRunError unless every epoch ran to its end."""
        assert self._calibration is not None
        done, planned = trainer.current_epoch - self._first_epoch, len(self._calibration.stages)
        # In on_train_end the last epoch is counted already, whatever ended the run.
        if done < planned or not self.solved:
            raise IncompleteRunError.after(done, planned, len(self.solved), self.target(trainer))

    def _show(self, pl_module: LightningModule, remaining: int) -> None:
        """Give the progress bar the error of the last block and the time that is left."""
        running = time.perf_counter() - self._block_started
        left = seconds_left(self._block_seconds, running, remaining, closing=self._measure_seconds)
        if self._last_error is not None and left is not None:
            pl_module.log_dict({"error": self._last_error, "seconds_left": left}, prog_bar=True, logger=False)

    def _measure(self, label: str, trainer: Trainer, pl_module: LightningModule, blocks: int) -> None:
        """Run the Trainer's validation loop, and keep and log the perplexities; nothing without validation data."""
        assert isinstance(pl_module, CausalLMModule)
        started = time.perf_counter()
        pl_module.measured_state = label
        if trainer.enable_validation:
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating = True
            loop.setup_data()
            if not loop.skip:
                loop.run()
            trainer.training = True
        self._perplexity[label] = {name: measured.perplexity for name, measured in pl_module.measured.items()}
        log_perplexity(trainer.loggers, self._perplexity[label], blocks)
        self._measure_seconds = time.perf_counter() - started
        self._seconds["evaluate"] += self._measure_seconds
