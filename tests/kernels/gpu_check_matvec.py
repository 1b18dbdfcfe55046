"""Kernels on weights in memory on a GPU against the reference, and timings; a script: torch, Triton and the package.

    PYTHONPATH=. python tests/kernels/gpu_check_matvec.py
    PYTHONPATH=. python tests/kernels/gpu_check_matvec.py --tune

First a line for each kind of weight: whether `weight()` is the reference's bit for bit in three dtypes, and how far
`matvec` is from float64, over the sum of the products' sizes (1e-5 is a lot), for 1 row of x, or for 1, 3 and 8. Each
kernel takes Triton seconds to compile, so `--cases all` takes minutes; `--cases masked` has masks and one width.

Then, by shape and weight, the microseconds of one product of one row in a CUDA graph that goes round copies of the
weight, more of them than the cache holds; of `torch.nn.functional.linear` in float16 likewise; of the bandwidth floor:
bytes in memory over the measured rate of a copy; and the milliseconds of `weight(float16)`. A case that fails prints
its traceback. `--tune` times three weights at 4096x4096 with rows a thread and warps of all kinds, and nothing else.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from residents import coded, quantized, solutions

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import Coded, Quantized, Solution
from sgpt_lightning.format.launch import has_kernels
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.resident import Resident, lay_out, reside
from sgpt_lightning.kernels import masked
from sgpt_lightning.kernels import matvec as kernels
from sgpt_lightning.kernels import unpack as unpackers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHE = 200 << 20
"""Bytes that copies of a weight must exceed together, so that none is read from the GPU's cache."""


FEW = [
    *(f"{{'widths': ({bits},), 'kind': 'zero-point'}}" for bits in (1, 3, 4, 7)),
    *(f"{{'widths': (4,), 'kind': '{kind}'}}" for kind in ("offset", "zero-free")),
    "{'widths': (2, 3, 4, 6, 8), 'kind': 'zero-point'}",
    "{'widths': (2, 3, 4, 6, 8), 'kind': 'zero-point', 'group': 13}",
    *(f"{{'widths': ({bits},), 'kind': 'zero-free', 'mask': 0.5}}" for bits in (1, 3, 4)),
    "{'widths': (2, 3, 4, 6, 8), 'kind': 'zero-free', 'axis': 'output', 'mask': 0.6}",
    *("coded 1.3", "coded 3000.0", "coded, some apart"),
]
MASKED = [name for name in FEW if "mask" in name and "axis" not in name]
"""Of one width: each width is as many kernels."""
SIDE_BY_SIDE = [FEW[1], FEW[10], FEW[-1]]


def check_case(name: str, solution: Solution) -> None:
    resident = reside(pack_weight(solution)).to(DEVICE)
    if not has_kernels(resident.spec):
        print(f"{name}: no kernel")
        return
    weight = solution.weight().to(DEVICE)
    alike = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        whole = torch.int32 if dtype == torch.float32 else torch.int16
        alike[dtype] = torch.equal(resident.weight(dtype).view(whole), weight.to(dtype).view(whole))
    errors = []
    for rows in (1, 3, 8) if name in SIDE_BY_SIDE else (1,):
        x = torch.randn(rows, weight.shape[1], device=DEVICE)
        expected = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        errors.append(float(((resident.matvec(x).double() - expected).abs() / size.clamp(min=1e-30)).max()))
    good = all(alike.values()) and max(errors) < 1e-5
    each = " ".join(f"{error:.1e}" for error in errors)
    print(
        f"{'ok  ' if good else 'BAD '} {name} {tuple(weight.shape)}: bits {list(alike.values())}, off {each}",
        flush=True,
    )


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Mean time of a call in a graph of all of them, the median of 7 replays."""
    if DEVICE.type != "cuda":
        started = time.perf_counter()
        for call in calls[:1]:
            call()
        return 1e6 * (time.perf_counter() - started)
    for call in calls:
        call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(kept))
    return sorted(times[1:])[3]


def copies(resident: Resident) -> list[Resident]:
    count = max(CACHE // resident.nbytes, 4) if DEVICE.type == "cuda" else 1
    return [
        resident.with_tensors({name: tensor.clone() for name, tensor in resident.tensors.items()}) for _ in range(count)
    ]


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e6 * source.numel() / microseconds([lambda: target.copy_(source)] * 4)


def weights_of(rows: int, columns: int) -> dict[str, Solution]:
    made: dict[str, Solution] = {
        f"dense {bits} bits": quantized(rows, columns, (bits,), "zero-point") for bits in (3, 4, 8)
    }
    made["dense 2 to 8 bits"] = quantized(rows, columns, (2, 3, 4, 6, 8), "zero-point")
    made["4 bits, groups of 128"] = quantized(rows, columns, (4,), "zero-point", group=128)
    made["50 % and 4 bits"] = quantized(rows, columns, (4,), "zero-free", 0.5)
    return made | {f"coded, spread {spread}": coded(rows, columns, spread) for spread in (1.87, 3.74)}


def time_shape(residents: dict[str, Resident], rows: int, columns: int, rate: float) -> None:
    x = torch.randn(1, columns, device=DEVICE).half()
    plain = [torch.randn(rows, columns, device=DEVICE).half() for _ in range(max(CACHE // (2 * rows * columns), 4))]
    linear = microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in plain])
    print(f"{rows}x{columns} float16 linear {linear:.1f} us, floor {2e6 * rows * columns / rate:.1f} us", flush=True)
    del plain
    for name, resident in residents.items():
        try:
            many = copies(resident)
            if not has_kernels(resident.spec):
                many = many[:2]
            ours = microseconds([lambda r=r: r.matvec(x) for r in many])
            whole = microseconds([lambda r=r: r.weight(torch.float16) for r in many[:4]])
            floor, runs = 1e6 * resident.nbytes / rate, [(run.bits, run.channels) for run in resident.runs]
            print(
                f"{rows}x{columns} {name}: {8 * resident.nbytes / rows / columns:.2f} bits {runs}, {ours:.1f} us = "
                f"{linear / ours:.2f} x float16, {ours / floor:.2f} x floor; weight() {whole / 1e3:.3f} ms",
                flush=True,
            )
        except Exception:  # noqa: BLE001 - the other cases are wanted all the same
            print(f"{rows}x{columns} {name}: FAILED")
            traceback.print_exc()


def tall(solution: Solution, times: int) -> Solution:
    """Repeat the rows of a matrix, on the GPU: to make it there would take the CPU long."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE).repeat(times, *[1] * (tensor.dim() - 1))

    if isinstance(solution, Coded):
        level, steps = solution.level.to(DEVICE), solution.steps.to(DEVICE)
        return Coded(repeated(solution.codes), level, steps, repeated(solution.rows))
    assert isinstance(solution, Quantized)
    grid = solution.grid._replace(span=repeated(solution.grid.span), origin=repeated(solution.grid.origin))
    keep = None if solution.keep is None else repeated(solution.keep)
    return Quantized(repeated(solution.codes), solution.widths.to(DEVICE), grid, keep)


