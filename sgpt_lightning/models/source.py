"""Where a model came from, as others may read it: a name without this machine's paths, its id on the hub, its licence.

Nothing is asked of the network: the licence is what the source's own card or config says, where that is at hand.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from sgpt_lightning.models.names import EMBEDDED

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
_TERMS = ("license", "license_name", "license_link")


class Source(NamedTuple):
    """A dense model, as a card may name it."""

    name: str
    """For people."""
    hub_id: str | None
    """`owner/name` or `name`; None if it is not known to be on the hub."""
    licence: dict[str, str]
    """What is known of the fields `license`, `license_name`, `license_link`."""


def public_name(name: str) -> str:
    """Return a name without where it lies on this machine: of what reads like a path, the last part; on one line."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    path_like = name.startswith(("/", ".", "~")) or "\\" in name or len(parts) > 2
    shown = (parts[-1] if parts else "") if path_like else name
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())


def source_of(name: str | None, model: Any) -> Source:
    """Describe the dense model that was compressed.

    Args:
        name: as the user gave it; None for what the model's config says.
        model: the model, whose config may know its licence.
    """
    config = getattr(model, "config", None)
    name = name or str(getattr(config, "_name_or_path", "") or "")
    directory = Path(name).expanduser()
    local = name in EMBEDDED or not name or directory.exists()
    hub_id = None if local or not _HUB_ID.fullmatch(name) else name
    card = directory / CARD if local and name else _cached_card(hub_id)
    terms = _metadata(card) if card is not None else {}
    licence = _licence(terms) or _licence({"license": getattr(config, "license", None)})
    return Source(public_name(name) if not local or name in EMBEDDED else _last_part(name), hub_id, licence)


def source_on_card(directory: Path, name: str | None) -> Source:
    """Describe the dense model by the card of a compressed directory, which was written where more was known.

    Args:
        directory: which may hold a card.
        name: of the dense model, as its manifest says.
    """
    terms = _metadata(directory / CARD)
    hub_id = terms.get("base_model")
    known = isinstance(hub_id, str) and _HUB_ID.fullmatch(hub_id)
    return Source(public_name(name or ""), hub_id if known else None, _licence(terms))


def _last_part(name: str) -> str:
    return public_name(Path(name).expanduser().resolve().name) if name else ""


def _cached_card(hub_id: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = None if hub_id is None else try_to_load_from_cache(hub_id, CARD)
    return Path(found) if isinstance(found, str) else None


def _metadata(card: Path) -> dict[str, Any]:
    """Return the front matter of a card; of one that is missing or damaged, nothing."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _licence(terms: dict[str, Any]) -> dict[str, str]:
    """Return the fields that name a licence, if there is one, as far as they read like one."""
    found = {key: value for key in _TERMS if isinstance(value := terms.get(key), str)}
    if not _LICENCE.fullmatch(found.get("license", "")):
        return {}
    return {
        key: value
        for key, value in found.items()
        if key == "license"
        or (key == "license_name" and _LICENCE.fullmatch(value))
        or (key == "license_link" and re.fullmatch(r"https://\S{1,300}|LICENSE[\w.-]{0,20}", value))
    }
