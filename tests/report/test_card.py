"""The card of a model against its manifest, read by the hub's own parser; names that come from elsewhere stay tame."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from models_for_tests import make_batches, make_model, make_tokens

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.export.export import export_model
from sgpt_lightning.format.directory import CheckpointError
from sgpt_lightning.format.manifest import Manifest
from sgpt_lightning.models.source import Source, public_name, source_of
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.card import model_card

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {
    "model": "someone/some-opt",
    "recipe": {"sparsity": 0.5, "rules": ["fc1```"]},
    "perplexity": {
        "dense": {"wikitext2": 27.655, "ptb": None},
        "compressed": {"wikitext2": 30.25},
        "protocol": {"wikitext2": {"joining": "\n\n", "dataset": "/home/someone/texts/wiki.txt", "windows": 4}},
    },
}
PROBE = make_tokens(2, 10, seed=99)
HOSTILE = '"evil": x\n---\nlicense: mit\n# `|<script>'


def save(directory: Path, run: dict, model=None) -> Manifest:
    model = model or make_model("opt")
    solved = compress(model, make_batches(1), Recipe(preset="sparsegpt", target_avg_bits=3))
    return save_compressed(directory, model, solved, storage_dtype=torch.float16, run=run)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("card") / "small"
    return directory, save(directory, RUN)


def test_the_hub_reads_the_front_matter(saved):
    card = ModelCard.load(saved[0] / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/some-opt",
        "base_model_relation": "quantized",
        "library_name": "sgpt_lightning",
        "pipeline_tag": "text-generation",
        "tags": ["sgpt", "quantized", "pruned"],
    }


def test_it_says_what_the_manifest_says(saved):
    directory, manifest = saved
    text = (directory / "README.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["wikitext2", "27.655", "30.250"] in cells
    assert ["ptb", "not measured", "not measured"] in cells
    assert ["whole file", f"{manifest.ledger.file:,}"] in [row[:2] for row in cells]
    assert '- wikitext2: joining "\\n\\n", dataset "wiki.txt", windows 4' in text
    fc1 = [report for name, report in manifest.linears.items() if name.endswith("fc1")]
    bits = 8 * sum(report["bytes"] for report in fc1) / sum(report["weights"] for report in fc1)
    assert ["fc1", "2", f"{bits:.2f}", "50.0%"] in cells
    recipe = text.split("```yaml\n")[1].split("\n```\n")[0]
    assert yaml.safe_load(recipe) == RUN["recipe"]
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "import sgpt_lightning" in code


def test_what_it_says_of_loading_is_true(saved, tmp_path):
    places = {
        "sgpt": saved[0],
        "dense-hf": tmp_path / "dense-hf",
        "compressed-tensors": tmp_path / "compressed-tensors",
    }
    expected = load_compressed(saved[0])(PROBE).logits
    for kind, place in places.items():
        if kind != "sgpt":
            export_model(saved[0], place, kind)
        names = {"directory": place}
        exec((place / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
        for name in names.keys() & {"model", "dense"}:
            with torch.no_grad():
                assert torch.equal(names[name](PROBE).logits, expected), kind


def test_the_manifest_vouches_for_it(tmp_path):
    manifest = save(tmp_path / "small", RUN)
    assert "README.md" in manifest.files
    load_compressed(tmp_path / "small")
    (tmp_path / "small/README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        load_compressed(tmp_path / "small")


def test_a_local_model_is_named_without_its_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret/my-model").mkdir(parents=True)
    for name in (tmp_path / "secret/my-model", "~/secret/my-model"):
        save(tmp_path / "small", {"model": str(name), "recipe": {"cache": str(tmp_path / "x")}})
        text = (tmp_path / "small/README.md").read_text()
        assert "# my-model, compressed" in text
        assert "secret" not in text
        assert str(tmp_path) not in text
        assert "base_model" not in text


@pytest.mark.parametrize("name", [HOSTILE, f"owner/{HOSTILE}", "../../etc/passwd", "", "C:\\Users\\me\\model"])
def test_a_name_from_elsewhere_is_one_tame_line(name, saved):
    source = source_of(name, object())
    text = model_card(saved[1], source)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    assert [line for line in body.splitlines() if line.startswith("# ")] == [body.strip().splitlines()[0]]
    assert not {"<script>", "Users", "etc"} & set(body.replace("/", " ").replace("\\", " ").split())
    assert "\n---" not in body


def test_names_of_data_sets_and_modules_stay_in_their_cells(saved):
    run = {"perplexity": {"dense": {HOSTILE: 1.0}, "compressed": {}, "protocol": {HOSTILE: {HOSTILE: HOSTILE}}}}
    reports = {f"layers.0.{HOSTILE}": next(iter(saved[1].linears.values()))}
    linears = {name: report | {"name": name} for name, report in reports.items()}
    text = model_card(replace(saved[1], run=run, linears=linears), Source("x", None, {}))
    assert "\n---" not in text.removeprefix("---\n").partition("\n---\n")[2]
    assert "<script>" not in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|") and "evil" in line}
    assert columns == {4, 5}  # three columns of perplexity, four of kinds


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: opt-175b\nlicense_link: https://example.org/x\n---\n",
            {"license": "other", "license_name": "opt-175b", "license_link": "https://example.org/x"},
        ),
        ("---\nlicense: other\nlicense_link: javascript:x\n---\n", {"license": "other"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: 'a\n\n  b'\n---\n", {}),
        ("---\n: - broken: [\n---\n", {}),
        ("no front matter", {}),
        (None, {}),
    ],
)
def test_the_licence_is_what_the_sources_card_says_or_left_out(card, licence, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert source_of(str(tmp_path), object()) == Source(tmp_path.name, None, licence)


def test_a_licence_in_the_config_counts_where_no_card_names_one(tmp_path):
    model = make_model("opt")
    model.config.license = "mit"
    assert source_of("someone/some-opt", model).licence == {"license": "mit"}
    save(tmp_path / "small", RUN, model)
    assert ModelCard.load(tmp_path / "small/README.md").data.license == "mit"
    for kind, library in (("dense-hf", "transformers"), ("compressed-tensors", "transformers")):
        export_model(tmp_path / "small", tmp_path / kind, kind)
        data = ModelCard.load(tmp_path / kind / "README.md").data
        assert (data.license, data.base_model, data.library_name) == ("mit", "someone/some-opt", library)
        assert (
            "sgpt_lightning" not in (tmp_path / kind / "README.md").read_text().split("```python\n")[1].split("```")[0]
        )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("gpt2", "gpt2"),
        ("runs/deep/model/", "model"),
        ("/data/models/x", "x"),
        ("~/x", "x"),
        ("./x", "x"),
        ("a\tb", "a b"),
    ],
)
def test_public_names_have_no_directories(name, shown):
    assert public_name(name) == shown


def test_the_embedded_model_is_not_on_the_hub(tmp_path):
    assert source_of("opt-mini", object()) == Source("opt-mini", None, {})
    assert json.loads(json.dumps(source_of("gpt2", object()).hub_id)) == "gpt2"
