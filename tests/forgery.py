"""A tiny compressed model, and how to change its files with all checksums put right again."""

import hashlib
import json
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
