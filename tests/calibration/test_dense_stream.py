"""The dense model beside the compressed one, against two whole models that are run again and again."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_batches, make_model, make_padded_batches
from oracles import second_moment
from test_calibration import run_all

import sgpt_lightning.calibration.sequential
import sgpt_lightning.calibration.solving
import sgpt_lightning.models.placement
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.core.solver import compress_linears
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(target_avg_bits=3.0)
NORMS = {  # the linears that write into the residual stream, and the norm that reads it where they start
    "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
}


@pytest.fixture
def solves(monkeypatch) -> list:
    """Records, in order: name, statistics, and the model's state when the solve begins."""
    seen: list = []

    def spy(linears, inputs, recipe, storage_dtype, **rest):
        seen.extend((linear.name, inputs.statistics, linear.row_weights) for linear in linears)
        return compress_linears(linears, inputs, recipe, storage_dtype, **rest)

    monkeypatch.setattr(sgpt_lightning.calibration.solving, "compress_linears", spy)
    return seen


def take_over(slow, compressed, names) -> None:
    """Copy what has been compressed into the model that is run again."""
    state = compressed.state_dict()
    for name in names:
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in state:
                slow.get_submodule(name).get_parameter(leaf).copy_(state[f"{name}.{leaf}"])


@pytest.mark.parametrize("make", [make_batches, make_padded_batches], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", NORMS)
def test_each_group_is_solved_for_what_it_receives_and_compared_with_the_dense_model(family, make, solves):
    model, dense, batches = make_model(family), make_model(family), make(3)
    slow = copy.deepcopy(dense)
    compress(model, batches, RECIPE)
    linears = list(find_decoder_blocks(dense).linears())
    assert sorted(name for name, _, _ in solves) == sorted(linears)
    norms = [name for name, _ in dense.named_modules() if name.rpartition(".")[2] in NORMS[family].values()]
    wanted = run_all(dense, batches, [*linears, *norms])
    done: list[str] = []
    pending: list[str] = []
    previous = None
    gaps = 0
    for name, statistics, _ in solves:
        if statistics is not previous:  # the next group
            done += pending
            pending, previous = [], statistics
            take_over(slow, model, done)
            found = run_all(slow, batches, [*linears, *norms])
        pending.append(name)
        x, dense_x = (torch.cat(runs[name]).double() for runs in (found, wanted))
        # float32 sums of some 70 tokens, and float32 models that were run in another order
        torch.testing.assert_close(statistics.second_moment.double(), second_moment(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.cross_moment.double(), dense_x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.dense_mean, dense_x.mean(0), rtol=1e-3, atol=1e-4)
        block, _, writer = next(
            (name.removesuffix(f".{w}"), ".", w) for w in [*NORMS[family], name] if name.endswith(w)
        )
        norm = NORMS[family].get(writer)
        if norm is None:
            assert statistics.gap_moment is None
            continue
        gap = torch.cat(wanted[f"{block}.{norm}"]).double() - torch.cat(found[f"{block}.{norm}"]).double()
        torch.testing.assert_close(statistics.gap_moment.double(), gap.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(statistics.gap_mean, gap.mean(0), rtol=1e-3, atol=1e-4)
        gaps += int(gap.abs().max() > 1e-3)
    assert gaps == 3  # all writers but the first, before which nothing is compressed that reaches the stream


@pytest.mark.parametrize("parts", [{"alpha": 0.0}, {"alpha": 0.0, "stream_alpha": 0.5}])
def test_without_alpha_no_dense_stream_is_kept(parts, solves, monkeypatch):
    refusing = SimpleNamespace(deepcopy=lambda *args: pytest.fail("a dense copy for nothing"))
    monkeypatch.setattr(sgpt_lightning.models.placement, "copy", refusing)
    compress(make_model("opt"), make_batches(2), Recipe(target_avg_bits=3.0, parts=parts))
    assert all(s.cross_moment is None and s.gap_moment is None for _, s, _ in solves)


def test_one_pass_of_the_dense_model_has_nothing_to_compare_with(solves):
    compress(make_model("opt"), make_batches(2), RECIPE, mode="one-shot")
    assert all(s.cross_moment is None and s.gap_moment is None for _, s, _ in solves)


def test_a_dense_block_is_kept_only_while_its_epoch_lasts():
    calibration = calibration_for("sequential", make_model("opt"), Recipe(parts={"gradients": False}), torch.float16)
    batches = make_batches(2)
    for epoch in range(len(calibration.stages)):
        for index, batch in enumerate(batches):
            calibration.observe(epoch, index, batch)
            assert calibration._dense_block is not None
        calibration.finish(epoch)
        assert calibration._dense_block is None


@pytest.mark.parametrize(
    ("family", "groups", "room", "runs_each"),
    # all but the first of three batches again for every group; nothing again. Falcon adds to a linear's output in place
    [("opt", 4, 1, 1 + 2 * 4), ("falcon", 3, 2**29, 3)],
)
def test_what_is_kept_of_a_dense_block_saves_runs_and_changes_nothing(family, groups, room, runs_each, monkeypatch):
    batches, runs, states = make_batches(3), [], []
    run_block = sgpt_lightning.calibration.sequential.run_block

    def spy(*args):
        runs[-1] += 1
        return run_block(*args)

    monkeypatch.setattr(sgpt_lightning.calibration.sequential, "run_block", spy)
    for kept in (0, room):
        monkeypatch.setattr(sgpt_lightning.calibration.sequential, "KEPT_BYTES", kept)
        runs.append(0)
        model = make_model(family)
        compress(model, batches, RECIPE)
        states.append(model.state_dict())
    assert runs == [2 * 3 * groups, 2 * runs_each]  # two blocks
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())


def test_biases_take_over_the_mean_and_are_rounded_as_they_are_stored():
    model, dense, batches = make_model("opt"), make_model("opt"), make_batches(3)
    compress(model, batches, Recipe(target_avg_bits=2.0, parts={"alpha": 0.0}), storage_dtype=torch.float16)
    name = "model.decoder.layers.0.self_attn.q_proj"  # receives the same in both models
    bias = model.get_submodule(name).bias
    assert torch.equal(bias, bias.half().float())
    x = torch.cat(run_all(dense, batches, [name])[name])
    outputs = [network.get_submodule(name)(x).double().mean(0) for network in (dense, model)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-3)  # a bias of about 2 in float16
    assert not torch.equal(bias, dense.get_submodule(name).bias)
