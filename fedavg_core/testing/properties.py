"""The trials of the conformance kit, one function for each property.

A trial is given a function that makes new aggregators. It comes back if the property holds, raises
`Counterexample` if it does not and `NotApplicable` if it cannot be tried. Anything else that an
aggregator raises where it should work counts against the property too.

Each trial uses data by which all other properties can hold, as far as that is possible, so that one
fault shows in one row: the weights of partial updates are such that every kind of arithmetic is
exact on them, and whether a mean is well rounded is judged in the dtype in which it comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import quoted
from fedavg_core.model import number_format
from fedavg_core.testing.oracle import exact_weighted_mean, fractions_of

__all__ = ["PROPERTIES", "Counterexample", "Make", "NotApplicable", "shown_error"]

Array: TypeAlias = npt.NDArray[Any]
Model: TypeAlias = dict[str, Array]
Make: TypeAlias = Callable[[], Any]


class Counterexample(Exception):
    """The property does not hold."""


class NotApplicable(Exception):
    """The property cannot be tried on this aggregator."""


def shown_error(error: Exception) -> str:
    """An exception in one line.

    Args:
        error: The exception.

    Returns:
        Its type and its message, the latter bounded and in ASCII.
    """
    return f"{type(error).__name__}: {quoted(str(error))}"


def _copied(model: Mapping[str, Array]) -> Model:
    return {key: array.copy() for key, array in model.items()}


def _mean(make: Make, models: Sequence[Model], weights: Sequence[Any]) -> Model:
    """The aggregator's mean of copies of some models."""
    aggregator = make()
    for model, weight in zip(models, weights, strict=True):
        aggregator.add(_copied(model), weight)
    return _result(aggregator)


def _result(aggregator: Any) -> Model:
    return {str(key): np.asarray(value) for key, value in aggregator.mean().items()}


def _refuses(aggregator: Any, model: Mapping[str, Any], weight: Any) -> bool:
    try:
        aggregator.add(model, weight)
    except Exception:  # to raise is to refuse, whatever the exception
        return True
    return False


def _expect_same(got: Model, expected: Model, what: str) -> None:
    """Raise a counterexample unless two models are the same to the bit."""
    if got.keys() != expected.keys():
        raise Counterexample(f"{what}: keys {sorted(got)} instead of {sorted(expected)}")
    for key, array in expected.items():
        other = got[key]
        if other.shape != array.shape or other.dtype != array.dtype:
            raise Counterexample(
                f"{what}: key {key} is {other.dtype}{list(other.shape)} instead of "
                f"{array.dtype}{list(array.shape)}"
            )
        if other.tobytes() != array.tobytes():
            flat, wanted = other.reshape(-1), array.reshape(-1)
            differing = [i for i in range(flat.size) if flat[i].tobytes() != wanted[i].tobytes()]
            at = differing[0]
            raise Counterexample(
                f"{what}: {len(differing)} of {flat.size} elements of {key} differ, the first is "
                f"{flat[at]!s} instead of {wanted[at]!s}"
            )


def _numbers(seed: int, count: int, spread: int) -> Array:
    """Float64 numbers of both signs, over a range of exponents; the same on every platform."""
    source = random.Random(seed)
    return np.array(
        [
            source.choice((-1, 1)) * (1 + source.random()) * 2.0 ** source.randint(-spread, spread)
            for _ in range(count)
        ]
    )


def _models(count: int, dtype: str = "float32", seed: int = 0) -> tuple[list[Model], list[int]]:
    source = random.Random(seed)
    models = [
        {
            "kernel": _numbers(1000 * seed + i, 12, 6).astype(dtype).reshape(4, 3),
            "bias": _numbers(1000 * seed + 500 + i, 8, 2).astype(dtype),
        }
        for i in range(count)
    ]
    return models, [source.randint(1, 1000) for _ in range(count)]


def _order(make: Make) -> None:
    for dtype in ("float32", "float64"):
        models, weights = _models(8, dtype)
        expected = _mean(make, models, weights)
        order = list(range(8))
        source = random.Random(1)
        for _ in range(10):
            source.shuffle(order)
            got = _mean(make, [models[i] for i in order], [weights[i] for i in order])
            _expect_same(got, expected, f"{dtype} models in the order {order}")


