"""What a run says of itself, on disk, on screen and in the event files, against what is so."""

import contextlib
import io
import json
import math
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from models_for_tests import make_batches, make_model
from runs_for_tests import make_dense_directory, make_loader, make_trainer, weight_file
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.presets import ImportanceWeights
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule
from sgpt_lightning.trainer.progress import CompressionProgressBar

pytestmark = pytest.mark.usefixtures("one_thread")
NEXT_TO_NO_DAMPING = 1e-12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that goes as asked, with all that a user may see of it; its model does not say in which dtype it is."""
    root = tmp_path_factory.mktemp("run")
    dense = make_dense_directory(root / "dense")
    module = CausalLMModule(str(dense), seq_len=24)
    logger = TensorBoardLogger(root, default_hp_metric=False)
    bar = CompressionProgressBar()
    save_dir = root / "compressed"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        trainer = make_trainer(
            root, SparseGPTCallback(save_dir=str(save_dir)), bar, logger=logger, enable_progress_bar=True
        )
        trainer.fit(module, make_loader(12), make_loader(seed=1))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    report = json.loads((root / "lightning_logs" / "version_0" / "report.json").read_text())
    return {"dense": dense, "saved": save_dir, "printed": printed.getvalue(), "events": events, "report": report}


@pytest.fixture(scope="module")
def starved(tmp_path_factory):
    """Two tokens for 32 to 64 channels and next to no damping: every Hessian needs far more than was asked for."""
    root = tmp_path_factory.mktemp("starved")
    module = CausalLMModule.from_model(make_model("opt"), seq_len=2)
    callback = SparseGPTCallback(Recipe(damp_percent=NEXT_TO_NO_DAMPING))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.warns(UserWarning, match="calibration tokens are fewer"):
        make_trainer(root, callback).fit(module, make_loader(1, 2, 1), make_loader(seed=1))
    return root, module.network, printed.getvalue()


def test_more_damping_than_asked_for_is_in_the_report_and_in_the_model_directory(starved):
    root, _, _ = starved
    report = json.loads((root / "report.json").read_text())
    manifest = json.loads((root / "compressed" / "sgpt_manifest.json").read_text())
    assert len(report["linears"]) == 12
    for linear in report["linears"]:
        assert linear["status"] in ("damped", "float64")
        assert linear["damp_percent"] > 2 * NEXT_TO_NO_DAMPING
        entry = manifest["linears"][linear["name"]]
        assert (entry["status"], entry["damp_percent"]) == (linear["status"], linear["damp_percent"])


def test_more_damping_than_asked_for_is_said_on_the_screen_with_every_name(starved):
    root, _, printed = starved
    assert "all as asked" not in printed
    (line,) = [line for line in printed.splitlines() if "not as asked" in line]
    closing = [line for line in printed.splitlines() if " bits a weight" in line]
    assert closing[-1].endswith("12 of 12 linears with more damping or precision than asked for")
    for linear in json.loads((root / "report.json").read_text())["linears"]:
        assert f"{linear['name']} ({linear['status']}, damping {linear['damp_percent']:g})" in line


def test_a_run_that_went_as_asked_says_so(run):
    assert "all as asked" in run["printed"]
    assert {linear["status"] for linear in run["report"]["linears"]} == {"ok"}
    assert {linear["damp_percent"] for linear in run["report"]["linears"]} == {0.01}


@pytest.mark.parametrize("act_order", [False, True])
def test_asking_for_the_damping_that_was_reported_gives_the_same_weights(act_order):
    """The first linear of the model, so that nothing that came before it differs."""
    name, weights = "model.decoder.layers.0.self_attn.q_proj", []
    damping = NEXT_TO_NO_DAMPING
    for _ in range(2):
        model = make_model("opt")
        recipe = Recipe(preset="sparsegpt", damp_percent=damping, parts={"act_order": act_order})
        solved = compress(model, make_batches(1, batch=1, time=2), recipe)
        damping = solved[name].report.damp_percent
        weights.append(model.get_submodule(name).weight)
    assert torch.equal(*weights)


def inputs_of(name, model, batches):
    """What a linear of the dense model receives, float64 `[tokens, in_features]`."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    return torch.cat(seen).double().numpy()


def widths_of(packed):
    """The width of each input channel, read from the bytes as `format/packing.py` describes them."""
    used = np.array(packed.spec.widths)
    bits = math.ceil(math.log2(len(used)))
    stream = np.unpackbits(packed.tensors["weight_widths"].numpy(), bitorder="little")
    return used[stream[: bits * packed.spec.shape[1]].reshape(-1, bits) @ (1 << np.arange(bits))]


@pytest.mark.parametrize("score", ["activation", "weight", "output", "stability"])
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "fc2"])
def test_the_importance_weights_of_the_recipe_decide_which_channels_get_bits(score, linear):
    name, batches = f"model.decoder.layers.0.{linear}", make_batches(4)
    dense, model = make_model("opt"), make_model("opt")
    weights = dict.fromkeys(["activation", "hessian", "weight", "output", "stability"], 0.0) | {score: 1.0}
    others = [other for other in find_decoder_blocks(model).linears() if other != name]  # it sees the dense model
    recipe = Recipe(
        preset="gptq",
        allocation="quantile",
        uniform_if_better=False,
        importance=ImportanceWeights(**weights),
        ignore=others,
    )
    solved = compress(model, batches, recipe)[name]
    x, w = inputs_of(name, dense, batches), dense.get_submodule(name).weight.double().numpy()
    size = np.abs(x).mean(0)
    expected = {
        "activation": size,
        "weight": np.abs(w).mean(0),
        "output": np.sqrt(np.square(w * size).mean(0)),
        "stability": x.var(0),
    }[score]
    widths = widths_of(solved.packed)
    assert len(set(widths)) > 2
    assert (np.diff(widths[np.argsort(expected)]) >= 0).all()
    # moments of 96 tokens, summed in float64 from float32 products
    share = expected / expected.mean()
    assert solved.report.importance_range == pytest.approx((share.min(), share.max()), rel=1e-5)


