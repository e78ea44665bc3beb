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
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import fedavg_core as fc
from nvflare_adapter import (
    CheckpointPersistor,
    CustomAggregator,
    FedAvgAggregator,
    FedAvgShareableGenerator,
    convert,
    global_model,
)
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
    server.clients = ["site-2", "site-1"]
    aggregator, fl_ctx = opened(server)
    first, second = params(0.1, 2, 1e30, n=8), params(0.7, 2.5, -1e30, n=11)
    assert aggregator.accept(result(first, "site-1", weight=3, metrics={"loss": 1.0}), fl_ctx)
    assert aggregator.accept(result(second, "site-2", weight=1, metrics={"loss": 2.0}), fl_ctx)
    model, extra = closed(aggregator, fl_ctx)
    expected = (3 * Fraction(float(first["w"][0])) + Fraction(float(second["w"][0]))) / 4
    assert model["w"][0] == np.float32(float(expected))
    assert model["n"].tolist() == [[9]]
    assert model["n"].dtype == np.int64
    assert extra["report"] == {
        "round": 0,
        "accepted": {"site-1": 3, "site-2": 1},
        "refused": [],
        "failed": [],
        "total_weight": 4.0,
        "metrics": {"loss": 1.25},
        "skipped_metrics": [],
        "problem": None,
    }


def test_the_memory_of_the_sums_serves_the_rounds_of_a_job_that_begins_without_a_model(
    server: Server,
) -> None:
    aggregator, fl_ctx = opened(server, {})
    assert aggregator.accept(result(params(1, 2, 3, n=5)), fl_ctx)
    first, _ = closed(aggregator, fl_ctx, {})
    sums = aggregator._mean._sums._blocks
    aggregator.reset(fl_ctx)
    fl_ctx = server.context(first, 1)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    assert aggregator.accept(result(params(4, 5, 6, n=8), round=1), fl_ctx)
    second, _ = closed(aggregator, fl_ctx, first)
    assert fc.same_bits(second, params(4, 5, 6, n=8))
    assert aggregator._mean._sums._blocks is sums


def test_a_first_model_that_came_to_nothing_does_not_bind_the_next(server: Server) -> None:
    aggregator, fl_ctx = opened(server, {}, min_updates=2)
    assert aggregator.accept(result(params(1, 2, 3, n=5)), fl_ctx)
    assert closed(aggregator, fl_ctx, {})[0] == {}
    aggregator.reset(fl_ctx)
    fl_ctx = server.context({}, 1)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    other = {"w": np.zeros((7, 2)), "v": np.ones(1)}
    for name in ("site-1", "site-2"):
        assert aggregator.accept(result(other, name, round=1), fl_ctx)
    assert fc.same_bits(closed(aggregator, fl_ctx, {})[0], other)


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


def test_a_difference_of_some_parameters_leaves_the_others_and_rounds_once(server: Server) -> None:
    base = {"w": np.full(2, 0.1, np.float32), "v": np.full(1, 7.0)}
    aggregator, fl_ctx = opened(server, base, transfer="DIFF")
    moved = [np.full(2, x, np.float32) for x in (1e-9, 0.2, 0.7)]
    for name, one in zip(("site-1", "site-2", "site-3"), moved, strict=True):
        assert aggregator.accept(result({"w": one}, name, kind="WEIGHT_DIFF"), fl_ctx)
    model, _ = closed(aggregator, fl_ctx, base)
    exact = Fraction(float(base["w"][0])) + sum(Fraction(float(one[0])) for one in moved) / 3
    assert fc.same_bits(model, {"w": np.full(2, float(exact)).astype(np.float32), "v": base["v"]})


