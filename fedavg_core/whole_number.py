"""Whole numbers that callers give: Python's and NumPy's, which truth values are not."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from fedavg_core.errors import UsageError, quoted

__all__ = ["is_whole_number", "whole_number"]


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether something is a whole number, which truth values and spans of time are not.

    Args:
        value: Anything.

    Returns:
        True for an int or an integer of NumPy.
    """
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """An argument that is to be a whole number.

    Args:
        name: The argument's.
        value: What was given.
        least: The smallest that has a meaning; None for any.

    Returns:
        It, as Python's own.

    Raises:
        UsageError: It is none, or is smaller.
    """
    if is_whole_number(value) and (least is None or value >= least):
        return int(value)
    wanted = "" if least is None else f" of at least {least}"
    raise UsageError(f"{name}: expected a whole number{wanted}, got {quoted(value)}")
