"""Arguments that callers give: read at once, and told by their names where they are wrong.

What is taken is Python's own kind of a thing or NumPy's; what comes back is Python's own. A truth
value is no number, and what merely counts as true is no truth value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from fedavg_core.errors import UsageError, quoted
from fedavg_core.plain import plain_list, plain_number, plain_text

__all__ = [
    "PathLike",
    "file_path",
    "is_whole_number",
    "listed",
    "one_for_each",
    "real_number",
    "truth",
    "whole_number",
]

PathLike: TypeAlias = "str | os.PathLike[str]"

_REACH = 1024  # no whole number is as far from zero as 2**_REACH; Python shows none of any length


def truth(name: str, value: object) -> bool:
    """An argument that is to be True or False.

    Args:
        name: The argument's.
        value: What was given.

    Returns:
        It, as Python's own.

    Raises:
        UsageError: It is neither; what merely counts as one of them is none.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise UsageError(f"{name}: expected True or False, got {quoted(value)}")


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether something is a whole number, which truth values and spans of time are not.

    Args:
        value: Anything.

    Returns:
        True for an int or an integer of NumPy.
    """
    return isinstance(plain_number(value), int)


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """An argument that is to be a whole number.

    Args:
        name: The argument's.
        value: What was given.
        least: The smallest that has a meaning; None for any.

    Returns:
        It, as Python's own.

    Raises:
        UsageError: It is none, or is smaller, or is as large as 2**1024.
    """
    number = plain_number(value)
    if isinstance(number, int) and (least is None or number >= least):
        if number.bit_length() > _REACH:
            raise UsageError(f"{name}: expected a whole number below 2**{_REACH}, got one beyond")
        return number
    wanted = "" if least is None else f" of at least {least}"
    raise UsageError(f"{name}: expected a whole number{wanted}, got {quoted(value)}")


def real_number(name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> float:
    """An argument that is to be a number.

    Args:
        name: The argument's.
        value: What was given.
        wanted: Which numbers have a meaning, in words.
        fits: Whether a finite one has.

    Returns:
        It, as a float of Python.

    Raises:
        UsageError: It is none, or not finite, or has no meaning.
    """
    number = plain_number(value)
    try:
        plain = math.nan if number is None else float(number)
    except OverflowError:
        plain = math.inf
    if math.isfinite(plain) and fits(plain):
        return plain
    raise UsageError(f"{name}: expected {wanted}, got {quoted(value)}")


def listed(name: str, values: object, wanted: str) -> list[Any]:
    """An argument that is to be a list, or anything else that has an order.

    Args:
        name: The argument's.
        values: What was given.
        wanted: What it is to be, in words.

    Returns:
        What it holds, in order.

    Raises:
        UsageError: It is nothing of the kind: a mapping's keys and a set's members are none, and
            neither are the letters of a text or the parts of a path.
    """
    if not isinstance(values, (Mapping, Set, str, bytes, os.PathLike)):
        entries = plain_list(values)
        if entries is not None:
            return entries
    raise UsageError(f"{name}: expected {wanted}, got {quoted(values)}")


def one_for_each(name: str, values: object, count: int, what: str) -> list[Any]:
    """An argument that is to be a list of as many entries as there are of something.

    Args:
        name: The argument's.
        values: What was given.
        count: How many there are.
        what: Of what.

    Returns:
        The entries, in order.

    Raises:
        UsageError: It is no list, or there are more or fewer.
    """
    wanted = f"a list of {count}, one for each {what}"
    entries = listed(name, values, wanted)
    if len(entries) != count:
        raise UsageError(f"{name}: expected {wanted}, got {len(entries)}")
    return entries


def file_path(name: str, value: object) -> Path:
    """An argument that is to be the path of a file or a folder.

    Args:
        name: The argument's.
        value: What was given.

    Returns:
        The path; whether anything is there is not looked at.

    Raises:
        UsageError: It is none, is empty, or has characters that no path has.
    """
    try:
        given = plain_text(os.fspath(value))  # type: ignore[call-overload]
    except Exception:  # a foreign object's method may do anything
        given = None
    if given and _can_be(given):
        return Path(given)
    raise UsageError(f"{name}: expected a path, got {quoted(value)}")


def _can_be(path: str) -> bool:
    """Whether the system can be asked for such a path."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
