"""What is known beside the sums: it follows every change, is never changed, and is told in JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.errors import UsageError
from fedavg_core.model import ModelSpec
from fedavg_core.sums.books import Books, Term
from fedavg_core.weight import Weight, exact_weight

MODEL: dict[str, Any] = {
    "w": np.zeros((2, 3), np.float32),
    "b": np.zeros(0),
    "odd/../name\n": np.zeros((), ">i2"),
    "h": np.zeros(4, ml_dtypes.bfloat16),
}
SPEC = dict(ModelSpec.of(MODEL))

weights = st.one_of(
    st.integers(1, 5),
    st.integers(1, 1 << 1100),
    st.floats(0, exclude_min=True, allow_infinity=False).map(exact_weight),
)
terms = st.tuples(
    st.sets(st.sampled_from(sorted(MODEL)), min_size=1).map(
        lambda keys: {key: MODEL[key] for key in keys}
    ),
    weights,
)


def term(keys: str, weight: Weight) -> Term:
    """An update that brings some of `w`, `b` and `h`."""
    return {key: MODEL[key] for key in keys}, weight


def books(*some: Term, spec: Iterable[str] = ()) -> Books:
    """The books of some updates, whose parameters need not be known before."""
    return Books({key: SPEC[key] for key in spec}, {}).after(some, 1)


@given(st.lists(terms, max_size=6))
def test_they_hold_the_exact_sum_of_the_weights_of_those_that_brought_a_parameter(
    some: list[Term],
) -> None:
    found = books(*some)
    brought = list(dict.fromkeys(key for params, _ in some for key in params))
    assert found.spec == {key: SPEC[key] for key in brought}
    assert found.weights == {
        key: sum(weight for params, weight in some if key in params) for key in brought
    }
    assert found.keys == tuple(brought)
    assert found.count == len(some)
    assert found.total == sum(weight for _, weight in some)


@given(st.lists(terms, max_size=4), st.lists(terms, max_size=4))
def test_what_is_taken_away_was_never_there_but_for_the_names_it_brought(
    some: list[Term], others: list[Term]
) -> None:
    left, expected = books(*some, *others).after(others, -1), books(*some)
    assert left.spec == books(*some, *others).spec
    assert left.keys == expected.keys
    assert left.weights == {**dict.fromkeys(left.spec, 0), **expected.weights}
    assert (left.count, left.total) == (expected.count, expected.total)
    assert left.to_json() == expected.to_json()


@given(st.lists(terms, max_size=4), st.lists(terms, max_size=4))
def test_the_books_of_both_are_those_of_all_updates(some: list[Term], others: list[Term]) -> None:
    both, expected = books(*some).merged_with(books(*others), False), books(*some, *others)
    assert both == expected
    assert both.keys == expected.keys


@given(st.lists(terms, min_size=1, max_size=6), st.data())
def test_whatever_was_added_can_be_removed_and_empties_what_it_alone_has_brought(
    some: list[Term], data: st.DataObject
) -> None:
    before = books(*some)
    (params, weight), *rest = data.draw(st.permutations(some))
    emptied = before.emptied_by(iter(params), weight, weight)
    assert set(emptied) == set(before.keys) - set(books(*rest).keys)
    assert len(emptied) == len(set(emptied))


@given(st.lists(terms, min_size=1, max_size=6), st.data())
def test_what_they_tell_in_json_is_all_that_was_brought(
    some: list[Term], data: st.DataObject
) -> None:
    removed = some[: data.draw(st.integers(0, len(some)))]
    told = books(*some, spec=MODEL).after(removed, -1)
    again = Books.from_json(json.loads(json.dumps({**told.to_json(), "format": 7, "sums": []})))
    assert again.spec == {key: SPEC[key] for key in told.keys}
    assert again.weights == {key: told.weights[key] for key in told.keys}
    assert again.keys == told.keys
    assert (again.count, again.total) == (told.count, told.total)


def test_books_are_never_changed() -> None:
    one, other = books(term("wb", 2), spec="h"), books(term("wh", Fraction(1, 2)))
    before = copy.deepcopy((one, other))
    made = [one.after([term("h", 3)], 1), one.after([term("w", 2)], -1)]
    made += [one.merged_with(other, False), Books.from_json(one.to_json())]
    one.emptied_by("wb", 2, 2)
    for new in made:
        new.spec["new"] = SPEC["w"]
        new.weights["w"] = 99
    assert (one, other) == before
    with pytest.raises(FrozenInstanceError):
        one.count = 5  # type: ignore[misc]


def test_a_parameter_that_is_known_and_that_nobody_brought_has_no_weight() -> None:
    known = books(spec="wb")
    assert (known.keys, known.weights, known.count, known.total) == ((), {}, 0, 0)
    assert books(term("b", 2), spec="wb").keys == ("b",)


def test_the_parameters_stand_in_the_order_in_which_they_became_known() -> None:
    assert books(term("h", 1), term("bw", 1), spec="w").keys == ("w", "h", "b")
    assert books(term("h", 1)).merged_with(books(term("bh", 1)), False).keys == ("h", "b")


@pytest.mark.parametrize("is_fixed", [False, True])
def test_of_the_others_only_what_somebody_brought_is_taken_over(is_fixed: bool) -> None:
    mine = books(term("w", 1), spec="wb")
    others = books(term("b", 2), spec="bh").merged_with(books(spec="h"), False)
    both = mine.merged_with(others, is_fixed)
    assert both.spec == {"w": SPEC["w"], "b": SPEC["b"]}
    assert both.weights == {"w": 1, "b": 2}


def test_where_the_parameters_are_fixed_the_others_may_bring_no_more() -> None:
    mine, others = books(term("w", 1)), books(term("wh", 2))
    assert mine.merged_with(others, False).keys == ("w", "h")
    with pytest.raises(UsageError, match="key 'h': the spec does not name it"):
        mine.merged_with(others, True)


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("other", [np.zeros((3, 2), np.float32), np.zeros((2, 3))])
def test_the_others_may_not_have_a_parameter_of_another_shape_or_dtype(
    other: Any, is_fixed: bool
) -> None:
    others = Books({}, {}).after([({"w": other}, 2)], 1)
    told = rf"key 'w': expected float32\[2, 3\], got {other.dtype}\[{other.shape[0]}, "
    for mine in (books(term("w", 1)), books(spec="w")):
        with pytest.raises(UsageError, match=told):
            mine.merged_with(others, is_fixed)


@pytest.mark.parametrize(
    ("held", "removed", "told"),
    [
        ([], ("w", 1), "key 'w': cannot remove weight 1, which is more than the 0 that was"),
        ([], ("", 1), "cannot remove what was not added: -1 updates do not come to"),
        ([("w", 2)], ("w", 3), "key 'w': .* weight 3, which is more than the 2 that was added"),
        ([("w", 2)], ("b", 1), "key 'b': .* weight 1, which is more than the 0 that was added"),
        ([("w", 2)], ("wb", 2), "key 'b': .* weight 2, which is more than the 0 that was added"),
        ([("w", Fraction(1, 2))], ("w", 1), r"more than the 0\.5 that was added"),
        ([("w", 1 << 60)], ("w", 1 << 61), f"more than the {1 << 60} that was added"),
        ([("w", 1 << 9000)], ("w", 1 << 9001), r"more than the \d+\.\.\. that was added"),
        ([("w", 5)], ("w", 3), "cannot remove what was not added: 0 updates do not come to"),
        ([("w", 5)], ("", 3), "cannot remove what was not added: 0 updates do not come to"),
        ([("wb", 2)], ("w", 2), "cannot remove what was not added: 0 updates do not come to"),
        ([("wb", 2), ("w", 2)], ("w", 3), "cannot remove what .*: 1 updates do not come to"),
        ([("wb", 2), ("w", 2)], ("", 3), "cannot remove what .*: 1 updates do not come to"),
    ],
)
def test_what_the_weights_show_not_to_be_in_the_sums_cannot_be_removed(
    held: list[tuple[str, Weight]], removed: tuple[str, Weight], told: str
) -> None:
    before = books(*(term(*one) for one in held))
    keys, weight = removed
    with pytest.raises(UsageError, match=told):
        before.emptied_by(iter(keys), weight, weight)


def test_the_weight_that_was_given_is_the_one_that_is_shown() -> None:
    with pytest.raises(UsageError, match=r"cannot remove weight 0\.1, which is more than the 0 "):
        books().emptied_by("w", exact_weight(0.1), 0.1)


def test_nothing_but_what_was_brought_is_told_in_json() -> None:
    told = books(term("w", Fraction(3, 2)), term("h", 30), spec="b").to_json()
    assert told == {
        "count": 2,
        "total_weight": "3f/2",
        "keys": [
            {"name": "w", "shape": [2, 3], "dtype": "float32", "weight": "3/2"},
            {"name": "h", "shape": [4], "dtype": "bfloat16", "weight": "1e/1"},
        ],
    }


NO_SHAPES: list[Any] = [[-1], [2.5], ["3"], [[3]], 3, None, [10**30], "", {}]
ENTRY = {"name": "w", "shape": [2, 3], "dtype": "float32", "weight": "3/2"}


@pytest.mark.parametrize(
    "entry",
    [
        *({"name": 1}, {"name": None}, {"name": ["w"]}, {"name": "b"}),
        *({"shape": shape} for shape in NO_SHAPES),
        *({"dtype": dtype} for dtype in ("bool", "complex64", "float", "f4", ">f4", 3, None)),
        *({"weight": weight} for weight in ("0/1", "-1/2", "1/3", "1/0", "1", "x/1", "", 1, None)),
    ],
    ids=str,
)
def test_a_parameter_that_there_cannot_be_is_refused_in_json(entry: dict[str, Any]) -> None:
    first = {**ENTRY, "name": "b"}
    meta = {"count": 1, "total_weight": "3/2", "keys": [first, ENTRY]}
    assert Books.from_json(meta).keys == ("b", "w")
    with pytest.raises((UsageError, AttributeError, TypeError, ValueError, ZeroDivisionError)):
        Books.from_json({**meta, "keys": [first, {**ENTRY, **entry}]})


@pytest.mark.parametrize("missing", ["name", "shape", "dtype", "weight"])
def test_a_parameter_that_lacks_something_is_refused_in_json(missing: str) -> None:
    entry = {key: value for key, value in ENTRY.items() if key != missing}
    with pytest.raises(LookupError, match=missing):
        Books.from_json({"count": 1, "total_weight": "3/2", "keys": [entry]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"count": -1}, "count: expected a whole number of at least 0, got -1"),
        ({"count": True}, "count: expected a whole number of at least 0, got True"),
        ({"count": 1.0}, "count: expected a whole number of at least 0, got 1.0"),
        ({"keys": [ENTRY, ENTRY]}, "expected a new name of a parameter, got 'w'"),
        ({"keys": [{**ENTRY, "weight": "0/1"}]}, "key 'w': expected a weight above zero, got 0"),
    ],
)
def test_entries_that_no_books_have_are_refused_in_words(change: dict[str, Any], told: str) -> None:
    meta = {"count": 1, "total_weight": "3/2", "keys": [ENTRY]}
    with pytest.raises(UsageError, match=told):
        Books.from_json({**meta, **change})
    assert Books.from_json({"count": 0, "total_weight": "0/1", "keys": []}) == Books({}, {})


@pytest.mark.parametrize(
    ("count", "total", "weights"),
    [
        *((0, "0/1", ["1/1"]), (0, "1/1", []), (0, "1/1", ["1/1"]), (0, "-1/1", [])),
        *((1, "0/1", []), (1, "1/1", []), (1, "1/1", ["2/1"]), (1, "2/1", ["1/1"])),
        *((1, "2/1", ["2/1", "1/1"]), (1, "2/1", ["1/1", "1/1"]), (1, "-1/2", ["1/2"])),
        *((2, "1/1", []), (2, "4/1", ["5/1", "1/1"]), (2, "7/2", ["1/1", "2/1"])),
    ],
)
def test_weights_that_no_updates_come_to_are_refused(
    count: int, total: str, weights: list[str]
) -> None:
    keys = [{**ENTRY, "name": str(number), "weight": each} for number, each in enumerate(weights)]
    meta = {"count": count, "total_weight": total, "keys": keys}
    with pytest.raises(UsageError, match=f"expected weights that {count} updates come to, got a "):
        Books.from_json(meta)
