"""Time left, as bars and lines show it; what they look like is in `test_cli.py`."""

import itertools
import random

from sgpt_lightning.trainer.progress import format_duration, seconds_left


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
