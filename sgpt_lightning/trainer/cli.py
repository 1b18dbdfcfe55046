"""`sgpt fit` and `sgpt validate`: LightningCLI with fixed classes.

The only module that imports jsonargparse. Classes are fixed, so a config has no class_path: `model`, `data`, `sgpt`
(the callback) and `trainer` are plain groups of settings.
"""

import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import ActionConfigFile, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from sgpt_lightning.calibration.ranks import RankError
from sgpt_lightning.messages import did_you_mean
from sgpt_lightning.models.hub import silence_transformers
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.dry_run import forecast_fit
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.progress import CompressionProgressBar, ProgressLines
from sgpt_lightning.trainer.protocols import closing_line_of
from sgpt_lightning.trainer.setup import IncompleteRunError

USAGE = {
    "fit": "sgpt fit --config FILE [--model.path MODEL] [--sgpt.recipe.sparsity 0.5] [--ckpt_path last] ...",
    "validate": "sgpt validate --config FILE [--model.path MODEL_OR_DIRECTORY] ...",
}


class Parser(LightningArgumentParser):
    """A parser whose errors are one message, with a remedy where there is one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a ValueError, for the command line to print."""
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        hint = _hint(message, options) or "\n  `sgpt fit --help` and `sgpt validate --help` list all settings"
        raise ValueError(f"{message}{hint}") from ex


def _hint(message: str, options: Sequence[str]) -> str:
    """Return what to write instead, for an option or key that is unknown and for a list without quotes."""
    unknown = re.search(r"(?:unrecognized arguments: --|option ')([\w.-]+)", message)
    if unknown:
        names = [option.removeprefix("--") for option in options]
        same_end = [name for name in names if name.rpartition(".")[2] == unknown[1].rpartition(".")[2]]
        hint = did_you_mean(unknown[1], same_end, cutoff=0.0) or did_you_mean(unknown[1], names)
        return hint.replace("mean ", "mean --") if "arguments: --" in message else hint
    no_list = re.search(r'key "([\w.]+)":\s+Expected a <class \'collections.abc.Sequence\'>. Got value: (.*)', message)
    if no_list:
        entries = [entry.strip() for entry in no_list[2].strip("[]").split(",")]
        return f"\n  Write a list with quotes: --{no_list[1]} '{json.dumps(entries)}'"
    return ""


