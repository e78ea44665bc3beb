"""The two oracles: against known answers, against each other, and against other roundings."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core import OutOfRange, UsageError
from fedavg_core.comparison import same_bits
from fedavg_core.model import number_format
from fedavg_core.testing import (
    averaged_dtypes,
    exact_weighted_mean,
    exact_weighted_mean_by_mantissas,
    fractions_of,
    round_fraction,
    weighted_models,
)
from tests.conftest import THOROUGH

ORACLES = [exact_weighted_mean, exact_weighted_mean_by_mantissas]
DTYPES = averaged_dtypes()
FLOATS = [dtype for dtype in DTYPES if dtype.kind not in "iu"]
NARROW_FLOATS = [dtype for dtype in FLOATS if dtype.itemsize <= 2]
EIGHT_BITS = [dtype for dtype in FLOATS if dtype.itemsize == 1]

both = pytest.mark.parametrize("oracle", ORACLES, ids=["fractions", "mantissas"])


def hexes(array: npt.NDArray[Any]) -> list[str]:
    """The elements' bit patterns, as text."""
    width = 2 * array.dtype.itemsize
    return [f"{code:0{width}x}" for code in array.view(f"u{array.dtype.itemsize}").tolist()]


def outcome(oracle: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return oracle(*args, **kwargs)
    except OutOfRange:
        return "out of range"


def agree(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return bool(isinstance(a, str) and a == b)
    return list(a) == list(b) and same_bits(a, b)


def arbitrary(source: random.Random, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Finite numbers of arbitrary bits."""
    raw = np.frombuffer(source.randbytes(count * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    array: npt.NDArray[Any] = raw.view(dtype).copy()
    if dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):
            array[~np.isfinite(array.astype(np.float64))] = 1
    return array


def arbitrary_weight(source: random.Random) -> float:
    kind = source.randrange(4)
    if kind == 0:
        return source.randint(1, 1000)
    if kind == 1:
        return source.getrandbits(source.randint(1, 90)) + 1
    if kind == 2:
        return float(10.0 ** source.uniform(-300, 300))
    return 5e-324 * source.randint(1, 1000)


# Each row: dtype, values of one element in the models, weights, base or None, the expected bits.
# The bits were worked out by hand from the formats' definitions.
KNOWN: list[tuple[str, list[float], list[float], float | None, str]] = [
    ("float32", [1.0, 2.0], [1, 1], None, "3fc00000"),
    ("float32", [1.0, 2.0], [1, 2], None, "3fd55555"),  # 5/3 = 1.6666…
    ("float32", [1.0, 2.0], [2, 1], None, "3faaaaab"),  # 4/3 = 1.3333…
    ("float32", [-1.0, -2.0], [1, 2], None, "bfd55555"),
    ("float64", [0.0, 1.0], [2, 1], None, "3fd5555555555555"),  # 1/3
    ("float64", [0.0, 1.0], [9, 1], None, "3fb999999999999a"),  # 1/10
    ("float16", [0.0, 1.0], [2, 1], None, "3555"),
    ("bfloat16", [0.0, 1.0], [2, 1], None, "3eab"),  # 1.0101010|101 · 2**-2, up
    # Half-way between 1 and the next number: to the even one, which is 1.
    ("float32", [1.0, 1.0 + 2.0**-23], [1, 1], None, "3f800000"),
    ("float64", [1.0, 1.0 + 2.0**-52], [1, 1], None, "3ff0000000000000"),
    ("float16", [1.0, 1.0 + 2.0**-10], [1, 1], None, "3c00"),
    ("bfloat16", [1.0, 1.0 + 2.0**-7], [1, 1], None, "3f80"),
    ("float8_e4m3fn", [1.0, 1.125], [1, 1], None, "38"),
    ("float8_e5m2", [1.0, 1.25], [1, 1], None, "3c"),
    # Half-way between the next two: up, to the even one.
    ("float32", [1.0 + 2.0**-23, 1.0 + 2.0**-22], [1, 1], None, "3f800002"),
    ("float16", [1.0 + 2.0**-10, 1.0 + 2.0**-9], [1, 1], None, "3c02"),
    ("float8_e4m3fn", [1.125, 1.25], [1, 1], None, "3a"),
    # A significand of all ones, negative, rounded away from zero into the next binade.
    ("float32", [-(2.0 - 2.0**-23), -2.0], [1, 1], None, "c0000000"),
    ("float16", [-(2.0 - 2.0**-10), -2.0], [1, 1], None, "c000"),
    # Half of the smallest number is a tie with zero, and zero is even; the sign stays.
    ("float32", [2.0**-149, 0.0], [1, 1], None, "00000000"),
    ("float32", [-(2.0**-149), 0.0], [1, 1], None, "80000000"),
    ("float16", [-(2.0**-24), 0.0], [1, 1], None, "8000"),
    ("float8_e4m3fnuz", [-(2.0**-10), 0.0], [1, 1], None, "00"),  # it has no -0
    ("float32", [3 * 2.0**-149, 0.0], [1, 1], None, "00000002"),
    ("float64", [5e-324, 0.0], [2, 1], None, "0000000000000001"),  # 2/3 of the smallest
    # A zero is +0.
    ("float32", [-0.0, -0.0], [1, 1], None, "00000000"),
    ("float32", [1.0, -1.0], [1, 1], None, "00000000"),
    ("float16", [1.0, -2.0], [2, 1], None, "0000"),
    # Subnormal and normal numbers meet without a seam.
    ("float32", [2.0**-126, 2.0**-126 - 2.0**-149], [1, 1], None, "00800000"),
    ("float16", [2.0**-14, 2.0**-14 - 2.0**-24], [3, 1], None, "0400"),
    # Weights of very different size.
    ("float64", [1.0, -1.0], [1e300, 1e-300], None, "3ff0000000000000"),
    ("float64", [0.0, 1.0], [2**60, 1], None, "3c30000000000000"),  # 1 / (2**60 + 1)
    ("float32", [1.0, 3.0], [0.25, 0.75], None, "40200000"),  # 2.5
    ("float32", [1.0, 3.0], [5e-324, 1.5e-323], None, "40200000"),
    # With a base: one rounding only.
    ("float32", [2.0**-24, 2.0**-24], [1, 1], 1.0, "3f800000"),
    ("float32", [2.0**-24, 2.0**-23], [1, 1], 1.0, "3f800001"),
    ("float32", [-1.0, -1.0], [3, 4], 1.0, "00000000"),
    ("float16", [8.0, 8.0], [1, 1], 65504.0, "7bff"),  # 65512 is nearer to 65504 than to 65536
    ("float8_e4m3fn", [16.0, 16.0], [1, 1], 448.0, "7e"),  # 464 is half-way; 448 is even
    # Integers, half to even.
    ("int32", [1, 2], [1, 1], None, "00000002"),
    ("int32", [2, 3], [1, 1], None, "00000002"),
    ("int8", [-1, -2], [1, 1], None, "fe"),
    ("int8", [-2, -3], [1, 1], None, "fe"),
    ("int8", [0, 1], [2, 1], None, "00"),
    ("uint8", [255, 254], [1, 1], None, "fe"),
    ("uint8", [255, 255], [3, 5], None, "ff"),
    ("int64", [2**63 - 1, -(2**63)], [1, 1], None, "0000000000000000"),  # -1/2
    ("int64", [2**63 - 1, 2**63 - 2], [2, 1], None, "7fffffffffffffff"),
    ("uint64", [2**64 - 1, 2**64 - 2], [1, 1], None, "fffffffffffffffe"),
    ("int16", [1, 2], [1, 1], 10, "000c"),
    ("int16", [1, 2], [1, 1], -12, "fff6"),  # -10.5 to -10
]


@both
@pytest.mark.parametrize("row", KNOWN, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_the_oracles_give_answers_known_by_hand(oracle: Any, row: Any) -> None:
    name, values, weights, base, expected = row
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    models = [{"w": np.array([value]).astype(dtype)} for value in values]
    assert [fractions_of(model["w"])[0] for model in models] == [Fraction(v) for v in values]
    start = None if base is None else {"w": np.array([base]).astype(dtype)}
    assert hexes(oracle(models, weights, base=start)["w"]) == [expected]


def test_the_oracles_agree_on_thousands_of_random_cases_of_every_dtype() -> None:
    source = random.Random(20261101)
    cases = out_of_range = with_base = 0
    for i in range(10_450 if THOROUGH else 1_900):
        dtype = DTYPES[i % len(DTYPES)]
        count = source.randint(1, 4)
        models = [{"w": arbitrary(source, dtype, 2)} for _ in range(count)]
        weights = [arbitrary_weight(source) for _ in models]
        base = None
        if source.random() < 0.3:
            base = {"other": arbitrary(source, dtype, 1), "w": arbitrary(source, dtype, 2)}
            with_base += 1
        one = outcome(exact_weighted_mean, models, weights, base=base)
        two = outcome(exact_weighted_mean_by_mantissas, models, weights, base=base)
        assert agree(one, two), (models, weights, base)
        out_of_range += isinstance(one, str)
        cases += 1
    assert cases >= (10_000 if THOROUGH else 1_800)
    assert with_base >= cases // 4
    assert 0 < out_of_range < with_base


@given(weighted_models(partial=True))
def test_the_oracles_agree_on_hard_models_with_missing_parameters(drawn: Any) -> None:
    models, weights = drawn
    one = exact_weighted_mean(models, weights)
    assert agree(one, exact_weighted_mean_by_mantissas(models, weights))


@given(weighted_models(min_models=2, partial=True), st.data())
def test_the_oracles_agree_where_a_base_is_added(drawn: Any, data: Any) -> None:
    models, weights = drawn
    keys = {key: array for model in models for key, array in model.items()}
    base = {**keys, "kept": np.array([1.5, -0.0], np.float32)}
    one = outcome(exact_weighted_mean, models, weights, base=base)
    assert agree(one, outcome(exact_weighted_mean_by_mantissas, models, weights, base=base))


@given(st.fractions())
def test_rounding_to_float64_is_python_s_own(value: Fraction) -> None:
    assert struct.pack("d", round_fraction(value, np.float64)) == struct.pack("d", float(value))


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["float16", "float32"]))
def test_rounding_to_a_narrower_float_is_that_of_a_cast(number: float, name: str) -> None:
    dtype = np.dtype(name)
    with np.errstate(over="ignore"):
        cast = np.float64(number).astype(dtype)
    if np.isinf(cast):
        with pytest.raises(OutOfRange):
            round_fraction(Fraction(number), dtype)
    elif number == 0:
        assert hexes(np.array([round_fraction(Fraction(0), dtype)])) == hexes(np.zeros(1, dtype))
    else:
        rounded = round_fraction(Fraction(number), dtype)
        assert rounded.dtype == dtype
        assert hexes(np.array([rounded])) == hexes(np.array([cast]))


@both
@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=str)
def test_every_number_of_a_narrow_float_is_its_own_mean(oracle: Any, dtype: np.dtype[Any]) -> None:
    step = 1 if THOROUGH or dtype.itemsize == 1 else 7
    codes = np.arange(0, 1 << (8 * dtype.itemsize), step).astype(f"u{dtype.itemsize}")
    numbers = codes.view(dtype)
    with np.errstate(invalid="ignore"):
        wide = numbers.astype(np.float64)
        numbers = numbers[np.isfinite(wide) & ((wide != 0) | (codes == 0))]  # -0 becomes +0
    assert hexes(oracle([{"w": numbers}], [0.1])["w"]) == hexes(numbers)


@both
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_between_neighbours_a_mean_goes_to_the_even_code_unless_tipped(
    oracle: Any, dtype: np.dtype[Any]
) -> None:
    # Codes of like sign are in the order of their numbers, so that neighbours differ by one.
    for sign in (0x00, 0x80):
        codes = np.arange(1, 128, dtype=np.uint8) | np.uint8(sign)
        numbers = codes.view(dtype)
        with np.errstate(invalid="ignore"):
            codes = codes[np.isfinite(numbers.astype(np.float64))]
        lower, upper = codes[:-1], codes[1:]
        models = [{"w": lower.view(dtype)}, {"w": upper.view(dtype)}]
        even = np.where(lower % 2 == 0, lower, upper)
        assert oracle(models, [1, 1])["w"].view(np.uint8).tolist() == even.tolist()
        tipped = oracle(models, [2**70 + 1, 2**70])["w"].view(np.uint8)
        assert tipped.tolist() == lower.tolist()
        tipped = oracle(models, [1.0, 1.0 + 2.0**-52])["w"].view(np.uint8)
        assert tipped.tolist() == upper.tolist()


@both
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_end_of_the_range_is_half_a_step_beyond_the_largest(
    oracle: Any, dtype: np.dtype[Any]
) -> None:
    format_ = number_format(dtype)
    assert format_ is not None
    top = Fraction(format_.largest)
    codes = np.array([format_.largest]).astype(dtype).view(f"u{dtype.itemsize}")
    step = top - fractions_of((codes - codes.dtype.type(1)).view(dtype))[0]
    for sign in (1, -1):
        base = {"w": np.array([sign * format_.largest]).astype(dtype)}
        half = np.array([float(sign * step / 2)])
        below = [{"w": half}, {"w": half * 0}]
        assert agree(oracle(below, [10**9, 1], base=base), base)
        with pytest.raises(OutOfRange):
            oracle([{"w": half * 1.5}], [1], base=base)
        # Exactly half a step: to even, which is the number beyond if the largest's code is odd.
        exact = outcome(oracle, [{"w": half}], [1], base=base)
        assert agree(exact, "out of range" if int(codes[0]) % 2 else base)


@both
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind in "iu"], ids=str)
def test_an_integer_result_beyond_its_dtype_is_out_of_range(
    oracle: Any, dtype: np.dtype[Any]
) -> None:
    ends = np.array([np.iinfo(dtype).max, np.iinfo(dtype).min], dtype)
    base = {"w": ends}
    near = [{"w": np.array([0.499, -0.499])}]
    assert agree(oracle(near, [1], base=base), base)
    for over in ([1.0, 0.0], [0.0, -1.0]):
        with pytest.raises(OutOfRange):
            oracle([{"w": np.array(over)}], [1], base=base)


@both
def test_each_parameter_has_a_denominator_of_its_own(oracle: Any) -> None:
    a, b, c = np.array([[6.0], [12.0], [1.0]], np.float32)
    got = oracle([{"x": a, "y": a}, {"x": b}, {"z": c}], [1, 2, 4])
    assert {key: array.tolist() for key, array in got.items()} == {
        "x": [10.0],
        "y": [6.0],
        "z": [1.0],
    }
    assert list(got) == ["x", "y", "z"]


@both
def test_what_nobody_sent_keeps_the_base_s_value_and_the_base_s_order_holds(oracle: Any) -> None:
    kept = np.array([[-0.0, 2.5]], ">f4")
    base = {"b": kept, "a": np.array(1, np.int8)}
    got = oracle([{"a": np.array(2, np.int8)}], [7], base=base)
    assert list(got) == ["b", "a"]
    assert got["b"].dtype == np.dtype("=f4")
    assert hexes(got["b"].reshape(-1)) == ["80000000", "40200000"]
    assert got["a"].shape == ()
    assert got["a"] == 3
    assert not np.shares_memory(got["b"], kept)
    assert agree(
        oracle([], [], base=base),
        {key: np.array(base[key], "=f4") for key in "b"} | {"a": base["a"]},
    )


@both
def test_shapes_and_layouts_make_no_difference(oracle: Any) -> None:
    plain = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = oracle([{"w": plain}, {"w": plain * 3}], [1, 1])["w"]
    strange = np.asfortranarray(plain * 3).astype(">f4")
    got = oracle([{"w": plain[::-1][::-1]}, {"w": strange}], [1, 1])["w"]
    assert got.shape == (2, 3, 4)
    assert np.array_equal(got, expected)
    assert np.array_equal(got, plain * 2)
    empty = oracle([{"w": np.zeros((0, 3), np.int16)}], [1])["w"]
    assert (empty.shape, empty.dtype) == ((0, 3), np.dtype(np.int16))


@both
def test_numpy_numbers_are_good_weights(oracle: Any) -> None:
    models = [{"w": np.array([1.0])}, {"w": np.array([4.0])}]
    assert oracle(models, [np.int64(2), np.float32(1.0)])["w"].tolist() == [2.0]


def test_the_result_s_dtype_can_be_chosen() -> None:
    models = [{"w": np.array([1, 2], np.int32)}, {"w": np.array([2, 3], np.int32)}]
    got = exact_weighted_mean(models, [1, 1], dtypes={"w": np.float64})["w"]
    assert (got.dtype, got.tolist()) == (np.dtype(np.float64), [1.5, 2.5])


def test_nonsense_is_named() -> None:
    one = {"w": np.ones(2, np.float32)}
    lowest = {"w": np.array([-65504], np.float16)}
    with pytest.raises(UsageError, match="2 models, but 1 weights"):
        exact_weighted_mean([one, one], [1])
    with pytest.raises(UsageError, match="nothing to average"):
        exact_weighted_mean([], [])
    with pytest.raises(UsageError, match=r"the base lacks the keys \['w'\]"):
        exact_weighted_mean([one], [1], base={"v": one["w"]})
    with pytest.raises(UsageError, match="key 'w': the arrays differ in shape"):
        exact_weighted_mean([one, {"w": np.ones((2, 1), np.float32)}], [1, 1])
    with pytest.raises(UsageError, match="dtype 'complex128' cannot be averaged"):
        exact_weighted_mean([{"w": np.ones(2, complex)}], [1])
    with pytest.raises(OutOfRange, match="key 'w': about -2\\*\\*16 is beyond float16"):
        exact_weighted_mean([lowest], [1], base=lowest)
    with pytest.raises(OutOfRange, match="key 'w': 128 is beyond int8"):
        exact_weighted_mean([{"w": np.ones(1)}], [1], base={"w": np.array([127], np.int8)})
    with pytest.raises(UsageError, match="dtype complex128 cannot be averaged"):
        exact_weighted_mean_by_mantissas([{"w": np.ones(2, complex)}], [1])


@pytest.mark.parametrize("weight", [0, -1, 0.0, -0.5, float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_above_zero_and_finite_is_misuse(weight: float) -> None:
    with pytest.raises(UsageError, match="a weight must be a finite number above zero"):
        exact_weighted_mean([{"w": np.ones(1)}], [weight])


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_element_that_is_not_finite_is_misuse(
    oracle: Any, dtype: np.dtype[Any], bad: float
) -> None:
    array = np.array([1.0, bad]).astype(dtype)
    with pytest.raises(UsageError, match="NaN or infinite"):
        oracle([{"w": array}], [1])
