"""The closing line, of manifests made by hand."""

import math
import warnings

import pytest

from sgpt_lightning.format.manifest import Ledger, Manifest
from sgpt_lightning.report.run import closing_line, perplexity_alarm, run_tables
from sgpt_lightning.trainer.logs import log_run


def manifest(perplexity: dict, linears: int = 3000, embeddings: int = 700) -> Manifest:
    # 8,000 weights in linears and 2,000 others are 20,000 bytes in 16 bits.
    ledger = Ledger(linears, embeddings, 200, 100, linear_weights=8000, parameters=10_000)
    return Manifest("float16", {}, ledger, {}, {"perplexity": perplexity})


BOTH = {"dense": {"docs": 20.0, "c4": 40.0}, "compressed": {"docs": 20.4, "c4": 39.0}}


@pytest.mark.parametrize(
    ("perplexity", "said"),
    [
        ({"dense": {"docs": 20.0}, "compressed": {"docs": 20.4}}, ", perplexity +2.0 %"),
        ({"dense": {"docs": 20.0}, "compressed": {"docs": 20.0}}, ", perplexity +0.0 %"),
        (BOTH, ", perplexity +2.0 % on docs, -2.5 % on c4"),
        ({"dense": {"docs": 20.0}, "compressed": {"docs": 20.4, "c4": 39.0}}, ", perplexity +2.0 %"),
        ({"dense": {"docs": None}, "compressed": {"docs": 20.4}}, ""),
        ({"dense": {"docs": 20.0}, "compressed": {"docs": None}}, ""),
        ({"dense": {"docs": 20.0}, "compressed": {}}, ""),
        ({}, ""),
    ],
)
def test_the_line_has_true_bits_the_whole_file_and_what_was_measured_on_both_models(perplexity, said):
    assert closing_line(manifest(perplexity)) == f"3.00 bits a weight, 5.0x smaller{said}"


def test_figures_measured_since_stand_against_the_dense_ones_of_the_run():
    assert (
        closing_line(manifest(BOTH), {"c4": 60.0, "ptb": 3.0}) == "3.00 bits a weight, 5.0x smaller, perplexity +50.0 %"
    )


def test_a_file_that_is_larger_than_in_16_bits_is_called_larger():
    assert closing_line(manifest({}, embeddings=26_700)).endswith("1.5x larger")


@pytest.mark.parametrize("value", [201.0, math.inf, math.nan])
def test_a_perplexity_of_more_than_ten_times_the_dense_one_is_told_everywhere_with_its_data_set(value):
    broken = manifest({"dense": {"docs": 20.0, "c4": 40.0}, "compressed": {"docs": value, "c4": 400.0}})
    alarm = f"perplexity is more than 10x the dense model's ({value / 20:.3g}x on docs)"
    assert alarm in perplexity_alarm(broken)
    assert alarm in closing_line(broken)
    assert alarm in run_tables(broken)
    with pytest.warns(UserWarning, match=r"more than 10x the dense model's \(.*x on docs\)"):
        log_run([], broken)


def test_ten_times_the_dense_perplexity_is_no_alarm_and_neither_is_what_was_not_measured():
    for perplexity in ({"dense": {"docs": 20.0}, "compressed": {"docs": 200.0}}, {"compressed": {"docs": 1e9}}, {}):
        assert perplexity_alarm(manifest(perplexity)) == ""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log_run([], manifest(perplexity))
    assert "11.5x on docs" in closing_line(manifest(BOTH), {"docs": 230.0})  # measured since
