"""Tables, differences and curves against figures counted by hand."""

import csv
import json
import sys

import pytest
import torch

from sgpt_lightning.core.moments import InputStatistics
from sgpt_lightning.experiments import layer as layers
from sgpt_lightning.experiments.ablate import SCORES, difference_table, part_arms, score_arms
from sgpt_lightning.experiments.arms import Arm, ours
from sgpt_lightning.experiments.figures import Point, write_bars, write_curves, write_front
from sgpt_lightning.experiments.layer import layer_table, random_layer, run_layers
from sgpt_lightning.experiments.rows import Row
from sgpt_lightning.experiments.study import Outcome, Setting
from sgpt_lightning.experiments.sweep import arm_of, monotone_line
from sgpt_lightning.experiments.tables import study_table, write_csv, write_json
from sgpt_lightning.presets import ImportanceWeights


def row(arm, seed, perplexity, **values):
    figures = {"bits_per_weight": 3.0, "file_bytes": 7_000_000, "output_error": 0.5, "zeros": 0.25, "seconds": 2.0}
    return Row(arm, "rival", seed, f"{arm}{seed}", perplexity={"text": perplexity}, **(figures | values))


@pytest.fixture
def outcome():
    rows = [
        row("dense", None, 10.0, seconds=0.0),
        row("base", 0, 20.0, peak_bytes=3_000_000),
        row("other", 0, 21.0, output_error=0.7),
        row("base", 1, 24.0, peak_bytes=5_000_000, file_bytes=8_000_000),
        row("other", 1, 23.0),
        Row("failed", "ours", 0, "k", error="ValueError: no"),
        row("base", 2, 22.0),
        row("other", 2, 25.0),
    ]
    return Outcome(Setting(device="cpu"), rows, {"text": {"windows": 2}}, {})


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_the_table_shows_means_half_ranges_and_what_was_lost(outcome):
    head, _, dense, base, other = cells(study_table(outcome))
    assert head == [
        "method", "bits/weight", "file, MB", "text", "output error", "zeros", "seconds", "peak, MB"
    ]  # fmt: skip
    assert dense[3] == "10.00"
    assert base == ["base", "3.00", "7.33", "22.00 ± 2.00 (+12.00)", "0.5000", "25.0%", "2", "5"]
    assert other[3:5] == ["23.00 ± 2.00 (+13.00)", "0.5667"]


def test_differences_are_paired_by_seed_and_stand_beside_their_standard_deviation(outcome):
    head, _, base, other = cells(difference_table(outcome, ["base", "other", "failed"], "text"))
    assert head[2:] == ["text", "difference", "output error", "difference"]
    assert base[3] == base[5] == ""
    # 1, -1 and 3: mean 1, deviations 0, -2 and 2, variance 8 / 2
    assert other[3] == "+1.000 ± 2.000"
    assert other[5] == "+0.06667 ± 0.11547"  # 0.2, 0 and 0: a mean of 1 / 15, variance 0.04 / 3


def test_csv_and_json_hold_every_row_and_the_failure(outcome, tmp_path):
    write_csv(outcome.rows, tmp_path / "rows.csv")
    write_json(outcome, tmp_path / "study.json")
    read = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [(line["method"], line["seed"], line["text"], line["error"]) for line in read][4:6] == [
        ("other", "1", "23.0", ""), ("failed", "0", "", "ValueError: no")
    ]  # fmt: skip
    assert [line["method"] for line in json.loads((tmp_path / "study.json").read_text())["rows"]] == [
        line["method"] for line in read
    ]


def test_a_curve_is_called_monotone_only_where_it_is():
    points = [("2", [row("2", 0, 30.0), row("2", 1, 20.0)]), ("3", [row("3", 0, 26.0, file_bytes=7_000_001)])]
    better = ("4", [row("4", 0, 19.0, file_bytes=7_000_001)])
    assert monotone_line("m", [points[0], better], "text") == "m: monotone"
    assert "fewer than two" in monotone_line("m", [better], "text")
    assert monotone_line("m", points, "text") == "m: NOT monotone, perplexity rises by 1.00 up to 3"
    assert "bytes do not rise up to 2" in monotone_line("m", points[::-1], "text")
    assert "perplexity" not in monotone_line("m", points[::-1], "text")


