import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from models_for_tests import make_model
from runs_for_tests import make_dense_directory, make_loader, make_trainer, weight_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.recipe import LayerRule, Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.data import TextDataModule
from sgpt_lightning.trainer.module import CausalLMModule

pytestmark = pytest.mark.usefixtures("one_thread")
SEQ_LEN, BLOCKS = 64, 3


def data_module(**settings):
    return TextDataModule(**({"seq_len": SEQ_LEN, "num_samples": 20, "eval_windows": 4, "batch_size": 5} | settings))


def small_module():
    return CausalLMModule.from_model(make_model("opt"))


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
    """One run on text that the tests below look at from different sides."""
    root = tmp_path_factory.mktemp("run")
    dense = str(make_dense_directory(root / "dense", num_hidden_layers=BLOCKS))
    module, data = CausalLMModule(dense, seq_len=SEQ_LEN), data_module()
    callback = SparseGPTCallback(Recipe(rules=[LayerRule("*.fc2", sparsity=0.25)]), validate_every_block=True)
    fit = make_trainer(root, callback, logger=TensorBoardLogger(root, default_hp_metric=False))
    random_state = torch.get_rng_state()
    fit.fit(module, data)
    assert torch.equal(random_state, torch.get_rng_state()), "the user's generator moved"
    directory = callback.target(fit)
    report = json.loads((directory.parent / "report.json").read_text())
    return {
        "dense": dense, "module": module, "data": data, "trainer": fit, "directory": directory, "report": report,
    }  # fmt: skip


def test_perplexities_before_and_after_are_those_of_a_loop_by_hand(run):
    windows = torch.stack([batch["input_ids"] for batch in run["data"].val_dataloader()[0].dataset])
    reported = run["report"]["perplexity"]
    dense = CausalLMModule(run["dense"], seq_len=SEQ_LEN)
    dense.configure_model()
    # Float32 entropies are right to 5e-7 nats each, without a common sign: 1e-6 is above what is left in their mean.
    assert reported["dense"]["python-docs"] == pytest.approx(perplexity_by_hand(dense.network, windows), rel=1e-6)
    by_hand = perplexity_by_hand(run["module"].network, windows)
    assert reported["compressed"]["python-docs"] == pytest.approx(by_hand, rel=1e-6)
    assert reported["compressed"]["python-docs"] != pytest.approx(reported["dense"]["python-docs"], rel=1e-5)


def test_epochs_are_blocks_and_every_batch_steps_the_clock(run):
    assert run["trainer"].current_epoch == 1 + BLOCKS  # one for the gradients
    assert run["trainer"].global_step == (1 + BLOCKS) * 4  # 20 windows in batches of 5


