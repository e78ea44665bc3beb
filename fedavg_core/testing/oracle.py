"""The weighted mean by its definition, in rational numbers.

Every number that a model or a weight can hold is a rational number, and so is the weighted mean.
Here it is computed as one, by `fractions.Fraction`, element by element, without any thought for
speed, and rounded once at the very end. What comes out is therefore the right answer, to the bit,
and other implementations can be measured against it.

The rules, for each parameter by itself:

* The mean is Σwᵢxᵢ / Σwᵢ over the models that have the parameter: each parameter has a denominator
  of its own.
* With a base, the result is base + Σwᵢxᵢ / Σwᵢ: what is averaged are differences. A parameter that
  no model has keeps the base's value.
* The result is rounded to the dtype of the base, else of the first model that has the parameter: to
  the nearest number of that dtype, and of two that are equally near to the one whose last bit is 0.
* A zero is +0.0. A negative number too small for the dtype is -0.0, in the dtypes that have it.
* A result is out of range if, rounded to the dtype's precision as though the exponent had no end,
  it is larger than the dtype's largest number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import OutOfRange, UsageError, quoted
from fedavg_core.model import NumberFormat, Params, number_format

__all__ = ["exact_weighted_mean", "fractions_of", "round_fraction"]


def exact_weighted_mean(
    models: Sequence[Params],
    weights: Sequence[float],
    *,
    base: Params | None = None,
    dtypes: Mapping[str, npt.DTypeLike] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The weighted mean of some models, correctly rounded.

    Args:
        models: The models, or the differences if there is a base; only read. Each may lack some
            parameters. Arrays of any shape and of every dtype that can be averaged.
        weights: One finite number above zero for each model, taken at its exact value.
        base: A model to add the mean to; only read. It must have every parameter that is sent.
        dtypes: For some parameters, the dtype to round to instead of the base's or the first
            model's.

    Returns:
        A new model: the base's parameters in its order, or those of the models in the order in
        which they first appear. Deterministic; shares no memory with the arguments.

    Raises:
        UsageError: There is nothing to average, or the arguments do not fit together.
        OutOfRange: A result is larger than the largest number of its dtype.
    """
    if len(models) != len(weights):
        raise UsageError(f"{len(models)} models, but {len(weights)} weights")
    if not models and base is None:
        raise UsageError("nothing to average: no models and no base")
    exact_weights = [_exact_weight(weight) for weight in weights]
    keys = list(dict.fromkeys(key for model in models for key in model))
    if base is not None:
        odd = [key for key in keys if key not in base]
        if odd:
            raise UsageError(f"the base lacks the keys {quoted(odd)}")
        keys = list(base)
    result = {}
    for key in keys:
        sent = [
            (model[key], weight)
            for model, weight in zip(models, exact_weights, strict=True)
            if key in model
        ]
        start = base[key] if base is not None else None
        pattern = sent[0][0] if start is None else start
        if any(array.shape != pattern.shape for array, _ in sent):
            raise UsageError(f"key {quoted(key)}: the arrays differ in shape")
        dtype = pattern.dtype
        if dtypes is not None and key in dtypes:
            dtype = np.dtype(dtypes[key])
        dtype = dtype.newbyteorder("=")
        if not sent:
            result[key] = np.array(pattern, dtype=dtype, order="C")
            continue
        denominator = sum((weight for _, weight in sent), Fraction(0))
        sums = [Fraction(0)] * pattern.size
        for array, weight in sent:
            sums = [s + weight * x for s, x in zip(sums, fractions_of(array), strict=True)]
        means = [s / denominator for s in sums]
        if start is not None:
            means = [b + m for b, m in zip(fractions_of(start), means, strict=True)]
        try:
            result[key] = _rounded(means, dtype).reshape(pattern.shape)
        except OutOfRange as error:
            raise OutOfRange(f"key {quoted(key)}: {error}") from None
    return result


def fractions_of(array: npt.NDArray[Any]) -> list[Fraction]:
    """The elements of an array at their exact values.

    Args:
        array: Any shape, any dtype that can be averaged; only read.

    Returns:
        Its elements in C order.

    Raises:
        UsageError: The dtype cannot be averaged, or an element is not finite.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN; what is not finite is refused below
        numbers = array if _format_of(array.dtype).kind == "integer" else array.astype(np.float64)
    try:
        return [Fraction(number) for number in numbers.ravel().tolist()]
    except (ValueError, OverflowError):
        raise UsageError("an element is NaN or infinite") from None


def round_fraction(value: Fraction, dtype: npt.DTypeLike) -> Any:
    """Round a rational number once, to the nearest number of a dtype, ties to even.

    Args:
        value: The number.
        dtype: Any dtype that can be averaged, those of ``ml_dtypes`` included.

    Returns:
        A scalar of that dtype.

    Raises:
        UsageError: The dtype cannot be averaged.
        OutOfRange: The rounded number is larger than the dtype's largest.
    """
    return _rounded([value], np.dtype(dtype).newbyteorder("="))[0]


def _rounded(values: Sequence[Fraction], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    format_ = _format_of(dtype)
    if format_.kind == "integer":
        return np.array(list(_integers(values, dtype)), dtype=dtype)
    floats = [_nearest_float(value, format_, dtype) for value in values]
    return np.array(floats, dtype=np.float64).astype(dtype)  # exact: each is a number of the dtype


def _integers(values: Sequence[Fraction], dtype: np.dtype[Any]) -> Iterator[int]:
    info = np.iinfo(dtype)
    for value in values:
        nearest = round(value)  # Fraction rounds half to even
        if not int(info.min) <= nearest <= int(info.max):
            raise OutOfRange(f"{nearest} is beyond {dtype.name}")
        yield nearest


def _nearest_float(value: Fraction, format_: NumberFormat, dtype: np.dtype[Any]) -> float:
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent, format_.least_exponent) - format_.precision + 1
    steps = round(size / Fraction(2) ** unit)
    if steps * Fraction(2) ** unit > format_.largest:
        raise OutOfRange(f"about {'-' if value < 0 else ''}2**{exponent} is beyond {dtype.name}")
    nearest = math.ldexp(steps, unit)
    has_negative_zero = not dtype.name.endswith("fnuz")
    return -nearest if value < 0 and (nearest or has_negative_zero) else nearest


def _format_of(dtype: np.dtype[Any]) -> NumberFormat:
    format_ = number_format(dtype)
    if format_ is None:
        raise UsageError(f"arrays of dtype {quoted(str(dtype))} cannot be averaged")
    return format_


def _exact_weight(weight: float) -> Fraction:
    exact = int(weight) if isinstance(weight, (int, np.integer)) else float(weight)
    if not 0 < exact < math.inf:
        raise UsageError(f"a weight must be a finite number above zero, not {quoted(weight)}")
    return Fraction(exact)
