"""The Lightning callback: when to watch, when to solve, when to measure, and where the results go.

Epoch k is block k, after one epoch of gradients where the recipe uses them. The solve runs when the last batch of an
epoch has ended and not in `on_train_epoch_end`: Lightning validates before that hook, so perplexities would lag one
block and validation text would leak into the Hessians. Lightning's own schedule of validation is off for the same
reason; the callback runs the Trainer's validation loop itself.

A checkpoint holds the `RunState` of the last stage that ended, in place of the model's weights. A fit that goes on from
one starts with the dense model at the epoch behind that stage; where all stages have ended, it passes the last epoch
once more without looking, and ends as any other.
"""

import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sgpt_lightning.arguments import check_choice
from sgpt_lightning.calibration.checks import least_bytes
from sgpt_lightning.calibration.hidden_states import Activations
from sgpt_lightning.calibration.ranks import ALONE
from sgpt_lightning.calibration.schedules import Mode, calibration_for
from sgpt_lightning.format.directory import check_target, is_compressed_dir
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.format.records import SolvedLinear
from sgpt_lightning.models.blocks import is_marked_compressed
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.checkpoint_io import keep_blocks
from sgpt_lightning.trainer.logs import log_earlier, log_linears, log_perplexity
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.progress import seconds_left
from sgpt_lightning.trainer.resume import RunState, begin, pass_epochs, run_settings
from sgpt_lightning.trainer.run import Run, print_results
from sgpt_lightning.trainer.setup import (
    IncompleteRunError,
    TrainerSettings,
    check_report_path,
    check_trainer,
    network_of,
    run_directory,
    use_processes,
)

DEFAULT_RECIPE = Recipe()


