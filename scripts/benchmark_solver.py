"""Solve time of this package against a plain transcription of the published loop, side by side in one run.

    make bench
    python scripts/benchmark_solver.py --device cuda --windows 128

Three tables, on whatever device is there. Per shape: one matrix of random weights against inputs of the same
covariance, solved by both at 50 % + 4 bits (and 2:4 + 4 bits), from the statistics to the weight that is stored; the
median of `--repeats` after a warm-up counts. Whole model: all blocks of opt-mini with its own text, and on a GPU of a
random model of OPT-125M's shape, from the windows to the last block. Phases: where our seconds go, measured in a run
of its own because every phase waits for the device, and what share of the arithmetic they would be at the rate at
which the device multiplies matrices.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import published_sparsegpt
import torch
from torch import Tensor, nn

from sgpt_lightning.calibration import sequential, solving
from sgpt_lightning.calibration.collector import input_groups, watched_inputs
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.checkpoint.any_model import load_model
from sgpt_lightning.core import linear, problem
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.models.batches import model_inputs
from sgpt_lightning.models.blocks import find_decoder_blocks
from sgpt_lightning.models.linears import weight_matrix
from sgpt_lightning.models.names import load_tokenizer
from sgpt_lightning.models.replay import BlockReplay
from sgpt_lightning.recipe import Recipe
from sgpt_lightning.report.tables import format_table
from sgpt_lightning.text.windows import calibration_windows

SPARSITY, BITS, DAMP = 0.5, 4, 0.01
SHAPES = {
    "cpu": ((256, 128), (256, 512), (256, 2048)),
    "cuda": ((768, 768), (768, 3072), (4096, 4096), (4096, 16384)),
}
"""(out_features, in_features)."""


class Case(NamedTuple):
    """One matrix to solve."""

    shape: tuple[int, int]
    n_m: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Name shape and pattern."""
        zeros = "50 %" if self.n_m is None else "{}:{}".format(*self.n_m)
        return f"{self.shape[0]} x {self.shape[1]}, {zeros} + {BITS} bit"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and fail if ours is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="opt-mini", help="embedded name, directory or hub id")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of the whole models")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--shapes", nargs="*", help="OUTxIN; the usual ones of the device if left out")
    parser.add_argument("--no-fail", action="store_true", help="exit with 0 even if ours is slower")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or ()] or SHAPES[device.type]
    cases = [Case((rows, columns)) for rows, columns in shapes]
    cases += [Case(shape, (2, 4)) for shape in [case.shape for case in cases] if shape[0] == shape[1]]
    slower = [str(case) for case in cases if _compare_solves(case, device, arguments.repeats)]
    models = {arguments.model: _calibration(arguments.model, arguments.windows, device)}
    if device.type == "cuda":
        models["OPT-125M's shape"] = _opt_125m_shape(arguments.windows, device)
    for name, (model, windows) in models.items():
        slower += [name] if _compare_runs(name, model, windows, device, arguments.repeats) else []
    if slower and not arguments.no_fail:
        raise SystemExit(f"slower than the published loop: {', '.join(slower)}")


@torch.no_grad()
def _compare_solves(case: Case, device: torch.device, repeats: int) -> bool:
    """Print one row per method; return whether ours took longer."""
    rows, columns = case.shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device) * 0.02
    moments = InputStatistics(columns, device)
    mixing = torch.randn(columns, columns, generator=generator).to(device) / columns**0.5
    for _ in range(4):
        moments.add(
            torch.randn(columns, columns, generator=generator).to(device) @ (mixing + torch.eye(columns).to(device))
        )
    hessian = moments.second_moment
    zeros: dict[str, Any] = {"sparsity": SPARSITY} if case.n_m is None else {"pattern": "{}:{}".format(*case.n_m)}
    recipe = Recipe(preset="sparsegpt", target_avg_bits=BITS, damp_percent=DAMP, **zeros)
    solves: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published_sparsegpt.solve(weight, hessian, SPARSITY, BITS, case.n_m),
        "ours": lambda: compress_linear(weight, moments, recipe).weight(),
    }
    timed = {method: _median_time(solve, repeats, device) for method, solve in solves.items()}
    results = {method: result for method, (_, result) in timed.items()}
    step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**BITS - 1)
    equal = float(((results["published"] - results["ours"]).abs() < step / 4).double().mean())
    table = [
        (method, f"{1000 * seconds:.2f}", f"{_relative_error(weight, result, hessian):.5f}")
        for method, (seconds, result) in timed.items()
    ]
    print(format_table((str(case), "ms", "relative error"), table))
    print(f"published / ours: {timed['published'][0] / timed['ours'][0]:.1f}; equal codes: {equal:.2%}\n")
    return timed["ours"][0] > timed["published"][0]


