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
import copy
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.checkpoint.save import save_compressed
from sgpt_lightning.core import rounding
from sgpt_lightning.core.grids import fit_affine_grid, quantize_matrix
from sgpt_lightning.core.solution import CompressedLinear, Quantized
from sgpt_lightning.evaluation.evaluate import evaluate
from sgpt_lightning.evaluation.peak_memory import peak_memory
from sgpt_lightning.format.packing import pack_weight, unpack_weight
from sgpt_lightning.format.records import SolvedLinear, describe_linear
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import set_weight_matrix, weight_matrix
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table
from sgpt_lightning.text.windows import calibration_windows, evaluation_windows

Batches = Sequence[Mapping[str, Tensor]]
Method = Callable[[nn.Module, Batches], dict[str, SolvedLinear]]
THRESHOLDS = (0.5, 1.2)
"""Scores, with a mean of 1, above which a channel gets 4 and 8 bits instead of 2: the fork's rule."""


@dataclass(frozen=True)
class Row:
    """One method in one setting."""

    family: str
    """`rival` or `ours`; decides the colour in the figure."""
    run: Method


def ours(**settings: Any) -> Row:
    """Return a row that compresses with a recipe."""
    recipe = Recipe(**settings)
    family = "ours" if recipe.preset == "best" else "rival"
    return Row(family, lambda model, batches: compress(model, batches, recipe, storage_dtype=torch.float16))


def round_to_nearest(bits: int) -> Row:
    """Return a row that rounds every weight to a per-row min-max grid, without calibration."""
    return Row("rival", lambda model, batches: _round_all(model, bits))


