"""The Hugging Face hub: its cache first, then its own client, and one message that says what to do instead.

What is in the cache is left to the client, with or without a network. For anything else the client is asked once, with
a short timeout: loading would retry for 23 s a data set before it says that there is no network.
"""

import os
from pathlib import Path
from typing import Literal

HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer."""
_TICK = 20_000_000
"""Nanoseconds by which a file's time may lag behind the clock: file systems look at it a few hundred times a second."""


def require_hub(repo: str, kind: Literal["model", "dataset"], wanted: str, remedy: str) -> None:
    """Raise at once when a repository is not in the cache and the hub cannot be reached.

    A refusal is an answer: the client that loads has its own words for what is missing, private or gated. Nothing is
    asked when HF_HUB_OFFLINE is set.

    Args:
        repo: `owner/name`, or `name`.
        kind: what it is.
        wanted: what is to be fetched, for the message.
        remedy: what can be given instead, for the message.

    Raises:
        ConnectionError: no answer within `HUB_TIMEOUT` seconds.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.HF_HUB_OFFLINE or _is_cached(repo, kind):
        return
    try:
        HfApi().repo_info(repo, repo_type=kind, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return
    except (OSError, HTTPError) as error:
        raise ConnectionError(hub_help(wanted, f"{constants.ENDPOINT} cannot be reached ({error})", remedy)) from error


def _is_cached(repo: str, kind: Literal["model", "dataset"]) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model":
        return isinstance(try_to_load_from_cache(repo, "config.json"), str)
    prepared = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    return Path(prepared, repo.replace("/", "___")).is_dir()


def file_of_hub(repo: str, name: str, revision: str | None = None, cache_dir: Path | None = None) -> Path | None:
    """Return where the cache has a file of a model's repository, fetched if need be; None where that cannot be.

    Args:
        repo: `owner/name`, or `name`.
        name: of the file.
        revision: a commit; None takes the newest that can be had.
        cache_dir: as in transformers.
    """
    from transformers.utils import cached_file

    flags = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(repo, name, revision=revision, cache_dir=cache_dir, **flags)
    except OSError:  # private, and the token that fetched the others is not known here
        return None
    return None if found is None else Path(found)


def fetch_beside(file: Path, name: str, started: int) -> None:
    """Fetch another file of the snapshot in the hub's cache that a file has just come to; nothing happens elsewhere.

    Whether the network may be used is not said to those who only see the files. It may where it just was.

    Args:
        file: as it lies in the cache, which may be a link.
        name: of the other file.
        started: when loading began, in nanoseconds; a file that is older was there before.
    """
    snapshot = file.parent
    kind, *repo = snapshot.parent.parent.name.split("--")
    in_cache = snapshot.parent.name == "snapshots" and kind == "models" and repo
    if in_cache and not (snapshot / name).exists() and file.lstat().st_ctime_ns >= started - _TICK:
        file_of_hub("/".join(repo), name, snapshot.name, snapshot.parent.parent.parent)


def hub_help(wanted: str, problem: str, remedy: str) -> str:
    """Return the message for something that the hub did not give: what, why, and what to do instead."""
    return (
        f"cannot load {wanted}: {problem.rstrip('.')}.\n"
        "  - with a network: check it, and a proxy if there is one; HF_HUB_OFFLINE must not be set\n"
        f"  - without a network: {remedy}; what the hub's cache holds is found there by itself"
    )


def silence_transformers() -> None:
    """Switch off the bars for loading and writing weights, which take a second a gigabyte; for commands."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
