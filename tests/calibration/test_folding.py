"""Scales that neighbours take: the function stays the same bit for bit, and the bytes go."""

from unittest import mock

import pytest
import torch
from models_for_tests import make_batches, make_model
from oracles import generator
from packed_models import load, logits
from runs_for_tests import make_loader, make_trainer

from sgpt_lightning.calibration import compress as compress_module
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.folding import fold_scales
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.format.packing import unpack_weight
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.placement import BlocksElsewhere
from sgpt_lightning.presets import Scaling
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.rules import LayerRule
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDABLE = Scaling("fixed", 0.6, fold=True)
QUICK = {"preset": "gptq", "target_avg_bits": 3, "scaling": FOLDABLE}
READERS = {
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},  # two norms, v, and fc1 through a ReLU
    # heads share v, so that o_proj keeps its scales; up takes those of down
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_fc"},  # v is a third of c_attn, and there is a GELU
    "gemma2": {"down_proj"},  # its norms scale by 1 + weight
}
"""Linears whose inputs something else can scale, by family: known from the architecture."""


def uneven(family: str):
    """A model whose columns differ in size, so that scales do."""
    model = make_model(family)
    for linear in find_decoder_blocks(model).linears().values():
        matrix = weight_matrix(linear)
        matrix *= 2.0 ** torch.randint(-3, 4, (matrix.shape[1],), generator=generator(matrix.shape[1]))
    return model


def compressed(family: str, **settings):
    """Such a model, compressed; its scales are not folded yet."""
    model = uneven(family)
    recipe = Recipe(**(QUICK | settings))
    with mock.patch.object(compress_module, "fold_scales", lambda model, solved, batch: solved):
        return model, compress(model, make_batches(1), recipe, storage_dtype=torch.float16)


def scaled(solved) -> set[str]:
    return {name for name, linear in solved.items() if linear.packed.spec.scaled}


@pytest.mark.parametrize("family", READERS)
def test_scales_go_where_the_architecture_lets_them_and_the_logits_stay(family, tmp_path):
    model, solved = compressed(family)
    before, bytes_before = logits(model), sum(linear.packed.nbytes for linear in solved.values())
    assert all(len(linear.packed.tensors["weight_channel_scale"].unique()) > 2 for linear in solved.values())
    folded = fold_scales(model, solved, make_batches(1)[0])
    gone = scaled(solved) - scaled(folded)
    assert {name.rpartition(".")[2] for name in gone} == READERS[family]
    assert gone == {name for name in solved if name.rpartition(".")[2] in READERS[family]}  # in every block
    assert torch.equal(logits(model), before)
    freed = sum(2 * solved[name].packed.spec.shape[1] for name in gone)
    assert sum(linear.packed.nbytes for linear in folded.values()) == bytes_before - freed
    for name, linear in folded.items():
        assert torch.equal(unpack_weight(linear.packed), weight_matrix(model.get_submodule(name)))
        assert linear.report.bytes == linear.packed.nbytes
    save_compressed(tmp_path / "out", model, folded, storage_dtype=torch.float16)
    assert torch.equal(logits(load(tmp_path / "out")), before)


def test_zero_free_ranges_take_scales_and_linears_of_one_input_share_alpha():
    searched = {"preset": "best", "sparsity": 0.5, "scaling": Scaling("search", fold=True), "ignore": ["*.1.*"]}
    model, solved = compressed("opt", **searched)
    alphas = {name.rpartition(".")[2]: linear.report.scaling_alpha for name, linear in solved.items()}
    assert alphas["q_proj"] == alphas["k_proj"] == alphas["v_proj"] > 0
    before = logits(model)
    folded = fold_scales(model, solved, make_batches(1)[0])
    assert "q_proj" in {name.rpartition(".")[2] for name in scaled(solved)}
    assert scaled(folded) == set()
    assert torch.equal(logits(model), before)


def test_a_neighbour_that_was_only_pruned_or_left_alone_takes_scales_too():
    model, solved = compressed("opt", rules=[LayerRule("*.fc1", sparsity=0.5, quantize=False)], ignore=["*.v_proj"])
    before = logits(model)
    folded = fold_scales(model, solved, make_batches(1)[0])
    left = {name.rpartition(".")[2] for name in scaled(folded)}
    assert left == {"q_proj", "k_proj"}  # v reads the same input, and has no scales
    assert torch.equal(logits(model), before)


def test_scales_that_are_no_powers_of_two_or_differ_stay_where_they_are():
    model, solved = compressed("opt", scaling=Scaling("fixed", 0.6))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_scales(model, solved, make_batches(1)[0])
    assert folded == solved
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_compress_folds_where_it_is_told_to_and_a_fit_refuses(tmp_path):
    model, solved = compressed("opt")
    expected = logits(model)
    model = uneven("opt")
    folded = compress(model, make_batches(1), Recipe(**QUICK), storage_dtype=torch.float16)
    assert scaled(folded) == set() != scaled(solved)
    assert torch.equal(logits(model), expected)
    fit = make_trainer(tmp_path, SparseGPTCallback(Recipe(**QUICK)))
    with pytest.raises(ValueError, match=r"scaling\.fold is for sgpt_lightning\.compress"):
        fit.fit(CausalLMModule.from_model(make_model("opt")), make_loader())
    model = make_model("opt")
    BlocksElsewhere(model, "cpu")
    with pytest.raises(ValueError, match=r"scaling\.fold needs all of the model in memory"):
        compress(model, make_batches(1), Recipe(**QUICK))
