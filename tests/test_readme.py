"""Every command and code block of the README runs; only sizes are cut down."""

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
    script = [sys.executable, ROOT / "scripts" / "benchmark_baseline.py", "--output", output, "--figure", figure]
    sizes = ["--seq_len", "64", "--samples", "16", "--eval_windows", "2", "--only", "2:4 + 4 bit"]
    printed = run([*script, *sizes], tmp_path)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["dense", "2:4 + 4 bit (ref)"]
    assert output.exists()
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_every_row_of_the_readmes_table_is_a_row_of_the_benchmark():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from benchmark_baseline import RECIPES
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    table = README.split("<!-- table: make bench-baseline -->")[1].split("<!-- end of table -->")[0]
    methods = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert methods == ["dense", *RECIPES]


def test_the_solver_benchmark_runs_and_both_solve_the_same_problem(tmp_path):
    script = ROOT / "scripts" / "benchmark_solver.py"
    printed = run([sys.executable, script, "--samples", "2", "--repeats", "1", "--no-fail"], tmp_path)
    errors = [float(line.split("|")[3]) for line in printed.splitlines() if line.startswith(("| paper", "| ours"))]
    assert len(errors) == 2
    # Same algorithm in float32; masks and codes differ on near ties only.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