def test_the_dense_row_of_the_table_is_the_size_of_the_dense_checkpoint(run):
    stored = sum(tensor.nbytes for tensor in load_file(weight_file(run["dense"])).values())
    (row,) = [line for line in run["printed"].splitlines() if line.startswith("| dense, float16")]
    assert row.split("|")[-2].split() == [f"{stored / 1e6:.2f}", "MB"]
    assert row.split("|")[-3].split() == ["16.00"]


def test_a_checkpoint_that_does_not_say_its_dtype_is_stored_in_16_bits(run):
    """Its weights are float16 numbers, held as float32: nothing is lost."""
    dense = load_file(weight_file(run["dense"]))["model.decoder.embed_tokens.weight"]
    stored = load_file(weight_file(run["saved"]))["model.decoder.embed_tokens.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(stored, dense)


def test_the_bar_names_blocks_and_data_sets_and_no_version_of_the_logger(run):
    assert "block 2 of 2" in run["printed"]
    assert "perplexity" in run["printed"]
    assert "v_num" not in run["printed"]


def test_hparams_hold_the_recipe_beside_final_perplexity_and_size(run):
    events, report = run["events"], run["report"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["sparsity"].number_value == 0.5
    assert hparams["target_avg_bits"].number_value == 4
    assert hparams["preset"].string_value == "best"
    (size,) = events.Scalars("final/file_bytes")
    (perplexity,) = events.Scalars("final/perplexity/0")
    assert size.value == weight_file(run["saved"]).stat().st_size
    assert perplexity.value == pytest.approx(report["perplexity"]["compressed"]["0"], rel=1e-6)  # float32 events


class Stopwatch(Callback):
    """Times what happens in the calls of the callbacks between its two halves, without asking the package."""

    def __init__(self):
        self.started = self.solving = 0.0
        self.ends, self.left = [], []

    def begin(self):
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, *args):
        if trainer.is_last_batch:
            now = time.perf_counter()
            self.solving += now - self.started
            self.ends.append(now)
            self.left.append(float(trainer.progress_bar_metrics.get("seconds_left", math.nan)))


def run_slowly(root, **settings):
    """Blocks that sleep 20 ms a batch whenever they run, and little to solve: 6 epochs that are alike."""
    watch, before = Stopwatch(), Callback()
    before.on_train_batch_end = lambda *args: watch.begin()
    network = make_model("opt", num_hidden_layers=6)
    for block in network.model.decoder.layers:
        # not a hook of the block: that is called where a prologue only passes by
        block.self_attn_layer_norm.register_forward_pre_hook(lambda *args: time.sleep(0.02))
    recipe = Recipe(preset="sparsegpt", ignore=["*self_attn*", "*fc2"])
    started = time.perf_counter()
    make_trainer(root, before, SparseGPTCallback(recipe), watch, **settings).fit(
        CausalLMModule.from_model(network), make_loader(), make_loader(seed=1)
    )
    return watch, json.loads((root / "report.json").read_text())["seconds"], time.perf_counter() - started


def test_the_seconds_of_the_report_are_those_of_a_stopwatch(tmp_path):
    watch, seconds, total = run_slowly(tmp_path)
    assert 0.5 * watch.solving < seconds["solve"] <= watch.solving
    assert seconds["calibrate"] >= 6 * 2 * 0.02  # 6 blocks, 2 batches
    assert seconds["evaluate"] >= 2 * 2 * 6 * 0.02  # before and after, 2 batches through 6 blocks
    assert sum(seconds.values()) <= total


def test_the_time_left_is_what_the_rest_takes(tmp_path):
    watch, _, _ = run_slowly(tmp_path, limit_val_batches=0)  # whether it counts the last validation does not matter
    assert len(watch.left) == 6
    for end, left in list(zip(watch.ends, watch.left, strict=True))[1:4]:
        # Epochs take as long as each other but for the first, which runs half as many blocks, and a machine's moods.
        assert 1 / 3 < left / (watch.ends[-1] - end) < 3
    assert watch.left[-1] < 0.03  # less than any block takes


def test_the_generation_config_goes_along(tmp_path):
    model = make_model("opt")
    model.generation_config.max_new_tokens = 7
    solved = compress(model, make_batches(1), Recipe())
    save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float32)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_a_model_is_read_with_the_attention_that_it_was_evaluated_with(tmp_path):
    model = make_model("opt", attn_implementation="eager")
    solved = compress(model, make_batches(1), Recipe())
    save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float32)
    assert load_compressed(tmp_path / "out").config._attn_implementation == "eager"
    assert load_compressed(tmp_path / "out", attn_implementation="sdpa").config._attn_implementation == "sdpa"
