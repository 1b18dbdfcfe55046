"""Batches of tokens: padding, and how many windows a forward takes."""

from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_tokens
from torch import nn

from sgpt_lightning.models import batches
from sgpt_lightning.models.batches import forwards, model_inputs, real_tokens, windows_per_batch

IDS = make_tokens(3, 5)


def test_a_mask_with_holes_gives_the_positions_of_what_it_leaves():
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 2], mask[2, 4] = 0, 0
    shown, real = real_tokens({"input_ids": IDS, "attention_mask": mask})
    assert shown["attention_mask"] is mask
    assert real.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_that_hides_nothing_is_left_out(dtype):
    shown, real = real_tokens({"input_ids": IDS, "attention_mask": torch.ones(3, 5, dtype=dtype)})
    assert real is None
    assert set(shown) == {"input_ids"}
    assert "attention_mask" not in model_inputs(shown)


def test_a_window_of_padding_is_shown_to_the_model_and_counts_no_token():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    batch = {"input_ids": IDS, "attention_mask": mask}
    assert model_inputs(batch)["attention_mask"].all()
    assert real_tokens(batch)[1].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(("time", "tokens", "windows"), [(512, 2048, 4), (500, 2048, 4), (2048, 2048, 1), (4096, 1, 1)])
def test_a_budget_of_tokens_allows_whole_windows_and_one_at_least(time, tokens, windows):
    assert windows_per_batch(time, tokens) == windows


@pytest.mark.parametrize(("words", "parts"), [(1000, [3]), (1500, [2, 1]), (10**9, [1, 1, 1]), (None, [3])])
def test_the_logits_of_a_forward_stay_within_their_bytes(words, parts, monkeypatch):
    model = nn.Module()
    model.config = SimpleNamespace() if words is None else SimpleNamespace(vocab_size=words)
    monkeypatch.setattr(batches, "LOGIT_BYTES", 4 * 1000 * 3 * 5 + 1)
    batch = {"input_ids": IDS, "attention_mask": torch.ones(3, 5), "labels": "not for the model"}
    found = list(forwards(model, batch))
    assert [len(part["input_ids"]) for part in found] == parts
    assert torch.equal(torch.cat([part["input_ids"] for part in found]), IDS)
    assert all(part.keys() == {"input_ids", "attention_mask"} for part in found)