def test_limits_are_the_gates(server: Server) -> None:
    limits = {"max_norm": 2.0, "exclude": "^n$"}
    aggregator, fl_ctx = opened(server, limits=limits)
    assert aggregator.accept(result(params(2, 2, 4, n=100), "site-1"), fl_ctx)
    assert not aggregator.accept(result(params(9, 2, 4), "site-2"), fl_ctx)
    model, extra = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, params(2, 2, 4, n=7))
    assert extra["report"]["refused"][0].startswith("NORM (contributor 'site-2'")


@pytest.mark.parametrize(
    ("weight", "expected"), [(3, 9.0), (np.int32(3), 9.0), (0.5, 1.5), (np.float32(0.5), 1.5)]
)
def test_a_contributors_weight_is_multiplied_by_its_factor(
    server: Server, weight: Any, expected: float
) -> None:
    aggregator, fl_ctx = opened(server, aggregation_weights={"site-1": 3})
    assert aggregator.accept(result(params(1, 1, 1), "site-1", weight=weight), fl_ctx)
    assert aggregator.accept(result(params(2, 2, 2), "site-2", weight=1), fl_ctx)
    assert closed(aggregator, fl_ctx)[1]["report"]["accepted"] == {"site-1": expected, "site-2": 1}


@pytest.mark.parametrize("weight", ["two", True, None, [1]])
def test_a_weight_that_is_no_number_is_refused_whatever_the_factor(
    server: Server, caplog: pytest.LogCaptureFixture, weight: Any
) -> None:
    aggregator, fl_ctx = opened(server, aggregation_weights={"site-1": 3})
    assert aggregator.accept(result(params(1, 1, 1), "site-1", weight=weight), fl_ctx) is False
    assert "BAD_WEIGHT" in caplog.text


def failed(problem: Any, contributor: str, round: int = 0) -> Any:
    """What reaches the server of a client that has failed."""
    failure = fc.Failure(contributor, round, problem)
    sent = convert.answer_to_fl_model(failure, fc.TransferType.FULL)
    message = FLModelUtils.to_shareable(sent)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: contributor})
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, round)
    return message


def test_a_rounds_statistics_are_published_as_nvflares_own_are(server: Server) -> None:
    server.clients = ["site-1", "site-2"]
    model = {**MODEL, "v": np.zeros(2)}
    aggregator, fl_ctx = opened(server, model, limits={"exclude": "^n$"})
    assert aggregator.accept(result({**params(1, 1, 1), "v": np.ones(2)}, "site-2"), fl_ctx)
    assert aggregator.accept(result({"v": np.ones(2)}, "site-1"), fl_ctx)
    assert not aggregator.accept(result(params(1, np.nan, 1), "site-3"), fl_ctx)
    assert not aggregator.accept(failed("no disk", "site-4"), fl_ctx)
    aggregator.aggregate(fl_ctx)
    told = fl_ctx.get_prop("_aggregation_stats")
    assert told.pop("refused")[0].startswith("NON_FINITE (contributor 'site-3'")
    assert told == {
        "round": 0,
        "accepted_contributions": 2,
        "contributors": ["site-1", "site-2"],
        "keys_seen": 3,
        "keys_aggregated": 2,
        "fully_matched_keys": 1,
        "partially_matched_keys": 1,
        "skipped_keys": 1,
        "failed": ["site-4 failed: no disk"],
    }


def test_a_server_optimizers_state_goes_with_the_model(server: Server) -> None:
    rng = np.random.default_rng(3)
    updates = [rng.standard_normal(3).astype(np.float32) for _ in range(4)]
    settings = {"learning_rate": 0.5}
    model: Any = {"w": MODEL["w"]}
    state: Any = {}
    held = global_model.learnable(model)
    generator = FedAvgShareableGenerator()
    for number, one in enumerate(updates):
        # Another aggregator in each round, as after a restart.
        aggregator = FedAvgAggregator(server_optimizer="fedadam", optimizer_settings=settings)
        fl_ctx = server.context(round=number)
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, held, private=True, sticky=False)
        aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
        assert aggregator.accept(result({"w": one}, round=number), fl_ctx)
        held = generator.shareable_to_learnable(aggregator.aggregate(fl_ctx), fl_ctx)
        optimizer = fc.FedAdam(**settings)
        round = fc.Round(model, number, server_optimizer=optimizer, optimizer_state=state)
        round.offer(fc.Update("site-1", number, {"w": one}, weight=1))
        outcome = round.close()
        model, state = outcome.model, outcome.optimizer_state
        assert fc.same_bits(global_model.model_of(held), model)
        assert fc.same_bits(global_model.extra_of(held)["arrays"], state)


