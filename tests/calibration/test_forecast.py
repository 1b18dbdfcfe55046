"""What is said beforehand against what is measured: of the result its bytes, of the process its memory."""

import json
import subprocess
import sys

import pytest
import torch
from models_for_tests import make_batches, make_model
from runs_for_tests import make_dense_directory

from sgpt_lightning import cli
from sgpt_lightning.calibration import forecast as forecast_module
from sgpt_lightning.calibration import gradients_by_block, hidden_states, meter, sequential
from sgpt_lightning.calibration.by_block import BatchesByBlock
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.forecast import forecast
from sgpt_lightning.calibration.gradients import OutputGradients
from sgpt_lightning.calibration.hidden_states import split_over_tiers
from sgpt_lightning.calibration.schedules import calibration_for
from sgpt_lightning.calibration.sequential import SequentialCalibration
from sgpt_lightning.calibration.workload import Workload, gradients_together
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.models.placement import BlocksElsewhere
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {
    "best": Recipe(),
    "gptq": Recipe(preset="gptq"),
    "coded": Recipe(coding="entropy", target_bits_per_weight=6.0, embedding_bits=6.0),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_of_the_result_are_known_beforehand_and_the_model_stays_as_it_is(recipe, tmp_path):
    model, batches = make_model("opt", num_hidden_layers=4), make_batches(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = forecast(model, batches, RECIPES[recipe], Workload(batches=4), storage_dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    solved = compress(model, batches, RECIPES[recipe], storage_dtype=torch.float16)  # it is a dense one as before
    manifest = save_compressed(tmp_path / "out", model, solved, storage_dtype=torch.float16)
    stored = manifest.ledger.linears + manifest.ledger.embeddings + manifest.ledger.other
    assert said.result_bytes == pytest.approx(stored, rel=0.03)  # the first block stands for all
    assert set(said.parts) == {"evaluate", "gradients", "calibrate", "solve"}
    assert said.seconds == pytest.approx(sum(said.parts.values()))
    assert str(round(said.result_bytes / 1e6, 1)) in said.lines()


@pytest.mark.parametrize(("recipe", "groups"), [("gptq", 1), ("best", 4)])
def test_what_is_done_once_is_not_multiplied_and_the_text_is_apart_from_the_solve(recipe, groups, monkeypatch):
    """With a clock that only goes on where it is told to."""
    now, solves = [0.0], [0]

    def slow(owner, name, seconds):
        plain = getattr(owner, name)

        def slowly(*args, **kwargs):
            now[0] += seconds() if callable(seconds) else seconds
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowly)

    def first_is_slow():
        solves[0] += 1
        return 500.0 if solves[0] <= groups else 7.0

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    slow(SequentialCalibration, "_enter", 1.0)
    slow(SequentialCalibration, "_collect", 2.0)
    slow(SequentialCalibration, "_carry_on", 3.0)
    slow(sequential, "solve_linears", first_is_slow)
    slow(OutputGradients, "observe", 11.0)
    said = forecast(make_model("opt", num_hidden_layers=5), make_batches(2), RECIPES[recipe], Workload(batches=10))
    assert said.parts["calibrate"] == 10 * (1.0 + 5 * groups * 2.0 + 4 * 3.0)
    assert said.parts["solve"] == 5 * groups * 7.0
    assert said.parts["gradients"] == (10 * 11.0 if recipe == "best" else 0.0)


@pytest.mark.parametrize("place", ["none", "cpu"])
def test_passes_over_the_text_are_foreseen_wherever_blocks_are(place, monkeypatch):
    """A block takes a batch one second, and three where it has to be brought for it; whole forwards take five."""
    now, run, observe, bring = [0.0], BatchesByBlock.each, OutputGradients.observe, BlocksElsewhere.bring
    add_one = forecast_module.add_batch
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])

    def goes_on(seconds, function, *args):
        now[0] += seconds
        return function(*args)

    def brought(self, index):
        return goes_on(3.0 if index not in self._resting else 0.0, bring, self, index)

    monkeypatch.setattr(BatchesByBlock, "each", lambda self, *args: goes_on(len(self.parts), run, self, *args))
    monkeypatch.setattr(OutputGradients, "observe", lambda *args: goes_on(15.0, observe, *args))
    monkeypatch.setattr(forecast_module, "add_batch", lambda *args: goes_on(5.0, add_one, *args))
    monkeypatch.setattr(BlocksElsewhere, "bring", brought)
    model, work = make_model("opt", num_hidden_layers=5), Workload(batches=10, evaluation_batches=7)
    if place == "cpu":
        BlocksElsewhere(model, "cpu")
    monkeypatch.setattr(gradients_by_block, "SHARE_OF_MODEL", 0.5)  # then the batches go in some groups
    said = forecast(model, make_batches(2), RECIPES["coded"], work)
    plans = calibration_for("sequential", model, RECIPES["coded"], torch.float32).plans
    together = gradients_together(model, plans, make_batches(1)[0])
    assert 1 < together < 5
    # Forwards and backwards for each group, once more for the statistics of the plan, and once to look at the blocks.
    brings = 0 if place == "none" else 5 * 3 * (2 * -(-10 // together) + 2)
    assert said.parts["gradients"] == 10 * 5 * 3 + brings
    assert said.parts["evaluate"] == 2 * (7 * 5 + (0 if place == "none" else 5 * 3 * 2))


def test_blocks_that_are_elsewhere_are_at_rest_and_dense_again():
    model = make_model("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placement = BlocksElsewhere(model, "cpu")
    forecast(model, make_batches(2), RECIPES["gptq"], Workload(batches=2))
    assert placement._resting == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hidden_states_are_dealt_out_as_the_store_does(monkeypatch):
    monkeypatch.setattr(hidden_states, "free_bytes", lambda device: 2 * 350)
    cpu = torch.device("cpu")
    assert split_over_tiers("auto", cpu, 100, 5) == {"device": 300, "cpu": 0, "disk": 200}
    assert split_over_tiers("disk", cpu, 100, 5) == {"device": 0, "cpu": 0, "disk": 500}
    assert split_over_tiers("device", cpu, 100, 5) == {"device": 500, "cpu": 0, "disk": 0}


SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[3])
from transformers import AutoModelForCausalLM, OPTConfig
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.calibration.forecast import forecast
from sgpt_lightning.calibration.workload import Workload
from sgpt_lightning.evaluation.peak_memory import peak_memory
from sgpt_lightning.recipe import Recipe

torch.set_num_threads(1)
size = int(sys.argv[2])

def made(size):
    config = OPTConfig(vocab_size=2048, hidden_size=size, ffn_dim=2 * size, num_hidden_layers=2, num_attention_heads=8,
                       max_position_embeddings=256, word_embed_proj_dim=size)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)

batches = [{"input_ids": torch.randint(3, 2048, (4, 256))} for _ in range(3)]
compress(made(32), batches[:1], Recipe(preset="gptq"))  # imports and what libraries keep
model = made(size)
if sys.argv[1] == "forecast":
    nbytes = forecast(model, batches, Recipe(preset="gptq"), Workload(batches=3)).cpu_bytes
else:
    with peak_memory("cpu") as peak:
        compress(model, batches, Recipe(preset="gptq"))
    nbytes = peak.nbytes
print(json.dumps(nbytes))
"""


@pytest.mark.parametrize("size", [384, 640])
def test_the_peak_of_memory_is_within_fifteen_percent_of_what_is_measured(size, tmp_path):
    def run(how):
        command = [sys.executable, "-c", SCRIPT, how, str(size), str(tmp_path)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout)

    assert run("forecast") == pytest.approx(run("compress"), rel=0.15)


def test_a_dry_run_says_what_a_fit_would_take_and_writes_nothing(tmp_path, monkeypatch, capsys):
    dense = make_dense_directory(tmp_path / "dense")
    settings = {"model.path": dense, "model.seq_len": 32, "data.num_samples": 8, "data.eval_windows": 4}
    settings |= {"sgpt.recipe.preset": "gptq", "trainer.accelerator": "cpu", "trainer.default_root_dir": tmp_path / "r"}
    given = [f"--{name}={value}" for name, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["sgpt", "fit", *given, "--dry_run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for line in ("peak memory of the process", "disk", "compressed weights", "time"):
        assert f"\n{line}" in f"\n{shown}"
    assert not list((tmp_path).rglob("sgpt_manifest.json"))