class SparseGPTCallback(Callback):
    """Compresses the model of a `CausalLMModule` during `trainer.fit`.

    Give it to any Trainer: it sets the number of epochs itself, measures perplexity on the validation data before and
    after, and writes the compressed model and `report.json`.

    Args:
        recipe: what to do to which linear.
        calibration: `sequential` (on the compressed blocks' outputs) or `one-shot` (on the dense model's).
        save_dir: where the compressed model goes; None for `compressed` in the run directory.
        validate_every_block: also measure perplexity after each block.
        tf32_moments: multiply the inputs of a float32 model as TF32 on CUDA; faster, and Hessians are 5e-4 off.
        activations: where hidden states are between blocks: `device`, `cpu`, `disk`, or `auto`, which takes the first
            of them that has room; the result is the same.

    Raises:
        TypeError: `recipe` is no `Recipe`.
        ValueError: an unknown way to calibrate, or place for hidden states.
    """

    def __init__(
        self,
        recipe: Recipe = DEFAULT_RECIPE,
        calibration: Mode = "sequential",
        save_dir: str | None = None,
        validate_every_block: bool = False,
        tf32_moments: bool = False,
        activations: Activations = "auto",
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {recipe!r} ({type(recipe).__name__})")
        check_choice("calibration", calibration, Mode)
        check_choice("activations", activations, Activations)
        self.recipe = recipe
        self.calibration = calibration
        self.save_dir = save_dir
        self.validate_every_block = validate_every_block
        self.tf32_moments = tf32_moments
        self.activations: Activations = activations
        self.manifest: Manifest | None = None
        self.state = RunState({})
        """How far the run has come, or the last one came."""
        self._resumed: RunState | None = None
        self._run: Run | None = None
        self._settings: TrainerSettings | None = None
        self._ranks = ALONE
        self._directory: Path | None = None
        self._report = Path()
        self._first_epoch = 0

    @property
    def solved(self) -> Mapping[str, SolvedLinear]:
        """What is stored of linears and embeddings that are solved, by full name."""
        return self.state.solved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model is loaded.

        Raises:
            TypeError: the module is not a `CausalLMModule`.
            ValueError: mixed precision, a strategy other than DDP, a limit that would end the run early, a compressed
                model, or a foreign `report.json` where the report is to go.
            FileExistsError: the output directory exists and is not a compressed model.
            RankError: another process failed.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLMModule):
            raise TypeError(f"SparseGPTCallback needs a CausalLMModule, got {type(pl_module).__name__}")
        check_trainer(trainer)
        in_memory = pl_module.network
        if is_compressed_dir(Path(pl_module.path)) or (in_memory is not None and is_marked_compressed(in_memory)):
            raise ValueError(f"the model {pl_module.path} is already compressed; start from a dense one")
        self._ranks, self._directory = use_processes(trainer), run_directory(trainer)
        self._report = self._directory / "report.json"
        with self._ranks.outcome():
            if self._ranks.is_first:
                check_target(self.target(trainer))
                check_report_path(self._report)
        keep_blocks(trainer)
        self.state, self._resumed = RunState({}), None
        self._settings = TrainerSettings.of(trainer)
        # Nothing is logged by step, but Lightning warns of epochs shorter than `log_every_n_steps`.
        self._settings._replace(num_sanity_val_steps=0, log_every_n_steps=1).apply(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the recipe against the model, all of it, and the disk, and set the number of epochs.

        Raises:
            ValueError: the run goes on from a checkpoint of another one; every difference is named.
        """
        network = network_of(pl_module)
        assert isinstance(pl_module, CausalLMModule)
        self.manifest = None
        own = {f"recipe.{name}": value for name, value in asdict(self.recipe).items()}
        own |= {"calibration": self.calibration, "tf32_moments": self.tf32_moments}
        self.state = begin(trainer, run_settings(trainer, pl_module, own), self._resumed)
        self._resumed = None
        storage = pl_module.storage_dtype
        own_settings = (self.tf32_moments, self._ranks, self.activations)
        with self._ranks.outcome():
            calibration = calibration_for(self.calibration, network, self.recipe, storage, *own_settings)
            if self._ranks.is_first:
                check_target(self.target(trainer), least_bytes(network, calibration.plans, storage))
        self._run = Run(self.state, calibration, network)
        self._first_epoch = trainer.current_epoch  # not 0 when a Trainer fits for the second time
        pl_module.stages = dict(enumerate(calibration.stages, self._first_epoch))
        pl_module.measured = {}
        trainer.fit_loop.max_epochs = self._first_epoch + self._run.stages
        trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs + 1  # never, counted from the first epoch of all
        pass_epochs(trainer, min(self.state.finished, self._run.stages - 1), self.state.text)
        network.train()  # Lightning warns of a network in eval mode here; on_train_start puts it back

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the dense model, and code its embeddings; or take up what an earlier run did.

        Raises:
            ValueError: the training data has no length, or is not that of the earlier run.
        """
        network_of(pl_module).eval()
        if trainer.num_training_batches == float("inf"):
            raise ValueError("the training data must have a length: every block is calibrated on the same batches")
        assert self._run is not None
        if "dense" not in self.state.perplexity:
            self._measure("dense", trainer, pl_module, 0)
        self._run.start(trainer)
        self.state = self._run.state
        if self.state.finished:
            log_earlier(trainer.loggers, self.state.perplexity, self.solved, self._run.calibration.plans.decoder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch to the calibration."""
        assert self._run is not None
        assert isinstance(pl_module, CausalLMModule)
        stage, loaded = trainer.current_epoch - self._first_epoch, pl_module.as_loaded(batch)
        if stage == self.state.finished:
            self._run.observe(stage, batch_idx, batch, loaded)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Solve after the last batch of an epoch; show error and time left after every one."""
        assert self._run is not None
        stage = trainer.current_epoch - self._first_epoch
        if trainer.is_last_batch and stage == self.state.finished:
            solved = self._run.finish(stage)
            self.state = self._run.state
            log_linears(trainer.loggers, solved, self._run.calibration.plans.decoder)
        self._show(self._run, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model with the block that was just solved, the last time always."""
        assert self._run is not None
        stage = trainer.current_epoch - self._first_epoch
        blocks = self._run.calibration.stages[stage].blocks
        if self._run.solves_all:
            self._measure("compressed", trainer, pl_module, blocks)
        elif self.validate_every_block and blocks and stage < self.state.finished:
            self._measure(f"after {blocks} blocks", trainer, pl_module, blocks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the compressed model and the report, and log them.

        Raises:
            IncompleteRunError: something ended the run before its last epoch.
        """
        assert isinstance(pl_module, CausalLMModule)
        run = self._check_complete(trainer)
        record = run.record(
            trainer, pl_module, self.recipe, {"mode": self.calibration, "tf32_moments": self.tf32_moments}
        )
        self.manifest = run.save(trainer, pl_module, record, self.target(trainer), self._report)
        self.state = replace(self.state, target=str(self.target(trainer)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tables, after the progress bar has ended; IncompleteRunError if there was not a single batch."""
        self._check_complete(trainer)
        assert self.manifest is not None
        print_results(self.manifest, self.target(trainer), self._report)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell others, and let go as `teardown` does, which Lightning does not call then; a signal is no success."""
        self._ranks.leave(exception)
        self.teardown(trainer, pl_module, "fit")
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the calibration's tensors, and give the Trainer its settings and the network its mode back."""
        self._run = None
        if self._settings is not None:
            self._settings.apply(trainer)
            self._settings = None
        if isinstance(pl_module, CausalLMModule):
            pl_module.stages, pl_module.measured_state = {}, ""
            if pl_module.network is not None:
                pl_module.network.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state at the end of the last stage, tensors and text; see `trainer/resume.py`."""
        return self.state.to_checkpoint() if self.state.settings else {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out weights of a model that is not whole, and how much of `max_time` this process has used."""
        checkpoint["callbacks"].pop("Timer", None)
        whole = not any(tensor.is_meta for tensor in checkpoint["state_dict"].values())
        complete = self.state.target is not None and trainer.state.status == TrainerStatus.FINISHED
        if self.state.settings and not (whole and complete):
            checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state to go on from; Lightning's loops are set by the callback.

        Raises:
            ValueError: there is none, or it is of another version.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            found = checkpoint["callbacks"].get(self.state_key)
            self._resumed = RunState.from_checkpoint(found, str(trainer.ckpt_path))
            checkpoint.pop("loops", None)

    def target(self, trainer: Trainer) -> Path:
        """Return the directory that the compressed model is written to."""
        if self.save_dir is not None:
            return Path(self.save_dir).expanduser()
        return (self._directory or run_directory(trainer)) / "compressed"

    def _check_complete(self, trainer: Trainer) -> Run:
        """Return the run; raises IncompleteRunError unless every stage ran to its end."""
        assert self._run is not None
        if not self._run.solves_all:
            done, planned, kept = self.state.finished, self._run.stages, bool(trainer.checkpoint_callbacks)
            raise IncompleteRunError.after(done, planned, len(self.solved), self.target(trainer), kept=kept)
        return self._run

    def _show(self, run: Run, pl_module: LightningModule) -> None:
        """Give the progress bar the error of the last block and the time that is left."""
        finished, running = self.state.block_seconds, time.perf_counter() - run.stage_started
        left = seconds_left(finished, running, run.stages - self.state.finished, closing=run.measure_seconds)
        if self.state.error is not None and left is not None:
            pl_module.log_dict({"error": self.state.error, "seconds_left": left}, prog_bar=True, logger=False)

    def _measure(self, label: str, trainer: Trainer, pl_module: LightningModule, blocks: int) -> None:
        """Measure the model; see `Run.measure`."""
        assert self._run is not None
        assert isinstance(pl_module, CausalLMModule)
        measured = self._run.measure(label, trainer, pl_module, self.activations)
        log_perplexity(trainer.loggers, measured, blocks)
