"""Names of models -> directories and tokenizers: the model that ships with the package, local ones, the hub's.

Everything that comes from the Hugging Face hub is asked for through `require_hub`, so that a machine without a network
is told so at once.
"""

import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError

from sgpt_lightning.directory import find_directory

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

EMBEDDED = ("opt-mini",)
"""Names of the model directories that are package data."""
HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer. Without the question, no network costs 23 s of retries a data set."""


def resolve_model(path: str) -> str:
    """Return the directory of an embedded model's name; else the path to read, see `find_directory`, or the hub id."""
    return str(Path(__file__).parent / path if path in EMBEDDED else find_directory(path))


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of an embedded model, a model directory or a hub id.

    Raises:
        ValueError: `name` reads like a path and is no directory.
        ConnectionError: it is a hub id and cannot be loaded from there.
    """
    path = Path(resolve_model(name)).expanduser()
    local = path.is_dir()
    if not local:
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ValueError(f"tokenizer {name!r} is not an existing directory")
        require_hub(f"the tokenizer {name!r} (no directory here)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if local else name)
    except OSError as error:
        if local:
            raise
        raise ConnectionError(hub_help(f"the tokenizer {name!r}", str(error))) from error
    tokenizer.name_or_path = name  # not where this machine installed the package: it goes into the protocol
    return tokenizer


def require_hub(wanted: str) -> None:
    """Raise at once when the Hugging Face hub cannot be reached, instead of after the clients' retries.

    Nothing is asked when HF_HUB_OFFLINE is set: the clients then read their cache and fail at once by themselves.

    Args:
        wanted: what is to be fetched, for the message.

    Raises:
        ConnectionError: no answer within `HUB_TIMEOUT` seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # a refusal is an answer
    except (OSError, HTTPException) as error:
        if isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError):
            return  # reachable; the clients bring their own certificates
        raise ConnectionError(hub_help(wanted, f"{constants.ENDPOINT} cannot be reached ({error})")) from error


def hub_help(wanted: str, problem: str) -> str:
    """Return the message for something that the hub did not give: what, why, and what to do instead."""
    return (
        f"cannot load {wanted}: {problem}.\n"
        "  - in the hub's cache already: set HF_HUB_OFFLINE=1; not there: unset it and check the network or proxy\n"
        "  - without a network: use `python-docs`, or the path of a .txt, .jsonl or .parquet file or folder, and\n"
        "    a local model directory or `opt-mini` for the tokenizer"
    )
