"""A run that did not do all it planned says so, writes nothing, and leaves everything as it found it."""

import gc
import json
import weakref

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from models_for_tests import make_model, make_tokens
from runs_for_tests import make_dense_directory, make_loader, make_trainer
from torch.utils.data import IterableDataset

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.setup import IncompleteRunError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer"),
]
PRUNED = Recipe(preset="sparsegpt", target_avg_bits=None)


def module():
    return CausalLMModule.from_model(make_model("opt"))


class StopAfterTheFirstBlock(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


class Fail(Callback):
    def on_fit_start(self, trainer, pl_module):
        raise RuntimeError("another callback fails")


@pytest.fixture
def finished(tmp_path):
    """A whole model from an earlier run, and its bytes."""
    model, directory = make_model("opt", seed=1), tmp_path / "out"
    solved = compress(model, list(make_loader()), PRUNED)
    save_compressed(directory, model, solved, storage_dtype=torch.float16)
    return directory, contents(directory)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_steps": 3}, "trainer.max_steps=3"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0"),
    ],
    ids=str,
)
def test_a_limit_that_would_end_the_run_early_is_refused(finished, tmp_path, settings, named):
    directory, before = finished
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED, save_dir=str(directory)), **settings).fit(
            module(), make_loader()
        )
    assert contents(directory) == before


@pytest.mark.parametrize("settings", [{}, {"max_time": {"seconds": 0}}], ids=["should_stop", "max_time"])
def test_a_run_that_was_stopped_raises_and_keeps_the_earlier_model(finished, tmp_path, settings, capsys):
    directory, before = finished
    callback = SparseGPTCallback(PRUNED, save_dir=str(directory))
    others = [] if settings else [StopAfterTheFirstBlock()]
    with pytest.raises(IncompleteRunError, match=r"ended after [01] of 2 epochs, [06] linears solved"):
        make_trainer(tmp_path, callback, *others, **settings).fit(module(), make_loader())
    assert contents(directory) == before
    assert callback.manifest is None
    assert "as asked" not in capsys.readouterr().out
    assert not (tmp_path / "report.json").exists()


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_a_run_without_a_batch_raises(tmp_path):
    empty = torch.utils.data.DataLoader([])
    with pytest.raises(IncompleteRunError, match="0 of 2 epochs, 0 linears solved"):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(module(), empty)


def test_data_without_a_length_is_refused_before_anything_runs(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="training data must have a length"):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(module(), torch.utils.data.DataLoader(Endless()))


def test_a_model_is_compressed_once(tmp_path):
    compressed = module()
    make_trainer(tmp_path, SparseGPTCallback(PRUNED, save_dir=str(tmp_path / "out"))).fit(compressed, make_loader())
    again = SparseGPTCallback(PRUNED, save_dir=str(tmp_path / "again"))
    with pytest.raises(ValueError, match="already compressed"):
        make_trainer(tmp_path, again).fit(compressed, make_loader())
    with pytest.raises(ValueError, match="compressed before"):
        compress(compressed.network, list(make_loader()), PRUNED)
    with pytest.raises(ValueError, match="compressed before"):
        compress(load_compressed(tmp_path / "out"), list(make_loader()), PRUNED)
    assert not (tmp_path / "again").exists()


class CountValidations(Callback):
    def __init__(self):
        self.seen = 0

    def on_validation_start(self, trainer, pl_module):
        self.seen += 1


@pytest.mark.parametrize("mode", ["sequential", "one-shot"])
def test_a_trainer_fits_several_times_and_each_time_all_blocks_between_two_measurements(tmp_path, mode):
    callback, validations = SparseGPTCallback(PRUNED, mode), CountValidations()
    trainer = make_trainer(tmp_path, callback, validations)
    for fits in range(1, 5):
        trainer.fit(module(), make_loader(), make_loader(seed=1))
        assert len(callback.solved) == 12
        assert validations.seen == 2 * fits


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainers_settings_and_the_networks_mode_are_given_back(tmp_path, fails):
    settings = {"max_epochs": 5, "check_val_every_n_epoch": 3, "num_sanity_val_steps": 4, "log_every_n_steps": 17}
    wrapped = module()
    callbacks = [SparseGPTCallback(PRUNED), *([Fail()] if fails else [])]
    trainer = make_trainer(tmp_path, *callbacks, **settings)
    if fails:
        with pytest.raises(RuntimeError, match="another callback"):
            trainer.fit(wrapped, make_loader())
    else:
        trainer.fit(wrapped, make_loader())
    assert {name: getattr(trainer, name) for name in settings} == settings
    assert not any(part.training for part in wrapped.network.modules())


def test_an_exception_leaves_no_hidden_states_hooks_or_titles_behind(tmp_path):
    broken = module()
    with torch.no_grad():
        broken.network.model.decoder.layers[1].final_layer_norm.weight[0] = float("nan")
    entered = []
    handle = broken.network.model.decoder.layers[0].register_forward_pre_hook(
        lambda block, args: entered.append(weakref.ref(args[0]))
    )
    callback = SparseGPTCallback(PRUNED)
    with pytest.raises(ValueError, match=r"layers\.1\.fc1 received NaN or inf") as raised:
        make_trainer(tmp_path, callback).fit(broken, make_loader())
    raised.value.__traceback__ = None
    del raised
    handle.remove()
    gc.collect()
    assert entered
    assert [tensor for tensor in entered if tensor() is not None] == []
    assert (broken.stages, broken.measured_state) == ({}, "")
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in broken.network.modules())
    with pytest.raises(RuntimeError, match="SparseGPTCallback"):
        make_trainer(tmp_path).fit(broken, make_loader())


