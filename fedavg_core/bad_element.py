"""What is wrong with one element of an array, in words."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, UsageError, quoted
from fedavg_core.model import ArraySpec, Params, flat

__all__ = ["base_not_finite", "not_finite", "out_of_range", "shown_place"]


def shown_place(shape: tuple[int, ...], index: int) -> str:
    """An element's place in an array, from its place in C order, as messages tell it."""
    return str([int(i) for i in np.unravel_index(index, shape)])


def not_finite(params: Params, key: str, index: int) -> RefusedUpdate:
    """The refusal of params of which an array's element at ``index`` is not finite."""
    array = params[key]
    value = flat(array, index, 1)[0]
    return RefusedUpdate(
        Reason.NON_FINITE,
        key=key,
        expected="finite numbers",
        got=f"{float(value)} at {shown_place(array.shape, index)}",
    )


def base_not_finite(base: Params, keys: Collection[str]) -> UsageError:
    """The error for a base of which one of these arrays is not finite."""
    key = next(key for key in keys if not np.isfinite(base[key]).all())
    refusal = not_finite(base, key, int(np.argmin(np.isfinite(base[key]))))
    return UsageError(
        f"key {quoted(key)}: expected a base of {refusal.expected}, got {refusal.got}"
    )


def out_of_range(key: str, spec: ArraySpec, index: int) -> OutOfRange:
    """The error for a result, at ``index``, that an array's dtype cannot hold."""
    return OutOfRange(
        f"key {quoted(key)}: the result at {shown_place(spec.shape, index)} is beyond the largest "
        f"number of {spec.dtype}"
    )
