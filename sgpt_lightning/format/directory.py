"""A model's directory: found by readers, replaced by writers, and nothing that is not ours is removed or moved.

A model is written to `.NAME.partial` beside its place NAME, while NAME stays as it is; then NAME is renamed to
`.NAME.previous`, `.NAME.partial` to NAME, and `.NAME.previous` is removed. A directory that is being written or removed
holds a marker file, first to come and last to go, on which its writer has a lock. So a crash at any moment leaves the
old model or the new one whole, under NAME or (between the two renames) under `.NAME.previous`, where readers find it,
and litter that the next save knows to be ours: an empty directory, one with the marker, or one whose files are all
listed in our manifest. Anything else is in the way, and an error before any work.

Only a save cleans up. A reader writes nothing; where a save replaced the directory under its hands, it reads again.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

FORMAT = "sgpt"
MANIFEST = "sgpt_manifest.json"
MARKER = ".sgpt_unfinished"
ATTEMPTS = 20
"""Times that a reader begins anew because a save replaced what it read."""
_MARKER_TEXT = "sgpt_lightning was writing or removing this directory; unless it still is, the directory can go.\n"
_Read = TypeVar("_Read")


class CheckpointError(ValueError):
    """A directory that is not a compressed model, or not a whole one; the message names the file and the remedy."""


def find_directory(path: str | Path) -> Path:
    """Return the directory to read for a path that a user gave, `~` expanded.

    That is the path itself, unless it does not exist and a save was killed after it had moved the model away: then it
    is the model's place beside it. Nothing is written, and a path that is no compressed model is returned as it is.
    """
    directory = _expanded(path)
    target = directory.resolve()
    if target.exists():
        return directory
    previous = _beside(target, "previous")
    return previous if _is_whole(previous) else directory


def is_compressed_dir(path: str | Path) -> bool:
    """Tell whether `path` is a directory that `save_compressed` wrote, found as by `find_directory`."""
    return (find_directory(path) / MANIFEST).is_file()


def read_settled(path: str | Path, read: Callable[[Path], _Read]) -> _Read:
    """Return `read(directory)`, begun anew if a save replaced the directory meanwhile.

    Raises:
        CheckpointError: the directory was replaced every time. What `read` raises comes through.
    """
    for _ in range(ATTEMPTS):
        directory = find_directory(path)
        before = _identity(directory)
        try:
            found = read(directory)
        except (OSError, ValueError):
            if _identity(find_directory(path)) == before:
                raise
            continue
        if _identity(find_directory(path)) == before:
            return found
    raise CheckpointError(f"{path} was replaced {ATTEMPTS} times while it was read; wait until the saves are done")


def check_target(directory: str | Path, bytes_needed: int = 0) -> None:
    """Raise if a model cannot be saved to `directory`; nothing is written.

    Args:
        directory: where the model is to go; `~` is expanded.
        bytes_needed: bytes that the model will take, as far as they are known.

    Raises:
        FileExistsError: there, or where a save puts its files meanwhile, is something that this package did not write.
        BlockingIOError: another process is saving there.
        NotADirectoryError, PermissionError, OSError: the directory cannot be made, written to, or is too small.
    """
    target = _expanded(directory).resolve()
    _check_nothing_foreign(target, "the output directory")
    partial = _beside(target, "partial")
    for place in (partial, _beside(target, "previous")):
        _check_nothing_foreign(place, "a save needs the name")
    if _is_locked(partial / MARKER):
        raise BlockingIOError(f"another process is saving to the output directory {target}: wait for it")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"the output directory {target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the output directory {target} cannot be written: no permission to write to {parent}")
    free = shutil.disk_usage(parent).free
    if free < bytes_needed:
        raise OSError(
            f"the output directory {target} needs {bytes_needed:,} bytes, {free:,} are free: free space there or "
            "choose another"
        )


@contextlib.contextmanager
def replacing(directory: str | Path, bytes_needed: int = 0) -> Iterator[Path]:
    """Give a directory to write to, which takes the place of `directory` if the block ends well, and goes if not.

    Raises:
        FileExistsError, OSError: as `check_target`, which is asked first.
        OSError: writing fails; says what to do.
    """
    check_target(directory, bytes_needed)
    target = _expanded(directory).resolve()  # renaming a symbolic link would leave its directory behind
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        with _removed_on_failure(_beside(target, "partial")) as partial:
            with _locked(partial / MARKER):
                yield partial
                _settle(partial)
            (partial / MARKER).unlink()
            _replace(partial, target)
    except OSError as error:
        raise OSError(
            f"cannot save the model to {target}: {error}. What was there is untouched; free space, mend the "
            "permissions, or choose another directory"
        ) from error


@contextlib.contextmanager
def adding(directory: str | Path) -> Iterator[Path]:
    """Give a directory to write to, whose files go to `directory` if the block ends well, the manifest last.

    For a writer that is one of several, as those of a model and its tokenizer are: other files stay. A crash between
    two files leaves what the manifest does not describe, which readers find out.

    Raises:
        FileExistsError: a name beside it that is needed holds what this package did not write.
        OSError: writing fails.
    """
    target = _expanded(directory).resolve()
    place = _beside(target, "partial")
    _check_nothing_foreign(place, "a save needs the name")
    target.mkdir(parents=True, exist_ok=True)
    _remove(place)
    with _removed_on_failure(place) as partial:
        with _locked(partial / MARKER):
            yield partial
            _settle(partial)
            for name in sorted(_files(partial) - {MARKER}, key=lambda name: (name == MANIFEST, name)):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).replace(target / name)
        _remove(partial)


@contextlib.contextmanager
def _removed_on_failure(partial: Path) -> Iterator[Path]:
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):  # the next save tries again
            _remove(partial)
        raise


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # unlike Path.expanduser, leaves an unknown user's name alone


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _is_whole(directory: Path) -> bool:
    return _listed(directory) is not None and not (directory / MARKER).exists()


def _identity(directory: Path) -> tuple[Path, int, int]:
    try:
        found = (directory / MANIFEST).stat()
    except OSError:
        return directory, 0, 0
    return directory, found.st_ino, found.st_ctime_ns


def _listed(directory: Path) -> set[str] | None:
    """Return the names of the files that our manifest lists, itself included; None where there is no manifest."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        return None
    return {MANIFEST, *content["files"]}


