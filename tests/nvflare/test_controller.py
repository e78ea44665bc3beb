"""The controller, as NVFlare's events find it."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContextManager
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector

import fedavg_core as fc
from nvflare_adapter import CheckpointPersistor, global_model
from nvflare_adapter.controller import FedAvgController, direction
from tests.nvflare.server_side import Server, result

pytestmark = pytest.mark.nvflare


@pytest.fixture
def server(tmp_path: Path) -> Any:
    return Server(tmp_path)


def begun(server: Server, extra: Any = None, **arguments: Any) -> Any:
    """A controller whose initial model is loaded, in a server that tells it of events."""
    controller = FedAvgController(min_clients=2, num_rounds=100, **arguments)
    server.components["controller"] = controller
    held = global_model.learnable({"w": np.zeros(1)}, extra)
    tell(server, AppEventType.INITIAL_MODEL_LOADED, held)
    return controller


def tell(server: Server, event: str, held: Any, round: int = 0) -> None:
    fl_ctx = server.context(round=round)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, held, private=True, sticky=False)
    server.fire_event(event, fl_ctx)


def play(server: Server, *values: Any, start: int = 0, metric: str = "accuracy") -> Any:
    """Plays rounds with a metric of these values, as ScatterAndGather does; the last model held."""
    controller = server.components["controller"]
    controller._current_round = start
    for value in values:
        number = controller._current_round
        if number >= controller._start_round + controller._num_rounds:
            break
        metrics = {} if value is None else {metric: value}
        report = {"round": number, "metrics": metrics}
        held = global_model.learnable({"w": np.full(1, float(number))}, {"report": report})
        tell(server, AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, held, number)
        tell(server, AppEventType.ROUND_DONE, held, number)
        controller._current_round += 1
    return held


def best_rounds(server: Server) -> Any:
    best = AppEventType.GLOBAL_BEST_MODEL_AVAILABLE
    return [
        fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        for event, fl_ctx in server.fired
        if event == best
    ]


@pytest.mark.parametrize(("mode", "expected"), [("max", [0, 2, 4]), ("min", [0, 1])])
def test_a_model_that_is_the_best_so_far_is_announced(
    server: Server, mode: str, expected: Any
) -> None:
    begun(server, key_metric="accuracy", key_metric_mode=mode)
    play(server, 0.5, 0.4, 0.6, 0.6, 0.7, None)
    assert best_rounds(server) == expected


def test_what_is_told_of_the_best_model_is_what_nvflares_selector_tells(server: Server) -> None:
    begun(server, key_metric="loss", key_metric_mode="min")
    play(server, 0.5, metric="loss")
    fl_ctx = server.fired[-2][1]
    assert fl_ctx.get_prop(AppConstants.VALIDATION_RESULT) == 0.5
    assert fl_ctx.get_prop("metrics_selection_info") == {
        "source": "FedAvgController",
        "key_metric": {"name": "loss", "mode": "min"},
        "best_round": 0,
        "best_metrics": {"loss": 0.5},
    }


@pytest.mark.parametrize(
    ("arguments", "values", "rounds"),
    [
        ({"stop_cond": "accuracy >= 0.6"}, (0.5, 0.4, 0.6, 0.9), 3),
        ({"stop_cond": "accuracy < 0.45"}, (0.5, 0.4, 0.6), 2),
        ({"stop_cond": "accuracy = 0.5"}, (0.5, 0.4), 1),
        ({"stop_cond": "loss > 0"}, (0.5, 0.4), 2),
        ({"key_metric": "accuracy", "patience": 2}, (0.5, 0.4, 0.6, 0.6, 0.1, 0.9), 5),
        ({"key_metric": "accuracy", "patience": 2}, (0.5, None, None, None, 0.6), 5),
        (
            {"key_metric": "accuracy", "key_metric_mode": "min", "patience": 2},
            (0.5, 0.6, 0.4, 0.4, 0.4, 0.3),
            5,
        ),
        ({"stop_cond": "accuracy > 2", "key_metric": "loss", "patience": 1}, (0.5, 0.4, 0.6), 2),
        ({"stop_cond": "accuracy < 0", "patience": 1}, (0.5, 0.4, 0.6, 0.3), 3),
        ({"key_metric": "accuracy"}, (0.5, 0.4, 0.3), 3),
        ({}, (0.5, 0.4), 2),
    ],
)
def test_a_job_stops_when_it_is_to(
    server: Server, caplog: pytest.LogCaptureFixture, arguments: Any, values: Any, rounds: int
) -> None:
    controller = begun(server, **arguments)
    with caplog.at_level(logging.INFO):
        play(server, *values)
    assert controller._current_round == rounds
    assert ("was the last" in caplog.text) == (controller._num_rounds == rounds)


def test_a_metric_that_does_not_come_is_named(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    begun(server, key_metric="accuracy", stop_cond="f1 > 0.9")
    play(server, 0.5, metric="loss")
    assert "expected the metric 'f1' from the clients, got ['loss']" in caplog.text


@pytest.mark.parametrize("split", range(1, 8))
def test_a_job_that_goes_on_decides_as_one_that_was_not_stopped(tmp_path: Path, split: int) -> None:
    values = (0.5, 0.6, 0.4, 0.6, 0.7, 0.1, 0.2, 0.3, 0.9)
    arguments: Any = {"key_metric": "accuracy", "patience": 3}
    whole, first, second = (Server(tmp_path / name) for name in "abc")
    begun(whole, **arguments)
    play(whole, *values)
    begun(first, **arguments)
    held = play(first, *values[:split])
    begun(second, extra=global_model.extra_of(held), start_round=split, **arguments)
    play(second, *values[split:], start=split)
    assert best_rounds(first) + best_rounds(second) == best_rounds(whole) == [0, 1, 4]
    ends = [one.components["controller"]._current_round for one in (whole, second)]
    assert ends == [8, 8]


def test_a_job_that_had_stopped_plays_no_round(server: Server, tmp_path: Path) -> None:
    arguments: Any = {"stop_cond": "accuracy > 0.8"}
    begun(server, **arguments)
    held = play(server, 0.5, 0.9)
    again = begun(Server(tmp_path), extra=global_model.extra_of(held), start_round=2, **arguments)
    assert again._num_rounds == 0


def test_the_best_model_is_kept_in_a_file(server: Server) -> None:
    server.components["persistor"] = CheckpointPersistor(best_model_filename="champion")
    begun(server, key_metric="accuracy")
    play(server, 0.5, 0.7, 0.6)
    best = fc.load_checkpoint(server.folder / "simulate_job" / "models" / "champion")
    assert fc.same_bits(best.model, {"w": np.ones(1)})
    assert (best.round, best.metrics) == (2, {"accuracy": 0.7})


def test_nvflares_own_selector_has_its_choice_kept_where_it_is_asked_instead(
    server: Server,
) -> None:
    server.components["persistor"] = CheckpointPersistor()
    server.components["selector"] = IntimeModelSelector(key_metric="accuracy")
    begun(server)
    held = global_model.learnable({"w": np.zeros(1)})
    for number, value in enumerate((0.9, 0.5, 0.8, 0.7)):  # of the model that a round begins with
        fl_ctx = server.context(round=number)
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, held, private=True, sticky=False)
        server.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
        sent = result({"w": np.ones(1)}, round=number, metrics={"accuracy": value})
        peer = FLContextManager(server, "site-1", "simulate_job").new_context()
        peer.set_prop(FLContextKey.SHAREABLE, sent, private=False, sticky=False)
        fl_ctx.set_peer_context(peer)
        server.fire_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, fl_ctx)
        server.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
        held = play(server, value, start=number)
    assert best_rounds(server) == [1, 2]
    best = fc.load_checkpoint(server.folder / "simulate_job" / "models" / "best_model.npz")
    assert fc.same_bits(best.model, {"w": np.ones(1)})
    assert best.round == 2


def test_a_condition_says_which_direction_is_better() -> None:
    said = [direction(f"f1 {sign} 0.5") for sign in (">", ">=", "=", "<", "<=")]
    assert said == [("f1", "max")] * 3 + [("f1", "min")] * 2


def test_what_the_clients_sent_is_given_up_before_the_mean_is_made(server: Server) -> None:
    """NVFlare's messages hold on to each other until the collector comes."""
    begun(server)

    class Message:
        itself: Any

    message = Message()
    message.itself = message
    gone = weakref.ref(message)
    gc.disable()
    try:
        del message
        tell(server, AppEventType.BEFORE_AGGREGATION, global_model.learnable({}))
        assert gone() is None
    finally:
        gc.enable()
