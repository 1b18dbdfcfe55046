"""What messages are made of: the nearest known word, and another library's error in a line."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `: did you mean NAME?` for the known name that looks most like `word`, or nothing if none does.

    Args:
        word: what was written.
        known: the names there are.
        cutoff: least likeness, from 0 (anything) to 1 (the same), as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f": did you mean {close[0]}?" if close else ""


def told(error: BaseException) -> str:
    """Return an error's class and what it says, without the frames of C++ that torch appends."""
    return f"{type(error).__name__}: {error}".partition("\nException raised from")[0]