def laid_out(rows: int, columns: int, only: str) -> dict[str, Resident]:
    found = {}
    for name, solution in weights_of(rows // max(rows // 1024, 1), columns).items():
        if only in name:
            whole = tall(solution, max(rows // 1024, 1))
            spec = WeightSpec(whole.shape, "coded", None, None)
            packed = PackedWeight(spec, {}) if isinstance(whole, Coded) else pack_weight(whole)
            found[name] = lay_out(whole, packed)
    return found


def tune() -> None:
    """Print the microseconds of a product for each setting, and the best one of each weight."""
    x = torch.randn(1, 4096, device=DEVICE).half()
    for name in ("dense 4 bits", "coded, spread 1.87", "50 % and 4 bits"):
        many = copies(laid_out(4096, 4096, name)[name])
        module, found = masked if name.startswith("50") else kernels, {}
        before = module.ROWS, module.WARPS, kernels.CODED_WARPS
        for rows in (1, 2, 4, 8):
            for module.WARPS in (2, 4, 8):
                kernels.CODED_WARPS = module.WARPS
                module.ROWS = {1: rows} if module is kernels else rows
                found[rows, module.WARPS] = microseconds([lambda r=r: r.matvec(x) for r in many])
        module.ROWS, module.WARPS, kernels.CODED_WARPS = before
        settings = ", ".join(f"({rows}, {warps}) {time:.1f}" for (rows, warps), time in found.items())
        best = min(found, key=lambda setting: found[setting])
        print(f"{name}: (rows, warps) us: {settings}; best {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "16384x4096", "4096x16384"])
    parser.add_argument("--only", default="", help="weights whose name has this")
    parser.add_argument("--tune", action="store_true", help="only look for the best settings")
    parser.add_argument("--cases", choices=["few", "masked", "all"], default="few")
    parser.add_argument("--no-cases", action="store_true", help="leave out whether results are right")
    arguments = parser.parse_args()
    paths._KERNEL_DEVICES[:] = [DEVICE.type]
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU (with TRITON_INTERPRET=1 only)"
    print(f"{device}, torch {torch.__version__}, unpacking {unpackers.ROWS} rows a program")
    if not arguments.no_cases and not arguments.tune:
        for name, solution in solutions(75, 1200).items():
            if name not in {"few": FEW, "masked": MASKED}.get(arguments.cases, [name]):
                continue
            try:
                check_case(name, solution)
            except Exception:  # noqa: BLE001 - the other cases are wanted all the same
                print(f"{name}: FAILED")
                traceback.print_exc()
    rate = copy_rate()
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    if arguments.tune:
        tune()
    for shape in [] if arguments.tune else arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        time_shape(laid_out(rows, columns, arguments.only), rows, columns, rate)
    print(f"refused: {paths._refused or 'nothing'}")


if __name__ == "__main__":
    main()
