"""Truth values that callers give."""

from __future__ import annotations

import numpy as np

from fedavg_core.errors import UsageError, quoted

__all__ = ["truth"]


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
