"""The plain string, number or list that a foreign object is.

An object of a subclass may answer anything when it is asked for its length, its hash or its text,
or raise; and `isinstance` asks an object for its ``__class__``, which is no safer. Its type can be
trusted. So these functions look at the type, and read the value by the base type's own methods.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["plain_list", "plain_number", "plain_text"]


def plain_text(value: object) -> str | None:
    """The plain string that a string is.

    Args:
        value: Anything.

    Returns:
        It; None if this is no string.
    """
    return str.__str__(value) if issubclass(type(value), str) else None


def plain_list(values: object) -> list[Any] | None:
    """The list of what can be gone through.

    Args:
        values: Anything; whatever going through it raises is let through.

    Returns:
        What came, in order; None if this is nothing of the kind, as an array of no dimension.
    """
    try:
        entries = iter(values)  # type: ignore[call-overload]
    except TypeError:
        return None
    return list(entries)


def plain_number(value: object) -> int | float | None:
    """The plain number that one of Python or NumPy is.

    Args:
        value: Anything.

    Returns:
        It, exactly; None for anything else, as truth values and spans of time are.
    """
    kind = type(value)
    if kind is bool or issubclass(kind, np.timedelta64):
        return None
    plain: Any = value
    if issubclass(kind, int):
        return int.__int__(plain)
    if issubclass(kind, float):
        return float.__float__(plain)
    if issubclass(kind, (np.integer, np.float32, np.float16)):
        found: int | float = np.generic.item(plain)
        return found
    return None
