"""Robust means: against the published rules written down a second time, and against Flower's."""

from __future__ import annotations

import gc
import importlib
import itertools
import math
import random
import statistics
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core as fc
from fedavg_core.any_accumulator import accumulator_from_state
from fedavg_core.model import dtype_named, number_format
from fedavg_core.robust.kept_updates import CoordinateWise, WholeVector
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.robust.rules import (
    ROBUST_MEANS,
    ClippedMean,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    TrimmedMean,
    robust_mean,
)
from fedavg_core.testing import check_aggregator, fractions_of
from fedavg_core.testing.oracle import round_fraction
from tests.conftest import THOROUGH

Model = dict[str, npt.NDArray[Any]]
EVERY: list[RobustMean] = [
    CoordinateMedian(),
    TrimmedMean(0.3),
    Krum(1),
    MultiKrum(1, 3),
    GeometricMedian(),
    ClippedMean(2.0),
]
KEPT = EVERY[:-1]
SHUFFLES = 20 if THOROUGH else 4


def named(mean: RobustMean) -> str:
    return mean.name


Values = list[list[Fraction]]
"""The values of one coordinate after the other, those of all updates."""


def coordinates(updates: Sequence[Model], key: str) -> Values:
    columns = [fractions_of(update[key]) for update in updates if key in update]
    return [list(column) for column in zip(*columns, strict=True)]


def rounded(values: Sequence[Fraction], like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    numbers = [round_fraction(value, like.dtype) for value in values]
    return np.array(numbers, like.dtype).reshape(like.shape)


def plain_median(updates: Sequence[Model], key: str) -> list[Fraction]:
    return [statistics.median(column) for column in coordinates(updates, key)]


def plain_trimmed_mean(updates: Sequence[Model], key: str, cut: int) -> list[Fraction]:
    result = []
    for column in coordinates(updates, key):
        left = sorted(column)
        for _ in range(cut):
            left.remove(max(left))
            left.remove(min(left))
        result.append(sum(left, Fraction(0)) / len(left))
    return result


def plain_krum(updates: Sequence[Model], faulty: int) -> list[int]:
    """The updates by their scores, the best first; in rational numbers."""
    vectors = [[x for key in sorted(u) for x in fractions_of(u[key])] for u in updates]
    scores = []
    for index, one in enumerate(vectors):
        distances = [
            sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
            for number, other in enumerate(vectors)
            if number != index
        ]
        scores.append(sum(sorted(distances)[: len(updates) - faulty - 2]))
    return sorted(range(len(updates)), key=scores.__getitem__)


def plain_geometric_median(
    updates: Sequence[Model], weights: Sequence[float], iterations: int, smoothing: float
) -> list[float]:
    """One long vector of all parameters in the order of their names, in float64."""
    vectors = np.array(
        [np.concatenate([u[k].ravel().astype(float) for k in sorted(u)]) for u in updates]
    )
    alphas = np.array(weights) / np.sum(weights)
    center = np.median(vectors, axis=0)
    for _ in range(iterations):
        distances = np.sqrt(((vectors - center) ** 2).sum(axis=1))
        betas = alphas / np.maximum(smoothing, distances)
        center = betas @ vectors / betas.sum()
    return [float(x) for x in center]


def updates_of(
    count: int, seed: int = 0, dtypes: Sequence[str] = ("float32", "float64", "float16", "int32")
) -> list[Model]:
    source = np.random.default_rng(seed)
    shapes = itertools.cycle([(3, 4), (5,), (), (2, 0), (2, 1, 3)])
    specs = [(f"p{i}", next(shapes), dtype) for i, dtype in enumerate([*dtypes, "float32"])]
    return [
        {
            key: np.asarray(source.normal(size=shape) * (40 if "int" in dtype else 1)).astype(dtype)
            for key, shape, dtype in specs
        }
        for _ in range(count)
    ]


def mean_of(mean: RobustMean, updates: Sequence[Model], weights: Sequence[float] = ()) -> Model:
    mean = mean.empty(None)
    for update, weight in itertools.zip_longest(updates, weights, fillvalue=1):
        mean.add(update, weight)  # type: ignore[arg-type]
    return mean.mean()


class TestThePublishedRules:
    """Each against a plain reimplementation in rational numbers."""

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
    def test_the_median(self, count: int) -> None:
        updates = updates_of(count, count)
        found = mean_of(CoordinateMedian(), updates, range(1, count + 1))
        for key, array in updates[0].items():
            assert fc.same_bits(
                {key: found[key]}, {key: rounded(plain_median(updates, key), array)}
            )

    @pytest.mark.parametrize(
        ("trim", "count", "cut"),
        [(0.0, 4, 0), (0.1, 9, 0), (0.1, 10, 1), (0.25, 8, 2), (0.29, 100, 29), (0.49, 3, 1)],
    )
    def test_the_trimmed_mean(self, trim: float, count: int, cut: int) -> None:
        updates = updates_of(count, count, ("float32", "int8"))
        found = mean_of(TrimmedMean(trim), updates, range(1, count + 1))
        for key, array in updates[0].items():
            expected = rounded(plain_trimmed_mean(updates, key, cut), array)
            assert fc.same_bits({key: found[key]}, {key: expected})

    @pytest.mark.parametrize(("faulty", "count"), [(0, 4), (1, 5), (1, 8), (2, 9), (3, 9)])
    def test_krum(self, faulty: int, count: int) -> None:
        for seed in range(3):
            updates = updates_of(count, seed)
            best = plain_krum(updates, faulty)[0]
            assert fc.same_bits(mean_of(Krum(faulty), updates, range(1, count + 1)), updates[best])

    @pytest.mark.parametrize(("faulty", "keep", "count"), [(0, 1, 4), (1, 3, 5), (1, 8, 8)])
    def test_multi_krum(self, faulty: int, keep: int, count: int) -> None:
        for seed in range(3):
            updates = updates_of(count, seed)
            best = [updates[index] for index in plain_krum(updates, faulty)[:keep]]
            found = mean_of(MultiKrum(faulty, keep), updates, range(1, count + 1))
            assert fc.same_bits(found, fc.weighted_mean(best, [1] * keep))

    @pytest.mark.parametrize(
        ("iterations", "smoothing"), [(1, 0.01), (2, 0.01), (25, 0.01), (3, 0.5)]
    )
    def test_the_geometric_median(self, iterations: int, smoothing: float) -> None:
        updates = updates_of(6, 1, ("float64", "float64"))
        for update in updates:
            for key in update:
                update[key] = update[key].astype(np.float64) * 0.1
        weights = [3, 1, 4, 1, 5, 0.5]
        found = mean_of(GeometricMedian(iterations, smoothing), updates, weights)
        expected = plain_geometric_median(updates, weights, iterations, smoothing)
        vector = np.concatenate([found[key].ravel() for key in sorted(found)])
        np.testing.assert_allclose(vector, expected, rtol=1e-12, atol=1e-14)

    def test_the_geometric_median_of_an_update_that_outweighs_the_others_is_it(self) -> None:
        updates = [{"w": np.array([float(x), 1.0])} for x in (3, 5, -2)]
        found = mean_of(GeometricMedian(200, 1e-9), updates, [9, 2, 3])
        np.testing.assert_allclose(found["w"], [3.0, 1.0], atol=1e-6)

    def test_the_clipped_mean(self) -> None:
        updates = [
            {"w": np.array([3.0, 4.0]), "b": np.zeros(2, np.float32)},  # the norm is 5
            {"w": np.array([0.0, 0.5]), "b": np.array([0.25, 0], np.float32)},
            {"w": np.array([0.0, 0.0]), "b": np.array([0, -12.0], np.float32)},
        ]
        found = mean_of(ClippedMean(2.5), updates, [1, 2, 5])
        expected = {
            "w": rounded([Fraction(3, 2) / 8, Fraction(2 + 1) / 8], updates[0]["w"]),
            "b": rounded([Fraction(1, 2) / 8, -5 * 12 * Fraction(2.5 / 12.0) / 8], updates[0]["b"]),
        }
        assert fc.same_bits(found, expected)

    def test_the_clipped_mean_of_random_differences(self) -> None:
        updates, weights = updates_of(7, 3, ("float32", "float64")), [1, 2, 3, 4, 5, 0.5, 7]
        found = mean_of(ClippedMean(5.0), updates, weights)
        norms = [
            math.sqrt(math.fsum(float(x) ** 2 for a in u.values() for x in a.ravel()))
            for u in updates
        ]
        assert 0 < sum(norm > 5 for norm in norms) < 7
        for key in found:
            expected = sum(
                w * u[key].astype(float) * min(1.0, 5.0 / norm)
                for u, w, norm in zip(updates, weights, norms, strict=True)
            ) / sum(weights)
            np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=1e-7)


