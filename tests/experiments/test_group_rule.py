"""Groups in the product's own solve, against the product's own groups, counted values and counted bytes."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import make_batches, make_model

from sgpt_lightning.calibration import solving
from sgpt_lightning.calibration.compress import compress
from sgpt_lightning.core import rounding
from sgpt_lightning.experiments.arms import Arm
from sgpt_lightning.experiments.controls import replaced
from sgpt_lightning.experiments.group_rule import (
    GroupedGrid,
    InformedGroups,
    fit_grouped,
    grouped,
    grouping_bits,
    pack_grouped,
    unpack_grouped,
)
from sgpt_lightning.experiments.grouping import group_channels
from sgpt_lightning.experiments.layer import random_layer
from sgpt_lightning.format.bits import unpack_bits
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.recipe import Recipe

ROWS, COLUMNS, SHAPE = 24, 64, (24, 64)
SEARCHED = {"preset": "best", "allocation": "uniform", "parts": {"descent_passes": 0}}


@pytest.fixture(scope="module")
def layer():
    return random_layer(0, SHAPE, 512)


def solved(layer, collect, kind, share="grid", count=4, draw=0, seed=0, **settings):
    arm = Arm(
        "grouped",
        Recipe(**({"preset": "gptq", "target_avg_bits": 3} | settings)),
        grouped(kind, InformedGroups(count, share), draw),
    )
    return arm.solve(layer[0], collect(layer[1]), seed).solution


@pytest.mark.parametrize("settings", [{"preset": "gptq"}, {"preset": "sparsegpt"}, SEARCHED])
def test_a_row_has_no_more_values_in_a_group_than_its_width_and_all_of_them_come_back(layer, collect, settings):
    solution = solved(layer, collect, "information", count=3, target_avg_bits=2, **settings)
    groups, weight = solution.grid.groups, solution.weight()
    assert torch.equal(groups, group_channels(collect(layer[1]), 3, dead_apart=False))
    assert len(groups.unique()) == solution.grid.span.shape[1] == 3
    removed = settings["preset"] != "gptq"
    for group in range(3):
        counts = [len(row[row != 0].unique() if removed else row.unique()) for row in weight[:, groups == group]]
        assert max(counts) <= 4
    assert max(len(row.unique()) for row in weight) > 5  # more than one range could write
    packed = pack_grouped(solution)
    assert torch.equal(unpack_grouped([packed])[0], weight)


@pytest.mark.parametrize(("preset", "bits"), [("gptq", 3), ("sparsegpt", 4)])
def test_bytes_add_up_by_hand(layer, collect, preset, bits):
    solution = solved(layer, collect, "information", preset=preset, target_avg_bits=bits)
    survivors = int(solution.keep.sum()) if solution.keep is not None else ROWS * COLUMNS
    mask = 0 if solution.keep is None else ROWS * COLUMNS // 8
    by_hand = bits * survivors // 8 + mask + ROWS * 4 * (2 + 1) + COLUMNS * 2 // 8  # a range: float16 and uint8
    assert pack_grouped(solution).nbytes == by_hand
    plain = Arm("plain", Recipe(preset=preset, target_avg_bits=bits)).solve(layer[0], collect(layer[1]), 0).solution
    assert 8 * (by_hand - pack_weight(plain).nbytes) == grouping_bits(SHAPE, 4) == ROWS * 3 * 24 + COLUMNS * 2
    assert grouping_bits(SHAPE, 1) == 0


@pytest.mark.parametrize("settings", [{"preset": "gptq"}, {"preset": "sparsegpt"}, SEARCHED])
def test_one_group_is_no_group(layer, collect, settings):
    plain = Arm("plain", Recipe(target_avg_bits=3, **settings)).solve(layer[0], collect(layer[1]), 0).solution
    for kind in ("information", "random", "sorted", "contiguous"):
        one = solved(layer, collect, kind, count=1, **settings)
        assert torch.equal(one.weight(), plain.weight())
        assert pack_grouped(one).nbytes == pack_weight(plain).nbytes
    same = solved(layer, collect, "information", "width", 1, allocation="loss", uniform_if_better=False)
    assert same.widths.tolist() == [3] * COLUMNS


@pytest.mark.parametrize("settings", [{"preset": "gptq", "parts": {"act_order": True}}, SEARCHED | {"sparsity": 0.0}])
def test_consecutive_groups_of_one_size_are_the_products_own(layer, collect, settings):
    recipe = {"target_avg_bits": 3, **settings}
    own = Arm("own", Recipe(group_size=16, **recipe)).solve(layer[0], collect(layer[1]), 0).solution
    groups = torch.arange(COLUMNS) // 16

    def fit(problem, start, widths, axis):
        return fit_grouped(problem, start.survivors, widths, groups)

    with replaced(rounding, "fit_grid", fit):
        ours = Arm("ours", Recipe(**recipe)).solve(layer[0], collect(layer[1]), 0).solution
    assert isinstance(ours.grid, GroupedGrid)
    assert torch.equal(ours.codes, own.codes)
    assert torch.equal(ours.weight(), own.weight())


def test_other_groups_have_the_same_sizes_and_are_what_their_name_says(layer, collect):
    weight = layer[0]

    def groups(kind, **options):
        return solved(layer, collect, kind, **options).grid.groups

    information = groups("information")
    sizes = information.bincount().tolist()
    draws = [groups("random", draw=draw, seed=seed) for draw, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    assert all(draw.bincount().tolist() == sizes for draw in draws)
    contiguous = groups("contiguous")
    assert contiguous.tolist() == [group for group, size in enumerate(sizes) for _ in range(size)]
    ranked = groups("sorted")
    assert ranked.bincount().tolist() == sizes
    largest = weight.abs().amax(0)
    for group in range(3):
        assert largest[ranked == group].min() >= largest[ranked == group + 1].max()


def test_groups_share_a_width_within_the_budget_but_for_one_that_is_split(layer, collect):
    options = {"count": 4, "target_avg_bits": 3.4, "allocation": "loss", "uniform_if_better": False}
    solution = solved(layer, collect, "information", "width", **options)
    groups = group_channels(collect(layer[1]), 4)
    assert 0.99 * 3.4 <= float(solution.widths.double().mean()) <= 3.4
    assert sum(len(solution.widths[groups == group].unique()) > 1 for group in range(4)) <= 1
    every = solved(layer, collect, "channels", "width", **options)
    assert sum(len(every.widths[groups == group].unique()) > 1 for group in range(4)) > 1


@pytest.mark.parametrize("preset", ["gptq", "sparsegpt"])
@pytest.mark.parametrize("kind", ["channels", "shuffled"])
def test_widths_of_channels_take_the_bytes_that_groups_take_and_no_more(layer, collect, preset, kind):
    by_group = pack_grouped(solved(layer, collect, "information", preset=preset)).nbytes
    options = {"allocation": "budget", "uniform_if_better": False, "widths": (2, 3, 4, 5, 6, 8)}
    by_channel = pack_weight(solved(layer, collect, kind, preset=preset, **options)).nbytes
    assert 0.98 * by_group <= by_channel <= by_group


def test_groups_are_those_of_the_inputs_that_hooks_see_in_the_dense_model(collect):
    dense, batches, seen = make_model("opt"), make_batches(4, batch=4), {}
    names = ["model.decoder.layers.1.fc2", "model.decoder.layers.1.self_attn.v_proj"]
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(
                inputs[0].reshape(-1, module.in_features)
            )
        )
    informed = InformedGroups(3, "grid")
    informed.show(dense, batches)
    for name in names:
        problem = SimpleNamespace(name=name)
        assert torch.equal(informed.of(problem), group_channels(collect(torch.cat(seen[name])), 3, dead_apart=False))
    runs = len(seen[names[0]])
    informed.show(dense, batches)
    assert len(seen[names[0]]) == runs == 4  # the same again is not run again
    informed.show(dense, batches[1:])
    assert len(seen[names[0]]) == runs + 3


def test_a_model_is_compressed_by_the_rule_and_what_is_stored_is_what_it_computes_with():
    dense, batches = make_model("opt"), make_batches(4, batch=4)
    informed = InformedGroups(2, "grid")
    recipe, model = Recipe(preset="gptq", target_avg_bits=3), copy.deepcopy(dense)
    stored = Arm("grouped", recipe, grouped("information", informed)).compress(model, batches, 0)
    assert len(stored) == 12
    for name, linear in stored.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(unpack_grouped([linear.packed])[0], weight)
        assert linear.report.bytes == 3 * weight.numel() // 8 + 2 * 3 * weight.shape[0] + weight.shape[1] // 8
    random = Arm("random", recipe, grouped("random", informed))
    same_sizes = random.compress(copy.deepcopy(dense), batches, 0)
    for name, linear in stored.items():
        groups = [each[name].packed.tensors["weight_groups"] for each in (stored, same_sizes)]
        sizes = [unpack_bits(packed, 1, linear.packed.spec.shape[1]).bincount().tolist() for packed in groups]
        assert sizes[0] == sizes[1]
    plain = copy.deepcopy(dense)
    compress(plain, batches, recipe)
    name = next(iter(stored))
    assert not torch.equal(plain.get_submodule(name).weight, model.get_submodule(name).weight)


@pytest.mark.parametrize("share", ["grid", "width"])
def test_the_solve_is_given_back_whatever_happens(share):
    places = [(rounding, "deal_widths"), (rounding, "fit_grid"), (rounding, "allocate_budget"),
              (solving, "pack_weight"), (solving, "unpack_weights")]  # fmt: skip
    before, followed = [getattr(*place) for place in places], []
    with contextlib.suppress(ZeroDivisionError), grouped("information", InformedGroups(4, share)).followed(0):
        followed.append([getattr(*place) for place in places] != before)
        _ = 1 / 0
    assert followed == [True]
    assert [getattr(*place) for place in places] == before
