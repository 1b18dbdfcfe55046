"""What people see of entropy-coded linears, against figures counted by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from sgpt_lightning.core.solution import Coded, CompressedLinear
from sgpt_lightning.format.packing import pack_weight
from sgpt_lightning.format.records import LinearReport, describe_linear
from sgpt_lightning.report.stats import QuantizationStats
from sgpt_lightning.report.tables import table_of_linears, true_bits


def coded(name: str, histogram: dict[int, int], loss: float | None = None, weights: int = 800) -> LinearReport:
    return LinearReport(
        name, weights, 0.25, 2.5, histogram, (0.0, 1.0), 0.01, 0.03, "ok", weights * 3 // 8, "coded", None, loss
    )


def cells_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_coded_linears_show_zeros_true_bits_the_spread_of_their_channels_and_their_share_of_the_loss():
    linears = [coded("fc1", {0: 1, 2: 4, 3: 4, 7: 1}, loss=0.03), coded("fc2", {3: 10}, loss=0.01)]
    assert cells_of(table_of_linears(linears)) == [
        ["linear", "zeros", "mean bits", "bits/weight", "channels' bits", "error", "share of loss", "damping"],
        ["fc1", "25.0%", "2.50", "3.00", "0-2-7", "0.0100", "75.0%", "0.03"],  # ten channels: the fifth has 2 bits
        ["fc2", "25.0%", "2.50", "3.00", "3-3-3", "0.0100", "25.0%", "0.03"],
    ]


def test_a_linear_of_fixed_widths_beside_a_coded_one_shows_the_spread_of_its_widths_and_how_they_were_dealt():
    fixed = LinearReport("fc1", 800, 0.5, 4.0, {2: 5, 8: 5}, (0, 1), 0.01, 0.01, "ok", 300, "bitmap", "rows")
    heading, first, second = cells_of(table_of_linears([fixed, coded("fc2", {3: 10})]))
    assert (heading[4], first[4], second[4]) == ("channels' bits", "2-2-8", "3-3-3")
    assert (heading[-1], first[-1], second[-1]) == ("widths", "rows", "")
    assert "share of loss" not in heading  # nobody took gradients


@pytest.mark.parametrize("losses", [(0.0, 0.0), (None, None)])
def test_losses_that_add_up_to_nothing_have_no_shares(losses):
    linears = [coded(f"fc{index}", {3: 1}, loss) for index, loss in enumerate(losses)]
    assert "share of loss" not in table_of_linears(linears)


def entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(counts * np.log2(counts)).sum())


def test_the_bits_in_a_report_are_the_entropy_of_each_channels_codes():
    spreads = torch.tensor([0.3, 1.0, 1.0, 4.0]).repeat(32)  # about 1, 2, 2 and 4 bits
    drawn = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0)) * spreads
    codes, nothing = drawn.round().int(), torch.zeros(1024, dtype=torch.uint8)
    solution = Coded(codes, torch.tensor([0.5]), nothing[:128], nothing)
    packed = pack_weight(solution)
    compressed = CompressedLinear(solution, 0.01, (0.0, 1.0), 0.03, "ok", predicted_loss=0.5)
    report = describe_linear("fc1", compressed, packed)
    entropies = [entropy(column) for column in codes.numpy().T]
    assert report.bits_histogram == dict(sorted(Counter(map(round, entropies)).items()))
    assert sum(report.bits_histogram.values()) == 128
    # A class of the coder serves columns of half an octave, and is told apart by 1,024 codes a column.
    assert report.mean_bits == pytest.approx(np.mean(entropies), rel=0.03)
    assert report.sparsity == pytest.approx(float((codes == 0).double().mean()), abs=1e-12)  # float64 quotients
    assert (report.layout, report.bytes, report.predicted_loss) == ("coded", packed.nbytes, 0.5)


def test_the_summary_draws_the_channels_by_their_bits_and_says_what_all_bytes_come_to():
    stats = QuantizationStats()
    stats.add(coded("fc1", {1: 25, 3: 75}))
    stats.add(coded("fc2", {3: 100}, weights=1600))
    summary = stats.summary()
    assert "Bits per weight, all bytes stored: 3.000" in summary
    assert "Mean bits per weight: 2.500" in summary
    assert "Quantized channels: 200, by their bits rounded to whole ones" in summary
    bars = {line.split()[0]: line.count("#") for line in summary.splitlines() if " bit: " in line}
    assert bars == {"1": 6, "3": 44}  # of 50: 12.5 % is 6.25, 87.5 % is 43.75
    assert true_bits(stats.linears) == 3.0
