"""A tiny compressed model, and how to change its files with all checksums put right again."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.recipe import Recipe

WEIGHTS, CONFIG, MANIFEST = "sgpt.safetensors", "config.json", "sgpt_manifest.json"
DENSE_CODES = Recipe(sparsity=0.0, preset="sparsegpt")
FC1 = "model.decoder.layers.0.fc1"


def write_model(directory: Path, family: str = "opt", recipe: Recipe = DENSE_CODES) -> None:
    model = make_model(family)
    solved = compress(model, make_batches(1), recipe, storage_dtype=torch.float16)
    save_compressed(directory, model, solved, storage_dtype=torch.float16)


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a JSON value in place, or replace it by what `edit` returns."""
    content = json.loads(path.read_text())
    changed = edit(content)
    path.write_text(json.dumps(content if changed is None else changed))


def forge(directory: Path, edit: Callable[[Any], Any] = lambda manifest: None) -> None:
    """Make the manifest agree with the files, change it, and sign it."""

    def rewrite(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            content = (directory / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for part in ("linears", "embeddings", "headers"):
            manifest["ledger"][part] = 0
        manifest["ledger"]["other"] = manifest["files"][WEIGHTS]["bytes"]
        edit(manifest)
        rest = {key: manifest[key] for key in manifest if key not in ("format", "format_version", "sha256")}
        signed = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        manifest["sha256"] = hashlib.sha256(signed).hexdigest()

    edit_json(directory / MANIFEST, rewrite)


def forge_description(directory: Path, edit: Callable[[Any], Any], sign: Callable[[Any], Any] = lambda m: None) -> None:
    """Change the `quantization_config` of `config.json`, and the manifest, and sign it."""
    edit_json(directory / CONFIG, lambda config: edit(config["quantization_config"]) and None)
    forge(directory, sign)


def make_older(directory: Path, version: int, edit: Callable[[Any], Any] = lambda manifest: None) -> None:
    """Let a directory say what it says as version 3, 4 or 5 did: all of it in the manifest."""
    described: dict[str, Any] = {}

    def forget(config: dict[str, Any]) -> None:
        described.update(config.pop("quantization_config"))
        del config["resident"]
        config["quantization_config"] = {"quant_method": "sgpt", "format_version": version}

    def tell(manifest: dict[str, Any]) -> None:
        for part in ("linears", "embeddings"):
            for name, report in manifest[part].items():
                manifest[part][name] = {"spec": described["packed"][name], "report": report}
        manifest |= {name: described[name] for name in ("compute_dtype", "attn_implementation", "aliases")}
        manifest["format_version"] = version
        if version < 5:
            assert manifest.pop("embeddings") == {}
            assert manifest["ledger"].pop("packed")
            for entry in manifest["linears"].values():
                del entry["report"]["predicted_loss"]
        edit(manifest)

    edit_json(directory / CONFIG, forget)
    forge(directory, tell)


ODD = (None, True, -1, 0, 3, 2**31, 10**30, 0.5, -1e300, "", "x", "../x", [], [1, 2], [["x"]], {}, {"x": 1})


def set_a_random_field(chance: random.Random, content: Any) -> None:
    """Replace, remove or rename something somewhere in a JSON value."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(content)
    holder, key = chance.choice(places)
    action = chance.choice(["set", "set", "set", "remove", "double"])
    if action == "remove":
        del holder[key]
    elif action == "double" and isinstance(holder, dict):
        holder[f"{key}{chance.choice('sx.')}"] = holder[key]
    else:
        holder[key] = chance.choice(ODD)


def damage(chance: random.Random, directory: Path, others: list[Path]) -> str:
    """Do one random thing to one random file."""
    path = chance.choice(sorted(directory.iterdir()))
    content = bytearray(path.read_bytes())
    where = chance.randrange(len(content))
    action = chance.choice(["flip", "flip", "flip", "cut", "add", "zeros", "swap", "foreign", "remove", "field"])
    if action == "flip":
        content[where] ^= 1 << chance.randrange(8)
    elif action == "cut":
        del content[where:]
    elif action == "add":
        content += chance.randbytes(9)
    elif action == "zeros":
        content[where : where + 64] = bytes(len(content[where : where + 64]))
    elif action == "swap":
        other = chance.choice(sorted(directory.iterdir()))
        path.write_bytes(other.read_bytes())
        path, content = other, content
    elif action == "foreign":
        content = bytearray((chance.choice(others) / path.name).read_bytes())
    if action == "remove":
        path.unlink()
    elif action == "field" and path.suffix == ".json":
        edit_json(path, lambda content: set_a_random_field(chance, content))
    else:
        path.write_bytes(content)
    return f"{action} {path.name} {where}"
