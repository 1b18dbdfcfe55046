"""Perplexity of the published recipes and of this package's own, on the same windows in one process.

    make bench-baseline
    python scripts/benchmark_baseline.py --model ../shared/models/opt-small --calibration ../shared/data/\
wikipedia-calibration.txt --evaluation ../shared/data/wikipedia-heldout.txt ../shared/data/c4-valid-2k.txt --samples 64

Every row starts from the dense model again and is calibrated on the same windows in the same order. Rows marked `ref`
are SparseGPT and GPTQ as published: blocks of 128 columns, 1 % damping, per-row min-max grids, no reordering, blocks
in order. Needs neither Lightning nor datasets, so it runs on a bare GPU machine.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgpt_lightning.blocks import model_inputs
from sgpt_lightning.calibration import SolvedLinear, compress
from sgpt_lightning.metrics import Perplexity
from sgpt_lightning.models import load_tokenizer, resolve_model
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report import format_table
from sgpt_lightning.text import calibration_windows, evaluation_windows

RECIPES = {
    "50 % pruned (ref)": Recipe(target_avg_bits=None),
    "2:4 pruned (ref)": Recipe(pattern="2:4", target_avg_bits=None),
    "50 % + 4 bit (ref)": Recipe(allocation="uniform"),
    "50 % + 3 bit (ref)": Recipe(allocation="uniform", target_avg_bits=3),
    "2:4 + 4 bit (ref)": Recipe(pattern="2:4", allocation="uniform"),
    "dense 3 bit (ref)": Recipe(sparsity=0, allocation="uniform", target_avg_bits=3),
    "dense 4 bit (ref)": Recipe(sparsity=0, allocation="uniform"),
    "50 % + mean 4, quantile": Recipe(allocation="quantile"),
    "50 % + mean 4, budget": Recipe(allocation="budget"),
    "50 % + mean 4, budget, act order": Recipe(allocation="budget", act_order=True),
    "50 % + 4 bit, act order": Recipe(allocation="uniform", act_order=True),
    "dense mean 3, budget, act order": Recipe(sparsity=0, target_avg_bits=3, allocation="budget", act_order=True),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every recipe and print the table; `--output` also writes JSON."""
    arguments = _arguments(argv)
    missing = [
        path for path in (arguments.calibration, *arguments.evaluation) if "/" in path and not Path(path).exists()
    ]
    if missing:
        raise SystemExit(f"not found: {', '.join(missing)}; give --calibration and --evaluation")
    dense, tokenizer = _load(arguments.model, arguments.device)
    seq_len = arguments.seq_len or dense.config.max_position_embeddings
    drawn = calibration_windows(arguments.calibration, tokenizer, seq_len, arguments.samples, arguments.seed)
    texts = {
        Path(name).stem: evaluation_windows(name, tokenizer, seq_len, arguments.eval_windows).ids.to(arguments.device)
        for name in arguments.evaluation
    }
    batches = [{"input_ids": window[None].to(arguments.device)} for window in drawn.ids]
    results: list[dict[str, Any]] = [
        {"method": "dense", "bits_per_weight": 16.0, "seconds": 0.0} | _measure(dense, texts)
    ]
    print(results[-1], flush=True)
    for method, recipe in RECIPES.items():
        if arguments.only and not any(text in method for text in arguments.only):
            continue
        model = copy.deepcopy(dense)
        started = time.perf_counter()
        solved = compress(model, batches, recipe, storage_dtype=torch.float16)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        bits = _bits_per_weight(solved)
        results.append({"method": method, "bits_per_weight": bits, "seconds": seconds} | _measure(model, texts))
        print(results[-1], flush=True)
    print(_table(results, list(texts)))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"arguments": vars(arguments), "rows": results}, indent=1) + "\n")
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
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration windows")
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--figure", help="PNG file to write; needs matplotlib")
    return parser.parse_args(argv)


def _load(name: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32).eval().to(device)
    return model, load_tokenizer(name)


@torch.no_grad()
def _measure(model: nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, windows in texts.items():
        metric = Perplexity().to(windows.device)
        for window in windows:
            metric.update(model(**model_inputs({"input_ids": window[None]})).logits, window[None])
        found[name] = float(metric.compute())
    return found


def _bits_per_weight(solved: dict[str, SolvedLinear]) -> float:
    stored = sum(linear.packed.nbytes for linear in solved.values())
    return 8 * stored / sum(linear.report.weights for linear in solved.values())


def _table(results: list[dict[str, Any]], texts: list[str]) -> str:
    rows = [
        (
            row["method"],
            f"{row['bits_per_weight']:.2f}",
            *(f"{row[name]:.2f}" for name in texts),
            f"{row['seconds']:.0f}",
        )
        for row in results
    ]
    return format_table(("method", "bits/weight", *texts, "seconds"), rows)


def _plot(results: list[dict[str, Any]], text: str, path: str) -> None:
    """Draw one bar per method, sorted by true bits per weight; the dense model is a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(results[1:], key=lambda row: (-row["bits_per_weight"], row[text]))
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    colors = ["tab:gray" if "(ref)" in row["method"] else "tab:orange" for row in rows]
    names = [f"{row['method']}, {row['bits_per_weight']:.2f} bits" for row in rows]
    axes.bar_label(axes.barh(names, [row[text] for row in rows], color=colors), fmt="%.2f", padding=3, fontsize=8)
    dense = results[0][text]
    axes.axvline(dense, color="black", linestyle=":", label=f"dense, 16 bits: {dense:.2f}")
    axes.set(xlabel=f"perplexity on {text}, lower is better")
    axes.margins(x=0.1)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
