"""The Hypothesis strategies: what they draw is finite, varied, and hard where it should be."""

from __future__ import annotations

import random
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from fedavg_core import TransferType, UsageError
from fedavg_core.accumulator import WeightedMean
from fedavg_core.model import ArraySpec, ModelSpec, number_format
from fedavg_core.testing import (
    arrays,
    averaged_dtypes,
    exact_weighted_mean,
    fractions_of,
    models,
    specs,
    updates,
    weighted_models,
    weights,
)
from fedavg_core.testing.strategies import _FLOAT_MIXTURES, _INTEGER_MIXTURES, _forced

DTYPES = averaged_dtypes()
FLOATS = [dtype for dtype in DTYPES if dtype.kind not in "iu"]
INTEGERS = [dtype for dtype in DTYPES if dtype.kind in "iu"]
quick = settings(max_examples=50)


def mixed(dtype: np.dtype[Any], mixture: str) -> Any:
    """Two thousand numbers of a mixture."""
    raw = random.Random(5).randbytes(2000 * dtype.itemsize)
    return _forced(np.frombuffer(raw, dtype=f"u{dtype.itemsize}"), dtype, mixture)


def significand(size: Fraction) -> Fraction:
    """The number divided by a power of two, so that it lies in [1, 2)."""
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    scaled = size / Fraction(2) ** exponent
    return scaled if scaled >= 1 else 2 * scaled


@pytest.mark.parametrize("mixture", _FLOAT_MIXTURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mixture_of_floats_is_finite_and_what_its_name_says(
    dtype: np.dtype[Any], mixture: str
) -> None:
    format_ = number_format(dtype)
    assert format_ is not None
    array = mixed(dtype, mixture)
    assert array.dtype == dtype
    numbers = fractions_of(array)  # which refuses what is not finite
    sizes = [abs(number) for number in numbers]
    least = Fraction(2) ** format_.least_exponent
    unit = Fraction(2) ** (1 - format_.precision)
    top = Fraction(format_.largest)
    assert any(number < 0 for number in numbers) or mixture == "zeros"
    assert any(number > 0 for number in numbers) or mixture == "zeros"
    if mixture == "ordinary":
        assert all(Fraction(1, 2) <= size < 8 for size in sizes)
    elif mixture == "any":
        assert max(sizes) / min(size for size in sizes if size) > 2 ** (format_.precision)
    elif mixture == "subnormal":
        assert all(size < least for size in sizes)
    elif mixture == "seam":
        assert all(size < 8 * least for size in sizes)
        assert any(size < least for size in sizes)
        assert any(size >= least for size in sizes)
    elif mixture == "near largest":
        assert all(size > top / 2 for size in sizes)
        assert top in sizes
    elif mixture == "zeros":
        signs = np.signbit(array.astype(np.float64))
        assert not any(sizes)
        assert signs.any() == (not dtype.name.endswith("fnuz"))
        assert not signs.all()
    elif mixture == "last bits":
        assert {significand(size) for size in sizes} == {Fraction(1), 1 + unit}
    elif mixture == "all ones":
        assert {significand(size) for size in sizes if least <= size < top} == {2 - unit}
    else:
        assert mixture == "powers of two"
        assert {significand(size) for size in sizes if size and size != top} == {Fraction(1)}


@pytest.mark.parametrize("mixture", _INTEGER_MIXTURES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_mixture_of_integers_is_what_its_name_says(dtype: np.dtype[Any], mixture: str) -> None:
    array = mixed(dtype, mixture)
    info = np.iinfo(dtype)
    numbers = set(array.tolist())
    assert array.dtype == dtype
    if mixture == "small":
        assert numbers == (set(range(-4, 4)) if dtype.kind == "i" else {0, 1, 2, 3})
    elif mixture == "extremes":
        ends = [*range(info.max - 3, info.max + 1), *range(info.min, info.min + 4)]
        assert numbers == set(ends)
    elif mixture == "zeros":
        assert numbers == {0}
    else:
        assert mixture == "any"
        assert len(numbers) > 200


@quick
@given(st.sampled_from(DTYPES), st.sampled_from([(), (0,), (3,), (2, 2)]), st.data())
def test_arrays_have_the_dtype_and_shape_asked_for_and_can_be_written(
    dtype: Any, shape: tuple[int, ...], data: Any
) -> None:
    array = data.draw(arrays(dtype, shape))
    assert isinstance(array, np.ndarray)
    assert (array.dtype, array.shape) == (dtype, shape)
    assert len(fractions_of(array)) == array.size
    array[...] = 1


def test_arrays_are_drawn_in_the_machine_s_own_byte_order() -> None:
    assert find(arrays(">f4", (2,)), lambda array: True).dtype.isnative


def test_an_array_shrinks_to_zeros() -> None:
    assert find(arrays("int32", (2, 2)), lambda array: True).tolist() == [[0, 0], [0, 0]]


@quick
@given(weighted_models())
def test_models_drawn_together_fit_together(drawn: Any) -> None:
    params, weight = drawn
    assert len(params) == len(weight) >= 1
    assert len({str(ModelSpec.of(model)) for model in params}) == 1
    assert all(array.flags.writeable for model in params for array in model.values())
    exact_weighted_mean(params, weight)


@quick
@given(weighted_models(min_models=2, max_models=5, partial=True))
def test_partial_models_have_each_one_parameter_and_each_parameter_is_somewhere(drawn: Any) -> None:
    params, weight = drawn
    assert 2 <= len(params) == len(weight) <= 5
    assert all(params)
    exact_weighted_mean(params, weight)


def test_partial_models_lack_parameters_now_and_then() -> None:
    drawn, _ = find(
        weighted_models(min_models=2, partial=True),
        lambda pair: len({len(model) for model in pair[0]}) > 1,
    )
    assert sorted(len(model) for model in drawn)[:2] == [1, 2]


FLOAT_SPEC = {"w": ArraySpec((3,), np.dtype(np.float32))}


@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("equal", lambda a, b: a.any() and np.array_equal(a, b)),
        ("opposite", lambda a, b: a.all() and np.array_equal(a, -b)),
        ("neighbours", lambda a, b: a.all() and (np.abs(a.view("i4") - b.view("i4")) == 1).all()),
        ("unrelated", lambda a, b: (a * b < 0).any() and (a != -b).all()),
    ],
)
def test_models_drawn_together_are_related_now_and_then(relation: str, holds: Any) -> None:
    with np.errstate(all="ignore"):
        drawn, _ = find(
            weighted_models(FLOAT_SPEC, min_models=2),
            lambda pair: bool(holds(pair[0][0]["w"], pair[0][1]["w"])),
        )
    assert len(drawn) >= 2


