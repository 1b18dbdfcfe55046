"""Runs of the callback on tiny models: a second each, on the CPU."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from models_for_tests import make_model, make_tokens
from torch import Tensor
from torch.utils.data import DataLoader

from sgpt_lightning.models.names import load_tokenizer

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def make_trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Make a Trainer that prints, logs and keeps nothing of its own unless asked."""
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": root}
    return Trainer(callbacks=list(callbacks), **(QUIET | defaults | settings))


def make_loader(windows: int = 6, time: int = 24, batch_size: int = 3, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    """Make a loader of random windows, in order and without padding."""
    return DataLoader([{"input_ids": row} for row in make_tokens(windows, time, seed)], batch_size=batch_size)


def make_dense_directory(directory: Path, **settings: Any) -> Path:
    """Save a tiny OPT with float16 weights and the embedded tokenizer; its config does not say in which dtype it is."""
    tokenizer = load_tokenizer("opt-mini")
    make_model("opt", vocab_size=len(tokenizer), max_position_embeddings=128, **settings).half().save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weight_file(directory: Path) -> Path:
    """Return the one weight file of a model's directory, whatever it is called."""
    (found,) = directory.glob("*.safetensors")
    return found