def test_one_score_at_a_time_is_left_out_and_kept_alone_and_the_rest_keep_their_proportions():
    arms, weights = score_arms(), ImportanceWeights()
    importance = {arm.name: arm.recipe.importance for arm in arms}
    for name in SCORES:
        without, alone = (
            importance[f"without {name}"],
            importance[f"{name} alone" + " (magnitude)" * (name == "weight")],
        )
        assert getattr(without, name) == 0
        ratios = {getattr(without, other) / getattr(weights, other) for other in SCORES if other != name}
        assert max(ratios) == pytest.approx(min(ratios))
        assert [getattr(alone, other) for other in SCORES] == [float(other == name) for other in SCORES]
    assert [arm.name for arm in arms if arm.rule is not None] == ["random scores (shuffled)"]
    identities = [json.dumps(arm.identity, sort_keys=True) for arm in arms]
    assert len(set(identities)) == len(arms) == 13


def test_one_part_of_the_solve_at_a_time_is_switched_off():
    base, *arms = part_arms()
    assert len(arms) == 11
    for arm in arms:
        parts, name = arm.recipe.solve_parts, arm.name.removeprefix("without ")
        changed = {key for key, value in vars(parts).items() if value != getattr(base.recipe.solve_parts, key)}
        assert changed == {name}
        assert not getattr(parts, name)


def test_a_sweeps_arm_spends_what_its_name_says():
    assert arm_of("budget", 3.5).recipe.target_avg_bits == 3.5
    assert arm_of("budget", 3.5).recipe.allocation == "budget"
    assert arm_of("rate-coded", 4).recipe.target_bits_per_weight == pytest.approx(1 + 4 / 2 + 0.07)


def test_a_random_layers_error_is_that_of_its_outputs_on_other_inputs(monkeypatch):
    monkeypatch.setattr(layers, "SHAPE", (16, 32))
    monkeypatch.setattr(layers.random_layer, "__defaults__", ((16, 32), 256))
    four_bits = ours("4 bit", preset="sparsegpt", sparsity=0)
    plain = ours("broken", pattern="2:5", preset="sparsegpt")
    rows = run_layers([four_bits, plain, Arm("rtn")], [0, 1])
    weight, seen, unseen = (part.double() for part in random_layer(1))
    assert not torch.equal(seen, unseen)
    statistics = InputStatistics(32)
    statistics.add(seen.float())
    stored = four_bits.solve(weight.float(), statistics, 1).weight().double()
    lost = torch.linalg.norm(unseen @ stored.T - unseen @ weight.T) / torch.linalg.norm(unseen @ weight.T)
    assert rows[3].error == pytest.approx(float(lost) ** 2, rel=1e-4)  # float32 against float64
    # 4 bits, and 16 of scale and 8 of zero point for the 32 weights of a row
    assert rows[3].bits_per_weight == 4 + 24 / 32
    assert "2:5" in rows[1].failure
    assert "no recipe" in rows[2].failure
    assert [line[0] for line in cells(layer_table(rows))] == ["one layer, random data", "-" * 24, "4 bit"]


def test_pictures_are_drawn_and_their_absence_is_told(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"

    def draw():
        path.unlink(missing_ok=True)
        yield write_front([Point("a", "ours", 3, 20), Point("b", "rival", 6, 10)], 9, "text", path)
        yield write_curves({"a": [(2, 9), (3, 4)]}, "error", path)
        yield write_bars({"a": (1.0, 0.5), "b": (-1.0, float("nan"))}, "change", path)

    for drawn in draw():
        assert drawn
        assert path.read_bytes()[:4] == b"\x89PNG"
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert list(draw()) == [False, False, False]
    assert not path.exists()