class TestFlower:
    """The same updates through Flower's functions, where it is installed."""

    @staticmethod
    def results(updates: Sequence[Model]) -> list[tuple[list[npt.NDArray[Any]], int]]:
        return [(list(update.values()), 1) for update in updates]

    def test_the_median_the_trimmed_mean_and_krum_agree(self) -> None:
        pytest.importorskip("flwr")
        theirs = importlib.import_module("flwr.server.strategy.aggregate")
        for seed in range(5):
            updates = updates_of(9, seed, ("float64", "float64"))
            for update in updates:
                update["p2"] = update["p2"].astype(np.float64)
            cases: list[tuple[RobustMean, Any]] = [
                (CoordinateMedian(), theirs.aggregate_median(self.results(updates))),
                (TrimmedMean(0.25), theirs.aggregate_trimmed_avg(self.results(updates), 0.25)),
                (Krum(2), theirs.aggregate_krum(self.results(updates), 2, 0)),
                (MultiKrum(2, 4), theirs.aggregate_krum(self.results(updates), 2, 4)),
            ]
            for mean, expected in cases:
                found = mean_of(mean, updates)
                for array, wanted in zip(found.values(), expected, strict=True):
                    np.testing.assert_allclose(array, wanted, rtol=1e-13, atol=1e-15)
                if isinstance(mean, (CoordinateMedian, Krum)) and not isinstance(mean, MultiKrum):
                    assert all(
                        np.array_equal(a, b) for a, b in zip(found.values(), expected, strict=True)
                    )


class TestAnAttack:
    """What they are for: a few updates, however bad, do not carry off the model."""

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_two_of_nine_cannot(self, mean: RobustMean) -> None:
        mean = {"krum": Krum(2), "multi-krum": MultiKrum(2, 3)}.get(mean.name, mean)
        source = np.random.default_rng(4)
        honest = [{"w": (source.normal(size=20) * 0.1).astype(np.float32)} for _ in range(7)]
        attack = [{"w": np.full(20, value, np.float32)} for value in (1e30, 3e30)]
        found = mean_of(mean, [*honest, *attack])
        worst = max(float(np.abs(update["w"]).max()) for update in honest)
        assert float(np.abs(found["w"]).max()) <= max(worst, 2.0)
        plain = fc.weighted_mean([*honest, *attack], [1] * 9)
        assert float(np.abs(plain["w"]).min()) > 1e29

    @pytest.mark.parametrize("mean", [*EVERY[:4]], ids=named)
    def test_a_claimed_weight_does_not_count_where_weights_are_ignored(
        self, mean: RobustMean
    ) -> None:
        updates = updates_of(6)
        plain = mean_of(mean, updates)
        assert fc.same_bits(mean_of(mean, updates, [1, 10**9, 1, 0.001, 7, 1]), plain)
        assert mean.ignores_weights

    @pytest.mark.parametrize("mean", EVERY[4:], ids=named)
    def test_it_counts_where_the_paper_has_it(self, mean: RobustMean) -> None:
        updates = updates_of(6)
        plain = mean_of(mean, updates)
        assert not fc.same_bits(mean_of(mean, updates, [1, 10**9, 1, 0.001, 7, 1]), plain)
        assert not mean.ignores_weights
        # Only what they are to each other counts.
        assert fc.same_bits(mean_of(mean, updates, [3] * 6), plain)


