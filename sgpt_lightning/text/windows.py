"""Text -> windows of tokens, and the protocol that says how a window was made.

A perplexity compares only with another one of the same protocol, so every set of windows carries its own: data set and
hash of the text, split, joining, tokenizer, BOS, window length, selection and count. Two protocols exist. *Whole text*:
documents are joined, tokenized at once and cut into windows without overlap, the tail dropped; this is how GPTQ (arXiv
2210.17323) and SparseGPT (2301.00774) evaluate. *Drawn*, for C4: a random window of a random document that is longer
than a window, with the draws of the published code: those of SparseGPT for calibration, and for evaluation (seed 0, 256
windows) those of the `get_c4` that descends from GPTQ. SparseGPT itself evaluates C4 as `c4-new`. A document of exactly
one window is skipped here; it crashes the published code.

Left out on purpose: where texts come from (see `sources.py`), batches and ranks (`trainer/data.py`), and dtype and
attention, which the model's owner adds.
"""

import hashlib
import random
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.text.sources import SOURCES, Source, find_source

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MAX_SKIPS = 10_000
"""Documents in a row that may be too short before a draw is given up. On C4 a 2,048-token window takes about 40."""


@dataclass(frozen=True)
class TextProtocol:
    """How a set of windows was made; plain values, so that `dataclasses.asdict` is JSON."""

    dataset: str
    """Name in `SOURCES`, or the file's or folder's own name."""
    sha256: str
    """Of the text that was tokenized, UTF-8; of drawn documents, in the order drawn, joined by `joining`."""
    split: str
    """Part of the data set; `all` for local text."""
    joining: str
    """What stands between two documents."""
    tokenizer: str
    """Name, directory or hub id, as given."""
    bos: bool
    """Whether the tokenizer put its BOS token in front of the text."""
    seq_len: int
    """Tokens in a window."""
    selection: str
    """Which windows were taken of those there are."""
    windows: int
    """Number of windows."""
    tokens: int
    """Tokens in all windows; each window predicts `seq_len - 1` of its own."""


class Windows(NamedTuple):
    """Windows and how they were made."""

    ids: Tensor
    """Token ids, int64 `[windows, seq_len]`."""
    protocol: TextProtocol


def calibration_windows(
    name: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int, num_samples: int, seed: int
) -> Windows:
    """Take windows at random from the calibration part of a text, in the order drawn.

    Windows of a whole text are distinct; all there are, with a UserWarning, when there are fewer than asked for.

    Args:
        name: see `find_source`.
        tokenizer: see `sgpt_lightning.models.names.load_tokenizer`.
        seq_len: tokens in a window, at least 2.
        num_samples: windows to take, at least 1.
        seed: of the draw; the global generators are left alone.

    Raises:
        ValueError: a number is too small, the source is unknown, or the text is shorter than one window.
        ConnectionError: the source is on the hub and cannot be loaded from there.
    """
    _check_at_least(seq_len=(seq_len, 2), num_samples=(num_samples, 1))
    source = find_source(name, "calibration")
    if source.drawn:
        return _draw(name, source, tokenizer, seq_len, num_samples, seed)
    cut = _cut(name, source, tokenizer, seq_len)
    total = len(cut.ids)
    if total < num_samples:
        warnings.warn(
            f"num_samples is {num_samples}, but {name!r} has only {total} windows of {seq_len} tokens: all are used",
            UserWarning,
            stacklevel=2,
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return _describe(cut.ids[order], cut.protocol, f"{len(order)} of {total} at random, seed {seed}")


def evaluation_windows(
    name: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int, eval_windows: int | None = None
) -> Windows:
    """Take the first windows of the evaluation part of a text, in order.

    Args:
        name: see `find_source`.
        tokenizer: see `sgpt_lightning.models.names.load_tokenizer`.
        seq_len: tokens in a window, at least 2.
        eval_windows: how many at most; None takes all that the protocol has.

    Raises:
        ValueError: a number is too small, the source is unknown, or the text is shorter than one window.
        ConnectionError: the source is on the hub and cannot be loaded from there.
    """
    _check_at_least(seq_len=(seq_len, 2), eval_windows=(1 if eval_windows is None else eval_windows, 1))
    source = find_source(name, "evaluation")
    limits = [limit for limit in (source.windows, eval_windows) if limit is not None]
    if source.drawn:
        return _draw(name, source, tokenizer, seq_len, min(limits), seed=0)
    cut = _cut(name, source, tokenizer, seq_len)
    kept = cut.ids[: min(limits, default=None)].clone()  # a copy, so that the rest can be freed
    return _describe(kept, cut.protocol, f"first {len(kept)} of {len(cut.ids)}")


def _check_at_least(**arguments: tuple[int, int]) -> None:
    small = {name: value for name, (value, least) in arguments.items() if value < least}
    if small:
        rules = ", ".join(f"{name} >= {arguments[name][1]}" for name in small)
        raise ValueError(f"too small: {small}, need {rules}")


def _tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: a whole text is meant to be longer than the model's context, so no warning about it.
    return tokenizer(text, verbose=False)["input_ids"]


def _cut(name: str, source: Source, tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Windows:
    text = source.joining.join(source.load()[: source.documents])
    tokens = _tokenize(text, tokenizer)
    count = len(tokens) // seq_len
    if count == 0:
        raise ValueError(
            f"text source {name!r} ({source.split}) has {len(tokens)} tokens, fewer than one window of "
            f"seq_len {seq_len}: shorten seq_len or give more text"
        )
    ids = torch.tensor(tokens[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    return _describe(ids, _protocol(name, source, tokenizer, text, tokens[0]), "all")


def _draw(
    name: str, source: Source, tokenizer: "PreTrainedTokenizerBase", seq_len: int, count: int, seed: int
) -> Windows:
    documents = source.load()
    # Python's generator, not torch's: the published code draws from it, so one seed gives the same windows.
    generator = random.Random(seed)
    rows: list[list[int]] = []
    drawn: list[str] = []
    skips, first = 0, -1
    while len(rows) < count:
        document = documents[generator.randint(0, len(documents) - 1)]
        tokens = _tokenize(document, tokenizer)
        if len(tokens) <= seq_len:
            skips += 1
            if skips == MAX_SKIPS:
                raise ValueError(
                    f"text source {name!r} ({source.split}): none of {MAX_SKIPS} documents drawn in a row is longer "
                    f"than seq_len {seq_len}: shorten seq_len, or use a source whose documents are joined (`c4-new`)"
                )
            continue
        start = generator.randint(0, len(tokens) - seq_len - 1)
        rows.append(tokens[start : start + seq_len])
        drawn.append(document)
        skips, first = 0, tokens[0]
    protocol = _protocol(name, source, tokenizer, source.joining.join(drawn), first)
    return _describe(torch.tensor(rows, dtype=torch.int64), protocol, f"{count} drawn from documents, seed {seed}")


def _protocol(
    name: str, source: Source, tokenizer: "PreTrainedTokenizerBase", text: str, first_token: int
) -> TextProtocol:
    return TextProtocol(
        dataset=name if name in SOURCES else Path(name).name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        split=source.split,
        joining=source.joining,
        tokenizer=tokenizer.name_or_path,
        bos=first_token == tokenizer.bos_token_id,
        seq_len=0,
        selection="",
        windows=0,
        tokens=0,
    )


def _describe(ids: Tensor, protocol: TextProtocol, selection: str) -> Windows:
    windows, seq_len = ids.shape
    return Windows(
        ids, replace(protocol, seq_len=seq_len, selection=selection, windows=windows, tokens=windows * seq_len)
    )
