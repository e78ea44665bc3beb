"""The weighted mean a second time, by another route: integers and bit patterns.

An oracle can be wrong too. This one answers the question of `fedavg_core.testing.oracle` and shares
nothing with it: not the decoding, not the arithmetic, not the rounding, and not the description of
the number formats. Where the two agree on many cases, both are likely to be right.

* A number is decoded from its bits, into an integer times a power of two. How a dtype spends its
  bits is read from its name: ``float8_e4m3fn`` has 4 bits of exponent and 3 of mantissa.
* All products of weights and values are brought to one power of two, and their sum is one integer.
* The mean is one integer division. Its quotient is cut to the precision of the result, its
  remainder decides the rounding, half to even.
* The result is put together as a bit pattern, in which a carry out of the mantissa moves the
  exponent up by itself. A pattern above that of the largest finite number is out of range.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import OutOfRange, UsageError

__all__ = ["exact_weighted_mean_by_mantissas"]


def exact_weighted_mean_by_mantissas(
    models: Sequence[Any], weights: Sequence[float], *, base: Any = None
) -> dict[str, npt.NDArray[Any]]:
    """The weighted mean of some models, correctly rounded, computed with integers alone.

    Args:
        models: The models, or the differences if there is a base; only read.
        weights: One finite number above zero for each model: an int, or a float.
        base: A model to add the mean to; only read.

    Returns:
        A new model, as `fedavg_core.testing.exact_weighted_mean` gives it. Deterministic.

    Raises:
        UsageError: An element or a weight is not finite, or a dtype cannot be averaged.
        OutOfRange: A result is larger than the largest number of its dtype.
    """
    layout_of_weights = _Layout.of(np.dtype(np.float64))
    scaled_weights = []
    for weight in weights:
        if isinstance(weight, (int, np.integer)):
            scaled_weights.append((int(weight), 0))
        else:
            (code,) = struct.unpack("<Q", struct.pack("<d", weight))
            scaled_weights.append(layout_of_weights.decode(code))
    names: dict[str, None] = {} if base is None else dict.fromkeys(base)
    for model in models:
        names.update(dict.fromkeys(model))
    result = {}
    for name in names:
        terms = [
            (scaled, model[name])
            for scaled, model in zip(scaled_weights, models, strict=True)
            if name in model
        ]
        first = terms[0][1] if base is None else base[name]
        target = _Layout.of(first.dtype)
        offsets = [(0, 0)] * first.size if base is None else _decoded(first)
        if terms:
            columns = [_decoded(array) for _, array in terms]
            codes = [
                target.encode(*_mean([scaled for scaled, _ in terms], values, offset))
                for *values, offset in zip(*columns, offsets, strict=True)
            ]
        else:
            codes = _codes(first)
        unsigned = np.array(codes, dtype=f"u{target.bytes}")
        result[name] = unsigned.view(first.dtype.newbyteorder("=")).reshape(first.shape)
    return result


def _mean(
    weights: Sequence[tuple[int, int]],
    values: Sequence[tuple[int, int]],
    offset: tuple[int, int],
) -> tuple[int, int, int]:
    """Numerator, denominator and e such that offset + Σwx/Σw is numerator / denominator · 2**e."""
    lowest_weight = min(e for _, e in weights)
    lowest_value = min([e for _, e in values] + [offset[1]])
    whole_weights = [m << (e - lowest_weight) for m, e in weights]
    whole_values = [m << (e - lowest_value) for m, e in values]
    denominator = sum(whole_weights)
    numerator = (offset[0] << (offset[1] - lowest_value)) * denominator
    for weight, value in zip(whole_weights, whole_values, strict=True):
        numerator += weight * value
    return numerator, denominator, lowest_value


def _codes(array: npt.NDArray[Any]) -> list[int]:
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
    codes: list[int] = native.view(f"u{array.dtype.itemsize}").tolist()
    return codes


def _decoded(array: npt.NDArray[Any]) -> list[tuple[int, int]]:
    layout = _Layout.of(array.dtype)
    return [layout.decode(code) for code in _codes(array)]


def _divided(numerator: int, denominator: int, shift: int) -> int:
    """Numerator / denominator / 2**shift to the nearest integer, half to even; none negative."""
    if shift >= 0:
        denominator <<= shift
    else:
        numerator <<= -shift
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        quotient += 1
    return quotient


@dataclass(frozen=True)
class _Layout:
    """How the codes of a dtype stand for numbers."""

    name: str
    bytes: int
    mantissa_bits: int  # of the fraction, the hidden bit not counted; -1 for integers
    bias: int
    largest_code: int  # without the sign
    negative_zero: bool
    signed: bool = True

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> _Layout:
        name, size = dtype.name, dtype.itemsize
        if re.fullmatch(r"u?int(8|16|32|64)", name):
            signed = name.startswith("i")
            largest = (1 << (8 * size - signed)) - 1
            return cls(name, size, -1, 0, largest, False, signed)
        widths = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23), "float64": (11, 52)}
        parts = re.fullmatch(r"float8_e(\d)m(\d)(?:b(\d+))?(fn)?(uz)?", name)
        if parts is None and name not in widths:
            raise UsageError(f"arrays of dtype {name} cannot be averaged")
        exponent, mantissa = (int(parts[1]), int(parts[2])) if parts else widths[name]
        bias = (1 << (exponent - 1)) - 1
        largest = (((1 << exponent) - 1) << mantissa) - 1  # the top exponent is for inf and NaN
        negative_zero = True
        if parts and parts[4]:
            largest = (1 << 7) - 2  # no infinity: one code alone is NaN
        if parts and parts[5]:
            largest += 1  # that code is a number too, for NaN is where -0 would be
            negative_zero = False
            bias = int(parts[3]) if parts[3] else bias + 1
        return cls(name, size, mantissa, bias, largest, negative_zero)

    def decode(self, code: int) -> tuple[int, int]:
        """The integer and the exponent of two that a code stands for."""
        sign_bit = 1 << (8 * self.bytes - 1)
        if self.mantissa_bits < 0:
            return (code - 2 * sign_bit if self.signed and code >= sign_bit else code), 0
        size = code & (sign_bit - 1)
        if size > self.largest_code or (code == sign_bit and not self.negative_zero):
            raise UsageError("an element or a weight is NaN or infinite")
        field, fraction = divmod(size, 1 << self.mantissa_bits)
        if field:
            fraction += 1 << self.mantissa_bits
        exponent = max(field, 1) - self.bias - self.mantissa_bits
        return (-fraction if code & sign_bit else fraction), exponent

    def encode(self, numerator: int, denominator: int, exponent: int) -> int:
        """The code of the number nearest to numerator / denominator · 2**exponent."""
        size = abs(numerator)
        sign_bit = 1 << (8 * self.bytes - 1)
        if self.mantissa_bits < 0:
            nearest = _divided(size, denominator, -exponent)
            nearest = -nearest if numerator < 0 else nearest
            if not -(sign_bit if self.signed else 0) <= nearest <= self.largest_code:
                raise OutOfRange(f"a result is beyond {self.name}")
            return nearest % (2 * sign_bit)
        if size == 0:
            return 0
        # With this unit the quotient has as many bits as the mantissa, the hidden one included, or
        # one bit less; in the latter case the unit is halved.
        hidden = 1 << self.mantissa_bits
        least = 1 - self.bias - self.mantissa_bits
        unit = size.bit_length() - denominator.bit_length() + exponent - self.mantissa_bits
        above, below = max(unit - exponent, 0), max(exponent - unit, 0)
        if size << below < denominator * hidden << above:
            unit -= 1
        unit = max(unit, least)
        steps = _divided(size, denominator, unit - exponent)
        code = steps if unit == least else steps + ((unit - least) << self.mantissa_bits)
        if code > self.largest_code:
            raise OutOfRange(f"a result is beyond {self.name}")
        return code | sign_bit if numerator < 0 and (code or self.negative_zero) else code