def _merging(make: Make) -> None:
    if not callable(getattr(make(), "merge", None)):
        raise NotApplicable("it has no merge")
    source = random.Random(3)
    for dtype in ("float32", "float64"):
        models, weights = _models(8, dtype, seed=2)
        expected = _mean(make, models, weights)
        for _ in range(10):
            parts = []
            for model, weight in zip(models, weights, strict=True):
                part = make()
                part.add(_copied(model), weight)
                parts.append(part)
            parts.append(make())
            while len(parts) > 1:
                taken = parts.pop(source.randrange(len(parts)))
                parts[source.randrange(len(parts))].merge(taken)
            _expect_same(_result(parts[0]), expected, f"{dtype} models merged along a random tree")


def _hull(make: Make) -> None:
    for dtype in ("float32", "float64", "int32"):
        lowest = np.array([1, 3, -7, 1000003, 16777215]).astype(dtype)
        if lowest.dtype.kind == "f":
            lowest = (lowest / 10).astype(dtype)
            highest = np.nextafter(lowest, np.inf, dtype=dtype)
        else:
            highest = lowest + 1
        for weights in ([1, 1, 1], [3, 7, 11], [0.1, 0.2, 0.3]):
            models = [{"w": lowest}, {"w": highest}, {"w": lowest}]
            got = _mean(make, models, weights)["w"]
            least, most = fractions_of(lowest), fractions_of(highest)
            for i, value in enumerate(fractions_of(got)):
                if not least[i] <= value <= most[i]:
                    raise Counterexample(
                        f"{dtype}, weights {weights}: {got[i]!s} is not between "
                        f"{lowest[i]!s} and {highest[i]!s}"
                    )


def _equal_models(make: Make) -> None:
    for dtype in ("float16", "float32", "float64", "int64"):
        numbers = np.abs(_numbers(4, 30, 3)) + 1
        model = {"w": numbers.astype(dtype)}
        for weights in ([1, 1, 1], [3, 7, 11], [0.1, 0.2, 0.3, 0.7], [49], [5, 5, 5, 5, 5, 5, 5]):
            got = _mean(make, [model] * len(weights), weights)["w"]
            if np.any(got != model["w"]):
                at = int(np.flatnonzero(got != model["w"])[0])
                raise Counterexample(
                    f"{len(weights)} times the same {dtype} model, weights {weights}: "
                    f"{got[at]!s} instead of {model['w'][at]!s}"
                )


def _scaling(make: Make) -> None:
    for dtype in ("float32", "float64"):
        models, weights = _models(5, dtype, seed=5)
        expected = _mean(make, models, weights)
        for factor in (2, 3, 1000):
            got = _mean(make, models, [factor * weight for weight in weights])
            _expect_same(got, expected, f"all weights of {dtype} models times {factor}")


def _inputs_unchanged(make: Make) -> None:
    models, weights = _models(3, seed=6)
    given = [_copied(model) for model in models]
    aggregator = make()
    for model, weight in zip(given, weights, strict=True):
        aggregator.add(model, weight)
    aggregator.mean()
    for i, (model, before) in enumerate(zip(given, models, strict=True)):
        _expect_same(model, before, f"the arrays of model {i + 1} of 3 after the call")


def _inputs_not_kept(make: Make) -> None:
    for count in (1, 3):
        models, weights = _models(count, seed=7)
        expected = _mean(make, models, weights)
        aggregator = make()
        given = [_copied(model) for model in models]
        for model, weight in zip(given, weights, strict=True):
            aggregator.add(model, weight)
            for array in model.values():
                array[...] = 12345
        got = _result(aggregator)
        _expect_same(got, expected, "the arrays were overwritten after they had been added")
        for model in given:
            for key, array in model.items():
                if key in got and np.shares_memory(got[key], array):
                    raise Counterexample(f"the result shares the memory of the input, key {key}")


