"""The kernels in Triton's interpreter against the loops in plain torch, and what the compiler makes of them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from oracles import correlated_inputs, damped, generator, random_weight, second_moment, textbook_factor
from torch import Tensor

from sgpt_lightning.core import paths
from sgpt_lightning.core.descent import descend
from sgpt_lightning.core.grids import fit_affine_grid
from sgpt_lightning.core.masks import MaskRule
from sgpt_lightning.core.ranges import search_grid
from sgpt_lightning.core.scales import ColumnScales
from sgpt_lightning.core.sweep import Swept, sweep
from sgpt_lightning.kernels import columns as kernels

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS, BLOCK = 11, 20, 8
KINDS = ["zero-point", "offset", "zero-free", "integer"]
MASKS = {
    "nothing": None,
    "half": MaskRule(0.5),
    "2:4": MaskRule(0, (2, 4)),
    "given": torch.rand(COLUMNS, ROWS, generator=generator(3)) < 0.4,
}


@pytest.fixture(autouse=True)
def one_program(monkeypatch) -> None:
    """The interpreter takes its time for each program; `test_programs_share_the_outputs` has several."""
    monkeypatch.setattr(kernels, "OUTPUTS", 16)


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[list[str]]:
    """Send CPU tensors to the kernels, and list what was launched."""
    launched: list[str] = []
    for name in ("sweep_tile", "descend_tile"):
        plain = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=plain: (launched.append(n), f(*a))[1])
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    yield launched
    assert paths._refused == {}


class Problem:
    """A matrix, inputs first, whose third row is zero, and what a sweep and a descent of it need."""

    def __init__(self, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> None:
        self.rows, self.columns, self.seed = rows, columns, seed
        self.weight = random_weight(rows, columns, seed).T.contiguous()
        self.weight[:, 2:3] = 0
        self.hessian = damped(second_moment(correlated_inputs(200, columns, seed))).float()
        self.factor = textbook_factor(self.hessian).float()

    def scales(self, kind: str | None, axis: str = "input", group_size: int | None = None) -> ColumnScales | None:
        """Widths from 1 to 8, mixed, in another order than the loop's."""
        if kind is None or kind == "integer":
            return None if kind is None else ColumnScales.integer(0.02 * self.factor.diagonal())
        count, order = (
            self.columns if axis == "input" else self.rows,
            torch.randperm(self.columns, generator=generator()),
        )
        widths = torch.randint(1, 9, (count,), generator=generator(self.seed)).to(torch.uint8)
        rows_first = self.weight.T.contiguous()
        if kind == "zero-point":
            grid = fit_affine_grid(rows_first, int(widths.max()), group_size)._replace(axis=axis)
        else:
            ones = torch.ones(self.columns)
            grid = search_grid(kind, rows_first, ones, widths, axis=axis, group_size=group_size, search=False)
        return ColumnScales(grid, widths, self.columns, order)

    def swept(self, mask, scales: ColumnScales | None, block: int = BLOCK) -> Swept:
        return sweep(self.weight, self.factor, mask, scales, block)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Levels lie 1e-4 apart at least, and no case here has a near tie: what is left is the last bit of a sum."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def in_torch(problem: Problem, mask, scales: ColumnScales | None, block: int = BLOCK) -> Swept:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "_KERNEL_DEVICES", [])
        return problem.swept(mask, scales, block)


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_sweep_gives_what_torch_gives(interpreted, kind, mask):
    problem = Problem()
    scales = problem.scales(kind)
    swept, expected = problem.swept(mask, scales), in_torch(problem, mask, scales)
    assert interpreted == ["sweep_tile"] * 3  # of 8, 8 and 4 columns
    assert torch.equal(swept.drop, expected.drop)
    assert_same(swept.weight, expected.weight)
    assert (mask is None and kind is None) or not torch.equal(swept.weight, problem.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_descent_gives_what_torch_gives(interpreted, kind, masked):
    problem = Problem()
    scales, drop = problem.scales(kind), MASKS["given"].T.contiguous().T if masked else None
    assert scales is not None
    stored = in_torch(problem, drop, scales).weight
    target = problem.weight + 0.01 * torch.randn(problem.weight.shape, generator=generator(1))
    descended = descend(stored, target, problem.hessian, drop, scales, BLOCK)
    assert interpreted == ["descend_tile"] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "_KERNEL_DEVICES", [])
        expected = descend(stored, target, problem.hessian, drop, scales, BLOCK)
    assert_same(descended, expected)
    assert not torch.equal(descended, stored)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("zero-point", {"axis": "output"}),
        ("zero-free", {"axis": "output", "group_size": 6}),
        ("offset", {"group_size": 6}),
    ],
    ids=str,
)
def test_rows_may_have_widths_and_columns_groups(interpreted, kind, more):
    problem = Problem()
    scales = problem.scales(kind, **more)
    assert_same(problem.swept(MaskRule(0.5), scales).weight, in_torch(problem, MaskRule(0.5), scales).weight)
    assert interpreted


