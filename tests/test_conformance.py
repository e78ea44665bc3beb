"""The conformance kit: it passes what is right, and names what each broken aggregator breaks."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fedavg_core.testing.peers
from fedavg_core import UsageError
from fedavg_core.accumulator import WeightedMean
from fedavg_core.model import ModelSpec, number_format
from fedavg_core.testing import (
    ConformanceTable,
    check_aggregator,
    compare_tables,
    exact_weighted_mean,
    fractions_of,
    round_fraction,
)
from fedavg_core.testing.__main__ import main

PROPERTIES = (
    "order invariance",
    "merge invariance",
    "correctly rounded",
    "within the hull",
    "idempotent on equal models",
    "weight scaling",
    "dtype kept",
    "no float16 overflow",
    "no overflow near the largest",
    "partial updates",
    "every memory layout",
    "inputs unchanged",
    "inputs not kept",
    "all or nothing",
    "non-finite refused",
    "bad weight refused",
    "wrong shape refused",
    "not a number refused",
)


class Sound:
    """Right in every respect, and slow: it keeps copies and asks the oracle. Others spoil it."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, Any], Any]] = []

    def add(self, params: Any, weight: Any) -> None:
        self.check_weight(weight)
        self.check_dtypes(params)
        self.check_shapes(params)
        self.check_finite(params)
        self.sent.append(({key: array.copy() for key, array in params.items()}, weight))

    def check_weight(self, weight: Any) -> None:
        if not 0 < weight < math.inf:
            raise ValueError("weight")

    def check_dtypes(self, params: Any) -> None:
        ModelSpec.of(params)

    def check_shapes(self, params: Any) -> None:
        for model, _ in self.sent:
            for key in model.keys() & params.keys():
                if model[key].shape != params[key].shape:
                    raise ValueError("shape")

    def check_finite(self, params: Any) -> None:
        if not all(np.isfinite(array.astype(np.float64)).all() for array in params.values()):
            raise ValueError("not finite")

    def merge(self, other: Any) -> None:
        self.sent += other.sent

    def mean(self) -> dict[str, Any]:
        return exact_weighted_mean([m for m, _ in self.sent], [w for _, w in self.sent])


def rounded_by(rounding: Callable[[Fraction], int]) -> type[Sound]:
    """An aggregator that rounds in another way than to nearest even."""

    def rounded(exact: Fraction, dtype: np.dtype[Any]) -> Any:
        number = number_format(dtype)
        unit = Fraction(1)
        if number is not None and number.kind == "float" and exact:
            exponent = math.floor(math.log2(abs(exact)))
            unit = Fraction(2) ** (max(exponent, number.least_exponent) - number.precision + 1)
        return round_fraction(rounding(exact / unit) * unit, dtype)

    class Otherwise(Sound):
        def mean(self) -> dict[str, Any]:
            result = super().mean()
            for key, array in result.items():
                sent = [(m[key], Fraction(w)) for m, w in self.sent if key in m]
                total = sum(weight for _, weight in sent)
                columns = zip(*(fractions_of(values) for values, _ in sent), strict=True)
                for i, column in enumerate(columns):
                    exact = sum(w * x for (_, w), x in zip(sent, column, strict=True)) / total
                    array.reshape(-1)[i] = rounded(Fraction(exact), array.dtype)
            return result

    return Otherwise


def half_away_from_zero(value: Fraction) -> int:
    return int(abs(value) + Fraction(1, 2)) * (-1 if value < 0 else 1)


class Float32Sum(Sound):
    """Sums in float32, in the order of arrival."""

    def mean(self) -> dict[str, Any]:
        sums: dict[str, Any] = {}
        weights: dict[str, float] = {}
        for model, weight in self.sent:
            for key, array in model.items():
                sums[key] = sums.get(key, np.float32(0)) + array.astype(np.float32) * np.float32(
                    weight
                )
                weights[key] = weights.get(key, 0.0) + weight
        kinds = {key: array.dtype for model, _ in self.sent for key, array in model.items()}
        return {
            key: np.asarray(s / np.float32(weights[key]), kinds[key]) for key, s in sums.items()
        }


