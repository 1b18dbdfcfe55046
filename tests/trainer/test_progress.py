"""Time left, as bars and lines show it; what they look like is in `test_cli.py`."""

import itertools
import random

from models_for_tests import make_model
from runs_for_tests import make_loader, make_trainer

from sgpt_lightning.recipe import Recipe
from sgpt_lightning.trainer.callback import SparseGPTCallback
from sgpt_lightning.trainer.module import CausalLMModule, Measured
from sgpt_lightning.trainer.progress import ProgressLines, format_duration, seconds_left


def test_time_left_is_what_is_left_and_falls_with_the_clock():
    seconds = [random.Random(block).uniform(9, 11) for block in range(12)]
    closing, shown = 5.0, []
    for block, duration in enumerate(seconds):
        for running in (0.0, 3.0, 6.0, 9.0):
            left = seconds_left(seconds[:block], running, len(seconds) - block, closing)
            truth = duration - running + sum(seconds[block + 1 :]) + closing
            if block == 0:
                assert left is None
                continue
            # A block is 10 s, give or take 1: so is the mean of those seen, and each of those to come.
            assert abs(left - truth) <= 2 * (len(seconds) - block)
            shown.append(left)
    assert all(after < before + 2 for before, after in itertools.pairwise(shown))
    assert seconds_left(seconds, 0.0, 0, closing) == closing


def test_a_block_that_takes_longer_than_those_before_does_not_make_time_left_negative():
    assert seconds_left([10.0], 25.0, 1) == 0
    assert seconds_left([10.0], 25.0, 3, 4.0) == 24


def test_durations_read_like_a_clock():
    assert [format_duration(seconds) for seconds in (0.4, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]


def test_a_line_shows_what_the_module_measured_and_not_what_was_logged(tmp_path, capsys):
    module = CausalLMModule.from_model(make_model("opt"))
    trainer = make_trainer(tmp_path)
    trainer.callback_metrics["perplexity/other"] = 1.0
    module.measured, module.measured_state = {"a/b": Measured(2.5, 1)}, "dense"
    ProgressLines().on_validation_end(trainer, module)
    assert capsys.readouterr().err == "perplexity on a/b dense: 2.500\n"


def test_a_trainer_that_fits_again_names_its_blocks_from_the_first(tmp_path, capsys):
    recipe = Recipe(preset="sparsegpt", target_avg_bits=None)
    callback = SparseGPTCallback(recipe, save_dir=str(tmp_path / "out"), validate_every_block=True)
    trainer = make_trainer(tmp_path, ProgressLines(), callback)
    shown = []
    for _ in range(2):
        trainer.fit(CausalLMModule.from_model(make_model("opt")), make_loader(), make_loader(seed=1))
        lines = capsys.readouterr().err.splitlines()
        shown.append([line.split(",")[0].split(":")[0] for line in lines if "block" in line or "perplexity" in line])
    assert shown[0] == shown[1]
    assert [line.removeprefix("perplexity on 0 ") for line in shown[0]] == [
        "dense", "block 1 of 2", "after 1 blocks", "block 2 of 2", "compressed",
    ]  # fmt: skip
