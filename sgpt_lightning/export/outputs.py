"""Where an export goes: nowhere that something is already, and whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sgpt_lightning.format.directory import replacing


def check_output(output: str | Path) -> Path:
    """Return the place of an export, `~` expanded; nothing is written.

    Raises:
        FileExistsError: something is there already: an export replaces nothing, not even an earlier export.
    """
    place = Path(os.path.expanduser(output))
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise FileExistsError(f"the output {place} exists already: choose another or remove it")
    return place


@contextlib.contextmanager
def new_directory(output: Path, bytes_needed: int) -> Iterator[Path]:
    """Give a directory to write to, which is renamed to `output` if the block ends well, and goes if not.

    Raises:
        FileExistsError, OSError: as `check_output`, and as `format.directory.replacing`.
    """
    with replacing(check_output(output), bytes_needed) as partial:
        yield partial
        check_output(output)


@contextlib.contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Give a path to write a file to, which is renamed to `output` if the block ends well, and goes if not.

    Raises:
        FileExistsError: something is there already.
        OSError: it cannot be written.
    """
    if output.is_dir():
        raise FileExistsError(f"the output {output} is a directory: name a file, such as {output}/model.safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        yield Path(folder, output.name)
        check_output(output)
        Path(folder, output.name).chmod(0o666 & ~_umask())
        Path(folder, output.name).rename(output)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