def test_nvflares_fedavg_controller_keeps_a_server_optimizers_state(server: Server) -> None:
    aggregator = FedAvgAggregator(server_optimizer="fedavgm")
    model = {"w": np.zeros(1)}
    for number in range(2):
        fl_ctx = server.context(model, number)
        fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)["meta"] = {}
        aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
        aggregator.accept_model(fl_model({"w": model["w"] + 1}))
        model = aggregator.aggregate_model().params
    assert model["w"].tolist() == [2.9]


@pytest.mark.parametrize("before", range(4))
def test_a_round_goes_on_in_the_middle_with_the_bits_it_would_have_had(
    server: Server, tmp_path: Path, before: int
) -> None:
    rng = np.random.default_rng(before)
    names = ["site-1", "site-2", "site-3"]
    sent = {
        name: result({"w": rng.standard_normal(3).astype(np.float32)}, name, 2, weight=n + 1)
        for n, name in enumerate(names)
    }
    arguments: Any = {"keep_open": True, "audit": True, "limits": {"max_norm": 100.0}}
    server.components["persistor"] = CheckpointPersistor()
    whole, fl_ctx = opened(server, round=2, **arguments)
    assert all(whole.accept(sent[name], fl_ctx) for name in names)
    path = server.folder / "simulate_job" / "models" / "open_round.npz"
    path.unlink()
    first, fl_ctx = opened(server, round=2, **arguments)
    assert all(first.accept(sent[name], fl_ctx) for name in names[:before])
    kept = {"open": fc.load_checkpoint(path)} if path.exists() else {}
    assert bool(kept) == (before > 0)

    second = FedAvgAggregator(**arguments)
    fl_ctx = server.context(round=2)
    held = global_model.learnable(MODEL, kept)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, held, private=True, sticky=False)
    second.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    assert all(second.accept(sent[name], fl_ctx) for name in reversed(names[: before or 3]))
    assert all(second.accept(sent[name], fl_ctx) for name in names[before or 3 :])
    model, extra = closed(second, fl_ctx)
    statistics = fl_ctx.get_prop("_aggregation_stats")
    expected, expected_extra = closed(whole, server.context(MODEL, 2))
    assert fc.same_bits(model, expected)
    assert extra["report"] == expected_extra["report"]
    assert (statistics["fully_matched_keys"], statistics["accepted_contributions"]) == (1, 3)
    assert "open" not in global_model.extra_of(held)


def test_who_sends_twice_after_a_restart_is_refused(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.components["persistor"] = CheckpointPersistor()
    first, fl_ctx = opened(server, keep_open=True)
    assert first.accept(result(params(1, 1, 1)), fl_ctx)
    path = server.folder / "simulate_job" / "models" / "open_round.npz"
    held = global_model.learnable(MODEL, {"open": fc.load_checkpoint(path)})
    fl_ctx = server.context()
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, held, private=True, sticky=False)
    second = FedAvgAggregator()
    second.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    assert second.accept(result(params(1, 1, 1)), fl_ctx) is True
    assert second.accept(result(params(1, 1, 1)), fl_ctx) is False
    assert "DUPLICATE" in caplog.text


def test_a_round_that_cannot_be_kept_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = opened(server, keep_open=True)  # there is no persistor
    assert aggregator.accept(result(params(1, 1, 1)), fl_ctx) is True
    assert "the open round could not be kept: AttributeError" in caplog.text


