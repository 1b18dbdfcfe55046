"""Random damage: a CheckpointError, or the model as it was; never another exception, never another model."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import CONFIG, MANIFEST, edit_json, forge, write_model
from models_for_tests import make_tokens

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
DAMAGES, FORGERIES = 150, 40  # per family (and file); 9,720 of both found no third outcome
PROBE = make_tokens(1, 8)
RECIPES = {
    "opt": Recipe(pattern="2:4", target_avg_bits=4.0),
    "gpt2": Recipe(),
    "llama": Recipe(target_avg_bits=None),
    "mistral": Recipe(coding="entropy", target_bits_per_weight=5.0),
}
ODD = (None, True, -1, 0, 3, 2**31, 10**30, 0.5, -1e300, "", "x", "../x", [], [1, 2], [["x"]], {}, {"x": 1})


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    for family, recipe in RECIPES.items():
        write_model(root / family, family, recipe)
    return {family: root / family for family in RECIPES}


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_compressed(directory)(input_ids=PROBE).logits


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


def outcome(directory: Path) -> torch.Tensor | str:
    """Return the logits, or the message of the one error that is allowed."""
    try:
        return logits(directory)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("family", RECIPES)
def test_random_damage_is_an_error_or_the_same_logits(family, directories, tmp_path):
    chance = random.Random(family)
    expected = logits(directories[family])
    others = [path for name, path in directories.items() if name != family]
    errors = 0
    for number in range(DAMAGES):
        directory = tmp_path / str(number)
        shutil.copytree(directories[family], directory)
        what = damage(chance, directory, others)
        found = outcome(directory)
        if isinstance(found, str):
            errors += 1
            assert str(directory) in found, what
        else:
            assert torch.equal(found, expected), what
        shutil.rmtree(directory)
    assert 0.8 * DAMAGES < errors < DAMAGES  # a changed space in the manifest, a file put where it was: no damage


@pytest.mark.parametrize("name", [MANIFEST, CONFIG])
@pytest.mark.parametrize("family", RECIPES)
def test_random_fields_under_right_checksums_are_an_error_or_a_model(name, family, directories, tmp_path):
    chance = random.Random(family)
    errors = 0
    for number in range(FORGERIES):
        directory = tmp_path / str(number)
        shutil.copytree(directories[family], directory)
        if name == CONFIG:
            edit_json(directory / CONFIG, lambda content: set_a_random_field(chance, content))
        forge(directory, lambda manifest: set_a_random_field(chance, manifest) if name == MANIFEST else None)
        try:
            load_compressed(directory)
        except CheckpointError:
            errors += 1
        shutil.rmtree(directory)
    assert errors > FORGERIES / 10