class TestOrder:
    """Neither it nor the grouping shows in a bit."""

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_shuffled_and_merged_updates_give_the_same_bits(self, mean: RobustMean) -> None:
        updates = updates_of(9, 2)
        weights = [random.Random(1).choice([0.1, 3, 250]) for _ in updates]
        expected = mean_of(mean, updates, weights)
        pairs = list(zip(updates, weights, strict=True))
        for shuffle in range(SHUFFLES):
            random.Random(shuffle).shuffle(pairs)
            whole, first, second = mean.empty(None), mean.empty(None), mean.empty(None)
            whole.add_many(pairs)
            first.add_many(pairs[:4])
            second.add_many(pairs[4:])
            first.merge(second)
            assert fc.same_bits(whole.mean(), expected)
            assert fc.same_bits(first.mean(), expected)
            assert (first.count, first.total_weight) == (9, sum(map(Fraction, weights)))
            assert (first.nbytes, second.count) == (whole.nbytes, 5)
            assert first.digest() == whole.digest() != second.digest()

    def test_krums_ties_are_settled_by_the_content(self) -> None:
        # All of them have the same score.
        updates = [{"w": np.array([float(x), float(y)])} for x in (0, 1) for y in (0, 1)]
        found = {
            tuple(mean_of(Krum(0), order)["w"].tolist())
            for order in itertools.permutations(updates)
        }
        assert len(found) == 1

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_the_order_of_the_keys_does_not_show(self, mean: RobustMean) -> None:
        updates = updates_of(5)
        turned = [dict(reversed(update.items())) for update in updates]
        assert fc.same_bits(mean_of(mean, updates), mean_of(mean, turned))

    @given(
        st.lists(
            st.lists(
                st.one_of(
                    st.integers(-(2**63), 2**63 - 1),
                    st.sampled_from([2**53, 2**53 + 1, 2**62 + 1, 2**62, -(2**62) - 1, 0]),
                ),
                min_size=3,
                max_size=3,
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_whole_numbers_of_64_bits_are_compared_exactly(self, rows: list[list[int]]) -> None:
        updates = [{"n": np.array(row, np.int64)} for row in rows]
        expected = rounded(plain_median(updates, "n"), updates[0]["n"])
        assert fc.same_bits(mean_of(CoordinateMedian(), updates), {"n": expected})

    def test_dtypes_may_be_mixed(self) -> None:
        updates: list[Model] = [
            {"n": np.array([2**63 + 1025, 3], np.uint64)},
            {"n": np.array([2**62 + 1, -3], np.int64)},
            {"n": np.array([2.0**63, 2.5])},
            {"n": np.array([100, -100], np.int8)},
            {"n": np.array([2**63 + 1024, 2], np.uint64)},
        ]
        spec = fc.ModelSpec.of(updates[0])
        for order in itertools.permutations(updates):
            mean = CoordinateMedian(spec)
            mean.add_many([(update, 1) for update in order])
            assert mean.mean()["n"].tolist() == [2**63, 2]
            assert mean.mean()["n"].dtype == np.uint64

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "int64", "uint8"])
    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_every_dtype_is_kept(self, mean: RobustMean, dtype: str) -> None:
        pytest.importorskip("ml_dtypes")
        updates = [{"w": np.array([x, x + 1, 2 * x + 1], dtype_named(dtype))} for x in range(5)]
        found = mean_of(mean, updates)["w"]
        assert found.dtype == dtype_named(dtype)
        assert number_format(found.dtype) is not None
        if isinstance(mean, (CoordinateMedian, TrimmedMean)):
            assert found.astype(float).tolist() == [2.0, 3.0, 5.0]


class TestAsAnAccumulator:
    """What `WeightedMean` promises, as far as it makes sense."""

    @pytest.mark.parametrize(
        ("make", "rule"),
        [
            (CoordinateMedian, {"correctly rounded", "partial updates"}),
            (TrimmedMean, {"correctly rounded", "partial updates"}),
            (GeometricMedian, {"correctly rounded", "partial updates"}),
            # Krum is not defined for as few updates as the kit has: a rule of its kind.
            (lambda: Lenient(), {"correctly rounded", "partial updates", "every memory layout"}),
            (lambda: ClippedMean(1e300), set()),
        ],
    )
    def test_the_conformance_kit_finds_what_the_rule_brings_with_it_only(
        self, make: Callable[[], RobustMean], rule: set[str]
    ) -> None:
        table = check_aggregator(make)
        assert set(table.broken) == rule, str(table)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_a_base_is_added_with_the_one_rounding(self, mean: RobustMean) -> None:
        updates = updates_of(5, 6)
        base: Model = {
            **{key: (array * 3).astype(array.dtype) for key, array in updates[0].items()},
            "frozen": np.array([1.5, 2.5]),
        }
        base["p0"] = base["p0"].astype(np.float16)
        wide = mean.empty(None)
        narrow = mean.empty(None)
        wide.add_many([(u, 1) for u in updates])
        narrow.add_many([(u, 1) for u in updates])
        found = narrow.mean(base)
        assert list(found) == list(base)
        assert fc.ModelSpec.of(found) == fc.ModelSpec.of(base)
        assert found["frozen"].tolist() == [1.5, 2.5]
        assert not np.shares_memory(found["frozen"], base["frozen"])
        exact = wide.mean({key: np.zeros(array.shape) for key, array in base.items()})
        for key in updates[0]:
            near = exact[key] + base[key].astype(float)
            ulp = 2.0 ** -(fc.ModelSpec.of(found)[key].number.precision - 2)
            loose = 0.6 if base[key].dtype.kind == "i" else 1e-12
            assert np.all(np.abs(found[key].astype(float) - near) <= ulp * np.abs(near) + loose)

    @pytest.mark.parametrize("mean", [CoordinateMedian(), TrimmedMean(0.2)], ids=named)
    def test_the_result_with_a_base_is_correctly_rounded(self, mean: RobustMean) -> None:
        updates = updates_of(6, 7, ("float32", "float16"))
        base = {key: (array * 3).astype(array.dtype) for key, array in updates[1].items()}
        kept = mean.empty(fc.ModelSpec.of(base))
        kept.add_many([(u, 1) for u in updates])
        found = kept.mean(base)
        for key, array in base.items():
            plain = (
                plain_median(updates, key)
                if isinstance(mean, CoordinateMedian)
                else plain_trimmed_mean(updates, key, 1)
            )
            sums = [b + x for b, x in zip(fractions_of(array), plain, strict=True)]
            assert fc.same_bits({key: found[key]}, {key: rounded(sums, array)})

    @pytest.mark.parametrize("mean", [CoordinateMedian(), TrimmedMean()], ids=named)
    def test_each_coordinate_is_that_of_the_updates_that_brought_it(self, mean: RobustMean) -> None:
        updates = [
            {"a": np.array([1.0]), "b": np.array([5.0])},
            {"a": np.array([3.0])},
            {"a": np.array([8.0]), "c": np.array([7.0])},
        ]
        found = mean_of(mean, updates)
        middle = 3.0 if mean.name == "median" else 4.0
        assert {key: array.tolist() for key, array in found.items()} == {
            "a": [middle], "b": [5.0], "c": [7.0],
        }  # fmt: skip

    @pytest.mark.parametrize("mean", KEPT[2:], ids=named)
    def test_whole_vectors_must_have_all_parameters(self, mean: RobustMean) -> None:
        one, two = {"a": np.ones(2), "b": np.ones(1)}, {"a": np.ones(2)}
        for spec in (None, fc.ModelSpec.of(one)):
            kept = mean.empty(spec)
            kept.add(one, 1)
            with pytest.raises(fc.RefusedUpdate, match=r"MISSING_KEYS .key 'b'.: expected all 2 p"):
                kept.add(two, 1)
            with pytest.raises(fc.RefusedUpdate, match=r"UNEXPECTED_KEYS .key 'c'."):
                kept.add({**one, "c": np.ones(1)}, 1)
            assert kept.count == 1
        with pytest.raises(fc.RefusedUpdate, match="MISSING_KEYS"):
            mean.empty(fc.ModelSpec.of(one)).add(two, 1)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_an_update_is_added_whole_or_not_at_all(self, mean: RobustMean) -> None:
        updates = updates_of(5)
        kept = mean.empty(None)
        kept.add_many([(u, 1) for u in updates])
        expected = kept.mean()
        good = updates[0]
        bad: list[tuple[Any, Any, str]] = [
            (good, 0, "BAD_WEIGHT"),
            (good, Fraction(1, 3), "BAD_WEIGHT"),
            ({**good, "p1": np.full(5, np.nan)}, 1, "NON_FINITE .*key 'p1'.: .* got nan at .0."),
            ({**good, "p1": np.ones(4)}, 1, "SHAPE .*key 'p1'."),
            ({**good, "p1": None}, 1, "DTYPE .*key 'p1'."),
            ({}, 1, "MISSING_KEYS"),
            ([1], 1, "DTYPE"),
        ]
        for update, weight, told in bad:
            with pytest.raises(fc.RefusedUpdate, match=told):
                kept.add_many([(good, 1), (update, weight)])
            assert kept.count == 5
            assert fc.same_bits(kept.mean(), expected)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_it_starts_afresh_after_a_reset(self, mean: RobustMean) -> None:
        updates = updates_of(7)
        kept = mean.empty(fc.ModelSpec.of(updates[0]))
        kept.add_many([(u, 1) for u in updates[5:]])
        kept.reset()
        assert (kept.count, kept.keys, kept.nbytes, kept.total_weight) == (0, (), 0, 0)
        kept.add_many([(u, 1) for u in updates[:5]])
        assert fc.same_bits(kept.mean(), mean_of(mean, updates[:5]))
        assert kept.keys == tuple(updates[0])
        assert (kept.determinism, kept.needs_differences) == (
            "order-independent", isinstance(mean, ClippedMean)
        )  # fmt: skip

    def test_what_is_kept_is_counted_in_bytes(self) -> None:
        kept = CoordinateMedian()
        kept.add_many([({"a": np.ones(10, np.float32), "b": np.ones(3)}, 1)] * 3)
        assert kept.nbytes == 3 * (40 + 24)
        assert ClippedMean().nbytes == 0

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_nothing_cannot_be_averaged_but_added_to(self, mean: RobustMean) -> None:
        with pytest.raises(fc.UsageError, match="expected at least one update before the mean"):
            mean.empty(None).mean()
        base = {"a": np.ones(2)}
        assert fc.same_bits(mean.empty(None).mean(base), base)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_a_base_that_does_not_fit_is_a_usage_error(self, mean: RobustMean) -> None:
        kept = mean.empty(None)
        kept.add_many([({"a": np.ones(2)}, 1)] * 5)
        for base, told in (
            ({"b": np.ones(2)}, "key 'a': the base does not have it"),
            ({"a": np.ones(3)}, "key 'a': expected a base of shape"),
            ({"a": np.array([1, np.nan])}, "expected a base of finite numbers"),
        ):
            with pytest.raises(fc.UsageError, match=told):
                kept.mean(base)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_a_result_beyond_the_dtype_is_out_of_range(self, mean: RobustMean) -> None:
        kept = mean.empty(None)
        kept.add_many([({"a": np.array([[0.0, 1.0]])}, 1)] * 5)
        with pytest.raises(fc.OutOfRange, match=r"key 'a': the result at \[0, 1\] is beyond"):
            kept.mean({"a": np.array([[0, 127]], np.int8)})

    @pytest.mark.parametrize(("mean", "least"), [(Krum(1), 5), (Krum(0), 3), (MultiKrum(1, 7), 7)])
    def test_too_few_updates_are_a_usage_error(self, mean: RobustMean, least: int) -> None:
        assert mean.least == least
        kept = mean.empty(None)
        kept.add_many([({"a": np.ones(2)}, 1)] * (least - 1))
        with pytest.raises(fc.UsageError, match=f"at least {least} updates for a {mean.name}"):
            kept.mean()

    def test_many_elements_are_compared_some_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        updates, base = updates_of(5, 8), updates_of(1, 9)[0]
        made = [mean.empty(None) for mean in KEPT]
        for mean in made:
            mean.add_many([(update, 1) for update in updates])
        expected = [(mean.mean(), mean.mean(base)) for mean in made]
        monkeypatch.setattr("fedavg_core.robust.kept_updates._CELLS", 20)
        for few in (256, 1):
            monkeypatch.setattr("fedavg_core.robust.kept_updates._FEW", few)
            for mean, (alone, added) in zip(made, expected, strict=True):
                assert fc.same_bits(mean.mean(), alone)
                assert fc.same_bits(mean.mean(base), added)
        kept = CoordinateMedian()
        kept.add_many([({"a": np.arange(9.0)}, 1)] * 5)
        with pytest.raises(fc.OutOfRange, match=r"key 'a': the result at \[8\]"):
            kept.mean({"a": np.full(9, 120, np.int8)})

    def test_numbers_near_the_largest_do_not_overflow(self) -> None:
        for size in (1.0, 1e300, 1e-300, -1e300):
            updates = [{"a": np.array([x * size, 1e-300])} for x in (1.0, 1.25, 1.5, 99.0, 50.0)]
            assert mean_of(Krum(1), updates)["a"].tolist() == [1.25 * size, 1e-300]
            median = mean_of(GeometricMedian(100, 1e-9 * min(abs(size), 1)), updates)["a"][0]
            assert math.isclose(median, 1.5 * size, rel_tol=1e-6)
            clipped = mean_of(ClippedMean(0.5 * abs(size)), updates[3:4])["a"][0]
            assert math.isclose(clipped, 0.5 * size, rel_tol=1e-3)

    def test_equal_updates_have_themselves_for_a_geometric_median(self) -> None:
        update = {"a": np.array([0.1, 0.0, -3.0], np.float32)}
        assert fc.same_bits(mean_of(GeometricMedian(), [update] * 4, [1, 0.1, 9, 3]), update)
        nothing = {"a": np.zeros(3), "b": np.zeros((0,))}
        assert fc.same_bits(mean_of(GeometricMedian(), [nothing] * 2), nothing)

    def test_what_is_added_is_copied(self) -> None:
        given = {"a": np.ones(3)}
        kept = CoordinateMedian()
        kept.add(given, 1)
        given["a"][:] = 7
        given["b"] = np.ones(1)
        assert kept.mean()["a"].tolist() == [1.0, 1.0, 1.0]


class Lenient(WholeVector):
    """The first of the updates by their first value: a rule for any number of them."""

    name = "lenient"

    def weights(self) -> list[Any]:
        firsts = [
            tuple(float(x) for k in sorted(u.params) for x in u.params[k].ravel())
            for u in self.updates
        ]
        least = firsts.index(min(firsts))
        return [int(index == least) for index in range(self.count)]


class Largest(CoordinateWise):
    """A rule of one's own, coordinate by coordinate."""

    name = "largest"

    def rows(self, count: int) -> slice:
        return slice(count - 1, count)


class Rank(CoordinateWise):
    """The values of one place in the order."""

    name = "rank"
    options = ("rank",)

    def __init__(self, rank: int = 0, spec: fc.ModelSpec | None = None) -> None:
        self.rank = rank
        super().__init__(spec)

    def rows(self, count: int) -> slice:
        return slice(self.rank, self.rank + 1)


@pytest.mark.parametrize("count", [*range(1, 18), 33, 64, 257])
def test_columns_of_any_length_are_sorted(count: int) -> None:
    values = np.random.default_rng(count).integers(-count, count, (count, 40)).astype(np.float32)
    ordered = np.sort(values, axis=0)
    for rank in {0, 1 % count, count // 2, count - 1}:
        found = mean_of(Rank(rank), [{"a": row} for row in values])
        assert np.array_equal(found["a"], ordered[rank])


class TestRulesOfOnesOwn:
    """Said in a few lines."""

    def test_a_coordinate_wise_one(self) -> None:
        updates = [{"a": np.array([1.0, 5.0])}, {"a": np.array([2.0, 4.0])}]
        assert mean_of(Largest(), updates)["a"].tolist() == [2.0, 5.0]
        assert Largest().settings() == {"name": "largest"}

    def test_it_is_asked_once_for_the_same_updates(self) -> None:
        class Counting(Lenient):
            asked = 0

            def weights(self) -> list[Any]:
                self.asked += 1
                return super().weights()

        kept, update = Counting(), {"a": np.array([1.0, 5.0])}
        kept.add(update, 1)
        assert fc.same_bits(kept.mean(), kept.mean({"a": np.zeros(2)}))
        assert kept.asked == 1
        kept.add({"a": np.array([0.0, 6.0])}, 1)
        assert kept.mean()["a"].tolist() == [0.0, 6.0]
        kept.reset()
        kept.add_many([(update, 1)] * 2)
        assert fc.same_bits(kept.mean(), update)
        assert kept.asked == 3

    def test_one_of_whole_vectors(self) -> None:
        updates = [{"a": np.array([1.0, 5.0])}, {"a": np.array([2.0, 4.0])}]
        assert mean_of(Lenient(), updates)["a"].tolist() == [1.0, 5.0]


class TestMerging:
    """Only what is alike can be merged."""

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_another_rule_is_a_usage_error(self, mean: RobustMean) -> None:
        other: Any = TrimmedMean(0.4)
        with pytest.raises(fc.UsageError, match=r"to merge, got a .'name': 'trimmed-mean', 'trim'"):
            mean.empty(None).merge(other)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_other_parameters_are_a_usage_error(self, mean: RobustMean) -> None:
        one, two, three = mean.empty(None), mean.empty(None), mean.empty(None)
        one.add({"a": np.ones(2)}, 1)
        two.add({"a": np.ones(2, np.float32)}, 1)
        with pytest.raises(
            fc.UsageError, match=r"key 'a': expected float64\[2\], got float32\[2\]"
        ):
            one.merge(two)
        three.add({"b": np.ones(2)}, 1)
        fixed = mean.empty(fc.ModelSpec.of({"a": np.ones(2)}))
        with pytest.raises(fc.UsageError, match="key 'b': the spec does not name it"):
            fixed.merge(three)
        assert (one.count, fixed.count) == (1, 0)

    def test_whole_vectors_of_other_parameters_are_a_usage_error(self) -> None:
        one, two, none = Krum(), Krum(), Krum()
        one.add({"a": np.ones(2)}, 1)
        two.add({"b": np.ones(2)}, 1)
        with pytest.raises(fc.UsageError, match="expected updates of the same parameters to merge"):
            one.merge(two)
        one.merge(none)
        none.merge(one)
        assert (one.count, none.count, none.keys) == (1, 1, ("a",))

    def test_an_accumulator_can_be_merged_with_itself(self) -> None:
        one = CoordinateMedian()
        one.add({"a": np.ones(2)}, 1)
        one.merge(one)
        assert one.count == 2


def of_settings(settings: Any) -> fc.Round:
    return fc.Round({"w": np.ones(2)}, 0, accumulator=settings)


class TestByName:
    """For the command line and for settings that travel as JSON."""

    @pytest.mark.parametrize("name", ROBUST_MEANS)
    def test_settings_make_it_again(self, name: str) -> None:
        mean = robust_mean(name)
        assert type(mean) is ROBUST_MEANS[name]
        assert mean.settings()["name"] == name
        again = robust_mean(**mean.settings())
        assert again.settings() == mean.settings()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: robust_mean("mode"), "expected one of median, trimmed-mean, krum, multi-krum"),
            (lambda: robust_mean(["krum"]), r"expected one of median, .*, got \['krum'\]"),  # type: ignore[arg-type]
            (lambda: of_settings({}), r"expected its name and its options, got \{\}"),
            (lambda: of_settings({"name": "krum", 1: 2}), "expected its name and its options, got"),
            (lambda: of_settings({"name": "krum", "spec": None}), "expected its name and its opt"),
            (lambda: robust_mean("median", trim=1), "median: expected options out of none, got 't"),
            (lambda: robust_mean("krum", keep=1), "krum: expected options out of faulty, got 'ke"),
            (lambda: TrimmedMean(0.5), "trim: expected a number from 0 to below 0.5, got 0.5"),
            (lambda: TrimmedMean(-0.1), "trim: expected a number from 0 to below 0.5"),
            (lambda: TrimmedMean(math.nan), "trim: expected a number from 0"),
            (lambda: TrimmedMean(False), "trim: expected a number from 0 to below 0.5, got False"),
            (lambda: Krum(-1), "faulty: expected a whole number of at least 0, got -1"),
            (lambda: Krum(1.5), "faulty: expected a whole number of at least 0"),  # type: ignore[arg-type]
            (lambda: MultiKrum(keep=0), "keep: expected a whole number of at least 1, got 0"),
            (
                lambda: GeometricMedian(0),
                "iterations: .* of at least 1, got 0",
            ),
            (lambda: GeometricMedian(smoothing=0), "smoothing: expected a number above 0 and up"),
            (lambda: GeometricMedian(smoothing=2), "smoothing: expected a number above 0 and up"),
            (lambda: ClippedMean(0), "limit: expected a finite number above 0, got 0"),
            (lambda: ClippedMean(math.inf), "limit: expected a finite number above 0, got inf"),
            (lambda: ClippedMean(10**400), "limit: expected a finite number above 0, got 1000"),
            (lambda: CoordinateMedian().merge(None), "'median'} to merge, got None"),  # type: ignore[arg-type]
            (lambda: ClippedMean().merge(fc.WeightedMean()), "to merge, got <fedavg_core"),  # type: ignore[arg-type]
        ],
    )
    def test_others_are_a_usage_error(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(fc.UsageError, match=message):
            make()

    def test_a_number_of_numpy_counts_as_plain(self) -> None:
        trimmed, near = TrimmedMean(np.float64(0.1)), GeometricMedian(smoothing=np.float64(0.5))
        clipped = ClippedMean(np.float64(2))
        assert [type(n) for n in (trimmed.trim, near.smoothing, clipped.limit)] == [float] * 3
        for value in range(10):
            trimmed.add({"w": np.full(1, 10.0**value)}, 1)
        assert trimmed.mean()["w"] == 13_888_888.75


def play(
    accumulator: RobustMean, updates: Sequence[Model], model: Model, **settings: Any
) -> fc.Outcome:
    transfer = settings.pop("transfer", fc.TransferType.FULL)
    round = fc.Round(model, 0, transfer=transfer, accumulator=accumulator, **settings)
    for index, update in enumerate(updates):
        sent = fc.diff(update, model) if transfer is fc.TransferType.DIFF else update
        assert round.offer(fc.Update(f"site-{index}", 0, sent, 1 + index, transfer)).accepted
    return round.close()


class TestInARound:
    """Instead of the weighted mean."""

    @pytest.mark.parametrize("mean", KEPT, ids=named)
    def test_full_and_diff_agree_where_differences_are_exact(self, mean: RobustMean) -> None:
        source = np.random.default_rng(9)
        model = {"w": source.integers(-50, 50, 6) / 4, "n": source.integers(0, 9, 3)}
        updates = [
            {"w": model["w"] + source.integers(-9, 9, 6) / 8, "n": model["n"] + step}
            for step in range(7)
        ]
        full = play(mean, updates, model)
        diff = play(mean, updates, model, transfer=fc.TransferType.DIFF)
        if mean.name != "geometric-median":
            assert fc.same_bits(full.model, diff.model)
            assert fc.same_bits(full.model, mean_of(mean, updates, range(1, 8)))
        np.testing.assert_allclose(full.model["w"], diff.model["w"], rtol=1e-12)
        assert full.enough

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_the_order_does_not_show_and_the_models_dtypes_are_kept(self, mean: RobustMean) -> None:
        updates = updates_of(6)
        model = {
            key: np.zeros(array.shape, "float16" if key == "p0" else array.dtype)
            for key, array in updates[0].items()
        }
        outcomes = []
        for turn in (1, -1):
            round = fc.Round(model, 0, transfer=fc.TransferType.DIFF, accumulator=mean)
            for index in list(range(6))[::turn]:
                update = fc.Update(f"s{index}", 0, updates[index], 1 + index, fc.TransferType.DIFF)
                assert round.offer(update).accepted
            outcomes.append(round.close())
        assert fc.same_bits(outcomes[0].model, outcomes[1].model)
        assert fc.ModelSpec.of(outcomes[0].model) == fc.ModelSpec.of(model)

    def test_the_rule_says_how_many_updates_it_takes(self) -> None:
        updates = updates_of(4)
        outcome = play(Krum(1), updates, updates[0])
        assert not outcome.enough
        assert outcome.problem == (
            "round 0: 4 accepted where at least 5 are needed; the model keeps its values"
        )
        assert fc.same_bits(outcome.model, updates[0])

    def test_an_update_that_lacks_a_parameter_is_refused_where_the_rule_needs_it(self) -> None:
        model = updates_of(1)[0]
        round = fc.Round(model, 3, accumulator=Krum())
        receipt = round.offer(fc.Update("a", 3, {"p0": model["p0"]}, 1))
        assert receipt.reason is fc.Reason.MISSING_KEYS
        assert "contributor 'a'" in receipt.detail

    def test_clipping_asks_for_differences(self) -> None:
        model = updates_of(1)[0]
        for transfer in (None, fc.TransferType.FULL):
            with pytest.raises(fc.UsageError, match="a clipped-mean is of differences; expected"):
                fc.Round(model, 0, transfer=transfer, accumulator=ClippedMean())

    def test_excluded_parameters_and_those_that_nobody_sent_keep_their_values(self) -> None:
        model, *updates = updates_of(6)
        limits = fc.Limits(exclude="p1")
        for mean in KEPT:
            outcome = play(mean, updates, model, limits=limits)
            assert list(outcome.model) == list(model)
            assert fc.same_bits({"x": outcome.model["p1"]}, {"x": model["p1"]})
        some = [{"p0": update["p0"]} for update in updates]
        outcome = play(CoordinateMedian(), some, model)
        for key, array in model.items():
            assert fc.same_bits({"x": outcome.model[key]}, {"x": array}) == (key != "p0")

    @pytest.mark.parametrize("mean", KEPT, ids=named)
    def test_contributors_may_bring_the_first_model(self, mean: RobustMean) -> None:
        updates = updates_of(5)
        round = fc.Round(None, 0, accumulator=mean)
        for index, update in enumerate(updates):
            assert round.offer(fc.Update(f"site-{index}", 0, update, 1)).accepted
        assert fc.same_bits(round.close().model, mean_of(mean, updates))

    def test_what_is_given_is_not_used_up(self) -> None:
        given = CoordinateMedian()
        updates = updates_of(3)
        given.add(updates[0], 1)
        play(given, updates, updates[0])
        assert given.count == 1

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_an_open_round_goes_on_in_another_process_to_the_same_bits(
        self, mean: RobustMean, tmp_path: Path
    ) -> None:
        model, *updates = updates_of(7, dtypes=("float32", "float16", "int64"))
        expected = play(mean, updates, model, transfer=fc.TransferType.DIFF)
        sent = [
            fc.Update(f"site-{n}", 0, fc.diff(u, model), 1 + n, fc.TransferType.DIFF)
            for n, u in enumerate(updates)
        ]
        round = fc.Round(model, 0, transfer=fc.TransferType.DIFF, accumulator=mean)
        for update in sent[:3]:
            round.offer(update)
        meta, arrays = round.state()
        path = tmp_path / "round.npz"
        fc.save_checkpoint(path, fc.Checkpoint(model, 0, extra={"round": meta}, arrays=arrays))
        found = fc.load_checkpoint(path)
        rest = fc.Round.from_state(found.extra["round"], found.arrays, found.model)
        assert len(rest.accepted) == 3
        for update in sent[3:]:
            assert rest.offer(update).accepted
        outcome = rest.close()
        assert fc.same_bits(outcome.model, expected.model)
        assert outcome.total_weight == expected.total_weight

    @pytest.mark.parametrize(
        "change",
        [
            {"accumulator": 3},
            {"accumulator": {"name": "mode"}},
            {"accumulator": {"name": "krum", "faulty": "x"}},
            {"updates": 3},
            {"updates": [{"weight": "1/1"}]},
            {"updates": [{"weight": "0/1", "keys": ["a"]}]},
            {"updates": [{"weight": "1/0", "keys": ["a"]}]},
            {"updates": [{"weight": "1/1", "keys": ["a", "b"]}]},
            {"updates": [{"weight": 1, "keys": ["a"]}]},
            {"updates": [{"weight": "1/1", "keys": ["b"]}]},
        ],
    )
    def test_another_state_is_a_usage_error(self, change: dict[str, Any]) -> None:
        kept = CoordinateMedian()
        kept.add({"a": np.ones(2)}, 1)
        meta, arrays = kept.state()
        spec = fc.ModelSpec.of({"a": np.ones(2)})
        assert accumulator_from_state(meta, arrays, spec).count == 1
        with pytest.raises(fc.UsageError):
            accumulator_from_state({**meta, **change}, arrays, spec)

    @pytest.mark.parametrize("count", [-1, 0, 3, True, "1", None])
    def test_another_state_of_a_clipped_mean_is_a_usage_error(self, count: Any) -> None:
        kept = ClippedMean()
        kept.add({"a": np.ones(2)}, 1)
        meta, arrays = kept.state()
        assert accumulator_from_state(meta, arrays, None).count == 1
        with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got"):
            accumulator_from_state({**meta, "count": count}, arrays, None)

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_a_server_optimizer_steps_towards_it(self, mean: RobustMean) -> None:
        source = np.random.default_rng(5)
        model = {"w": source.normal(size=8)}
        updates = [{"w": model["w"] + source.normal(size=8)} for _ in range(5)]
        settings: dict[str, Any] = {"transfer": fc.TransferType.DIFF}
        plain = play(mean, updates, model, **settings)
        found = play(mean, updates, model, server_optimizer=fc.FedAvg(0.5), **settings)
        half = model["w"] + 0.5 * (plain.model["w"] - model["w"])
        np.testing.assert_allclose(found.model["w"], half, rtol=1e-13)

    @pytest.mark.parametrize("transfer", fc.TransferType)
    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_an_audit_can_be_replayed(self, mean: RobustMean, transfer: fc.TransferType) -> None:
        if mean.needs_differences and transfer is fc.TransferType.FULL:
            return
        model, *updates = updates_of(7)
        outcome = play(mean, updates, model, transfer=transfer, audit=True)
        assert outcome.audit is not None
        audit = fc.Audit.from_text(outcome.audit.to_text())
        assert audit.accumulator == mean.settings()
        sent: dict[str, Any] = {
            f"site-{n}": fc.diff(u, model) if transfer is fc.TransferType.DIFF else u
            for n, u in enumerate(updates)
        }
        verdict = fc.verify(audit, sent, model)
        assert verdict.same_bits, verdict.lines
        other = replace(audit, accumulator=TrimmedMean(0.1).settings())
        assert not fc.verify(other, sent, model).same_bits

    def test_an_audit_of_an_accumulator_without_a_name_is_none(self) -> None:
        model, *updates = updates_of(4)
        outcome = play(CoordinateMedian(), updates, model, audit=True)
        assert outcome.audit is not None
        text = replace(outcome.audit, accumulator={"name": 3}).to_text()
        with pytest.raises(fc.UsageError, match=r"this is no audit of a round: .*the accumulator"):
            fc.Audit.from_text(text)


def wander(params: Model, context: fc.Context) -> fc.TrainResult:
    """A client whose every bit comes from its seed; one of them attacks."""
    source = np.random.default_rng(context.seed)
    for array in params.values():
        array += np.asarray(source.normal(size=array.shape)).astype(array.dtype)
        if context.contributor == "site-1":
            array += array.dtype.type(10_000)
    return fc.TrainResult(params, int(source.integers(1, 100)))


def federation(accumulator: Any, rounds: int = 4, **more: Any) -> fc.Federation:
    model: Model = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(2)}
    clients = {f"site-{number}": wander for number in range(1, 9)}
    settings = {"transfer": fc.TransferType.DIFF, "participation": 6, **more}
    return fc.Federation(model, clients, rounds, accumulator=accumulator, **settings)


