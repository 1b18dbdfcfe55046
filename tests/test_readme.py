"""Every command and code block of the README runs; only the work is cut down."""

import csv
import json
import re
import runpy
import shutil
import subprocess

import pytest
from models_for_tests import make_model
from readme_runs import README, ROOT, blocks, cut_down

from sgpt_lightning.models.names import load_tokenizer


def script(name):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


ALONE = [number for number, block in enumerate(blocks("python")) if "runs/small" not in block]


@pytest.mark.parametrize("number", ALONE)
def test_a_python_block_runs_as_it_stands(number, two_blocks, tmp_path, monkeypatch):
    (tmp_path / "block.py").write_text(blocks("python")[number])
    monkeypatch.chdir(tmp_path)
    with cut_down(two_blocks):
        runpy.run_path("block.py", run_name="__main__")


def test_the_commands_run_in_order_and_fill_the_directory_they_name(readme_runs):
    directory, runs = readme_runs
    assert [run.command[1] for run in runs] == [
        "fit", "fit", "validate", "inspect", "generate", "benchmark", "export", "export",
    ]  # fmt: skip
    assert all("python-docs" in run.out for run in runs[:4])
    assert "== dense: opt-mini\n" in runs[4].out
    assert "packed is " in runs[5].out
    assert [path.stat().st_size > 1e6 for path in directory.glob("runs/**/*small.safetensors")] == [True]
    assert (directory / "runs" / "small" / "sgpt_manifest.json").is_file()
    for name in ("demo", "fixed-widths"):
        assert len(list((directory / "runs" / name).glob("lightning_logs/*/report.json"))) == 1


def test_what_the_commands_wrote_is_loaded_anywhere_and_written_again(readme_runs, monkeypatch, capsys):
    directory, _ = readme_runs
    (block,) = [block for block in blocks("python") if "runs/small" in block]
    monkeypatch.chdir(directory)
    (directory / "block.py").write_text(block)
    runpy.run_path("block.py", run_name="__main__")
    assert "The with statement" in capsys.readouterr().out
    small, copy = ({p.name: p.read_bytes() for p in (directory / "runs" / n).iterdir()} for n in ("small", "copy"))
    assert len(small) > 4
    assert {name: small[name] for name in copy} == copy
    assert {"sgpt.safetensors", "config.json", "sgpt_manifest.json", "tokenizer.json"} <= set(copy)


def make(target):
    command = [shutil.which("make"), "--no-print-directory", "--dry-run", target]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True).stdout


def test_the_make_targets_exist_and_do_what_is_said():
    for target in re.findall(r"make ([\w-]+)", README):
        make(target)
    assert "sgpt fit --config configs/demo.yaml" in make("demo")
    assert "-m pytest -q" in make("test").splitlines()[-1]


