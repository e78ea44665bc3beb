"""What must hold of `WeightedMean` whatever is averaged: one Hypothesis property a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedavg_core import OutOfRange, Reason, RefusedUpdate
from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.comparison import same_bits
from fedavg_core.model import ArraySpec, ModelSpec, copy_params
from fedavg_core.testing import (
    arrays,
    averaged_dtypes,
    exact_weighted_mean,
    exact_weighted_mean_by_mantissas,
    fractions_of,
    models,
    weighted_models,
    weights,
)

FLOATS = [dtype for dtype in averaged_dtypes() if dtype.kind not in "iu"]

some = weighted_models(max_models=3)
several = weighted_models(min_models=2, max_models=4)
partial = weighted_models(min_models=2, max_models=4, partial=True)
whole_weights = weights("integer")
seeds = st.randoms(use_true_random=False)
dtypes = st.sampled_from(averaged_dtypes())


def accumulated(
    params: Sequence[Any], weight: Sequence[float], block: int = 1 << 17
) -> WeightedMean:
    result = WeightedMean(block=block)
    for one, w in zip(params, weight, strict=True):
        result.add(one, w)
    return result


def result_or_range(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except OutOfRange:
        return None


def assert_same(a: Any, b: Any) -> None:
    assert (a is None) == (b is None), (a, b)
    assert a is None or same_bits(a, b), (a, b)


def assert_equal_state(a: WeightedMean, b: WeightedMean) -> None:
    assert a.digest() == b.digest()
    assert (a.count, a.total_weight) == (b.count, b.total_weight)
    assert set(a.keys) == set(b.keys)
    assert all(a.weight_of(key) == b.weight_of(key) for key in a.keys)


@given(some)
def test_the_mean_is_that_of_both_oracles_to_the_bit(drawn: Any) -> None:
    got = accumulated(*drawn).mean()
    assert_same(got, exact_weighted_mean(*drawn))
    assert_same(got, exact_weighted_mean_by_mantissas(*drawn))


@given(several, st.data())
def test_a_base_and_a_mean_are_added_with_one_rounding(drawn: Any, data: Any) -> None:
    params, weight = drawn
    base = data.draw(models(ModelSpec.of(params[0])))
    got = result_or_range(lambda: accumulated(params, weight).mean(base))
    assert_same(got, result_or_range(lambda: exact_weighted_mean(params, weight, base=base)))


@given(partial)
def test_each_parameter_is_averaged_over_those_that_sent_it(drawn: Any) -> None:
    assert_same(accumulated(*drawn).mean(), exact_weighted_mean(*drawn))


@given(partial)
def test_what_nobody_sent_keeps_the_base_s_value(drawn: Any) -> None:
    params, weight = drawn
    base = {**params[0], "kept": np.array([-0.0, 3.0], np.float32)}
    first = {key: array for key, array in params[0].items() if key not in params[1]}
    got = result_or_range(lambda: accumulated(params[1:2], weight[1:2]).mean({**params[1], **base}))
    if got is not None:
        assert same_bits({"kept": got["kept"]}, {"kept": base["kept"]})
        assert same_bits({key: got[key] for key in first}, first)


@given(partial, seeds)
def test_the_order_of_the_updates_does_not_show(drawn: Any, random: Any) -> None:
    order = list(range(len(drawn[0])))
    random.shuffle(order)
    first = accumulated(*drawn)
    second = accumulated([drawn[0][i] for i in order], [drawn[1][i] for i in order])
    spec = ModelSpec.of({key: array for model in drawn[0] for key, array in model.items()})
    assert ModelSpec.of(first.mean()) == spec
    assert_equal_state(first, second)
    assert_same(first.mean(), second.mean())


@given(partial, st.integers(0, 3**4 - 1), seeds)
def test_it_does_not_show_how_updates_were_spread_and_merged(
    drawn: Any, spread: int, random: Any
) -> None:
    parts = [WeightedMean(block=block) for block in (1 << 17, 3, 1)]
    for i, (params, weight) in enumerate(zip(*drawn, strict=True)):
        parts[spread // 3**i % 3].add(params, weight)
    random.shuffle(parts)
    parts[1].merge(parts[2])
    parts[0].merge(parts[1])
    whole = accumulated(*drawn)
    assert_equal_state(parts[0], whole)
    assert_same(parts[0].mean(), whole.mean())


@given(several)
def test_merging_is_commutative(drawn: Any) -> None:
    params, weight = drawn
    one, two = accumulated(params[:1], weight[:1]), accumulated(params[1:], weight[1:])
    other_one = accumulated(params[:1], weight[:1])
    one.merge(two)
    two.merge(other_one)
    assert_equal_state(one, two)


@given(weighted_models(min_models=3, max_models=3))
def test_merging_is_associative(drawn: Any) -> None:
    a, b, c = (accumulated([params], [weight]) for params, weight in zip(*drawn, strict=True))
    left, right = accumulated([drawn[0][0]], [drawn[1][0]]), b
    left.merge(b)
    left.merge(c)
    right.merge(c)
    a.merge(right)
    assert_equal_state(left, a)


@given(some)
def test_merging_an_empty_one_changes_nothing(drawn: Any) -> None:
    acc, empty = accumulated(*drawn), WeightedMean()
    acc.merge(empty)
    assert_equal_state(acc, accumulated(*drawn))
    empty.merge(acc)
    assert_equal_state(acc, empty)
    assert_same(acc.mean(), empty.mean())


@given(several)
def test_merging_leaves_the_other_as_it_was(drawn: Any) -> None:
    params, weight = drawn
    one, two = accumulated(params[:1], weight[:1]), accumulated(params[1:], weight[1:])
    one.merge(two)
    assert_equal_state(two, accumulated(params[1:], weight[1:]))
    two.add(params[0], weight[0])
    assert_equal_state(one, two)
    assert_same(one.mean(), two.mean())


@given(partial, st.integers(0, 3))
def test_a_removed_update_leaves_no_trace(drawn: Any, which: int) -> None:
    params, weight = drawn
    which %= len(params)
    acc = accumulated(params, weight)
    acc.remove(params[which], weight[which])
    rest = accumulated(params[:which] + params[which + 1 :], weight[:which] + weight[which + 1 :])
    assert_equal_state(acc, rest)
    assert_same(acc.mean(), rest.mean())


@given(some)
def test_removing_all_that_was_added_leaves_what_a_new_one_is(drawn: Any) -> None:
    acc = accumulated(*drawn)
    for params, weight in zip(*drawn, strict=True):
        acc.remove(params, weight)
    assert_equal_state(acc, WeightedMean())


@given(weighted_models(max_models=3, weight=whole_weights), st.integers(2, 10**6))
def test_only_the_ratios_of_the_weights_count(drawn: Any, factor: int) -> None:
    params, weight = drawn
    scaled = [w * factor for w in weight]
    assert_same(accumulated(params, weight).mean(), accumulated(params, scaled).mean())


@given(weighted_models(max_models=3, weight=st.floats(1e-100, 1e100)), st.integers(-300, 300))
def test_weights_may_all_be_scaled_by_a_power_of_two(drawn: Any, power: int) -> None:
    params, weight = drawn
    scaled = [float(np.ldexp(w, power)) for w in weight]
    assert_same(accumulated(params, weight).mean(), accumulated(params, scaled).mean())


@given(some, whole_weights, whole_weights)
def test_two_weights_of_one_model_count_as_their_sum(drawn: Any, one: int, two: int) -> None:
    params = drawn[0][0]
    apart = accumulated([params, params], [one, two])
    together = accumulated([params], [one + two])
    assert apart.digest() == together.digest()
    assert_same(apart.mean(), together.mean())


@given(some)
def test_a_weight_counts_the_same_as_an_int_and_as_a_float(drawn: Any) -> None:
    params, _ = drawn
    whole = [2 * i + 1 for i, _ in enumerate(params)]
    same = [np.float32(w) if w % 4 == 1 else float(w) for w in whole]
    assert_equal_state(accumulated(params, whole), accumulated(params, same))


@given(some, st.lists(weights(), min_size=1, max_size=5))
def test_the_mean_of_equal_models_is_that_model(drawn: Any, weight: list[float]) -> None:
    model = {key: array + array.dtype.type(0) for key, array in drawn[0][0].items()}  # no -0
    got = accumulated([drawn[0][0]] * len(weight), weight).mean()
    assert all(fractions_of(got[key]) == fractions_of(array) for key, array in model.items())
    assert all(not np.signbit(a[a == 0].astype(np.float64)).any() for a in got.values())


@given(several)
def test_the_mean_lies_between_the_least_and_the_largest_input(drawn: Any) -> None:
    params, weight = drawn
    for key, array in accumulated(params, weight).mean().items():
        columns = zip(*(fractions_of(model[key]) for model in params), strict=True)
        for mean, column in zip(fractions_of(array), columns, strict=True):
            assert min(column) <= mean <= max(column)


@given(several)
def test_to_raise_an_input_never_lowers_the_mean(drawn: Any) -> None:
    params, weight = drawn
    before = accumulated(params, weight).mean()
    raised = {key: np.maximum(params[0][key], params[1][key]) for key in params[0]}
    after = accumulated([raised, *params[1:]], weight).mean()
    for key, array in before.items():
        pairs = zip(fractions_of(array), fractions_of(after[key]), strict=True)
        assert all(lower <= upper for lower, upper in pairs)


@given(st.sampled_from(FLOATS), weights(), weights(), st.data())
def test_the_mean_of_negated_models_is_the_negated_mean(
    dtype: Any, one: float, two: float, data: Any
) -> None:
    params = [{"w": data.draw(arrays(dtype))} for _ in range(2)]
    negated = [{"w": -model["w"]} for model in params]
    mean = accumulated(params, [one, two]).mean()["w"]
    mirrored = accumulated(negated, [one, two]).mean()["w"]
    assert [-x for x in fractions_of(mean)] == fractions_of(mirrored)
    exact = exact_weighted_mean(negated, [one, two])
    assert same_bits({"w": mirrored}, exact)  # which has the sign of each zero


@given(weighted_models({"w": ArraySpec((4,), np.dtype("f4"))}, weight=whole_weights), st.data())
def test_a_power_of_two_comes_out_of_the_mean(drawn: Any, data: Any) -> None:
    power = data.draw(st.integers(-40, 40))
    wide = [{"w": model["w"].astype(np.float64)} for model in drawn[0]]
    scaled = [{"w": np.ldexp(model["w"], power)} for model in wide]
    mean = accumulated(wide, drawn[1]).mean()["w"]
    assert_same(accumulated(scaled, drawn[1]).mean(), {"w": np.ldexp(mean, power)})


@given(dtypes, weights(), weights(), st.data())
def test_elements_do_not_influence_each_other(
    dtype: Any, one: float, two: float, data: Any
) -> None:
    params = [data.draw(arrays(dtype, (7,))) for _ in range(2)]
    joined = accumulated([{"w": array} for array in params], [one, two]).mean()["w"]
    halves = [{"b": array[:3], "a": array[3:].reshape(2, 2)} for array in params]
    apart = accumulated(halves, [one, two]).mean()
    assert same_bits({"w": joined[:3]}, {"w": apart["b"]})
    assert same_bits({"w": joined[3:]}, {"w": apart["a"].reshape(-1)})
    backwards = accumulated([{"w": array[::-1]} for array in params], [one, two]).mean()["w"]
    assert same_bits({"w": joined}, {"w": backwards[::-1]})


@given(some, st.sampled_from([1, 2, 3, 7]))
def test_the_block_size_does_not_show(drawn: Any, block: int) -> None:
    params, weight = drawn
    large, small = accumulated(params, weight), accumulated(params, weight, block)
    assert_equal_state(large, small)
    assert_same(large.mean(), small.mean())


@given(some)
def test_what_is_added_is_not_changed(drawn: Any) -> None:
    params, weight = drawn
    before = [copy_params(model) for model in params]
    acc = accumulated(params, weight)
    acc.mean()
    acc.remove(params[0], weight[0])
    assert all(same_bits(model, old) for model, old in zip(params, before, strict=True))


@given(several)
def test_what_is_added_is_not_kept(drawn: Any) -> None:
    params, weight = drawn
    given = [copy_params(model) for model in params]
    acc = accumulated(given, weight)
    for model in given:
        for array in model.values():
            array[...] = 1
        model.clear()
    assert_same(acc.mean(), accumulated(params, weight).mean())


@given(some)
def test_the_mean_is_new_memory_and_asking_for_it_changes_nothing(drawn: Any) -> None:
    acc = accumulated(*drawn)
    digest = acc.digest()
    first = acc.mean()
    kept = copy_params(first)
    for array in first.values():
        array[...] = 3
    assert acc.digest() == digest
    assert_same(acc.mean(), kept)


@given(some)
def test_the_result_has_the_shapes_and_dtypes_that_came_in(drawn: Any) -> None:
    got = accumulated(*drawn).mean()
    assert ModelSpec.of(got) == ModelSpec.of(drawn[0][0])
    assert all(array.flags.c_contiguous and array.flags.writeable for array in got.values())


@given(several)
def test_a_state_goes_through_json_and_arrays_and_comes_back(drawn: Any) -> None:
    params, weight = drawn
    acc = accumulated(params[:-1], weight[:-1])
    meta, parts = acc.state()
    back = WeightedMean.from_state(json.loads(json.dumps(meta)), copy_params(parts))
    assert_equal_state(acc, back)
    assert_same(acc.mean(), back.mean())
    back.add(params[-1], weight[-1])
    assert_equal_state(back, accumulated(params, weight))


@given(several, seeds)
def test_equal_values_have_equal_states(drawn: Any, random: Any) -> None:
    order = list(range(len(drawn[0])))
    random.shuffle(order)
    other = accumulated([drawn[0][i] for i in order], [drawn[1][i] for i in order], block=2)
    (meta, parts), (other_meta, other_parts) = accumulated(*drawn).state(), other.state()
    assert meta == other_meta
    assert same_bits(parts, other_parts)


def assert_refused(acc: WeightedMean, params: Any, weight: Any, reason: Reason) -> None:
    digest, keys, count, mean = acc.digest(), acc.keys, acc.count, acc.mean()
    with pytest.raises(RefusedUpdate) as refusal:
        acc.add(params, weight)
    assert refusal.value.reason is reason
    assert (acc.digest(), acc.keys, acc.count) == (digest, keys, count)
    assert_same(acc.mean(), mean)


@given(
    weighted_models(
        {"a": ArraySpec((4,), np.dtype("f4")), "b": ArraySpec((2, 3), np.dtype("f8"))},
        min_models=2,
        max_models=3,
        weight=st.integers(1, 10**6),
    ),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.integers(0, 9),
    st.sampled_from([1, 3, 1 << 17]),
)
def test_one_number_that_is_not_finite_leaves_the_state_as_it_was(
    drawn: Any, bad: float, where: int, block: int
) -> None:
    params, weight = drawn
    acc = accumulated(params[:-1], weight[:-1], block=block)
    spoilt = copy_params(params[-1])
    key, index = ("a", where) if where < 4 else ("b", where - 4)
    spoilt[key].reshape(-1)[index] = bad
    assert_refused(acc, {**spoilt, "new": np.ones(2)}, weight[-1], Reason.NON_FINITE)
    acc.add(params[-1], weight[-1])
    assert_equal_state(acc, accumulated(params, weight))


@given(some, st.sampled_from([(1,), (), (2, 2), (4,), (1, 3)]))
def test_a_wrong_shape_leaves_the_state_as_it_was(drawn: Any, shape: tuple[int, ...]) -> None:
    params, weight = drawn
    *_, last = params[0]
    if params[0][last].shape == shape:
        shape = (9, 9)
    wrong = {**params[0], last: np.ones(shape, params[0][last].dtype)}
    assert_refused(accumulated(params, weight), wrong, 1, Reason.SHAPE)


@given(
    some,
    st.one_of(
        st.integers(max_value=0),
        st.floats(max_value=0.0),
        st.sampled_from([float("nan"), float("inf"), "1", None, True, 1j]),
    ),
)
def test_a_bad_weight_leaves_the_state_as_it_was(drawn: Any, weight: Any) -> None:
    params, good = drawn
    assert_refused(accumulated(params, good), params[0], weight, Reason.BAD_WEIGHT)


@given(some, st.sampled_from(["Fortran", "spaced", "read-only", "backwards", "big-endian"]))
def test_the_memory_layout_does_not_show(drawn: Any, layout: str) -> None:
    params, weight = drawn

    def relaid(array: Any) -> Any:
        if layout == "Fortran":
            return np.asfortranarray(array).reshape(array.shape)
        if layout == "spaced":
            spaced = np.zeros((*array.shape, 2), array.dtype)
            spaced[..., 0] = array
            return spaced[..., 0]
        if layout == "backwards":
            return np.flip(np.flip(array).copy())
        array = array.copy()
        if layout == "big-endian" and array.dtype.kind in "iuf" and array.dtype.isbuiltin == 1:
            return array.astype(array.dtype.newbyteorder(">"))
        array.flags.writeable = False
        return array

    strange = [{key: relaid(array) for key, array in model.items()} for model in params]
    plain = accumulated(params, weight)
    other = accumulated(strange, weight)
    assert_equal_state(other, plain)
    assert_same(other.mean(), plain.mean())


@given(several)
def test_an_accumulator_that_was_reset_is_as_good_as_new(drawn: Any) -> None:
    params, weight = drawn
    acc = accumulated(params[::-1], weight)
    acc.reset()
    assert (acc.count, acc.total_weight) == (0, 0)
    assert not acc.keys
    for model, w in zip(params, weight, strict=True):
        acc.add(model, w)
    assert_equal_state(acc, accumulated(params, weight))
    assert_same(acc.mean(), accumulated(params, weight).mean())


@given(partial)
def test_the_weights_are_summed_exactly(drawn: Any) -> None:
    acc = accumulated(*drawn)
    assert acc.count == len(drawn[0])
    assert acc.total_weight == sum((Fraction(w) for w in drawn[1]), Fraction(0))
    for key in acc.keys:
        sent = [Fraction(w) for model, w in zip(*drawn, strict=True) if key in model]
        assert acc.weight_of(key) == sum(sent)


@given(some)
def test_all_at_once_is_the_same_as_one_after_another(drawn: Any) -> None:
    assert_same(weighted_mean(*drawn), accumulated(*drawn).mean())
    assert_same(weighted_mean(iter(drawn[0]), drawn[1]), accumulated(*drawn).mean())


@given(partial, st.integers(0, 4))
def test_several_together_are_the_same_as_one_after_another(drawn: Any, cut: int) -> None:
    updates = list(zip(*drawn, strict=True))
    acc = WeightedMean(block=2)
    acc.add_many(updates[:cut])
    acc.add_many(iter(updates[cut:]))
    assert_equal_state(acc, accumulated(*drawn))
    assert_same(acc.mean(), accumulated(*drawn).mean())


@given(
    weighted_models({"w": ArraySpec((5,), np.dtype("f4"))}, min_models=2, weight=whole_weights),
    st.integers(0, 3),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_several_together_are_added_all_or_none(drawn: Any, which: int, bad: float) -> None:
    params, weight = drawn
    acc = accumulated(params, weight)
    spoilt = [copy_params(model) for model in params]
    spoilt[which % len(params)]["w"][which] = bad
    with pytest.raises(RefusedUpdate) as refusal:
        acc.add_many(zip(spoilt, weight, strict=True))
    assert refusal.value.reason is Reason.NON_FINITE
    assert_equal_state(acc, accumulated(params, weight))


@settings(max_examples=50)  # threads take long to start
@given(dtypes, weights(), weights(), st.data())
def test_the_number_of_threads_does_not_show(dtype: Any, one: float, two: float, data: Any) -> None:
    params = [{"w": data.draw(arrays(dtype, (40,)))} for _ in range(2)]
    alone, together = (WeightedMean(block=8, threads=threads) for threads in (1, 3))
    for acc in (alone, together):
        acc.add(params[0], one)
        acc.add(params[1], two)
    assert_equal_state(alone, together)
    assert_same(alone.mean(), together.mean())


@given(st.lists(st.tuples(arrays(np.int16), weights()), min_size=1, max_size=4), arrays(np.int16))
def test_whole_models_and_exact_differences_give_equal_bits(sent: Any, start: Any) -> None:
    base = {"w": start.astype(np.float32)}
    full = [{"w": array.astype(np.float32)} for array, _ in sent]
    difference = [{"w": model["w"] - base["w"]} for model in full]
    weight = [w for _, w in sent]
    assert_same(accumulated(difference, weight).mean(base), accumulated(full, weight).mean())


@given(some)
def test_no_difference_at_all_gives_the_base_back(drawn: Any) -> None:
    params, weight = drawn
    zeros = [{key: np.zeros_like(a) for key, a in params[0].items()}] * len(params)
    got = accumulated(zeros, weight).mean(params[0])
    assert_same(got, accumulated(params[:1], [1]).mean())


@given(some, dtypes)
def test_a_spec_decides_the_dtype_that_is_rounded_to(drawn: Any, dtype: Any) -> None:
    params, weight = drawn
    spec = ModelSpec({key: ArraySpec(array.shape, dtype) for key, array in params[0].items()})

    def through_spec() -> Any:
        acc = WeightedMean(spec)
        for model, w in zip(params, weight, strict=True):
            acc.add(model, w)
        return acc.mean()

    kinds = dict.fromkeys(spec, dtype)
    expected = result_or_range(lambda: exact_weighted_mean(params, weight, dtypes=kinds))
    assert_same(result_or_range(through_spec), expected)