class MutatesInputs(Sound):
    def add(self, params: Any, weight: Any) -> None:
        super().add(params, weight)
        for array in params.values():
            if array.flags.writeable:
                array *= 0


class KeepsReferences(Sound):
    def add(self, params: Any, weight: Any) -> None:
        super().add(params, weight)
        self.sent[-1] = (dict(params), weight)


class GivesInputsBack(Sound):
    """The mean of one model is written into that model's own arrays."""

    def add(self, params: Any, weight: Any) -> None:
        super().add(params, weight)
        self.last = params

    def mean(self) -> dict[str, Any]:
        result = super().mean()
        if len(self.sent) > 1:
            return result
        for key, array in self.last.items():
            array[...] = result[key]
        return dict(self.last)


class AddsHalf(Sound):
    """Goes from parameter to parameter, and stops at the first bad one."""

    def add(self, params: Any, weight: Any) -> None:
        self.check_weight(weight)
        for key, array in params.items():
            super().add({key: array}, weight)


class FailsLate(Sound):
    """Takes every dtype, and notices at the end."""

    def check_dtypes(self, params: Any) -> None:
        pass

    def check_finite(self, params: Any) -> None:
        if all(
            isinstance(array, np.ndarray) and array.dtype.kind == "f" for array in params.values()
        ):
            super().check_finite(params)


class Broadcasts(Sound):
    def add(self, params: Any, weight: Any) -> None:
        first = self.sent[0][0] if self.sent else {}
        self.check_dtypes(params)
        fitted = {
            key: np.broadcast_to(array, first[key].shape) if key in first else array
            for key, array in params.items()
        }
        super().add(fitted, weight)


class RepairsNaN(Sound):
    def add(self, params: Any, weight: Any) -> None:
        self.check_dtypes(params)
        super().add({key: np.array(np.nan_to_num(array)) for key, array in params.items()}, weight)


class SkipsBadWeights(Sound):
    def add(self, params: Any, weight: Any) -> None:
        if 0 < weight < math.inf:
            super().add(params, weight)


class ConvertsAnything(Sound):
    def add(self, params: Any, weight: Any) -> None:
        converted = {}
        for key, array in params.items():
            known = isinstance(array, np.ndarray) and array.dtype.kind in "iuf"
            converted[key] = array if known else np.real(array).astype(np.float64)
        super().add(converted, weight)


class RefusesNothing(Sound):
    """Refuses nothing at all, and makes the best of it."""

    def add(self, params: Any, weight: Any) -> None:
        try:
            super().add(params, weight)
        except Exception:
            return


class AlwaysFloat64(Sound):
    def mean(self) -> dict[str, Any]:
        models, weights = [m for m, _ in self.sent], [w for _, w in self.sent]
        keys = dict.fromkeys(key for model in models for key in model)
        return exact_weighted_mean(models, weights, dtypes=dict.fromkeys(keys, np.float64))


class ComplexResult(Sound):
    """Its results cannot be read as real numbers without a warning, which is an error here."""

    def mean(self) -> dict[str, Any]:
        return {key: array + 0j for key, array in super().mean().items()}


class Float16Overflows(Sound):
    def mean(self) -> dict[str, Any]:
        result = super().mean()
        for key, array in result.items():
            if array.dtype == np.float16:
                total = sum(abs(m[key].astype(np.float64)) * w for m, w in self.sent if key in m)
                array[total > 65519] = np.inf
        return result


class OverflowsAtTheTop(Sound):
    def mean(self) -> dict[str, Any]:
        result = super().mean()
        for model, weight in self.sent:
            for array in model.values():
                if (
                    array.dtype.kind == "f"
                    and np.abs(array.astype(float) * weight).max(initial=0) > 1e300
                ):
                    return {key: array + np.inf for key, array in result.items()}
        return result


