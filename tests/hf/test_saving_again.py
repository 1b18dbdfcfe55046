"""A model that was loaded packed writes the directory that it came from, byte for byte, unless it was changed."""

import json
import shutil

import pytest
import torch
from packed_models import CODED, FORMS, content, described, load, logits, write

import sgpt_lightning.checkpoint.save
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.reading import check_compressed
from sgpt_lightning.models.names import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory, and the tokenizer that lies in it."""
    directory, tokenizer = tmp_path_factory.mktemp("whole") / "out", load_tokenizer("opt-mini")
    write(directory, "opt", CODED, vocab_size=len(tokenizer), tokenizer=tokenizer)
    return directory, tokenizer


@pytest.mark.parametrize("resident", ["packed", "coded"])
@pytest.mark.parametrize("name", ["opt", "opt-pruned", "llama", "gpt2-coded", "gemma2-coded"])
def test_what_is_saved_again_is_the_same_to_the_last_byte(name, resident, forms, tmp_path):
    source = forms[0] / name
    load(source, resident=resident).save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(source)
    assert {path.stat().st_mode for path in (tmp_path / "again").iterdir()} == {
        p.stat().st_mode for p in source.iterdir()
    }


def test_shards_and_their_index_are_saved_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sgpt_lightning.checkpoint.save, "MAX_SHARD_SIZE", "20KB")
    write(tmp_path / "out", *FORMS["opt"])
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert len(content(tmp_path / "again")) > 5
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize("tokenizer_first", [True, False, None])
def test_a_tokenizer_travels_by_itself_or_along_while_the_source_is_there(tokenizer_first, whole, tmp_path):
    directory, tokenizer = whole
    model = load(directory)
    if tokenizer_first:
        tokenizer.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    if tokenizer_first is False:
        tokenizer.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(directory)
    check_compressed(tmp_path / "again")


def test_without_its_source_a_model_is_saved_whole_and_a_tokenizer_beside_it_is_kept(whole, tmp_path):
    directory, tokenizer = whole
    shutil.copytree(directory, tmp_path / "out")
    model = load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert "tokenizer.json" not in check_compressed(tmp_path / "again").files
    assert torch.equal(logits(load_compressed(tmp_path / "again")), logits(model))
    tokenizer.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    check_compressed(tmp_path / "again")


def test_what_was_changed_in_memory_is_saved_and_checked(forms, tmp_path):
    source = forms[0] / "opt"
    model = load(source)
    model.generation_config.max_new_tokens = 7
    model.model.decoder.final_layer_norm.bias.data += 0.1
    model.save_pretrained(tmp_path / "again")
    loaded = load_compressed(tmp_path / "again")
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(logits(loaded), logits(model))
    assert content(tmp_path / "again")["config.json"] == content(source)["config.json"]


def test_a_model_in_another_dtype_is_saved_as_one_that_computes_in_it(forms, tmp_path):
    source = forms[0] / "opt"
    model = load(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert described(tmp_path / "again")["compute_dtype"] == "bfloat16"
    assert load(tmp_path / "again").dtype == torch.bfloat16
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_an_attention_or_a_residence_of_the_moment_is_not_saved(forms, tmp_path):
    source = forms[0] / "opt"
    load(source, attn_implementation="eager", resident="coded").save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(source)


def test_options_that_would_make_other_files_are_refused(whole, tmp_path):
    model = load(whole[0])
    for option in ({"state_dict": {"x": torch.zeros(1)}}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=f"does not take {next(iter(option))}"):
            model.save_pretrained(tmp_path / "again", **option)
    model.save_pretrained(tmp_path / "again", is_main_process=False)
    assert not (tmp_path / "again").exists()


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path / "out", *FORMS["opt"])
    before = content(tmp_path / "out")
    model = load(tmp_path / "out")
    model.generation_config.max_new_tokens = 7

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("sgpt_lightning.hf.saving.FileEntry.of", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads(before["config.json"])["resident"] == "packed"
