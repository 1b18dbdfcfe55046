"""What studies that take a second are run on."""

import pytest

from sgpt_lightning.experiments.study import Setting


@pytest.fixture(scope="session")
def setting(tiny, texts):
    """Two seeds of four windows, and two held-out windows."""
    sizes = {"seeds": (0, 1), "windows": 4, "eval_windows": 2, "seq_len": 32, "device": "cpu"}
    calibration, held_out = map(str, texts)
    return Setting(model=str(tiny), calibration=calibration, evaluation=(held_out,), **sizes)
