"""The kernels against the loops in plain torch on a GPU; a script, not a test: it needs torch, Triton and nothing else.

    PYTHONPATH=. python tests/kernels/gpu_check.py
    PYTHONPATH=. python tests/kernels/gpu_check.py --shapes 4096x4096 --outputs 4 8 16 --tiles 64 128 --no-torch

For each shape (out_features x in_features), mask and grid: the share of weights that both store alike (to the last bit
where they are codes), the error of both under the Hessian over that of nothing, and the median milliseconds of three
runs after one. A case that fails prints its traceback, and the next one follows.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sgpt_lightning.core import paths
from sgpt_lightning.core.descent import descend
from sgpt_lightning.core.grids import fit_affine_grid
from sgpt_lightning.core.hessian import inverse_factor
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.core.ranges import search_grid
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.solver import compress_linear
from sgpt_lightning.core.sweep import sweep
from sgpt_lightning.guards import exact_float32
from sgpt_lightning.kernels import columns as kernels
from sgpt_lightning.recipe import Recipe

KINDS = ("zero-point", "offset", "zero-free", "integer", None)
MASKS = {"dense": None, "50 %": MaskRule(0.5), "2:4": MaskRule(0, (2, 4)), "given": "given"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Problem:
    """A matrix with inputs as a language model's: correlated, and of different sizes."""

    def __init__(self, rows: int, columns: int) -> None:
        g = torch.Generator(DEVICE).manual_seed(0)
        rank, tokens = min(64, columns), 2 * columns
        mixing = torch.randn(rank, columns, generator=g, device=DEVICE) / rank**0.5
        sizes = torch.randn(columns, generator=g, device=DEVICE).mul(0.5).exp()
        noise = torch.randn(tokens, columns, generator=g, device=DEVICE)
        self.inputs = (torch.randn(tokens, rank, generator=g, device=DEVICE) @ mixing + noise) * sizes
        moment = self.inputs.T @ self.inputs / tokens
        self.hessian = moment + 0.01 * moment.diagonal().mean() * torch.eye(columns, device=DEVICE)
        self.factor = inverse_factor(moment).hinv_chol
        self.weight = torch.randn(rows, columns, generator=g, device=DEVICE) * 0.02
        self.given = torch.rand(columns, rows, generator=g, device=DEVICE) < 0.5
        self.order = torch.randperm(columns, generator=g, device=DEVICE)
        self.widths = torch.randint(2, 9, (columns,), generator=g, device=DEVICE).to(torch.uint8)

    def scales(self, kind: str | None) -> ColumnScales | None:
        if kind is None:
            return None
        if kind == "integer":
            return ColumnScales.integer(0.02 * self.factor.diagonal())
        if kind == "zero-point":
            grid = fit_affine_grid(self.weight, 8)
        else:
            ones = torch.ones(self.weight.shape[1], device=DEVICE)
            grid = search_grid(kind, self.weight, ones, self.widths, axis="input", group_size=None, search=False)
        return ColumnScales(grid, self.widths, self.weight.shape[1], self.order)

    def error(self, stored_t: Tensor) -> float:
        difference = self.weight - stored_t.T
        nothing = (self.weight @ self.hessian * self.weight).sum()
        return float((difference @ self.hessian * difference).sum() / nothing)


@contextmanager
def only_torch() -> Iterator[None]:
    kept = list(paths._KERNEL_DEVICES)
    paths._KERNEL_DEVICES.clear()
    try:
        yield
    finally:
        paths._KERNEL_DEVICES[:] = kept


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    result, times = run(), []
    for _ in range(3):
        synchronize()
        started = time.perf_counter()
        result = run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return result, statistics.median(times)


def compare(name: str, problem: Problem, run: Callable[[], Tensor], codes: bool, with_torch: bool) -> None:
    """Print one line for a loop in both implementations, or a traceback."""
    try:
        ours, ours_ms = timed(run)
        line = f"{name:44} triton {ours_ms:9.2f} ms  error {problem.error(ours):.6f}"
        if with_torch:
            with only_torch():
                plain, plain_ms = timed(run)
            same = ours == plain if codes else torch.isclose(ours, plain, rtol=1e-3, atol=1e-5)
            line += f"  | torch {plain_ms:9.2f} ms  error {problem.error(plain):.6f}"
            line += f"  | alike {float(same.float().mean()):.6f}"
        print(line, flush=True)
    except Exception:  # noqa: BLE001 - the other cases are wanted all the same
        print(f"{name}: FAILED")
        traceback.print_exc()