class OneDenominator(Sound):
    """Divides every parameter by the weight of all."""

    def mean(self) -> dict[str, Any]:
        keys = {key: array for model, _ in self.sent for key, array in model.items()}
        zeros = {key: np.zeros_like(array) for key, array in keys.items()}
        models = [{**zeros, **model} for model, _ in self.sent]
        return exact_weighted_mean(models, [w for _, w in self.sent])


class DropsPartialKeys(Sound):
    def mean(self) -> dict[str, Any]:
        everywhere = set.intersection(*(set(model) for model, _ in self.sent))
        return {key: array for key, array in super().mean().items() if key in everywhere}


class LosesBias(Sound):
    def mean(self) -> dict[str, Any]:
        return {key: array for key, array in super().mean().items() if key != "bias"}


class ContiguousOnly(Sound):
    def add(self, params: Any, weight: Any) -> None:
        if not all(array.flags.c_contiguous for array in params.values()):
            raise ValueError("not contiguous")
        super().add(params, weight)


class NativeOnly(Sound):
    """Reads the bytes of a big-endian array as if they were the machine's own."""

    def add(self, params: Any, weight: Any) -> None:
        self.check_dtypes(params)
        swapped = {
            key: array if array.dtype.isnative else array.view(array.dtype.newbyteorder())
            for key, array in params.items()
        }
        super().add(swapped, weight)


class CapsWeights(Sound):
    def add(self, params: Any, weight: Any) -> None:
        self.check_weight(weight)
        super().add(params, min(weight, 2000))


class MergesHalf(Sound):
    def merge(self, other: Any) -> None:
        self.sent += other.sent[:1]


class LastSeenWins(Sound):
    def mean(self) -> dict[str, Any]:
        return {key: array.copy() for model, _ in self.sent for key, array in model.items()}


class ShapeLost(Sound):
    def mean(self) -> dict[str, Any]:
        return {key: array.reshape(-1) for key, array in super().mean().items()}


class NoMean(Sound):
    def mean(self) -> dict[str, Any]:
        raise RuntimeError("out of order")


EVERY_RESULT = {
    *("order invariance", "merge invariance", "correctly rounded", "within the hull"),
    *("idempotent on equal models", "weight scaling", "dtype kept", "no float16 overflow"),
    *("no overflow near the largest", "partial updates", "every memory layout"),
    *("inputs unchanged", "inputs not kept", "all or nothing"),
}

BROKEN: list[tuple[type[Sound], set[str]]] = [
    (rounded_by(lambda value: math.trunc(value)), {"correctly rounded"}),
    (rounded_by(half_away_from_zero), {"correctly rounded"}),
    (rounded_by(math.floor), {"correctly rounded"}),
    (
        Float32Sum,
        {
            *("order invariance", "merge invariance", "correctly rounded", "within the hull"),
            *("idempotent on equal models", "weight scaling", "no overflow near the largest"),
        },
    ),
    (MutatesInputs, {"inputs unchanged"}),
    (KeepsReferences, {"inputs not kept"}),
    (GivesInputsBack, {"inputs not kept"}),
    (AddsHalf, {"all or nothing"}),
    (FailsLate, {"all or nothing", "not a number refused"}),
    (Broadcasts, {"wrong shape refused"}),
    (RepairsNaN, {"non-finite refused"}),
    (SkipsBadWeights, {"bad weight refused"}),
    (ConvertsAnything, {"not a number refused"}),
    (
        RefusesNothing,
        {
            *("non-finite refused", "bad weight refused", "wrong shape refused"),
            *("not a number refused",),
        },
    ),
    (AlwaysFloat64, {"dtype kept"}),
    (
        ComplexResult,
        {
            *("dtype kept", "correctly rounded", "within the hull", "every memory layout"),
            *("no float16 overflow", "no overflow near the largest"),
        },
    ),
    (Float16Overflows, {"no float16 overflow", "correctly rounded"}),
    (OverflowsAtTheTop, {"no overflow near the largest"}),
    (OneDenominator, {"partial updates"}),
    (DropsPartialKeys, {"partial updates"}),
    (LosesBias, {"correctly rounded"}),
    (ContiguousOnly, {"every memory layout"}),
    (NativeOnly, {"every memory layout"}),
    (CapsWeights, {"weight scaling"}),
    (MergesHalf, {"merge invariance"}),
    (
        LastSeenWins,
        {
            *("order invariance", "merge invariance", "correctly rounded", "partial updates"),
            *("every memory layout",),
        },
    ),
    (ShapeLost, {"correctly rounded", "every memory layout"}),
    (NoMean, EVERY_RESULT),
]


