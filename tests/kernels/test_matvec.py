"""Kernels on weights in memory, in Triton's interpreter, against the solved weight: products, and bits of the whole."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracles import generator
from residents import coded, quantized

from sgpt_lightning.core import paths
from sgpt_lightning.core.solution import Solution
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.resident import Resident, reside

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)
matvec = importlib.import_module("sgpt_lightning.kernels.matvec")
unpack = importlib.import_module("sgpt_lightning.kernels.unpack")
masked = importlib.import_module("sgpt_lightning.kernels.masked")
pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = [
    *({"widths": (bits,), "kind": "zero-point"} for bits in (1, 3, 4, 8)),
    *({"widths": (4,), "kind": kind} for kind in ("offset", "zero-free")),
    {"widths": (2, 3, 5, 8), "kind": "zero-point"},
    *({"widths": (3, 6), "kind": kind} for kind in ("offset", "zero-free")),
    {"widths": (3, 6), "kind": "offset", "axis": "output"},
    {"widths": (5,), "kind": "zero-point", "axis": "output"},
    *({"widths": (3,), "kind": kind, "group": 13} for kind in ("zero-point", "zero-free")),
]
MASKED = [
    *({"widths": (bits,), "kind": "zero-free"} for bits in (1, 3)),
    {"widths": (5,), "kind": "zero-point"},
    {"widths": (3, 6), "kind": "offset"},
    {"widths": (2, 4), "kind": "zero-free", "axis": "output"},
    {"widths": (4,), "kind": "zero-free", "group": 13},
]
QUANTIZED += [case | {"mask": 0.5} for case in MASKED]
CASES: dict[str, Solution] = {str(case): quantized(13, 45, **case) for case in QUANTIZED}
CASES |= {f"coded {spread}": coded(13, 45, spread) for spread in (0.3, 20.0, 3e3)}
CASES["coded, some apart"] = coded(13, 45, 1.3, 8)
SCALES = (2 ** (torch.rand(45, generator=generator(5)) * 8 - 4)).half()
CASES |= {
    f"scaled {mask}": replace(quantized(13, 45, (3, 6), "offset", mask), channel_scale=SCALES) for mask in (None, 0.5)
}
UNPACKED = [case for case in CASES if case not in (f"{{'widths': ({bits},), 'kind': 'zero-point'}}" for bits in (4,))]
"""Widths are cut by the same function for both kernels."""
FEW = ["{'widths': (3,), 'kind': 'zero-point'}", "{'widths': (4,), 'kind': 'zero-free'}", "coded, some apart"]
FEW += ["scaled None"]


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[list[str]]:
    """Send CPU tensors to the kernels, and list what was launched; a program has all rows, for speed."""
    launched: list[str] = []
    for kernels, name in ((matvec, "matvec"), (unpack, "unpack"), (masked, "matvec"), (masked, "unpack")):
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=plain: (launched.append(n), f(*a))[1])
    monkeypatch.setattr(masked, "ROWS", 16)
    monkeypatch.setattr(matvec, "rows_of", lambda *_: 16)
    monkeypatch.setattr(paths, "_refused", {})
    yield launched
    assert paths._refused == {}


def resident_of(solution: Solution, monkeypatch) -> Resident:
    """Decode first, and let kernels work on CPU tensors then, for which they are laid out anew."""
    resident = reside(pack_weight(solution))
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    return resident.suited()


def assert_product(found: torch.Tensor, x: torch.Tensor, solution: Solution) -> None:
    weight = solution.weight().double()
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    # Float32 sums of up to 75 products of codes around zero; grids that lie to one side of it, whose zero point is
    # taken off the sum, have codes up to ten times their weights. Then one rounding to the dtype.
    bound = 75 * 10 * 2.0**-24 * size
    rounding = expected.abs().clamp(min=torch.finfo(x.dtype).smallest_normal) * torch.finfo(x.dtype).eps
    assert found.dtype == x.dtype
    assert bool(((found.double() - expected).abs() <= bound + rounding).all())


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_that_of_the_weight(interpreted, monkeypatch, case):
    x = torch.randn(1, CASES[case].shape[1], generator=generator(1)).half()
    assert_product(resident_of(CASES[case], monkeypatch).matvec(x), x, CASES[case])
    assert interpreted == ["matvec"]


@pytest.mark.parametrize(
    ("case", "rows", "dtype"), [(FEW[0], 2, torch.float32), (FEW[1], 3, torch.bfloat16), (FEW[2], 8, torch.bfloat16)]
)
def test_rows_of_x_are_multiplied_side_by_side(interpreted, monkeypatch, case, rows, dtype):
    x = torch.randn(rows, CASES[case].shape[1], generator=generator(rows)).to(dtype)
    assert_product(resident_of(CASES[case], monkeypatch).matvec(x), x, CASES[case])


@pytest.mark.parametrize("kind", ["zero-point", "coded", "masked"])
def test_programs_share_rows_and_columns(interpreted, monkeypatch, kind):
    """Two tiles of rows and, with 1,024 columns to a piece, several pieces to be added up."""
    solution: Solution = coded(20, 1100, 1.3, 30)
    if kind != "coded":
        solution = quantized(20, 1100, (1,), kind) if kind != "masked" else quantized(20, 1100, (3,), "zero-free", 0.5)
    x = torch.randn(1, 1100, generator=generator()).float()
    found = resident_of(solution, monkeypatch).matvec(x)
    expected, size = x.double() @ solution.weight().double().T, x.double().abs() @ solution.weight().double().abs().T
    # As above; rounding errors of 1,100 summands are far from all on one side.
    assert bool(((found.double() - expected).abs() <= 75 * 10 * 2.0**-24 * size).all())


@pytest.mark.parametrize("case", UNPACKED)
def test_the_whole_weight_comes_out_bit_for_bit(interpreted, monkeypatch, case):
    found = resident_of(CASES[case], monkeypatch).weight()
    assert interpreted == ["unpack"]
    assert torch.equal(found.view(torch.int32), CASES[case].weight().view(torch.int32))


@pytest.mark.parametrize("case", FEW)
def test_the_whole_weight_is_rounded_once_to_a_smaller_dtype(interpreted, monkeypatch, case):
    """Not to bfloat16: the interpreter cuts what a GPU rounds. `gpu_check_matvec.py` looks at that."""
    found = resident_of(CASES[case], monkeypatch).weight(torch.float16)
    assert torch.equal(found.view(torch.int16), CASES[case].weight().half().view(torch.int16))


def test_where_a_kernel_fails_torch_does_the_work_and_it_is_said_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(matvec, "matvec", fail)
    monkeypatch.setattr(unpack, "unpack", fail)
    monkeypatch.setattr(paths, "_refused", {})
    solution = quantized(9, 45, (4,), "zero-point")
    resident = resident_of(solution, monkeypatch)
    x = torch.randn(2, 45, generator=generator())
    with (
        pytest.warns(
            UserWarning, match="packed weights are unpacked in plain torch on cpu, not in Triton: RuntimeError"
        ),
        pytest.warns(UserWarning, match="packed weights are multiplied in plain torch"),
    ):
        assert_product(resident.matvec(x), x, solution)
    assert torch.equal(resident.weight(), solution.weight())  # a second warning would be an error


@pytest.mark.parametrize("widths", [(8, 6, 4, 3, 2), (7, 5), (6, 5, 4), (2, 1), (10, 4, 3)])
def test_weights_of_many_widths_share_four_kernels(widths):
    """Triton takes seconds to compile each pair of widths."""
    runs = tuple(matvec.Run(bits, 40 * k, 40, 100 * k, 0) for k, bits in enumerate(widths))
    absent = dict.fromkeys(matvec.Band._fields)
    launches = matvec._launches(matvec.Band(**absent | {"kind": 0, "runs": runs, "group_size": 0}))
    assert {(a.bits, b.bits) for a, b in launches} <= {(8, 7), (6, 5), (4, 3), (2, 1), (10, 0)}
    assert sorted(run for launch in launches for run in launch if run.channels) == sorted(runs)


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sgpt_lightning.kernels import matvec, unpack

types = {"x": "*fp32", "weight": "*fp16", "order": "*i16", "row_order": "*i16", "span": "*fp16", "origin": "*u8"}
types |= dict.fromkeys(("plain", "out", "carry", "factors", "column_factors", "row_factors"), "*fp32")
types |= dict.fromkeys(("words", "places", "apart_at", "apart", "apart_tiles"), "*i32")
fixed = {"N": 1, "ROWS": 4, "KIND": 1, "BITS1": 3, "BITS2": 0, "LANES": 128, "WIDEST": 3, "GROUP": 0}
fixed |= {"COLUMNS": 256, "ORDERED": False, "ROW_ORDERED": False}
for kernel, options in ((matvec._matvec, {"enable_fp_fusion": True}), (unpack._unpack, {"enable_fp_fusion": False})):
    constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | options).asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, made))
    print(count("fma.rn.f32"), count("st.local|ld.local"), count("bar.sync"))
"""


def test_compiled_for_a_gpu_a_weight_is_one_multiplication_and_unpacking_is_not_fused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (fused, spilled, waits), (contracted, spilled_too, _) = [
        [int(number) for number in line.split()] for line in done.stdout.splitlines()
    ]
    # 4 rows of 128 lanes of 32 fields among 128 threads, the sum of x, and a few for the row's step.
    assert 4 * 32 <= fused <= 5 * 32 + 8
    assert (spilled, spilled_too, contracted) == (0, 0, 0)
    assert waits <= 8  # none of them within the loop over fields
