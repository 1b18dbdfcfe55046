"""Directories whose checksums are right and whose content is not: every fault is a CheckpointError, at little cost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import CONFIG, FC1, MANIFEST, WEIGHTS, edit_json, forge, forge_description, write_model
from safetensors.torch import load_file, save_file

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.format.directory import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS = ("storage_dtype", "linears", "embeddings", "ledger", "files", "run")
DESCRIBED = ("weights", "compute_dtype", "attn_implementation", "packed", "aliases")
GENERATION = "generation_config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "out"
    write_model(directory)
    forge(directory)
    load_compressed(directory)  # a forgery without a fault is read
    return directory


def changed(*path: str, value: Any) -> Callable[[Any], None]:
    """Set, or with KeyError remove, what is at a path in nested mappings."""

    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        if value is KeyError:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return edit


def manifest_with(*path: str, value: Any) -> Callable[[Path], None]:
    return lambda directory: forge(directory, changed(*path, value=value))


def described_with(*path: str, value: Any) -> Callable[[Path], None]:
    return lambda directory: forge_description(directory, changed(*path, value=value))


def config_with(**values: Any) -> Callable[[Path], None]:
    def edit(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in (config | values).items() if value is not KeyError}

    return lambda directory: edit_json(directory / CONFIG, edit) or forge(directory)


def content_of(name: str, content: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content)
        forge(directory)

    return write


def weights_elsewhere(name: str, to: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        forge(directory, lambda manifest: manifest["files"].update({name: manifest["files"].pop(WEIGHTS)}))
        (directory / WEIGHTS).rename(directory / to)

    return edit


def claim_shape(directory: Path, shape: list[int]) -> None:
    """Let a matrix with one row of ranges be of another shape."""
    tensors = load_file(directory / WEIGHTS)
    for part in ("weight_range", "weight_zero_point"):
        tensors[f"{FC1}.{part}"] = tensors[f"{FC1}.{part}"][:1].clone()
    save_file(tensors, directory / WEIGHTS)
    weights = changed(*REPORT, "weights", value=shape[0] * shape[1])
    forge_description(directory, changed(*SPEC, "shape", value=shape), weights)


def without_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    del tensors["model.decoder.final_layer_norm.bias"]
    save_file(tensors, directory / WEIGHTS)
    forge(directory)


SPEC, REPORT = ("packed", FC1), ("linears", FC1)
HEAD = "lm_head.weight"
FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"{field} missing": (MANIFEST, manifest_with(field, value=KeyError)) for field in FIELDS},
    **{f"{field} is {value}": (MANIFEST, manifest_with(field, value=value)) for field in FIELDS for value in (7, [1])},
    "an unknown field": (MANIFEST, manifest_with("more", value=1)),
    **{f"{field} is not described": (CONFIG, described_with(field, value=KeyError)) for field in DESCRIBED},
    **{
        f"{f} is described as {value}": (CONFIG, described_with(f, value=value))
        for f in DESCRIBED
        for value in (7, [1])
    },
    "an unknown field of the description": (CONFIG, described_with("more", value=1)),
    "an unknown dtype": (CONFIG, described_with("compute_dtype", value="float33")),
    "a function for a dtype": (CONFIG, described_with("compute_dtype", value="load")),
    "weights in a pickle": (CONFIG, described_with("weights", value="pytorch_model.bin")),
    "a newer description": (CONFIG, described_with("format_version", value=8)),
    "an older description": ("load_compressed", described_with("format_version", value=5)),
    "an unknown storage dtype": (MANIFEST, manifest_with("storage_dtype", value="q")),
    "an unknown attention": (CONFIG, described_with("attn_implementation", value="flashy")),
    "an alias to a list": (CONFIG, described_with("aliases", HEAD, value=["x"])),
    "an alias to nothing": (HEAD, described_with("aliases", HEAD, value="nowhere")),
    "an alias of nothing": ("nowhere", described_with("aliases", "nowhere", value="model.decoder.embed_tokens.weight")),
    "no alias": (HEAD, described_with("aliases", value={})),
    "no reports": ("k_proj has no report", manifest_with("linears", value={})),
    "nothing packed": ("q_proj is not packed", described_with("packed", value={})),
    "a linear without a spec": (FC1, described_with(*SPEC, value=KeyError)),
    "a linear without a report": (FC1, manifest_with(*REPORT, value=KeyError)),
    "a report of 0 weights": (FC1, manifest_with(*REPORT, "weights", value=0)),
    "a report of words": (FC1, manifest_with(*REPORT, "mean_bits", value="many")),
    "a histogram of words": (FC1, manifest_with(*REPORT, "bits_histogram", value={"four": 1})),
    "an empty spec": (FC1, described_with(*SPEC, value={})),
    "a spec that is a number": (FC1, described_with(*SPEC, value=3)),
    "a spec of another grid": (FC1, described_with(*SPEC, "grid", value="offset")),
    "a spec of another width": (FC1, described_with(*SPEC, "widths", value=[8])),
    "a spec with groups": (FC1, described_with(*SPEC, "group_size", value=5)),
    "a linear that the model has not": ("nowhere", manifest_with("linears", "nowhere", value={})),
    "a ledger of words": (MANIFEST, manifest_with("ledger", "linears", value="x")),
    "a ledger that does not add up": (MANIFEST, manifest_with("ledger", "other", value=3)),
    "perplexities in a list": (MANIFEST, manifest_with("run", "perplexity", value=[1])),
    "a perplexity in words": (MANIFEST, manifest_with("run", "perplexity", value={"dense": {"wiki": "good"}})),
    "a recipe in words": (MANIFEST, manifest_with("run", "recipe", value="best")),
    "a pickle in the directory": ("pytorch_model.bin", lambda directory: (directory / "pytorch_model.bin").touch()),
    "a file that is a word": (MANIFEST, manifest_with("files", WEIGHTS, value="x")),
    "a file without bytes": (MANIFEST, manifest_with("files", WEIGHTS, value={"sha256": "0"})),
    "no config among the files": (CONFIG, manifest_with("files", CONFIG, value=KeyError)),
    "weights outside": ("../sgpt.safetensors", weights_elsewhere("../sgpt.safetensors", "../sgpt.safetensors")),
    "weights of another name": (MANIFEST, weights_elsewhere("weights.safetensors", "weights.safetensors")),
    "an absolute path": ("/etc/passwd", manifest_with("files", "/etc/passwd", value={"bytes": 1, "sha256": ""})),
    "weights of something else": (WEIGHTS, content_of(WEIGHTS, b"PK" * 99_999)),
    "weights that are too few": (CONFIG, without_tensor),
    "a config that is a list": (CONFIG, content_of(CONFIG, b"[1]")),
    "a config that is not JSON": (CONFIG, content_of(CONFIG, b"{'vocab_size'")),
    "a config that is not UTF-8": (CONFIG, content_of(CONFIG, b'{"model_type": "\xff"}')),
    "a config of a dense model": (CONFIG, config_with(quantization_config=KeyError)),
    "a config of another method": (CONFIG, config_with(quantization_config={"quant_method": "gptq"})),
    "a config of an unknown model": (CONFIG, config_with(model_type="nothing")),
    "a config of another model": (CONFIG, config_with(model_type="gpt2")),
    "a config that brings code": (CONFIG, config_with(model_type="x", auto_map={"AutoConfig": "x.X"})),
    "a config of 1e12 words": (CONFIG, config_with(vocab_size=10**12)),
    "a config of 1e30 words": (CONFIG, config_with(vocab_size=10**30)),
    "a config of 1e9 layers": ("num_hidden_layers", config_with(num_hidden_layers=10**9)),
    "a config of 1e9 labels": ("num_labels", config_with(num_labels=10**9)),
    "a config of 1e12 positions": (CONFIG, config_with(max_position_embeddings=10**12)),
    "a config with odd heads": (CONFIG, config_with(num_attention_heads=5)),
    "a config with sizes in words": (CONFIG, config_with(ffn_dim="many")),
    "a config with negative sizes": (CONFIG, config_with(ffn_dim=-4)),
    "generation settings that are none": (GENERATION, content_of(GENERATION, b"[3]")),
    "generation settings of bytes": (GENERATION, content_of(GENERATION, b"\xff\xff")),
    "a shape of 64 x 1e12": (FC1, lambda directory: claim_shape(directory, [64, 10**12])),
    "a shape of 1 x 1e14": (FC1, lambda directory: claim_shape(directory, [1, 10**14])),
    "a shape of 1 x 4e9": (FC1, lambda directory: claim_shape(directory, [1, 4 * 10**9])),
    "a shape turned": (FC1, lambda directory: claim_shape(directory, [1, 2048])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_under_right_checksums_is_an_error_that_names_it(fault, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    named, commit = FAULTS[fault]
    commit(tmp_path / "out")
    with pytest.raises(CheckpointError) as error:
        load_compressed(tmp_path / "out")
    assert named in str(error.value)
    assert str(tmp_path / "out") in str(error.value)
    assert len(str(error.value)) < 1000, "a stack of C++ is no message"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 200_000, b"9" * 9999, b"", b"null", b'{"format": []}'])
def test_a_manifest_that_is_no_manifest_is_an_error_that_names_it(content, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(content)
    for read in (load_compressed, check_compressed):
        with pytest.raises(CheckpointError, match=r"out/sgpt_manifest\.json"):
            read(tmp_path / "out")


def test_an_attention_that_the_user_asks_for_is_the_users_error(whole):
    with pytest.raises(ValueError, match="flashy") as error:
        load_compressed(whole, attn_implementation="flashy")
    assert not isinstance(error.value, CheckpointError)
    with pytest.raises(ValueError, match=r"dtype must be a .*dtype or the name of one, got 'float33'"):
        load_compressed(whole, dtype="float33")


def test_links_into_a_cache_are_followed_since_checksums_pin_what_they_lead_to(whole, tmp_path):
    (tmp_path / "out").mkdir()
    for path in whole.iterdir():
        (tmp_path / "out" / path.name).symlink_to(path)
    expected = load_compressed(whole).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in load_compressed(tmp_path / "out").state_dict().items())


MEASURE = """
import json, sys
from pathlib import Path
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.checkpoint.load import load_compressed

def kilobytes(field):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field))

grown = {}
for path in sys.argv[1:]:
    if path == sys.argv[1]:
        load_compressed(path)  # whole
        continue
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = kilobytes("VmRSS")
    try:
        load_compressed(path)
        raise SystemExit(f"{path} was loaded")
    except CheckpointError as error:
        grown[path] = (kilobytes("VmHWM") - before) / 1000
print(json.dumps(grown))
"""


def test_a_small_directory_cannot_take_more_than_64_megabytes(whole, tmp_path):
    names = [name for name in FAULTS if name.startswith(("a config of 1e", "a shape of"))]
    for name in names:
        shutil.copytree(whole, tmp_path / name)
        FAULTS[name][1](tmp_path / name)
    write_model(tmp_path / "tables", "gpt-j")  # rotary angles per position, in no file
    config_with(n_positions=10**9)(tmp_path / "tables")
    assert sum(path.stat().st_size for path in (tmp_path / "tables").iterdir()) < 200_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, whole, *(tmp_path / name for name in [*names, "tables"])],
        check=True, timeout=120, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    grown = json.loads(done.stdout)
    assert len(grown) == len(names) + 1 > 7
    assert max(grown.values()) < 64
