"""Names of models -> directories and tokenizers: the model of the package, local ones, the hub's."""

from pathlib import Path
from typing import TYPE_CHECKING

from sgpt_lightning.format.directory import find_directory
from sgpt_lightning.messages import did_you_mean
from sgpt_lightning.models.hub import hub_help, require_hub

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


EMBEDDED = ("opt-mini",)
"""Names of the model directories that are package data."""

TOKENIZER_FILES = "tokenizer.json (or tokenizer.model, or vocab.json and merges.txt) and tokenizer_config.json"

MODEL_REMEDY = "give a local model directory, with its tokenizer's files, or `opt-mini`, which ships with the package"


def resolve_model(path: str) -> str:
    """Return the directory of an embedded model's name; else the path to read, see `find_directory`, or the hub id."""
    return str(Path(__file__).parent / path if path in EMBEDDED else find_directory(path))


def find_model(name: str, argument: str = "model path") -> Path | None:
    """Return the directory that a name means, or None for a hub id, cached or within reach.

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
    require_hub(name, "model", _hub_wanted(name, argument), MODEL_REMEDY)
    return None


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