def test_groups_are_fitted_between_launches_and_longer_blocks_are_cut(interpreted, monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST_TILE", 6)
    problem = Problem()
    results = []
    for solve in (problem.swept, lambda *a: in_torch(problem, *a)):
        bits = torch.full((COLUMNS,), 3, dtype=torch.uint8)
        grid = fit_affine_grid(problem.weight.T.contiguous(), 3, 8)
        scales = ColumnScales(grid, bits, COLUMNS, None, refit_groups=True)
        results.append((solve(MaskRule(0, (2, 4)), scales, 16), grid.span, grid.origin))
    (ours, *our_grid), (expected, *grid) = results
    assert interpreted == ["sweep_tile"] * 5  # tiles of 4 columns: whole groups of 2:4, at most 6
    assert_same(ours.weight, expected.weight)
    assert torch.equal(ours.drop, expected.drop)
    assert torch.equal(our_grid[0], grid[0])
    assert torch.equal(our_grid[1], grid[1])


def test_matrices_that_share_an_input_are_one_launch(interpreted):
    problem, other = Problem(5), Problem(6, seed=1)
    weight = torch.cat([problem.weight, other.weight], 1)
    scales = [problem.scales("offset"), other.scales("offset")]
    stacked = ColumnScales.stacked([s for s in scales if s])
    swept = sweep(weight, problem.factor, [MaskRule(0.5), MaskRule(0.2)], stacked, BLOCK, [5, 6])
    assert len(interpreted) == 3
    other.factor = problem.factor
    for part, own, s, share in zip(swept.weight.split([5, 6], 1), (problem, other), scales, (0.5, 0.2), strict=True):
        assert_same(part, in_torch(own, MaskRule(share), s).weight)


def test_programs_share_the_outputs(interpreted, monkeypatch):
    monkeypatch.setattr(kernels, "OUTPUTS", 4)
    problem = Problem()
    scales = problem.scales("zero-free")
    assert_same(problem.swept(MASKS["given"], scales, 128).weight, in_torch(problem, MASKS["given"], scales).weight)
    assert interpreted == ["sweep_tile"]


@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (3, 1), (0, 8)])
def test_one_output_one_column_and_no_output_at_all(interpreted, rows, columns):
    weight, factor = torch.randn(columns, rows, generator=generator()), torch.eye(columns)
    scales = ColumnScales.integer(torch.full((columns,), 0.5))
    swept = sweep(weight, factor, None, scales, 128)
    assert torch.equal(swept.weight, (weight / 0.5).round() * 0.5)
    assert torch.equal(descend(swept.weight, weight, factor, None, scales, 128), swept.weight)
    assert interpreted == ["sweep_tile", "descend_tile"]


def test_half_precision_and_strides_change_nothing(interpreted):
    problem = Problem()
    problem.weight = problem.weight.bfloat16()
    plain = problem.swept(MaskRule(0.5), problem.scales("integer"))
    problem.weight, problem.factor = problem.weight.T.contiguous().T, problem.factor.T.contiguous().T
    strided = problem.swept(MaskRule(0.5), problem.scales("integer"))
    assert torch.equal(plain.weight, strided.weight)
    assert interpreted


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of 1e30 squared
def test_of_equal_scores_the_earlier_goes(interpreted):
    weight = torch.tensor(
        [[1.0, 1.0, 1e30, 0.0], [1.0, -1.0, 1e30, -0.0], [1.0, 2.0, 1e30, 0.0], [1.0, 1.0, 1e30, 1.0]]
    )
    swept = sweep(weight, torch.eye(4), MaskRule(0, (2, 4)), None, 128)
    assert swept.drop.int().T.tolist() == [[1, 1, 0, 0]] * 4


