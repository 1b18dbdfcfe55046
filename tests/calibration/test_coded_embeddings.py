"""Coded embeddings: in the model while it is solved, dense again if that fails, and in the file what they claim."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from independent_reader import read_dense
from models_for_tests import FAMILIES, make_batches, make_model, make_padded_batches, make_tokens

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.embeddings import TokenCounts
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import is_marked_compressed
from sgpt_lightning.models.embeddings import find_embeddings
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.run import inspection, ledger_table, report_dict

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.float16
FIXED = Recipe(preset="sparsegpt", target_avg_bits=3, embedding_bits=7)
ENTROPY = Recipe(coding="entropy", target_bits_per_weight=5, embedding_bits=7)
PROBE = make_tokens(2, 10, seed=99)


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_tokens_are_counted_where_they_are_real():
    counts, expected = TokenCounts(), Counter()
    batches = make_padded_batches(3)
    for batch in batches:
        counts.add(batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        expected.update(batch["input_ids"][mask == 1].tolist())
    assert counts.of(128).tolist() == [expected[token] for token in range(128)]
    assert counts.of(500).tolist() == [expected[token] for token in range(500)]
    assert TokenCounts().of(3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", [*FAMILIES, "llama with entropy", "gemma2 with entropy"])
def test_a_model_comes_back_with_coded_tables_bit_for_bit_and_ties_as_they_were(family, tmp_path):
    family, _, coding = family.partition(" with ")
    recipe = ENTROPY if coding else FIXED
    model, dense = make_model(family), make_model(family)
    solved = compress(model, make_batches(2), recipe, storage_dtype=HALF)
    tables = find_embeddings(dense)
    assert set(tables) <= set(solved)
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    assert set(manifest.embeddings) == set(tables)
    for name, table in tables.items():
        assert not torch.equal(table.weight, model.get_submodule(name).weight)
        assert solved[name].report.bits_per_weight <= 7
    loaded = load_compressed(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    for one in (model, loaded):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == (
            dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
        )


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_a_reader_written_from_the_description_finds_the_same_tables(family, tmp_path):
    model = make_model(family)
    save_compressed(tmp_path / "out", model, compress(model, make_batches(2), ENTROPY), storage_dtype=HALF)
    tensors, _ = read_dense(tmp_path / "out")
    for name in (*find_embeddings(model), "lm_head"):
        assert torch.equal(torch.from_numpy(tensors[f"{name}.weight"]), model.get_submodule(name).weight)


def test_tables_in_16_bits_and_with_an_ignored_one(tmp_path):
    model = make_model("opt").to(torch.bfloat16)
    positions = model.model.decoder.embed_positions.weight.clone()
    recipe = Recipe(preset="sparsegpt", target_avg_bits=3, embedding_bits=7, ignore=["*.embed_positions"])
    solved = compress(model, make_batches(2), recipe)
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.bfloat16)
    assert torch.equal(model.model.decoder.embed_positions.weight, positions)
    assert list(manifest.embeddings) == ["model.decoder.embed_tokens"]
    loaded = load_compressed(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_linears_are_those_that_dense_tables_give():
    coded, dense = make_model("opt"), make_model("opt")
    solved = compress(coded, make_batches(2), FIXED)
    again = compress(dense, make_batches(2), Recipe(preset="sparsegpt", target_avg_bits=3))
    assert again
    for name, linear in again.items():
        assert linear.report == solved[name].report
    tables = {f"{name}.weight" for name in find_embeddings(dense)} | {"lm_head.weight"}
    for name, tensor in coded.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]) == (name not in tables), name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failure_leaves_the_tables_dense_and_a_model_marked_once_a_block_was_solved(stage, monkeypatch):
    model = make_model("opt")
    before = state_of(model)
    seen = []

    class Batches(list):
        def __iter__(self):
            seen.append(len(seen))
            if len(seen) == 2 + stage:  # the first time they are checked; then gradients, and a block each time
                seen.append(torch.equal(model.get_input_embeddings().weight, before["lm_head.weight"]))
                raise RuntimeError("stopped")
            return super().__iter__()

    with pytest.raises(RuntimeError, match="stopped"):
        compress(model, Batches(make_batches(2)), ENTROPY)
    assert seen[-1] is True  # tables are written last
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert same == (stage < 2)
    assert is_marked_compressed(model) == (stage == 2)
    if same:
        compress(model, make_batches(2), ENTROPY)
    else:
        with pytest.raises(ValueError, match="compressed before, or begun to be"):
            compress(model, make_batches(2), ENTROPY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"embedding_bits": 0.3},
            r"embedding_bits=0.3 does not fit.*\n  .*embed_tokens takes \d.*\n  .*embed_positions",
        ),
        ({"embedding_bits": 5, "ignore": ["*embed_*"]}, "`ignore` names them all"),
        ({"embedding_bits": 5, "ignore": ["*embed_x"]}, "'.embed_x' of ignore or rules matches no linear"),
    ],
)
def test_what_does_not_fit_is_refused_with_all_offenders_and_the_model_stays(settings, message):
    model = make_model("opt")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        compress(model, make_batches(2), Recipe(preset="sparsegpt", target_avg_bits=3, **settings))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_table_with_nan_is_refused_by_name():
    model = make_model("opt")
    model.get_input_embeddings().weight[5, 5] = float("nan")
    with pytest.raises(ValueError, match="embed_tokens holds NaN or inf"):
        compress(model, make_batches(2), FIXED)


def test_ledger_and_reports_show_what_the_tables_take(tmp_path):
    model = make_model("opt")
    solved = compress(model, make_batches(2), ENTROPY, storage_dtype=HALF)
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=HALF)
    tables = {name: solved[name] for name in manifest.embeddings}
    assert manifest.ledger.embeddings == sum(table.packed.nbytes for table in tables.values())
    assert sum(manifest.ledger.packed.values()) == manifest.ledger.embeddings + manifest.ledger.linears
    assert manifest.ledger.packed["level"] == 4 * len(solved)
    shown = ledger_table(manifest)
    tables_of_the_coder = sum(
        tensor.nbytes
        for linear in solved.values()
        for part, tensor in linear.packed.tensors.items()
        if part in ("weight_tables", "weight_rows", "weight_columns")
    )
    assert f"{tables_of_the_coder:,}" in shown
    assert "packed weights: codes" in shown
    assert "packed weights: masks" not in shown
    assert [entry["name"] for entry in report_dict(manifest)["embeddings"]] == list(tables)
    assert "| embedding " in inspection(Path("out"), manifest)
    for table in tables.values():
        assert 0 < table.report.relative_error < 0.01  # steps of 7 bits less side information
