"""A fit whose blocks come one at a time, from the CPU or from files: the same file, perplexities and report."""

import re
import shlex

import pytest
import torch
from models_for_tests import make_model, make_padded_batches, make_tokens
from readme_runs import CUT, ROOT, blocks, cut_down, run_main
from runs_for_tests import make_dense_directory, make_loader, make_trainer, weight_file

from sgpt_lightning.calibration import hidden_states
from sgpt_lightning.calibration.perplexity_by_block import add_batches
from sgpt_lightning.evaluation.evaluate import add_batch
from sgpt_lightning.evaluation.perplexity import Perplexity
from sgpt_lightning.models.placement import BlocksElsewhere, placement_of
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer import offload
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.last_checkpoint import LastCheckpoint
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")


GPTQ = Recipe(preset="gptq")
CODED = Recipe(coding="entropy", target_bits_per_weight=5.0, ignore=["*.fc?"])
"""One budget for the model, by the gradients of its loss."""


def fit(root, dense, place, *callbacks, recipe=GPTQ, **settings):
    """Run a fit into `root`; return the callback."""
    callback = SparseGPTCallback(recipe, save_dir=str(root / "out"), validate_every_block=True, activations="disk")
    trainer = make_trainer(root, callback, *callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(CausalLMModule(str(dense), seq_len=24, offload=place), make_loader(), make_loader(seed=1), **settings)
    return callback


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_dense_directory(tmp_path_factory.mktemp("dense") / "dense")


@pytest.mark.parametrize("recipe", [GPTQ, CODED], ids=["gptq", "coded"])
def test_a_fit_writes_the_same_bytes_and_measures_the_same_wherever_blocks_are(recipe, dense, tmp_path):
    runs = {place: fit(tmp_path / place, dense, place, recipe=recipe) for place in ("none", "cpu", "disk")}
    files = {place: weight_file(tmp_path / place / "out").read_bytes() for place in runs}
    measured = {place: run.state.perplexity for place, run in runs.items()}
    assert measured["none"].keys() == {"dense", "after 1 blocks", "compressed"}
    for place in ("cpu", "disk"):
        assert files[place] == files["none"]
        assert measured[place] == measured["none"]


def test_the_readmes_dry_run_says_what_a_fit_from_files_takes_and_writes_nothing(two_blocks, tmp_path, monkeypatch):
    (line,) = (line for block in blocks("bash") for line in block.splitlines() if "dry_run" in line)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with cut_down(two_blocks):
        run = run_main(*shlex.split(line)[1:], *CUT["fit"], status=0)
    found = dict(re.findall(r"^(\w[\w ]+?)  +([\d.,]+) (?:MB|s)", run.out, re.MULTILINE))
    assert found.keys() == {"peak memory of the process", "disk", "compressed weights", "time"}
    assert float(found["compressed weights"]) < float(found["disk"])  # hidden states besides
    assert not list(tmp_path.rglob("*.safetensors"))


class _StopError(RuntimeError):
    pass


def test_a_run_from_files_goes_on_after_a_block_to_the_same_bytes(dense, tmp_path, monkeypatch):
    fit(tmp_path / "whole", dense, "none")
    place = BlocksElsewhere.put_back

    def stop(self, index):
        if index in self._solved:
            raise _StopError  # when block 1 is about to be solved
        place(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(BlocksElsewhere, "put_back", stop)
        with pytest.raises(_StopError):
            fit(tmp_path / "run", dense, "disk", LastCheckpoint())
    fit(tmp_path / "run", dense, "disk", LastCheckpoint(), ckpt_path="last")
    assert weight_file(tmp_path / "run" / "out").read_bytes() == weight_file(tmp_path / "whole" / "out").read_bytes()


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "falcon"])
def test_perplexity_block_by_block_is_that_of_the_whole_model(family):
    model, batches = make_model(family), make_padded_batches(3)
    whole, by_block = Perplexity(), Perplexity()
    for batch in batches:
        add_batch(whole, model, batch)
    add_batches(by_block, model, batches, "disk")
    assert by_block.compute() == whole.compute()
    assert by_block.tokens == whole.tokens
    assert by_block.windows == whole.windows


@pytest.mark.parametrize(("free", "expected"), [(2**40, "none"), (10**5, "disk")])
def test_auto_reads_from_files_what_would_not_fit(free, expected, dense, monkeypatch):
    monkeypatch.setattr(offload, "free_bytes", lambda device: free)
    module = CausalLMModule(str(dense), seq_len=24, offload="auto")
    module.configure_model()
    assert placement_of(module.network).moves == (expected == "disk")
    linear = module.network.model.decoder.layers[0].fc1
    assert linear.weight.is_meta == (expected == "disk")
    tokens = make_tokens(1, 8)
    assert torch.isfinite(module({"input_ids": tokens})).all()
    assert hidden_states.free_bytes(torch.device("cpu")) > 2**20


def test_an_unknown_place_for_blocks_is_refused(dense):
    with pytest.raises(ValueError, match="offload must be one of auto, none, cpu, disk, got 'gpu'"):
        CausalLMModule(str(dense), seq_len=24, offload="gpu")
