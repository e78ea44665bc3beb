"""Corner vectors of the exact mean, each also with every sign turned.

The expected results are numbers worked out by hand, from a format's precision p, the exponent of
its least normal number and its largest number; or bits written down. Those of the families below
are given by formulas that hold in every floating-point format, whatever its p. No result comes from
the code under test; the two oracles are held against the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fedavg_core.accumulator import weighted_mean
from fedavg_core.model import number_format
from fedavg_core.testing import (
    averaged_dtypes,
    exact_weighted_mean,
    exact_weighted_mean_by_mantissas,
)

TWO = Fraction(2)


@dataclass(frozen=True)
class Corner:
    """One element: what is averaged, and what must come out."""

    name: str
    dtype: np.dtype[Any]
    values: tuple[Fraction, ...]
    weights: tuple[float, ...]
    expected: Fraction
    base: Fraction | None = None
    negative_zero: bool = False

    def __str__(self) -> str:
        return f"{self.dtype.name}: {self.name}"

    def negated(self) -> Corner:
        return Corner(
            f"{self.name}, negated",
            self.dtype,
            tuple(-value for value in self.values),
            self.weights,
            -self.expected,
            None if self.base is None else -self.base,
            negative_zero=self.expected == 0 and self.name.startswith("to zero"),
        )

    def array(self, value: Fraction) -> npt.NDArray[Any]:
        if self.dtype.kind in "iu":
            return np.array([int(value)], self.dtype)
        array: npt.NDArray[Any] = np.array([float(value)]).astype(self.dtype)
        assert Fraction(float(array[0])) == value, f"{self}: {value} is no {self.dtype}"
        return array

    def check(self, mean: Any) -> None:
        models = [{"w": self.array(value)} for value in self.values]
        base = None if self.base is None else {"w": self.array(self.base)}
        got = mean(models, list(self.weights), base=base)["w"]
        expected = self.array(self.expected)
        if self.negative_zero and not self.dtype.name.endswith("fnuz"):
            expected = -expected
        assert got.dtype == self.dtype
        assert got.tobytes() == expected.tobytes(), (got, expected)


def float_family(dtype: np.dtype[Any]) -> Iterator[Corner]:
    """Corners that every floating-point format has."""
    format_ = number_format(dtype)
    assert format_ is not None
    p = format_.precision
    u = TWO ** (1 - p)  # from 1 to the next number
    least = TWO**format_.least_exponent
    tiny = least * u
    top = Fraction(format_.largest)
    exponent = int(top).bit_length() - 1
    step = TWO ** (exponent - p + 1)  # from the largest number to the one before

    def corner(name: str, values: Any, weights: Any, expected: Any, base: Any = None) -> Corner:
        return Corner(
            name,
            dtype,
            tuple(Fraction(value) for value in values),
            tuple(weights),
            Fraction(expected),
            None if base is None else Fraction(base),
        )

    yield corner("tie, down to the even 1", [1, 1 + u], [1, 1], 1)
    yield corner("tie, up to even", [1 + u, 1 + 2 * u], [1, 1], 1 + 2 * u)
    yield corner("tie of three weights", [1, 1 + u, 1 + u], [2, 1, 1], 1)
    yield corner("tie of float weights", [1, 1 + u], [0.1, 0.1], 1)
    yield corner("tie of huge weights", [1, 1 + u], [2**200, 2**200], 1)
    yield corner("tie of subnormal weights", [1, 1 + u], [5e-324, 5e-324], 1)
    yield corner("just above a tie", [1, 1 + u], [2**60, 2**60 + 1], 1 + u)
    yield corner("just below a tie", [1 + u, 1 + 2 * u], [2**60 + 1, 2**60], 1 + u)
    yield corner("above a tie by an ulp of a weight", [1, 1 + u], [1.0, 1 + 2.0**-52], 1 + u)
    yield corner("tie tipped up by the smallest weight", [1, 1 + u, 2], [1, 1, 5e-324], 1 + u)
    yield corner(
        "tie tipped down by the smallest weight",
        [1 + u, 1 + 2 * u, 0],
        [1, 1, 5e-324],
        1 + u,
    )
    yield corner("all ones, up into the next binade", [2 - u, 2], [1, 1], 2)
    yield corner("all ones, stays", [2 - u, 2], [2**60 + 1, 2**60], 2 - u)
    yield corner("all ones, by itself", [2 - u], [3], 2 - u)
    yield corner("all ones, three times", [2 - u] * 3, [1, 1, 1], 2 - u)
    yield corner("all ones, with uneven weights", [2 - u, 2 - u], [0.1, 0.7], 2 - u)
    yield corner("tie below the binade's end", [2 - 2 * u, 2 - u], [1, 1], 2 - 2 * u)
    yield corner("a quarter step is lost", [1, 1 + u], [3, 1], 1)
    yield corner("three quarters are a step", [1, 1 + u], [1, 3], 1 + u)
    yield corner("to zero: half of the smallest", [tiny, 0], [1, 1], 0)
    yield corner("to zero: a third of the smallest", [tiny, 0, 0], [1, 1, 1], 0)
    yield corner("just above half of the smallest", [tiny, 0], [2**60 + 1, 2**60], tiny)
    yield corner("one and a half of the smallest", [tiny, 2 * tiny], [1, 1], 2 * tiny)
    yield corner("the smallest by itself", [tiny], [7], tiny)
    yield corner("subnormal, tie up into normal", [least - tiny, least], [1, 1], least)
    yield corner("subnormal, stays", [least - tiny, least], [2, 1], least - tiny)
    yield corner("least normal, tie down", [least, least + tiny], [1, 1], least)
    yield corner("least normal, tie up", [least + tiny, least + 2 * tiny], [1, 1], least + 2 * tiny)
    yield corner(
        "above the seam, one step", [2 * least - tiny, 2 * least], [3, 1], 2 * least - tiny
    )
    yield corner("cancels to a subnormal", [least + 2 * tiny, -least], [1, 1], tiny)
    yield corner("cancels to a subnormal tie", [least + 3 * tiny, -least], [1, 1], 2 * tiny)
    yield corner("to zero: cancels to less than the smallest", [least + tiny, -least], [1, 1], 0)
    yield corner("cancels to nothing", [top, -top], [1, 1], 0)
    yield corner("cancels to nothing by the weights", [1, -2], [2, 1], 0)
    yield corner("cancels but for the last bit", [1 + u, -1], [1, 1], u / 2)
    yield corner("the largest", [top, top], [1, 1], top)
    yield corner("the largest, huge weights", [top, top, top], [2**300, 1e300, 1], top)
    yield corner("near the largest", [top, top - step], [3, 1], top)
    yield corner("the largest less a trifle", [top, -tiny], [2**60, 1], top)
    yield corner("the largest is not swamped", [top, 1, -top], [1, 1, 1], third(dtype))
    yield corner("a trifle of a huge weight", [top, tiny], [1, 2**3000], tiny)
    yield corner("one third", [1, 0], [1, 2], third(dtype))
    yield corner("two thirds", [1, 0], [2.0, 1.0], 2 * third(dtype))
    yield corner("base and a tie", [u, 0], [1, 1], 1, base=1)
    yield corner("base and a tie, up", [u, 0], [1, 1], 1 + 2 * u, base=1 + u)
    yield corner("base and just above a tie", [u, 0], [2**60 + 1, 2**60], 1 + u, base=1)
    yield corner("base taken back", [-1, -1], [0.3, 0.9], 0, base=1)
    yield corner("base at the largest", [step, -step], [1, 1], top, base=top)


def third(dtype: np.dtype[Any]) -> Fraction:
    """1/3 = 0.010101…: rounded down if the last bit kept is a 1, that is if p is odd, else up."""
    format_ = number_format(dtype)
    assert format_ is not None
    p = format_.precision
    # 2**(p+1) / 3, whose p bits are 1010…, and whose fraction is 1/3 or 2/3.
    scaled = 2 ** (p + 1)
    return Fraction(scaled // 3 + (scaled % 3 == 2), scaled)


def integer_family(dtype: np.dtype[Any]) -> Iterator[Corner]:
    """Corners of the signed integers; the lowest stands alone, for it has no negative."""
    largest = int(np.iinfo(dtype).max)

    def corner(name: str, values: Any, weights: Any, expected: int, base: Any = None) -> Corner:
        start = None if base is None else Fraction(base)
        sent = tuple(Fraction(value) for value in values)
        return Corner(name, dtype, sent, tuple(weights), Fraction(expected), start)

    yield corner("tie down to even", [2, 3], [1, 1], 2)
    yield corner("tie up to even", [3, 4], [1, 1], 4)
    yield corner("tie down to zero", [0, 1], [1, 1], 0)
    yield corner("just above a tie", [2, 3], [2**60, 2**60 + 1], 3)
    yield corner("just below a tie", [3, 4], [2**60 + 1, 2**60], 3)
    yield corner("tie of float weights", [2, 3], [0.1, 0.1], 2)
    yield corner("tie tipped up by the smallest weight", [2, 3, 4], [1, 1, 5e-324], 3)
    yield corner("tie tipped down by the smallest weight", [3, 4, 0], [1, 1, 5e-324], 3)
    yield corner("one third of one", [1, 0], [1, 2], 0)
    yield corner("two thirds of one", [1, 0], [2, 1], 1)
    yield corner("the largest", [largest, largest], [3, 0.1], largest)
    yield corner("the largest, huge weight", [largest], [2**300], largest)
    yield corner("the largest, tie to even", [largest, largest - 1], [1, 1], largest - 1)
    yield corner("the largest, nearer", [largest, largest - 1], [2, 1], largest)
    yield corner("cancels", [largest, -largest], [1, 1], 0)
    yield corner("cancels but for one", [largest, 1, -largest], [1, 2, 1], 0)
    yield corner("cancels but for a tie", [largest, 3, -largest], [1, 2, 1], 2)
    yield corner("base and a tie", [1, 2], [1, 1], 4, base=2)
    yield corner("base and a tie, odd", [1, 2], [1, 1], 4, base=3)
    yield corner("base at the largest", [1, -1], [1, 1], largest, base=largest)


# Products of a float64 and a weight that need more than 53 bits, and sums that need far more. Each
# line: what it is; dtype; values; weights; result. A weight may be written as 2^60-1.
WRITTEN = """
106-bit products; float64; 0x1.fffffffffffffp+0 0x1.fffffffffffffp+0; 2^53-1 1; 0x1.fffffffffffffp+0
weights of 53 bits; float64; 0x1.0000000000001p+0 0x1p+0; 2^53-1 1; 0x1.0000000000001p+0
below a tie by bit 107; float64; 0x1.0000000000001p+0 0x1p+0; 2^53-1 2^53+1; 0x1p+0
above a tie by bit 107; float64; 0x1.0000000000001p+0 0x1p+0; 2^53+1 2^53-1; 0x1.0000000000001p+0
1/10; float64; 0x1p+0 0x0p+0; 1 9; 0x1.999999999999ap-4
1/7; float64; 0x1p+0 0x0p+0; 1 6; 0x1.2492492492492p-3
a third of pi; float64; 0x1.921fb54442d18p+1 0x0p+0; 1 2; 0x1.0c152382d7365p+0
1/3 by float weights; float64; 0x1p+0 0x0p+0; 0.125 0.25; 0x1.5555555555555p-2
a sum over 600 bits; float64; 0x1p+500 0x1p-100 -0x1p+500; 1 1 1; 0x1.5555555555555p-102
a sum over 2000 bits; float64; 0x1p+1000 0x1p-1000 -0x1p+1000; 2 4 2; 0x1p-1001
the whole range; float64; 0x1.ffffffffffp+1023 0x1p-1071 -0x1.ffffffffffp+1023; 1 2 1; 0x1p-1072
weights 2000 bits apart; float64; 0x1p+0 -0x1p+0; 1e300 1e-300; 0x1p+0
weights that cancel the values; float64; 0x1p-600 -0x1p+600; 0x1p+600 0x1p-600; 0x0p+0
sixty bits of weight; float64; 0x1p+0 0x0p+0; 1 2^60-1; 0x1p-60
sixty bits of weight and one; float64; 0x1p+0 0x0p+0; 1 2^60; 0x1p-60
the smallest, by the weights; float64; 0x1p-1000 0x0p+0; 1 2^74-1; 0x1p-1074
to zero: by the weights, a tie; float64; 0x1p-1000 0x0p+0; 1 2^75-1; 0x0p+0
the smallest, above the tie; float64; 0x1p-1000 0x0p+0; 1 2^75-2; 0x1p-1074
not rounded to 53 bits first; float64; 0x1.8p-1073 0x0p+0; 2^60-1 2^60+1; 0x1p-1074
not rounded to 53 bits first, up; float64; 0x1.4p-1072 0x0p+0; 2^60+1 2^60-1; 0x1.8p-1073
products of 60 bits; float32; 0x1.fffffep+0 0x1.fffffep+0; 2^36-1 2^36-3; 0x1.fffffep+0
weights of 30 bits; float32; 0x1.000002p+0 0x1p+0; 2^29+1 2^29-1; 0x1.000002p+0
weights of 30 bits, a tie; float32; 0x1.000002p+0 0x1p+0; 2^29-1 2^29-1; 0x1p+0
to zero: the whole range; float32; 0x1p+127 0x1p-149 -0x1p+127; 1 1 1; 0x0p+0
the whole range, kept; float32; 0x1p+127 0x1p-148 -0x1p+127; 1 2 1; 0x1p-149
not rounded to float64 first; float32; 0x1.000002p+0 0x1p+0; 2^70+1 2^70; 0x1.000002p+0
not rounded to float32 first; float16; 0x1.004p+0 0x1p+0; 2^40+1 2^40; 0x1.004p+0
more than float16 holds; float16; 0x1.ep+5 0x1.ep+5; 1200 600; 0x1.ep+5
not rounded to float32 first; bfloat16; 0x1.02p+0 0x1p+0; 2^40+1 2^40; 0x1.02p+0
tie at the largest; float8_e4m3fn; 0x1.cp+8 0x1.ap+8; 1 1; 0x1.cp+8
tie of a coarse format; float8_e5m2; 0x1.4p+0 0x1.8p+0; 1 1; 0x1.8p+0
beyond 53 bits; int64; 0x1p+62 0x1p+62; 3 1; 0x1p+62
"""


def written(line: str) -> Corner:
    """A corner from its line of the table."""
    name, dtype, values, weights, expected = line.split("; ")
    return Corner(
        name,
        np.dtype(getattr(ml_dtypes, dtype, dtype)),
        tuple(Fraction(float.fromhex(value)) for value in values.split()),
        tuple(weight_written(weight) for weight in weights.split()),
        Fraction(float.fromhex(expected)),
    )


def weight_written(text: str) -> float:
    power = re.fullmatch(r"2\^(\d+)([+-]\d+)?", text)
    if power:
        return (1 << int(power[1])) + int(power[2] or 0)
    if text.isdigit():
        return int(text)
    return float.fromhex(text) if "0x" in text else float(text)


EXTREMES = [
    # dtype, values, weights, expected: literals of integers that no float64 holds.
    ("int64", [2**63 - 1, 2**63 - 3], [1, 1], 2**63 - 2),
    ("int64", [2**63 - 1, 2**63 - 2], [1, 1], 2**63 - 2),
    ("int64", [2**63 - 1, -(2**63)], [1, 1], 0),
    ("int64", [2**63 - 1, -(2**63)], [1, 3], -(2**62)),
    ("int64", [-(2**63), -(2**63)], [0.1, 0.2], -(2**63)),
    ("int64", [2**53 + 1, 2**53 + 3], [1, 1], 2**53 + 2),
    ("int64", [2**53 + 1, 2**53 + 2], [2, 1], 2**53 + 1),
    ("int64", [-(2**53) - 1], [5], -(2**53) - 1),
    ("int32", [-(2**31), 2**31 - 1], [1, 1], 0),
    ("int8", [-128, -128, -127], [1, 1, 1], -128),
    ("int8", [-128, 127], [1, 1], 0),
    ("uint64", [2**64 - 1, 2**64 - 1], [3, 0.1], 2**64 - 1),
    ("uint64", [2**64 - 1, 2**64 - 2], [1, 1], 2**64 - 2),
    ("uint64", [2**64 - 1, 2**64 - 2], [2, 1], 2**64 - 1),
    ("uint64", [2**64 - 1, 0], [1, 1], 2**63),
    ("uint64", [2**64 - 1, 1], [1, 1], 2**63),
    ("uint64", [2**63 + 1, 2**63 + 3], [1, 1], 2**63 + 2),
    ("uint64", [2**53 + 1], [7], 2**53 + 1),
    ("uint8", [255, 254], [1, 1], 254),
    ("uint8", [253, 254], [1, 1], 254),
    ("uint8", [255, 0], [1, 1], 128),
    ("uint16", [65535, 65534], [3, 1], 65535),
    ("uint32", [2**32 - 1, 0], [1, 1], 2**31),
]

CORNERS = [
    *(written(line) for line in WRITTEN.strip().splitlines()),
    *(c for d in averaged_dtypes() if d.kind not in "iu" for c in float_family(d)),
    *(c for name in ("int8", "int16", "int32", "int64") for c in integer_family(np.dtype(name))),
]

means = pytest.mark.parametrize(
    "mean",
    [weighted_mean, exact_weighted_mean, exact_weighted_mean_by_mantissas],
    ids=["accumulator", "fractions", "mantissas"],
)


def test_there_are_corners_enough() -> None:
    assert len(CORNERS) >= 240
    assert len({str(corner) for corner in CORNERS}) == len(CORNERS)


def check_each(corners: list[Corner], mean: Any) -> None:
    wrong = []
    for corner in corners:
        try:
            corner.check(mean)
        except Exception as error:
            wrong.append(f"{corner}: {error!r}")
    assert corners
    assert not wrong, "\n".join(wrong)


every_dtype = pytest.mark.parametrize(
    "dtype", sorted({corner.dtype.name for corner in CORNERS}), ids=str
)


@means
@every_dtype
def test_a_corner_comes_out_as_worked_out_by_hand(dtype: str, mean: Any) -> None:
    check_each([corner for corner in CORNERS if corner.dtype.name == dtype], mean)


@means
@every_dtype
def test_a_corner_with_every_sign_turned_comes_out_turned(dtype: str, mean: Any) -> None:
    check_each([corner.negated() for corner in CORNERS if corner.dtype.name == dtype], mean)


@means
@pytest.mark.parametrize(("name", "values", "weights", "expected"), EXTREMES)
def test_integers_are_exact_to_the_ends_of_their_range(
    mean: Any, name: str, values: list[int], weights: list[float], expected: int
) -> None:
    got = mean([{"w": np.array([value], name)} for value in values], weights)["w"]
    assert (got.dtype, got.tolist()) == (np.dtype(name), [expected])
