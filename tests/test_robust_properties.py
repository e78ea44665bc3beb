"""Robust means on models of every kind: any dtype, shape and value, whole or in parts."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedavg_core as fc
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.testing import fractions_of, round_fraction, weighted_models

Weighted = tuple[list[dict[str, Any]], list[float]]

FEW = settings(max_examples=settings().max_examples // 4)

MAKERS: list[Callable[[], RobustMean]] = [
    fc.CoordinateMedian,
    lambda: fc.TrimmedMean(0.3),
    lambda: fc.Krum(1),
    lambda: fc.MultiKrum(1, 2),
    lambda: fc.GeometricMedian(3),
    lambda: fc.ClippedMean(1.0),
]


def rows(kind: type[RobustMean], count: int) -> slice:
    """Which of the sorted values count, told another way than the code tells it."""
    if kind is fc.CoordinateMedian:
        middle = {index for index in range(count) if min(index, count - 1 - index) * 2 + 1 >= count}
        middle |= {count // 2, (count - 1) // 2}
        return slice(min(middle), max(middle) + 1)
    cut = 3 * count // 10
    return slice(cut, count - cut)


@pytest.mark.parametrize("make", MAKERS[:2])
@given(data=st.data(), weighted=weighted_models(max_models=7, partial=True))
def test_coordinate_wise_rules_give_the_correctly_rounded_mean_of_the_middle(
    make: Callable[[], RobustMean], weighted: Weighted, data: st.DataObject
) -> None:
    models, weights = weighted
    mean = make()
    order = data.draw(st.permutations(range(len(models))))
    first = models[order[0]]
    mean.add_many([(models[i], weights[i]) for i in order])
    for key, array in mean.mean().items():
        sent = [fractions_of(model[key]) for model in models if key in model]
        chosen = rows(type(mean), len(sent))
        for value, column in zip(array.ravel(), zip(*sent, strict=True), strict=True):
            middle = sorted(column)[chosen]
            expected = round_fraction(sum(middle, Fraction(0)) / len(middle), array.dtype)
            assert value.tobytes() == expected.tobytes()
    assert set(first) <= set(mean.keys)


@pytest.mark.parametrize("make", MAKERS)
@FEW
@given(data=st.data(), weighted=weighted_models(min_models=5, max_models=7))
def test_no_order_and_no_grouping_shows_in_a_bit(
    make: Callable[[], RobustMean], weighted: Weighted, data: st.DataObject
) -> None:
    pairs = list(zip(*weighted, strict=True))
    mean, first, second = make(), make(), make()
    mean.add_many(pairs)
    turned = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, len(pairs)))
    first.add_many(turned[:cut])
    second.add_many(turned[cut:])
    first.merge(second)
    try:
        expected = mean.mean()
    except fc.OutOfRange:
        with pytest.raises(fc.OutOfRange):
            first.mean()
        return
    assert fc.same_bits(first.mean(), expected)


@pytest.mark.parametrize("make", MAKERS[:5])
@FEW
@given(weighted=weighted_models(min_models=5, max_models=7))
def test_the_result_is_within_the_hull_of_the_updates(
    make: Callable[[], RobustMean], weighted: Weighted
) -> None:
    models, weights = weighted
    mean = make()
    mean.add_many(zip(models, weights, strict=True))
    for key, array in mean.mean().items():
        columns = zip(*(fractions_of(model[key]) for model in models), strict=True)
        for value, column in zip(fractions_of(array), columns, strict=True):
            assert min(column) <= value <= max(column)


@pytest.mark.parametrize("make", MAKERS[:5])
@FEW
@given(weighted=weighted_models(max_models=1), count=st.integers(5, 7))
def test_equal_updates_give_that_update(
    make: Callable[[], RobustMean], weighted: Weighted, count: int
) -> None:
    (model,), (weight,) = weighted
    mean = make()
    mean.add_many([(model, weight)] * count)
    for key, array in mean.mean().items():
        assert np.array_equal(array, model[key])
        assert array.dtype == model[key].dtype.newbyteorder("=")


FLOATS = fc.ModelSpec.of({"a": np.zeros(3), "b": np.zeros((2, 1))})


@given(weighted=weighted_models(FLOATS, max_models=1), limit=st.floats(1e-290, 1e290))
def test_no_clipped_difference_is_longer_than_the_limit(weighted: Weighted, limit: float) -> None:
    (model,), (weight,) = weighted
    mean = fc.ClippedMean(limit)
    mean.add(model, weight)
    found = mean.mean()
    square = sum(x * x for array in model.values() for x in fractions_of(array))
    squares = sum(x * x for array in found.values() for x in fractions_of(array))
    most = Fraction(limit) ** 2
    slack = Fraction(1, 10**12)
    assert squares <= most * (1 + slack)
    if square <= most * (1 - slack):
        assert all(np.array_equal(array, model[key]) for key, array in found.items())
    elif square >= most * (1 + slack):
        assert squares >= most * (1 - slack)