def _bad_in_second_key() -> dict[str, dict[str, Any]]:
    fine = np.array([[100.0, 200.0], [300.0, 400.0]], dtype=np.float32)
    return {
        "of shape (3,) instead of (2,)": {"a": fine, "b": np.ones(3, np.float32)},
        "of strings": {"a": fine, "b": np.array(["x", "y"])},
        "of objects": {"a": fine, "b": np.array([None, None], dtype=object)},
        "that is None": {"a": fine, "b": None},
        "with a NaN": {"a": fine, "b": np.array([1.0, np.nan], np.float32)},
    }


def _all_or_nothing(make: Make) -> None:
    good = {"a": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    expected = _mean(make, [good], [2])
    refused = 0
    for what, bad in _bad_in_second_key().items():
        aggregator = make()
        aggregator.add(_copied(good), 2)
        title = f"an update with a second array {what}"
        if _refuses(aggregator, bad, 2):
            refused += 1
            _expect_same(_result(aggregator), expected, f"after {title} was refused")
            continue
        try:
            aggregator.mean()
        except Exception as error:
            raise Counterexample(
                f"{title} was taken in, and then mean() raised {shown_error(error)}"
            ) from None
    if not refused:
        raise NotApplicable("it refused none of the bad updates")


def _dtype_kept(make: Make) -> None:
    for dtype in ("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint64"):
        models = [{"w": np.array([1, 2, 3], dtype)}, {"w": np.array([3, 4, 5], dtype)}]
        for weights in ([1, 1], [0.5, 0.25]):
            got = _mean(make, models, weights)["w"]
            if got.dtype != np.dtype(dtype):
                raise Counterexample(f"{dtype} came back as {got.dtype}, weights {weights}")


def _correctly_rounded(make: Make) -> None:
    ties = np.array([1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-23, 1.0 + 2.0**-52, -1.0 - 2.0**-23])
    cases: list[tuple[list[Model], Sequence[float]]] = []
    for dtype in ("float16", "float32", "float64"):
        cases += [_models(count, dtype, seed=8 + count) for count in (2, 3, 5)]
        fine = [{"w": ties.astype(dtype)}, {"w": ties[::-1].astype(dtype)}]
        cases += [(fine, [1, 1]), (fine, [1, 2]), (fine, [0.1, 0.7])]
    for whole_dtype in ("int8", "int32", "int64", "uint8"):
        whole = [
            {"w": np.array(row, whole_dtype)}
            for row in ([1, 2, 7, 90], [2, 3, 1, 101], [4, 0, 9, 3])
        ]
        cases += [(whole[:2], [1, 1]), (whole, [1, 1, 2]), (whole, [0.5, 3.0, 0.125])]
    for models, weights in cases:
        got = _mean(make, models, weights)
        came = {key: array.dtype for key, array in got.items()}  # if wrong, then in another row
        if any(number_format(dtype) is None for dtype in came.values()):
            raise Counterexample(f"a result of dtypes {came}")
        expected = exact_weighted_mean(models, weights, dtypes=came)
        kind = next(iter(models[0].values())).dtype
        _expect_same(got, expected, f"{len(models)} {kind} models, weights {weights}")


def _partial_updates(make: Make) -> None:
    one = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([4.0, 8.0], np.float32)}
    two = {"a": np.array([5.0, 10.0], np.float32)}
    three = {"b": np.array([8.0, 16.0], np.float32), "c": np.array([1.0], np.float32)}
    expected = {"a": [2.0, 4.0], "b": [5.0, 10.0], "c": [1.0]}
    got = _mean(make, [one, two, three], [3, 1, 1])
    for key, numbers in expected.items():
        if key not in got or got[key].tolist() != numbers:
            came = got[key].tolist() if key in got else "nothing"
            raise Counterexample(f"key {key}, not in all updates: {came} instead of {numbers}")


