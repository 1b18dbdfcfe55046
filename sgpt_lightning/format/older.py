"""Manifests of format versions 1 to 5 in the fields of this version.

Until version 5 the manifest said what `config.json` says now: how to unpack each weight (`spec` beside each `report`),
aliases, compute dtype and attention implementation. Before version 5 reports had no `predicted_loss`, no embedding was
packed, and the ledger did not tell of what kinds of tensors packed weights consist. Version 3 differs from 4 by having
no layout `coded`. Versions 1 and 2 had no checksum of the manifest, kept that of `config.json` in a field of its own,
and called the weights `model.safetensors`. Version 1 had one kind of grid, one segment a row, and widths of columns
only.
"""

from typing import Any

from sgpt_lightning.format.description import CONFIG, WEIGHTS, Description

FIRST_WITH_CHECKSUM = 3
_FIRST_WITH_LOSSES = 5


def brought_up(content: dict[str, Any], version: int) -> tuple[dict[str, Any], Description]:
    """Return an older manifest in the fields of this version, and what it says of the weights.

    Raises:
        ValueError: it is incomplete or odd.
    """
    try:
        if version < FIRST_WITH_CHECKSUM:
            content = _from_the_first_two(content, version)
        if version < _FIRST_WITH_LOSSES:
            content = _with_what_came_later(content)
        entries = content["linears"] | content["embeddings"]
        unknown = [name for name, entry in entries.items() if entry.keys() != {"spec", "report"}]
        if unknown:
            raise ValueError(f"{unknown[0]} has the fields {sorted(entries[unknown[0]])}, not spec and report")
        fields = {
            "weights": WEIGHTS[0],
            "packed": {name: entry["spec"] for name, entry in entries.items()},
            **{name: content[name] for name in ("compute_dtype", "attn_implementation", "aliases")},
        }
        description = Description.from_fields(fields)
        reports = {
            part: {name: entry["report"] for name, entry in content[part].items()} for part in ("linears", "embeddings")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"of format version {version}, it is incomplete: {error!r}") from error
    moved = ("compute_dtype", "attn_implementation", "aliases")
    return {key: value for key, value in content.items() if key not in moved} | reports, description


def _with_what_came_later(content: dict[str, Any]) -> dict[str, Any]:
    linears = {
        name: entry | {"report": {"predicted_loss": None} | entry["report"]}
        for name, entry in content["linears"].items()
    }
    return content | {"linears": linears, "embeddings": {}, "ledger": content["ledger"] | {"packed": {}}}


def _from_the_first_two(content: dict[str, Any], version: int) -> dict[str, Any]:
    files = content["files"] | {CONFIG: content["config"]}
    linears = {name: dict(entry) for name, entry in content["linears"].items()}
    for entry in linears.values() if version == 1 else ():
        grid = None if entry["spec"]["widths"] is None else "zero-point"
        entry["spec"] = entry["spec"] | {"grid": grid, "group_size": None, "width_axis": "input"}
        entry["report"] = entry["report"] | {"allocation": None}
    return {key: value for key, value in content.items() if key != "config"} | {"files": files, "linears": linears}