def test_the_benchmark_of_the_table_runs(tmp_path, capsys):
    output, figure, table = (tmp_path / name for name in ("rows.json", "figure.png", "rows.csv"))
    files = ["--output", str(output), "--figure", str(figure), "--csv", str(table)]
    sizes = ["--seq_len", "64", "--samples", "4", "--eval_windows", "2", "--seeds", "0", "1", "--device", "cpu"]
    script("benchmark_quality")["main"]([*files, *sizes, "--only", "RTN 3", "GPTQ 4"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    methods = ["dense", "GPTQ 4 bit", "RTN 3 bit"]
    assert [row.split("|")[1].strip() for row in rows[1:]] == methods
    measured = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in measured] == [
        ("dense", ""), *((method, str(seed)) for seed in (0, 1) for method in methods[1:])
    ]  # fmt: skip
    values = {(row["method"], row["seed"]): float(row["python-docs"]) for row in measured}
    assert values["RTN 3 bit", "0"] == values["RTN 3 bit", "1"]  # sees no calibration text
    assert values["GPTQ 4 bit", "0"] != values["GPTQ 4 bit", "1"]
    assert values["dense", ""] < min(values["GPTQ 4 bit", seed] for seed in "01") < values["RTN 3 bit", "0"]
    assert len(json.loads(output.read_text())["rows"]) == 5
    assert figure.read_bytes()[:4] == b"\x89PNG"
    # more than the two models that are held, of 8.5 million float32 parameters each, and less than a CI machine has
    peaks = {row["method"]: row["peak_bytes"] for row in measured}
    assert peaks.pop("dense") == ""
    assert all(2 * 4 * 8.5e6 < float(peak) < 8e9 for peak in peaks.values())
    assert [row.split("|")[-2].strip() for row in rows[:2]] == ["peak, MB", "-"]


def test_the_benchmark_runs_on_a_model_without_biases(tmp_path, capsys):
    tokenizer = load_tokenizer("opt-mini")
    tokenizer.save_pretrained(tmp_path)
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("One shoe, two shoes, and a boot that was lost in the snow. " * 40)
    rows = {"SparseGPT 2:4 + 4 bit": 2.75, "best, 2:4 + mean 4 bit": 2.75, "best, dense 3 bit": 3}
    sizes = ["--seq_len", "32", "--samples", "2", "--eval_windows", "1", "--device", "cpu"]
    options = ["--model", str(tmp_path), "--calibration", str(text), "--evaluation", str(text)]
    script("benchmark_quality")["main"]([*options, *sizes, "--only", *rows])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    bits = {cells[1].strip(): float(cells[2]) for cells in table}
    # mask and codes, and what a row stores besides: one bit a weight, and for its width a tenth, where it has 32 inputs
    assert all(least < bits.pop(name) < least + 1.1 for name, least in rows.items())
    assert not bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "no/such/text.txt"], "not found: no/such/text.txt"),
        (["--only", "magic"], "matches no row"),
    ],
)
def test_the_benchmark_says_what_is_missing_before_it_loads_anything(options, message):
    with pytest.raises(SystemExit, match=message):
        script("benchmark_quality")["main"](["--model", "no-such-model", *options])


def test_every_row_of_the_readmes_table_is_a_row_of_the_benchmark():
    table = README.split("<!-- table: make bench-quality -->")[1].split("<!-- end of table -->")[0]
    methods = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert methods == ["dense", *script("benchmark_quality")["ROWS"]]


def test_the_figure_is_drawn_from_the_readmes_table(tmp_path):
    figure = tmp_path / "figure.png"
    script("benchmark_quality")["main"](["--redraw", str(ROOT / "README.md"), "--figure", str(figure)])
    assert figure.read_bytes()[:4] == b"\x89PNG"
    rows = script("benchmark_quality")["read_table"](README)
    assert rows[0] == {"method": "dense", "family": "dense", "bits_per_weight": 16, "file_bytes": 17.09e6} | {
        "python-docs": 29.32
    }
    families = {row["method"]: row["family"] for row in rows}
    assert (families["rate-coded 3"], families["GPTQ 3 bit"], families["best, 50 %"]) == ("ours", "rival", "ours")


def test_the_solver_benchmark_runs_and_both_solve_the_same_problem(two_blocks, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    options = ["--model", str(two_blocks), "--windows", "2", "--repeats", "1", "--no-fail", "--device", "cpu"]
    script("benchmark_solver")["main"]([*options, "--shapes", "24x40", "32x32"])
    printed = capsys.readouterr().out
    columns = [line.split("|") for line in printed.splitlines() if line.startswith(("| published", "| ours"))]
    solves = [float(cells[3]) for cells in columns[:6]]
    # Same algorithm in float32; masks and codes differ on near ties only.
    assert solves[1::2] == pytest.approx(solves[::2], rel=0.02)
    assert [float(share) for share in re.findall(r"equal codes: (.*)%", printed)] == pytest.approx([100] * 3, abs=2)
    assert [cells[1].strip() for cells in columns[6:]] == ["published", "ours, sparsegpt", "ours, best"]
    assert re.findall(r"^. (\w[\w ]*\w) +. +[\d.]+ .$", printed, re.MULTILINE) == [
        "forward", "moments", "factor", "sweep", "rest of the solve", "pack",
    ]  # fmt: skip
