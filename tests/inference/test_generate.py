"""Text of a compressed and a dense model against a loop over argmax; what stands where one of them is missing."""

import shutil
from pathlib import Path

import pytest
import torch
from models_for_tests import make_batches
from readme_runs import run_main
from runs_for_tests import make_dense_directory

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.inference.generate import generate_beside
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "import os"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A compressed model whose manifest names the dense one, `dense` beside it."""
    root = tmp_path_factory.mktemp("generate")
    dense = make_dense_directory(root / "dense")
    model, tokenizer = load_model(str(dense)), load_tokenizer("opt-mini")
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=9.0)  # its publisher's taste
    solved = compress(model, make_batches(2), Recipe(coding="entropy", target_bits_per_weight=3.0))
    run = {"model": str(dense)}
    save_compressed(root / "small", model, solved, storage_dtype=torch.float16, tokenizer=tokenizer, run=run)
    return root / "small"


def argmax_text(model: torch.nn.Module, tokens: int) -> str:
    tokenizer = load_tokenizer("opt-mini")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_both_continue_with_the_likeliest_token_whatever_the_model_publishes(small):
    found = generate_beside(small, PROMPT, tokens=9)
    assert found.compressed == argmax_text(load_compressed(small), 9)
    assert found.dense == argmax_text(load_model(str(small.parent / "dense")), 9)
    assert found.compressed != found.dense
    same, of = found.agreement
    assert 0 <= same < of <= 9


def test_draws_follow_the_seed_and_leave_the_global_state_alone(small):
    before = torch.get_rng_state()
    first, again, other = (
        generate_beside(small, PROMPT, tokens=9, temperature=2.0, seed=seed, dense=str(small)).compressed
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert first != generate_beside(small, PROMPT, tokens=9).compressed


def test_the_same_model_draws_the_same_text_on_both_sides(small, tmp_path):
    load_compressed(small).save_pretrained(tmp_path)
    found = generate_beside(small, PROMPT, tokens=9, temperature=2.0, dense=str(tmp_path))
    assert found.dense == found.compressed
    assert found.agreement is not None
    assert found.agreement[0] == found.agreement[1]


def test_a_dense_model_that_is_gone_is_named_and_the_text_stands_alone(small, tmp_path):
    shutil.copytree(small.parent, tmp_path / "moved")
    found = generate_beside(tmp_path / "moved/small", PROMPT, tokens=3)
    assert found.dense is not None  # the manifest names a path that is still there
    (small.parent / "dense").rename(small.parent / "elsewhere")
    try:
        printed = run_main("generate", small, "--prompt", PROMPT, "--tokens", "3").out
        with_dense = run_main(
            "generate", small, "--prompt", PROMPT, "--tokens", "3", "--dense", small.parent / "elsewhere"
        ).out
        refused = run_main("generate", small, "--prompt", PROMPT, "--dense", small.parent / "dense", status=2).err
    finally:
        (small.parent / "elsewhere").rename(small.parent / "dense")
    assert found.compressed in printed
    assert f"== dense: not shown, model path '{small.parent / 'dense'}' is not an existing directory" in printed
    assert f"== dense: {small.parent / 'elsewhere'}\n{found.dense}" in with_dense
    assert "of 3 tokens are the same" in with_dense
    assert refused.startswith(f"sgpt: error: model path '{small.parent / 'dense'}' is not an existing directory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--tokens", "500"], "must fit the model's 128 positions"),
        (["--temperature", "-1"], "temperature must not be negative, got -1"),
        (["--temperature", "nan"], "temperature must not be negative, got nan"),
        (["--tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_options_are_an_error_and_status_2(options, message, small):
    assert message in run_main("generate", small, "--prompt", PROMPT, *options, status=2).err


def test_a_directory_that_is_no_compressed_model_is_named(tmp_path):
    assert "is not a compressed model" in run_main("generate", tmp_path, "--prompt", PROMPT, status=2).err
