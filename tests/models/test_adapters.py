"""A model whose blocks sit in an odd place, against its twin with the same weights and blocks where all have them."""

from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_batches, make_padded_batches, make_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import sgpt_lightning
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.models import adapters
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.embeddings import find_embeddings
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS, WIDTH = 128, 16


class Mixer(nn.Module):
    """Adds the mean of the tokens up to each one, and a layer of two in a list, which look like experts."""

    def __init__(self):
        super().__init__()
        self.norm, self.places = nn.LayerNorm(WIDTH), nn.Embedding(3, WIDTH)
        self.past, self.steps = nn.Linear(WIDTH, WIDTH), nn.ModuleList([nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)])

    def mix(self, stream, real):
        weights = torch.tril(torch.ones(stream.shape[1], stream.shape[1])) * real[:, None]
        mean = (weights / weights.sum(-1, keepdim=True).clamp_min(1)) @ self.norm(stream)
        stream = stream + self.past(mean) + self.places.weight[0]
        return stream + self.steps[1](torch.relu(self.steps[0](self.norm(stream))))


class OddBlock(Mixer):
    def forward(self, real, stream, scale=1.0):
        return self.mix(stream, real) * scale, "what it remembers"


class PlainBlock(Mixer):
    def __init__(self):
        super().__init__()
        self.first, self.second = self.steps  # no list within the block
        del self.steps

    @property
    def steps_(self):
        return self.first, self.second

    def forward(self, stream, real, scale):
        self.__dict__["steps"] = self.steps_
        return self.mix(stream, real) * scale


class OddConfig(PreTrainedConfig):
    model_type = "odd-for-tests"


class OddModel(PreTrainedModel):
    """Its blocks are attributes, one of them within another module; positional and keyword arguments are mixed."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.lower, self.rest = OddBlock(), nn.ModuleDict({"upper": OddBlock(), "norm": nn.LayerNorm(WIDTH)})
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        real = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.float()
        stream, _ = self.lower(real, self.words(input_ids), scale=0.9)
        stream, _ = self.rest["upper"](stream=stream, scale=1.1, real=real)
        return SimpleNamespace(logits=self.head(self.rest["norm"](stream)))


class PlainModel(nn.Module):
    """The same where every model has it."""

    def __init__(self, odd):
        super().__init__()
        self.words, self.norm, self.head = odd.words, odd.rest["norm"], odd.head
        self.layers = nn.ModuleList([PlainBlock(), PlainBlock()])
        for block, other in zip(self.layers, (odd.lower, odd.rest["upper"]), strict=True):
            state = {key.replace("steps.0", "first").replace("steps.1", "second"): value
                     for key, value in other.state_dict().items()}  # fmt: skip
            block.load_state_dict(state)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        real = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.float()
        stream = self.words(input_ids)
        for layer, scale in zip(self.layers, (0.9, 1.1), strict=True):
            stream = layer(stream, real, scale)
        return SimpleNamespace(logits=self.head(self.norm(stream)))


def make_odd():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OddModel(OddConfig())
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(adapters, "_ADAPTERS", {})
    sgpt_lightning.register_model(OddModel, blocks=lambda model: [model.lower, model.rest["upper"]], hidden="stream")


SAME = {"lower": "layers.0", "rest.upper": "layers.1", "steps.0": "first", "steps.1": "second"}


def name_in_twin(name):
    for odd, plain in SAME.items():
        name = name.replace(odd, plain)
    return name


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", [make_batches, make_padded_batches], ids=["unpadded", "padded"])
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(coding="entropy", target_bits_per_weight=5.0)], ids=["fixed", "coded"]
)
def test_a_registered_model_is_compressed_as_its_conventional_twin(recipe, make):
    odd = make_odd()
    plain = PlainModel(make_odd()).eval().requires_grad_(False)
    solved, expected = compress(odd, make(3), recipe), compress(plain, make(3), recipe)
    assert [name_in_twin(name) for name in solved] == list(expected)
    for name in solved:
        own, twin = odd.get_submodule(name), plain.get_submodule(name_in_twin(name))
        assert torch.equal(own.weight, twin.weight), name
        assert torch.equal(own.bias, twin.bias), name
    windows = make_tokens(2, 12, seed=7)
    assert evaluate(odd, windows) == evaluate(plain, windows)


@pytest.mark.usefixtures("registered")
def test_a_registered_model_of_a_class_of_ones_own_is_written_and_read(tmp_path):
    AutoConfig.register(OddConfig.model_type, OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddModel, exist_ok=True)
    model, batches = make_odd(), make_batches(2)
    assert set(find_embeddings(model)) == {"words", "head"}  # and not those within its blocks
    save_compressed(tmp_path / "out", model, compress(model, batches, Recipe()), storage_dtype=torch.float16)
    loaded = load_compressed(tmp_path / "out")
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)
    assert not torch.equal(make_odd()(**batches[0]).logits, model(**batches[0]).logits)


def test_without_registration_the_refusal_says_how_to_register():
    with pytest.raises(ValueError, match=r"has no decoder blocks.*sgpt_lightning\.register_model"):
        find_decoder_blocks(make_odd())


class Turned(nn.Module):
    """Blocks where all have them, which take the mask first."""

    def __init__(self):
        super().__init__()
        self.words, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList([OddBlock()])
        self.layers[0].steps = nn.Sequential(*self.layers[0].steps)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return self.layers[0](input_ids > 3, self.words(input_ids))[0]


def test_a_hidden_state_that_is_not_where_it_is_expected_is_refused_by_name():
    with pytest.raises(ValueError, match=r"OddBlock receives .*hidden state.*register_model"):
        compress(Turned(), make_batches(1), Recipe(preset="gptq"))


def test_what_cannot_be_registered_or_does_not_fit_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(adapters, "_ADAPTERS", {})
    with pytest.raises(TypeError, match="kind must be a class of modules, got 'OddModel'"):
        sgpt_lightning.register_model("OddModel", blocks=list)
    with pytest.raises(TypeError, match=r"blocks must be a function of the model, got 'model\.layers'"):
        sgpt_lightning.register_model(OddModel, blocks="model.layers")
    sgpt_lightning.register_model(OddModel, blocks=lambda model: [model.lower, nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"blocks of OddModel must return modules within it, got Linear"):
        find_decoder_blocks(make_odd())
    sgpt_lightning.register_model(OddModel, blocks=lambda model: [])
    with pytest.raises(ValueError, match="got none"):
        find_decoder_blocks(make_odd())
    sgpt_lightning.register_model(OddModel, blocks=lambda model: [model.lower], hidden="states")
    with pytest.raises(ValueError, match=r"'states', but OddBlock\.forward takes real, stream, scale"):
        compress(make_odd(), make_batches(1), Recipe(preset="gptq"))
