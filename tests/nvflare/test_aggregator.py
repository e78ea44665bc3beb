"""The aggregators, as ScatterAndGather calls them."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import fedavg_core as fc
from fedavg_core.outcome import Failure
from nvflare_adapter import CustomAggregator, FedAvgAggregator, FedAvgShareableGenerator, convert
from tests.nvflare.custom_aggregators import Maximum, WithoutSecond
from tests.nvflare.server_side import Server, result

pytestmark = pytest.mark.nvflare

MODEL: dict[str, Any] = {
    "w": np.array([1.0, 2.0, 4.0], dtype=np.float32),
    "n": np.array([[7]], dtype=np.int64),
}


def params(*values: float, n: int = 7) -> Any:
    return {"w": np.array(values, dtype=np.float32), "n": np.array([[n]], dtype=np.int64)}


@pytest.fixture
def server(tmp_path: Path) -> Any:
    return Server(tmp_path)


def opened(server: Server, model: Any = MODEL, round: int = 0, **arguments: Any) -> Any:
    aggregator = FedAvgAggregator(**arguments)
    fl_ctx = server.context(model, round)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    return aggregator, fl_ctx


def closed(aggregator: Any, fl_ctx: Any, base: Any = MODEL) -> Any:
    return convert.model_from_result(aggregator.aggregate(fl_ctx), base)


def test_the_new_model_is_the_exact_weighted_mean(server: Server) -> None:
    aggregator, fl_ctx = opened(server)
    first, second = params(0.1, 2, 1e30, n=8), params(0.7, 2.5, -1e30, n=11)
    assert aggregator.accept(result(first, "site-1", weight=3, metrics={"loss": 1.0}), fl_ctx)
    assert aggregator.accept(result(second, "site-2", weight=1, metrics={"loss": 2.0}), fl_ctx)
    model, report = closed(aggregator, fl_ctx)
    expected = (3 * Fraction(float(first["w"][0])) + Fraction(float(second["w"][0]))) / 4
    assert model["w"][0] == np.float32(float(expected))
    assert model["n"].tolist() == [[9]]
    assert model["n"].dtype == np.int64
    assert report == {
        "round": 0,
        "accepted": {"site-1": 3, "site-2": 1},
        "refused": [],
        "failed": [],
        "total_weight": 4.0,
        "metrics": {"loss": 1.25},
        "skipped_metrics": [],
        "problem": None,
    }


def test_differences_are_added_to_the_model_with_one_rounding(server: Server) -> None:
    aggregator, fl_ctx = opened(server, transfer="DIFF")
    tiny = {"w": np.full(3, 2.0**-25, dtype=np.float32)}
    for name in ("site-1", "site-2"):
        assert aggregator.accept(result(tiny, name, kind="WEIGHT_DIFF"), fl_ctx)
    model, _ = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, {"w": MODEL["w"], "n": MODEL["n"]})


def test_a_key_that_nobody_sent_keeps_its_value(server: Server) -> None:
    aggregator, fl_ctx = opened(server)
    assert aggregator.accept(result({"n": np.array([[9]])}), fl_ctx)
    model, _ = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, {"w": MODEL["w"], "n": np.array([[9]])})


class Hostile(Shareable):  # type: ignore[misc]
    """A message that fails while it is read."""

    def get_header(self, key: Any, default: Any = None) -> None:
        raise RuntimeError("ha\nha")


def named(message: Any, contributor: Any = "site-3") -> Any:
    message.set_peer_props({ReservedKey.IDENTITY_NAME: contributor})
    return message


BAD = {
    "no DXO": (named(Shareable()), "DTYPE"),
    "a hostile message": (Hostile(), r"RuntimeError: ha\nha"),
    "metrics only": (result({"loss": 1.0}, "site-3", kind="METRICS"), "TRANSFER"),
    "a difference": (result(params(1, 1, 1), "site-3", kind="WEIGHT_DIFF"), "TRANSFER"),
    "nobody's": (result(params(1, 1, 1), contributor=None), "BAD_NAME"),
    "a name of control characters": (result(params(1, 1, 1), "a\nb"), "BAD_NAME"),
    "a second one": (result(params(1, 1, 1), "site-1"), "DUPLICATE"),
    "an earlier round's": (result(params(1, 1, 1), "site-3", round=1), "STALE_ROUND"),
    "a later round's": (result(params(1, 1, 1), "site-3", round=3), "FUTURE_ROUND"),
    "no round's": (result(params(1, 1, 1), "site-3", round=None), "STALE_ROUND"),
    "weight 0": (result(params(1, 1, 1), "site-3", weight=0), "BAD_WEIGHT"),
    "a negative weight": (result(params(1, 1, 1), "site-3", weight=-1), "BAD_WEIGHT"),
    "weight NaN": (result(params(1, 1, 1), "site-3", weight=np.nan), "BAD_WEIGHT"),
    "a weight in words": (result(params(1, 1, 1), "site-3", weight="two"), "BAD_WEIGHT"),
    "no parameters": (result({}, "site-3"), "MISSING_KEYS"),
    "another key": (result({"v": np.ones(3)}, "site-3"), "UNEXPECTED_KEYS"),
    "another shape": (result({"w": np.ones((1,), np.float32)}, "site-3"), "SHAPE"),
    "strings": (result({"w": np.array(["a", "b", "c"])}, "site-3"), "DTYPE"),
    "a list": (result({"w": [1, 2, 3]}, "site-3"), "DTYPE"),
    "NaN": (result(params(1, np.nan, 1), "site-3"), "NON_FINITE"),
    "infinity in the second key": (
        result({"n": np.array([[3]]), "w": np.array([1, 1, np.inf], np.float32)}, "site-3"),
        "NON_FINITE",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_result_is_refused_in_one_line_and_changes_no_bit(
    server: Server, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    message, reason = BAD[what]
    if not what.endswith(("round's", "message")):
        message.add_cookie(AppConstants.CONTRIBUTION_ROUND, 2)
    aggregator, fl_ctx = opened(server, round=2)
    alone, alone_ctx = opened(server, round=2)
    good = result(params(0.1, 0.2, 0.3), "site-1", round=2, weight=7)
    assert aggregator.accept(good, fl_ctx)
    assert alone.accept(good, alone_ctx)
    with caplog.at_level(logging.WARNING):
        assert aggregator.accept(message, fl_ctx) is False
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == 1
    assert reason in refusals[0]
    assert "\n" not in refusals[0]
    assert fc.same_bits(closed(aggregator, fl_ctx)[0], closed(alone, alone_ctx)[0])


def failed(problem: Any, contributor: str, round: int = 0) -> Any:
    """What reaches the server of a client that has failed."""
    failure = Failure(contributor, round, problem)
    sent = convert.failure_to_fl_model(failure, fc.TransferType.FULL)
    message = FLModelUtils.to_shareable(sent)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: contributor})
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, round)
    return message


def test_clients_that_have_failed_are_reported_as_in_process_and_left_out(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = opened(server, round=3)
    assert aggregator.accept(result(params(5, 5, 5), "site-1", round=3), fl_ctx)
    for message in (
        failed("OSError: no disk (train.py, line 3)", "site-10", 3),
        failed("late", "site-10", round=2),
        failed("late", "site-3", round=2),
        failed("two\nlines", "site-2", 3),
    ):
        assert aggregator.accept(message, fl_ctx) is False
    assert "site-10 failed: OSError: no disk (train.py, line 3)" in caplog.text
    model, report = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, params(5, 5, 5))
    assert report["failed"] == [
        "site-2 failed: 'two\\nlines'",
        "site-10 failed: OSError: no disk (train.py, line 3)",
    ]
    assert [line.split(",")[0] for line in report["refused"]] == [
        "STALE_ROUND (contributor 'site-3'",
        "STALE_ROUND (contributor 'site-10'",
    ]
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    assert closed(aggregator, fl_ctx)[1]["failed"] == []


def test_a_result_between_two_rounds_is_refused(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = opened(server)
    aggregator.accept(result(params(1, 1, 1)), fl_ctx)
    aggregator.aggregate(fl_ctx)
    assert aggregator.accept(result(params(1, 1, 1), "site-2"), fl_ctx) is False
    assert "ROUND_CLOSED" in caplog.text
    aggregator.reset(fl_ctx)
    assert aggregator.accept(result(params(1, 1, 1), "site-2"), fl_ctx) is False
    assert "no round is open" in caplog.text
    with pytest.raises(fc.UsageError, match="no round is open"):
        aggregator.aggregate(fl_ctx)


def test_too_few_updates_keep_the_model_and_say_so(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = opened(server, min_updates=2)
    assert aggregator.accept(result(params(5, 5, 5)), fl_ctx)
    model, report = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, MODEL)
    assert report["problem"] is not None
    assert report["problem"] in caplog.text


def test_the_next_round_starts_from_nothing(server: Server) -> None:
    aggregator, fl_ctx = opened(server)
    aggregator.accept(result(params(100, 100, 100)), fl_ctx)
    aggregator.aggregate(fl_ctx)
    aggregator.reset(fl_ctx)
    later = server.context(MODEL, 1)
    aggregator.handle_event(AppEventType.ROUND_STARTED, later)
    assert aggregator.accept(result(params(2, 2, 2), round=1), later)
    assert closed(aggregator, later)[0]["w"].tolist() == [2, 2, 2]


def test_without_a_model_the_clients_bring_the_first(server: Server) -> None:
    aggregator, fl_ctx = opened(server, model={})
    assert aggregator.accept(result(params(1, 1, 1)), fl_ctx)
    assert aggregator.accept(result(params(2, 2, 2), "site-2"), fl_ctx)
    model, _ = closed(aggregator, fl_ctx, base={})
    assert fc.same_bits(model, params(1.5, 1.5, 1.5))


def test_results_from_many_threads_give_the_bits_of_any_order(server: Server) -> None:
    rng = np.random.default_rng(0)
    model = {"w": np.zeros(20_000, dtype=np.float32)}
    results = [
        result(
            {"w": (rng.standard_normal(20_000) * 1e3).astype(np.float32)}, f"site-{i}", weight=i + 1
        )
        for i in range(12)
    ]
    aggregator, fl_ctx = opened(server, model)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda one: aggregator.accept(one, fl_ctx), reversed(results)))
    in_order, ctx = opened(server, model)
    for one in results:
        in_order.accept(one, ctx)
    assert fc.same_bits(closed(aggregator, fl_ctx, model)[0], closed(in_order, ctx, model)[0])


def sheltered(server: Server, inner: Any, model: Any = MODEL) -> Any:
    server.components["mine"] = inner
    aggregator = CustomAggregator("mine")
    aggregator.handle_event(EventType.START_RUN, server.context())
    fl_ctx = server.context(model, 0)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    return aggregator, fl_ctx


def test_a_users_aggregator_is_asked_and_reset(server: Server) -> None:
    aggregator, fl_ctx = sheltered(server, Maximum(bonus=1.0))
    assert aggregator.accept(result({"w": np.array([1.0, 5.0])}, "site-1"), fl_ctx)
    assert aggregator.accept(result({"w": np.array([3.0, 2.0])}, "site-2"), fl_ctx)
    model, _ = closed(aggregator, fl_ctx)
    assert model["w"].tolist() == [4.0, 6.0]
    assert fc.same_bits({"n": model["n"]}, {"n": MODEL["n"]})
    aggregator.reset(fl_ctx)
    assert server.components["mine"]._received == []


def test_a_users_model_aggregator_hears_the_names_and_refuses_by_raising(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = sheltered(server, WithoutSecond())
    assert aggregator.accept(result({"w": np.array([1.0])}, "site-1"), fl_ctx) is True
    assert aggregator.accept(result({"w": np.array([9.0])}, "site-2"), fl_ctx) is False
    assert aggregator.accept(result({"w": np.array([3.0])}, "site-3"), fl_ctx) is True
    assert "refused 'site-2': ValueError: site-2 is not welcome\\nat all" in caplog.text
    assert closed(aggregator, fl_ctx)[0]["w"].tolist() == [4.0]
    aggregator.reset(fl_ctx)
    assert server.components["mine"]._received == {}


@pytest.mark.parametrize("inner", [Maximum(), WithoutSecond()])
def test_a_users_aggregator_gets_the_dtypes_that_the_client_sent(
    server: Server, inner: Any
) -> None:
    import ml_dtypes

    sent = convert.update_to_fl_model(
        fc.Update("site-1", 0, {"w": np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)}, weight=1)
    )
    assert sent.params["w"].dtype.kind == "V"
    message = named(FLModelUtils.to_shareable(sent))
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
    aggregator, fl_ctx = sheltered(server, inner)
    assert aggregator.accept(message, fl_ctx) is True
    assert closed(aggregator, fl_ctx)[0]["w"].tolist() == [1.5, -2.0]


def test_a_users_model_aggregator_that_has_nothing_leaves_the_model(server: Server) -> None:
    aggregator, fl_ctx = sheltered(server, WithoutSecond())
    assert fc.same_bits(closed(aggregator, fl_ctx)[0], MODEL)


def test_a_users_aggregator_never_sees_another_rounds_result(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = sheltered(server, Maximum())
    assert aggregator.accept(result({"w": np.ones(1)}, "site-1", round=4), fl_ctx) is False
    assert "expected a result for round 0, got one for 4" in caplog.text
    assert server.components["mine"]._received == []


@pytest.mark.parametrize("inner", [Maximum(), WithoutSecond()])
def test_a_users_aggregator_never_sees_a_client_that_has_failed(
    server: Server, caplog: pytest.LogCaptureFixture, inner: Any
) -> None:
    aggregator, fl_ctx = sheltered(server, inner)
    assert aggregator.accept(failed("no disk", "site-1"), fl_ctx) is False
    assert "site-1 failed: no disk" in caplog.text
    assert len(inner._received) == 0


def test_a_component_that_is_no_aggregator_is_named(server: Server) -> None:
    with pytest.raises(fc.UsageError, match=r"'mine': expected an Aggregator .* got dict"):
        sheltered(server, {})


def test_the_clients_are_told_the_roster_the_rounds_and_the_seed(server: Server) -> None:
    generator = FedAvgShareableGenerator("DIFF", seed=9)
    fl_ctx = server.context(MODEL, round=2, rounds=6)
    sent = generator.learnable_to_shareable(convert.learnable(MODEL), fl_ctx)
    server.clients.remove("site-2")
    again = generator.learnable_to_shareable(convert.learnable(MODEL), fl_ctx)
    for message in map(FLModelUtils.from_shareable, (sent, again)):
        told = convert.assignment_of(message)
        assert sorted(told.roster) == ["site-1", "site-10", "site-2"]
        assert (told.round, told.num_rounds, told.seed, told.transfer) == (2, 6, 9, "DIFF")


def test_the_generator_makes_a_new_model_and_keeps_the_report(server: Server) -> None:
    generator = FedAvgShareableGenerator()
    new = {"w": MODEL["w"] + 1}
    held = generator.shareable_to_learnable(
        convert.result_from_model(new, {"round": 0}), server.context(MODEL)
    )
    assert fc.same_bits(convert.model_of(held), {**MODEL, **new})
    assert convert.report_of(held) == {"round": 0}