class SGPTCli(LightningCLI):
    """LightningCLI with fixed classes and the callback as the group `sgpt`."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            super().__init__(
                CausalLMModule,
                TextDataModule,
                trainer_class=Trainer,
                trainer_defaults={
                    "max_epochs": 1,  # the callback sets it to the number of blocks
                    "default_root_dir": "runs",
                    "enable_model_summary": False,
                    "devices": 1,
                },
                save_config_kwargs={"overwrite": True},
                seed_everything_default=False,
                auto_configure_optimizers=False,
                parser_kwargs={command: {"usage": usage} for command, usage in USAGE.items()},
            )
        except BaseException as error:
            error.add_note(self._what_is_left())
            raise

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make our own kind of parser, one for each command."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a file of settings, in YAML")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer `fit` and `validate` of the Trainer."""
        datamodule = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": datamodule, "validate": datamodule}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback; the data takes tokenizer and window length from the model."""
        parser.add_lightning_class_args(SparseGPTCallback, "sgpt")
        # The default recipe has resolved itself for its own preset and coding; a config may name others.
        parser.set_defaults({f"sgpt.recipe.{f.name}": None for f in fields(Recipe) if f.default is None})
        parser.add_argument("--dry_run", action="store_true", help="fit: say what it would take, and do not do it")
        parser.link_arguments("model.path", "data.tokenizer")
        parser.link_arguments("model.seq_len", "data.seq_len", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard, show our own progress, keep a checkpoint, unless the config asks for something else."""
        trainer = self.config_init[self.subcommand].trainer
        if trainer.logger in (None, True) and "logger" not in kwargs:
            kwargs["logger"] = TensorBoardLogger(trainer.default_root_dir, default_hp_metric=False)
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            bar = sys.stderr.isatty() if trainer.enable_progress_bar is None else trainer.enable_progress_bar
            shown: Callback = CompressionProgressBar() if bar else ProgressLines()
            callbacks = [shown, *callbacks]
            kwargs |= {"callbacks": callbacks, "enable_progress_bar": bar}
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        elif trainer.enable_checkpointing is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, LastCheckpoint()]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: checkpoints hold no settings to take over, and are compared with those that are given."""

    def before_fit(self) -> None:
        """Remember which directory, if any, the compressed model is about to replace; begin where nothing is kept.

        A dry run ends here.
        """
        if self.config_init.fit.dry_run:
            print(forecast_fit(self.trainer, self.model, self.datamodule, self._callback()).lines())
            raise SystemExit(0)
        self._before = _identity(self._callback().target(self.trainer))
        if self.config_init.fit.ckpt_path == "last" and not self._last_checkpoints():
            # As for Lightning, which would say the same: a job that is queued again may always ask for it.
            warnings.warn("ckpt_path='last': there is no checkpoint yet, the run begins anew", stacklevel=2)
            self.config_init.fit.ckpt_path = None

    def after_validate(self) -> None:
        """Print the closing line, where the model is a compressed one that was measured like the dense one."""
        line = closing_line_of(self.trainer, self.model)
        if line:
            print(line)

    def _callback(self) -> SparseGPTCallback:
        return self._get(self.config_init, "sgpt")

    def _last_checkpoints(self) -> set[str]:
        kept = (c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        return {path for checkpoint in kept for path in checkpoint._find_last_checkpoints(self.trainer)}

    def _what_is_left(self) -> str:
        """Return what became of the run, for a user who stopped it, and the command that goes on."""
        if getattr(self, "trainer", None) is None or self.subcommand != "fit":
            return "no model was changed"
        target = self._callback().target(self.trainer)
        now = _identity(target)
        if now not in (None, self._before):
            return f"the run is complete, and its model is in {target}"
        left = f"{self._what_is_kept()}; "
        if self._before is None:
            return f"{left}nothing was written to {target}"
        if now is None:  # stopped between the two renames of a save
            return f"{left}the earlier model in {target} is put back when it is next used"
        return f"{left}the earlier model in {target} is intact"

    def _what_is_kept(self) -> str:
        """Return how much of what was solved a checkpoint holds, and the command that goes on from it."""
        last = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        if last is not None and last.kept:
            return f"all up to {last.label} is kept, and `{_command_to_go_on()}` goes on from there"
        solved = len(self._callback().solved)
        return f"{solved} solved linears are lost, no checkpoint was kept" if solved else "nothing was solved yet"


def _command_to_go_on() -> str:
    """Return the command line that was given, with the last checkpoint to go on from."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--ckpt_path=")]
    if "--ckpt_path" in given:
        at = given.index("--ckpt_path")
        del given[at : at + 2]
    return shlex.join(["sgpt", *given, "--ckpt_path", "last"])


def _identity(directory: Path) -> int | None:
    """Return what tells a directory from one that took its place; None if there is none."""
    return directory.stat().st_ino if directory.exists() else None


def run() -> None:
    """Run `fit` or `validate`, as the command line says.

    Raises:
        ValueError: whatever is wrong with the settings or with a file of weights.
        OSError: a file or the hub.
    """
    # Lightning 2.6 calls an interface that jsonargparse deprecates; nothing a user could do about it.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # torch 2.13 deprecates a class that Lightning 2.6 still uses.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Windows are one tensor in memory: worker processes would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # "max_epochs reached", advertisements, hardware that is not there: nobody asked.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.showwarning = show_warning
    silence_transformers()
    try:
        SGPTCli()
    except MisconfigurationException as error:
        raise ValueError(f"trainer cannot be set up like this: {error}") from error
    except (SafetensorError, torch.OutOfMemoryError, IncompleteRunError, RankError) as error:
        wrong = ValueError(str(error))
        for note in error.__notes__:
            wrong.add_note(note)
        raise wrong from error


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line on stderr, above a progress bar and not into it."""
    Tqdm.write(f"sgpt: warning: {message}", file=sys.stderr)
