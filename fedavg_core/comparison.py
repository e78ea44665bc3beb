"""How far apart two models are: to the bit, in units in the last place, as numbers.

Numbers of one format are put into the order of their values as unsigned integers, one apart for
neighbours; so the units in the last place between two are a difference of integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import UsageError, quoted
from fedavg_core.model import ModelSpec, NumberFormat, Params

__all__ = ["KeyDifference", "compare", "same_bits"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class KeyDifference:
    """How far apart one parameter is in two models.

    Attributes:
        differing: How many elements have other bits.
        largest_ulps: The largest distance, in steps from one representable number to the next;
            for integers the largest difference. NaN counts as the number beyond infinity.
        largest_difference: The largest absolute difference of two elements of which none is NaN:
            for integers a whole number, for others a float64, rounded once; infinite where one of
            the two is, or where it is beyond float64.
        nan_in_one: How many elements are NaN in one model and a number in the other.
    """

    differing: int
    largest_ulps: int
    largest_difference: int | float = 0
    nan_in_one: int = 0


def compare(a: Params, b: Params) -> dict[str, KeyDifference]:
    """Compare two models element by element.

    Args:
        a: One model; only read.
        b: The other, with the same keys, shapes and dtypes.

    Returns:
        For each key how far apart the two are, in the order of ``a``.

    Raises:
        UsageError: The two do not have the same keys, shapes and dtypes, or one is no mapping.
        RefusedUpdate: An entry is not an array of numbers.
    """
    spec_a, spec_b = ModelSpec.of(a), ModelSpec.of(b)
    a, b = ({key: np.asarray(value) for key, value in params.items()} for params in (a, b))
    if spec_a.keys() != spec_b.keys():
        odd = sorted(spec_a.keys() ^ spec_b.keys())
        raise UsageError(f"only one of the two models has the keys {quoted(odd)}")
    result = {}
    for key, spec in spec_a.items():
        if spec != spec_b[key]:
            raise UsageError(f"key {quoted(key)}: one model has {spec}, the other {spec_b[key]}")
        steps_a, steps_b = _steps(a[key], spec.number), _steps(b[key], spec.number)
        apart = np.where(steps_a > steps_b, steps_a - steps_b, steps_b - steps_a)
        largest_ulps = int(apart.max(initial=0))
        others = (_bits(a[key]) != _bits(b[key])).reshape(-1)
        difference: int | float = largest_ulps
        nan_in_one = 0
        if spec.number.kind == "float":
            difference, nan_in_one = _distance(
                *(params[key].reshape(-1)[others].astype(np.float64) for params in (a, b))
            )
        result[key] = KeyDifference(
            differing=int(np.count_nonzero(others)),
            largest_ulps=largest_ulps,
            largest_difference=difference,
            nan_in_one=nan_in_one,
        )
    return result


def _distance(a: Array, b: Array) -> tuple[float, int]:
    """The largest absolute difference without NaN, and how many are NaN in one of the two."""
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    numbers = ~(nan_a | nan_b)
    with np.errstate(all="ignore"):
        apart = np.abs(a[numbers] - b[numbers])
    return float(apart.max(initial=0.0)), int(np.count_nonzero(nan_a != nan_b))


def same_bits(a: Params, b: Params) -> bool:
    """Whether two models are the same to the bit: keys, shapes, dtypes and every byte.

    Args:
        a: One model; only read.
        b: The other.

    Returns:
        True if nothing tells them apart (the order of the keys does not count).

    Raises:
        UsageError: One is no mapping.
        RefusedUpdate: An entry is not an array of numbers.
    """
    if ModelSpec.of(a) != ModelSpec.of(b):
        return False
    return all(bool(np.array_equal(_bits(a[key]), _bits(b[key]))) for key in a)


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return native.view(np.dtype(f"u{array.dtype.itemsize}"))


def _steps(array: npt.NDArray[Any], number: NumberFormat) -> npt.NDArray[Any]:
    """The elements as unsigned integers, in order, one apart for neighbouring numbers."""
    bits = _bits(array)
    top = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    if array.dtype.kind == "u":
        return bits
    if array.dtype.kind == "i":
        flipped: Array = bits ^ top
        return flipped
    one = bits.dtype.type(1)
    zero = top - one  # so that there is room for one more beyond the last
    steps: Array = np.where(bits >= top, zero - (bits ^ top), bits + zero)
    not_numbers = np.isnan(array)
    if not_numbers.any():
        with np.errstate(all="ignore"):  # some formats have no infinity, and a NaN for it
            last = np.array([number.largest, np.inf]).astype(array.dtype)
        last = last[~np.isnan(last)][-1:]
        steps[not_numbers] = _steps(last, number)[0] + one
    return steps