def check(rows: int, columns: int, with_torch: bool) -> None:
    """Compare every mask, grid and loop on one shape."""
    problem = Problem(rows, columns)
    weight_t = problem.weight.T
    for label, rule in MASKS.items():
        if label == "2:4" and columns % 4:
            continue
        mask = problem.given if label == "given" else rule
        for kind in KINDS:
            scales = problem.scales(kind)

            def swept(mask=mask, scales=scales) -> Tensor:
                return sweep(weight_t, problem.factor, mask, scales, 128).weight

            compare(f"{rows}x{columns} sweep {label} {kind}", problem, swept, kind is not None, with_torch)
    for kind in KINDS[:-1]:
        for drop in (None, problem.given):
            scales = problem.scales(kind)
            assert scales is not None
            with only_torch():
                stored = sweep(weight_t, problem.factor, drop, scales, 128).weight

            def descended(stored=stored, drop=drop, scales=scales) -> Tensor:
                return descend(stored, weight_t, problem.hessian, drop, scales, 128)

            label = "dense" if drop is None else "given"
            compare(f"{rows}x{columns} descent {label} {kind}", problem, descended, True, with_torch)
    others(problem, rows, columns, with_torch)


def others(problem: Problem, rows: int, columns: int, with_torch: bool) -> None:
    """Compare what is special: groups fitted on the way, three matrices side by side, and a whole solve."""

    def in_groups() -> Tensor:
        bits = torch.full((columns,), 4, dtype=torch.uint8, device=DEVICE)
        scales = ColumnScales(fit_affine_grid(problem.weight, 4, 64), bits, columns, None, refit_groups=True)
        return sweep(problem.weight.T, problem.factor, MaskRule(0.5), scales, 128).weight

    compare(f"{rows}x{columns} sweep 50 % groups of 64", problem, in_groups, False, with_torch)

    def stacked() -> Tensor:
        three = [scales for scales in (problem.scales("zero-free") for _ in range(3)) if scales]
        together, weight_t = ColumnScales.stacked(three), problem.weight.T.repeat(1, 3)
        return sweep(weight_t, problem.factor, MaskRule(0.5), together, 128, [rows] * 3).weight[:, rows : 2 * rows]

    compare(f"{rows}x{columns} sweep of three 50 % zero-free", problem, stacked, True, with_torch)
    moments = InputStatistics(columns, DEVICE)
    moments.add(problem.inputs)
    for settings in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        if columns % 4:
            continue
        recipe = Recipe(preset="sparsegpt", target_avg_bits=4, **settings)

        def solved(recipe=recipe) -> Tensor:
            return compress_linear(problem.weight, moments, recipe).weight().T

        compare(f"{rows}x{columns} solve {settings} + 4 bit, sparsegpt", problem, solved, False, with_torch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x129", "37x200", "768x768", "768x3072", "4096x4096"])
    parser.add_argument("--outputs", nargs="+", type=int, default=[kernels.OUTPUTS], help="outputs of a program")
    parser.add_argument("--tiles", nargs="+", type=int, default=[kernels.WIDEST_TILE], help="columns of a launch")
    parser.add_argument("--no-torch", action="store_true", help="time the kernels alone")
    arguments = parser.parse_args()
    paths._KERNEL_DEVICES[:] = [DEVICE.type]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU (with TRITON_INTERPRET=1 only)"
    print(f"{device}, torch {torch.__version__}, {paths.loop_path(DEVICE)}")
    with torch.no_grad(), exact_float32():
        for kernels.OUTPUTS in arguments.outputs:
            for kernels.WIDEST_TILE in arguments.tiles:
                print(f"--- {kernels.OUTPUTS} outputs a program, tiles of {kernels.WIDEST_TILE} columns")
                for shape in arguments.shapes:
                    rows, columns = map(int, shape.split("x"))
                    check(rows, columns, not arguments.no_torch)
    print(f"loops of the device: {paths.loop_path(DEVICE)} {paths._refused or ''}")


if __name__ == "__main__":
    main()
