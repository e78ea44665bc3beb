"""Arguments that callers give: what is taken, and what is told of what is not."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedavg_core as fc
from fedavg_core.arguments import (
    file_path,
    is_whole_number,
    one_for_each,
    real_number,
    whole_number,
)
from fedavg_core.errors import UsageError, type_name
from tests.bad_updates import Liar

# Whole numbers


class Level(IntEnum):
    """Integers that are not quite Python's own."""

    THREE = 3


WHOLE: list[Any] = [
    *(0, 1, -1, 1 << 64, 2**1024 - 1, 1 - 2**1024, Level.THREE),
    *(np.dtype(name).type(3) for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")),
    *(np.int64(-(2**63)), np.uint64(2**64 - 1), np.array([5])[0]),
]
NOT_WHOLE: list[Any] = [
    *(True, False, np.True_, np.False_),
    *(1.0, float("nan"), float("inf"), np.float64(1), np.float16(1), 1 + 0j),
    *(Fraction(1), Decimal(1), "1", b"1", "", None, [1], (), np.array(1), np.array([1])),
    *(np.timedelta64(1, "s"), np.timedelta64("NaT", "s"), np.datetime64(1, "s"), int, object()),
]


@pytest.mark.parametrize("value", WHOLE, ids=type_name)
def test_an_integer_of_python_or_numpy_comes_back_as_pythons_own(value: Any) -> None:
    assert is_whole_number(value)
    found = whole_number("n", value)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize("value", NOT_WHOLE, ids=type_name)
@pytest.mark.parametrize("least", [None, 0])
def test_nothing_else_is_a_whole_number(value: Any, least: int | None) -> None:
    assert not is_whole_number(value)
    with pytest.raises(UsageError, match=r"^n: expected a whole number"):
        whole_number("n", value, least)


@pytest.mark.parametrize("kind", [int, np.int64, np.int8])
@pytest.mark.parametrize("least", [-1, 0, 1, 100])
def test_the_smallest_that_has_a_meaning_is_taken_and_the_next_smaller_is_not(
    kind: Any, least: int
) -> None:
    assert whole_number("n", kind(least), least) == least
    assert whole_number("n", kind(least + 1), least) == least + 1
    with pytest.raises(UsageError):
        whole_number("n", kind(least - 1), least)


def test_any_is_taken_where_none_is_the_smallest() -> None:
    assert whole_number("seed", -(1 << 70)) == -(1 << 70)


@pytest.mark.parametrize(
    ("value", "least", "message"),
    [
        (True, None, "rounds: expected a whole number, got True"),
        ("5\n", None, r"rounds: expected a whole number, got '5\n'"),
        (2.0, 0, "rounds: expected a whole number of at least 0, got 2.0"),
        (-1, 0, "rounds: expected a whole number of at least 0, got -1"),
        (-(10**5000), 1, "rounds: expected a whole number of at least 1, got <int>"),
    ],
    ids=["truth value", "text", "float", "too small", "too small by far"],
)
def test_the_message_names_the_argument_what_is_wanted_and_what_was_given(
    value: object, least: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        whole_number("rounds", value, least)


@pytest.mark.parametrize(
    "value", [2**1024, -(2**1024), 10**5000], ids=["1025 bits", "less", "more"]
)
def test_one_that_is_too_long_to_be_shown_is_refused(value: int) -> None:
    with pytest.raises(UsageError, match=r"^n: expected a whole number below 2\*\*1024, got one"):
        whole_number("n", value)


def test_what_a_subclass_says_of_itself_is_not_believed() -> None:
    assert whole_number("n", Liar(3), 1) == 3


# Numbers


def above_zero(value: object) -> float:
    return real_number("rate", value, "a finite number above 0", lambda number: number > 0)


@pytest.mark.parametrize(
    "value",
    [1, 0.5, np.float16(0.5), np.float32(0.1), np.float64(0.1), np.int8(3), 10**300],
    ids=type_name,
)
def test_a_number_of_python_or_numpy_comes_back_as_a_float_of_the_same_value(value: Any) -> None:
    found = above_zero(value)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    "value",
    [0, -1.0, math.nan, math.inf, -math.inf, 10**400, True, np.True_, "1", None, 1j, Decimal(1)],
    ids=repr,
)
def test_what_has_no_meaning_is_told_with_what_was_wanted(value: object) -> None:
    with pytest.raises(UsageError, match=r"^rate: expected a finite number above 0, got "):
        above_zero(value)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda value: fc.TrimmedMean(value).trim, np.float32(0.25)),
        (lambda value: fc.ClippedMean(value).limit, np.int64(2)),
        (lambda value: fc.FedAdam(learning_rate=value).learning_rate, np.float16(0.5)),
        (lambda value: fc.FedAvgM(momentum=value).momentum, np.float32(0.5)),
    ],
)
def test_settings_are_numbers_of_numpy_as_well(make: Callable[[Any], object], given: Any) -> None:
    found = make(given)
    assert type(found) is float
    assert found == given


def test_a_fraction_of_the_clients_is_a_number_of_numpy_as_well() -> None:
    clients = dict.fromkeys("abcd", lambda params, _: fc.TrainResult(params, 1))
    federation = fc.Federation(MODEL, clients, rounds=1, participation=np.float32(0.5))
    assert [len(outcome.accepted) for outcome in federation.run()] == [2]