def test_an_audit_goes_with_the_model(server: Server) -> None:
    aggregator, fl_ctx = opened(server, audit=True)
    sent = params(1, 2, 3)
    assert aggregator.accept(result(sent), fl_ctx)
    _, extra = closed(aggregator, fl_ctx)
    verdict = fc.verify(fc.Audit.from_text(extra["audit"]), {"site-1": sent}, base=MODEL)
    assert verdict.same_bits


def fl_model(params: Any, contributor: str = "site-1", kind: str = "FULL", **fields: Any) -> Any:
    """A client's result as NVFlare's FedAvg controller hands it on."""
    meta = {"client_name": contributor, "NUM_STEPS_CURRENT_ROUND": fields.pop("weight", 1)}
    return FLModel(ParamsType(kind), params, meta=meta, **fields)


def test_nvflares_fedavg_controller_gets_the_exact_mean(server: Server) -> None:
    aggregator, fl_ctx = opened(server)
    aggregator.reset_stats()  # as that controller does when it has begun a round
    aggregator.accept_model(fl_model(params(0.1, 2, 1e30), weight=3, metrics={"loss": 1.0}))
    aggregator.accept_model(fl_model(params(0.7, 2.5, -1e30, n=11), "site-2", metrics={"loss": 2}))
    made = aggregator.aggregate_model()
    assert made.params_type == ParamsType.FULL
    assert made.metrics == {"loss": 1.25}
    expected = (3 * Fraction(float(np.float32(0.1))) + Fraction(float(np.float32(0.7)))) / 4
    assert made.params["w"][0] == np.float32(float(expected))
    assert made.params["n"].tolist() == [[8]]
    assert made.meta == {}  # it would go to the clients
    assert fl_ctx.get_prop("_aggregation_stats")["accepted_contributions"] == 2


def test_nvflares_fedavg_controller_is_told_of_a_refusal_by_an_exception(server: Server) -> None:
    aggregator, _ = opened(server)
    with pytest.raises(fc.FedAvgError, match="refused: NON_FINITE"):
        aggregator.accept_model(fl_model(params(np.nan, 1, 1)))
    with pytest.raises(fc.FedAvgError, match="refused: FUTURE_ROUND"):
        aggregator.accept_model(fl_model(params(1, 1, 1), current_round=4))
    with pytest.raises(fc.FedAvgError, match="refused: BAD_NAME"):
        aggregator.accept_model(FLModel(ParamsType.FULL, params(1, 1, 1), meta={}))
    assert fc.same_bits(aggregator.aggregate_model().params, MODEL)


def test_nvflares_fedavg_controller_gets_a_difference_as_a_whole_model(server: Server) -> None:
    aggregator, _ = opened(server)
    for name in ("site-1", "site-2"):
        tiny = {"w": np.full(3, 2.0**-25, dtype=np.float32)}
        aggregator.accept_model(fl_model(tiny, name, "DIFF"))
    made = aggregator.aggregate_model()
    assert made.params_type == ParamsType.FULL
    assert fc.same_bits(made.params, MODEL)


def test_nvflares_fedavg_controller_keeps_its_model_where_there_is_no_other(server: Server) -> None:
    aggregator, _ = opened(server, model={})
    made = aggregator.aggregate_model()
    kept = FLModelUtils.update_model(FLModel(ParamsType.FULL, dict(MODEL)), made)
    assert fc.same_bits(kept.params, MODEL)


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
    aggregator, fl_ctx = opened(server, round=2, transfer="FULL")
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
    model, extra = closed(aggregator, fl_ctx)
    report = extra["report"]
    assert fc.same_bits(model, params(5, 5, 5))
    assert report["failed"] == [
        "site-2 failed: 'two\\nlines'",
        "site-10 failed: OSError: no disk (train.py, line 3)",
    ]
    assert [line.split(",")[0] for line in report["refused"]] == [
        "STALE_ROUND (contributor 'site-3'",
        "STALE_ROUND (contributor 'site-10'",
    ]
    server.clients = []
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    assert closed(aggregator, fl_ctx)[1]["report"]["failed"] == []


