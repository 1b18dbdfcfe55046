import json
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from sgpt_lightning.callback import SparseGPTCallback
from sgpt_lightning.checkpoint import load_compressed
from sgpt_lightning.data import TextDataModule
from sgpt_lightning.module import CausalLMModule
from sgpt_lightning.recipe import LayerRule, Recipe

SEQ_LEN = 64


def data_module(**settings):
    return TextDataModule(**({"seq_len": SEQ_LEN, "num_samples": 20, "eval_windows": 4, "batch_size": 5} | settings))


def trainer(root, callback, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": root}
    return Trainer(callbacks=[callback], **(quiet | defaults | settings))


def perplexity_by_hand(network, windows):
    """Mean over tokens in float64, from whole logits."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = network(window[None]).logits[0, :-1].double()
        chosen = logits.log_softmax(-1).gather(1, window[1:, None])
        total, count = total - chosen.sum().item(), count + len(chosen)
    return math.exp(total / count)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real run on the embedded model that the tests below look at from different sides."""
    root = tmp_path_factory.mktemp("run")
    module, data = CausalLMModule(seq_len=SEQ_LEN), data_module()
    callback = SparseGPTCallback(Recipe(rules=[LayerRule("*.fc2", sparsity=0.25)]), validate_every_block=True)
    logger = TensorBoardLogger(root, default_hp_metric=False)
    fit = trainer(root, callback, logger=logger)
    random_state = torch.get_rng_state()
    fit.fit(module, data)
    assert torch.equal(random_state, torch.get_rng_state()), "the user's generator moved"
    return {"module": module, "data": data, "callback": callback, "trainer": fit, "directory": callback.target(fit)}


def test_perplexities_before_and_after_are_those_of_a_loop_by_hand(run):
    windows = torch.stack([batch["input_ids"] for batch in run["data"].val_dataloader()[0].dataset])
    reported = run["callback"].manifest.run["perplexity"]
    dense = CausalLMModule(seq_len=SEQ_LEN)
    dense.configure_model()
    # Float32 entropies are right to 5e-7 nats each, without a common sign: 1e-6 is above what is left in their mean.
    assert reported["dense"]["python-docs"] == pytest.approx(perplexity_by_hand(dense.network, windows), rel=1e-6)
    by_hand = perplexity_by_hand(run["module"].network, windows)
    assert reported["compressed"]["python-docs"] == pytest.approx(by_hand, rel=1e-6)
    assert reported["compressed"]["python-docs"] > reported["dense"]["python-docs"]


def test_epochs_are_blocks_and_every_batch_steps_the_clock(run):
    blocks = run["module"].config.num_hidden_layers
    assert run["trainer"].current_epoch == 1 + blocks  # one for the gradients
    assert run["trainer"].global_step == (1 + blocks) * 4  # 20 windows in batches of 5


def test_the_saved_model_reads_back_to_the_same_logits(run):
    tokens = torch.arange(100, 100 + SEQ_LEN)[None]
    with torch.no_grad():
        expected = run["module"].network(tokens).logits
        assert torch.equal(load_compressed(run["directory"])(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:.*but have no logger configured")  # what validate() returns is what is logged
def test_a_compressed_directory_validates_like_the_model_in_memory(run):
    packed = CausalLMModule(str(run["directory"]), seq_len=SEQ_LEN)
    found = trainer(run["directory"].parent, SparseGPTCallback()).validate(packed, data_module(), verbose=False)
    reported = run["callback"].manifest.run["perplexity"]["compressed"]["python-docs"]
    assert found[0]["perplexity/python-docs"] == reported


def test_compressing_a_compressed_model_again_is_refused(run, tmp_path):
    again = CausalLMModule(str(run["directory"]), seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="already compressed"):
        trainer(tmp_path, SparseGPTCallback()).fit(again, data_module())
    assert again.network is None


def test_report_json_adds_up(run):
    report = json.loads((run["directory"].parent / "report.json").read_text())
    size = (run["directory"] / "sgpt.safetensors").stat().st_size
    assert report["bytes"]["file"] == size
    assert sum(report["bytes"][part] for part in ("linears", "embeddings", "other")) == size
    assert report["bytes"]["linears"] == sum(linear["bytes"] for linear in report["linears"])
    weights = sum(linear["weights"] for linear in report["linears"])
    assert report["bits_per_weight"]["linears"] == pytest.approx(8 * report["bytes"]["linears"] / weights)
    assert {"calibrate", "solve", "evaluate"} == set(report["seconds"])
    protocol = report["perplexity"]["protocol"]["python-docs"]
    assert (protocol["seq_len"], protocol["windows"], protocol["dtype"]) == (SEQ_LEN, 4, "float32")
    assert report["recipe"]["sparsity"] == 0.5
    assert "torch" in report["versions"]
    for linear in report["linears"]:
        expected = 0.25 if linear["name"].endswith("fc2") else 0.5
        assert linear["sparsity"] == pytest.approx(expected, abs=1 / linear["weights"])
        assert linear["mean_bits"] <= 4.0
        assert sum(linear["bits_histogram"].values()) in (256, 1024)


def test_tensorboard_shows_perplexity_by_compressed_blocks(run):
    events = EventAccumulator(run["trainer"].log_dir, size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    blocks = run["module"].config.num_hidden_layers
    curve = events.Scalars("perplexity/python-docs")
    assert [point.step for point in curve] == list(range(blocks + 1))
    reported = run["callback"].manifest.run["perplexity"]
    assert curve[0].value == pytest.approx(reported["dense"]["python-docs"], rel=1e-6)
    assert curve[-1].value == pytest.approx(reported["compressed"]["python-docs"], rel=1e-6)
    name = "model.decoder.layers.3.fc1"
    assert events.Scalars(f"mean_bits/{name}")[0].value <= 4.0
    assert events.Scalars(f"relative_error/{name}")[0].step == 4
    assert f"bits/{name}" in events.Tags()["histograms"]
    assert {"recipe/text_summary", "summary/text_summary"} <= set(events.Tags()["tensors"])


def test_the_clock_stays_out_of_checkpoints(run, tmp_path):
    run["trainer"].save_checkpoint(tmp_path / "lightning.ckpt")
    stored = torch.load(tmp_path / "lightning.ckpt", weights_only=True)
    assert "clock" not in stored["state_dict"]


def test_one_shot_calibration_takes_one_epoch_and_compresses_everything(tmp_path):
    module = CausalLMModule(seq_len=SEQ_LEN)
    callback = SparseGPTCallback(Recipe(target_avg_bits=None), calibration="one-shot", save_dir=str(tmp_path / "out"))
    fit = trainer(tmp_path, callback)
    fit.fit(module, data_module(eval_windows=1))
    assert fit.current_epoch == 2  # one for the gradients
    assert len(callback.solved) == 6 * module.config.num_hidden_layers
    assert all(linear.report.sparsity == 0.5 for linear in callback.solved.values())


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")  # which is the case that is tested
def test_a_users_own_loaders_work_without_a_data_module_or_validation(tmp_path):
    tokens = torch.randint(4, 8000, (40, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row} for row in tokens], batch_size=20)
    module = CausalLMModule(seq_len=SEQ_LEN)
    module.configure_model()
    wrapped = CausalLMModule.from_model(module.network, seq_len=SEQ_LEN)
    callback = SparseGPTCallback(save_dir=str(tmp_path / "out"))
    trainer(tmp_path, callback, limit_val_batches=0).fit(wrapped, loader)
    assert callback.manifest.run["perplexity"] == {"dense": {}, "compressed": {}, "protocol": {}}
    assert len(callback.solved) == 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"precision": "16-mixed"}, "precision"), ({"precision": "bf16-mixed"}, "precision")],
)
@pytest.mark.filterwarnings("ignore:.*is not supported on CPU.*")
def test_mixed_precision_is_refused_before_the_model_is_loaded(tmp_path, settings, message):
    module = CausalLMModule()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, SparseGPTCallback(), **settings).fit(module, data_module())
    assert module.network is None


