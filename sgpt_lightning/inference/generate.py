"""Text of a compressed model beside the dense model's: same tokenizer, prompt, decoding and random numbers.

The two are in memory one after the other. The manifest knows the dense model by name; where that leads nowhere (a
directory that is gone, no network), the compressed model's text stands alone and the reason beside it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import read_description
from sgpt_lightning.format.directory import find_directory, read_settled
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.models.names import load_tokenizer


class Continuation(NamedTuple):
    """What two models made of one prompt."""

    compressed: str
    """Text after the prompt."""
    dense: str | None
    """The dense model's; None if it was not to be had."""
    dense_name: str | None
    """What the dense model was looked for as."""
    why_no_dense: str
    """Why it was not to be had; empty if it was."""
    agreement: tuple[int, int] | None
    """Tokens up to the first that differs, and tokens of the longer text; None without a dense model."""


def generate_beside(
    directory: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    dense: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Continuation:
    """Continue a prompt with the compressed and the dense model.

    Args:
        directory: what `save_compressed` wrote, with its tokenizer.
        prompt: text to continue.
        tokens: most tokens to write.
        dense: name of the model to compare with, as for `load_model`; None for the one that the manifest names.
        temperature: 0 takes the likeliest token; else one is drawn.
        seed: of the draws; the global random state is left as it is.

    Raises:
        CheckpointError: `directory` is not a compressed model, or is damaged.
        ValueError: an argument is out of range, the prompt is empty or too long, or `dense` does not exist.
        OSError: `dense` was asked for and cannot be loaded.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must not be negative, got {temperature:g}")
    described = read_settled(directory, read_description)
    tokenizer = load_tokenizer(str(find_directory(directory)))
    encoded = tokenizer(prompt, return_tensors="pt")
    model = load_compressed(directory)
    _check_length(model, encoded["input_ids"].shape[1], tokens)
    first = _continue(model, encoded, tokens, temperature, seed)
    del model
    name, why, second = dense or described.manifest.record.model, "", None
    if name is None:
        why = "the manifest does not name it"
    else:
        try:
            dtype = getattr(torch, described.description.compute_dtype)
            other = load_model(name, dtype=dtype, attn_implementation=described.description.attn_implementation)
            second = _continue(other, encoded, tokens, temperature, seed)
        except (OSError, ValueError) as error:
            if dense is not None:
                raise
            why = str(error).splitlines()[0]
    texts = [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True) for ids in (first, second)]
    return Continuation(texts[0] or "", texts[1], name, why, None if second is None else _agreement(first, second))


def _check_length(model: Any, prompt: int, tokens: int) -> None:
    if prompt < 1:
        raise ValueError("prompt must hold at least one token")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and prompt + tokens > positions:
        raise ValueError(
            f"prompt and tokens must fit the model's {positions} positions, got {prompt} and {tokens}: ask for fewer"
        )


def _continue(model: Any, encoded: Any, tokens: int, temperature: float, seed: int) -> Tensor:
    """Return the new tokens, int64 `[tokens]`."""
    from transformers import GenerationConfig

    ids = encoded["input_ids"]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    ends = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = ends[0] if isinstance(ends, list) else ends
    # Not the model's own settings: what it publishes as taste (a temperature, a penalty) is not what is compared.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, max_new_tokens=tokens, **sampling)
    with own_random_state(), torch.no_grad():
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]


def _agreement(first: Tensor, second: Tensor) -> tuple[int, int]:
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    different = (first[:shorter] != second[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter, longer


def show(directory: str | Path, found: Continuation) -> str:
    """Return what `sgpt generate` prints: both texts, and how far they agree."""
    parts = [f"== compressed: {directory}\n{found.compressed}"]
    if found.dense is None:
        parts.append(f"== dense: not shown, {found.why_no_dense} (--dense MODEL)")
    else:
        parts.append(f"== dense: {found.dense_name}\n{found.dense}")
    if found.agreement is not None:
        parts.append("== the first {} of {} tokens are the same".format(*found.agreement))
    return "\n\n".join(parts)
