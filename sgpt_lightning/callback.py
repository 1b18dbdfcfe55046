"""The Lightning callback: when to watch, when to solve, when to measure, and where the results go.

Epoch k is block k (one epoch in all when calibration is one-shot), after one epoch of gradients where the recipe uses
them. The solve runs when the last batch of an epoch has
ended and not in `on_train_epoch_end`: Lightning validates before that hook, so perplexities would lag one block and
validation text would leak into the Hessians. Lightning's own validation schedule is switched off for the same reason;
the callback runs the Trainer's validation loop itself: dense, compressed, and between blocks if asked.
"""

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from sgpt_lightning.blocks import find_decoder_blocks, weight_matrix
from sgpt_lightning.calibration import Calibration, Mode, SolvedLinear, calibration_for, mean_error
from sgpt_lightning.checkpoint import Manifest, check_target, is_compressed_dir, save_compressed
from sgpt_lightning.module import CausalLMModule
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.run_logs import log_linears, log_perplexity, log_run
from sgpt_lightning.run_report import linear_reports, report_dict, status_line, summary_table, versions

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
    """

    def __init__(
        self,
        recipe: Recipe = DEFAULT_RECIPE,
        calibration: Mode = "sequential",
        save_dir: str | None = None,
        validate_every_block: bool = False,
    ) -> None:
        self.recipe = recipe
        self.calibration = calibration
        self.save_dir = save_dir
        self.validate_every_block = validate_every_block
        self.solved: dict[str, SolvedLinear] = {}
        self.manifest: Manifest | None = None
        self._calibration: Calibration | None = None
        self._perplexity: dict[str, dict[str, float]] = {}
        self._seconds: dict[str, float] = {}
        self._last_error: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model is loaded.

        Raises:
            TypeError: the module is not a `CausalLMModule`.
            ValueError: mixed precision, several processes, a checkpoint to resume from, or a compressed model.
            FileExistsError: the output directory exists and is not a compressed model.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLMModule):
            raise TypeError(f"SparseGPTCallback needs a CausalLMModule, got {type(pl_module).__name__}")
        if str(trainer.precision).endswith("-mixed"):
            raise ValueError(
                f"trainer.precision must not be mixed, got {trainer.precision!r}: the Hessians would be gathered in "
                "another dtype than the file is made for. Set the model's dtype instead"
            )
        if trainer.world_size != 1:
            raise ValueError(f"one process only: trainer has {trainer.world_size}; set trainer.devices to 1")
        if trainer.ckpt_path is not None:
            raise ValueError(f"resuming from a checkpoint is not supported, got ckpt_path={trainer.ckpt_path!r}")
        if is_compressed_dir(Path(pl_module.path)):
            raise ValueError(f"the model {pl_module.path} is already compressed; start from a dense one")
        check_target(self.target(trainer))
        trainer.num_sanity_val_steps = 0
        # Nothing is logged by step, but Lightning warns of epochs shorter than this. It sets the attribute late.
        trainer.log_every_n_steps = 1  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the recipe against the model, all of it, and set the number of epochs."""
        network = _network(pl_module)
        assert isinstance(pl_module, CausalLMModule)
        self.solved, self.manifest, self._perplexity, self._last_error = {}, None, {}, None
        self._seconds = {"calibrate": 0.0, "solve": 0.0, "evaluate": 0.0}
        self._calibration = calibration_for(self.calibration, network, self.recipe, pl_module.storage_dtype)
        pl_module.calibration_step = self._observe(trainer)
        pl_module.epoch_titles = self._calibration.titles
        trainer.fit_loop.max_epochs = self._calibration.epochs
        trainer.check_val_every_n_epoch = self._calibration.epochs + 1
        network.train()  # Lightning warns of a network in eval mode here; on_train_start puts it back

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of too little calibration text, and measure the dense model."""
        network = _network(pl_module)
        network.eval()
        self._warn_of_few_tokens(trainer, pl_module, network)
        self._measure("dense", trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Solve after the last batch of an epoch; show error and time left after every one."""
        assert self._calibration is not None
        epochs, done = self._calibration.epochs, trainer.current_epoch
        if trainer.is_last_batch:
            started = time.perf_counter()
            solved = self._calibration.finish(trainer.current_epoch)
            self._seconds["solve"] += time.perf_counter() - started
            self.solved |= solved
            done += 1
            if solved:
                self._last_error = mean_error(solved.values())
                log_linears(trainer.loggers, solved, done - self._calibration.preparation)
        if self._last_error is not None:
            spent = self._seconds["calibrate"] + self._seconds["solve"]
            shown = {"error": self._last_error, "seconds_left": spent / max(done, 1) * (epochs - done)}
            pl_module.log_dict(shown, prog_bar=True, logger=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model with the block that was just solved, the last time always."""
        assert self._calibration is not None
        done = trainer.current_epoch + 1
        blocks = done - self._calibration.preparation
        if done == self._calibration.epochs:
            self._measure("compressed", trainer, len(find_decoder_blocks(_network(pl_module)).blocks))
        elif self.validate_every_block and blocks:
            self._measure(f"after {blocks} blocks", trainer, blocks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the compressed model and the report, and log them."""
        assert isinstance(pl_module, CausalLMModule)
        network = _network(pl_module)
        run = {
            "model": pl_module.path,
            "calibration": {"mode": self.calibration, "protocol": _calibration_protocol(trainer)},
            "recipe": asdict(self.recipe),
            "perplexity": self._perplexity | {"protocol": _protocols(trainer, pl_module)},
            "seconds": self._seconds,
            "blocks": len(find_decoder_blocks(network).blocks),
            "versions": versions(),
        }
        self.manifest = save_compressed(
            self.target(trainer),
            network,
            self.solved,
            storage_dtype=pl_module.storage_dtype,
            tokenizer=pl_module.tokenizer,
            run=run,
        )
        report = run_directory(trainer) / "report.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(report_dict(self.manifest), indent=1) + "\n")
        log_run(trainer.loggers, self.manifest)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, after the progress bar has ended."""
        if self.manifest is not None:
            print(f"\n{summary_table(self.manifest)}\n\n{status_line(linear_reports(self.manifest))}")
            print(f"compressed model: {self.target(trainer)}\nreport: {run_directory(trainer) / 'report.json'}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module and of the calibration's tensors."""
        self._calibration = None
        if isinstance(pl_module, CausalLMModule):
            pl_module.calibration_step = None

    def target(self, trainer: Trainer) -> Path:
        """Return the directory that the compressed model is written to."""
        return Path(self.save_dir).expanduser() if self.save_dir is not None else run_directory(trainer) / "compressed"

    def _observe(self, trainer: Trainer) -> Any:
        def step(batch: Mapping[str, Tensor], batch_idx: int) -> None:
            assert self._calibration is not None
            started = time.perf_counter()
            self._calibration.observe(trainer.current_epoch, batch_idx, batch)
            self._seconds["calibrate"] += time.perf_counter() - started

        return step

    def _measure(self, label: str, trainer: Trainer, blocks: int) -> None:
        """Run the Trainer's validation loop, and keep and log the perplexities; nothing without validation data."""
        started = time.perf_counter()
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating = True
        loop.setup_data()
        if not loop.skip:
            loop.run()
        trainer.training = True
        found = {
            name.removeprefix("perplexity/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("perplexity/")
        }
        self._perplexity[label] = found
        log_perplexity(trainer.loggers, found, blocks)
        self._seconds["evaluate"] += time.perf_counter() - started

    def _warn_of_few_tokens(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        assert isinstance(pl_module, CausalLMModule)
        batch_size = getattr(trainer.train_dataloader, "batch_size", None) or 1
        tokens = int(trainer.num_training_batches) * batch_size * pl_module.seq_len
        linears = find_decoder_blocks(network).linears()
        widest = max(linears, key=lambda name: weight_matrix(linears[name]).shape[1])
        inputs = weight_matrix(linears[widest]).shape[1]
        if tokens < inputs:
            warnings.warn(
                f"{tokens} calibration tokens are fewer than the {inputs} in_features of {widest}: its Hessian will "
                "be singular and rest on damping alone; raise data.num_samples",
                stacklevel=2,
            )


def run_directory(trainer: Trainer) -> Path:
    """Return the directory of the run: the logger's, or the Trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _network(pl_module: LightningModule) -> nn.Module:
    assert isinstance(pl_module, CausalLMModule)
    assert pl_module.network is not None, "configure_model() comes first"
    return pl_module.network


def _protocols(trainer: Trainer, pl_module: CausalLMModule) -> dict[str, dict[str, Any]]:
    """Return how each perplexity was measured: the text's protocol, and the model's dtype and attention."""
    texts = getattr(getattr(trainer, "datamodule", None), "protocols", {})
    model = {
        "dtype": str(pl_module.dtype).removeprefix("torch."),
        "attn_implementation": getattr(_network(pl_module).config, "_attn_implementation", None),
    }
    return {name: (asdict(texts[name]) if name in texts else {}) | model for name in pl_module.evaluation_names()}


def _calibration_protocol(trainer: Trainer) -> dict[str, Any]:
    protocol = getattr(getattr(trainer, "datamodule", None), "calibration_protocol", None)
    return {} if protocol is None else asdict(protocol)
