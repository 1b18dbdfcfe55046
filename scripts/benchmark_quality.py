"""Perplexity and true bytes of this package's recipes and of their rivals: same windows, same order, one process.

    make bench-quality
    python scripts/benchmark_quality.py --model ../shared/models/opt-small \
        --calibration ../shared/data/wikipedia-calibration.txt \
        --evaluation ../shared/data/wikipedia-heldout.txt ../shared/data/c4-valid-2k.txt --seeds 0 1 2

Every row starts from the dense model again. Rivals are round-to-nearest, GPTQ (per row and in groups of 128) and
SparseGPT with the published settings (blocks of 128 columns, 1 % damping, per-row min-max grids, no reordering, blocks
in order), and the fixed-threshold mix of 2, 4 and 8 bits that this project's idea started from. Bits per weight and
file bytes are those of the packed tensors. Peak memory is that of the compression alone, the dense model and the one
that is compressed included: of tensors on a GPU, of the whole process on the CPU. With several seeds, each draws its
own calibration windows.

Needs neither Lightning nor datasets, so it runs on a bare GPU machine. The README's figure is drawn from its table:

    python scripts/benchmark_quality.py --redraw README.md --figure scripts/figures/opt-mini.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.controls import thresholds
from sgpt_lightning.experiments.figures import NO_PICTURE, Point, write_front
from sgpt_lightning.experiments.rows import Journal
from sgpt_lightning.experiments.study import Outcome, Setting, run_study
from sgpt_lightning.experiments.tables import (
    failure_lines,
    points_of,
    protocol_lines,
    study_table,
    write_csv,
    write_json,
)
from sgpt_lightning.recipe import Recipe

THREE_WIDTHS = Recipe(preset="sparsegpt", allocation="quantile", uniform_if_better=False)

ROWS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        ours("rate-coded 4", coding="entropy", target_bits_per_weight=4),
        ours("rate-coded 3", coding="entropy", target_bits_per_weight=3),
        ours("rate-coded 3, embeddings 5", coding="entropy", target_bits_per_weight=3, embedding_bits=5),
        ours("rate-coded 2.5", coding="entropy", target_bits_per_weight=2.5),
        ours("rate-coded 2", coding="entropy", target_bits_per_weight=2),
        Arm("RTN 4 bit", round_bits=4),
        ours("GPTQ 4 bit", preset="gptq"),
        ours("best, dense mean 4 bit", sparsity=0),
        Arm("RTN 3 bit", round_bits=3),
        ours("GPTQ 3 bit", preset="gptq", target_avg_bits=3),
        ours("GPTQ 3 bit, groups of 128", preset="gptq", target_avg_bits=3, group_size=128),
        ours("SparseGPT 50 % + 4 bit", preset="sparsegpt"),
        Arm("50 % + 2/4/8 bit by threshold", THREE_WIDTHS, thresholds()),
        ours("50 % + mean 4 bit, quantile", preset="sparsegpt", allocation="quantile", uniform_if_better=False),
        ours("50 % + mean 4 bit, budget", preset="sparsegpt", allocation="budget", uniform_if_better=False),
        ours("50 % + mean 4 bit, loss", preset="sparsegpt", allocation="loss", uniform_if_better=False),
        ours("best, 50 % + 4 bit", allocation="uniform"),
        ours("best, 50 % + mean 4 bit"),
        ours("best, dense 3 bit", sparsity=0, target_avg_bits=3, allocation="uniform"),
        ours("best, dense mean 3 bit", sparsity=0, target_avg_bits=3),
        ours("best, model scope 3.06", target_bits_per_weight=3.06, scope="model"),
        ours("SparseGPT 2:4 + 4 bit", preset="sparsegpt", pattern="2:4"),
        ours("best, 2:4 + mean 4 bit", pattern="2:4"),
        ours("SparseGPT 50 % + 3 bit", preset="sparsegpt", target_avg_bits=3),
        ours("best, 50 % + mean 3 bit", target_avg_bits=3),
        ours("best, model scope 2.58", target_bits_per_weight=2.58, scope="model"),
        ours("SparseGPT 50 % + 2 bit", preset="sparsegpt", target_avg_bits=2),
        ours("best, 50 % + 2 bit", target_avg_bits=2),
        ours("best, model scope 2.08", target_bits_per_weight=2.08, scope="model"),
        ours("SparseGPT 50 %", preset="sparsegpt", target_avg_bits=None),
        ours("best, 50 %", target_avg_bits=None),
        ours("SparseGPT 2:4", preset="sparsegpt", pattern="2:4", target_avg_bits=None),
        ours("best, 2:4", pattern="2:4", target_avg_bits=None),
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and print the table; files are written as the options say. Exit status 1 if a row failed."""
    arguments = _arguments(argv)
    if arguments.redraw:
        results = read_table(Path(arguments.redraw).read_text())
        return _redraw(results, list(results[0])[-1], arguments.figure)
    missing = [
        path for path in (arguments.calibration, *arguments.evaluation) if "/" in path and not Path(path).exists()
    ]
    if missing:
        raise SystemExit(f"not found: {', '.join(missing)}; give --calibration and --evaluation")
    arms = [arm for name, arm in ROWS.items() if not arguments.only or any(t in name for t in arguments.only)]
    if not arms:
        raise SystemExit(f"--only {arguments.only} matches no row; there are: {', '.join(ROWS)}")
    setting = Setting(
        model=arguments.model,
        calibration=arguments.calibration,
        evaluation=arguments.evaluation,
        seeds=arguments.seeds,
        windows=arguments.samples,
        eval_windows=arguments.eval_windows,
        seq_len=arguments.seq_len,
        device=arguments.device,
    )
    outcome = run_study(setting, arms, Journal(arguments.journal))
    print(f"{study_table(outcome)}\n\n{protocol_lines(outcome)}")
    _write_files(outcome, arguments)
    if outcome.failed:
        raise SystemExit(failure_lines(outcome))