def test_the_saved_model_reads_back_to_the_same_logits(run):
    tokens = torch.arange(100, 100 + SEQ_LEN)[None]
    with torch.no_grad():
        expected = run["module"].network(tokens).logits
        assert torch.equal(load_compressed(run["directory"])(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:.*but have no logger configured")  # what validate() returns is what is logged
def test_a_compressed_directory_validates_like_the_model_in_memory(run):
    packed = CausalLMModule(str(run["directory"]), seq_len=SEQ_LEN)
    found = make_trainer(run["directory"].parent, SparseGPTCallback()).validate(packed, data_module(), verbose=False)
    assert found[0]["perplexity/python-docs"] == run["report"]["perplexity"]["compressed"]["python-docs"]


def test_compressing_a_compressed_model_again_is_refused(run, tmp_path):
    again = CausalLMModule(str(run["directory"]), seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="already compressed"):
        make_trainer(tmp_path, SparseGPTCallback()).fit(again, data_module())
    assert again.network is None


def test_report_json_adds_up(run):
    report = run["report"]
    size = weight_file(run["directory"]).stat().st_size
    assert report["bytes"]["file"] == size
    assert sum(report["bytes"][part] for part in ("linears", "embeddings", "other")) == size
    assert report["bytes"]["linears"] == sum(linear["bytes"] for linear in report["linears"])
    weights = sum(linear["weights"] for linear in report["linears"])
    assert report["bits_per_weight"]["linears"] == pytest.approx(8 * report["bytes"]["linears"] / weights)
    assert {"calibrate", "solve", "evaluate"} == set(report["seconds"])
    protocol = report["perplexity"]["protocol"]["python-docs"]
    assert (protocol["seq_len"], protocol["windows"], protocol["dtype"]) == (SEQ_LEN, 4, "float32")
    assert report["recipe"]["sparsity"] == 0.5
    assert report["model"] == run["dense"]
    assert report["calibration"]["protocol"]["windows"] == 20
    assert "torch" in report["versions"]
    assert report["calibration"]["column_loops"] == "torch"  # in Triton on a GPU
    for linear in report["linears"]:
        expected = 0.25 if linear["name"].endswith("fc2") else 0.5
        assert linear["sparsity"] == pytest.approx(expected, abs=1 / linear["weights"])
        assert linear["mean_bits"] <= 4.0
        wide = "fc1" if linear["allocation"] == "rows" else "fc2"  # 64 of either; all else is 32
        assert sum(linear["bits_histogram"].values()) == (64 if linear["name"].endswith(wide) else 32)


def test_tensorboard_shows_perplexity_by_compressed_blocks(run):
    events = EventAccumulator(run["trainer"].log_dir, size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    curve = events.Scalars("perplexity/python-docs")
    assert [point.step for point in curve] == list(range(BLOCKS + 1))
    reported = run["report"]["perplexity"]
    assert curve[0].value == pytest.approx(reported["dense"]["python-docs"], rel=1e-6)
    assert curve[-1].value == pytest.approx(reported["compressed"]["python-docs"], rel=1e-6)
    for figure in ("mean_bits", "relative_error", "bytes"):
        points = events.Scalars(f"{figure}/fc1")  # one curve for a kind of linear, not a chart of one dot for each
        expected = [linear[figure] for linear in run["report"]["linears"] if linear["name"].endswith(".fc1")]
        assert [point.step for point in points] == list(range(1, BLOCKS + 1))
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)
    assert "bits/self_attn.q_proj" in events.Tags()["histograms"]
    assert "plan" in events.Tags()["images"]
    assert not [tag for tag in events.Tags()["scalars"] if "decoder.layers" in tag]
    assert {"recipe/text_summary", "summary/text_summary", "plan/text_summary"} <= set(events.Tags()["tensors"])


def test_the_histograms_of_an_entropy_coded_run_count_every_channel(tmp_path):
    """Also those that need no bit at all, as those of an input that never fires."""
    recipe = Recipe(coding="entropy", target_bits_per_weight=3.0, ignore=["*.fc2"])
    fit = make_trainer(tmp_path, SparseGPTCallback(recipe), logger=TensorBoardLogger(tmp_path, default_hp_metric=False))
    fit.fit(small_module(), make_loader(), make_loader(seed=1))
    events = EventAccumulator(fit.log_dir)
    events.Reload()
    report = json.loads((Path(fit.log_dir) / "report.json").read_text())
    assert len(report["linears"]) == 5 * 2
    (whole,) = events.Histograms("bits/all")
    counts = [
        (bits, sum(linear["bits_histogram"].get(str(bits), 0) for linear in report["linears"])) for bits in range(9)
    ]
    edges = whole.histogram_value.bucket_limit
    shown = [(round(edge - 0.5), n) for edge, n in zip(edges, whole.histogram_value.bucket, strict=True) if n]
    assert shown == [(bits, n) for bits, n in counts if n]
    assert sum(n for _, n in shown) == 5 * 2 * 32  # the linears' inputs
    losses = [point.value for point in events.Scalars("predicted_loss/fc1")]
    expected = [linear["predicted_loss"] for linear in report["linears"] if linear["name"].endswith(".fc1")]
    assert losses == pytest.approx(expected, rel=1e-6)  # float32
    assert min(losses) > 0


def test_the_clock_stays_out_of_checkpoints(run, tmp_path):
    run["trainer"].save_checkpoint(tmp_path / "lightning.ckpt")
    stored = torch.load(tmp_path / "lightning.ckpt", weights_only=True)
    assert "clock" not in stored["state_dict"]


def test_one_shot_calibration_takes_an_epoch_for_each_block_and_compresses_everything(tmp_path):
    module, save_dir = small_module(), tmp_path / "out"
    callback = SparseGPTCallback(Recipe(target_avg_bits=None), calibration="one-shot", save_dir=str(save_dir))
    fit = make_trainer(tmp_path, callback)
    fit.fit(module, make_loader(), make_loader(seed=1))
    assert fit.current_epoch == 1 + 2  # one for the gradients
    report = json.loads((tmp_path / "report.json").read_text())
    assert [linear["sparsity"] for linear in report["linears"]] == [0.5] * 12


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")  # which is the case that is tested
def test_a_users_own_loaders_work_without_a_data_module_or_validation(tmp_path):
    callback = SparseGPTCallback(save_dir=str(tmp_path / "out"))
    make_trainer(tmp_path, callback, limit_val_batches=0).fit(small_module(), make_loader())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"] == {"dense": {}, "compressed": {}, "protocol": {}}
    assert len(report["linears"]) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"precision": "16-mixed"}, "precision"), ({"precision": "bf16-mixed"}, "precision")],
)
@pytest.mark.filterwarnings("ignore:.*is not supported on CPU.*")
def test_mixed_precision_is_refused_before_the_model_is_loaded(tmp_path, settings, message):
    module = CausalLMModule()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, SparseGPTCallback(), **settings).fit(module, data_module())
    assert module.network is None


def test_a_foreign_output_directory_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    module = CausalLMModule()
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        make_trainer(tmp_path, SparseGPTCallback(save_dir=str(tmp_path))).fit(module, data_module())
    assert module.network is None
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_another_module_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="LightningModule"):
        SparseGPTCallback().setup(make_trainer(tmp_path, SparseGPTCallback()), LightningModule(), "fit")


def test_fit_without_the_callback_says_what_is_missing(tmp_path):
    module = small_module()
    module.network.train()  # as Lightning wants it
    with pytest.raises(RuntimeError, match="SparseGPTCallback"):
        make_trainer(tmp_path).fit(module, make_loader(), make_loader(seed=1))


def test_few_calibration_tokens_are_warned_of(tmp_path):
    module = CausalLMModule.from_model(make_model("opt"), seq_len=24)
    with pytest.warns(UserWarning, match="48 calibration tokens are fewer than the 64 in_features"):
        make_trainer(tmp_path, SparseGPTCallback()).fit(module, make_loader(2, batch_size=1), make_loader())


def test_nan_activations_are_named_by_layer_and_batch(tmp_path):
    module = small_module()
    module.network.model.decoder.layers[1].final_layer_norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.fc1 received NaN or inf in calibration batch 0"):
        make_trainer(tmp_path, SparseGPTCallback()).fit(module, make_loader(), make_loader(seed=1))


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
