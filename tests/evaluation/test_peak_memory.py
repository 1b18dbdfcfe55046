"""Peak memory against tensors of a known size."""

import pytest
import torch

from sgpt_lightning.evaluation import peak_memory as module
from sgpt_lightning.evaluation.peak_memory import peak_memory, return_free_memory

MIB = 2**20


def took(mebibytes: int) -> int:
    return_free_memory()  # which other tests have let go of: a tensor that takes it up again adds nothing
    with peak_memory("cpu") as peak:
        assert peak.nbytes is None
        torch.ones(mebibytes * MIB // 4)
    assert peak.nbytes is not None
    return peak.nbytes


def test_the_peak_is_that_of_the_body_and_forgets_what_was_before_it():
    small, large, again = took(1), took(200), took(1)
    # 199 MiB more of one tensor; the rest of the process may grow a little meanwhile
    assert large - small == pytest.approx(199 * MIB, abs=20 * MIB)
    assert again - small < 50 * MIB


def test_growth_is_what_came_on_top_of_what_was_held_before():
    held = torch.ones(150 * MIB // 4)
    return_free_memory()
    with peak_memory("cpu") as peak:
        assert peak.growth is None
        torch.ones(200 * MIB // 4)
    assert peak.growth == pytest.approx(200 * MIB, abs=20 * MIB)
    assert peak.before > held.nbytes


def test_where_the_system_does_not_tell_there_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PROCESS", tmp_path / "nothing")
    with peak_memory("cpu") as peak:
        pass
    assert peak.nbytes is None
    assert peak.growth is None
