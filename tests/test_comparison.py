"""How two models are told apart."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fedavg_core as fc


def test_models_with_the_same_bits_are_the_same() -> None:
    a = {"x": np.array([1.0, -0.0, np.nan]), "y": np.ones(2, np.float16)}
    assert fc.same_bits(a, {"y": a["y"].copy(), "x": a["x"].copy()})
    assert not fc.same_bits(a, {**a, "x": np.array([1.0, 0.0, np.nan])})
    assert not fc.same_bits(a, {"x": a["x"]})
    assert not fc.same_bits(a, {**a, "y": np.ones(2, np.float32)})
    assert fc.same_bits({"x": np.array([1], ">i4")}, {"x": np.array([1], "<i4")})


@pytest.mark.parametrize(
    ("a", "b", "ulps"),
    [
        (np.float32(1), np.nextafter(np.float32(1), np.float32(2)), 1),
        (np.float32(-1), np.nextafter(np.float32(-1), np.float32(2)), 1),
        (np.float64(0.0), np.float64(-0.0), 0),
        (np.float64(5e-324), np.float64(-5e-324), 2),
        (np.float16(1), np.float16(2), 1024),
        (np.uint8(250), np.uint8(5), 245),
        (np.int8(-128), np.int8(127), 255),
        (np.int64(-(2**63)), np.int64(2**63 - 1), 2**64 - 1),
        (ml_dtypes.bfloat16(1), ml_dtypes.bfloat16(1.0078125), 1),
        (np.float32("inf"), np.float32("nan"), 1),
        (np.float16(65504), -np.float16("nan"), 2),
        (ml_dtypes.bfloat16("inf"), ml_dtypes.bfloat16("nan"), 1),
        (ml_dtypes.float8_e4m3fn(448), ml_dtypes.float8_e4m3fn("nan"), 1),
        (ml_dtypes.float8_e4m3fnuz(0), ml_dtypes.float8_e4m3fnuz("nan"), 128),
        (ml_dtypes.float8_e5m2(57344), ml_dtypes.float8_e5m2("nan"), 2),
    ],
)
def test_the_distance_is_in_steps_between_neighbours(a: Any, b: Any, ulps: int) -> None:
    one, other = np.array([a, a]), np.array([a, b])
    for left, right in ((one, other), (other, one)):
        result = fc.compare({"x": left}, {"x": right})["x"]
        assert result.largest_ulps == ulps
        assert result.differing == 1


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("dtype", "a", "b", "difference", "nan_in_one"),
    [
        ("float32", [1, 2, 3], [1, 2.5, 1], 2.0, 0),
        ("float32", [1, 16777216], [1, -0.25], 16777216.25, 0),
        ("float16", [0, -0.0], [-0.0, 0], 0.0, 0),
        ("bfloat16", [1, 2], [1.0078125, 2], 0.0078125, 0),
        ("float64", [5e-324], [-5e-324], 1e-323, 0),
        ("float64", [1.7e308], [-1.7e308], INF, 0),
        ("float64", [INF, -INF, 1], [INF, -INF, 2], 1.0, 0),
        ("float64", [INF, 1], [-INF, 1], INF, 0),
        ("float64", [NAN, NAN, 1, 2], [NAN, 7, NAN, 3], 1.0, 2),
        ("float64", [NAN], [-NAN], 0.0, 0),
        ("float64", [NAN], [1], 0.0, 1),
        ("int64", [-(2**63), 0], [2**63 - 1, 0], 2**64 - 1, 0),
        ("uint8", [3], [250], 247, 0),
    ],
)
def test_the_largest_difference_leaves_nan_out(
    dtype: str, a: list[float], b: list[float], difference: float, nan_in_one: int
) -> None:
    one, other = (np.array(values, fc.model.dtype_named(dtype)) for values in (a, b))
    for left, right in ((one, other), (other, one), (one[:, None], other[:, None])):
        result = fc.compare({"x": left}, {"x": right})["x"]
        assert (result.largest_difference, result.nan_in_one) == (difference, nan_in_one)
        assert type(result.largest_difference) is type(difference)
    scalars = fc.compare({"x": one[0]}, {"x": one[0]})["x"]
    assert (scalars.differing, scalars.largest_difference) == (0, 0)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_of_a_subclass_are_compared_as_plain_ones() -> None:
    result = fc.compare({"x": np.matrix([[1.0, 2.0]])}, {"x": np.array([[1.0, 4.0]])})["x"]
    assert (result.differing, result.largest_difference) == (1, 2.0)


def test_an_empty_array_differs_nowhere() -> None:
    result = fc.compare({"x": np.empty((0, 2))}, {"x": np.empty((0, 2))})["x"]
    assert (result.differing, result.largest_ulps) == (0, 0)


def test_models_of_other_shapes_cannot_be_compared() -> None:
    with pytest.raises(fc.UsageError, match=r"only one of the two models has the keys \['y'\]"):
        fc.compare({"x": np.ones(2), "y": np.ones(1)}, {"x": np.ones(2)})
    with pytest.raises(fc.UsageError, match=r"one model has float64\[2\], the other float64\[3\]"):
        fc.compare({"x": np.ones(2)}, {"x": np.ones(3)})
