"""What one arm measured with one seed, as a row; rows are kept as JSON lines, so that an interrupted study goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

DENSE = "dense"
"""Name of the row of the model as it is."""


@dataclass(frozen=True)
class Row:
    """One arm, one seed."""

    arm: str
    family: str
    seed: int | None
    """Of the calibration windows; None for the dense model."""
    key: str
    """See `row_key`."""
    bits_per_weight: float | None = None
    """True bits per weight of the linears that were compressed."""
    file_bytes: int | None = None
    """Of the whole weights file; for the dense model 2 bytes a parameter."""
    perplexity: Mapping[str, float] = field(default_factory=dict)
    """By text."""
    output_error: float | None = None
    """Squared error of the compressed linears' outputs as a fraction of the outputs, on held-out windows, the mean over
    the linears."""
    zeros: float | None = None
    """Fraction of the compressed linears' weights that are zero."""
    seconds: float = 0.0
    """That compressing took, without measuring."""
    peak_bytes: int | None = None
    """The most memory that was held meanwhile, what was there before included; None where the system does not tell."""
    growth_bytes: int | None = None
    """What of it came on top of what was held before; the allocator of the CPU keeps what an earlier arm took."""
    error: str | None = None
    """Why the arm failed; nothing else is measured then."""

    def flat(self) -> dict[str, Any]:
        """Return one plain dict, texts beside the other columns, as CSV has it."""
        values = asdict(self)
        method, texts = values.pop("arm"), values.pop("perplexity")
        return {"method": method} | values | texts


def package_version() -> str:
    """Return the version of this package and a digest of its source, so that no row outlives the code it came from."""
    return f"{metadata.version('sgpt-lightning')}+{_source_digest()}"


@cache
def _source_digest() -> str:
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def row_key(**parts: Any) -> str:
    """Return a hash of all that decides a row: arm, model, texts, seed, device and version, as plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Journal:
    """Rows by key, kept in a file to which a line is added as soon as a row is measured.

    A line that an interrupt cut off, which can only be the last one, is dropped, and its arm is run again.

    Args:
        path: made when the first row is added, its directory too; None keeps rows in memory only.

    Raises:
        ValueError: the file holds something else; names it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = Row(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {number} of {path} is no row of a study ({error}): move the file") from error
            self._rows[row.key] = row
        if whole != text:
            path.write_text(whole)

    def get(self, key: str) -> Row | None:
        """Return the row with a key, or None."""
        return self._rows.get(key)

    def add(self, row: Row) -> None:
        """Keep a row; a failed one is not kept, so that it is tried again."""
        if row.error is not None:
            return
        self._rows[row.key] = row
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns of `Row.flat`, texts last."""
    own = ["method", *(f.name for f in fields(Row) if f.name not in ("arm", "perplexity"))]
    return own + list(dict.fromkeys(text for row in rows for text in row.perplexity))
