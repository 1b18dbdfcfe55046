"""Reports against figures counted by hand."""

import pytest
import torch

from sgpt_lightning.grids import Grid
from sgpt_lightning.packed import pack_weight
from sgpt_lightning.report import (
    LINEAR_COLUMNS,
    LinearReport,
    QuantizationStats,
    describe_linear,
    format_bytes,
    format_table,
    linear_row,
    mean_bits,
    overall_histogram,
)
from sgpt_lightning.solver import CompressedLinear

KEEP = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


def solved(keep: torch.Tensor | None, widths: list[int] | None) -> CompressedLinear:
    """Two outputs, four inputs."""
    grid = Grid("zero-point", torch.ones(2, 1).half(), torch.zeros(2, 1, dtype=torch.uint8), max(widths or [8]))
    return CompressedLinear(
        codes=None if widths is None else torch.zeros(2, 4, dtype=torch.uint8),
        values=torch.ones(2, 4, dtype=torch.float16) if widths is None else None,
        keep=keep,
        widths=None if widths is None else torch.tensor(widths, dtype=torch.uint8),
        grid=None if widths is None else grid,
        n_m=None,
        relative_error=0.125,
        importance_range=(0.25, 4.0),
        damp_percent=0.1,
        status="damped",
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
    report = describe_linear("fc1", compressed, pack_weight(compressed))
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
    assert mean_bits([]) is None
    assert overall_histogram(linears) == {2: 15, 4: 15}
    stats = QuantizationStats()
    for linear in linears:
        stats.add(linear)
    assert stats.total_channels == 30
    assert stats.channels_per_width == {2: 15, 4: 15}
    assert "3.000" in stats.summary()
    assert "2 bit:       15 channels,  50.0%" in stats.summary()
    assert "not quantized (1): c" in stats.summary()


def test_a_row_shows_unquantized_survivors_and_extra_damping():
    plain = linear_row(make_report("fc1", 8, 0.5, None, {}))
    damped = linear_row(describe_linear("fc1", solved(KEEP, [8] * 4), pack_weight(solved(KEEP, [8] * 4))))
    assert plain == ("fc1", "50.0%", "16+", "2.00", "0 to 1", "0.0100", "0.01", "dense", "rows")
    assert damped == ("fc1", "62.5%", "8.00", "10.00", "0.25 to 4", "0.1250", "0.1 (damped)", "bitmap", "")
    assert len(plain) == len(LINEAR_COLUMNS)


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
