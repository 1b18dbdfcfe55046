"""Tiny compressed models of several families and forms, and what they compute."""

import json
from pathlib import Path

import torch
from models_for_tests import make_batches, make_model, make_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.recipe import Recipe

PROBE = make_tokens(2, 10, seed=99)
CODED = Recipe(coding="entropy", target_bits_per_weight=5.0, embedding_bits=6.0)
FORMS: dict[str, tuple[str, Recipe]] = {
    "opt": ("opt", Recipe(sparsity=0.5, target_avg_bits=3.5)),
    "opt-pruned": ("opt", Recipe(sparsity=0.5, target_avg_bits=None)),
    "opt-partly": ("opt", Recipe(sparsity=0.0, target_avg_bits=4, ignore=["*.1.*"])),
    "llama": ("llama", Recipe(pattern="2:4", target_avg_bits=4.0, allocation="quantile")),
    "gpt2": ("gpt2", Recipe(sparsity=0.5, target_avg_bits=3.5)),
    "opt-coded": ("opt", CODED),
    "gpt2-coded": ("gpt2", CODED),
    "gemma2-coded": ("gemma2", CODED),
}
"""Masks, patterns, linears left alone, coded linears and tables; untied heads, tied ones, `Conv1D`, scaled tables."""


def write(
    directory: Path, family: str, recipe: Recipe, tokenizer: object = None, **settings: object
) -> PreTrainedModel:
    """Compress and save a model, which is returned as it is in memory."""
    model = make_model(family, **settings)
    solved = compress(model, make_batches(1), recipe, storage_dtype=torch.float16)
    save_compressed(directory, model, solved, storage_dtype=torch.float16, tokenizer=tokenizer)
    return model


def logits(model: nn.Module) -> Tensor:
    """Return the logits of some tokens."""
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def load(directory: Path, **options: object) -> PreTrainedModel:
    """Load a directory as a user of transformers does."""
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def described(directory: Path) -> dict:
    """Return what `config.json` says of the weights."""
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def content(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
