"""What `sgpt_manifest.json` says: typed, checked field by field when it is read, and under a checksum of its own.

`sha256` is the SHA-256 of all fields but `format`, `format_version` and itself, as JSON with sorted keys, no spaces and
ASCII only, so neither a plan nor a reported figure can change unnoticed. A fault of any kind is a CheckpointError that
names the file. How weights are packed is said in `config.json`, see `description.py`; versions 1 to 6 are read as well.
"""

import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Union, get_args, get_origin, get_type_hints

from sgpt_lightning.format.description import (
    CONFIG,
    DTYPES,
    FIRST_DESCRIBED,
    FORMAT_VERSION,
    WEIGHT_FILE,
    Description,
)
from sgpt_lightning.format.directory import FORMAT, MANIFEST, CheckpointError
from sgpt_lightning.format.ledger import Ledger
from sgpt_lightning.format.older import FIRST_WITH_CHECKSUM, brought_up
from sgpt_lightning.format.records import LinearReport, RunRecord

_RUN: dict[str, Any] = {
    "model": str,
    "calibration": dict[str, Any],
    "recipe": dict[str, Any],
    "perplexity": dict[str, dict[str, Any]],
    "seconds": dict[str, Any],
    "blocks": int,
    "versions": dict[str, Any],
}
_PERPLEXITY: dict[str, Any] = {
    "dense": dict[str, float | None],
    "compressed": dict[str, float | None],
    "protocol": dict[str, dict[str, Any]],
}


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str
    """In hexadecimal."""

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        """Measure a file."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What `sgpt_manifest.json` says."""

    storage_dtype: str
    """dtype of what is not packed, where that loses nothing."""
    linears: dict[str, dict[str, Any]]
    """Per compressed linear, by full name: how it went, the fields of a `LinearReport`."""
    ledger: Ledger
    files: dict[str, FileEntry]
    """Every other file of the directory: weights, `config.json`, generation settings, the tokenizer's."""
    run: dict[str, Any]
    """Recipe, perplexities, protocols, versions: whatever the writer adds."""
    embeddings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per embedding table or output head whose weight is packed: as for linears."""

    @property
    def record(self) -> RunRecord:
        """What `run` says, in typed fields."""
        return RunRecord.from_dict(self.run)

    @property
    def reports(self) -> dict[str, LinearReport]:
        """How each packed weight went, linears first."""
        return {name: LinearReport.from_dict(report) for name, report in (self.linears | self.embeddings).items()}

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return [name for name in self.files if WEIGHT_FILE.fullmatch(name)]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest; raises CheckpointError."""
        return read_manifest(directory)[0]

    def write(self, directory: Path) -> None:
        """Write the manifest."""
        content = json.loads(json.dumps(asdict(self)))  # as a reader will find it: keys are text, tuples are lists
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": _checksum(content), **content}
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> tuple[Manifest, Description | None]:
    """Read and check the manifest, of any version.

    Returns:
        The manifest, and what one before version 6 says of the weights; None where that is `config.json`'s.

    Raises:
        CheckpointError: there is none, or it is damaged, incomplete or newer.
    """
    path = directory / MANIFEST
    content = _content(directory)
    version = content.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format version {version!r}, this package reads 1 to {FORMAT_VERSION}: upgrade it"
        )
    if version >= FIRST_WITH_CHECKSUM and content.pop("sha256", None) != _checksum(content):
        raise CheckpointError(f"{path} does not match its own SHA-256: it was changed or damaged; copy it again")
    description = None
    if version < FIRST_DESCRIBED:
        try:
            content, description = brought_up(content, version)
        except ValueError as error:
            raise CheckpointError(f"{path} is incomplete or odd ({error}); compress the model again") from error
    faults = _faults(content)
    if faults:
        raise CheckpointError(f"{path} is incomplete or odd ({'; '.join(faults[:4])}); compress the model again")
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    return Manifest(**{**content, "ledger": Ledger(**content["ledger"]), "files": files}), description


def _content(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{directory} is not a compressed model: it has no {MANIFEST}. Give a directory that `sgpt fit` wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); compress the model again") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of the format {FORMAT!r}")
    return content


def check_files(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files that the manifest lists with it.

    Raises:
        CheckpointError: the first that is missing or differs.
    """
    for name in names:
        path, expected = directory / name, manifest.files[name]
        try:
            # Links are followed: the hub's cache is made of them, and the checksum pins what they lead to.
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy the whole directory again")
            size = path.stat().st_size
            if size != expected.bytes:
                raise CheckpointError(
                    f"{path} has {size} bytes, the manifest says {expected.bytes}: truncated or replaced"
                )
            if FileEntry.of(path) != expected:
                raise CheckpointError(f"{path} does not match the manifest's SHA-256: it was changed or damaged")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _faults(content: dict[str, Any]) -> list[str]:
    """Return what is wrong with the manifest's fields; the later checks rely on the earlier ones."""
    hints = get_type_hints(Manifest)
    faults = [f"no field {name}" for name in hints if name not in content]
    faults += [f"unknown field {name}" for name in content if name not in hints]
    faults += _wrong_types(content, hints)
    if faults:
        return faults
    faults = [] if content["storage_dtype"] in DTYPES else [f"storage_dtype is {content['storage_dtype']!r}"]
    faults += _faults_of_files(content["files"], Ledger(**content["ledger"]))
    packed = [*content["linears"].items(), *content["embeddings"].items()]
    faults += [fault for name, report in packed for fault in _faults_of_report(name, report)]
    faults += [
        f"{name} is among linears and embeddings" for name in content["linears"] if name in content["embeddings"]
    ]
    faults += [f"run: {fault}" for fault in _wrong_types(content["run"], _RUN)]
    return faults or [f"run.perplexity: {f}" for f in _wrong_types(content["run"].get("perplexity", {}), _PERPLEXITY)]


def _faults_of_files(files: Mapping[str, Any], ledger: Ledger) -> list[str]:
    faults = [f"{name!r} is no name of a file in the directory" for name in files if not _is_inside(name)]
    faults += [] if CONFIG in files else [f"{CONFIG} is not among the files"]
    weights = sum(entry["bytes"] for name, entry in files.items() if WEIGHT_FILE.fullmatch(name))
    if weights != ledger.file or ledger.least < 0:
        faults.append(f"the ledger adds up to {ledger.file} bytes, the weight files to {weights}")
    return faults


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "\0" not in name and "\\" not in name and "/".join(parts) == name and not {"..", "/", MANIFEST} & set(parts)


def _faults_of_report(name: str, report: Mapping[str, Any]) -> list[str]:
    try:
        LinearReport.from_dict(report)
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def _wrong_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    wrong = [name for name, hint in hints.items() if name in values and not _fits(values[name], hint)]
    return [f"{name} is {str(values[name])[:80]!r}" for name in wrong]


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a JSON value is what an annotation asks for: plain types, unions, mappings, tuples, dataclasses."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, Union):
        return any(_fits(value, arg) for arg in args)
    if origin is dict:
        key = r"\d{1,9}" if args[0] is int else r"(?s:.*)"  # JSON's keys are text
        return isinstance(value, dict) and all(re.fullmatch(key, k) and _fits(v, args[1]) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_fits, value, args))
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        names = {field.name for field in fields(hint)}
        return isinstance(value, dict) and value.keys() == names and all(_fits(value[n], hints[n]) for n in names)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint is type(None) else type(value) is hint
