"""Reports against figures counted by hand."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from sgpt_lightning.core.grids import Grid
from sgpt_lightning.core.solution import CompressedLinear, Pruned, Quantized, Solution
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.records import LinearReport, RunRecord, describe_linear
from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.report.tables import format_bytes, format_table, mean_bits, overall_histogram, table_of_linears

KEEP = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


def solved(keep: torch.Tensor | None, widths: list[int] | None) -> CompressedLinear:
    """Two outputs, four inputs."""
    solution: Solution
    if widths is None:
        solution = Pruned(torch.ones(2, 4, dtype=torch.float16), keep)
    else:
        grid = Grid("zero-point", torch.ones(2, 1).half(), torch.zeros(2, 1, dtype=torch.uint8), max(widths))
        codes = torch.zeros(2, 4, dtype=torch.uint8)
        solution = Quantized(codes, torch.tensor(widths, dtype=torch.uint8), grid, keep)
    return CompressedLinear(
        solution, relative_error=0.125, importance_range=(0.25, 4.0), damp_percent=0.1, status="damped"
    )


@pytest.mark.parametrize(
    ("keep", "widths", "sparsity", "mean", "histogram", "count", "layout"),
    [
        # two survivors of 8 bits and one of 2; 2 bytes + 1 byte of codes, 1 of mask, 1 of widths, 2 rows of 2 + 1
        (KEEP, [8, 2, 8, 2], 5 / 8, 18 / 3, {2: 2, 8: 2}, 2 + 1 + 1 + 1 + 6, "bitmap"),
        # 4 + 16 bits of codes in two runs of 1 and 2 bytes, each channel counted twice
        (None, [2, 4, 4, 2], 0.0, 3.0, {2: 2, 4: 2}, 2 + 1 + 1 + 6, "dense"),
        # three codes of 8 bits
        (KEEP, [8, 8, 8, 8], 5 / 8, 8.0, {8: 4}, 3 + 1 + 6, "bitmap"),
        (KEEP, None, 5 / 8, None, {}, 3 * 2 + 1, "bitmap"),
        (None, None, 0.0, None, {}, 8 * 2, "dense"),
    ],
)
def test_a_linear_is_described_as_counted_by_hand(keep, widths, sparsity, mean, histogram, count, layout):
    compressed = solved(keep, widths)
    report = describe_linear("fc1", compressed, pack_weight(compressed.solution))
    assert report == LinearReport(
        "fc1", 8, sparsity, mean, histogram, (0.25, 4.0), 0.125, 0.1, "damped", count, layout, None
    )
    assert report.bits_per_weight == count
    assert report.to_dict()["bytes"] == count


def make_report(
    name: str, weights: int, sparsity: float, mean: float | None, histogram: dict[int, int]
) -> LinearReport:
    return LinearReport(
        name, weights, sparsity, mean, histogram, (0.0, 1.0), 0.01, 0.01, "ok", weights // 4, "dense", "rows"
    )


def test_the_mean_width_of_several_linears_counts_each_survivor_once():
    linears = [
        make_report("a", 100, 0.5, 4.0, {4: 10}),  # 50 survivors
        make_report("b", 400, 0.75, 2.5, {2: 15, 4: 5}),  # 100
        make_report("c", 9999, 0.0, None, {}),
    ]
    assert mean_bits(linears) == pytest.approx((50 * 4 + 100 * 2.5) / 150, rel=1e-12)  # float64
    assert mean_bits(linears[2:]) is None
    assert mean_bits([make_report("a", 8, 1.0, 0.0, {4: 1})]) is None  # nothing survived
    assert math.isnan(mean_bits([*linears, make_report("d", 8, 0.5, math.nan, {4: 1})]))
    assert mean_bits([]) is None
    assert overall_histogram(linears) == {2: 15, 4: 15}
    stats = QuantizationStats()
    for linear in linears:
        stats.add(linear)
    assert stats.total_channels == 30
    assert stats.channels_per_width == {2: 15, 4: 15}
    assert "3.000" in stats.summary()
    assert "2 bit:       15 channels,  50.0%" in stats.summary()
    assert "not quantized (16+ in the table): 1" in stats.summary()


@pytest.mark.parametrize("status", ["ok", "damped", "float64"])
@pytest.mark.parametrize("error", [0.125, 0.0, math.nan, math.inf])
def test_status_damping_importance_and_error_are_described_as_they_are(status, error):
    compressed = replace(solved(KEEP, None), status=status, relative_error=error, damp_percent=0.3)
    report = describe_linear("fc1", compressed, pack_weight(compressed.solution))
    assert (report.status, report.damp_percent, report.importance_range) == (status, 0.3, (0.25, 4.0))
    assert str(report.relative_error) == str(error)  # NaN stays NaN
    cells = [cell.strip() for cell in table_of_linears([report]).splitlines()[-1].split("|")]
    assert cells[6] == ("0.3" if status == "ok" else f"0.3 ({status})")
    assert cells[5] == f"{error:.4f}"


def cells_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_per_linear_shows_its_channels_per_width_extra_damping_and_true_bits():
    damped = solved(KEEP, [8, 2, 8, 2])
    linears = [
        make_report("fc1", 8, 0.5, None, {}),
        describe_linear("fc2", damped, pack_weight(damped.solution)),
        make_report("fc3", 800, 0.0, 2.5, {2: 1000, 3: 11}),
    ]
    heading = ["linear", "sparsity", "mean bits", "bits/weight", "2/3/8 bit", "error", "damping", "widths"]
    assert cells_of(table_of_linears(linears)) == [
        heading,
        ["fc1", "50.0%", "16+", "2.00", "", "0.0100", "0.01", "rows"],
        ["fc2", "62.5%", "6.00", "11.00", "2/ 0/2", "0.1250", "0.1 (damped)", ""],
        ["fc3", "0.0%", "2.50", "2.00", "1000/11/0", "0.0100", "0.01", "rows"],
    ]
    detailed = cells_of(table_of_linears(linears, "layer", details=True))
    assert detailed[0] == ["layer", *heading[1:], "importance", "layout"]
    assert [row[-2:] for row in detailed[1:]] == [["0 to 1", "dense"], ["0.25 to 4", "bitmap"], ["0 to 1", "dense"]]
    assert "bit" not in cells_of(table_of_linears(linears[:1]))[0]  # no width, no column for widths


@pytest.mark.parametrize("prefix", ["model.decoder.layers.", ""])
def test_the_summary_of_48_layers_is_one_line_each_in_120_columns_with_all_widths(prefix):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "mlp.down_proj")
    stats = QuantizationStats()
    for index in range(48):
        histogram = {2: index, 3: 100, 4: 1024 - 300 - index, 6: 100, 8: 100}
        where = f"{prefix}{index // 4}." if prefix else ""
        stats.add(make_report(where + kinds[index % 4], 4096 * 1024, 0.5, 4.0, histogram))
    summary = stats.summary()
    assert max(map(len, summary.splitlines())) <= 120
    heading, *rows = cells_of(summary)
    assert heading[0] == "layer"
    assert "2/3/4/6/8 bit" in heading
    assert len(rows) == 48
    assert len({row[0] for row in rows}) == 48
    shown = [prefix + row[0] for row in rows]  # the shared part of the names stands above the table, once
    assert shown == [linear.name for linear in stats.linears]
    assert ("Layers of model.decoder.layers:" in summary) == bool(prefix)
    for index, row in enumerate(rows):
        assert [int(count) for count in row[4].split("/")] == [index, 100, 724 - index, 100, 100]
        assert row[2] == "4.00"
    assert "linear" not in summary  # the fork's word is layer


def test_names_that_repeat_or_are_missing_are_told_apart_and_every_report_is_kept():
    stats = QuantizationStats()
    names = ["fc1", "fc2", "fc1", "", "fc1", "", "fc1 #2", "fc2 #3"]
    kept = [stats.add(make_report(name, 8 * (i + 1), 0.5, 4.0, {4: 2})) for i, name in enumerate(names)]
    expected = ["fc1", "fc2", "fc1 #2", "unnamed", "fc1 #3", "unnamed #2", "fc1 #2 #2", "fc2 #3"]
    assert [linear.name for linear in stats.linears] == expected
    assert stats.linears == kept
    assert [linear.weights for linear in stats.linears] == [8 * (i + 1) for i in range(len(names))]
    assert [row[0] for row in cells_of(stats.summary())[1:]] == expected


def test_a_report_takes_the_row_of_the_one_that_it_replaces_and_a_removed_one_is_gone():
    stats = QuantizationStats()
    first, twin = (stats.add(make_report("fc1", 8, 0.5, 4.0, {4: 2})) for _ in range(2))
    again = stats.add(make_report("fc1", 8, 0.5, 6.0, {6: 2}), replaces=first)
    assert stats.linears == [again, twin]
    assert [linear.name for linear in stats.linears] == ["fc1", "fc1 #2"]
    assert stats.channels_per_width == {4: 2, 6: 2}
    strange = make_report("fc1", 8, 0.5, 2.0, {2: 2})
    stats.add(strange, replaces=first)  # not there any more: it stands for itself
    assert [linear.name for linear in stats.linears] == ["fc1", "fc1 #2", "fc1 #3"]
    for linear in (strange, twin):
        stats.remove(linear)
    assert [linear.name for linear in stats.linears] == ["fc1", "fc1 #3"]


REPORTS = [
    replace(make_report("layers.0.fc1", 8, 0.5, 4.25, {2: 3, 8: 5}), predicted_loss=0.25),
    make_report("", 8, 0.0, None, {}),
    replace(make_report("fc2", 8, 0.0, 4.0, {4: 8}), scaling_alpha=0.4),
    replace(make_report("fc1", 8, 1.0, 0.0, {1: 1}), status="float64", allocation=None, damp_percent=0.0),
]


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_reads_back_equal_with_and_without_json(report):
    assert LinearReport.from_dict(report.to_dict()) == report
    assert LinearReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


ODD = {
    "name": [None, 3],
    "weights": [0, -8, 8.0, True, "8", None, 2**63],
    "sparsity": [-0.1, 1.5, math.nan, "0.5", None, True],
    "mean_bits": [-1, 64.5, math.nan, math.inf, "4", False],
    "bits_histogram": [
        None,
        [],
        [[4, 8]],
        {"-1": 3},
        {"65": 3},
        {"four": 3},
        {"4.0": 3},
        {"": 3},
        {"4": 0},
        {"4": 1.5},
        {"4": None},
        {"4": True},
    ],
    "importance_range": [None, 1.0, [], [1.0], [0, 1, 2], [0.0, math.nan], [-math.inf, 1.0], [2.0, 1.0], ["0", "1"]],
    "relative_error": [math.nan, math.inf, -math.inf, "0.1", True, 10**400],
    "damp_percent": [math.nan, math.inf, -0.01, None, "1", 10**400],
    "status": ["fine", "", None, 0, ["ok"]],
    "bytes": [0, -1, 3.0, math.nan, None, False, 10**400],
    "layout": ["sparse", None, 1, {}],
    "allocation": ["best", "", 0, []],
    "predicted_loss": [-0.1, math.nan, math.inf, "0.1", True],
    "scaling_alpha": [-0.1, 1.1, math.nan, "0.5", True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ODD.items() for value in values])
def test_a_field_that_no_solve_can_have_given_is_refused_by_name(field, value):
    values = json.loads(json.dumps(REPORTS[0].to_dict())) | {field: value}
    with pytest.raises(ValueError, match=rf"report of .*: {field} must be ") as raised:
        LinearReport.from_dict(values)
    assert repr(value)[:80] in str(raised.value)
    if field != "name":
        assert "layers.0.fc1" in str(raised.value)


def test_every_field_of_a_report_is_checked():
    assert set(ODD) == {field.name for field in fields(LinearReport)}


@pytest.mark.parametrize("values", [None, [], "report", {}, {"name": "fc1"}, REPORTS[0].to_dict() | {"speed": 1}])
def test_a_report_with_other_fields_is_refused(values):
    with pytest.raises(
        ValueError, match=r"the report of a linear needs the fields name, weights, .*scaling_alpha, got"
    ):
        LinearReport.from_dict(values)


@pytest.mark.parametrize("change", [{"mean_bits": None}, {"bits_histogram": {}}])
def test_a_report_that_is_quantized_in_one_field_and_not_in_another_is_refused(change):
    with pytest.raises(ValueError, match="mean_bits and bits_histogram must both be there or not"):
        LinearReport.from_dict(REPORTS[0].to_dict() | change)


@pytest.mark.parametrize("rows", [[], [["a", "1"]], [["a longer name", "1"], ["b", "123456789 and more"]]])
def test_a_table_is_markdown_whose_columns_line_up(rows):
    lines = format_table(["layer", "bits"], rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    bars = [[position for position, character in enumerate(line) if character == "|"] for line in lines]
    assert all(row == bars[0] for row in bars)
    assert len(bars[0]) == 3
    rule = lines[1].strip("|").split("|")
    assert set(rule[0]) == {"-"}
    assert set(rule[1][:-1]) == {"-"}
    assert rule[1][-1] == ":"  # numbers to the right
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
    assert cells == [["layer", "bits"], *rows]


def test_a_table_with_a_row_of_the_wrong_length_is_refused():
    with pytest.raises((ValueError, IndexError)):
        format_table(["layer", "bits"], [["a"]])


def test_bytes_are_shown_in_decimal_megabytes():
    assert format_bytes(44_586) == "0.04 MB"
    assert format_bytes(5_000_000_000) == "5000.00 MB"


def test_a_runs_record_reads_back_equal_through_json_and_is_empty_where_nothing_was_said():
    record = RunRecord(
        model="opt-mini", calibration={"mode": "sequential"}, recipe={"sparsity": 0.5},
        perplexity={"dense": {"docs": 29.3}, "compressed": {"docs": 30.5}}, protocols={"docs": {"windows": 70}},
        seconds={"solve": 1.5}, blocks=8, versions={"torch": "2.13.0"},
    )  # fmt: skip
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert RunRecord.from_dict({}) == RunRecord()
    assert RunRecord.from_dict({"note": "of a writer of its own", "blocks": 2}) == RunRecord(blocks=2)
