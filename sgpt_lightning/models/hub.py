"""The Hugging Face hub: its cache first, then its own client, and one message that says what to do instead.

What is in the cache is left to the client, with or without a network. For anything else the client is asked once, with
a short timeout: loading would retry for 23 s a data set before it says that there is no network.
"""

import os
from pathlib import Path
from typing import Literal

HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer."""


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
