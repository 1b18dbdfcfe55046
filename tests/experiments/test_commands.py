"""The commands as a user types them, on a tiny model and a text of words."""

import re

import pytest
from readme_runs import run_main

from sgpt_lightning.experiments import ablate, compare, selftest, sweep
from sgpt_lightning.experiments.arms import Arm, ours

FILES = {"table.md", "rows.csv", "study.json", "figure.png", "rows.jsonl"}
SMALLER = ["--windows", "3", "--seeds", "0"]


@pytest.fixture
def options(tiny, texts):
    calibration, held_out = map(str, texts)
    return ["--model", str(tiny), "--calibration", calibration, "--evaluation", held_out, "--device", "cpu"]


def first_cells(text):
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


def test_compare_shows_every_method_on_a_layer_and_on_a_model(options, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LAYER_SEEDS", (0,))
    run = run_main("compare", *options, "--quick", *SMALLER, "--output", tmp_path)
    names = [arm.name for arm in compare.ARMS]
    assert first_cells(run.out) == ["one layer, random data", *names, "method", "dense", *names]
    assert "calibration.txt: 3 windows of 64 tokens" in run.out  # the model has 64 positions
    assert "quick: few windows" in run.out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (tmp_path / "table.md").read_text().strip() in run.out
    assert run.err.count("measured before") == 0
    again = run_main("compare", *options, "--quick", *SMALLER, "--output", tmp_path)
    assert again.err.count("measured before") == len(names) + 1
    shown = [re.sub(r"[\d.]+ \|$", "", line) for line in run.out.splitlines() if line.startswith("| rate-coded")]
    assert (
        shown[1]
        == [re.sub(r"[\d.]+ \|$", "", line) for line in again.out.splitlines() if line.startswith("| rate-coded")][1]
    )


def test_an_arm_that_fails_ends_with_1_when_the_others_have_run(options, tmp_path, monkeypatch):
    broken = ours("broken", pattern="2:5", preset="sparsegpt")
    works = ours("works", preset="sparsegpt")
    monkeypatch.setattr(compare, "ARMS", (broken, works))
    run = run_main("compare", *options, "--quick", *SMALLER, "--output", tmp_path, status=1)
    assert first_cells(run.out) == ["one layer, random data", "works", "method", "dense", "works"]
    failures = [line for line in run.err.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1 + len(compare.LAYER_SEEDS)
    assert all("broken" in line for line in failures)
    assert "2:5" in failures[-1]


def test_sweep_says_of_every_curve_whether_it_is_monotone(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "QUICK_BITS", (2.5, 5.0))
    run = run_main("sweep", *options, "--quick", "--windows", 3, "--output", tmp_path)
    verdicts = [line for line in run.out.splitlines() if re.match(r".*: (NOT )?monotone", line)]
    assert [line.split(":")[0] for line in verdicts] == list(sweep.METHODS)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_ablate_puts_a_deviation_beside_every_difference(options, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "score_arms", lambda: [Arm("all", round_bits=4), Arm("fewer", round_bits=2)])
    parts = ablate.part_arms()[:2]
    monkeypatch.setattr(ablate, "part_arms", lambda: parts)
    run = run_main("ablate", *options, "--quick", "--windows", 3, "--output", tmp_path)
    assert first_cells(run.out) == ["arm", "all", "fewer", "arm", "all parts", "without centre"]
    differences = re.findall(r"[+-]\d+\.\d+ ± (\d+\.\d+) ", run.out)
    assert len(differences) == 4
    assert [float(deviation) for deviation in differences[:2]] == [0, 0]  # rounding sees no calibration text
    assert float(differences[2]) > 0
    assert "only the first 1 of 2 decoder blocks" in run.out


def test_selftest_says_what_it_checked(tmp_path):
    run = run_main("selftest", "--output", tmp_path)
    checked = first_cells(run.out)[1:]
    assert checked[0] == "import"
    assert [f"{bits} bit" for bits in range(1, 9)] == checked[1:9]
    assert {name.rpartition(" ")[2] for name in checked[9:14]} == {"uniform", "quantile", "budget", "loss", "rows"}
    assert checked[14:] == ["pattern 2:4", "rate-coded, 3 bits", "save and reload, fixed widths",
                            "save and reload, rate-coded"]  # fmt: skip
    assert "18 of 18 checks passed" in run.out
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "figure.png"}


def test_selftest_finds_what_is_broken_and_ends_with_1(tmp_path, monkeypatch):
    unpack, load = selftest.unpack_weight, selftest.load_compressed
    monkeypatch.setattr(selftest, "unpack_weight", lambda packed: unpack(packed).roll(1, 0))

    def load_something_else(directory):
        model = load(directory)
        model.lm_head.weight.data.mul_(2)
        return model

    monkeypatch.setattr(selftest, "load_compressed", load_something_else)
    run = run_main("selftest", "--quick", "--output", tmp_path, status=1)
    results = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in run.out.splitlines() if "|" in line}
    assert results["import"] == "ok"
    assert results["4 bit"] == results["rate-coded, 3 bits"] == "FAILED"
    assert results["save and reload, fixed widths"] == "FAILED"
    assert "does not unpack" in run.out
    assert "other logits" in run.out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--windows", "0"], "--windows must be at least 1, got 0"),
        (["--seeds", "1", "1"], "--seeds must name each once"),
        (["--model", "./no-such-model"], "is not an existing directory"),
    ],
)
def test_what_a_user_gets_wrong_is_one_message_and_status_2(options, tmp_path, wrong, message):
    run = run_main("sweep", *options, *wrong, "--output", tmp_path / "none", status=2)
    assert message in run.err
    assert not (tmp_path / "none").exists()
