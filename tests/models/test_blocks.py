"""Replayed blocks against hooks on the model's own forward, and names against lists written by hand."""

from collections.abc import Mapping

import pytest
import torch
from models_for_tests import MIXTURES_OF_EXPERTS, VARIANTS, make_model, make_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import find_linears, set_weight_matrix, weight_matrix
from sgpt_lightning.models.replay import BlockReplay

pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(rows: int, time: int, seed: int, padded: bool) -> dict[str, Tensor]:
    batch = {"input_ids": make_tokens(rows, time, seed)}
    if padded:
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :3] = 0  # the first window is padded on the left, the last one (of several) on the right
        mask[1:][-1:, -4:] = 0
        batch["attention_mask"] = mask
    return batch


def own_forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Run the model itself; return what enters each block, what leaves the last one, and the logits."""
    states: list[Tensor] = []
    blocks = find_decoder_blocks(model).blocks

    def entering(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def leaving(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    logits = model(**batch, use_cache=False).logits  # as replay: with a cache, keys are laid out differently
    for handle in handles:
        handle.remove()
    return states, logits


def replayed(replay: BlockReplay, batch: Mapping[str, Tensor], blocks: int) -> list[Tensor]:
    hidden, calls = replay.prologue(batch)
    states = [hidden]
    for index in range(blocks):
        states.append(replay.run(index, states[-1], calls[index]))
    return states


def logits_from(model: PreTrainedModel, batch: Mapping[str, Tensor], last_hidden: Tensor) -> Tensor:
    """Run the model's own tail on a hidden state that replaces what the last block returns."""

    def replace(module, args, output):
        return (last_hidden, *output[1:]) if isinstance(output, tuple) else last_hidden

    handle = find_decoder_blocks(model).blocks[-1].register_forward_hook(replace)
    logits = model(**batch, use_cache=False).logits  # as replay: with a cache, keys are laid out differently
    handle.remove()
    return logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_replayed_blocks_give_the_models_own_hidden_states_and_logits(family, attention, rows, padded):
    model = make_model(family, attention)
    replay = BlockReplay(model, find_decoder_blocks(model).blocks)
    # two batches of one shape, one of another, and the first shape once more: nothing may be taken from the wrong one
    for seed, time in enumerate((11, 11, 7, 11)):
        batch = make_batch(rows, time, seed, padded)
        expected, logits = own_forward(model, batch)
        states = replayed(replay, batch, 2)
        for state, own in zip(states, expected, strict=True):
            assert torch.equal(state, own)
        assert torch.equal(logits_from(model, batch, states[-1]), logits)
        assert not torch.equal(logits_from(model, batch, states[0]), logits)  # the oracle can tell


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "mistral"])
def test_padded_and_unpadded_batches_of_one_shape_do_not_share_masks(family):
    model = make_model(family)
    replay = BlockReplay(model, find_decoder_blocks(model).blocks)
    for padded in (False, True, False):
        batch = make_batch(3, 11, 0, padded)
        assert torch.equal(replayed(replay, batch, 2)[-1], own_forward(model, batch)[0][-1])
    unpadded, padded_states = (own_forward(model, make_batch(3, 11, 0, padded))[0][-1] for padded in (False, True))
    assert not torch.equal(unpadded, padded_states)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_a_window_of_nothing_but_padding_gives_no_nan_and_leaves_its_neighbours_alone(family, attention):
    model = make_model(family, attention)
    replay = BlockReplay(model, find_decoder_blocks(model).blocks)
    batch = make_batch(3, 9, 0, padded=False)
    mask = torch.ones_like(batch["input_ids"])
    mask[2] = 0
    states = replayed(replay, batch | {"attention_mask": mask}, 2)
    assert all(torch.isfinite(state).all() for state in states)
    assert torch.equal(states[-1], own_forward(model, batch)[0][-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_replay_and_rewriting_the_weights_change_no_bit_of_a_16_bit_model(family, dtype):
    model = make_model(family).to(dtype)
    decoder = find_decoder_blocks(model)
    batch = make_batch(2, 9, 0, padded=False)
    expected, logits = own_forward(model, batch)
    assert torch.equal(replayed(BlockReplay(model, decoder.blocks), batch, 2)[-1], expected[-1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for linear in decoder.linears().values():
        set_weight_matrix(linear, weight_matrix(linear).float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("already_ran", [False, True])
def test_the_model_is_as_it_was_after_an_exception_inside_the_prologue(already_ran):
    model = make_model("opt")
    blocks = find_decoder_blocks(model).blocks
    own = type(blocks[1]).forward.__get__(blocks[1])
    blocks[1].forward = own  # as accelerate does; it has to come back
    good = {"input_ids": make_tokens(2, 9)}
    logits = model(**good).logits
    replay = BlockReplay(model, blocks)
    if already_ran:
        replay.prologue(good)
    with pytest.raises(IndexError):
        replay.prologue({"input_ids": torch.full((2, 9), 10_000)})
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is own
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**good).logits, logits)


ATTENTION_OPT = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
EXPECTED_LINEARS = {
    "opt": ("model.decoder.layers", [*ATTENTION_OPT, "fc1", "fc2"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "llama": (
        "model.layers",
        [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
    ),
}


@pytest.mark.parametrize("family", EXPECTED_LINEARS)
def test_the_linears_of_the_blocks_are_found_and_no_head_or_projection_around_them(family):
    model = make_model(family)
    path, names = EXPECTED_LINEARS[family]
    decoder = find_decoder_blocks(model)
    assert decoder.names == [f"{path}.0", f"{path}.1"]
    assert set(decoder.linears(1)) == {f"{path}.1.{name}" for name in names}
    assert set(decoder.linears()) == {f"{path}.{index}.{name}" for index in (0, 1) for name in names}
    assert all(linear is model.get_submodule(name) for name, linear in decoder.linears().items())
    assert all(isinstance(linear, nn.Linear | Conv1D) for linear in decoder.linears().values())


def test_find_linears_knows_linear_and_conv1d_only():
    others = {"c": nn.Conv1d(2, 3, 1), "d": nn.Conv2d(2, 3, 1), "e": nn.Embedding(4, 2)}
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": Conv1D(3, 2)} | others)
    assert set(find_linears(module)) == {"a", "b"}
    assert set(find_linears(module, "block.0")) == {"block.0.a", "block.0.b"}


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)])])
def test_a_model_without_decoder_blocks_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no decoder blocks"):
        find_decoder_blocks(model)


@pytest.mark.parametrize("family", MIXTURES_OF_EXPERTS)
def test_experts_in_3d_parameters_are_refused_by_name(family):
    with pytest.raises(ValueError, match=r"experts.*layers\.0\.mlp\.experts\.gate_up_proj.*layers\.1\.mlp\.experts"):
        find_decoder_blocks(make_model(family))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6), lambda: nn.Conv2d(2, 4, (1, 3))],
    ids=["Linear", "Conv1D", "Conv2d"],
)
def test_weights_are_read_and_written_as_out_features_by_in_features(make):
    layer = make()
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    layer.bias.data.zero_()
    outputs = layer(inputs.view(5, 2, 1, 3)).flatten(1) if isinstance(layer, nn.Conv2d) else layer(inputs)
    matrix = weight_matrix(layer)
    assert matrix.shape == (4, 6)
    torch.testing.assert_close(inputs @ matrix.T, outputs, rtol=1e-5, atol=1e-6)  # fp32 sums of six terms
    before = layer.weight.clone()
    set_weight_matrix(layer, 2 * matrix)
    assert torch.equal(layer.weight, 2 * before)
    assert torch.equal(weight_matrix(layer), layer.weight.T if isinstance(layer, Conv1D) else layer.weight.view(4, 6))


