import pytest
import torch
from models_for_tests import FAMILIES, make_model
from torch import nn

from sgpt_lightning.models.embeddings import find_embeddings, has_a_row_per_token

EXPECTED = {
    "opt": {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
    "opt-post-norm": {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
    "llama": {"model.embed_tokens", "lm_head"},
    "gpt2": {"transformer.wte", "transformer.wpe"},
    "gemma2": {"model.embed_tokens"},
    "gemma4": {"model.embed_tokens", "model.embed_tokens_per_layer"},
    "gpt-j": {"transformer.wte", "lm_head"},
    "bloom": {"transformer.word_embeddings"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_tables_and_heads_are_found_and_tied_ones_once(family):
    assert set(find_embeddings(make_model(family))) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tables_of_a_text_model_are_found(family):
    model = make_model(family)
    found = {table.weight.data_ptr() for table in find_embeddings(model).values()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert found == {module.weight.data_ptr() for module in [*tables, model.get_output_embeddings()]}


def test_rows_of_tokens_are_told_from_those_of_positions():
    model = make_model("opt")
    by_token = {name: has_a_row_per_token(model, table) for name, table in find_embeddings(model).items()}
    assert by_token == {"model.decoder.embed_tokens": True, "model.decoder.embed_positions": False}


class Plain(nn.Module):
    """A model that says nothing of itself, or that it does not know."""

    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Embedding(5, 4), nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])
        self.blocks[0]["bias"] = nn.Embedding(3, 4)

    def get_input_embeddings(self):
        raise NotImplementedError


def test_a_model_that_says_nothing_of_itself_is_searched_but_not_its_blocks():
    model = Plain()
    assert list(find_embeddings(model)) == ["words"]
    assert not has_a_row_per_token(model, model.words)


def test_tables_of_another_tower_are_left_alone():
    model = make_model("llama")
    model.vision = nn.Embedding(7, 4)
    assert "vision" not in find_embeddings(model)
    assert torch.is_tensor(model.vision.weight)
