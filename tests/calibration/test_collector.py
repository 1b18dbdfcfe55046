"""What is collected while a block runs, against the inputs of the block's own norms."""

import gc
import weakref

import pytest
import torch
from models_for_tests import make_batches, make_model
from torch import nn

from sgpt_lightning.calibration.collector import (
    DenseReference,
    InputCollector,
    ResidualStream,
    input_groups,
    watched_inputs,
)
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.replay import BlockReplay, residual_writers

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = {
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],  # attention beside the MLP
}
WRITERS = {
    "opt": ["self_attn.out_proj", "fc2"],
    "opt-post-norm": [],
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gemma2": [],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "gpt-neox": ["attention.dense", "mlp.dense_4h_to_h"],
}


def entrance(family: str, index: int = 0):
    model = make_model(family)
    decoder = find_decoder_blocks(model)
    replay = BlockReplay(model, decoder.blocks)
    hidden, calls = replay.prologue(make_batches(1)[0])
    for before in range(index):
        hidden = replay.run(before, hidden, calls[before])
    return decoder, replay, hidden, calls


@pytest.mark.parametrize("family", GROUPS)
def test_linears_that_receive_one_tensor_are_one_group_in_the_order_of_running(family):
    decoder, replay, hidden, calls = entrance(family)
    linears = decoder.linears(0)
    with watched_inputs(linears) as inputs:
        replay.run(0, hidden, calls[0])
    groups = input_groups(inputs, linears)
    found = [[name.rpartition(".")[2] for name in group] for group in groups]
    if family == "falcon":  # which of the two comes first is the model's affair
        found, expected = (sorted(map(sorted, names)) for names in (found, GROUPS[family]))
        assert found == expected
    else:
        assert found == GROUPS[family]
    assert all(linears[name] is linear for group in groups for name, linear in group.items())


def test_linears_that_did_not_run_come_last_in_a_group_of_their_own():
    tensor, other = torch.ones(2), torch.ones(2)
    linears = {name: nn.Linear(2, 2) for name in "abcd"}
    groups = input_groups({"c": tensor, "b": other, "d": tensor}, linears)
    assert [list(group) for group in groups] == [["c", "d"], ["b"], ["a"]]


def test_a_watched_run_ends_when_the_last_linear_is_reached():
    decoder, replay, hidden, calls = entrance("opt")
    block, linears = decoder.blocks[0], decoder.linears(0)
    ran = []
    block.fc1.register_forward_hook(lambda *args: ran.append("fc1"))
    block.fc2.register_forward_hook(lambda *args: ran.append("fc2"))
    with watched_inputs(linears) as inputs:
        replay.run(0, hidden, calls[0])
    assert list(inputs) == list(inputs.keys() & linears.keys()) or set(inputs) == set(linears)
    assert ran == ["fc1"]
    assert all(not linear._forward_pre_hooks for linear in linears.values())


def test_an_error_inside_a_watched_run_is_raised_and_the_hooks_are_gone():
    decoder, _, _, _ = entrance("opt")
    with pytest.raises(RuntimeError, match="from the body"), watched_inputs(decoder.linears(0)):
        raise RuntimeError("from the body")
    assert all(not linear._forward_pre_hooks for linear in decoder.linears(0).values())


@pytest.mark.parametrize("family", WRITERS)
def test_the_linears_that_write_into_the_residual_stream_are_found(family):
    decoder, _, hidden, calls = entrance(family)
    assert sorted(residual_writers(decoder.blocks[0], hidden, calls[0])) == sorted(WRITERS[family])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", WRITERS)
def test_they_are_found_in_16_bits_however_large_the_stream_is(family, dtype):
    model = make_model(family).to(dtype)
    decoder = find_decoder_blocks(model)
    hidden, calls = BlockReplay(model, decoder.blocks).prologue(make_batches(1)[0])
    block = decoder.blocks[0]
    for scale in (1, 10, 100):
        found = residual_writers(block, scale * hidden, calls[0])
        assert sorted(found) == sorted(WRITERS[family])
        assert all(block.get_submodule(name) is linear for name, linear in found.items())
    assert {parameter.dtype for parameter in block.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("family", "attention", "norms"),
    [
        ("opt", "out_proj", ("self_attn_layer_norm", "final_layer_norm")),
        ("llama", "o_proj", ("input_layernorm", "post_attention_layernorm")),
        ("gpt2", "attn.c_proj", ("ln_1", "ln_2")),
    ],
)
def test_the_gap_is_that_between_the_inputs_of_the_two_models_norms(family, attention, norms):
    decoder, _, hidden, calls = entrance(family, 1)
    block = decoder.blocks[1]
    writers = residual_writers(block, hidden, calls[1])
    seen: dict[str, list] = {norm: [] for norm in norms}
    for norm in norms:
        block.get_submodule(norm).register_forward_pre_hook(lambda m, args, norm=norm: seen[norm].append(args[0]))
    shifted = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    streams = [ResidualStream(entered) for entered in (hidden, shifted)]
    for stream, entered in zip(streams, (hidden, shifted), strict=True):
        with stream.following(writers):
            block(entered, *calls[1].args, **calls[1].kwargs)
    reference = DenseReference({}, *streams)
    for name in writers:
        norm = norms[0] if name.endswith(attention) else norms[1]
        expected = seen[norm][0] - seen[norm][1]
        # two orders of addition; OPT hands its second norm all tokens in one row
        torch.testing.assert_close(reference.gap_at(name), expected.view_as(hidden), rtol=0, atol=1e-5)
    assert reference.gap_at("another linear") is None
    assert DenseReference({}).gap_at(next(iter(writers))) is None


def test_a_linear_that_was_never_run_has_no_statistics():
    with pytest.raises(
        ValueError, match=r"^fc1 saw no token during calibration: nothing calls it; put it into `ignore`$"
    ):
        InputCollector({"fc1": nn.Linear(2, 2)}).statistics("fc1")


def test_a_block_that_is_broken_off_leaves_nothing_of_its_batch_behind_even_if_the_exception_lives_on():
    """Python 3.12's contextlib keeps the exception, here a block does."""
    model = make_model("opt")
    decoder, passed, kept = find_decoder_blocks(model), [], []
    replay = BlockReplay(model, decoder.blocks)
    hidden, calls = replay.prologue(make_batches(1)[0])
    block = decoder.blocks[0]
    block.fc1.register_forward_hook(lambda module, args, output: passed.append(weakref.ref(output)))
    block.fc2.register_forward_pre_hook(lambda module, args: passed.append(weakref.ref(args[0])))
    forward = block.forward

    def keeping(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            kept.append(error)
            raise

    block.forward = keeping
    gc.disable()
    try:
        for _ in range(2):
            with watched_inputs(decoder.linears(0)):
                replay.run(0, hidden, calls[0])
        assert [output() for output in passed] == [None] * 4
        assert len(kept) == 2
    finally:
        gc.enable()