def test_a_sound_aggregator_has_every_property() -> None:
    table = check_aggregator(Sound)
    assert tuple(row.property for row in table.rows) == PROPERTIES
    assert [row for row in table.rows if row.holds is not True] == []
    assert table.conforms
    assert table.broken == ()


def test_the_exact_accumulator_has_every_property() -> None:
    table = check_aggregator(WeightedMean, "exact")
    assert [row for row in table.rows if row.holds is not True] == []


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_the_inexact_accumulators_lack_only_what_is_said_of_them(kind: Any) -> None:
    table = check_aggregator(lambda: WeightedMean(accumulator=kind), kind)
    assert "order invariance" in table.broken
    assert set(table.broken) <= {
        *("order invariance", "merge invariance", "correctly rounded", "within the hull"),
        *("idempotent on equal models", "weight scaling", "no overflow near the largest"),
        *("no float16 overflow",),
    }


@pytest.mark.parametrize(
    ("broken", "properties"), BROKEN, ids=[f"{i}-{b.__name__}" for i, (b, _) in enumerate(BROKEN)]
)
def test_the_kit_names_exactly_what_a_broken_aggregator_breaks(
    broken: type[Sound], properties: set[str]
) -> None:
    table = check_aggregator(broken)
    assert set(table.broken) == properties, str(table)
    assert all(table[name].detail for name in properties)
    assert not table.conforms


def test_every_property_is_broken_by_some_aggregator() -> None:
    assert set.union(*(properties for _, properties in BROKEN)) == set(PROPERTIES)


def test_an_aggregator_without_merge_is_not_judged_on_it() -> None:
    class WithoutMerge:
        def __init__(self) -> None:
            self.inside = Sound()
            self.add = self.inside.add
            self.mean = self.inside.mean

    table = check_aggregator(WithoutMerge)
    assert table.conforms
    assert table["merge invariance"].holds is None
    assert table["merge invariance"].detail == "it has no merge"


def test_who_refuses_nothing_is_not_judged_on_all_or_nothing() -> None:
    row = check_aggregator(RefusesNothing)["all or nothing"]
    assert (row.holds, row.detail) == (None, "it refused none of the bad updates")


def test_the_same_aggregator_gets_the_same_table_each_time() -> None:
    assert check_aggregator(Float32Sum) == check_aggregator(Float32Sum)


def test_what_is_no_aggregator_is_misuse() -> None:
    with pytest.raises(UsageError, match="methods add and mean, got <object object"):
        check_aggregator(object)  # type: ignore[arg-type]


def test_a_counterexample_says_what_was_tried_and_what_came() -> None:
    details = {row.property: row.detail for row in check_aggregator(Float16Overflows).rows}
    assert details["no float16 overflow"] == (
        "the mean of two equal float16 models [60.0, -60.0], weights 1200, is [inf, inf]"
    )
    details = {row.property: row.detail for row in check_aggregator(AddsHalf).rows}
    assert details["all or nothing"].startswith(
        "after an update with a second array of shape (3,) instead of (2,) was refused: "
        "4 of 4 elements of a differ, the first is 50.5 instead of 1.0"
    )
    details = {row.property: row.detail for row in check_aggregator(NoMean).rows}
    assert details["weight scaling"] == "raised RuntimeError: 'out of order'"


