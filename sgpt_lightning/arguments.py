"""Checks that settings share: of which type a value is, which choices there are, what a pattern or a size reads."""

import re
from fractions import Fraction
from typing import get_args


def check_type(argument: str, value: object, kinds: tuple[type, ...]) -> None:
    """Raise TypeError unless the value is of a kind; None is what is not given, and True is no number."""
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise TypeError(f"{argument} must be {wanted}, got {value!r} ({type(value).__name__})")


def check_choice(argument: str, value: object, choices: object) -> None:
    """Raise ValueError unless the value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(choices))}, got {value!r}")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (N, M) for the text `N:M`: N zeros in every M consecutive inputs, 0 < N < M."""
    zeros, colon, group = pattern.partition(":")
    if not colon or not zeros.isdecimal() or not group.isdecimal():
        raise ValueError(f"pattern must read N:M (N zeros in every M inputs), got {pattern!r}")
    if not 0 < int(zeros) < int(group):
        raise ValueError(f"pattern N:M needs 0 < N < M, got {pattern!r}")
    return int(zeros), int(group)


UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
"""Bytes by unit."""


def parse_size(argument: str, size: str | int) -> int:
    """Return bytes, rounded down, of a whole number or of text such as `4.5MB`.

    Raises:
        ValueError: it is no size, has an unknown unit, or is less than a byte.
    """
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if read is None:
        raise ValueError(f"{argument} must be bytes or read like 4.5MB, got {size!r}")
    number, unit = read.groups()
    if (unit or "B") not in UNITS:
        raise ValueError(f"the unit of {argument} must be one of {', '.join(UNITS)}, got {unit!r} in {size!r}")
    count = int(Fraction(number) * UNITS[unit or "B"])
    if count < 1:
        raise ValueError(f"{argument} must be at least a byte, got {size!r}")
    return count