def _relative_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    difference = weight - result
    return float((difference @ hessian * difference).sum() / (weight @ hessian * weight).sum())


def _calibration(name: str, windows: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    model: Any = load_model(name).to(device)
    positions = model.config.max_position_embeddings
    return model, calibration_windows("python-docs", load_tokenizer(name), positions, windows, 0).ids.to(device)


def _opt_125m_shape(windows: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng(devices=[device]):
        torch.manual_seed(0)
        config = OPTConfig(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12)
        model = OPTForCausalLM(config).half().to(device).eval().requires_grad_(False)
        return model, torch.randint(4, config.vocab_size, (windows, config.max_position_embeddings), device=device)


def _compare_runs(name: str, model: nn.Module, windows: Tensor, device: torch.device, repeats: int) -> bool:
    """Print seconds from the windows to the last block, then ours by phase; return whether ours took longer."""
    per_forward = max(1, 32_768 // windows.shape[1]) if device.type == "cuda" else max(1, 2048 // windows.shape[1])
    batches = [{"input_ids": batch} for batch in windows.split(per_forward)]
    recipes = {
        preset: Recipe(preset=preset, sparsity=SPARSITY, target_avg_bits=BITS) for preset in ("sparsegpt", "best")
    }

    def published() -> None:
        published_sparsegpt.compress(copy.deepcopy(model), windows.split(1), SPARSITY, BITS)

    def ours(preset: str) -> Callable[[], object]:
        return lambda: compress(copy.deepcopy(model), batches, recipes[preset], storage_dtype=torch.float16)

    runs = {"published": published, "ours, sparsegpt": ours("sparsegpt"), "ours, best": ours("best")}
    seconds = {method: _median_time(run, repeats, device)[0] for method, run in runs.items()}
    peaks = {method: _peak_memory(run, device) for method, run in runs.items()}
    what = f"{name}, {len(windows)} x {windows.shape[1]} tokens, 50 % + {BITS} bit"
    print(format_table((what, "seconds", "peak MiB"), [(m, f"{seconds[m]:.2f}", peaks[m]) for m in runs]))
    floor = _floor(model, windows, device)
    with _phases(device) as spent:
        ours("sparsegpt")()
    print(
        format_table((f"phase of ours on {name}", "seconds"), [(key, f"{value:.2f}") for key, value in spent.items()])
    )
    print(
        f"forwards and moments at the device's matmul rate: {floor:.2f} s, {floor / seconds['ours, sparsegpt']:.0%}\n"
    )
    return seconds["ours, sparsegpt"] > seconds["published"]


@contextmanager
def _phases(device: torch.device) -> Iterator[Mapping[str, float]]:
    """Time the phases of what runs inside; the dict is complete when the body ends."""
    spent: defaultdict[str, float] = defaultdict(float)
    inner = [0.0]

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _wait(device)
            outer, inner[0], started = inner[0], 0.0, time.perf_counter()
            result = function(*args, **kwargs)
            _wait(device)
            took = time.perf_counter() - started
            spent[phase] += took - inner[0]  # without what an inner phase took
            inner[0] = outer + took
            return result

        return wrapper

    places: tuple[tuple[str, Any, str], ...] = (
        ("forward", BlockReplay, "prologue"),
        ("forward", BlockReplay, "run"),
        ("moments", InputStatistics, "add"),
        ("factor", problem, "inverse_factor"),
        ("sweep", linear, "sweep"),
        ("rest of the solve", solving, "compress_linears"),
        ("pack", solving, "pack_weight"),
        ("pack", sequential, "check_stored"),
    )
    with ExitStack() as stack:
        for phase, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        yield spent


@torch.no_grad()
def _floor(model: nn.Module, windows: Tensor, device: torch.device) -> float:
    """Return the seconds that forwards and moments would take if the device did nothing but multiply."""
    dtype = next(model.parameters()).dtype
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    rate = 2 * size**3 / _median_time(lambda: matrix @ matrix, 10, device)[0]
    decoder = find_decoder_blocks(model)
    linears, layers = decoder.linears(), len(decoder.blocks)
    with watched_inputs(linears) as inputs:
        model(**model_inputs({"input_ids": windows[:1]}))
    distinct = [next(iter(group.values())) for group in input_groups(inputs, linears)]
    forward = sum(weight_matrix(module).numel() for module in linears.values()) * (2 * layers - 1) / layers
    moments = sum(weight_matrix(module).shape[1] ** 2 for module in distinct)
    return 2 * windows.numel() * (forward + moments) / rate


def _median_time(function: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, Any]:
    result, times = function(), []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        result = function()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def _peak_memory(function: Callable[[], Any], device: torch.device) -> str:
    """Return what a run allocates at most beyond what is there before it."""
    if device.type != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.0f}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
