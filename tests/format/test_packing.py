"""Packed weights come back bit for bit, and take the bytes that a hand-written formula says."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from oracles import correlated_inputs, generator, random_weight

from sgpt_lightning.core.grids import fit_affine_grid
from sgpt_lightning.core.solution import Pruned, Quantized, Solution
from sgpt_lightning.format.layout import PackedWeight, WeightSpec
from sgpt_lightning.format.packing import cheapest_layout, pack_weight, unpack_weight

MIXED = (2, 3, 4, 6, 8)


def random_keep(
    rows: int, columns: int, sparsity: float, n_m: tuple[int, int] | None, seed: int
) -> torch.Tensor | None:
    g = generator(seed)
    if n_m:
        zeros = torch.rand(rows, columns // n_m[1], n_m[1], generator=g).argsort(2) < n_m[0]
        return ~zeros.view(rows, columns)
    if sparsity == 0:
        return None
    return torch.randperm(rows * columns, generator=g).view(rows, columns) >= round(sparsity * rows * columns)


def made(rows: int, columns: int, widths=None, sparsity: float = 0.0, n_m=None, seed: int = 0) -> Solution:
    """A solved matrix with random codes, without any solver; removed weights hold the zero point or zero."""
    g = generator(seed)
    keep = random_keep(rows, columns, sparsity, n_m, seed)
    weight = random_weight(rows, columns, seed)
    if widths is None:
        values = weight if keep is None else weight.masked_fill(~keep, 0)
        return Pruned(values.half(), keep, n_m)
    column_widths = torch.tensor(widths)[torch.randint(len(widths), (columns,), generator=g)].to(torch.uint8)
    grid = fit_affine_grid(weight, int(column_widths.max()))
    codes = (torch.rand(rows, columns, generator=g) * 2.0**column_widths).floor()
    if keep is not None:
        zero = torch.stack([grid.at(int(bits)).base[:, 0] for bits in column_widths], 1)
        codes = torch.where(keep, codes, zero)
    return Quantized(codes.to(torch.uint8), column_widths, grid, keep, n_m)


def bytes_of(solution: Solution, layout: str) -> int:
    """The formula by hand: per run of one width ceil(weights * width / 8), and what describes them."""
    rows, columns = solution.shape
    stored = torch.ones(rows, columns) if layout == "dense" else solution.keep
    total = {"dense": 0, "bitmap": math.ceil(rows * columns / 8)}.get(layout)
    if layout == "pattern":
        n, m = solution.n_m
        total = math.ceil(rows * columns // m * math.ceil(math.log2(math.comb(m, n))) / 8)
    if isinstance(solution, Pruned):
        return total + 2 * int(stored.sum())
    used = sorted(set(solution.widths.tolist()))
    runs = [math.ceil(int(stored[:, solution.widths == bits].sum()) * bits / 8) for bits in used]
    widths = math.ceil(columns * math.ceil(math.log2(len(used))) / 8)
    return total + sum(runs) + rows * (2 + 1) + widths


CASES = [
    *({"widths": (bits,), "sparsity": sparsity} for bits in range(1, 9) for sparsity in (0.0, 0.05, 0.5)),
    *(
        {"widths": widths, "sparsity": s}
        for widths in (None, MIXED, (2, 8), tuple(range(1, 9)))
        for s in (0.0, 0.02, 0.6)
    ),
    *({"widths": widths, "n_m": n_m} for widths in (None, (4,), MIXED) for n_m in ((1, 4), (2, 4), (4, 8), (3, 5))),
    {"widths": (8,), "n_m": (8, 16)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (16, 8)])
def test_unpacking_gives_the_weight_bit_for_bit_in_the_bytes_of_the_formula(case, rows, groups):
    columns = groups * case.get("n_m", (0, 5))[1]
    solution = made(rows, columns, **case)
    packed = pack_weight(solution)
    assert torch.equal(unpack_weight(packed).view(torch.int32), solution.weight().view(torch.int32))
    assert packed.nbytes == bytes_of(solution, packed.spec.layout)
    assert packed.spec.shape == (rows, columns)
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layout_taken_is_the_smallest_of_those_that_fit(case):
    solution = made(16, 10 * case.get("n_m", (0, 8))[1], **case)
    layouts = ["dense"] if solution.keep is None else ["dense", "bitmap"]
    if solution.n_m and math.comb(solution.n_m[1], solution.n_m[0]) <= 256:
        layouts.append("pattern")
    assert pack_weight(solution).nbytes == min(bytes_of(solution, layout) for layout in layouts)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"widths": (4,)}, "dense"),
        ({"widths": (4,), "sparsity": 0.1}, "dense"),
        ({"widths": (4,), "sparsity": 0.5}, "bitmap"),
        ({"widths": (1,), "sparsity": 0.9}, "dense"),
        ({"widths": (4,), "n_m": (2, 4)}, "pattern"),
        ({"widths": (2,), "n_m": (1, 4)}, "dense"),
        ({"sparsity": 0.5}, "bitmap"),
        ({"sparsity": 0.02}, "dense"),
        ({"n_m": (2, 4)}, "pattern"),
        ({"widths": (4,), "n_m": (16, 32)}, "bitmap"),
    ],
    ids=str,
)
def test_few_zeros_are_stored_dense_many_by_bitmap_and_patterns_by_rank(settings, layout):
    solution = made(32, 64, **settings)
    assert cheapest_layout(solution) == layout
    assert pack_weight(solution).spec.layout == layout


def test_a_two_of_four_mask_costs_three_quarters_of_a_bit_a_weight():
    packed = pack_weight(made(64, 128, widths=(4,), n_m=(2, 4)))
    assert packed.tensors["weight_mask"].nbytes * 8 == 0.75 * 64 * 128
    assert packed.tensors["weight_codes"].nbytes * 8 == 0.5 * 4 * 64 * 128


def test_pattern_ranks_are_in_lexicographic_order_of_the_zeros():
    order = 4 * list(itertools.combinations(range(4), 2))
    solution = made(1, 4 * len(order), widths=(8,), n_m=(2, 4))
    keep = torch.tensor([[position not in zeros for zeros in order for position in range(4)]])
    codes = torch.where(keep, solution.codes, solution.grid.origin)
    packed = pack_weight(replace(solution, keep=keep, codes=codes))
    number = int.from_bytes(bytes(packed.tensors["weight_mask"].tolist()), "little")
    assert [number >> (3 * i) & 7 for i in range(len(order))] == 4 * list(range(6))


@pytest.mark.parametrize("target", [None, 3.3])
@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("shape", [(9, 44), (16, 64)])
def test_what_the_solver_hands_over_survives_packing(solve, shape, settings, target):
    weight, inputs = random_weight(*shape), correlated_inputs(200, shape[1])
    solution = solve(weight, inputs, target_avg_bits=target, allocation="quantile", **settings).solution
    assert torch.equal(unpack_weight(pack_weight(solution)), solution.weight())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_ranges_that_float16_cannot_hold_are_packed_as_float32(solve, factor):
    solution = solve(random_weight(6, 24) * factor, correlated_inputs(100, 24), target_avg_bits=4).solution
    packed = pack_weight(solution)
    assert packed.tensors["weight_range"].dtype == torch.float32
    assert torch.equal(unpack_weight(packed), solution.weight())


@pytest.mark.parametrize("case", [{"widths": MIXED, "sparsity": 0.5}, {"n_m": (2, 4)}, {"widths": (3,), "n_m": (2, 4)}])
def test_a_missing_extra_or_resized_tensor_is_refused(case):
    spec, tensors = pack_weight(made(8, 24, **case))
    damaged = [{**tensors, "weight_more": torch.zeros(1)}]
    for name, tensor in tensors.items():
        damaged += [{key: value for key, value in tensors.items() if key != name}]
        damaged += [tensors | {name: tensor[:-1]}, tensors | {name: torch.cat([tensor, tensor[-1:]])}]
    for wrong in damaged:
        with pytest.raises(ValueError, match=r"needs the tensors|bytes|survivors|takes from|must be \("):
            unpack_weight(PackedWeight(spec, wrong))


def test_codes_that_name_no_width_or_no_pattern_are_refused():
    spec, tensors = pack_weight(made(8, 24, widths=(2, 3, 4)))
    with pytest.raises(ValueError, match="width 3 of 3"):
        unpack_weight(PackedWeight(spec, tensors | {"weight_widths": torch.full_like(tensors["weight_widths"], 255)}))
    spec, tensors = pack_weight(made(8, 24, widths=(4,), n_m=(2, 4)))
    with pytest.raises(ValueError, match="rank 7 names no pattern of 2 zeros in 4"):
        unpack_weight(PackedWeight(spec, tensors | {"weight_mask": torch.full_like(tensors["weight_mask"], 255)}))


@pytest.mark.parametrize("case", [{}, {"widths": MIXED, "sparsity": 0.5}, {"widths": (3,), "n_m": (2, 4)}])
def test_a_specification_survives_json(case):
    spec = pack_weight(made(8, 24, **case)).spec
    assert WeightSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


FOREIGN = {
    "layout": ["sparse", "dense", None],
    "shape": [8, [8], None, [8, 22], [8, "24"], [0, 24]],
    "widths": [[9], [0], [4, 3], [3, 3], [], "34", 3],
    "n_m": [None, [4, 2], [2], [2, 5]],
    "grid": ["affine", None, 3],
    "group_size": [0, -1, "8", 2.5],
    "width_axis": ["rows", None],
    "version": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FOREIGN.items() for value in values])
def test_a_foreign_specification_is_refused(key, value):
    good = pack_weight(made(8, 24, widths=(3,), n_m=(2, 4))).spec.to_dict()
    with pytest.raises(ValueError, match="not a weight specification"):
        WeightSpec.from_dict(good | {key: value})


@pytest.mark.parametrize("missing", ["shape", "layout", "widths", "n_m", "grid", "group_size", "width_axis"])
def test_a_specification_with_a_part_missing_is_refused(missing):
    good = pack_weight(made(8, 24, widths=(3,), n_m=(2, 4))).spec.to_dict()
    del good[missing]
    with pytest.raises(ValueError, match="not a weight specification"):
        WeightSpec.from_dict(good)
