"""The command `sgpt`: LightningCLI for `fit` and `validate`, and `inspect` for what a directory holds.

The only module that imports jsonargparse. Classes are fixed, so a config has no class_path: `model`, `data`, `sgpt`
(the callback) and `trainer` are plain groups of settings.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from sgpt_lightning.callback import SparseGPTCallback
from sgpt_lightning.checkpoint import check_compressed
from sgpt_lightning.data import TextDataModule
from sgpt_lightning.module import CausalLMModule
from sgpt_lightning.progress import CompressionProgressBar
from sgpt_lightning.run_report import ledger_table, linear_reports, linears_table, status_line, summary_table

TRACEBACK_SWITCH = "SGPT_TRACEBACK"
USAGE = {
    "fit": "sgpt fit --config FILE [--model.path MODEL] [--sgpt.recipe.sparsity 0.5] ... (sgpt fit --help for all)",
    "validate": "sgpt validate --config FILE [--model.path MODEL_OR_DIRECTORY] ... (sgpt validate --help for all)",
}
HELP = """usage: sgpt COMMAND ...

  sgpt fit --config FILE       compress a model: perplexity, calibrate, solve, perplexity, save
  sgpt validate --config FILE  perplexity of a dense or compressed model (--model.path DIRECTORY)
  sgpt inspect DIRECTORY       what a compressed model holds: bytes, plan per linear, perplexities

`sgpt COMMAND --help` lists the settings of a command."""


class SGPTCli(LightningCLI):
    """LightningCLI with fixed classes and the callback as the group `sgpt`."""

    def __init__(self) -> None:
        super().__init__(
            CausalLMModule,
            TextDataModule,
            trainer_class=Trainer,
            trainer_defaults={
                "max_epochs": 1,  # the callback sets it to the number of blocks
                "default_root_dir": "runs",
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "devices": 1,
                "callbacks": [CompressionProgressBar()],
            },
            save_config_kwargs={"overwrite": True},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            parser_kwargs={command: {"usage": usage} for command, usage in USAGE.items()},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer `fit` and `validate` of the Trainer."""
        datamodule = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": datamodule, "validate": datamodule}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback; the data takes tokenizer and window length from the model."""
        parser.add_lightning_class_args(SparseGPTCallback, "sgpt")
        parser.link_arguments("model.path", "data.tokenizer")
        parser.link_arguments("model.seq_len", "data.seq_len", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard unless the config asks for something else."""
        trainer = self.config_init[self.subcommand].trainer
        if trainer.logger in (None, True) and "logger" not in kwargs:
            kwargs["logger"] = TensorBoardLogger(trainer.default_root_dir, default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)


def inspect(arguments: Sequence[str]) -> None:
    """Print what a compressed directory holds; raises CheckpointError if it is none."""
    parser = argparse.ArgumentParser("sgpt inspect", description="Show what a compressed model holds.")
    parser.add_argument("directory", type=Path, help="a directory that `sgpt fit` wrote")
    directory = parser.parse_args(list(arguments)).directory
    manifest = check_compressed(directory)
    run = manifest.run
    settings = ", ".join(f"{key}={value}" for key, value in run.get("recipe", {}).items())
    print(f"{directory}: {run.get('model', 'model')} compressed by sgpt_lightning\nrecipe: {settings}\n")
    print(summary_table(manifest), ledger_table(manifest), linears_table(manifest), sep="\n\n")
    print(f"\n{status_line(linear_reports(manifest))}")
    for name, protocol in run.get("perplexity", {}).get("protocol", {}).items():
        print(f"protocol of {name}: " + ", ".join(f"{key}={value!r}" for key, value in protocol.items()))


def main() -> None:
    """Run the command line; errors of the user's making are one message and exit status 2, without a traceback."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    # Lightning 2.6 calls an interface that jsonargparse deprecates; nothing a user could do about it.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # torch 2.13 deprecates a class that Lightning 2.6 still uses.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Windows are one tensor in memory: worker processes would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    try:
        if arguments[0] == "inspect":
            inspect(arguments[1:])
        else:
            SGPTCli()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_SWITCH):
            raise
        print(f"sgpt: error: {error}\n(set {TRACEBACK_SWITCH}=1 to see where)", file=sys.stderr)
        raise SystemExit(2) from error