# Lists


@pytest.mark.parametrize("values", [[3, 4], (3, 4), np.array([3, 4]), range(3, 5), iter([3, 4])])
def test_what_has_an_order_is_a_list(values: object) -> None:
    assert one_for_each("weights", values, 2, "model") == [3, 4]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({3: 1, 4: 1}, "{3: 1, 4: 1}"),
        ({3, 4}, "{3, 4}"),
        ({3: 1, 4: 1}.keys(), "dict_keys([3, 4])"),
        ("34", "'34'"),
        (b"34", "b'34'"),
        (Path("a/b"), "PosixPath('a/b')"),
        (np.array(3), "array(3)"),
        (3, "3"),
        ([3], "1"),
        ([3, 4, 5], "3"),
    ],
    ids=repr,
)
def test_what_has_no_order_or_another_length_is_told(values: object, got: str) -> None:
    message = f"weights: expected a list of 2, one for each model, got {got}"
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        one_for_each("weights", values, 2, "model")


@pytest.mark.parametrize("weights", [{1: 120, 2: 80}, {120, 80}])
def test_no_weights_are_taken_out_of_a_mapping_or_a_set(weights: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, allow_pickle=False, **MODEL)
    with pytest.raises(UsageError, match=r"^weights: expected a list of 2, one for each model"):
        fc.weighted_mean([MODEL, MODEL], weights=weights)
    with pytest.raises(UsageError, match=r"^weights: expected a list of 2, one for each file"):
        fc.aggregate_files([path, path], weights, tmp_path / "out.npz")
    assert os.listdir(tmp_path) == ["a.npz"]


# Paths


MODEL = {"w": np.ones(2, np.float32)}
TAKERS: dict[str, Callable[[Any, Path], object]] = {
    "load_model: path": lambda path, _: fc.load_model(path),
    "load_checkpoint: path": lambda path, _: fc.load_checkpoint(path),
    "save_checkpoint: path": lambda path, _: fc.save_checkpoint(
        path, fc.Checkpoint(model=MODEL, round=0)
    ),
    "CheckpointStore: folder": lambda path, _: fc.CheckpointStore(path),
    "Federation: checkpoint": lambda path, _: fc.Federation(
        MODEL, {"a": lambda params, _: fc.TrainResult(params, 1)}, rounds=1, checkpoint=path
    ),
    "aggregate_files: paths[1]": lambda path, model: fc.aggregate_files(
        [model, path], [1, 2], model.with_name("out.npz")
    ),
    "aggregate_files: output": lambda path, model: fc.aggregate_files([model], [1], path),
    "aggregate_files: base": lambda path, model: fc.aggregate_files(
        [model], [1], model.with_name("out.npz"), base=path
    ),
    "aggregate_files: scratch": lambda path, model: fc.aggregate_files(
        [model], [1], model.with_name("out.npz"), scratch=path
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("path", [5, b"m.npz", "", "m\0.npz", "\ud800.npz", Path("m\0.npz")])
def test_what_is_no_path_is_told_and_nothing_is_written(
    taker: str, path: object, tmp_path: Path
) -> None:
    model = tmp_path / "model.npz"
    np.savez(model, allow_pickle=False, **MODEL)
    _, name = taker.split(": ")
    with pytest.raises(fc.UsageError) as caught:
        TAKERS[taker](path, model)
    told = str(caught.value)
    assert told.startswith(f"{name}: expected a path, got "), told
    assert told.isprintable()
    assert os.listdir(tmp_path) == ["model.npz"]


class Odd:
    """Says that it is a path, and gives something else, or fails."""

    def __init__(self, given: object) -> None:
        self.given = given

    def __fspath__(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


class OddText(str):
    def __bool__(self) -> bool:
        raise RuntimeError

    def encode(self, *_: object) -> bytes:
        raise RuntimeError


@pytest.mark.parametrize("path", [Odd(3), Odd(b"a.npz"), Odd(RuntimeError("no"))])
def test_what_only_says_that_it_is_a_path_is_told(path: object) -> None:
    with pytest.raises(fc.UsageError, match="path: expected a path, got "):
        fc.load_model(path)  # type: ignore[arg-type]


def test_text_that_answers_oddly_is_read_as_text() -> None:
    assert file_path("path", OddText("a.npz")) == Path("a.npz")


@pytest.mark.parametrize("path", ["a\nforged: line.npz", "x" * 5000 + ".npz"])
def test_a_path_does_not_make_a_message_long_or_of_several_lines(path: str) -> None:
    odd: list[Callable[[], object]] = [
        lambda: fc.load_model(path),
        lambda: fc.load_checkpoint(path),
        lambda: fc.aggregate_files([path], [1], "out.npz"),
        lambda: fc.aggregate_files(["no.npz"], [1], path + ".txt"),
    ]
    for one in odd:
        with pytest.raises(fc.FedAvgError) as caught:
            one()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 4200


def test_a_path_is_taken_as_it_is() -> None:
    odd = os.fsdecode(b"\xff\n.npz")  # a name that is no text, as a folder may hold
    assert file_path("path", odd) == Path(odd)
    assert file_path("path", Path("a") / "..") == Path("a") / ".."
