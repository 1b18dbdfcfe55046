"""Every model family through the whole of it: calibrate, solve, write, read."""

import pytest
import torch
from models_for_tests import PROMISED, VARIANTS, make_batches, make_model, make_tokens
from safetensors.torch import load_file

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
NOTHING = Recipe(preset="sparsegpt", sparsity=1e-5, target_avg_bits=None)  # of at most 2,048 weights: none goes


def batches_of_all_kinds():
    """One window and three, whole and padded on both sides."""
    batches = []
    for rows in (1, 3):
        batches.append({"input_ids": make_tokens(rows, 11, seed=rows)})
        mask = torch.ones(rows, 11, dtype=torch.int64)
        mask[0, :3] = 0
        mask[1:][-1:, -4:] = 0
        batches.append({"input_ids": make_tokens(rows, 11, seed=rows + 10), "attention_mask": mask})
    return batches


@pytest.mark.parametrize(("family", "attention"), [variant for variant in VARIANTS if variant[0] in PROMISED])
def test_a_compression_that_takes_nothing_away_changes_no_logit_in_memory_nor_on_disk(family, attention, tmp_path):
    dense, model = make_model(family, attention), make_model(family, attention)
    batches = batches_of_all_kinds()
    solved = compress(model, batches, NOTHING)
    assert set(solved) == set(find_decoder_blocks(dense).linears())
    save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float32)
    loaded = load_compressed(tmp_path / "out")
    assert loaded.config._attn_implementation == attention
    for batch in batches:
        # OPT's ReLU leaves inputs that no real token fires, whose weights are zero afterwards: padding may fire them.
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        expected = dense(**batch).logits[real]
        assert torch.equal(model(**batch).logits[real], expected)
        assert torch.equal(loaded(**batch).logits[real], expected)


CODED = Recipe(coding="entropy", target_bits_per_weight=5.0, ignore=["*.1.*"])
"""The first block alone: two take twice as long, and how a second one follows the first is seen with fixed widths."""


@pytest.mark.parametrize("recipe", [Recipe(target_avg_bits=3.5), CODED], ids=["fixed", "coded"])
@pytest.mark.parametrize("family", PROMISED)
def test_a_compressed_family_comes_back_bit_for_bit_and_its_bytes_add_up(family, recipe, tmp_path):
    model, names = make_model(family), list(find_decoder_blocks(make_model(family)).linears())
    solved = compress(model, make_batches(2), recipe, storage_dtype=torch.float16)
    assert list(solved) == [name for name in names if not recipe.ignores(name)]
    assert {linear.report.status for linear in solved.values()} == {"ok"}
    ledger = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float16).ledger
    loaded = load_compressed(tmp_path / "out")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    probe = make_tokens(3, 10, seed=99)
    assert torch.equal(loaded(probe).logits, model(probe).logits)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in load_file(path).items()}
    ours = sum(size for name, size in sizes.items() for linear in names if name.startswith(f"{linear}.weight"))
    assert ours == ledger.linears
    assert sum(linear.report.bytes for linear in solved.values()) <= ours
    assert sum(sizes.values()) == ledger.linears + ledger.embeddings + ledger.other
    assert ledger.file == path.stat().st_size
