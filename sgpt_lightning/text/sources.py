"""Names of texts -> documents: the data sets that the papers use, Python's own documentation, and local files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sgpt_lightning.messages import did_you_mean, told
from sgpt_lightning.models.hub import hub_help, require_hub

Role = Literal["calibration", "evaluation"]

REMEDY = "give `python-docs`, or the path of a .txt, .jsonl or .parquet file or of a folder of them"


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
    require_hub(repo, "dataset", wanted, REMEDY)
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(repo, *args, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConnectionError(hub_help(wanted, told(error), REMEDY)) from error
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
    return [path.read_text(encoding="utf-8")]


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
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        names = parquet.read_schema(path).names
        documents = parquet.read_table(path, columns=["text"])["text"].to_pylist() if "text" in names else []
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file, or a damaged one: {error}") from error
    if "text" not in names:
        raise ValueError(f"{path} has no column `text`, only {names}")
    if not all(isinstance(document, str) for document in documents):
        raise ValueError(f"{path} has rows whose `text` is not a string")
    return documents


READERS: dict[str, Callable[[Path], list[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix in READERS and file.is_file()]


def _read_file(path: Path) -> list[str]:
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_path(path: Path) -> list[str]:
    return [document for file in _text_files(path) for document in _read_file(file)]


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
        role: which part is wanted, and which argument is named in errors; local text has only one part.

    Raises:
        ValueError: no such name or path, or no text in it.
    """
    if name in SOURCES:
        return SOURCES[name][role]
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{role} text source {name!r} is neither one of {', '.join(SOURCES)} nor an existing file or folder"
            f"{did_you_mean(name, SOURCES)}"
        )
    if not _text_files(path):
        raise ValueError(f"{role} text source {name!r} holds no {', '.join(READERS)} file")
    return Source("all", partial(_read_path, path))
