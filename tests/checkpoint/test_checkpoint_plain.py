"""What transformers alone makes of our directory: an error that says what to do, never a model with random linears.

Once the package is imported, however often, transformers reads it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import make_batches, make_model

import sgpt_lightning.checkpoint.save
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe

SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, OPTForCausalLM, pipeline
attempts = {
    "auto": lambda path: AutoModelForCausalLM.from_pretrained(path),
    "auto, safetensors": lambda path: AutoModelForCausalLM.from_pretrained(path, use_safetensors=True),
    "class": lambda path: OPTForCausalLM.from_pretrained(path),
    "pipeline": lambda path: pipeline("text-generation", model=path),
}
outcomes = {}
for path in sys.argv[1:]:
    for name, attempt in attempts.items():
        try:
            outcomes[f"{path}: {name}"] = f"loaded {attempt(path)}"
        except (OSError, ValueError) as error:
            outcomes[f"{path}: {name}"] = f"{type(error).__name__}: {error}"
assert not [module for module in sys.modules if module.startswith("sgpt_lightning")]
import importlib
import sgpt_lightning
from sgpt_lightning.hf import registration
for _ in range(2):
    importlib.reload(sgpt_lightning)
    importlib.reload(registration).register()
assert len([finder for finder in sys.meta_path if getattr(finder, "waits_for", None)]) == 1
for path in sys.argv[1:]:
    for name, attempt in attempts.items():
        model = attempt(path)
        packed = [*getattr(model, "model", model).modules()]
        outcomes[f"{path}: {name}, imported"] = sum(type(module).__name__ == "PackedLinear" for module in packed)
print(json.dumps(outcomes))
"""


@pytest.mark.usefixtures("one_thread")
def test_plain_transformers_fails_by_name_and_loads_no_random_linears(tmp_path, monkeypatch):
    model = make_model("opt")
    solved = compress(model, make_batches(1), Recipe(), storage_dtype=torch.float16)
    tokenizer = load_tokenizer("opt-mini")
    save_compressed(tmp_path / "one", model, solved, storage_dtype=torch.float16, tokenizer=tokenizer)
    monkeypatch.setattr(sgpt_lightning.checkpoint.save, "MAX_SHARD_SIZE", "20KB")
    save_compressed(tmp_path / "shards", model, solved, storage_dtype=torch.float16, tokenizer=tokenizer)
    assert len(list((tmp_path / "shards").glob("sgpt-0000*.safetensors"))) > 1
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "one", tmp_path / "shards"],
        check=True, timeout=120, env=environment, capture_output=True, text=True, cwd=Path("/"),
    )  # fmt: skip
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 16
    loaded = {name: outcomes.pop(name) for name in list(outcomes) if name.endswith(", imported")}
    assert set(loaded.values()) == {2 * 6}
    for name, outcome in outcomes.items():
        assert "Error: " in outcome, name
        assert "only sgpt_lightning reads this directory: import sgpt_lightning first" in outcome, name
