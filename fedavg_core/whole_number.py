"""Whole numbers that callers give: Python's and NumPy's, which truth values are not."""

from __future__ import annotations

from typing import TypeGuard

from fedavg_core.errors import UsageError, quoted
from fedavg_core.plain import plain_number

__all__ = ["is_whole_number", "whole_number"]

_REACH = 1024  # none is as far from zero as 2**_REACH; Python shows no number of any length


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
