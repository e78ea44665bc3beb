"""Whole numbers that callers give: what is one, and what is told of what is none."""

from __future__ import annotations

import re
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedavg_core.errors import UsageError, type_name
from fedavg_core.whole_number import is_whole_number, whole_number
from tests.bad_updates import Liar


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
