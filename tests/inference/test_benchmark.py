"""What is run and counted when a model is measured; tables against figures that are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_for_tests import VOCAB, make_batches, make_model
from readme_runs import run_main

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.load import load_compressed
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.inference import benchmark as module
from sgpt_lightning.inference.benchmark import Benchmark, Measured, Speed, Workload, benchmark, weight_bytes
from sgpt_lightning.inference.speed_table import speed_tables
from sgpt_lightning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
WORK = Workload(batches=(1, 3), prefill=512, decode=3, repeats=1, residents=("packed", "coded"))
POSITIONS = 64
PERPLEXITY = {"dense": {"c4": 20.25}, "compressed": {"c4": 21.5, "ptb": 30.0}}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("benchmark") / "small"
    model = make_model("opt", num_hidden_layers=1)
    solved = compress(model, make_batches(2), Recipe(preset="gptq", target_avg_bits=4))
    save_compressed(directory, model, solved, storage_dtype=torch.float16, run={"perplexity": PERPLEXITY})
    return directory


def test_each_residence_runs_the_same_tokens_in_float32_on_a_cpu(small, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}

    def watched(path, **options):
        model = load_model(path, **options)
        assert options["dtype"] == torch.float32
        calls = seen.setdefault(options["resident"], [])
        model.register_forward_pre_hook(lambda _, args: calls.append(args[0].clone()))
        return model

    monkeypatch.setattr(module, "load_model", watched)
    found = benchmark(small, WORK, "cpu")
    assert [measured.resident for measured in found.measured] == ["dense", "packed", "coded"]
    warm, *packed = seen["packed"]
    assert warm.shape == (1, 1)
    for calls in (packed, seen["coded"]):
        assert all(torch.equal(mine, dense) for mine, dense in zip(calls, seen["dense"], strict=True))
    shapes = [tuple(ids.shape) for ids in seen["dense"]]
    rounds = WORK.repeats + 1  # a warm-up
    for batch, its in ((1, shapes[: len(shapes) // 2]), (3, shapes[len(shapes) // 2 :])):
        decode, prefill = its[: rounds * (1 + WORK.decode)], its[rounds * (1 + WORK.decode) :]
        assert decode == [(batch, POSITIONS - WORK.decode), *[(batch, 1)] * WORK.decode] * rounds
        assert prefill == [(batch, POSITIONS)] * rounds
    assert int(torch.cat([ids.flatten() for ids in seen["dense"]]).max()) < VOCAB
    speeds = {(speed.phase, speed.batch): speed.tokens for speed in found.measured[0].speeds}
    assert speeds == {("prefill", 1): 64, ("decode", 1): 3, ("prefill", 3): 64, ("decode", 3): 3}


def test_the_median_is_taken_of_what_comes_after_the_warm_up(monkeypatch):
    clock = iter([0, 99, 100, 101, 200, 207, 300, 303])  # 99 s to warm up, then 1, 7 and 3
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    prepared, ran = [], []
    device = torch.device("cpu")
    assert module._median(ran.append, 3, device, lambda: prepared.append(1) or len(prepared)) == 3
    assert ran == [1, 2, 3, 4]  # each with a cache of its own
    assert Speed("prefill", 8, 512, 2.0).tokens_per_second == 2048


def test_memory_and_files_are_counted(small):
    model = load_compressed(small)
    parameters = {name: tensor.numel() for name, tensor in model.named_parameters()}  # tied ones once
    assert weight_bytes(model) == 4 * sum(parameters.values())
    assert weight_bytes(load_compressed(small, resident="packed")) < weight_bytes(model)
    found = benchmark(small, replace(WORK, batches=(1,), repeats=1), "cpu")
    dense, packed, coded = found.measured
    assert dense.file_bytes == 2 * sum(parameters.values())
    assert packed.file_bytes == coded.file_bytes == (small / "sgpt.safetensors").stat().st_size
    assert dense.weight_bytes == 4 * sum(parameters.values()) > coded.weight_bytes
    if Path("/proc/self/status").exists():
        assert all(measured.peak_bytes is not None for measured in found.measured)


def made_up(dense: tuple[float, float], packed: tuple[float, float]) -> Benchmark:
    sides = [
        Measured(name, size, 10 * size, peak, (Speed("prefill", 8, 512, a), Speed("decode", 1, 16, b)))
        for name, size, peak, (a, b) in (("dense", 4_000_000, None, dense), ("packed", 1_000_000, 5_000_000, packed))
    ]
    return Benchmark("runs/small", "a GPU", "float16", 0, 3, tuple(sides), PERPLEXITY)


def test_the_tables_say_plainly_where_packed_is_slower():
    text = speed_tables(made_up((1.0, 1.0), (4.0, 0.5)))
    assert "0.0013 of its" in speed_tables(made_up((1.0, 1.0), (1.0, 768.0)))  # never 0.00
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["c4", "20.250", "21.500"] in cells
    assert ["ptb", "not measured", "30.000"] in cells
    assert ["dense", "4.00 MB", "40.00 MB", "not known"] in cells
    assert ["packed", "1.00 MB", "10.00 MB", "5.00 MB"] in cells
    assert ["prefill of 512, batch 8", "4,096.0", "1,024.0", "0.25"] in cells
    assert ["decode of 16, batch 1", "16.0", "32.0", "2"] in cells
    said = [line for line in text.splitlines() if "slower" in line]
    assert said == ["packed is slower than dense: prefill of 512, batch 8: 0.25 of its tokens a second"]
    fast = speed_tables(made_up((1.0, 1.0), (1.0, 0.5)))
    assert fast.splitlines()[-1] == "packed is nowhere slower than dense"


def test_the_command_prints_tables_or_json(small):
    options = ["--batches", "2", "--prefill", "8", "--decode", "2", "--repeats", "1", "--device", "cpu"]
    found = json.loads(run_main("benchmark", small, *options, "--json").out)
    assert (found["dtype"], [measured["resident"] for measured in found["measured"]]) == (
        "float32",
        ["dense", "packed"],
    )
    assert found["perplexity"] == PERPLEXITY
    for speed in found["measured"][1]["speeds"]:
        assert speed["tokens_per_second"] == pytest.approx(2 * speed["tokens"] / speed["seconds"])
    printed = run_main("benchmark", small, *options, "--resident", "coded").out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if "batch 2" in line and line[0] == "|"] == [
        "prefill of 8, batch 2", "decode of 2, batch 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "batches must be numbers from 1, got [0]"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--decode", "64"], "decode must leave room for a prompt in 64 positions, got 64"),
        (["--device", "abacus"], "device must be one of torch's, got 'abacus'"),
        (["--resident", "dense"], "invalid choice: 'dense'"),
    ],
)
def test_bad_options_are_an_error_and_status_2(options, message, small):
    assert message in run_main("benchmark", small, *options, status=2).err


def test_a_directory_that_is_no_compressed_model_is_named(tmp_path):
    assert "is not a compressed model" in run_main("benchmark", tmp_path, status=2).err
