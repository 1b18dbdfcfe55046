"""The study of groups: what it says of figures made up by hand, and the command on a tiny model."""

import math
import re

import pytest
from readme_runs import run_main

from sgpt_lightning.experiments.compare_groups import (
    CASES,
    against_random,
    group_table,
    is_better,
    structure_table,
    verdict,
)
from sgpt_lightning.experiments.group_rule import Grouped
from sgpt_lightning.experiments.rows import Row
from sgpt_lightning.experiments.study import Outcome, Setting

CASE = CASES[0].name


def outcome(figures):
    """Rows of one case by arm: a perplexity for each seed, and a hundredth of it as the output error."""
    rows = [
        Row(f"{CASE}, {arm}", "rival", seed, "", 3.0, 100, {"text": value}, value / 100, 0.0)
        for arm, values in figures.items()
        for seed, value in enumerate(values)
    ]
    return Outcome(Setting(), [Row("dense", "dense", None, "", perplexity={"text": 9.0}), *rows], {"text": {}}, {})


def test_differences_are_taken_by_seed_and_by_draw():
    measured = outcome({"mutual information": [10, 20], "random 0": [11, 23], "random 1": [10.5], "sorted": [9]})
    found = against_random(measured, CASE, "mutual information", lambda row: row.perplexity["text"])
    assert sorted(found) == [-3, -1, -0.5]
    assert against_random(measured, CASE, "sorted", lambda row: row.perplexity["text"]) == [-2, -1.5]
    table = [[cell.strip() for cell in line.split("|")] for line in group_table(measured, CASE, "text").splitlines()]
    assert [row[1] for row in table[2:]] == ["mutual information", "random", "sorted"]
    assert table[2][3:5] == ["15.00", "-1.50 ± 1.32"]  # the sample's deviation of -3, -1, -0.5
    assert table[3][3:5] == ["14.83", ""]


@pytest.mark.parametrize(
    ("differences", "better"),
    [([-1, -2, -3], False), ([-1.01, -2, -2.99], True), ([1, 2, 3], False), ([1.01, 2, 2.99], False), ([-5], False)],
)
def test_better_is_below_zero_by_two_standard_deviations(differences, better):
    assert is_better(differences) is better  # -1, -2, -3 have a mean of -2 and a deviation of 1


def test_the_verdict_is_given_for_each_figure_and_needs_two_pairs():
    clear = outcome({"mutual information": [10, 20], "random 0": [11, 21.2]})
    lines = verdict(clear, CASE, "text").splitlines()
    assert [re.search("perplexity|output error", line).group() for line in lines] == ["perplexity", "output error"]
    assert all("lower in 2 of 2 pairs: better by 2 standard deviations" in line for line in lines)
    unclear = outcome({"mutual information": [10, 20], "random 0": [11, 19]})
    assert verdict(unclear, CASE, "text").count("lower in 1 of 2 pairs: NOT better") == 2
    assert verdict(outcome({"mutual information": [10], "random 0": [11]}), CASE, "text").count("no verdict") == 2


def test_what_groups_are_like_is_a_mean_over_blocks():
    seen = {
        "0.fc1": Grouped([3, 5], 0.5, 0.1, 0.3),
        "1.fc1": Grouped([2, 2, 4], 0.25, 0.2, -0.1),
        "0.fc2": Grouped([8], 0.1, math.nan, 0.0),
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in structure_table(seen).splitlines()[2:]]
    assert rows == [
        ["fc1", "2.5", "2", "4", "0.3750", "0.1500", "0.1000"],
        ["fc2", "1.0", "8", "8", "0.1000", "nan", "0.0000"],
    ]
    assert "measured before" in structure_table({})


@pytest.mark.parametrize("share", ["grid", "width"])
def test_the_command_shows_every_way_to_group_and_a_verdict(share, tiny, texts, tmp_path):
    calibration, held_out = map(str, texts)
    where = ["--model", tiny, "--calibration", calibration, "--evaluation", held_out, "--device", "cpu"]
    run = run_main(
        "compare", "--grouping", share, "--quick", *where, "--windows", 3, "--seeds", 0, "--output", tmp_path
    )
    tables = run.out.split("Differences are against")
    rows = [[cell.strip() for cell in line.split("|")] for line in tables[0].splitlines() if line.startswith("| ")]
    names = ["no groups", "mutual information", "random", "sorted", "contiguous", "a width per channel, loss"]
    others = ["a width per channel, budget", "one bit more, random"] if share == "grid" else []
    assert [row[1] for row in rows] == [CASE, *names, *others]
    bits = {row[1]: float(row[2]) for row in rows[1:]}
    if share == "grid":
        assert len({bits[name] for name in names[1:5]}) == 1
        assert bits["no groups"] < 0.9 * min(bits[name] for name in names[1:])
    else:  # one budget of code bits for all
        assert max(bits.values()) <= 1.02 * min(bits.values())
    assert run.out.count("of 2 pairs") == 2
    assert re.findall(r"^\| (\w+) ", tables[1], re.MULTILINE)[1:] == ["q_proj", "out_proj", "fc1", "fc2"]
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "rows.csv", "study.json", "figure.png",
                                                         "rows.jsonl"}  # fmt: skip
