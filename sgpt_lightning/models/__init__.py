"""Names of models -> directories, networks and tokenizers: the model of the package, local ones, the hub's.

Everything that comes from the Hugging Face hub is asked for through `require_hub`, so that a machine without a network
is told so at once.
"""

import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from torch import nn

from sgpt_lightning.directory import find_directory
from sgpt_lightning.guards import own_random_state
from sgpt_lightning.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

EMBEDDED = ("opt-mini",)
"""Names of the model directories that are package data."""
TOKENIZER_FILES = "tokenizer.json (or tokenizer.model, or vocab.json and merges.txt) and tokenizer_config.json"
MODEL_REMEDY = "give a local model directory, with its tokenizer's files, or `opt-mini`, which ships with the package"
HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer. Without the question, no network costs 23 s of retries a data set."""


def resolve_model(path: str) -> str:
    """Return the directory of an embedded model's name; else the path to read, see `find_directory`, or the hub id."""
    return str(Path(__file__).parent / path if path in EMBEDDED else find_directory(path))


def find_model(name: str, argument: str = "model path") -> Path | None:
    """Return the directory that a name means, or None for a hub id, once the hub is known to answer.

    Args:
        name: an embedded model, a model directory or a hub id.
        argument: what the name was given for, for messages.

    Raises:
        ValueError: `name` reads like a path and is no directory.
        ConnectionError: it is a hub id and the hub cannot be reached.
    """
    path = Path(resolve_model(name)).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{argument} {name!r} is not an existing directory")
    require_hub(_hub_wanted(name, argument), MODEL_REMEDY)
    return None


def load_dense(name: str, **options: Any) -> nn.Module:
    """Load the weights of a dense model, frozen and in eval mode.

    Args:
        name: as in `find_model`.
        options: for `from_pretrained` of transformers.

    Raises:
        ValueError: a file of weights is truncated or damaged; what `find_model` raises as well.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    directory = find_model(name)
    try:
        with own_random_state():  # transformers may initialize before it loads
            model = AutoModelForCausalLM.from_pretrained(str(directory or name), **options)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of model path {name!r} cannot be read, a file is truncated or damaged: {error}; "
            "copy or download it again"
        ) from error
    return model.requires_grad_(False).eval()


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of an embedded model, a model directory or a hub id.

    Raises:
        ValueError: `name` reads like a path and is no directory, or the directory has no tokenizer.
        ConnectionError: it is a hub id and cannot be loaded from there.
    """
    directory = find_model(name, "tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory or name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if directory is not None:
            raise ValueError(_no_tokenizer(name, f"cannot be loaded: {error}")) from error
        raise ConnectionError(hub_help(_hub_wanted(name, "tokenizer"), str(error), MODEL_REMEDY)) from error
    # transformers makes a tokenizer without a single word from a directory that has only a config.json
    if set(tokenizer("a word", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise ValueError(_no_tokenizer(name, "has no vocabulary"))
    tokenizer.name_or_path = name  # not where this machine installed the package: it goes into the protocol
    return tokenizer


def _no_tokenizer(name: str, problem: str) -> str:
    return (
        f"tokenizer {name!r} {problem}\n"
        f"  The model's directory must hold {TOKENIZER_FILES}: copy them from where the model came from, or write\n"
        "  them with tokenizer.save_pretrained(directory)"
    )


def _hub_wanted(name: str, argument: str) -> str:
    return f"the {argument} {name!r} (no directory here{did_you_mean(name, EMBEDDED).rstrip('?')})"


def require_hub(wanted: str, remedy: str) -> None:
    """Raise at once when the Hugging Face hub cannot be reached, instead of after the clients' retries.

    Nothing is asked when HF_HUB_OFFLINE is set: the clients then read their cache and fail at once by themselves.

    Args:
        wanted: what is to be fetched, for the message.
        remedy: what can be given instead, for the message.

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
        raise ConnectionError(hub_help(wanted, f"{constants.ENDPOINT} cannot be reached ({error})", remedy)) from error


def hub_help(wanted: str, problem: str, remedy: str) -> str:
    """Return the message for something that the hub did not give: what, why, and what to do instead."""
    return (
        f"cannot load {wanted}: {problem.rstrip('.')}.\n"
        "  - in the hub's cache already: set HF_HUB_OFFLINE=1; not there: unset it and check the network or proxy\n"
        f"  - without a network: {remedy}"
    )
