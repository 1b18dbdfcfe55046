"""Solve time of this package against a plain transcription of the paper's loop, side by side in one run.

    make bench

Both solve every linear of a model from the same input statistics at 50 % + 4 bits: for each linear first one, then the
other, and the best of `--repeats` counts for both. `paper_solve` is algorithm 1 of SparseGPT (arXiv 2301.00774) with
its lazy batches of 128 columns, written down step by step: rows first, float32, three-step inverse factor.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgpt_lightning.calibration.collector import InputCollector
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table
from sgpt_lightning.text.windows import calibration_windows

SPARSITY, BITS, BATCH, DAMP = 0.5, 4, 128, 0.01


def paper_solve(weight: Tensor, hessian: Tensor) -> Tensor:
    """Prune and quantize `[out_features, in_features]` as the paper's algorithm reads; returns the new weight."""
    result = weight.clone()
    top_code = 2**BITS - 1
    low, high = result.amin(1, keepdim=True).clamp_max(0), result.amax(1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top_code).clamp_min(1e-12)
    zero_point = (-low / scale).round()
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = result.shape[1]
    for first in range(0, columns, BATCH):
        last = min(first + BATCH, columns)
        errors = torch.zeros_like(result[:, first:last])
        saliency = result[:, first:last] ** 2 / factor.diagonal()[first:last] ** 2
        threshold = saliency.flatten().sort().values[int(saliency.numel() * SPARSITY)]
        removed = saliency < threshold
        for j in range(first, last):
            kept = torch.where(removed[:, j - first], 0, result[:, j])[:, None]
            rounded = scale * (((kept / scale).round() + zero_point).clamp(0, top_code) - zero_point)
            errors[:, j - first] = (result[:, j] - rounded[:, 0]) / factor[j, j]
            result[:, j:last] -= errors[:, j - first][:, None] @ factor[j, j:last][None]
            result[:, j] = rounded[:, 0]
        result[:, last:] -= errors @ factor[first:last, last:]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Time both on every linear of a model, print the sums, and fail if ours is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-mini", help="embedded name, directory or hub id")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of python-docs")
    parser.add_argument("--repeats", type=int, default=3, help="the best one counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-fail", action="store_true", help="exit with 0 even if ours is slower")
    arguments = parser.parse_args(argv)
    model, collector = _calibrated(arguments.model, arguments.samples, arguments.device)
    recipe = Recipe(preset="sparsegpt", sparsity=SPARSITY, target_avg_bits=BITS, damp_percent=DAMP)
    seconds, errors = {"paper": 0.0, "ours": 0.0}, {"paper": 0.0, "ours": 0.0}
    linears = find_decoder_blocks(model).linears()
    for name, linear in linears.items():
        weight, statistics = weight_matrix(linear).float(), collector.statistics(name)
        hessian = statistics.second_moment
        solved: dict[str, Callable[[], Tensor]] = {
            "paper": lambda w=weight, h=hessian: paper_solve(w, h),  # type: ignore[misc]
            "ours": lambda w=weight, s=statistics: compress_linear(w, s, recipe).weight(),  # type: ignore[misc]
        }
        for method, solve in solved.items():
            best, result = _best_time(solve, arguments.repeats, arguments.device)
            seconds[method] += best
            errors[method] += _relative_error(weight, result, hessian) / len(linears)
    rows = [(method, f"{seconds[method]:.2f}", f"{errors[method]:.5f}") for method in seconds]
    print(format_table((f"{len(linears)} linears, {arguments.device}", "seconds", "mean relative error"), rows))
    print(f"ours / paper: {seconds['ours'] / seconds['paper']:.2f}")
    if seconds["ours"] > seconds["paper"] and not arguments.no_fail:
        raise SystemExit("slower than the paper's loop")


@torch.no_grad()
def _calibrated(name: str, samples: int, device: str) -> tuple[Any, InputCollector]:
    model: Any = load_model(name).to(device)
    drawn = calibration_windows("python-docs", load_tokenizer(name), model.config.max_position_embeddings, samples, 0)
    collector = InputCollector(find_decoder_blocks(model).linears())
    for index, window in enumerate(drawn.ids.to(device)):
        with collector.collecting(index):
            model(**model_inputs({"input_ids": window[None]}))
    return model, collector


def _relative_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    difference = weight - result
    return float((difference @ hessian * difference).sum() / (weight @ hessian * weight).sum())


def _best_time(solve: Callable[[], Tensor], repeats: int, device: str) -> tuple[float, Tensor]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = solve()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times), result


if __name__ == "__main__":
    main()
