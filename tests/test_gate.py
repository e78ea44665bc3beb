"""What the gate lets in, what it keeps out, and in which words."""

from __future__ import annotations

import copy
import io
import json
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.codec.npz import NpzWriter
from fedavg_core.errors import Reason, RefusedUpdate, UsageError
from fedavg_core.gate import _MOST_PARAMETERS, Gate, Limits, is_name, shown_name
from fedavg_core.model import ArraySpec
from fedavg_core.norm import norm_above
from fedavg_core.round import Round, _Begun
from fedavg_core.update import TransferType, Update
from tests.bad_updates import BAD_UPDATES, CONTRIBUTOR, ROUND, Bad, FailingMapping, good, model

NUMBERED = [
    pytest.param(bad, id=ascii(f"{number} {bad.what}"[:60]))
    for number, bad in enumerate(BAD_UPDATES)
]


def judge(update: Update, limits: Limits | None = None, **more: Any) -> Any:
    return Gate(model(), ROUND, limits or Limits()).judge(update, **more)


@pytest.mark.parametrize("bad", NUMBERED)
def test_a_bad_update_is_refused_for_its_reason_and_changes_nothing(bad: Bad) -> None:
    round = Round(model(), ROUND, limits=bad.limits, transfer=bad.transfer)
    kind = bad.transfer or TransferType.FULL
    if bad.reason in (Reason.NON_FINITE, Reason.NORM):
        kind = bad.update().transfer
    near = {key: value[:0] if kind is None else value for key, value in model().items()}
    assert round.offer(good("site-1", params=near, transfer=kind, weight=3)).accepted == (
        # Full models are no small differences: a limit on those keeps them out.
        kind is TransferType.FULL or bad.limits.max_norm is None
    )
    before = round._mean.digest()
    receipt = round.offer(bad.update())
    assert (receipt.accepted, receipt.reason) == (False, bad.reason)
    assert (receipt.round, receipt.weight, receipt.metrics) == (ROUND, None, {})
    assert round._mean.digest() == before
    assert round.refused[-1] is receipt
    assert receipt.detail.startswith(f"{bad.reason} (contributor ")
    assert f"round {ROUND}" in receipt.detail
    assert ": expected " in receipt.detail
    assert ", got " in receipt.detail
    assert receipt.detail.isprintable()
    assert receipt.detail.isascii()
    assert len(receipt.detail) < 500
    assert receipt.contributor.isprintable()
    assert len(receipt.contributor) <= 256


@pytest.mark.parametrize("bad", NUMBERED)
def test_the_gate_alone_refuses_all_but_what_is_not_finite(bad: Bad) -> None:
    gate = Gate(model(), ROUND, bad.limits)
    if bad.reason is Reason.NON_FINITE:
        assert gate.judge(bad.update(), transfer=bad.transfer)
        return
    with pytest.raises(RefusedUpdate) as refusal:
        gate.judge(bad.update(), transfer=bad.transfer)
    assert refusal.value.reason is bad.reason


def test_the_table_of_bad_updates_covers_every_reason_often() -> None:
    counts = Counter(bad.reason for bad in BAD_UPDATES)
    assert len(BAD_UPDATES) >= 72
    assert set(counts) == set(Reason) - {Reason.DUPLICATE, Reason.ROUND_CLOSED}
    assert min(counts.values()) >= 4


@pytest.mark.parametrize("again", [good(), good(weight=1), good(params={}), good(weight=-1)])
def test_a_second_update_of_a_contributor_is_a_duplicate_whatever_it_holds(again: Update) -> None:
    with pytest.raises(RefusedUpdate, match="DUPLICATE") as refusal:
        judge(again, accepted={CONTRIBUTOR})
    assert refusal.value.contributor == CONTRIBUTOR
    assert refusal.value.round == ROUND


