"""What `sgpt_manifest.json` says: typed, checked field by field when it is read, and under a checksum of its own.

`sha256` is the SHA-256 of all fields but `format`, `format_version` and itself, as JSON with sorted keys, no spaces and
ASCII only, so neither a plan nor a reported figure can change unnoticed. A fault of any kind is a CheckpointError that
names the file. Versions 1 to 4 are read as well.
"""

import hashlib
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Union, get_args, get_origin, get_type_hints

from sgpt_lightning.format.directory import FORMAT, MANIFEST, CheckpointError
from sgpt_lightning.format.layout import WeightSpec
from sgpt_lightning.format.ledger import Ledger
from sgpt_lightning.format.records import LinearReport, RunRecord

FORMAT_VERSION = 5
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHT_FILE = re.compile(r"(sgpt|model)(-\d{5}-of-\d{5})?\.safetensors")
DTYPES = ("float16", "bfloat16", "float32", "float64")
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

    compute_dtype: str
    """dtype that the model was evaluated in."""
    storage_dtype: str
    """dtype of what is not packed, where that loses nothing."""
    attn_implementation: str | None
    """Attention implementation that the model was evaluated with."""
    aliases: dict[str, str]
    """Tied tensors: name in the model -> name in the file."""
    linears: dict[str, dict[str, Any]]
    """Per compressed linear: `spec` (how to unpack it) and `report` (how it went)."""
    ledger: Ledger
    files: dict[str, FileEntry]
    """Every other file of the directory: weights, `config.json`, generation settings, the tokenizer's."""
    run: dict[str, Any]
    """Recipe, perplexities, protocols, versions: whatever the writer adds."""
    embeddings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per embedding table or output head whose weight is packed: `spec` and `report`."""

    @property
    def record(self) -> RunRecord:
        """What `run` says, in typed fields."""
        return RunRecord.from_dict(self.run)

    @property
    def packed(self) -> dict[str, WeightSpec]:
        """How to unpack each packed weight, linears first."""
        return {name: WeightSpec.from_dict(entry["spec"]) for name, entry in (self.linears | self.embeddings).items()}

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return [name for name in self.files if WEIGHT_FILE.fullmatch(name)]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest; raises CheckpointError."""
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
        version = content.pop("format_version", None)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"{path} is of format version {version!r}, this package reads 1 to {FORMAT_VERSION}: upgrade it"
            )
        if version < _FIRST_WITH_CHECKSUM:
            content = _brought_up(content, version, path)
        elif content.pop("sha256", None) != _checksum(content):
            raise CheckpointError(f"{path} does not match its own SHA-256: it was changed or damaged; copy it again")
        if version < _FIRST_WITH_LOSSES:
            content = _with_what_came_later(content)
            _add_losses(content)
        faults = _faults(content)
        if faults:
            raise CheckpointError(f"{path} is incomplete or odd ({'; '.join(faults[:4])}); compress the model again")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return cls(**{**content, "ledger": Ledger(**content["ledger"]), "files": files})

    def write(self, directory: Path) -> None:
        """Write the manifest."""
        content = json.loads(json.dumps(asdict(self)))  # as a reader will find it: keys are text, tuples are lists
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": _checksum(content), **content}
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest; raises CheckpointError on the first that is missing or differs."""
    for name, expected in manifest.files.items():
        path = directory / name
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


_FIRST_WITH_CHECKSUM = 3
"""Version 4 differs from it by the layout `coded` alone."""
_FIRST_WITH_LOSSES = 5
"""Before it, reports had no `predicted_loss`, no embedding was packed, and the ledger did not tell of what kinds of
tensors packed weights consist."""


def _add_losses(content: dict[str, Any]) -> None:
    """Say in the reports of an older manifest that no loss was predicted; what is no report is left for `_faults`."""
    linears = content.get("linears")
    for entry in linears.values() if isinstance(linears, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("report"), dict):
            entry["report"] = {"predicted_loss": None} | entry["report"]


def _with_what_came_later(content: dict[str, Any]) -> dict[str, Any]:
    """Return an older manifest with the fields that it lacks, which are empty."""
    ledger = content.get("ledger")
    return content | {
        "embeddings": {},
        "ledger": ledger | {"packed": {}} if isinstance(ledger, dict) else ledger,
    }


def _brought_up(content: dict[str, Any], version: int, path: Path) -> dict[str, Any]:
    """Return what an older manifest says in the fields of this version.

    Versions 1 and 2 had no checksum of the manifest, kept that of `config.json` in a field of its own, and called the
    weights `model.safetensors`. Version 1 had one kind of grid, one segment a row, and widths of columns only.
    """
    try:
        files = content["files"] | {CONFIG: content["config"]}
        linears = {name: dict(entry) for name, entry in content["linears"].items()}
        for entry in linears.values() if version == 1 else ():
            grid = None if entry["spec"]["widths"] is None else "zero-point"
            entry["spec"] = entry["spec"] | {"grid": grid, "group_size": None, "width_axis": "input"}
            entry["report"] = entry["report"] | {"allocation": None}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} of format version {version} is incomplete: {error!r}") from error
    return {key: value for key, value in content.items() if key != "config"} | {"files": files, "linears": linears}


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
    faults = [f"{key} is {content[key]!r}" for key in ("compute_dtype", "storage_dtype") if content[key] not in DTYPES]
    faults += _faults_of_files(content["files"], Ledger(**content["ledger"]))
    packed = [*content["linears"].items(), *content["embeddings"].items()]
    faults += [fault for name, entry in packed for fault in _faults_of_packed(name, entry)]
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


def _faults_of_packed(name: str, entry: Mapping[str, Any]) -> list[str]:
    if entry.keys() != {"spec", "report"}:
        return [f"{name} has the fields {sorted(entry)}, not spec and report"]
    try:
        spec = WeightSpec.from_dict(entry["spec"])
    except ValueError as error:
        return [f"{name}: {error}"]
    try:
        report = LinearReport.from_dict(entry["report"])
    except ValueError as error:
        return [f"{name}: {error}"]
    weights = math.prod(spec.shape)
    return [] if report.weights == weights else [f"{name} has {weights} weights, its report {report.weights}"]


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
