"""Quotients of sums whose limbs are laid by hand, beside the midpoints of the result's format."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fedavg_core.accumulator import weighted_mean
from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.limbs import STEP
from fedavg_core.exact.products import Scratch
from fedavg_core.exact.rounding import quotient
from fedavg_core.model import ArraySpec
from tests.conftest import THOROUGH

SIZE = 40
UNIT = Fraction(1, 1 << STEP)
LAYS = ["loose", "limb -1", "cancelling", "opposite", "both", "two limbs", "limb 1", "deep"]


def rounded(number: Fraction, precision: int) -> float:
    """A number to so many bits, half to even."""
    if not number:
        return 0.0
    exponent = abs(number.numerator).bit_length() - number.denominator.bit_length()
    while abs(number) >= Fraction(2) ** exponent:
        exponent += 1
    unit = Fraction(2) ** (exponent - precision)
    if abs(number) < Fraction(2) ** (exponent - 1):
        unit /= 2
    return float(round(number / unit) * unit)


def laid(
    sums: list[Fraction], lay: str, rng: np.random.Generator
) -> tuple[ExactSum, list[Fraction]]:
    """An `ExactSum` of these numbers in one of its forms, and what it holds: multiples of a unit.

    ``lay`` says where what is below limb 0's unit lies: loose (in 1 to 3 parts), in limb -1, there
    with much that limb 0 has the negative of (or as much as limb -1 can hold, so that limb 0 has
    the other sign than most sums), in both, or in limbs -1 and -2; or loose, with most of the sum
    in limb 1 and more in limb 0 than float64 can hold with the loose parts; or in limbs -1 to -3,
    each of which has much that the one above has the negative of.
    """
    step = {"two limbs": UNIT**2, "deep": UNIT**3}.get(lay, UNIT)
    sums = [round(number / step) * step for number in sums]
    total = ExactSum(len(sums))
    total.origin = 0
    wholes = [round(number) for number in sums]
    rests = [number - whole for number, whole in zip(sums, wholes, strict=True)]
    total.limbs[0] = np.array([float(whole) for whole in wholes])
    total.bounds[0] = 1 << 53
    if lay == "deep":
        left = [int(number / step) for number in sums]
        for k in (-3, -2, -1):
            upper = [
                (n + (1 << (STEP - 1)) >> STEP) + int(rng.integers(-1 << 20, 1 << 20)) for n in left
            ]
            digits = [n - (up << STEP) for n, up in zip(left, upper, strict=True)]
            total.limbs[k] = np.array([float(digit) for digit in digits])
            total.bounds[k] = 1 << 45
            left = upper
        total.limbs[0] = np.array([float(whole) for whole in left])
        return total, sums
    if lay == "limb 1":
        upper = [round(whole / (1 << STEP)) + int(rng.integers(-1024, 1024)) for whole in wholes]
        total.limbs[1] = np.array([float(part) for part in upper])
        total.limbs[0] -= total.limbs[1] * 2.0**STEP
        total.bounds = {0: 1 << 35, 1: 1 << 53}
    elif lay != "loose":
        share = 2 if lay == "both" else 1
        parts = [round(rest / share / UNIT) for rest in rests]
        rests = [rest - part * UNIT for rest, part in zip(rests, parts, strict=True)]
        if lay in ("cancelling", "opposite"):
            least, most = (1, 1 << 26) if lay == "cancelling" else (1 << 27, (1 << 29) - 1)
            moved = rng.integers(least, most, len(sums))
            if lay == "opposite":
                moved[total.limbs[0] < 0] *= -1
            total.limbs[0] -= moved
            parts = [part + int(m) * (1 << STEP) for part, m in zip(parts, moved, strict=True)]
        total.limbs[-1] = np.array([float(part) for part in parts])
        total.bounds[-1] = 1 << 53
    if lay == "two limbs":
        total.limbs[-2] = np.array([float(rest / step) for rest in rests])
        total.bounds[-1] = total.bounds[-2] = 1 << STEP
        return total, sums
    while any(rests):
        loose = [int(rng.integers(-(1 << 22), 1 << 22)) * UNIT for _ in rests]
        if len(total.loose) == 2:
            loose = rests
        pairs = zip(loose, rests, strict=True)
        loose = [part if abs(rest - part) <= Fraction(1, 2) else rest for part, rest in pairs]
        rests = [rest - part for rest, part in zip(rests, loose, strict=True)]
        at = np.array([i for i, part in enumerate(loose) if part], np.intp)
        total.loose.append((at, np.array([float(loose[i]) for i in at])))
    return total, sums


@pytest.mark.parametrize("lay", LAYS)
@pytest.mark.parametrize("weight_bits", [1, 10, 24, 28, 29, 45])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sum_beside_a_midpoint_is_rounded_to_its_own_side(
    lay: str, weight_bits: int, dtype: str
) -> None:
    rng = np.random.default_rng(weight_bits)
    number = ArraySpec((), np.dtype(dtype)).number
    for sum_bits in (1, 3, 12, 14, 24, 26, 27, 28, 30, 44, 50):
        for _ in range(50 if THOROUGH else 4):
            weight = int(rng.integers(1 << (weight_bits - 1), 1 << weight_bits)) | 1
            odd = 2 * rng.integers(1 << (number.precision - 1), 1 << number.precision, SIZE) + 1
            scale = Fraction(2) ** (sum_bits - 1 - number.precision - weight_bits)
            steps = int(UNIT / scale)
            if 1 < steps < 1 << number.precision:  # half of them are next to a multiple of the unit
                odd[::2] -= odd[::2] % steps
                odd[::2] += pow(weight, -1, steps)
            midpoints = [Fraction(int(m)) * weight * scale for m in odd]
            share = [Fraction(2) ** int(e) for e in rng.integers(-62, -36, SIZE)]
            sign = rng.integers(-1, 2, (2, SIZE))
            near = [
                (m + m * s * int(a)) * (1 - 2 * int(b == 1))
                for m, s, a, b in zip(midpoints, share, *sign, strict=True)
            ]
            total, sums = laid(near, lay, rng)
            out = np.empty(SIZE, dtype)
            divisor = weight * Fraction(2) ** (sum_bits - weight_bits)
            assert quotient(total, divisor, number, Scratch(17), out) == -1
            assert out.tolist() == [rounded(s / divisor, number.precision) for s in sums]


@pytest.mark.parametrize("lay", LAYS)
@pytest.mark.parametrize("weight_bits", [1, 10, 24, 28, 45])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sum_and_a_base_beside_a_midpoint_are_rounded_to_their_own_side(
    lay: str, weight_bits: int, dtype: str
) -> None:
    rng = np.random.default_rng(weight_bits)
    number = ArraySpec((), np.dtype(dtype)).number
    for sum_bits in (1, 3, 12, 14, 26, 28, 30, 44, 50):
        for _ in range(50 if THOROUGH else 4):
            weight = int(rng.integers(1 << (weight_bits - 1), 1 << weight_bits)) | 1
            divisor = weight * Fraction(2) ** (sum_bits - weight_bits)
            odd = 2 * rng.integers(1 << (number.precision - 1), 1 << number.precision, SIZE) + 1
            results = [int(m) * Fraction(2) ** (-1 - number.precision) for m in odd]
            share = [Fraction(2) ** int(e) for e in rng.integers(-56, -30, SIZE)]
            signs = rng.integers(-1, 2, (2, SIZE))
            results = [
                (r + r * s * int(a)) * (1 - 2 * int(b == 1))
                for r, s, a, b in zip(results, share, *signs, strict=True)
            ]
            # Of a base like the result little is left to the sum; of its negative, twice as much.
            times = rng.choice([0, 1, -1, 0.5, 1.5, 2**-10, 3000 if sum_bits < 40 else 1.25], SIZE)
            base = (np.array([float(r) for r in results]) * times).astype(dtype)
            near = [(r - Fraction(float(b))) * divisor for r, b in zip(results, base, strict=True)]
            total, sums = laid(near, lay, rng)
            out = np.empty(SIZE, dtype)
            parts = [(base.astype(np.float32), 0)]
            assert quotient(total, divisor, number, Scratch(17), out, parts) == -1
            exact = [s / divisor + Fraction(float(b)) for s, b in zip(sums, base, strict=True)]
            assert out.tolist() == [rounded(x, number.precision) for x in exact]
            assert not np.signbit(out[out == 0]).any()


@pytest.mark.parametrize("lay", ["deep", "two limbs", "both", "limb 1", "loose"])
@pytest.mark.parametrize("weight_bits", [1, 10, 28, 45, 60])
@pytest.mark.parametrize("has_base", [False, True])
def test_a_sum_beside_a_midpoint_of_float64_is_rounded_to_its_own_side(
    lay: str, weight_bits: int, has_base: bool
) -> None:
    rng = np.random.default_rng(weight_bits)
    out = np.empty(SIZE)
    number = ArraySpec((), out.dtype).number
    for sum_bits in (1, 12, 26, 44, 50):
        for _ in range(50 if THOROUGH else 4):
            weight = int(rng.integers(1 << (weight_bits - 1), 1 << weight_bits)) | 1
            divisor = weight * Fraction(2) ** (sum_bits - weight_bits)
            odd = 2 * rng.integers(1 << 52, 1 << 53, SIZE) + 1
            share = [Fraction(2) ** int(e) for e in rng.integers(-118, -50, SIZE)]
            signs = rng.integers(-1, 2, (2, SIZE))
            results = [
                int(m) * Fraction(2) ** -54 * (1 + s * int(a)) * (1 - 2 * int(b == 1))
                for m, s, a, b in zip(odd, share, *signs, strict=True)
            ]
            base = np.array([float(r) for r in results]) * rng.choice([0, 1, -0.5, 2**-9], SIZE)
            base *= has_base
            near = [(r - Fraction(b)) * divisor for r, b in zip(results, base, strict=True)]
            total, sums = laid(near, lay, rng)
            parts = [(base, 0)] if has_base else []
            assert quotient(total, divisor, number, Scratch(17), out, parts) == -1
            exact = [s / divisor + Fraction(b) for s, b in zip(sums, base, strict=True)]
            assert out.tolist() == [rounded(x, 53) for x in exact]
            if not has_base and total.origin is not None:
                total.origin -= 1005  # near to the least normal number
                assert quotient(total, divisor, number, Scratch(17), out) == -1
                assert out.tolist() == [rounded(x, 53) * 2.0**-1005 for x in exact]


@pytest.mark.parametrize("scale", [-10, -900, -950, -990, -998])
@pytest.mark.parametrize("weight", [3, 7354261, (1 << 52) + 12345])
def test_of_the_least_normal_numbers_no_bit_is_lost_either(scale: int, weight: int) -> None:
    units = np.arange(1.0, 65.0)
    large = np.zeros(64)
    large[0] = 2.0 ** (scale + 189)
    total = ExactSum(64)
    # All but the first cancel, up to some units of the lowest limb; their upper limbs are zero.
    for values in (large, (2.0**26 + units) * 2.0**scale, np.full(64, -(2.0 ** (scale + 26)))):
        total.add(values, 1, Scratch(64))
    exact = [Fraction(unit) * Fraction(2) ** scale for unit in units]
    exact[0] += Fraction(large[0])
    out = np.empty(64)
    assert quotient(total, weight, ArraySpec((), out.dtype).number, Scratch(64), out) == -1
    assert out.tolist() == [float(sum / weight) for sum in exact]


@pytest.mark.parametrize("weights", [[100] * 3, [1, 2, 3], [1, 1, 1 << 54], [7, 13, (1 << 60) + 1]])
def test_ties_of_float64_go_to_the_even_one(weights: list[int]) -> None:
    rng, divisor = np.random.default_rng(0), sum(weights)
    for reach in (3, 30, 53):
        means = 2 * rng.integers(1 << 52, 1 << 53, SIZE) + 1  # in half units of the last place
        # Two of any size, and a third such that the sum is very near to a tie, or one.
        sums = [int(mean) * divisor for mean in means]
        small = rng.integers(-(1 << reach), 1 << reach, (2, SIZE))
        off = rng.integers(-1, 2, SIZE)
        total, exact = ExactSum(SIZE), []
        for column, weight in zip(small, weights[:2], strict=True):
            total.add(column.astype(np.float64), weight, Scratch(SIZE))
        for place, (whole, aside) in enumerate(zip(sums, off, strict=True)):
            whole += int(aside)
            rest = whole - sum(
                int(n) * w for n, w in zip(small[:, place], weights[:2], strict=True)
            )
            exact.append(Fraction(whole, divisor))
            for part in (rest >> 104 << 104, (rest >> 52 << 52) % (1 << 104), rest % (1 << 52)):
                alone = np.zeros(SIZE)
                alone[place] = part
                total.add(alone, 1, Scratch(SIZE))
        out = np.empty(SIZE)
        assert quotient(total, divisor, ArraySpec((), out.dtype).number, Scratch(SIZE), out) == -1
        assert out.tolist() == [rounded(x, 53) for x in exact]


@pytest.mark.parametrize("weight", [3, 4])
def test_a_float64_result_beyond_the_largest_number_is_told(weight: int) -> None:
    largest = np.finfo(np.float64).max
    base = np.array([1.0, largest, -largest, largest])
    total = ExactSum(4)
    total.add(np.array([1.0, 2.0**969, -(2.0**971), 1.0]), weight, Scratch(4))
    out = np.empty(4)
    number = ArraySpec((), out.dtype).number
    assert quotient(total, weight, number, Scratch(4), out, [(base, 0)]) == 2
    assert out.tolist() == [2.0, largest, 0.0, largest]


def test_loose_parts_alone_may_come_to_a_subnormal_number() -> None:
    rng = np.random.default_rng(0)
    parts = rng.integers(-(1 << 23), 1 << 23, SIZE)
    total = ExactSum(SIZE)
    total.origin, total.limbs[0], total.bounds[0] = -125, np.zeros(SIZE), 1
    total.loose = [(np.arange(SIZE), parts.astype(np.float64) * 2.0**-STEP)]
    out = np.empty(SIZE, np.float32)
    assert quotient(total, 2, ArraySpec((), out.dtype).number, Scratch(SIZE), out) == -1
    assert out.tolist() == [round(Fraction(int(part), 2)) * 2.0**-149 for part in parts]


def test_a_base_finds_out_where_loose_parts_have_cancelled_the_sum() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200 if THOROUGH else 40):
        weight = int(rng.integers(1 << 27, 1 << 28)) | 1
        wholes = rng.integers(-7, 8, SIZE)
        left = [int(k) * UNIT for k in rng.integers(1, 99, SIZE)]
        total = ExactSum(SIZE)
        total.origin, total.limbs[0], total.bounds[0] = 0, wholes.astype(np.float64), 8
        parts = np.array([float(k - int(n)) for n, k in zip(wholes, left, strict=True)]) / 16
        total.loose = [(np.arange(SIZE), parts)] * 16
        base = rng.choice([0, 1], SIZE).astype(np.float32) * np.float32(2**-50)
        out = np.empty(SIZE, np.float32)
        number = ArraySpec((), out.dtype).number
        assert quotient(total, weight, number, Scratch(SIZE), out, [(base, 0)]) == -1
        exact = [k / weight + Fraction(float(b)) for k, b in zip(left, base, strict=True)]
        assert out.tolist() == [rounded(x, 24) for x in exact]


@pytest.mark.parametrize(
    ("value", "weight", "base", "result"),
    [
        ("0x1.eb91380000080p+28", 0.47016109476444623, "-0x1.eb912cp+28", "0x1.8p+7"),  # a tie
        ("0x1.efc9f40001p-1", 2**53 - 1, "-0x1.efc8f4p-1", "0x1p-17"),  # and one
    ],
)
def test_a_base_that_cancels_most_of_the_quotient_leaves_it_rounded_once(
    value: str, weight: float, base: str, result: str
) -> None:
    model = {"w": np.array([float.fromhex(value)])}
    start = {"w": np.array([float.fromhex(base)], np.float32)}
    mean = weighted_mean([model], [weight], base=start)["w"]
    assert mean.tolist() == [float.fromhex(result)]


def test_a_base_and_sixteen_loose_parts_are_off_by_no_more_than_is_looked_at() -> None:
    # The roundings of these add up, and the exact result is a tie.
    weight = 84007781
    loose = [-2560990, -2207518, -2529264, -3072451, -2121313, -2668666, -2207518, -2982721]
    loose += [-2382171, -3111227, -2592075, -3000667, -2197263, -2568681, -2781760, -2737239]
    total = ExactSum(1)
    total.origin = 0
    total.limbs = {0: np.array([86191978166.0]), -1: np.array([620677.0])}
    total.bounds = {0: 1 << 46, -1: 1 << 28}
    total.loose = [(np.zeros(1, np.intp), np.array([part * 2.0**-STEP])) for part in loose]
    base = np.array([-float.fromhex("0x1.fffffep+9")], np.float32)
    out = np.empty(1, np.float32)
    number = ArraySpec((), out.dtype).number
    assert quotient(total, weight, number, Scratch(1), out, [(base, 0)]) == -1
    exact = (86191978166 + (620677 + sum(loose)) * UNIT) / weight + Fraction(float(base[0]))
    assert out.tolist() == [rounded(exact, 24)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("weight", "units"),
    [
        (2**60 - 1, 1),
        (2**60 + 1, 1),
        (2**60 + 1, 2**53 - 1),
        (2**60 - 1, 2**53 - 1),
        (2**60 - 1, 3),
    ],
)
def test_a_subnormal_float64_is_rounded_once(weight: int, units: int, sign: int) -> None:
    total = ExactSum(2)
    total.origin = -823
    total.limbs = {0: np.array([1.0, 0.0]), -8: np.array([0.0, sign * float(units)])}
    total.bounds = {0: 1, -8: 1 << 53}
    out = np.empty(2)
    number = ArraySpec((), out.dtype).number
    assert quotient(total, weight, number, Scratch(2), out) == -1
    exact = Fraction(sign * units, 1 << 1015) / weight
    assert out[1] == float(exact)  # Python rounds a fraction once
    assert np.signbit(out[1]) == (sign < 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_found(dtype: str, bad: float) -> None:
    total = ExactSum(SIZE)
    total.origin, total.limbs[0], total.bounds[0] = 0, np.ones(SIZE), 1
    base = np.ones(SIZE, dtype)
    base[[20, 31]] = bad, np.nan
    out = np.empty(SIZE, dtype)
    with pytest.raises(NonFiniteError, match="element 20 "):
        quotient(total, 1, ArraySpec((), out.dtype).number, Scratch(17), out, [(base, 0)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_base_may_come_in_parts_and_be_scaled(dtype: str) -> None:
    total = ExactSum(1)
    total.origin, total.limbs[0], total.bounds[0] = 0, np.array([3.0]), 3
    out = np.empty(1, dtype)
    number = ArraySpec((), out.dtype).number
    for part in (np.ones(1), np.ones(1, np.float32)):
        for base, expected in (([(part, 3)], 11.0), ([(part, 0), (part, 1)], 6.0)):
            assert quotient(total, 1, number, Scratch(1), out, base) == -1
            assert out.tolist() == [expected]


def test_a_quotient_and_a_base_may_come_to_a_subnormal_number_beside_a_midpoint() -> None:
    weight = 120718233  # of which 2**51 + 1 is a multiple
    total = ExactSum(SIZE)
    total.origin, total.limbs[0], total.bounds[0] = -99, np.ones(SIZE), 1
    steps = 2**50 // weight  # of 2**-149, and one half less 1 / (2 * weight)
    results = np.arange(SIZE) * 1000 + 2**20
    base = np.ldexp((results - steps).astype(np.float64), -149).astype(np.float32)
    out = np.empty(SIZE, np.float32)
    number = ArraySpec((), out.dtype).number
    assert quotient(total, weight, number, Scratch(SIZE), out, [(base, 0)]) == -1
    assert np.ldexp(out.astype(np.float64), 149).tolist() == results.tolist()


def test_a_base_may_bring_a_result_to_the_largest_number_and_beyond() -> None:
    total = ExactSum(3)
    total.origin, total.limbs[0], total.bounds[0] = 80, np.array([0.0, 1.0, -1.0]) * 2**23, 1 << 23
    out = np.empty(3, np.float32)
    largest = np.finfo(np.float32).max
    number = ArraySpec((), out.dtype).number
    base = np.array([largest, largest, -largest])
    assert quotient(total, 1, number, Scratch(3), out, [(base, 0)]) == 1
    base = np.array([largest, -largest, largest])
    assert quotient(total, 1, number, Scratch(3), out, [(base, 0)]) == -1
    assert out.tolist() == [largest, -largest + 2.0**104, largest - 2.0**104]
