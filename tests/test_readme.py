"""Every command and code block of the README runs; only sizes are cut down."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["--model.seq_len", "64", "--data.num_samples", "20", "--data.eval_windows", "2", "--data.batch_size", "5"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command, cwd):
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_block_runs_as_it_stands(number, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(blocks("python")[number])
    run([sys.executable, script], tmp_path)


def test_the_commands_run_in_order(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sgpt ")]
    assert len(lines) >= 4
    for line in lines:
        command = shlex.split(line)
        sizes = [] if command[1] == "inspect" else SMALL
        printed = run([sys.executable, "-m", "sgpt_lightning", *command[1:], *sizes], tmp_path)
        assert "python-docs" in printed


def test_the_make_targets_exist_and_do_what_is_said():
    for target in re.findall(r"make ([\w-]+)", README):
        run(["make", "--no-print-directory", "--dry-run", target], ROOT)
    assert "sgpt fit --config configs/demo.yaml" in run(["make", "--no-print-directory", "--dry-run", "demo"], ROOT)
    assert run(["make", "--no-print-directory", "--dry-run", "test"], ROOT).splitlines()[-1].endswith("pytest -q")


def test_the_benchmark_of_the_table_runs(tmp_path):
    output, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    script = [sys.executable, ROOT / "scripts" / "benchmark_quality.py", "--output", output, "--figure", figure]
    table = tmp_path / "rows.csv"
    only = ["RTN 3 bit", "by threshold", "best, dense 3 bit"]
    sizes = ["--seq_len", "64", "--samples", "16", "--eval_windows", "2", "--csv", table, "--seeds", "0", "1"]
    printed = run([*script, *sizes, "--only", *only], tmp_path)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    methods = ["dense", "RTN 3 bit", "50 % + 2/4/8 bit by threshold", "best, dense 3 bit"]
    assert [row.split("|")[1].strip() for row in rows[1:]] == methods
    measured = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in measured] == [
        ("dense", ""), *((method, str(seed)) for seed in (0, 1) for method in methods[1:])
    ]  # fmt: skip
    values = {(row["method"], row["seed"]): float(row["python-docs"]) for row in measured}
    assert values["RTN 3 bit", "0"] == values["RTN 3 bit", "1"]  # sees no calibration text
    assert values["best, dense 3 bit", "0"] != values["best, dense 3 bit", "1"]
    assert values["dense", ""] < min(values["best, dense 3 bit", seed] for seed in "01") < values["RTN 3 bit", "0"]
    assert len(json.loads(output.read_text())["rows"]) == 7
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_the_benchmark_says_what_is_missing_before_it_loads_anything(tmp_path):
    script = [sys.executable, ROOT / "scripts" / "benchmark_quality.py", "--model", "no-such-model"]
    for options, message in (
        (["--calibration", "no/such/text.txt"], "not found: no/such/text.txt"),
        (["--only", "magic"], "matches no row"),
    ):
        done = subprocess.run(
            [*script, *options], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
        )
        assert done.returncode == 1
        assert message in done.stderr


def test_every_row_of_the_readmes_table_is_a_row_of_the_benchmark():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from benchmark_quality import ROWS
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    table = README.split("<!-- table: make bench-quality -->")[1].split("<!-- end of table -->")[0]
    methods = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert methods == ["dense", *ROWS]


def test_the_solver_benchmark_runs_and_both_solve_the_same_problem(tmp_path):
    script = ROOT / "scripts" / "benchmark_solver.py"
    printed = run([sys.executable, script, "--samples", "2", "--repeats", "1", "--no-fail"], tmp_path)
    errors = [float(line.split("|")[3]) for line in printed.splitlines() if line.startswith(("| paper", "| ours"))]
    assert len(errors) == 2
    # Same algorithm in float32; masks and codes differ on near ties only.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