def _write_files(outcome: Outcome, arguments: argparse.Namespace) -> None:
    if arguments.output:
        write_json(outcome, arguments.output)
    if arguments.csv:
        write_csv(outcome.rows, arguments.csv)
    if arguments.figure:
        text = outcome.texts[0]
        dense = outcome.rows[0].perplexity[text]
        if not write_front(points_of(outcome, text), dense, text, arguments.figure):
            print(NO_PICTURE)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-mini", help="embedded name, directory or hub id")
    parser.add_argument("--calibration", default="python-docs", help="text source")
    parser.add_argument("--evaluation", nargs="+", default=["python-docs"], help="text sources")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--eval_windows", type=int, default=100, help="evaluation windows per source")
    parser.add_argument("--seq_len", type=int, help="tokens per window; the model's positions if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the choice of calibration windows")
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--journal", type=Path, help="file of rows, from which an interrupted run goes on")
    parser.add_argument("--csv", type=Path, help="CSV file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write; needs matplotlib")
    parser.add_argument("--redraw", help="draw the figure from the table in this file, and run nothing")
    return parser.parse_args(argv)


def read_table(text: str) -> list[dict[str, Any]]:
    """Return the results that a table of `table` shows, those of one data set, from a text that holds one."""
    lines = text.split("<!-- table: make bench-quality -->")[-1].split("<!-- end of table -->")[0].strip().splitlines()
    name = lines[0].split("|")[4].strip()
    results = []
    for line in lines[2:]:
        method, bits, size, perplexity = (cell.strip() for cell in line.split("|")[1:5])
        family = "dense" if method == "dense" else ROWS[method].family
        row: dict[str, Any] = {"method": method, "family": family, "bits_per_weight": float(bits)}
        results.append(row | {"file_bytes": float(size) * 1e6, name: float(perplexity.split()[0])})
    return results


def _redraw(results: Sequence[dict[str, Any]], text: str, path: Path) -> None:
    points = [Point(row["method"], row["family"], row["bits_per_weight"], row[text]) for row in results[1:]]
    if not write_front(points, results[0][text], text, path):
        raise SystemExit(NO_PICTURE)


if __name__ == "__main__":
    main()
