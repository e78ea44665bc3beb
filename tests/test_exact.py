"""Exact sums, looked at from the inside: every limb is read back as a rational number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core.exact.limbs as limbs_module
from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.limbs import STEP
from fedavg_core.exact.products import Scratch
from fedavg_core.exact.readout import digits, from_digits, leading, sign
from tests.conftest import THOROUGH
from tests.interruption import Interruption

SIZE = 7
WEIGHTS = [1, 600, (1 << 29) - 1, (1 << 29) + 1, (1 << 60) + 1, Fraction(0.1), Fraction(5e-324)]


def values_of(total: ExactSum) -> list[Fraction]:
    result = [Fraction(0)] * total.size
    for k, limb in total.limbs.items():
        if not total.bounds[k]:  # such a limb counts as zero, whatever it holds
            continue
        assert total.origin is not None
        unit = Fraction(2) ** (total.origin + STEP * k)
        for i, digit in enumerate(limb):
            assert digit == np.rint(digit)
            assert abs(digit) <= total.bounds[k] <= 1 << 53
            result[i] += Fraction(float(digit)) * unit
    for where, part in total.loose:
        assert total.origin is not None
        for i, fraction in zip(where, part, strict=True):
            assert abs(fraction) <= 0.5
            assert (fraction * 2.0**STEP).is_integer()
            result[i] += Fraction(float(fraction)) * Fraction(2) ** total.origin
    return result


def exactly(values: npt.NDArray[Any], weight: int | Fraction) -> list[Fraction]:
    return [Fraction(float(value)) * weight for value in values]


def summed(*terms: tuple[npt.NDArray[Any], int | Fraction]) -> ExactSum:
    total = ExactSum(terms[0][0].size)
    for values, weight in terms:
        total.add(values, weight, Scratch(values.size))
    return total


def from_bits(seed: int, dtype: type, size: int = SIZE) -> npt.NDArray[Any]:
    raw = np.random.default_rng(seed).bytes(size * np.dtype(dtype).itemsize)
    values: npt.NDArray[Any] = np.frombuffer(raw, dtype).copy()
    values[~np.isfinite(values)] = 0
    return values


def any_weight() -> st.SearchStrategy[int | Fraction]:
    floats = st.floats(min_value=0, exclude_min=True, allow_infinity=False).map(Fraction)
    return st.one_of(st.sampled_from(WEIGHTS), st.integers(1, 1 << 80), floats)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 30), st.booleans(), any_weight()), max_size=6),
)
def test_a_sum_is_the_rational_sum_of_its_terms(
    terms: list[tuple[int, bool, int | Fraction]],
) -> None:
    total = ExactSum(SIZE)
    expected = [Fraction(0)] * SIZE
    for seed, wide, weight in terms:
        values = from_bits(seed, np.float64 if wide else np.float32)
        total.add(values, weight, Scratch(SIZE))
        expected = [a + b for a, b in zip(expected, exactly(values, weight), strict=True)]
    assert values_of(total) == expected
    assert [int(s) for s in sign(total)] == [(v > 0) - (v < 0) for v in expected]


def beside_few_small_ones(seed: int, dtype: type, size: int = 320) -> npt.NDArray[Any]:
    """Numbers of like size, one in forty of them smaller by up to 120 binades, or zero."""
    rng = np.random.default_rng(seed)
    values: npt.NDArray[Any] = rng.standard_normal(size)
    values[:: 40 + seed % 3] *= 2.0 ** -rng.integers(1, 120) * (seed % 5 > 0)
    return values.astype(dtype)


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 30), st.sampled_from([np.float32, np.float64]), any_weight()),
        min_size=1,
        max_size=4,
    ),
    st.integers(-8, 8),
)
def test_products_of_more_bits_than_a_float64_has_are_added_exactly(
    terms: list[tuple[int, type, int | Fraction]], scale: int
) -> None:
    total = ExactSum(320)
    expected = [Fraction(0)] * 320
    for number, (seed, dtype, weight) in enumerate(terms):
        values = beside_few_small_ones(seed, dtype) * dtype(2.0 ** (number * scale))
        total.add(values, weight, Scratch(320))
        expected = [a + b for a, b in zip(expected, exactly(values, weight), strict=True)]
    assert values_of(total) == expected


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 53), (np.float64, 27)])
def test_what_a_rounded_sum_of_two_products_leaves_is_within_the_bounds(
    dtype: type, bits: int
) -> None:
    rng, size = np.random.default_rng(0), 1600
    values: npt.NDArray[Any] = (1 + rng.random(size)).astype(dtype)
    weight = (1 << bits) - 1
    for larger in range(8):  # until limb 0 has no head-room over the second
        total = summed((np.ones(size, np.float32), 1 << (bits - 1)))
        total.add(values * dtype(2.0**larger), weight, Scratch(size))
        assert values_of(total)[1:] == [
            Fraction(1 << (bits - 1)) + exact
            for exact in exactly(values[1:] * dtype(2.0**larger), weight)
        ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 2.0**-15, 2.0**20])
def test_an_addition_in_parts_is_made_or_taken_back_at_any_moment(
    dtype: type, scale: float
) -> None:
    def before() -> ExactSum:
        return summed((beside_few_small_ones(1, dtype, 64), Fraction(0.1)))

    values = beside_few_small_ones(2, dtype, 64) * dtype(scale)
    without, weight = values_of(before()), Fraction(0.7)
    made = [a + b for a, b in zip(without, exactly(values, weight), strict=True)]
    modules = "exact.exact_sum", "exact.limbs", "exact.products"
    total = before()
    with Interruption(-1, *modules) as all_of_it:
        total.add(values, weight, Scratch(64))
    assert values_of(total) == made
    for moment in range(1, -all_of_it.left, 1 if THOROUGH else 13):
        total = before()
        with contextlib.suppress(KeyboardInterrupt), Interruption(moment, *modules):
            total.add(values, weight, Scratch(64))
        assert values_of(total) == (made if total.additions == 2 else without)


@given(st.integers(0, 1 << 30), st.booleans(), any_weight())
def test_a_negative_weight_undoes_an_addition_exactly(
    seed: int, wide: bool, weight: int | Fraction
) -> None:
    kept = from_bits(seed, np.float32)
    undone = from_bits(seed + 1, np.float64 if wide else np.float32)
    total = summed((kept, 3), (undone, weight), (undone, -weight))
    assert values_of(total) == exactly(kept, 3)


@given(st.lists(st.tuples(st.integers(0, 1 << 30), any_weight()), min_size=1, max_size=4))
def test_digits_depend_on_the_value_alone(terms: list[tuple[int, int | Fraction]]) -> None:
    arrays = [(from_bits(seed, np.float32), weight) for seed, weight in terms]
    forward, backward = summed(*arrays), summed(*reversed(arrays))
    signs, columns = digits(forward, 0)
    signs_again, columns_again = digits(backward, 0)
    assert np.array_equal(signs, signs_again)
    assert columns.keys() == columns_again.keys()
    assert all(np.array_equal(columns[k], columns_again[k]) for k in columns)
    assert all(digit.min() >= 0 and digit.max() < 1 << STEP for digit in columns.values())
    assert values_of(from_digits(SIZE, 0, signs, columns)) == values_of(forward)


def ordinary(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE, np.float32)


@given(
    st.sampled_from([lambda seed: from_bits(seed, np.float64), ordinary]),
    st.lists(st.tuples(st.integers(0, 1 << 30), any_weight()), min_size=1, max_size=4),
)
def test_leading_gives_each_value_within_its_promised_error(
    draw: Callable[[int], npt.NDArray[Any]], terms: list[tuple[int, int | Fraction]]
) -> None:
    total = summed(*((draw(seed), weight) for seed, weight in terms))
    expected = values_of(total)
    seen = {}
    for where, high, low, exponent, exact in leading(total):
        for i, h, l_ in zip(where, high, low, strict=True):
            value = (Fraction(float(h)) + Fraction(float(l_))) * Fraction(2) ** exponent
            assert h == h + l_
            assert abs(value - expected[i]) <= (0 if exact else abs(expected[i]) / (1 << 71))
            seen[int(i)] = value
    assert all(i in seen or value == 0 for i, value in enumerate(expected))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limbs_are_carried_before_they_are_full(weight: int | Fraction, dtype: type) -> None:
    ones = np.array([-1.0, 1.0, 0.75]) * (2 - 2.0 ** (-23 if dtype == np.float32 else -52))
    values: npt.NDArray[Any] = ones.astype(dtype)
    total = ExactSum(3)
    scratch = Scratch(3)
    for _ in range(300):
        total.add(values, weight, scratch)
    assert values_of(total) == exactly(values, 300 * weight)


def test_a_sum_doubled_a_hundred_times_is_still_exact() -> None:
    values = from_bits(5, np.float32)
    total = summed((values, 600))
    for _ in range(100):
        total.add_sum(total.take(slice(None)))
    assert values_of(total) == exactly(values, 600 << 100)


def test_a_much_larger_update_moves_the_origin_up() -> None:
    small, large = np.full(3, 2.0**-100, np.float32), np.full(3, 2.0**100, np.float32)
    total = summed((small, 1), (large, 1))
    assert values_of(total) == [Fraction(2) ** 100 + Fraction(2) ** -100] * 3


def test_values_too_far_apart_to_scale_together_are_added_in_groups() -> None:
    values = np.array([1.7e308, -5e-324, 1e-300, 0.0, 3.0])
    total = summed((values, Fraction(1e-300)), (values, 1 << 60))
    assert values_of(total) == exactly(values, Fraction(1e-300) + (1 << 60))


@pytest.mark.parametrize("small", [1, 20, 200])
def test_elements_below_limb_zero_are_added_wherever_they_are(small: int) -> None:
    values = np.ones(256, np.float32)
    values[:small] = 2.0**-60 * (1 + 2.0**-23)
    values[-20:] = 0.0
    total = summed((values, 600), (values, 7))
    assert values_of(total) == exactly(values, 607)


@pytest.mark.parametrize("weight", [1, 653, -(1 << 29) + 1])
def test_an_element_of_any_size_beside_a_large_one_is_added_whole(weight: int) -> None:
    for exponent in range(-149, 1):
        values = np.ones(320, np.float32)
        values[9] = 2.0**-20 * (1 + 2.0**-23)
        values[5] = np.float32(2.0**exponent) * np.float32(1 + 2.0**-23)  # its last bit is set
        total = summed((values, weight), (values, weight))
        assert values_of(total) == exactly(values, 2 * weight)


@pytest.mark.parametrize("weight", [653, (1 << 53) - 1, Fraction(0.1), Fraction(0.7)])
@pytest.mark.parametrize(
    ("dtype", "reach"), [(np.float32, 0), (np.float32, -100), (np.float64, 0), (np.float64, -990)]
)
def test_elements_of_all_sizes_beside_many_large_ones_are_added_whole(
    dtype: type, reach: int, weight: int | Fraction
) -> None:
    values: npt.NDArray[Any] = np.full(4096, 2.0**reach, dtype)
    for below in range(200):  # the last bit of each is set
        values[7 * below] = np.nextafter(dtype(2.0 ** (reach - below)), dtype(np.inf))
    assert values_of(summed((values, weight), (values, weight))) == exactly(values, 2 * weight)


@pytest.mark.parametrize("weight", [1, 653, Fraction(0.1), (1 << 40) + 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_least_normal_number_beside_large_ones_is_added_whole(
    dtype: type, weight: int | Fraction
) -> None:
    least = np.nextafter(np.finfo(dtype).smallest_normal, dtype(1))
    for larger in range(1, 110):
        values = np.full(32, least)
        values[2:] *= dtype(2.0**larger)
        assert values_of(summed((values, weight))) == exactly(values, weight)


@pytest.mark.parametrize("weight", [3, Fraction(0.1), Fraction(2.0**-900), 1 << 900])
@pytest.mark.parametrize("value", [np.finfo(np.float64).max, 2.0**1023, 1.1, 2.0**-1022, 5e-324])
def test_float64_values_of_any_size_are_added_with_weights_of_any_size(
    value: float, weight: int | Fraction
) -> None:
    values = np.full(32, value)
    assert values_of(summed((values, weight), (-values, 3))) == exactly(values, weight - 3)


def test_what_no_element_of_a_limb_exceeds_is_told_of_the_least_numbers_as_well() -> None:
    for largest in [1, 2, (1 << 23) - 1, 1 << 23, (1 << 24) - 1]:  # in units of the least float32
        values = np.full(320, largest * 2.0**-149, np.float32)
        assert values_of(summed((values, 653))) == exactly(values, 653)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_and_nothing_is_added(dtype: type, bad: float) -> None:
    total = summed((np.ones(4, np.float32), 1))
    with pytest.raises(NonFiniteError, match="element 2 is not finite") as caught:
        total.add(np.array([1, 2, bad, bad], dtype), 1, Scratch(4))
    assert caught.value.index == 2
    assert values_of(total) == [1] * 4


@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.booleans())
def test_sums_are_added_and_subtracted_at_a_place(a: int, b: int, same_origin: bool) -> None:
    ours, theirs = from_bits(a, np.float32), from_bits(b, np.float32, 3)
    total, other = summed((ours, 9)), summed((theirs, 1))
    if same_origin and total.origin is not None:
        other.origin = total.origin
    before = values_of(total)
    total.add_sum(other, at=slice(2, 5))
    expected = list(before)
    for i, value in enumerate(values_of(other)):
        expected[2 + i] += value
    assert values_of(total) == expected
    total.add_sum(other, sign=-1, at=slice(2, 5))
    assert values_of(total) == before


def test_a_reset_sum_is_zero_and_keeps_its_memory() -> None:
    total = summed((np.ones(3, np.float32), 600))
    limb = total.limbs[0]
    total.reset()
    assert list(leading(total)) == []
    total.add(np.full(3, 2.0**40, np.float32), 1, Scratch(3))
    assert total.limbs[0] is limb
    assert values_of(total) == [1 << 40] * 3
    total.reset()
    total.reset()
    total.add_sum(summed((np.ones(3), 5)))
    assert values_of(total) == [5] * 3
    limbs = [total.limbs[0], total._room(-1, 1), total._room(1, 1)]
    total.reset()
    total.add(np.ones(3, np.float32), 1, Scratch(3))
    assert total.limbs[0] is limbs[0]
    assert {id(total._room(k, 1)) for k in (-1, 1)} == set(map(id, limbs[1:]))


def test_after_an_interrupted_reset_another_makes_it_zero_with_limbs_of_their_own() -> None:
    def some() -> ExactSum:
        total = ExactSum(3, [np.empty(3), np.empty(3)])
        total.add(np.array([1, 1e-30, 1e30]), 1, Scratch(3))
        return total

    with Interruption(-1, "exact.limbs") as all_of_it:
        some().reset()
    for moment in range(1, -all_of_it.left):
        total = some()
        with contextlib.suppress(KeyboardInterrupt), Interruption(moment, "exact.limbs"):
            total.reset()
        total.reset()
        total.add(np.array([1, 1e-30, 1e30]), 3, Scratch(3))
        assert values_of(total) == exactly(np.array([1, 1e-30, 1e30]), 3)


def test_an_empty_sum_has_no_leading_values_and_no_digits() -> None:
    empty = ExactSum(2)
    assert list(leading(empty)) == []
    assert digits(empty, 0)[1] == {}
    assert empty.take(np.array([1])).size == 1
    empty.add_sum(ExactSum(2))
    assert empty.origin is None
    empty.add(np.zeros(2, np.float32), 1, Scratch(2))
    empty.add(np.zeros(2), 1, Scratch(2))
    assert values_of(empty) == [0, 0]
    ones = np.ones(2, np.float32)
    cancelled = summed((ones, 1), (ones, -1))
    cancelled.reset()
    cancelled.origin = 0
    assert list(leading(cancelled)) == []


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("method", ["_room", "_deposit", "_cut", "_carry"])
def test_an_addition_that_fails_at_any_step_leaves_the_sum_as_it_was(
    method: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, other = from_bits(3, np.float64), summed((from_bits(4, np.float64), 3))
    total = summed((from_bits(1, np.float32), 600), (from_bits(2, np.float64), 1))
    total.bounds.update(dict.fromkeys(total.bounds, 1 << 53))
    before = values_of(total)
    real, calls = getattr(ExactSum, method), [0]

    def failing(self: ExactSum, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise MemoryError
        return real(self, *args)

    additions: list[Callable[[], None]] = [
        lambda: total.add(wide, Fraction(0.1), Scratch(SIZE)),
        lambda: total.add_sum(other),
    ]
    for addition in additions:
        calls[0] = 0
        monkeypatch.setattr(ExactSum, method, failing)
        with contextlib.suppress(MemoryError):
            addition()
            monkeypatch.undo()
            before = values_of(total)
        monkeypatch.undo()
        assert values_of(total) == before


@pytest.mark.parametrize("weight", [(1 << 40) + 1, (1 << 70) + (1 << 35) + 1])
@pytest.mark.parametrize("step", range(1, 4))
def test_what_a_piece_of_a_weight_has_added_is_taken_back_though_buffers_are_used_again(
    weight: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = summed((np.ones(SIZE, np.float32), weight))
    real, calls = ExactSum._deposit, [0]

    def failing(self: ExactSum, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == step:
            raise MemoryError
        real(self, *args)

    monkeypatch.setattr(ExactSum, "_deposit", failing)
    with contextlib.suppress(MemoryError):
        total.add(np.full(SIZE, 3, np.float32), weight, Scratch(SIZE))
    monkeypatch.undo()
    assert total.is_whole
    times = 1 if calls[0] >= step else 4
    assert values_of(total) == [Fraction(times * weight)] * SIZE


def test_there_are_never_more_than_seventeen_lists_of_loose_parts() -> None:
    rng, scratch = np.random.default_rng(0), Scratch(1 << 13)
    total = ExactSum(1 << 13)
    for number in range(60):
        values = np.full(1 << 13, number % 9 == 0, np.float32)
        values[number % 3] = np.float32(int(rng.integers(1 << 22, 1 << 23)) | 1) * 2.0**-61
        values[-1] = 1
        # A weight of which two pieces leave something each.
        total.add(values, (1 << 58) + (0 if number % 9 == 0 else (1 << 57) + 1), scratch)
        assert len(total.loose) <= 17


@pytest.mark.parametrize("was_reset", [False, True])
@pytest.mark.parametrize("method", ["_room", "_deposit", "_cut"])
@pytest.mark.parametrize("step", [1, 2])
def test_the_first_addition_that_fails_leaves_zero(
    method: str, step: int, was_reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.array([1, -2, 3, 1e-9, -0.0, 5, 6] * 20, np.float32)  # one in seven is below limb 0
    values[7:] = np.abs(values[7:]) + 1
    total = ExactSum(values.size)
    if was_reset:
        total.add(values, 77, Scratch(values.size))
        total.reset()
    real, calls = getattr(ExactSum, method), [0]

    def failing(self: ExactSum, *args: Any) -> Any:
        result = real(self, *args)
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(ExactSum, method, failing)
    with contextlib.suppress(KeyboardInterrupt):
        total.add(values, 600, Scratch(values.size))
    monkeypatch.undo()
    fresh = [Fraction(0)] * values.size
    assert values_of(total) == (fresh if calls[0] >= step else exactly(values, 600))
    if calls[0] >= step:
        total.add(values, 3, Scratch(values.size))
        assert values_of(total) == exactly(values, 3)


def test_what_is_taken_back_after_a_carry_is_within_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, scratch, values = ExactSum(1), Scratch(1), np.array([float((1 << 53) - 1)])
    weight = (1 << 72) - 1
    while not any(bound > 1 << 51 for bound in total.bounds.values()):
        total.add(values, weight, scratch)
    real = ExactSum._carry

    def interrupted(self: ExactSum, k: int) -> None:
        real(self, k)
        monkeypatch.undo()  # what takes back may carry as well
        raise KeyboardInterrupt

    monkeypatch.setattr(ExactSum, "_carry", interrupted)
    while True:
        count, before = total.additions, values_of(total)
        try:
            total.add(values, weight, scratch)
        except KeyboardInterrupt:
            break
    assert values_of(total) == before  # and no limb holds more than its bound
    for _ in range(200):
        total.add(values, weight, scratch)
        count += 1
    assert values_of(total) == [count * f for f in exactly(values, weight)]


def mostly_large(seed: int, size: int = 320) -> npt.NDArray[np.float32]:
    """Numbers of which one in forty is below limb 0, by far or by a little."""
    rng = np.random.default_rng(seed)
    values: npt.NDArray[np.float64] = rng.uniform(1, 2, size) * rng.choice([-1, 1], size)
    small = rng.choice(size, size // 40, replace=False)
    values[small] *= np.exp2(rng.choice([-14.0, -18.0, -30.0], small.size))
    return values.astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_what_is_loose_counts_wherever_the_sum_is_read(count: int) -> None:
    terms = [(mostly_large(seed), 600 + seed) for seed in range(count)]
    total, scratch, most = ExactSum(320), Scratch(320), 0
    for values, weight in terms:
        total.add(values, weight, scratch)
        most = max(most, len(total.loose))
        assert sum(at.size for at, _ in total.loose) <= 2 * 320 // 16
    assert most
    expected = [
        sum((Fraction(float(values[i])) * weight for values, weight in terms), Fraction(0))
        for i in range(320)
    ]
    assert values_of(total) == expected
    chosen = np.arange(3, 320, 7)
    assert values_of(total.take(chosen)) == [expected[i] for i in chosen]
    assert values_of(total.take(slice(40, 200))) == expected[40:200]
    large = np.flatnonzero(np.abs(terms[0][0]) >= 1)[:1]  # of which no part of the first is loose
    for taken in (total.take(large), total.take(slice(large[0], large[0] + 1))):
        assert values_of(taken.take(np.arange(1))) == [expected[large[0]]]
    assert sign(total).tolist() == [(f > 0) - (f < 0) for f in expected]
    twice = ExactSum(320)
    twice.add_sum(total)
    twice.add_sum(total, at=slice(None))
    assert values_of(twice) == [2 * f for f in expected]
    assert values_of(total) == expected
    total.settle()
    assert values_of(total) == expected
    total.reset()
    assert total.is_zero
    assert values_of(total) == [0] * 320


def test_an_addition_that_fails_at_its_end_takes_back_what_is_loose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, scratch = ExactSum(320), Scratch(320)
    total.add(mostly_large(1), 601, scratch)
    before, real = values_of(total), ExactSum._add_float32

    def interrupted(self: ExactSum, *args: Any) -> bool:
        assert real(self, *args)
        assert len(total.loose) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(ExactSum, "_add_float32", interrupted)
    with pytest.raises(KeyboardInterrupt):
        total.add(mostly_large(2), 602, scratch)
    assert len(total.loose) == 1
    assert values_of(total) == before


@pytest.mark.parametrize(("places", "most"), [([7], 16), ([7, 30], 11)])
def test_what_is_loose_in_the_same_places_stays_so_without_a_limb_of_its_own(
    places: list[int], most: int
) -> None:
    values = np.ones(320, np.float32)
    values[places] = -(1 + 3 * 2.0**-23) * 2.0**-16  # times 601 no whole units of limb 0
    total, scratch, kept = ExactSum(320), Scratch(320), []
    for count in range(1, 101):
        total.add(values, 601, scratch)
        kept.append(len(total.loose))
        assert values_of(total) == [count * f for f in exactly(values, 601)]
    assert max(kept) == most
    assert min(total.used()) == 0


def with_fractions(eighths: int, at: int, size: int = 320) -> npt.NDArray[np.float32]:
    """Ones, but for one number: times w it is w times so many eighths of a unit off a whole one."""
    values = np.ones(size, np.float32)
    values[at] = (1 + eighths * 2.0**-23) * 2.0**-16
    return values


def test_what_is_loose_and_becomes_whole_units_is_loose_no_more() -> None:
    total, scratch = ExactSum(320), Scratch(320)
    for _ in range(16):
        total.add(with_fractions(1, at=7), 601, scratch)
    assert [len(total.loose), *(float(part[0]) for _, part in total.loose)] == [16, *[0.125] * 16]
    total.add(np.ones(320, np.float32), 601, scratch)
    assert total.loose == []
    assert values_of(total)[7] == 16 * exactly(with_fractions(1, at=7), 601)[7] + 601


def test_beside_a_limb_for_them_loose_parts_are_few_as_well() -> None:
    total, scratch, values = ExactSum(640), Scratch(640), with_fractions(1, at=7, size=640)
    total.add(values, 601, scratch)
    total.tuck()
    for _ in range(79):
        total.add(values, 601, scratch)
        assert len(total.loose) <= 17
    assert values_of(total) == [80 * f for f in exactly(values, 601)]


def full_of_loose_parts() -> ExactSum:
    """A sum with as many loose parts as are kept, near to a carry and beside a limb above."""
    total, scratch = ExactSum(320), Scratch(320)
    for number in range(16):
        at = (7, 30, 99)[number % 3]
        total.add(with_fractions([1, -2, 3][number % 3], at), 601, scratch)
    assert len(total.loose) == 16
    total._carry(0)
    total.limbs[0] += (1 << 52) - total.bounds[0]
    total.bounds[0] = (1 << 53) - 3
    return total


def test_what_loose_parts_add_to_limb_0_is_within_its_bound() -> None:
    total, scratch = ExactSum(320), Scratch(320)
    for sign_ in (1, -1):
        for _ in range(10):
            total.add(with_fractions(3, at=7), sign_ * 601, scratch)
        total.limbs[0][7] = sign_ * total.bounds[0]
        value = values_of(total)
        total._join()
        assert values_of(total) == value
        total.limbs[0][7] = 0


@pytest.mark.parametrize("step", ["_join", "tuck", "settle"])
def test_putting_a_sum_in_order_leaves_its_value_whenever_it_is_interrupted(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limbs_module, "_PIECE", 100)
    total = full_of_loose_parts()
    value = values_of(total)
    with Interruption(-1, "exact.limbs") as all_of_it:
        getattr(total, step)()
    assert values_of(total) == value
    count = -1 - all_of_it.left
    assert count > 100
    for moment in range(1, count + 1, 3 if THOROUGH else 17):
        total = full_of_loose_parts()
        with pytest.raises(KeyboardInterrupt), Interruption(moment, "exact.limbs"):
            getattr(total, step)()
        assert values_of(total) == value
        total.add(np.ones(320, np.float32), 3, Scratch(320))
        assert values_of(total) == [v + 3 for v in value]