@pytest.mark.parametrize("family", EXPECTED_LINEARS)
def test_a_linears_place_is_its_block_and_its_name_within_it(family):
    decoder = find_decoder_blocks(make_model(family))
    for index in (0, 1):
        for name in decoder.linears(index):
            block, kind = decoder.place(name)
            assert block == index
            assert f"{decoder.name(block)}.{kind}" == name


class Marked(nn.Module):
    """Calls its blocks with a tensor that is 1 where token 5 is about."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, input_ids, use_cache):
        hidden, mark = self.embedding(input_ids), (input_ids == 5).any().float()
        for layer in self.layers:
            hidden = layer(hidden, mark)
        return hidden


class Scaled(nn.Module):
    def forward(self, hidden, mark):
        return hidden * (1 + mark)


@pytest.mark.parametrize("tokens", [[2, 5], [5, 2]])
def test_arguments_that_depend_on_the_tokens_are_kept_by_batch_or_refused(tokens):
    model = Marked()
    replay = BlockReplay(model, model.layers)
    for token in tokens:
        batch = {"input_ids": torch.tensor([[token, 3]])}
        hidden, calls = replay.prologue(batch)
        if tokens[0] == 5:
            assert torch.equal(replay.run(0, hidden, calls[0]), hidden * (2 if token == 5 else 1))
    if tokens[0] == 5:
        replay.check()
    else:
        with pytest.raises(RuntimeError, match=r"depend on the tokens.*use calibration one-shot"):
            replay.check()
