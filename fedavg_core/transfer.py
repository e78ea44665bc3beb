"""FULL and DIFF: a model, and the difference between two.

A contributor that sends differences sends ``local - base``; the server gives back ``base`` plus
their weighted mean. Where every difference is exact in its dtype, both ways end in the same bits;
where it is not, the rounding of the difference is the only one that DIFF adds.

The difference of floats has their dtype and is rounded once. That of integers is int64, since the
difference of two small integers may be negative or large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.accumulator import WeightedMean
from fedavg_core.admission import base_spec
from fedavg_core.errors import OutOfRange, RefusedUpdate, UsageError, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, check_array

__all__ = ["apply", "change", "diff", "diff_spec"]

_FLOATS = tuple(np.dtype(kind) for kind in (np.float16, np.float32, np.float64))


def diff(local: Params, base: Params) -> dict[str, npt.NDArray[Any]]:
    """What has to be added to a base to get a model.

    Args:
        local: The model, or some of its parameters; only read.
        base: The model it started from; only read.

    Returns:
        For each parameter of ``local`` the difference, in the dtype of the base and rounded once;
        integers give int64, exactly. New arrays.

    Raises:
        UsageError: The base lacks a parameter or has it in another shape or dtype; or either is no
            mapping, or the base not one to arrays of numbers.
        RefusedUpdate: A value of the model is no array of numbers.
        OutOfRange: A difference is beyond the largest number of its dtype.
    """
    diff_spec(ModelSpec.of(local), base_spec(base))
    return {key: _difference(key, array, base[key]) for key, array in local.items()}


def change(params: Any, base: Params) -> Any:
    """What a contributor sends of what it has trained, where differences are wanted.

    Args:
        params: What it has trained, fit for a round or not; only read.
        base: The model that it was sent; only read.

    Returns:
        For each parameter of the base that ``params`` has in the same shape the difference, as
        `diff` gives it; if the dtypes are not the same, in int64 or float64. All else as it is, for
        a round to judge, which cannot take it for a difference.

    Raises:
        OutOfRange: A difference is beyond the largest number of its dtype.
    """
    if not isinstance(params, Mapping):
        return params
    return {key: _change(key, value, base.get(key)) for key, value in params.items()}


def diff_spec(local: Mapping[str, ArraySpec], base: Mapping[str, ArraySpec]) -> ModelSpec:
    """What the difference of two models looks like.

    Args:
        local: The model, or some of its parameters.
        base: The model it started from.

    Returns:
        The parameters of ``local``, in its order; integers as int64.

    Raises:
        UsageError: The base lacks a parameter or has it in another shape or dtype.
    """
    result = {}
    for key, spec in local.items():
        if key not in base:
            raise UsageError(f"key {quoted(key)}: the base does not have it")
        if spec != base[key]:
            raise UsageError(f"key {quoted(key)}: expected {base[key]} as in the base, got {spec}")
        whole = spec.number.kind == "integer"
        result[key] = ArraySpec(spec.shape, np.dtype(np.int64) if whole else spec.dtype)
    return ModelSpec(result)


def apply(base: Params, difference: Params) -> dict[str, npt.NDArray[Any]]:
    """Add a difference to a base, with one rounding.

    Args:
        base: A model; only read.
        difference: What to add, for some or all of its parameters; only read.

    Returns:
        The sum in the dtypes of the base, correctly rounded; parameters that the difference lacks
        are copied. New arrays.

    Raises:
        UsageError: The base is no model, lacks a parameter, has it in another shape, or is not
            finite.
        RefusedUpdate: The difference is not an update that can be added.
        OutOfRange: A sum is beyond the largest number of its dtype.
    """
    base_spec(base)
    sums: dict[str, npt.NDArray[Any]] = {}
    if isinstance(difference, Mapping):
        for key, array in difference.items():
            total = _sum(base.get(key), array) if type(key) is str else None
            if total is not None:
                sums[key] = total
        difference = {key: array for key, array in difference.items() if key not in sums}
    mean = WeightedMean()
    if not isinstance(difference, Mapping) or difference:
        mean.add(difference, 1)
    others = mean.mean({key: array for key, array in base.items() if key not in sums})
    return {key: sums[key] if key in sums else others[key] for key in base}


def _sum(base: object, difference: object) -> npt.NDArray[Any] | None:
    """The sum of two arrays of floats of one dtype; None if they are not, or it is not finite.

    The processor rounds it once. That of two float16 is rounded to float32 before, which changes
    nothing (S. Figueroa, "When is double rounding innocuous?", 1995).
    """
    if not (
        type(base) is type(difference) is np.ndarray
        and base.dtype == difference.dtype
        and base.dtype in _FLOATS
        and base.shape == difference.shape
    ):
        return None
    with np.errstate(all="ignore"):
        total: npt.NDArray[Any] = np.add(base, difference, out=np.empty(base.shape, base.dtype))
        total += 0.0  # no -0.0
    return total if np.isfinite(total).all() else None


def _change(key: str, value: Any, base: npt.NDArray[Any] | None) -> Any:
    try:
        local = check_array(key, value)
    except RefusedUpdate:
        return value
    if base is None or local.shape != base.shape:
        return value
    if local.dtype.newbyteorder("=") != base.dtype.newbyteorder("="):
        whole = local.dtype.kind in "iu" and base.dtype.kind in "iu"
        local, base = (_widened(key, array, whole) for array in (local, base))
    return _difference(key, local, base)


def _widened(key: str, array: npt.NDArray[Any], whole: bool) -> npt.NDArray[Any]:
    """The same numbers in int64 or, if they need not be whole, in float64."""
    if whole and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise OutOfRange(f"key {quoted(key)}: a difference is beyond the largest number of int64")
    return np.asarray(array.astype(np.int64 if whole else np.float64))


def _difference(key: str, local: npt.NDArray[Any], base: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if local.dtype.kind not in "iu":
        with np.errstate(all="ignore"):
            result: npt.NDArray[Any] = np.asarray(local - base)
        finite = np.isfinite(result)
        if not finite.all() and (~finite & np.isfinite(local) & np.isfinite(base)).any():
            raise OutOfRange(
                f"key {quoted(key)}: a difference is beyond the largest number of {result.dtype}"
            )
        return result
    if local.dtype.itemsize < 8:
        return np.asarray(local.astype(np.int64) - base)
    # Modulo 2**64 the subtraction is exact; it has overflowed where its sign is wrong.
    wrapped = np.asarray(local.astype(np.uint64) - base.astype(np.uint64)).view(np.int64)
    if bool(np.any((wrapped >= 0) != (local >= base))):
        raise OutOfRange(f"key {quoted(key)}: a difference is beyond the largest number of int64")
    return wrapped
