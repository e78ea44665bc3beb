"""The round: its table of states and events, its promises, and its state across a restart."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core.round as round_module
from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.comparison import same_bits
from fedavg_core.errors import Reason, UsageError
from fedavg_core.gate import Limits
from fedavg_core.model import ModelSpec, Params
from fedavg_core.outcome import Outcome, Receipt
from fedavg_core.robust.rules import ClippedMean, CoordinateMedian, GeometricMedian, MultiKrum
from fedavg_core.round import Round, RoundState
from fedavg_core.sums.exact_sums import ExactSums
from fedavg_core.transfer import diff
from fedavg_core.update import TransferType, Update
from tests.bad_updates import ROUND, good, model
from tests.conftest import THOROUGH
from tests.interruption import Interruption

FULL, DIFF = TransferType.FULL, TransferType.DIFF


def base() -> dict[str, npt.NDArray[Any]]:
    return {"w": np.array([1.0, 2.0], np.float32), "b": np.array([0.5])}


def update(name: str, params: Any, weight: float = 1, **more: Any) -> Update:
    return Update(contributor=name, round=0, params=params, weight=weight, **more)


def open_round() -> Round:
    round = Round(model(), ROUND)
    assert round.offer(good("site-1")).accepted
    return round


def closed_round() -> Round:
    round = open_round()
    round.close()
    return round


# Every cell of the table: what happens, and the state after it.
def offer_is_accepted(round: Round) -> None:
    assert round.offer(good("site-2")).accepted
    assert [receipt.contributor for receipt in round.accepted] == ["site-1", "site-2"]


def offer_is_refused(round: Round) -> None:
    assert round.offer(good("site-1")).reason is Reason.DUPLICATE
    assert len(round.accepted) == 1


def offer_is_too_late(round: Round) -> None:
    for late in (good("site-2"), good("site-1"), good("\n", weight=math.nan, params=None)):
        receipt = round.offer(late)
        assert receipt.reason is Reason.ROUND_CLOSED
        assert round.refused[-1] is receipt
        assert receipt.detail.isprintable()
    assert len(round.accepted) == 1


def close_gives_the_outcome(round: Round) -> None:
    assert round.close().enough


def close_is_misuse(round: Round) -> None:
    with pytest.raises(UsageError, match="round 3 is closed"):
        round.close()


def state_is_given(round: Round) -> None:
    assert len(round.state()) == 2


def state_is_misuse(round: Round) -> None:
    with pytest.raises(UsageError, match="round 3 is closed"):
        round.state()


def offer_is_no_update(round: Round) -> None:
    not_an_update: Any = {"contributor": "site-2"}
    with pytest.raises(UsageError, match="expected an Update, got a dict"):
        round.offer(not_an_update)
    assert len(round.accepted) == 1
    assert not round.refused


CELLS: list[tuple[Callable[[], Round], Callable[[Round], None], RoundState]] = [
    (open_round, offer_is_accepted, RoundState.OPEN),
    (open_round, offer_is_refused, RoundState.OPEN),
    (open_round, offer_is_no_update, RoundState.OPEN),
    (open_round, close_gives_the_outcome, RoundState.CLOSED),
    (open_round, state_is_given, RoundState.OPEN),
    (closed_round, offer_is_too_late, RoundState.CLOSED),
    (closed_round, offer_is_no_update, RoundState.CLOSED),
    (closed_round, close_is_misuse, RoundState.CLOSED),
    (closed_round, state_is_misuse, RoundState.CLOSED),
]


@pytest.mark.parametrize(("make", "happens", "after"), CELLS)
def test_each_event_in_each_state_does_what_the_table_says(
    make: Callable[[], Round], happens: Callable[[Round], None], after: RoundState
) -> None:
    round = make()
    happens(round)
    assert round.status is after


def test_the_table_has_a_cell_for_every_state_and_event() -> None:
    cells = set(itertools.product(RoundState, round_module._Event))
    assert set(round_module._TRANSITIONS) == cells


def test_the_docstring_shows_the_table() -> None:
    text = round_module.__doc__ or ""
    for event in round_module._Event:
        assert f"    {event.name} " in text


def test_a_round_says_what_it_is() -> None:
    params = model()
    round = Round(params, ROUND)
    assert (round.number, round.status, round.transfer) == (ROUND, RoundState.OPEN, None)
    assert round.model is params


class TestTheOutcome:
    """What `close` gives."""

    def test_full_models_are_averaged_with_their_weights(self) -> None:
        round = Round(base(), 0)
        round.offer(update("a", {"w": np.array([1, 2], np.float32), "b": np.array([1.0])}, 1))
        round.offer(update("b", {"w": np.array([5, 6], np.float32), "b": np.array([2.0])}, 3))
        outcome = round.close()
        assert outcome.model["w"].tolist() == [4.0, 5.0]
        assert outcome.model["b"].tolist() == [1.75]
        assert outcome.total_weight == 4.0
        assert (outcome.enough, outcome.problem, outcome.round) == (True, None, 0)

    def test_differences_are_added_to_the_model(self) -> None:
        round = Round(base(), 0, transfer=DIFF)
        assert round.offer(update("a", {"w": np.array([2, 4], np.float32)}, transfer=DIFF)).accepted
        assert round.offer(update("b", {"w": np.array([4, 0], np.float32)}, transfer=DIFF)).accepted
        outcome = round.close()
        assert outcome.model["w"].tolist() == [4.0, 4.0]
        assert outcome.model["b"].tolist() == [0.5]

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_it_has_the_keys_shapes_and_dtypes_of_the_model(self, transfer: TransferType) -> None:
        params = {
            "e": np.zeros((0, 3), np.float16),
            "s": np.float64(3).reshape(()),
            "i": np.array([200], np.uint8),
            "h": np.ones(2, ml_dtypes.bfloat16),
            "z": np.ones(2, ">f4"),
        }
        local = {key: np.asarray(value.astype(np.float64)) for key, value in params.items()}
        if transfer is DIFF:
            local = {key: value * 0 for key, value in local.items()}
        round = Round(params, 0, transfer=transfer)
        assert round.offer(update("a", local, transfer=transfer)).accepted
        result = round.close().model
        assert list(result) == list(params)
        assert same_bits(result, params)

    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_what_nobody_sent_or_is_excluded_keeps_its_value(self, transfer: TransferType) -> None:
        params = {**base(), "gone": np.array([7, 8]), "out": np.array([math.inf])}
        round = Round(params, 0, transfer=transfer, limits=Limits(exclude="^out$"))
        sent = {"w": np.zeros(2, np.float32), "out": np.array([1.0])}
        assert round.offer(update("a", sent, transfer=transfer)).accepted
        result = round.close().model
        assert list(result) == list(params)
        assert result["gone"].tolist() == [7, 8]
        assert result["out"].tolist() == [math.inf]
        for key, value in result.items():
            assert not np.shares_memory(value, params[key])
            assert value.flags.writeable

    def test_a_parameter_is_averaged_over_those_that_sent_it(self) -> None:
        round = Round(base(), 0)
        round.offer(update("a", {"w": np.array([1, 1], np.float32)}, 1))
        round.offer(update("b", {"w": np.array([4, 4], np.float32), "b": np.array([9.0])}, 2))
        result = round.close().model
        assert result["w"].tolist() == [3.0, 3.0]
        assert result["b"].tolist() == [9.0]

    def test_too_few_updates_keep_the_model_and_say_so(self) -> None:
        params = base()
        round = Round(params, 7, min_updates=2)
        round.offer(Update("a", 7, {"w": np.zeros(2, np.float32)}, 1, metrics={"loss": 1.0}))
        outcome = round.close()
        assert not outcome.enough
        assert outcome.problem == (
            "round 7: 1 accepted where at least 2 are needed; the model keeps its values"
        )
        assert same_bits(outcome.model, params)
        assert not np.shares_memory(outcome.model["w"], params["w"])
        assert outcome.metrics == {"loss": 1.0}

    def test_no_update_at_all_keeps_the_model(self) -> None:
        outcome = Round(base(), 0).close()
        assert same_bits(outcome.model, base())
        assert (outcome.enough, outcome.total_weight, outcome.metrics) == (False, 0.0, {})

    def test_a_sum_beyond_the_dtype_keeps_the_model_and_says_so(self) -> None:
        params = {"w": np.array([6e4], np.float16)}
        round = Round(params, 0)
        assert round.offer(update("a", {"w": np.array([6e4], np.float16)}, transfer=DIFF)).accepted
        outcome = round.close()
        assert outcome.enough
        assert outcome.problem is not None
        assert "'w'" in outcome.problem
        assert outcome.problem.endswith("; the model keeps its values")
        assert same_bits(outcome.model, params)

    def test_a_total_weight_beyond_float64_is_infinite(self) -> None:
        round = Round(base(), 0)
        for name in "ab":
            round.offer(update(name, {"b": np.array([1.0])}, 1.7e308))
        outcome = round.close()
        assert outcome.total_weight == math.inf
        assert outcome.model["b"].tolist() == [1.0]

    def test_inputs_are_never_changed(self) -> None:
        params, sent = model(), good().params
        copies = [{k: v.copy() for k, v in tree.items()} for tree in (params, sent)]
        round = Round(params, ROUND)
        round.offer(good(params=sent))
        round.offer(good("b", params={**sent, "b": np.full(3, np.nan)}))
        round.close().model["w"][:] = 0
        assert same_bits(params, copies[0])
        assert same_bits(sent, copies[1])

    def test_a_close_that_fails_leaves_the_round_open(self, monkeypatch: Any) -> None:
        round = open_round()
        with monkeypatch.context() as patch:
            patch.setattr(WeightedMean, "mean", _raise_memory_error)
            with pytest.raises(MemoryError):
                round.close()
        assert round.status is RoundState.OPEN
        assert round.close().enough


def _raise_memory_error(*_: Any) -> None:
    raise MemoryError


class TestTheTransferType:
    """FULL and DIFF are never mixed."""

    @pytest.mark.parametrize(("first", "second"), [(FULL, DIFF), (DIFF, FULL)])
    def test_the_first_accepted_update_sets_it(
        self, first: TransferType, second: TransferType
    ) -> None:
        round = Round(base(), 0)
        bad = update("a", {"w": np.full(2, np.nan, np.float32)}, transfer=second)
        assert round.offer(bad).reason is Reason.NON_FINITE
        before = round.transfer
        assert before is None
        assert round.offer(update("a", base(), transfer=first)).accepted
        assert round.transfer is first
        assert round.offer(update("b", base(), transfer=second)).reason is Reason.TRANSFER
        assert round.offer(update("b", base(), transfer=first)).accepted

    def test_full_and_diff_agree_where_differences_are_exact(self) -> None:
        params = {"w": np.array([1.5, -2.0], np.float32), "n": np.array([3, 4])}
        results = []
        for transfer in TransferType:
            round = Round(params, 0)
            for name, step in (("a", 1), ("b", 2), ("c", 4)):
                local = {key: value + value.dtype.type(step) for key, value in params.items()}
                sent = diff(local, params) if transfer is DIFF else local
                assert round.offer(update(name, sent, step, transfer=transfer)).accepted
            results.append(round.close().model)
        assert same_bits(*results)


class TestMetrics:
    """Weighted means, each with its own denominator."""

    def test_each_is_averaged_over_those_that_sent_it(self) -> None:
        round = Round(base(), 0)
        round.offer(update("a", base(), 1, metrics={"loss": 1.0, "time": 10}))
        round.offer(update("b", base(), 3, metrics={"loss": 5.0, "note": "x"}))
        round.offer(update("c", base(), 2, metrics={"acc": 0.5, "loss": math.nan}))
        outcome = round.close()
        assert outcome.metrics == {"acc": 0.5, "loss": 4.0, "time": 10.0}
        assert list(outcome.metrics) == ["acc", "loss", "time"]
        assert outcome.skipped_metrics == ("loss", "note")
        assert outcome.accepted[1].detail == "metrics left out: note"
        assert outcome.accepted[0].metrics == {"loss": 1.0, "time": 10.0}

    def test_those_of_a_refused_update_do_not_count(self) -> None:
        round = Round(base(), 0)
        round.offer(update("a", base(), 1, metrics={"loss": 1.0}))
        round.offer(update("b", {"w": np.ones(1)}, 1, metrics={"loss": 9.0, "x": "y"}))
        outcome = round.close()
        assert outcome.metrics == {"loss": 1.0}
        assert outcome.skipped_metrics == ()

    @given(
        st.lists(
            st.tuples(
                st.floats(allow_nan=False, allow_infinity=False),
                st.one_of(st.integers(1, 2**70), st.floats(5e-324, 1e308)),
            ),
            min_size=1,
            max_size=6,
        ),
        st.randoms(use_true_random=False),
    )
    def test_they_are_the_exact_means_in_any_order(
        self, entries: list[tuple[float, float]], random: Any
    ) -> None:
        weights = sum(Fraction(weight) for _, weight in entries)
        exact = sum(Fraction(value) * Fraction(weight) for value, weight in entries) / weights
        named = list(enumerate(entries))
        random.shuffle(named)
        round = Round({"x": np.zeros(1)}, 0)
        for number, (value, weight) in named:
            params = {"x": np.zeros(1)}
            assert round.offer(update(str(number), params, weight, metrics={"m": value})).accepted
        assert round.close().metrics == {"m": float(exact)}


@given(
    st.lists(
        st.tuples(st.integers(-50, 50), st.integers(1, 9), st.booleans()), min_size=1, max_size=7
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_does_not_show_in_the_outcome(
    entries: list[tuple[int, int, bool]], random: Any
) -> None:
    updates = [
        update(
            f"site-{number}",
            {"w": np.full(2, math.nan if bad else value * 0.1, np.float32)},
            weight,
            metrics={"m": value / 3},
        )
        for number, (value, weight, bad) in enumerate(entries)
    ]
    outcomes = []
    for _ in range(2):
        round = Round(base(), 0)
        for one in updates:
            round.offer(one)
        outcomes.append(round.close())
        random.shuffle(updates)
    first, second = outcomes
    assert same_bits(first.model, second.model)
    assert first.metrics == second.metrics
    assert first.total_weight == second.total_weight
    assert _by_name(first.accepted) == _by_name(second.accepted)
    assert _by_name(first.refused) == _by_name(second.refused)


def _by_name(receipts: tuple[Receipt, ...]) -> dict[str, Receipt]:
    return {receipt.contributor: receipt for receipt in receipts}


class TestWithoutAModel:
    """The contributors bring the first one."""

    @pytest.mark.parametrize("nothing", [None, {}])
    def test_the_model_is_the_mean_of_what_came(self, nothing: Any) -> None:
        round = Round(nothing, 0)
        assert round.offer(update("a", {"z": np.array([1, 3], np.int8)})).accepted
        assert round.offer(update("b", {"z": np.array([2, 3], np.int8), "a": np.ones(1)})).accepted
        assert round.offer(update("c", {"z": np.ones(3, np.int8)})).reason is Reason.SHAPE
        outcome = round.close()
        assert list(outcome.model) == ["a", "z"]
        assert outcome.model["z"].tolist() == [2, 3]
        assert outcome.model["z"].dtype == np.int8

    def test_too_few_updates_leave_none(self) -> None:
        outcome = Round(None, 0, min_updates=2).close()
        assert outcome.model == {}
        assert not outcome.enough

    def test_where_nothing_may_be_missing_the_first_update_says_what_there_is(self) -> None:
        round = Round(None, 0, limits=Limits(allow_missing=False))
        assert round.offer(update("a", base())).accepted
        assert round.offer(update("b", {"w": base()["w"]})).reason is Reason.MISSING_KEYS
        more = {**base(), "x": np.ones(1)}
        assert round.offer(update("b", more)).reason is Reason.UNEXPECTED_KEYS
        meta, arrays = round.state()
        again = Round.from_state(meta, arrays)
        assert again.offer(update("b", more)).reason is Reason.UNEXPECTED_KEYS
        assert again.offer(update("b", base())).accepted


class TestAnAccumulatorOfTheCaller:
    """It is reset and used, and keeps its memory from round to round."""

    def test_it_is_used_for_many_rounds(self) -> None:
        mean = WeightedMean(ModelSpec.of(base()))
        for number in range(3):
            round = Round(base(), number, accumulator=mean)
            assert round.offer(Update("a", number, {"b": np.array([1.0 * number])}, 2)).accepted
            assert round.close().model["b"].tolist() == [1.0 * number]
        assert mean.count == 1

    def test_one_that_gives_another_dtype_is_a_usage_error(self) -> None:
        round = Round(base(), 0, accumulator=WeightedMean())
        assert round.offer(update("a", {"b": np.array([1], np.float16)})).accepted
        with pytest.raises(UsageError, match="key 'b': the accumulator gives float16, and the"):
            round.close()

    @pytest.mark.parametrize("kind", ["float64", "float32"])
    def test_plain_arithmetic_is_there_too(self, kind: Any) -> None:
        round = Round(base(), 0, accumulator=kind)
        round.offer(update("a", {"b": np.array([1.0])}))
        round.offer(update("b", {"b": np.array([2.0])}))
        assert round.close().model["b"].tolist() == [1.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": "0"}, "number: expected a whole number of at least 0, got '0'"),
        ({"number": True}, "number: expected a whole number of at least 0, got True"),
        ({"number": -1}, "number: expected a whole number of at least 0, got -1"),
        ({"min_updates": 0}, "min_updates: expected a whole number of at least 1, got 0"),
        ({"min_updates": 1.0}, r"min_updates: expected a whole number of at least 1, got 1\.0"),
        ({"min_updates": True}, "min_updates: expected a whole number of at least 1, got True"),
        ({"transfer": "HALF"}, "transfer: expected FULL, DIFF or None, got 'HALF'"),
        ({"limits": {}}, "limits: expected a Limits, got {}"),
        ({"accumulator": "double"}, "expected accumulator 'exact', .* got 'double'"),
        ({"model": {"w": [1.0]}}, "the model of round 0: DTYPE"),
        ({"model": [1.0]}, "expected a model as a mapping"),
        ({"model": None, "transfer": DIFF}, "transfer: differences need a model"),
    ],
)
def test_an_argument_without_meaning_is_a_usage_error(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Round(**{"model": base(), "number": 0, **arguments})


class TestGoingOnAfterARestart:
    """`state` and `from_state`."""

    def restarted(self, round: Round, params: Params | None) -> Round:
        meta, arrays = round.state()
        return Round.from_state(json.loads(json.dumps(meta)), arrays, params)

    @pytest.mark.parametrize("cut", range(6))
    @pytest.mark.parametrize("transfer", [FULL, DIFF])
    def test_it_ends_as_it_would_have(self, cut: int, transfer: TransferType) -> None:
        limits = Limits(frozenset({"a", "b", "c", "d"}), max_weight=2**80, exclude="h")
        updates = [
            Update("a", ROUND, good().params, 0.1, transfer, {"m": 1 / 3, "x": "y"}),
            Update("a", ROUND, good().params, 1, transfer),
            Update("b", ROUND, {"w": np.full((2, 2), 1e-30)}, 2**75 + 1, transfer, {"m": 5}),
            Update("\n", ROUND, good().params, 1, transfer),
            Update("d", ROUND, {"b": np.full(3, 1e30)}, 1e-300, transfer),
        ]
        outcomes: list[Outcome] = []
        for restart in (False, True):
            round = Round(model(), ROUND, min_updates=2, limits=limits)
            for number, one in enumerate(updates):
                if restart and number == cut:
                    round = self.restarted(round, model())
                round.offer(one)
            outcomes.append(round.close())
        first, second = outcomes
        assert same_bits(first.model, second.model)
        assert first.metrics == second.metrics
        assert first.accepted == second.accepted
        assert first.refused == second.refused
        assert first.total_weight == second.total_weight
        assert len(first.accepted) == 3

    def test_a_repeated_update_is_a_duplicate(self) -> None:
        round = self.restarted(open_round(), model())
        assert round.offer(good("site-1")).reason is Reason.DUPLICATE

    @pytest.mark.parametrize("transfer", [DIFF, "DIFF"])
    def test_the_transfer_type_may_be_given_by_its_name(self, transfer: Any) -> None:
        round = Round(model(), ROUND, transfer=transfer)
        assert round.transfer is DIFF
        assert round.offer(good(transfer=FULL)).reason is Reason.TRANSFER
        assert round.offer(good(transfer=transfer)).accepted

    def test_the_transfer_type_holds(self) -> None:
        round = self.restarted(open_round(), model())
        assert round.offer(good(transfer=DIFF)).reason is Reason.TRANSFER

    def test_another_model_is_a_usage_error(self) -> None:
        meta, arrays = open_round().state()
        changed = model()
        changed["w"][1, 1] = np.nextafter(changed["w"][1, 1], np.float32(9))
        others: list[Params | None] = [
            None,
            changed,
            {k: v for k, v in model().items() if k != "n"},
        ]
        others.append({**model(), "n": model()["n"].astype(np.int32)})
        others.append({**model(), "w": model()["w"].reshape(4)})
        for other in others:
            with pytest.raises(UsageError, match="began with another model"):
                Round.from_state(meta, arrays, other)

    def test_the_memory_layout_of_the_model_does_not_matter(self) -> None:
        meta, arrays = open_round().state()
        other = {**model(), "w": np.asfortranarray(model()["w"]).astype(">f4")}
        assert Round.from_state(meta, arrays, other).accepted

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda meta: meta.pop("format"), "no state of a round"),
            (lambda meta: meta.update(format=2), "expected a round's state of format 1, got 2"),
            (lambda meta: meta.update(transfer="HALF"), "transfer: expected FULL, DIFF or None"),
            (lambda meta: meta.update(limits=5), "no state of a round"),
            (lambda meta: meta.update(limits={"max_norm": -1}), "max_norm: expected"),
            (lambda meta: meta.pop("receipts"), "no state of a round"),
            (lambda meta: meta.update(receipts=[5]), "no state of a round"),
            (lambda meta: meta.update(receipts=[]), "1 updates were added, and 0 contributors"),
            (lambda meta: meta.update(mean={}), "state"),
            (lambda meta: meta.update(keys=5), "no state of a round"),
            (lambda meta: meta.update(keys="w"), "no state of a round"),
            (lambda meta: meta.update(keys=[5]), "no state of a round"),
            (lambda meta: meta["receipts"].append(meta["receipts"][0]), "has two receipts"),
            (lambda meta: meta["mean"].update(keys=[]), "weights that 1 updates come to, got"),
        ],
    )
    def test_what_is_no_state_is_a_usage_error(
        self, spoil: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        meta, arrays = open_round().state()
        spoil(meta)
        with pytest.raises(UsageError, match=message):
            Round.from_state(meta, arrays, model())

    @pytest.mark.parametrize("name", ["contributor", "accepted", "weight", "metrics", "detail"])
    @pytest.mark.parametrize("value", ["x\n", "", math.nan, math.inf, -1, 0, None, [1], {"a": "x"}])
    def test_a_receipt_that_is_none_is_a_usage_error_and_not_an_error_of_close(
        self, name: str, value: Any
    ) -> None:
        meta, arrays = open_round().state()
        meta["receipts"][0][name] = value
        if name == "detail" and isinstance(value, str):
            assert Round.from_state(meta, arrays, model()).close().enough
            return
        with pytest.raises(UsageError, match="this is no state of a round: "):
            Round.from_state(meta, arrays, model())

    @pytest.mark.parametrize(
        "fields",
        [
            *({"metrics": {"a": value}} for value in ("x", math.nan, -math.inf, True, 10**400)),
            {"metrics": {"": 1.0}},
            {"weight": 10**400},
            {"weight": "x"},
            {"weight": True},
            {"reason": "SHAPE"},
            {"reason": "WHATEVER"},
            {"accepted": False},
            {"skipped_metrics": "abc"},
            {"skipped_metrics": [1]},
        ],
        ids=lambda fields: repr(fields)[:40],
    )
    def test_a_receipt_that_says_what_none_can_say_is_a_usage_error(
        self, fields: dict[str, Any]
    ) -> None:
        meta, arrays = open_round().state()
        meta["receipts"][0].update(fields)
        with pytest.raises(UsageError, match="this is no state of a round: "):
            Round.from_state(meta, arrays, model())

    @pytest.mark.parametrize("exclude", [None, "w"])
    def test_sums_of_what_the_model_does_not_average_are_a_usage_error(
        self, exclude: str | None
    ) -> None:
        meta, arrays = open_round().state()
        if exclude is None:
            meta["mean"]["keys"][0]["name"] = "other"
        else:
            meta["limits"]["exclude"] = exclude
        with pytest.raises(UsageError, match=r"key '(other|w)': the spec does not name it"):
            Round.from_state(meta, arrays, model())


LAYERS = [f"layer-{number:02d}" for number in range(20)]


class TestAFaultWhileAdding:
    """All or nothing, whatever fails and where."""

    def params(self, **spoilt: Any) -> dict[str, Any]:
        return {**{key: np.full(3, 0.1, np.float32) for key in LAYERS}, **spoilt}

    @pytest.mark.parametrize("key", LAYERS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_bad_value_in_any_of_20_keys_changes_nothing(self, key: str, value: float) -> None:
        round = Round(self.params(), 0)
        assert round.offer(update("a", self.params(), 3)).accepted
        before = round._mean.digest()
        spoilt = np.array([0.1, 0.1, value], np.float32)
        receipt = round.offer(update("b", self.params(**{key: spoilt})))
        assert receipt.reason is Reason.NON_FINITE
        assert key in receipt.detail
        assert round._mean.digest() == before
        assert round.offer(update("b", self.params(), 2)).accepted
        expected = weighted_mean([self.params()] * 2, [3, 2])
        assert same_bits(round.close().model, expected)

    def test_running_out_of_memory_changes_nothing_and_is_raised(self, monkeypatch: Any) -> None:
        round = Round(self.params(), 0)
        round.offer(update("a", self.params(), 3))
        before = round._mean.digest()
        with monkeypatch.context() as patch:
            patch.setattr(ExactSums, "add", _raise_memory_error)
            with pytest.raises(MemoryError):
                round.offer(update("b", self.params()))
        assert round._mean.digest() == before
        assert not round.refused
        assert round.offer(update("b", self.params())).accepted


ADDING = (
    *("round", "accumulator", "sums.plain_sums"),
    *("robust.robust_mean", "robust.kept_updates", "robust.clipped_mean"),
)

KINDS: list[Any] = [
    "exact",
    "float64",
    "float32",
    CoordinateMedian(),
    MultiKrum(faulty=0, keep=2),
    GeometricMedian(),
    ClippedMean(0.5),
]


class TestAnInterruptedOffer:
    """Receipts and sums tell of the same updates, whenever it comes."""

    def rounds(self, kind: Any) -> tuple[Round, Update]:
        start = None if kind == "exact" else base()
        transfer = None if kind == "exact" else DIFF
        round = Round(start, 0, transfer=transfer, accumulator=kind, audit=True)
        more: dict[str, Any] = {} if transfer is None else {"transfer": transfer}
        if start is not None:  # and else it is the first offer, before which there are no sums
            assert round.offer(update("a", base(), 2, **more)).accepted
        return round, update("b", base(), 3, metrics={"loss": 1.0}, **more)

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "name", kind))
    def test_was_made_or_was_not_at_any_moment(self, kind: Any) -> None:
        round, offered = self.rounds(kind)
        with Interruption(-1, *ADDING) as all_of_it:
            round.offer(offered)
        count, expected = -1 - all_of_it.left, round.close()
        made = []
        for moment in range(1, count + 1, 1 if THOROUGH else 7):
            round, offered = self.rounds(kind)
            with pytest.raises(KeyboardInterrupt), Interruption(moment, *ADDING):
                round.offer(offered)
            was_made = "b" in [receipt.contributor for receipt in round.accepted]
            made.append(was_made)
            assert round._mean.count == len(round.accepted)
            assert (round.offer(offered).reason is Reason.DUPLICATE) == was_made
            assert [receipt.contributor for receipt in round.accepted].count("b") == 1
            outcome = round.close()
            assert same_bits(outcome.model, expected.model)
            assert outcome.accepted == expected.accepted
        assert made == sorted(made)
        assert set(made) == {False, True}

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind, "name", kind))
    def test_that_is_interrupted_again_while_it_takes_note_is_so_by_the_next_event(
        self, kind: Any, monkeypatch: Any
    ) -> None:
        for event in (Round.state, Round.close):
            round, offered = self.rounds(kind)
            before = len(round.accepted)
            add = round._mean.add

            def add_and_interrupt(*given: Any, add: Any = add) -> None:
                add(*given)
                raise KeyboardInterrupt

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(round._mean, "add", add_and_interrupt)
                patch.setattr(_Contributors, "add", interrupt)
                round._contributors = _Contributors(round._contributors)
                with pytest.raises(KeyboardInterrupt):
                    round.offer(offered)
            event(round)
            assert [receipt.contributor for receipt in round.accepted][before:] == ["b"]


class _Contributors(set[str]):
    """A set whose methods can be replaced."""


def test_of_many_updates_none_is_lost_and_none_counted_twice() -> None:
    round = Round({"x": np.zeros(2)}, 0)
    for number in range(2_000):
        value = math.nan if number % 5 == 4 else float(number)
        round.offer(update(f"site-{number}", {"x": np.full(2, value)}, number + 1))
        if number % 7 == 0:
            round.offer(update(f"site-{number}", {"x": np.full(2, value)}, 10**9))
    outcome = round.close()
    good = [number for number in range(2_000) if number % 5 != 4]
    assert [receipt.contributor for receipt in outcome.accepted] == [f"site-{n}" for n in good]
    assert len(outcome.refused) == 400 + len(range(0, 2_000, 7))
    weight = sum(number + 1 for number in good)
    assert outcome.total_weight == weight
    exact = Fraction(sum(number * (number + 1) for number in good), weight)
    assert outcome.model["x"].tolist() == [float(exact)] * 2