def test_a_refusal_says_which_key_and_what_was_expected() -> None:
    with pytest.raises(RefusedUpdate) as refusal:
        judge(good(params={"w": np.ones(3, np.float32)}))
    assert str(refusal.value) == (
        "SHAPE (contributor 'site-2', round 3, key 'w'): "
        "expected the shape (2, 2), got the shape (3,)"
    )


def test_the_first_check_that_fails_decides() -> None:
    worst = good("\n", round=9, params={"w": np.ones(1)}, weight=-1, transfer=TransferType.DIFF)
    expected: list[tuple[dict[str, Any], Reason]] = [
        ({}, Reason.BAD_NAME),
        ({"contributor": "site-4"}, Reason.UNKNOWN_CONTRIBUTOR),
        ({"contributor": CONTRIBUTOR}, Reason.FUTURE_ROUND),
        ({"round": ROUND}, Reason.DUPLICATE),
        ({"contributor": "site-3"}, Reason.TRANSFER),
        ({"transfer": TransferType.FULL}, Reason.BAD_WEIGHT),
        ({"weight": 1}, Reason.SHAPE),
        ({"params": {"w": np.ones((2, 2))}}, Reason.MISSING_KEYS),
        (
            {"params": {key: value + value.dtype.type(9) for key, value in model().items()}},
            Reason.NORM,
        ),
    ]
    limits = Limits(roster=frozenset({CONTRIBUTOR, "site-3"}), allow_missing=False, max_norm=4.0)
    fields: dict[str, Any] = dict(worst.__dict__)
    for change, reason in expected:
        fields.update(change)
        with pytest.raises(RefusedUpdate) as refusal:
            judge(Update(**fields), limits, accepted={CONTRIBUTOR}, transfer=TransferType.FULL)
        assert refusal.value.reason is reason


def test_a_good_update_is_reduced_to_what_counts() -> None:
    update = good(
        weight=np.float32(0.1),
        params={**good().params, "x": "not looked at"},
        metrics={"loss": np.float32(0.5), "steps": 3, "name": "x", "nan": math.nan},
    )
    contribution = judge(update, Limits(exclude="^(b|n)$", allow_unexpected=True))
    assert contribution.contributor == CONTRIBUTOR
    assert contribution.transfer is TransferType.FULL
    assert list(contribution.params) == ["w", "h"]
    assert contribution.params["w"] is update.params["w"]
    assert (type(contribution.weight), contribution.weight) == (float, float(np.float32(0.1)))
    assert contribution.metrics == {"loss": 0.5, "steps": 3.0}
    assert contribution.skipped_metrics == ("name", "nan")