class TestInAFederation:
    """In line, on threads, on processes, stopped and resumed."""

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_an_attacker_does_not_carry_off_the_model(self, mean: RobustMean) -> None:
        fed = federation(mean)
        fed.run()
        assert float(np.abs(fed.model["w"]).max()) < 20
        plain = federation("exact")
        plain.run()
        assert float(np.abs(plain.model["w"]).min()) > 100

    @pytest.mark.parametrize("mean", EVERY, ids=named)
    def test_a_resumed_run_and_one_on_threads_end_with_the_same_bits(
        self, mean: RobustMean, tmp_path: Path
    ) -> None:
        whole = federation(mean)
        whole.run()
        for outcome in federation(mean, checkpoint=tmp_path):
            if outcome.round == 1:
                break
        resumed = federation(mean, checkpoint=tmp_path, resume=True)
        assert len(resumed.run()) == 2
        assert fc.same_bits(resumed.model, whole.model)
        with ThreadPoolExecutor(3) as executor:
            threads = federation(mean, executor=executor)
            threads.run()
        assert fc.same_bits(threads.model, whole.model)

    def test_another_rule_cannot_resume_a_run(self, tmp_path: Path) -> None:
        federation(TrimmedMean(0.2), 1, checkpoint=tmp_path).run()
        with pytest.raises(fc.UsageError, match=r"accumulator: trim 0.2 to resume, got 0.3"):
            federation(TrimmedMean(0.3), 2, checkpoint=tmp_path, resume=True)

    def test_too_few_clients_for_the_rule_are_a_usage_error(self) -> None:
        with pytest.raises(fc.UsageError, match="a krum needs at least 7 updates a round, got 6"):
            federation(Krum(2))


@pytest.mark.parametrize("rule", ROBUST_MEANS)
def test_what_is_kept_goes_with_the_mean(rule: str) -> None:
    mean = ROBUST_MEANS[rule]()
    for step in range(5):
        mean.add({"w": np.full(3, 1.0 + step)}, 1)
    mean.mean()
    gone = weakref.ref(mean)
    gc.disable()
    try:
        del mean
        assert gone() is None  # at once, and not when the garbage collector comes by
    finally:
        gc.enable()