ROWS: dict[str, Row] = {
    "rate-coded 4": ours(coding="entropy", target_bits_per_weight=4),
    "rate-coded 3": ours(coding="entropy", target_bits_per_weight=3),
    "rate-coded 3, embeddings 5": ours(coding="entropy", target_bits_per_weight=3, embedding_bits=5),
    "rate-coded 2.5": ours(coding="entropy", target_bits_per_weight=2.5),
    "rate-coded 2": ours(coding="entropy", target_bits_per_weight=2),
    "RTN 4 bit": round_to_nearest(4),
    "GPTQ 4 bit": ours(preset="gptq"),
    "best, dense mean 4 bit": ours(sparsity=0),
    "RTN 3 bit": round_to_nearest(3),
    "GPTQ 3 bit": ours(preset="gptq", target_avg_bits=3),
    "GPTQ 3 bit, groups of 128": ours(preset="gptq", target_avg_bits=3, group_size=128),
    "SparseGPT 50 % + 4 bit": ours(preset="sparsegpt"),
    "50 % + 2/4/8 bit by threshold": Row("rival", lambda model, batches: _by_threshold(model, batches)),
    "50 % + mean 4 bit, quantile": ours(preset="sparsegpt", allocation="quantile", uniform_if_better=False),
    "50 % + mean 4 bit, budget": ours(preset="sparsegpt", allocation="budget", uniform_if_better=False),
    "50 % + mean 4 bit, loss": ours(preset="sparsegpt", allocation="loss", uniform_if_better=False),
    "best, 50 % + 4 bit": ours(allocation="uniform"),
    "best, 50 % + mean 4 bit": ours(),
    "best, dense 3 bit": ours(sparsity=0, target_avg_bits=3, allocation="uniform"),
    "best, dense mean 3 bit": ours(sparsity=0, target_avg_bits=3),
    "best, model scope 3.06": ours(target_bits_per_weight=3.06, scope="model"),
    "SparseGPT 2:4 + 4 bit": ours(preset="sparsegpt", pattern="2:4"),
    "best, 2:4 + mean 4 bit": ours(pattern="2:4"),
    "SparseGPT 50 % + 3 bit": ours(preset="sparsegpt", target_avg_bits=3),
    "best, 50 % + mean 3 bit": ours(target_avg_bits=3),
    "best, model scope 2.58": ours(target_bits_per_weight=2.58, scope="model"),
    "SparseGPT 50 % + 2 bit": ours(preset="sparsegpt", target_avg_bits=2),
    "best, 50 % + 2 bit": ours(target_avg_bits=2),
    "best, model scope 2.08": ours(target_bits_per_weight=2.08, scope="model"),
    "SparseGPT 50 %": ours(preset="sparsegpt", target_avg_bits=None),
    "best, 50 %": ours(target_avg_bits=None),
    "SparseGPT 2:4": ours(preset="sparsegpt", pattern="2:4", target_avg_bits=None),
    "best, 2:4": ours(pattern="2:4", target_avg_bits=None),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and print the table; files are written as the options say."""
    arguments = _arguments(argv)
    if arguments.redraw:
        results = read_table(Path(arguments.redraw).read_text())
        return _plot(results, list(results[0])[-1], arguments.figure)
    missing = [
        path for path in (arguments.calibration, *arguments.evaluation) if "/" in path and not Path(path).exists()
    ]
    if missing:
        raise SystemExit(f"not found: {', '.join(missing)}; give --calibration and --evaluation")
    rows = {name: row for name, row in ROWS.items() if not arguments.only or any(t in name for t in arguments.only)}
    if not rows:
        raise SystemExit(f"--only {arguments.only} matches no row; there are: {', '.join(ROWS)}")
    dense: Any = load_model(arguments.model).to(arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    seq_len = arguments.seq_len or dense.config.max_position_embeddings
    evaluated = {
        Path(name).stem: evaluation_windows(name, tokenizer, seq_len, arguments.eval_windows)
        for name in arguments.evaluation
    }
    texts = {name: windows.ids.to(arguments.device) for name, windows in evaluated.items()}
    results = [_dense_row(dense, texts)]
    print(results[-1], flush=True)
    for seed in arguments.seeds:
        drawn = calibration_windows(arguments.calibration, tokenizer, seq_len, arguments.samples, seed)
        batches = [{"input_ids": window[None].to(arguments.device)} for window in drawn.ids]
        for name, row in rows.items():
            results.append({"method": name, "family": row.family, "seed": seed} | _run(row, dense, batches, texts))
            print(results[-1], flush=True)
            if arguments.output:
                _write(arguments.output, vars(arguments), results)
    print(table(results, list(texts)))
    for name, windows in evaluated.items():
        print(f"protocol of {name}: {windows.protocol}")
    if arguments.csv:
        _write_csv(results, arguments.csv)
    if arguments.figure:
        _plot(results, next(iter(texts)), arguments.figure)


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
    parser.add_argument("--output", help="JSON file to write, after every row")
    parser.add_argument("--csv", help="CSV file to write")
    parser.add_argument("--figure", help="PNG file to write; needs matplotlib")
    parser.add_argument("--redraw", help="draw the figure from the table in this file, and run nothing")
    return parser.parse_args(argv)


def _run(row: Row, dense: nn.Module, batches: Batches, texts: dict[str, Tensor]) -> dict[str, Any]:
    model, device = copy.deepcopy(dense), batches[0]["input_ids"].device
    with peak_memory(device) as peak:
        started = time.perf_counter()
        solved = row.run(model, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        ledger = save_compressed(f"{directory}/model", model, solved, storage_dtype=torch.float16).ledger
    stored = {"bits_per_weight": ledger.linear_bits_per_weight, "file_bytes": ledger.file}
    return stored | {"seconds": seconds, "peak_bytes": peak.nbytes} | _perplexities(model, texts)


def _dense_row(dense: nn.Module, texts: dict[str, Tensor]) -> dict[str, Any]:
    size = 2 * sum(parameter.numel() for parameter in dense.parameters())
    row = {"method": "dense", "family": "dense", "seed": None, "bits_per_weight": 16.0, "file_bytes": size}
    return row | {"seconds": 0.0, "peak_bytes": None} | _perplexities(dense, texts)


def _perplexities(model: nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    return {name: evaluate(model, windows) for name, windows in texts.items()}


@torch.no_grad()
def _round_all(model: nn.Module, bits: int) -> dict[str, SolvedLinear]:
    solved = {}
    for name, linear in find_decoder_blocks(model).linears().items():
        weight = weight_matrix(linear).float()
        widths = torch.full((weight.shape[1],), bits, dtype=torch.uint8, device=weight.device)
        grid = fit_affine_grid(weight, bits)
        solution = Quantized(quantize_matrix(weight, widths, grid), widths, grid)
        compressed = CompressedLinear(
            solution, relative_error=None, importance_range=(0.0, 0.0), damp_percent=0.0, status="ok"
        )
        packed = pack_weight(solution)
        set_weight_matrix(linear, unpack_weight(packed))
        solved[name] = SolvedLinear(packed.to("cpu"), describe_linear(name, compressed, packed))
    return solved


def _by_threshold(model: nn.Module, batches: Batches) -> dict[str, SolvedLinear]:
    """Compress with the fork's rule in place of an allocation: it has no budget, so it takes what bits it takes."""

    def rule(scores: Tensor, widths: Sequence[int], target: float, counts: Tensor) -> Tensor:
        relative = scores / scores.mean()
        low, high = THRESHOLDS
        return (2 + 2 * (relative > low) + 4 * (relative > high)).to(torch.uint8)

    recipe = Recipe(preset="sparsegpt", allocation="quantile", uniform_if_better=False)
    with mock.patch.object(rounding, "allocate_quantile", rule):
        return compress(model, batches, recipe, storage_dtype=torch.float16)


def table(results: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Return one Markdown row per method: means over seeds, spread (max - min) / 2, and what was lost against dense."""
    dense = results[0]
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        cells = [method, f"{_mean(runs, 'bits_per_weight'):.2f}", f"{_mean(runs, 'file_bytes') / 1e6:.2f}"]
        for text in texts:
            values = [run[text] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(runs) > 1 else ""
            lost = statistics.fmean(values) - dense[text]
            cells.append(
                f"{statistics.fmean(values):.2f}{spread}" + (f" (+{lost:.2f})" if runs[0] is not dense else "")
            )
        peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
        rows.append((*cells, f"{_mean(runs, 'seconds'):.0f}", f"{max(peaks) / 1e6:.0f}" if peaks else "-"))
    return format_table(("method", "bits/weight", "file, MB", *texts, "seconds", "peak, MB"), rows)


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _write(path: str, arguments: dict[str, Any], results: list[dict[str, Any]]) -> None:
    Path(path).write_text(json.dumps({"arguments": arguments, "rows": results}, indent=1) + "\n")


def _write_csv(results: list[dict[str, Any]], path: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


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


def _plot(results: list[dict[str, Any]], text: str, path: str) -> None:
    """Draw perplexity over true bits per weight, up to 5 bits: all points, and a curve through the best of a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    dense = results[0][text]
    for family, color in (("rival", "tab:gray"), ("ours", "tab:orange")):
        methods = dict.fromkeys(result["method"] for result in results if result["family"] == family)
        runs = {method: [result for result in results if result["method"] == method] for method in methods}
        points = [(_mean(group, "bits_per_weight"), _mean(group, text), method) for method, group in runs.items()]
        points = sorted(point for point in points if point[0] <= 5)
        front = [point for point in points if all(point[1] <= other[1] for other in points if other[0] <= point[0])]
        axes.plot([p[0] for p in front], [p[1] for p in front], "o-", color=color, label=f"{family}, best at its bits")
        axes.scatter([p[0] for p in points], [p[1] for p in points], color=color, s=12, alpha=0.5)
        for bits, value, method in front:
            axes.annotate(method, (bits, value), textcoords="offset points", xytext=(4, 4), fontsize=7, color=color)
    axes.margins(x=0.12)
    axes.axhline(dense, color="black", linestyle=":", label=f"dense, 16 bits: {dense:.2f}")
    axes.set(xlabel="true bits per weight of the linears", ylabel=f"perplexity on {text}", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
