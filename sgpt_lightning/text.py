"""Text -> windows of tokens, and the protocol that says how a window was made.

A perplexity compares only with another one of the same protocol, so every set of windows carries its own: data set and
hash of the text, split, joining, tokenizer, BOS, window length, selection and count. Two protocols exist. *Whole text*:
documents are joined, tokenized at once and cut into windows without overlap, the tail dropped; this is how GPTQ (arXiv
2210.17323) and SparseGPT (2301.00774) evaluate. *Drawn*, for C4: a random window of a random document that is longer
than a window, with the draws of the published code: those of SparseGPT for calibration, and for evaluation (seed 0, 256
windows) those of the `get_c4` that descends from GPTQ. SparseGPT itself evaluates C4 as `c4-new`. A document of exactly
one window is skipped here; it crashes the published code.

Left out on purpose: batches, ranks and Lightning (see `data.py`); dtype and attention, which the model's owner adds.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from sgpt_lightning.models import hub_help, require_hub

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Role = Literal["calibration", "evaluation"]

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


@dataclass(frozen=True)
class Source:
    """One part of one data set."""

    split: str
    """Name of the part."""
    load: Callable[[], Sequence[str]]
    """Gives the documents; the first call may download."""
    joining: str = "\n\n"
    """What to put between documents."""
    documents: int | None = None
    """Only so many of the first documents."""
    windows: int | None = None
    """At most so many windows in an evaluation."""
    drawn: bool = False
    """Windows are drawn from single documents instead of cut from the joined text."""


class Column(Sequence[str]):
    """One text column of a hub data set, read row by row: C4's first training shard is 356,317 documents."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index][self._name]


def _from_hub(column: str, repo: str, *args: str, **options: Any) -> Sequence[str]:
    wanted = f"the data set {repo} of the Hugging Face hub"
    require_hub(wanted)
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(repo, *args, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConnectionError(hub_help(wanted, f"{type(error).__name__}: {error}")) from error
    return Column(dataset, column)


def _python_topics(held_out: bool) -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python comes without `pydoc_data.topics`, the text of `python-docs`: use a Python that has it "
            "(python.org, conda, uv), or the path of a .txt, .jsonl or .parquet file"
        ) from error
    return [topics[name] for name in sorted(topics) if _is_held_out(name) == held_out]


def _is_held_out(topic: str) -> bool:
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 4 == 0


def _read_txt(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{path}, line {number} has no field `text` that holds a string")
            documents.append(record["text"])
    return documents


def _read_parquet(path: Path) -> list[str]:
    from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

    try:
        names = parquet.read_schema(path).names
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error
    if "text" not in names:
        raise ValueError(f"{path} has no column `text`, only {names}")
    documents = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    if not all(isinstance(document, str) for document in documents):
        raise ValueError(f"{path} has rows whose `text` is not a string")
    return documents


READERS: dict[str, Callable[[Path], list[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in READERS and file.is_file()]


def _read_path(path: Path) -> list[str]:
    return [document for file in _text_files(path) for document in READERS[file.suffix](file)]


_WIKITEXT = partial(_from_hub, "text", "Salesforce/wikitext", "wikitext-2-raw-v1")
# `datasets` >= 4 runs no loading scripts; the hub keeps a parquet copy of this data set on a branch of its own.
_PTB = partial(_from_hub, "sentence", "ptb-text-only/ptb_text_only", revision="refs/convert/parquet")
_C4_TRAIN = partial(
    _from_hub, "text", "allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"}, split="train"
)
_C4_VALIDATION = partial(
    _from_hub,
    "text",
    "allenai/c4",
    data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
    split="validation",
)

SOURCES: dict[str, dict[Role, Source]] = {
    "python-docs": {
        "calibration": Source("calibration topics", partial(_python_topics, held_out=False)),
        "evaluation": Source("held-out topics", partial(_python_topics, held_out=True)),
    },
    "wikitext2": {
        "calibration": Source("train", partial(_WIKITEXT, split="train")),
        "evaluation": Source("test", partial(_WIKITEXT, split="test")),
    },
    "ptb": {
        "calibration": Source("train", partial(_PTB, split="train"), joining=" "),
        "evaluation": Source("test", partial(_PTB, split="test"), joining=" "),
    },
    "c4": {
        "calibration": Source("train, shard 0", _C4_TRAIN, drawn=True),
        "evaluation": Source("validation, shard 0", _C4_VALIDATION, drawn=True, windows=256),
    },
    "c4-new": {
        "calibration": Source("train, shard 0", _C4_TRAIN, drawn=True),
        "evaluation": Source("validation, shard 0", _C4_VALIDATION, joining=" ", documents=1100, windows=256),
    },
}
"""Every text source that has a name; anything else is a path."""


def find_source(name: str, role: Role) -> Source:
    """Return where the text called `name` comes from, without loading it.

    Args:
        name: a name in `SOURCES`, or the path of a .txt, .jsonl or .parquet file (field `text`) or of a folder, whose
            files of these kinds are taken in the order of their paths. Names go before paths: write `./c4` for a path.
        role: which part is wanted; local text has only one.

    Raises:
        ValueError: no such name or path, or no text in it.
    """
    if name in SOURCES:
        return SOURCES[name][role]
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"text source {name!r} is neither one of {', '.join(SOURCES)} nor an existing file or folder")
    if not _text_files(path):
        raise ValueError(f"text source {name!r} holds no {', '.join(READERS)} file")
    return Source("all", partial(_read_path, path))


def calibration_windows(
    name: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int, num_samples: int, seed: int
) -> Windows:
    """Take windows at random from the calibration part of a text, in the order drawn.

    Windows of a whole text are distinct; all there are, with a UserWarning, when there are fewer than asked for.

    Args:
        name: see `find_source`.
        tokenizer: see `sgpt_lightning.models.load_tokenizer`.
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
        tokenizer: see `sgpt_lightning.models.load_tokenizer`.
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