def test_opposite_models_cancel_exactly_with_their_weights() -> None:
    drawn, weight = find(
        weighted_models(FLOAT_SPEC, min_models=2, max_models=2),
        lambda pair: pair[0][0]["w"].all() and not exact_weighted_mean(*pair)["w"].any(),
    )
    assert weight[0] == weight[1]
    assert np.array_equal(drawn[0]["w"], -drawn[1]["w"])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("integer", lambda w: w == 1),
        ("integer", lambda w: w > 2**59 and w < 2**60),
        ("integer", lambda w: w > 2**100),
        ("float", lambda w: 0 < w < 1e-307),
        ("float", lambda w: w > 1e200),
        ("any", lambda w: isinstance(w, int)),
        ("any", lambda w: isinstance(w, float)),
    ],
)
def test_weights_come_at_every_size(kind: str, wanted: Any) -> None:
    assert find(weights(kind), wanted) > 0


@quick
@given(weights())
def test_every_weight_is_good(weight: float) -> None:
    WeightedMean().add({"w": np.ones(1)}, weight)


@quick
@given(specs(max_keys=3), specs(dtypes=[np.dtype(np.int8)]))
def test_specs_are_small_and_of_the_dtypes_asked_for(any_spec: Any, byte_spec: Any) -> None:
    assert 1 <= len(any_spec) <= 3
    assert {array.dtype for array in byte_spec.values()} == {np.dtype(np.int8)}


@quick
@given(models(), models(FLOAT_SPEC))
def test_models_have_the_spec_asked_for_or_any(any_model: Any, float_model: Any) -> None:
    assert len(ModelSpec.of(any_model)) >= 1
    assert ModelSpec.of(float_model) == ModelSpec(FLOAT_SPEC)


@quick
@given(updates(), updates(FLOAT_SPEC, round=3, transfer=TransferType.DIFF))
def test_updates_can_be_averaged(any_update: Any, update: Any) -> None:
    assert any_update.contributor.startswith("site-")
    assert (any_update.round, any_update.transfer) == (0, TransferType.FULL)
    assert (update.round, update.transfer) == (3, TransferType.DIFF)
    for one in (any_update, update):
        acc = WeightedMean()
        acc.add(one.params, one.weight)
        assert set(acc.mean()) == set(one.params)


def test_what_cannot_be_drawn_is_misuse() -> None:
    with pytest.raises(UsageError, match="dtype complex128 cannot be averaged"):
        arrays(complex)
    with pytest.raises(UsageError, match=r"expected one of \['any', 'float', 'integer'\], got 'x'"):
        weights("x")


def test_without_hypothesis_a_strategy_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(UsageError, match="pip install hypothesis"):
        weights()


def test_without_ml_dtypes_numpy_s_own_dtypes_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(averaged_dtypes()) == 19
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert averaged_dtypes() == [dtype for dtype in DTYPES if dtype.isbuiltin == 1]
    assert len(averaged_dtypes()) == 11