def test_halves_go_to_the_even_multiple_however_far_out_and_zero_keeps_its_sign(interpreted):
    far = 2.0**22
    multiples = torch.tensor(
        [[0.5, 1.5, 2.5, -0.5, -1.5, 3.25, far + 0.5, far + 1.5, -far - 0.5, 2 * far + 1, 4 * far + 2, -1e30]]
    )
    swept = sweep(multiples * 0.25, torch.eye(1), None, ColumnScales.integer(torch.tensor([0.25])), 1)
    assert (swept.weight / 0.25).tolist() == [[round(x) for x in multiples[0].tolist()]]
    widths = torch.tensor([2], dtype=torch.uint8)
    grid = search_grid(
        "zero-free", torch.tensor([[0.5]]).expand(3, 1), torch.ones(1), widths, axis="input", search=False
    )
    zeros = sweep(torch.tensor([[0.0, -0.0, -1e-30]]), torch.eye(1), None, ColumnScales(grid, widths, 1), 1)
    assert torch.signbit(zeros.weight).tolist() == [[False, True, True]]
    assert interpreted


# ----- what the compiler makes of them -----

COMPILE = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sgpt_lightning.kernels import columns as kernels

matrices = ("weight", "factor", "errors", "step", "base", "top", "pull", "hessian", "moves")
types = {name: "*fp32" for name in matrices} | {"drop": "*u8", "index": "*i64"}
for name in ("_sweep", "_descent"):
    kernel = getattr(kernels, name)
    for kind in (1, 2, 3, 4):
        fixed = {"KIND": kind, "MASKED": True, "N": 0, "M": 0, "COLUMNS": 64, "OUTPUTS": 8}
        constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
        options = {key: value for key, value in kernels._options(64).items() if key not in fixed}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        count = lambda pattern: len(re.findall(pattern, ptx))
        print(count("fma"), count("div.rn.f32"), count("div.(full|approx)|ftz|rcp"))
"""


def test_compiled_for_a_gpu_only_the_update_is_fused_and_divisions_are_exact(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 8
    for fused, divided, inexact in counts:
        assert fused == 64 * 8 / 32  # each of a warp's 32 threads updates its share of the tile
        assert divided > 0
        assert inexact == 0


# ----- where kernels cannot be used -----


def test_a_launch_that_fails_is_said_once_and_torch_does_the_work(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(kernels, "sweep_tile", fail)
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    problem = Problem()
    scales = problem.scales("zero-free")
    assert paths.loop_path(torch.device("cpu")) == "triton"
    with pytest.warns(UserWarning, match="plain torch on cpu, not in Triton: RuntimeError: no such GPU"):
        swept = problem.swept(MaskRule(0.5), scales)
    assert torch.equal(swept.weight, in_torch(problem, MaskRule(0.5), scales).weight)
    assert paths.loop_path(torch.device("cpu")) == "torch"
    problem.swept(MaskRule(0.5), scales)  # a second warning would be an error


def test_memory_that_runs_out_is_no_reason_to_do_without_kernels(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "sweep_tile", fail)
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    with pytest.raises(torch.OutOfMemoryError):
        Problem().swept(None, None)
    assert paths.loop_path(torch.device("cpu")) == "triton"


def test_without_triton_torch_does_the_work_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sgpt_lightning.kernels.columns")
    monkeypatch.setattr(paths, "_KERNEL_DEVICES", ["cpu"])
    monkeypatch.setattr(paths, "_refused", {})
    problem = Problem()
    assert paths.loop_path(torch.device("cpu")) == "torch"
    with pytest.warns(UserWarning, match="not in Triton: Triton cannot be imported"):
        swept = problem.swept(MaskRule(0.5), None)
    assert torch.equal(swept.weight, in_torch(problem, MaskRule(0.5), None).weight)


def test_an_old_gpu_gets_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert paths._reason_against(torch.device("cuda")) == "compute capability 6.1 is below 7.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert paths._reason_against(torch.device("cuda")) is None


def test_a_tile_that_is_not_contiguous_is_refused():
    tile = torch.zeros(8, 4).T
    with pytest.raises(ValueError, match=r"weight of a tile is not contiguous: strides \(1, 4\)"):
        kernels.sweep_tile(tile, torch.eye(4), torch.zeros(4, 8), None, None, None)