def test_a_table_prints_as_plain_text_with_a_column_for_each_aggregator() -> None:
    one = check_aggregator(Sound, "sound")
    two = check_aggregator(DropsPartialKeys, "drops")
    text = compare_tables([one, two])
    lines = text.splitlines()
    assert lines[0] == "property                      sound  drops"
    assert lines[1] == "----------------------------  -----  -----"
    assert lines[2] == "order invariance                yes    yes"
    assert lines[11] == "partial updates                 yes     no"
    assert lines[20:] == [
        "",
        "drops:",
        "  partial updates: key a, not in all updates: nothing instead of [2.0, 4.0]",
    ]
    assert str(one) == compare_tables([one])
    assert text.isascii()


def test_a_table_has_no_row_of_another_name() -> None:
    with pytest.raises(KeyError, match="beauty"):
        ConformanceTable("none", ())["beauty"]


def test_the_command_prints_one_table_of_the_three_accumulators(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["property", "exact", "float64", "float32"]
    assert err == ""


def test_the_package_is_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fedavg_core.testing.__main__")
    monkeypatch.setattr(sys, "argv", ["testing", "exact", "--strict"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fedavg_core.testing", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("property")


def test_the_command_can_be_strict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--strict", "exact"]) == 0
    assert main(["--strict", "exact", "float32"]) == 1
    assert "order invariance" in capsys.readouterr().out


def test_the_command_takes_an_aggregator_of_the_user_s_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("my_aggregators")
    module.Mine = Sound  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_aggregators", module)
    assert main(["my_aggregators:Mine", "--strict"]) == 0
    assert main(["my_aggregators:Yours"]) == 2
    assert main(["no_such_module_at_all:make"]) == 2
    assert main(["os:getcwd"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("my_aggregators:Yours: ")
    assert err[1].startswith("no_such_module_at_all:make: not installed")
    assert err[2].startswith("os:getcwd: make() must give an object with the methods add and mean")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("numpy:average", "TypeError: average() missing 1 required positional argument: 'a'"),
        ("numpy:pi", "TypeError: 'float' object is not callable"),
        (":make", "ValueError: Empty module name"),
    ],
)
def test_what_makes_no_aggregator_is_one_line(
    name: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    expected = f"{name}: expected what makes an aggregator, got {problem}\n"
    assert capsys.readouterr() == ("", expected)


def test_a_table_that_nobody_reads_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(os.dup(write), "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["exact"]) == 2
    done = subprocess.run(
        [sys.executable, "-m", "fedavg_core.testing", "exact"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


def test_flower_gets_its_replies_as_lists_of_arrays_that_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def aggregate(results: list[tuple[list[Any], int]]) -> list[Any]:
        return [sum(n * arrays[i] for arrays, n in results) / 4 for i in range(2)]

    module = ModuleType("flwr.server.strategy.aggregate")
    module.aggregate = aggregate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr.server.strategy.aggregate", module)
    replies = fedavg_core.testing.peers.PEERS["flower"]()()
    first = {"a": np.array([1.0]), "b": np.array([2.0])}
    replies.add(first, 1)
    first["a"][0] = 99.0
    replies.add({"a": np.array([5.0]), "b": np.array([6.0])}, 3)
    assert replies.mean() == {"a": [4.0], "b": [5.0]}


def test_the_command_says_in_one_line_that_a_name_is_unknown_or_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'flwr'")

    monkeypatch.setitem(fedavg_core.testing.peers.PEERS, "flower", missing)
    assert main(["exact", "flower"]) == 2
    assert main(["summation"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "flower: not installed (No module named 'flwr')",
        "summation: expected one of exact, float64, float32, nvflare, nvflare-helper, flower, "
        "or module:function, got 'summation'",
    ]