@pytest.mark.parametrize(
    ("weight", "exact"),
    [
        (3, 3),
        (np.int8(3), 3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (10**300, 10**300),
        (0.1, 0.1),
        (np.float64(0.1), 0.1),
        (np.float16(0.1), 0.0999755859375),
        (5e-324, 5e-324),
        (1.7976931348623157e308, 1.7976931348623157e308),
    ],
)
def test_a_weight_is_taken_at_its_exact_value(weight: Any, exact: float) -> None:
    taken = judge(good(weight=weight)).weight
    assert type(taken) in (int, float)
    assert Fraction(taken) == Fraction(exact)


def test_a_weight_at_its_limit_is_taken() -> None:
    assert judge(good(weight=10), Limits(max_weight=10)).weight == 10


def test_an_array_of_a_subclass_is_taken_as_plain() -> None:
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    taken = judge(good(params={"w": matrix})).params["w"]
    assert type(taken) is np.ndarray


def test_a_contributor_and_keys_of_a_subclass_of_str_are_taken_as_plain() -> None:
    contribution = judge(good(np.str_("site-9"), params={np.str_("w"): model()["w"]}))
    assert type(contribution.contributor) is str
    assert [type(key) for key in contribution.params] == [str]


def test_what_is_said_about_an_excluded_parameter_is_not_looked_at() -> None:
    update = good(params={"w": model()["w"], "b": "anything", "n": np.full(9, np.nan)})
    assert list(judge(update, Limits(exclude="b|n")).params) == ["w"]


def test_a_missing_parameter_that_is_excluded_is_not_missed() -> None:
    update = good(params={"w": model()["w"], "h": model()["h"]})
    assert judge(update, Limits(exclude="b|n", allow_missing=False))


@pytest.mark.parametrize(
    ("metrics", "skipped"),
    [
        ({"a": "text"}, ("a",)),
        ({"a": None, "b": [1], "c": 1j, "d": True, "e": np.True_}, tuple("abcde")),
        ({"a": math.inf, "b": -math.inf, "c": math.nan, "d": 10**400}, tuple("abcd")),
        ({"a": np.float32("inf"), "b": np.ones(1), "c": np.timedelta64(5, "s")}, tuple("abc")),
        ({"\n": 1.0, "": 1.0, 5: 1.0}, ("'\\n'", "''", "5")),
        ({"m" * 300: 1.0}, ("'" + "m" * 76 + "...",)),
        (None, ("<an object of type 'NoneType' where a mapping was expected>",)),
        ([1.0], ("<an object of type 'list' where a mapping was expected>",)),
        (
            FailingMapping(),
            ("<an object of type 'FailingMapping' where a mapping was expected>",),
        ),
        (
            {str(number): 1.0 for number in range(1_001)},
            ("<1001 metrics where at most 1000 were expected>",),
        ),
    ],
)
def test_a_metric_that_is_no_finite_number_is_left_out_and_named(
    metrics: Any, skipped: tuple[str, ...]
) -> None:
    contribution = judge(good(metrics=metrics))
    assert contribution.metrics == {}
    assert contribution.skipped_metrics == skipped


@pytest.mark.parametrize(("error", "seen"), [(SystemExit, RefusedUpdate), (KeyboardInterrupt,) * 2])
def test_whatever_a_mapping_raises_is_no_mapping_but_for_an_interruption(
    error: type[BaseException], seen: type[BaseException]
) -> None:
    class Raising(dict[str, Any]):
        def items(self) -> Any:
            raise error

    with pytest.raises(seen):
        judge(good(params=Raising()))


def test_a_thousand_metrics_are_read() -> None:
    metrics = {str(number): number for number in range(1_000)}
    assert judge(good(metrics=metrics)).metrics == metrics


class TestWithoutAModel:
    """The contributors bring the first one."""

    def test_any_parameters_will_do(self) -> None:
        contribution = Gate({}, 0, Limits()).judge(good(round=0))
        assert list(contribution.params) == ["w", "b", "n", "h"]

    def test_differences_are_refused(self) -> None:
        with pytest.raises(RefusedUpdate, match="no model yet to differ from") as refusal:
            Gate({}, 0, Limits()).judge(good(round=0, transfer=TransferType.DIFF))
        assert refusal.value.reason is Reason.TRANSFER

    @pytest.mark.parametrize("key", ["", "a\nb", "\x00", "k" * 257, "\ud800"])
    def test_a_parameter_needs_a_printable_name(self, key: str) -> None:
        with pytest.raises(RefusedUpdate) as refusal:
            Gate({}, 0, Limits()).judge(good(round=0, params={key: np.ones(1)}))
        assert refusal.value.reason is Reason.BAD_NAME
        assert str(refusal.value).isprintable()

    def test_a_parameter_needs_a_shape_that_files_hold(self) -> None:
        shapes: list[tuple[int, ...]] = [(2**62, 0)]
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # else no array has so many dimensions
            shapes.append((1,) * 33)
        for array in (np.empty(shape, np.uint8) for shape in shapes):
            with pytest.raises(RefusedUpdate, match="that files hold, got the shape") as refusal:
                Gate({}, 0, Limits()).judge(good(round=0, params={"w": array}))
            assert refusal.value.reason is Reason.SHAPE

    def test_there_may_be_no_more_parameters_than_a_checkpoint_holds_with_their_states(
        self,
    ) -> None:
        params = {str(number): np.ones(0) for number in range(_MOST_PARAMETERS)}
        assert Gate({}, 0, Limits()).judge(good(round=0, params=params))
        everything = [*params, *(f"{key}.{state}" for key in params for state in "mv")]
        NpzWriter(io.BytesIO(), dict.fromkeys(everything, ArraySpec((0,), np.dtype(np.float64))))
        with pytest.raises(RefusedUpdate, match=r"at most 21844 parameters, got 21845") as refusal:
            Gate({}, 0, Limits()).judge(good(round=0, params={**params, "x": np.ones(0)}))
        assert refusal.value.reason is Reason.UNEXPECTED_KEYS

    def test_excluded_parameters_are_left_out(self) -> None:
        contribution = Gate({}, 0, Limits(exclude="w")).judge(good(round=0))
        assert list(contribution.params) == ["b", "n", "h"]

    @pytest.mark.parametrize(
        ("keys", "reason"),
        [({"w"}, Reason.UNEXPECTED_KEYS), ({"w", "b", "n", "h", "x"}, Reason.MISSING_KEYS)],
    )
    def test_the_first_update_stands_for_the_model(self, keys: set[str], reason: Reason) -> None:
        gate = Gate({}, 0, Limits(allow_missing=False))
        with pytest.raises(RefusedUpdate) as refusal:
            gate.judge(good(round=0), keys=frozenset(keys))
        assert refusal.value.reason is reason
        assert gate.judge(good(round=0), keys=frozenset("wbnh"))

    def test_the_norm_is_that_of_the_parameters(self) -> None:
        limits = Limits(max_norm=5.0)
        gate = Gate({}, 0, limits)
        assert gate.judge(good(round=0, params={"a": np.array([3.0, 4.0])}))
        with pytest.raises(RefusedUpdate, match=r"at most 5\.0, got one of 5\.09"):
            gate.judge(good(round=0, params={"a": np.array([3.0, 4.0]), "b": np.ones(1)}))


class TestTheNorm:
    """`norm_above`, and what the gate makes of it."""

    def test_a_norm_at_the_limit_is_within(self) -> None:
        near = {"b": model()["b"] + np.array([4.0, 0.0, 0.0])}
        assert judge(good(params=near), Limits(max_norm=4.0))

    def test_it_is_that_of_the_difference_from_the_model(self) -> None:
        far = {key: value * 1000 for key, value in model().items() if key != "h"}
        base = {key: far[key] for key in far}
        gate = Gate(base, ROUND, Limits(max_norm=1e-3))
        assert gate.judge(good(params=far))

    def test_it_is_over_all_parameters_together(self) -> None:
        params = {"a": np.full(9, 3.0), "b": np.full((4, 4), 3, np.int8)}
        assert norm_above(params, {}, 15.0) is None
        assert norm_above(params, {}, 14.999) == 15.0

    @pytest.mark.parametrize("power", [-1074, -600, -1, 0, 1, 600, 1000, 1023])
    def test_it_neither_overflows_nor_vanishes(self, power: int) -> None:
        value = math.ldexp(1.0, power)
        params = {"a": np.array([value])}
        assert norm_above(params, {}, value) is None
        larger = {"a": np.array([value, value, value, value])}
        above = norm_above(larger, {}, value)
        assert above is not None
        assert above > value

    def test_it_is_the_same_however_the_arrays_lie_in_memory(self) -> None:
        rng = np.random.default_rng(5)
        plain = rng.normal(size=(300, 500))
        base = rng.normal(size=(300, 500)).astype(np.float32)
        expected = norm_above({"a": plain}, {"a": base}, 1.0)
        assert expected == pytest.approx(np.linalg.norm(plain - base))
        assert plain.size > 2 * (1 << 16)
        strided = np.zeros((600, 1000))[::2, ::2]
        strided[:] = plain
        for array in (np.asfortranarray(plain), strided, plain.astype(">f8")):
            assert norm_above({"a": array}, {"a": np.asfortranarray(base)}, 1.0) == expected

    def test_its_bits_are_these_on_every_machine(self) -> None:
        values = (np.arange(70_000) * 7_919 % 1_009 - 500) / 7
        assert norm_above({"a": values}, {}, 1.0) == 11010.27085154992

    def test_many_blocks_beyond_float64_are_above(self) -> None:
        params = {f"{k}": np.full(2, 1e154) for k in range(9)}
        assert norm_above(params, {}, 1.0) == math.inf

    @given(
        st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
        st.floats(1e-3, 1e5),
    )
    def test_it_agrees_with_the_exact_one(self, values: list[float], limit: float) -> None:
        exact = sum(Fraction(value) ** 2 for value in values)
        above = norm_above({"a": np.array(values)}, {}, limit)
        bound = Fraction(limit) ** 2
        if exact > bound * (1 + Fraction(1, 10**12)):
            assert above == pytest.approx(math.sqrt(exact))
        elif exact < bound * (1 - Fraction(1, 10**12)):
            assert above is None

    def test_a_model_that_is_not_finite_is_far_from_every_update(self) -> None:
        gate = Gate({"a": np.array([math.inf])}, ROUND, Limits(max_norm=1.0))
        with pytest.raises(RefusedUpdate, match="NORM"):
            gate.judge(good(params={"a": np.array([1.0])}))

    def test_an_update_that_is_not_finite_is_left_to_the_sums(self) -> None:
        for value in (math.nan, math.inf):
            params = {"h": np.array([1, value, 1], ml_dtypes.bfloat16)}
            assert judge(good(params=params), Limits(max_norm=1.0))

    def test_an_empty_array_has_none(self) -> None:
        assert norm_above({"a": np.zeros((0, 3))}, {}, 1e-300) is None


class TestLimits:
    """What a caller may ask for."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"roster": "site-1"}, "roster: expected a collection of contributors' names"),
            ({"roster": ["site-1", "a\n"]}, "roster: expected a collection"),
            ({"max_norm": 0}, "max_norm: expected a finite number above 0, got 0"),
            ({"max_norm": math.nan}, "max_norm: expected a finite number above 0, got nan"),
            ({"max_norm": True}, "max_norm: expected a finite number above 0, got True"),
            ({"max_weight": -1.0}, r"max_weight: expected a finite number above 0, got -1\.0"),
            ({"max_weight": "5"}, "max_weight: expected a finite number above 0, got '5'"),
            ({"max_weight": 10**400}, "max_weight: expected a finite number above 0, got 1000"),
            ({"exclude": "("}, "exclude: expected a regular expression, got '\\('"),
            (
                {"max_norm": Fraction(1, 10**400)},
                "max_norm: expected a finite number above 0, got Fr",
            ),
            ({"roster": 5}, "roster: expected a collection of contributors' names, got 5"),
            ({"roster": np.array("a")}, "roster: expected a collection of contributors' names"),
            ({"exclude": ""}, "exclude: expected a regular expression, got '' .* every parameter"),
            ({"exclude": b"w"}, "exclude: expected a regular expression, got b'w'"),
            ({"exclude": 5}, "exclude: expected a regular expression, got 5"),
            ({"allow_missing": "no"}, "allow_missing: expected True or False, got 'no'"),
            ({"allow_unexpected": 1}, "allow_unexpected: expected True or False, got 1"),
        ],
    )
    def test_one_without_meaning_is_a_usage_error(
        self, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            Limits(**fields)

    def test_a_choice_may_be_numpys(self) -> None:
        yes: Any = np.True_
        limits = Limits(allow_missing=yes, allow_unexpected=yes)
        assert limits.to_json() == Limits(allow_unexpected=True).to_json()
        assert limits.allow_missing is True

    def test_a_roster_may_be_any_collection(self) -> None:
        names: Any = ["site-1", "site-2"]
        assert Limits(roster=names) == Limits(roster=frozenset(names))

    def test_a_roster_is_read_once(self) -> None:
        names: Any = (np.str_(name) for name in ("site-1", "site-2"))
        roster = Limits(roster=names).roster
        assert roster == {"site-1", "site-2"}
        assert {type(name) for name in roster} == {str}

    @pytest.mark.parametrize(
        ("given", "plain"),
        [
            (np.float32(5), 5.0),
            (np.float64(0.5), 0.5),
            (np.int64(5), 5),
            (2**60 + 1, 2**60 + 1),
            (Fraction(1, 2), 0.5),
        ],
    )
    def test_a_number_of_any_kind_is_kept_as_a_plain_one(self, given: Any, plain: float) -> None:
        limits = Limits(max_norm=given, max_weight=given)
        assert (limits.max_norm, limits.max_weight) == (plain, plain)
        assert type(limits.max_norm) is type(limits.max_weight) is type(plain)
        state = json.loads(json.dumps(Round(model(), ROUND, limits=limits).state()[0]))
        assert Limits(**state["limits"]) == limits

    def test_they_are_the_same_after_json(self) -> None:
        limits = Limits(frozenset({"b", "a"}), False, True, 2.5, 10, "^x")
        assert Limits(**limits.to_json()) == limits
        assert limits.to_json()["roster"] == ["a", "b"]
        assert Limits(**Limits().to_json()) == Limits()

    def test_a_model_that_is_none_is_a_usage_error(self) -> None:
        with pytest.raises(UsageError, match="the model of round 3: DTYPE"):
            Gate({"w": np.ones(2, complex)}, 3, Limits())
        not_a_mapping: Any = [np.ones(2)]
        with pytest.raises(UsageError, match="mapping"):
            Gate(not_a_mapping, 3, Limits())


@given(st.one_of(st.text(), st.integers(), st.binary(), st.none()))
def test_a_shown_name_is_printable_and_bounded(name: Any) -> None:
    shown = shown_name(name)
    assert shown.isprintable()
    assert len(shown) <= 256
    assert (shown == name) == is_name(name)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a method that fails")


FAILING = dict.fromkeys(
    (
        *("__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__", "__bool__", "__len__"),
        *("__str__", "__repr__", "__format__", "__int__", "__index__", "__float__", "__array__"),
        *("__getitem__", "__iter__", "__contains__", "isprintable", "as_integer_ratio", "item"),
        *("items", "keys"),
    ),
    fails,
)


def hostile(base: type) -> Any:
    """A subclass whose methods fail, and which cannot even be asked what it is."""
    asked = dict.fromkeys(("__class__", "dtype", "shape"), property(fails))
    return type("Hostile", (base,), {**FAILING, "__hash__": base.__hash__, **asked})


HOSTILE = hostile(object)()


class Lines(str):
    """Text that tells lies about itself."""

    def isprintable(self) -> bool:
        return True

    def __len__(self) -> int:
        return 1


class Shown:
    """An object that is shown by such a text."""

    def __repr__(self) -> str:
        return Lines("one\ntwo")


class TestHostileObjects:
    """What counts is what a string, number or array is, and not what its methods say."""

    def test_a_name_with_a_hash_of_its_own_is_a_duplicate_all_the_same(self) -> None:
        round = Round(model(), ROUND)
        name: Any = type("Name", (str,), {"__hash__": object.__hash__})
        reasons = [round.offer(good(name("site-1"))).reason for _ in range(3)]
        assert reasons == [None, Reason.DUPLICATE, Reason.DUPLICATE]
        assert (len(round.accepted), round._mean.count) == (1, 1)

    def test_a_name_that_shows_another_is_judged_and_kept_as_what_it_is(self) -> None:
        lies = {
            "__str__": lambda _: "site-2",
            "__eq__": lambda *_: True,
            "__hash__": lambda _: hash("site-1"),
        }
        name: Any = type("Name", (str,), lies)
        round = Round(model(), ROUND, limits=Limits(roster=frozenset({"site-1"})))
        assert round.offer(good(name("site-3"))).reason is Reason.UNKNOWN_CONTRIBUTOR
        receipt = round.offer(good(name("site-1")))
        assert (receipt.accepted, receipt.contributor) == (True, "site-1")

    @pytest.mark.parametrize(
        ("kind", "plain"),
        [
            (int, 5),
            (float, 0.5),
            (np.int64, 5),
            (np.uint8, 5),
            (np.float64, 0.5),
            (np.float32, 0.5),
            (np.float16, 0.5),
        ],
    )
    def test_what_is_of_a_subclass_counts_as_plain(self, kind: type, plain: float) -> None:
        name, whole = hostile(str), hostile(int if kind in (int, float) else np.int64)
        params = {name("w"): model()["w"].view(hostile(np.ndarray))}
        update = good(
            name("site-9"),
            round=whole(ROUND),
            params=params,
            weight=hostile(kind)(plain),
            transfer=name("FULL"),
            metrics={name("a"): 1, "b": hostile(float)(1), "c": HOSTILE},
        )
        round = Round(model(), ROUND, limits=Limits(max_norm=1e9), audit=True)
        receipt = round.offer(update)
        assert (receipt.accepted, receipt.contributor) == (True, "site-9")
        assert (type(receipt.weight), receipt.weight) == (type(plain), plain)
        assert (receipt.metrics, receipt.skipped_metrics) == (
            {"a": 1.0, "b": 1.0},
            ("c",),
        )
        json.dumps(round.state()[0])
        (array,) = judge(update).params.values()
        assert type(array) is np.ndarray

    @pytest.mark.parametrize(
        ("changes", "reason", "got"),
        [
            ({"contributor": HOSTILE}, Reason.BAD_NAME, "an object of type 'Hostile'"),
            ({"contributor": hostile(bytes)(b"a")}, Reason.BAD_NAME, "an object of type"),
            ({"contributor": hostile(str)("")}, Reason.BAD_NAME, "a string of 0"),
            ({"contributor": Lines("one\ntwo")}, Reason.BAD_NAME, "a string of 7"),
            ({"round": HOSTILE}, Reason.STALE_ROUND, "one for <Hostile>"),
            ({"round": Shown()}, Reason.STALE_ROUND, r"one for one\ntwo"),
            ({"round": hostile(int)(2)}, Reason.STALE_ROUND, "one for <Hostile>"),
            ({"round": hostile(int)(4)}, Reason.FUTURE_ROUND, "one for <Hostile>"),
            ({"transfer": HOSTILE}, Reason.TRANSFER, "<Hostile>"),
            ({"transfer": hostile(str)("no")}, Reason.TRANSFER, "'no'"),
            ({"weight": HOSTILE}, Reason.BAD_WEIGHT, "<Hostile>"),
            ({"weight": hostile(int)(0)}, Reason.BAD_WEIGHT, "<Hostile>"),
            ({"weight": hostile(Fraction)(1, 2)}, Reason.BAD_WEIGHT, "<Hostile>"),
            ({"params": HOSTILE}, Reason.DTYPE, "an object of type 'Hostile'"),
            ({"params": hostile(dict)(w=1)}, Reason.DTYPE, "an object of type 'Hostile'"),
            ({"params": {HOSTILE: 1}}, Reason.BAD_NAME, "<Hostile>"),
            ({"params": {hostile(str)("x"): 1}}, Reason.UNEXPECTED_KEYS, "another"),
            ({"params": {"w": HOSTILE}}, Reason.DTYPE, "a Hostile"),
            ({"params": {"w": hostile(list)()}}, Reason.DTYPE, "a Hostile"),
            (
                {"params": {"w": np.ones((2, 2), bool).view(hostile(np.ndarray))}},
                Reason.DTYPE,
                "dtype 'bool'",
            ),
            (
                {"params": {"w": np.ones(3).view(hostile(np.ndarray))}},
                Reason.SHAPE,
                "the shape (3,)",
            ),
            ({"params": {"w": np.zeros(3, [("a", "f8")])}}, Reason.DTYPE, "dtype([('a', '<f8')])"),
        ],
    )
    def test_what_fails_when_it_is_asked_is_refused(
        self, changes: dict[str, Any], reason: Reason, got: str
    ) -> None:
        for audit in (False, True):
            round = Round(model(), ROUND, audit=audit)
            receipt = round.offer(good(**changes))
            assert receipt.reason is reason
            assert f", got {got}" in receipt.detail
            assert receipt.detail.isprintable()
            assert receipt.contributor.isprintable()
            assert round._mean.count == 0
            round.close()
            assert round.offer(good(**changes)).reason is Reason.ROUND_CLOSED

    def test_a_dtype_that_asks_objects_is_refused(self) -> None:
        dtypes: list[Any] = [np.dtype([(hostile(str)("a"), "f8")])]
        if hasattr(np.dtypes, "StringDType"):
            nothing = type("Nothing", (), {"__hash__": fails})()
            dtypes.append(np.dtypes.StringDType(na_object=nothing))
        for dtype in dtypes:
            for array in (np.empty(1, dtype), np.empty((), dtype)[()]):
                receipt = Round(model(), ROUND).offer(good(params={"w": array}))
                assert receipt.reason is Reason.DTYPE

    def test_metrics_that_fail_are_left_out(self) -> None:
        shown = "<an object of type 'Hostile' where a mapping was expected>"
        for metrics in (HOSTILE, hostile(dict)(a=1)):
            assert judge(good(metrics=metrics)).skipped_metrics == (shown,)

    def test_a_type_with_a_name_of_many_lines_is_shown_in_one(self) -> None:
        kind: Any = type(Lines("a\nb"), (), {"__repr__": fails})
        receipt = Round(model(), ROUND).offer(good(kind(), params={"w": kind()}))
        assert receipt.detail.endswith(r"got an object of type 'a\nb'")

    def test_a_receipt_that_equals_the_last_one_is_another(self) -> None:
        round = Round(model(), ROUND)
        first = round.offer(good())
        round._begun = _Begun(0, copy.copy(first), TransferType.FULL, None)
        round._settle()
        round._begun = _Begun(0, round._receipts[-1], TransferType.FULL, None)
        round._settle()
        assert round._receipts == [first, first]


FOREIGN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.complex_numbers(),
        st.sampled_from(["w", "b", "n", "h", "site-1", ROUND, *TransferType]),
        st.sampled_from([np.ones((2, 2)), np.ones(3), np.array(["a"]), np.array(None)]),
        st.builds(FailingMapping),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=3), st.sampled_from("wbnh"), st.integers()), inner
        ),
    ),
    max_leaves=6,
)


FIELDS = ("contributor", "round", "params", "weight", "transfer", "metrics")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, FOREIGN)), st.booleans())
def test_whatever_is_in_an_update_the_gate_takes_it_or_refuses_it(
    changes: dict[str, Any], limited: bool
) -> None:
    limits = Limits(allow_missing=False, max_norm=3.0, max_weight=7) if limited else Limits()
    round = Round(model(), ROUND, limits=limits)
    before = round._mean.digest()
    receipt = round.offer(good(**changes))
    assert receipt.detail.isprintable()
    assert len(receipt.detail) < 500
    if not receipt.accepted:
        assert round._mean.digest() == before
        assert receipt.reason is not None