def _layouts(make: Make) -> None:
    plain = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    expected = {"w": plain + 1}
    spaced = np.zeros((6, 8), np.float32)
    spaced[::2, ::2] = plain
    locked = plain.copy()
    locked.flags.writeable = False
    layouts = {
        "in Fortran order": np.asfortranarray(plain),
        "not contiguous": spaced[::2, ::2],
        "with negative strides": plain[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": locked,
        "big-endian": plain.astype(">f4"),
    }
    for what, array in layouts.items():
        aggregator = make()
        aggregator.add({"w": array}, 1)
        aggregator.add({"w": plain + 2}, 1)
        got = {key: value.astype(np.float32) for key, value in _result(aggregator).items()}
        _expect_same(got, expected, f"an array {what}")
    for shape in ((), (0,), (2, 0)):
        few = np.ones(shape, np.float32)
        got = _mean(make, [{"w": few}, {"w": few}], [1, 1])
        got = {key: value.astype(np.float32) for key, value in got.items()}
        _expect_same(got, {"w": few}, f"arrays of shape {shape}")


def _finite_only(make: Make) -> None:
    for dtype in ("float16", "float32", "float64"):
        for bad in (np.nan, np.inf, -np.inf):
            for at in (0, 4):
                model = {"a": np.ones(3, dtype), "b": np.ones(5, dtype)}
                model["b"][at] = bad
                if not _refuses(make(), model, 1):
                    raise Counterexample(f"{dtype} {bad} as element {at} of key b was taken in")


def _weights_checked(make: Make) -> None:
    for weight in (0, 0.0, -1, -0.5, float("nan"), float("inf"), -float("inf")):
        aggregator = make()
        aggregator.add({"w": np.ones(3, np.float32)}, 1)
        if not _refuses(aggregator, {"w": np.full(3, 5.0, np.float32)}, weight):
            raise Counterexample(f"weight {weight} was taken in")


def _shapes_checked(make: Make) -> None:
    for shape, other in (((2, 2), (1,)), ((2, 2), (2,)), ((3,), ()), ((2,), (1, 2)), ((3,), (4,))):
        aggregator = make()
        aggregator.add({"w": np.ones(shape, np.float32)}, 1)
        if not _refuses(aggregator, {"w": np.ones(other, np.float32)}, 1):
            raise Counterexample(f"shape {other} was added to shape {shape}")


def _dtypes_checked(make: Make) -> None:
    for array in (
        np.array([1 + 2j, 3]),
        np.array([1.0, 2.0], dtype=object),
        np.array(["1", "2"]),
        np.array([True, False]),
        np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
    ):
        if not _refuses(make(), {"w": array}, 1):
            raise Counterexample(f"an array of dtype {array.dtype} was taken in")


def _expect_no_overflow(make: Make, dtype: str, numbers: Sequence[float], weight: int) -> None:
    array = np.array(numbers, dtype)
    got = _mean(make, [{"w": array}, {"w": array}], [weight, weight])["w"].astype(np.float64)
    if not np.isfinite(got).all():
        raise Counterexample(
            f"the mean of two equal {dtype} models {array.tolist()}, weights {weight}, "
            f"is {got.tolist()}"
        )


def _float16_overflow(make: Make) -> None:
    _expect_no_overflow(make, "float16", [60.0, -60.0], 1200)
    _expect_no_overflow(make, "float16", [65504.0, -65504.0], 7)


def _large_overflow(make: Make) -> None:
    _expect_no_overflow(make, "float32", [3e38, -3e38], 1200)
    _expect_no_overflow(make, "float64", [1.5e308, -1.5e308], 1200)


PROPERTIES: dict[str, Callable[[Make], None]] = {
    "order invariance": _order,
    "merge invariance": _merging,
    "correctly rounded": _correctly_rounded,
    "within the hull": _hull,
    "idempotent on equal models": _equal_models,
    "weight scaling": _scaling,
    "dtype kept": _dtype_kept,
    "no float16 overflow": _float16_overflow,
    "no overflow near the largest": _large_overflow,
    "partial updates": _partial_updates,
    "every memory layout": _layouts,
    "inputs unchanged": _inputs_unchanged,
    "inputs not kept": _inputs_not_kept,
    "all or nothing": _all_or_nothing,
    "non-finite refused": _finite_only,
    "bad weight refused": _weights_checked,
    "wrong shape refused": _shapes_checked,
    "not a number refused": _dtypes_checked,
}
"""From the name of each property to its trial."""