def test_a_foreign_output_directory_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    module = CausalLMModule()
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        trainer(tmp_path, SparseGPTCallback(save_dir=str(tmp_path))).fit(module, data_module())
    assert module.network is None
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_another_module_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="LightningModule"):
        SparseGPTCallback().setup(trainer(tmp_path, SparseGPTCallback()), LightningModule(), "fit")


def test_fit_without_the_callback_says_what_is_missing(tmp_path):
    module = CausalLMModule(seq_len=SEQ_LEN)
    module.configure_model()
    module.network.train()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    alone = Trainer(max_epochs=1, accelerator="cpu", logger=False, limit_val_batches=0, **quiet)
    with pytest.raises(RuntimeError, match="SparseGPTCallback"):
        alone.fit(module, data_module())


def test_few_calibration_tokens_are_warned_of(tmp_path):
    callback = SparseGPTCallback(Recipe(target_avg_bits=None, ignore=["*.[0-6].*"]), save_dir=str(tmp_path / "out"))
    data = data_module(num_samples=2, batch_size=1)
    with pytest.warns(UserWarning, match="128 calibration tokens are fewer than the 1024 in_features"):
        trainer(tmp_path, callback, limit_val_batches=0).fit(CausalLMModule(seq_len=SEQ_LEN), data)


def test_nan_activations_are_named_by_layer_and_batch(tmp_path):
    module = CausalLMModule(seq_len=SEQ_LEN)
    module.configure_model()
    with torch.no_grad():
        module.network.model.decoder.layers[2].final_layer_norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.2\.fc1 received NaN or inf in calibration batch 0"):
        trainer(tmp_path, SparseGPTCallback(), limit_val_batches=0).fit(module, data_module())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 513}, "at most the 512 positions"),
        ({"seq_len": 1}, "at least 2"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"path": "/no/such/model"}, "not an existing directory"),
    ],
)
def test_a_bad_model_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLMModule(**settings)
