"""Differences and their application."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core as fc
from fedavg_core.testing import exact_weighted_mean, fractions_of
from fedavg_core.testing import strategies as fst
from fedavg_core.transfer import change


def test_the_difference_is_what_the_base_lacks() -> None:
    base: dict[str, Any] = {"w": np.array([1.0, 2.0], np.float32), "frozen": np.ones(3)}
    local = {"w": np.array([1.5, 1.0], np.float32)}
    difference = fc.diff(local, base)
    assert list(difference) == ["w"]
    assert difference["w"].tolist() == [0.5, -1.0]
    assert difference["w"].dtype == np.float32
    result = fc.apply(base, difference)
    assert fc.same_bits(result, {"w": local["w"], "frozen": base["frozen"]})
    assert not np.shares_memory(result["frozen"], base["frozen"])


@pytest.mark.parametrize(
    ("local", "base", "difference"),
    [
        (np.array([1.5], np.float32), np.array([0.1]), np.array([1.5 - 0.1])),
        (np.array([1.5]), np.array([0.5], np.float16), np.array([1.0])),
        (np.array([3], np.int8), np.array([2**62 + 1]), np.array([2 - 2**62])),
        (np.array([2**62], np.uint64), np.array([1], np.int32), np.array([2**62 - 1])),
        (np.array([7]), np.array([0.5], np.float32), np.array([6.5])),
        (np.array([0.25]), np.array([7], np.uint8), np.array([-6.75])),
        (np.array([2.0], ">f4"), np.array([0.5], np.float32), np.array([1.5], np.float32)),
    ],
)
def test_a_change_of_another_dtype_is_taken_in_a_wide_one(
    local: Any, base: Any, difference: Any
) -> None:
    changed = change({"x": local}, {"x": base, "frozen": np.ones(3)})
    assert fc.same_bits(changed, {"x": difference})


@pytest.mark.parametrize(
    "value",
    [np.ones(2), np.array(1.0), [1.0], "x", None, np.ones(1, complex), np.array([True]), object()],
)
def test_what_cannot_be_a_difference_is_left_for_the_round_to_judge(value: Any) -> None:
    changed = change({"x": value, "another": value, 5: value}, {"x": np.ones(1)})
    assert all(changed[key] is value for key in ("x", "another", 5))
    assert change(value, {"x": np.ones(1)}) is value


def test_a_change_that_no_integer_of_64_bits_holds_is_an_error() -> None:
    with pytest.raises(fc.OutOfRange, match="key 'x': a difference is beyond"):
        change({"x": np.array([2**63], np.uint64)}, {"x": np.array([1])})


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int64", "uint64"])
def test_the_difference_of_integers_is_exact_and_may_be_negative(dtype: str) -> None:
    info = np.iinfo(dtype)
    low = info.max - 100 if dtype == "uint64" else max(info.min, -(2**62))
    high = min(info.max, 2**62) if dtype == "int64" else info.max
    base = {"n": np.array([high, low, 5], dtype)}
    local = {"n": np.array([low, high, 5], dtype)}
    if dtype == "int64":
        local["n"][:2] = base["n"][:2] // 2
    difference = fc.diff(local, base)
    assert difference["n"].dtype == np.int64
    exact = [int(a) - int(b) for a, b in zip(local["n"], base["n"], strict=True)]
    assert difference["n"].tolist() == exact
    assert fc.same_bits(fc.apply(base, difference), local)


@pytest.mark.parametrize(
    ("local", "base"),
    [
        (np.array([2**63 - 1]), np.array([-1])),
        (np.array([-(2**63)]), np.array([1])),
        (np.array([2**64 - 1], np.uint64), np.array([0], np.uint64)),
        (np.array([0], np.uint64), np.array([2**63 + 1], np.uint64)),
        (np.array([60000], np.float16), np.array([-60000], np.float16)),
        (np.array([1.7e308]), np.array([-1.7e308])),
    ],
)
def test_a_difference_too_large_for_its_dtype_is_an_error(local: Any, base: Any) -> None:
    with pytest.raises(fc.OutOfRange, match="key 'x': a difference is beyond the largest number"):
        fc.diff({"x": local}, {"x": base})


@pytest.mark.parametrize(
    ("local", "text"),
    [
        ({"v": np.ones(2)}, "key 'v': the base does not have it"),
        ({"w": np.ones(3)}, r"key 'w': expected float64\[2\] as in the base, got float64\[3\]"),
        ({"w": np.ones(2, np.float32)}, r"expected float64\[2\] as in the base, got float32\[2\]"),
        (7, "expected a model as a mapping from names to arrays, got an int"),
    ],
)
def test_what_the_base_does_not_match_is_named(local: Any, text: str) -> None:
    with pytest.raises(fc.UsageError, match=text):
        fc.diff(local, {"w": np.ones(2)})


@pytest.mark.parametrize("use", [fc.apply, lambda base, model: fc.diff(model, base)])
@pytest.mark.parametrize(
    ("base", "text"),
    [
        (7, "expected a model as a mapping from names to arrays, got an int"),
        ({"w": ["a"]}, "key 'w': expected a NumPy array in the base, got a list"),
    ],
)
def test_a_base_that_is_no_model_is_the_callers_mistake(use: Any, base: Any, text: str) -> None:
    with pytest.raises(fc.UsageError, match=text):
        use(base, {"w": np.ones(2)})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_some_of_the_parameters_may_be_applied_and_no_zero_is_negative(dtype: str) -> None:
    base = {"a": -np.zeros(2, dtype), "b": np.ones((), dtype), "c": np.ones(3, ">f4")}
    result = fc.apply(base, {"c": np.ones(3, np.float32), "a": -np.zeros(2, dtype)})
    assert list(result) == ["a", "b", "c"]
    assert not np.signbit(result["a"]).any()
    assert result["b"] is not base["b"]
    assert result["c"].tolist() == [2.0, 2.0, 2.0]


def test_what_cannot_be_applied_is_told() -> None:
    base = {"w": np.ones(2, np.float32)}
    with pytest.raises(fc.RefusedUpdate, match="a mapping from names to arrays"):
        fc.apply(base, [np.ones(2, np.float32)])  # type: ignore[arg-type]
    with pytest.raises(fc.UsageError, match=r"shape \(3,\)"):
        fc.apply(base, {"w": np.ones(3, np.float32)})
    with pytest.raises(fc.RefusedUpdate, match="names that are strings"):
        fc.apply(base, {1: np.ones(2, np.float32)})  # type: ignore[dict-item]
    scalars: dict[str, Any] = {"w": np.float32(1)}
    assert fc.apply(scalars, scalars)["w"] == 2


def test_applying_nothing_copies_the_base() -> None:
    base = {"w": np.ones(2)}
    assert fc.same_bits(fc.apply(base, {}), base)


@pytest.mark.parametrize("nothing", [None, 0, "", [], False, np.ones(2)])
def test_what_is_no_difference_is_refused(nothing: Any) -> None:
    with pytest.raises(fc.RefusedUpdate, match="DTYPE: expected a mapping from names to arrays"):
        fc.apply({"w": np.ones(2)}, nothing)


def test_a_sum_is_rounded_once_to_the_dtype_of_the_base() -> None:
    base = {"w": np.array([1.0], np.float32)}
    result = fc.apply(base, {"w": np.array([2.0**-24 + 2.0**-60])})
    assert result["w"].tolist() == [float(np.nextafter(np.float32(1), np.float32(2)))]
    assert result["w"].dtype == np.float32


@given(fst.weighted_models(min_models=2, max_models=2))
def test_what_is_applied_is_the_exact_sum_rounded_once(drawn: Any) -> None:
    (base, difference), _ = drawn
    try:
        expected = exact_weighted_mean([difference], [1], base=base)
    except fc.OutOfRange:
        with pytest.raises(fc.OutOfRange):
            fc.apply(base, difference)
        return
    assert fc.same_bits(fc.apply(base, difference), expected)


def test_infinite_inputs_are_left_for_the_gate_to_name() -> None:
    difference = fc.diff({"w": np.array([np.inf])}, {"w": np.array([1.0])})
    with pytest.raises(fc.RefusedUpdate, match="NON_FINITE"):
        fc.apply({"w": np.array([1.0])}, difference)


@given(st.integers(0, 2**30), st.integers(1, 5), st.sampled_from(["float16", "float32", "float64"]))
def test_full_and_diff_give_equal_bits_where_every_difference_is_exact(
    seed: int, clients: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    base = {"w": (rng.integers(-512, 512, 20) / 64).astype(dtype)}
    locals_ = [{"w": (rng.integers(-512, 512, 20) / 64).astype(dtype)} for _ in range(clients)]
    weights = [int(w) for w in rng.integers(1, 1000, clients)]
    full = fc.weighted_mean(locals_, weights)
    differences = [fc.diff(local, base) for local in locals_]
    assert fc.same_bits(fc.weighted_mean(differences, weights, base=base), full)


@given(fst.weighted_models(max_models=2))
def test_a_difference_that_is_exact_leads_back_to_the_model(drawn: Any) -> None:
    models, _ = drawn
    base, local = models[0], models[-1]
    try:
        difference = fc.diff(local, base)
    except fc.OutOfRange:
        return
    result = fc.apply(base, difference)
    for key, value in difference.items():
        exact = [
            after - before
            for after, before in zip(fractions_of(local[key]), fractions_of(base[key]), strict=True)
        ]
        if fractions_of(value) == exact:
            assert np.array_equal(result[key], local[key])