def submitted(aggregator: Any, server: Server, message: Any) -> None:
    """Tells of a result that NVFlare is about to process, before it offers it."""
    fl_ctx = server.context()
    fl_ctx.set_prop(FLContextKey.TASK_RESULT, message, private=True, sticky=False)
    aggregator.handle_event(EventType.BEFORE_PROCESS_SUBMISSION, fl_ctx)


def test_clients_that_nvflare_has_lost_and_clients_that_are_late_are_reported(
    server: Server,
) -> None:
    aggregator, fl_ctx = opened(server)
    assert aggregator.accept(result(params(5, 5, 5), "site-10"), fl_ctx)
    submitted(aggregator, server, result(params(6, 6, 6), "site-1"))
    lost = make_reply(ReturnCode.TASK_ABORTED)
    lost.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
    lost.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
    submitted(aggregator, server, lost)
    model, extra = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, params(5, 5, 5))
    assert extra["report"]["failed"] == [
        "site-1 failed: late: no answer before the round was closed",
        "site-2 failed: its NVFlare client answered 'TASK_ABORTED'",
    ]


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
    model, extra = closed(aggregator, fl_ctx)
    assert fc.same_bits(model, MODEL)
    assert extra["report"]["problem"] is not None
    assert extra["report"]["problem"] in caplog.text
    assert caplog.text.count("round 0") == 1


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

    sent = convert.answer_to_fl_model(
        fc.Update("site-1", 0, {"w": np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)}, weight=1),
        fc.TransferType.FULL,
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
    with pytest.raises(fc.UsageError, match=r"'mine': expected an Aggregator .* got a dict"):
        sheltered(server, {})


def test_the_clients_are_told_the_roster_the_rounds_and_the_seed(server: Server) -> None:
    generator = FedAvgShareableGenerator("DIFF", seed=9)
    fl_ctx = server.context(MODEL, round=2, rounds=6)
    sent = generator.learnable_to_shareable(global_model.learnable(MODEL), fl_ctx)
    server.clients.remove("site-2")
    again = generator.learnable_to_shareable(global_model.learnable(MODEL), fl_ctx)
    for message in map(FLModelUtils.from_shareable, (sent, again)):
        told = convert.assignment_of(message)
        assert sorted(told.roster) == ["site-1", "site-10", "site-2"]
        assert (told.round, told.num_rounds, told.seed, told.transfer) == (2, 6, 9, "DIFF")


def test_the_generator_makes_a_new_model_and_keeps_what_goes_with_it(server: Server) -> None:
    generator = FedAvgShareableGenerator()
    new = {"w": MODEL["w"] + 1}
    report = {"round": 0, "metrics": {"loss": 0.5}}
    generator.learnable_to_shareable(global_model.learnable(MODEL), server.context(MODEL))
    held = generator.shareable_to_learnable(
        convert.result_from_model(new, {"report": report}), server.context(MODEL)
    )
    assert fc.same_bits(global_model.model_of(held), {**MODEL, **new})
    job = {"roster": ["site-1", "site-10", "site-2"], "seed": 0, "transfer": "FULL"}
    assert global_model.extra_of(held) == {"report": report, "job": job}


def test_who_was_there_before_a_job_was_resumed_keeps_its_place(server: Server) -> None:
    server.clients = ["site-2", "site-3"]
    held = global_model.learnable(MODEL, {"job": {"roster": ["site-1", "site-2"]}})
    sent = FedAvgShareableGenerator().learnable_to_shareable(held, server.context(MODEL))
    told = convert.assignment_of(FLModelUtils.from_shareable(sent))
    assert told.roster == ["site-1", "site-2", "site-3"]