def _check_nothing_foreign(place: Path, what: str) -> None:
    """Raise FileExistsError unless `place` may be removed."""
    if not os.path.lexists(place) or (place / MARKER).is_file():
        return
    listed = _listed(place)
    foreign = sorted(_files(place) - (listed or set())) if place.is_dir() else [place.name]
    if foreign and listed is None:
        raise FileExistsError(f"{what} {place} exists and is not a compressed model: choose another or remove it")
    if foreign:
        raise FileExistsError(
            f"{what} {place} holds {len(foreign)} files that sgpt_lightning did not write "
            f"({', '.join(foreign[:4])}): move them or choose another directory"
        )


def _files(directory: Path) -> set[str]:
    found = set()
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found |= {Path(folder, name).relative_to(directory).as_posix() for name in [*files, *links]}
    return found


def _recover(target: Path) -> None:
    """Bring the previous model back if a save was killed before the new one came, and remove what killed saves left."""
    previous = _beside(target, "previous")
    if _is_whole(previous) and not (target.exists() and any(target.iterdir())):
        previous.rename(target)
    _remove(previous)
    _remove(_beside(target, "partial"))


def _remove(directory: Path) -> None:
    """Remove a directory of ours, recognizable as ours until the end."""
    if not directory.exists():
        return
    (directory / MARKER).touch()
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
    (directory / MARKER).unlink()
    directory.rmdir()


@contextlib.contextmanager
def _locked(marker: Path) -> Iterator[None]:
    with marker.open("w") as file:
        file.write(_MARKER_TEXT)
        file.flush()
        with contextlib.suppress(OSError):  # a file system without locks: two savers are then not told apart
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_locked(marker: Path) -> bool:
    try:
        with marker.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no marker, or no locks
        return False
    return False


def _settle(directory: Path) -> None:
    """Give every file the permissions of the user's umask (safetensors writes 0600), and bring it to disk."""
    mode = stat.S_IMODE((directory / MARKER).stat().st_mode)
    for folder, _, files in os.walk(directory):
        for name in files:
            Path(folder, name).chmod(mode)
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    previous = _beside(target, "previous")
    moved = target.exists() and any(target.iterdir())
    if moved:
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if moved:
            previous.rename(target)
        raise
    _sync(target.parent)
    with contextlib.suppress(OSError):  # the model is in place; what is left of the old one goes with the next save
        _remove(previous)