@pytest.fixture(scope="module")
def dense_directory(tmp_path_factory):
    return str(make_dense_directory(tmp_path_factory.mktemp("dense")))


def test_a_protocol_tells_the_text_that_was_used(dense_directory, tmp_path):
    data = TextDataModule(dense_directory, seq_len=32, num_samples=20, eval_windows=6, batch_size=4)
    callback = SparseGPTCallback(PRUNED)
    limits = {"limit_train_batches": 3, "limit_val_batches": 1}
    make_trainer(tmp_path, callback, **limits).fit(CausalLMModule(dense_directory, seq_len=32), data)
    used = callback.manifest.run["calibration"]["protocol"]
    assert (used["windows"], used["tokens"]) == (12, 12 * 32)
    assert "trainer.limit_train_batches" in used["selection"]
    measured = callback.manifest.run["perplexity"]["protocol"]["python-docs"]
    assert (measured["windows"], measured["tokens"]) == (4, 4 * 32)
    assert "trainer.limit_val_batches" in measured["selection"]


def test_a_data_module_without_validation_data_is_enough(tmp_path):
    class TrainingOnly(LightningDataModule):
        def train_dataloader(self):
            return make_loader()

    callback = SparseGPTCallback(PRUNED)
    make_trainer(tmp_path, callback).fit(module(), datamodule=TrainingOnly())
    assert callback.manifest.run["perplexity"] == {"dense": {}, "compressed": {}, "protocol": {}}


@pytest.mark.parametrize("content", ["years of work", '{"year": 1}', "[1]"])
def test_a_foreign_report_is_refused_and_left_as_it_was(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    dense = module()
    before = [p.clone() for p in dense.network.parameters()]
    with pytest.raises(ValueError, match=r"report\.json exists and is no report"):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(dense, make_loader())
    assert (tmp_path / "report.json").read_text() == content
    assert all(torch.equal(*pair) for pair in zip(before, dense.network.parameters(), strict=True))


def test_an_own_report_is_replaced(tmp_path):
    for _ in range(2):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(module(), make_loader())
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["linears"]) == len(find_decoder_blocks(make_model("opt")).linears())


def test_windows_beyond_the_models_positions_are_named(tmp_path):
    with pytest.raises(ValueError, match="calibration batch 0 has windows of 65 tokens, the model has 64 positions"):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(module(), make_loader(time=65))


def test_only_real_tokens_count_towards_too_few(tmp_path):
    windows = make_tokens(6, 24)
    mask = torch.zeros_like(windows)
    mask[:, :8] = 1
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": real} for row, real in zip(windows, mask, strict=True)], batch_size=3
    )
    with pytest.warns(UserWarning, match="48 calibration tokens are fewer than the 64 in_features"):
        make_trainer(tmp_path, SparseGPTCallback(PRUNED)).fit(module(), loader)


class PutAFileInTheWay(Callback):
    """Stands for a disk that fills up while the run goes on: the target's parent cannot be made any more."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        self.path.write_text("in the way")


def test_what_was_solved_is_kept_when_the_target_cannot_be_written(tmp_path):
    blocked = PutAFileInTheWay(tmp_path / "disk")
    callback = SparseGPTCallback(PRUNED, save_dir=str(tmp_path / "disk" / "model"))
    wrapped = module()
    with pytest.raises(OSError, match=r"could not be written to .*disk/model .*, but to .*rescued-\d+: move it"):
        make_trainer(tmp_path, callback, blocked).fit(wrapped, make_loader())
    rescued = next(tmp_path.glob("rescued-*"))
    tokens = make_tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(load_compressed(rescued)(tokens).logits, wrapped.network(tokens).logits)


def test_settings_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"recipe must be a Recipe, got \{"):
        SparseGPTCallback({"sparsity": 0.5})
    with pytest.raises(ValueError, match="calibration must be one of sequential, one-shot, got 'twice'"):
        SparseGPTCallback(calibration="twice")


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_evaluation_windows_beyond_the_models_positions_are_named(tmp_path, stage):
    trainer, long = make_trainer(tmp_path, SparseGPTCallback(PRUNED)), make_loader(time=65)
    run = trainer.validate if stage == "validate" else trainer.fit
    loaders = (long,) if stage == "validate" else (make_loader(), long)
    with pytest.raises(ValueError, match="evaluation batch 0 has windows of 65 tokens, the model has 64 positions"):
        run(module(), *loaders)


def test_a_run_that_leaves_linears_alone_says_so(tmp_path, capsys):
    recipe = Recipe(preset="sparsegpt", target_avg_bits=None, ignore=["*.fc*"])
    make_trainer(tmp_path, SparseGPTCallback(recipe)).fit(module(), make_loader())
    # Of a block's matrices, four are 32 x 32 and two 32 x 64.
    assert "8 linears solved, nothing quantized, 50.0% of the linears' weights left as they were; all as asked" in (
        capsys.readouterr().out
    )
