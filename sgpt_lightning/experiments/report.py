"""What a study hands to its command: tables, a picture still to be drawn, and what failed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sgpt_lightning.experiments.study import Outcome


class StudyReport(NamedTuple):
    """A study that has run."""

    outcome: Outcome
    text: str
    """Tables in Markdown, and what they mean in words."""
    draw: Callable[[Path], bool]
    """Draws the picture into a PNG file; False without matplotlib."""
    failures: Sequence[str] = ()
    """What failed besides rows of the outcome, a line each."""
