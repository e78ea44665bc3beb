"""The client loop, with NVFlare's client API replaced by a list of rounds."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare import client as flare
from nvflare.app_common.abstract.fl_model import ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import fedavg_core as fc
from nvflare_adapter import convert, serve
from nvflare_adapter.assignment import Assignment

pytestmark = pytest.mark.nvflare

MODEL = {"w": np.arange(3, dtype=np.float32), "n": np.array([4], dtype=np.int64)}


class Rounds:
    """NVFlare's client API: sends the model in each of some rounds, and keeps what comes back."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        transfer: str,
        rounds: Any = 2,
        model: Any = MODEL,
        name: str = "site-2",
    ) -> None:
        self.sent: list[Any] = []
        self.transfer, self.rounds, self.model, self.name = transfer, rounds, model, name
        self.task = "train"
        for function in (
            "is_train",
            "is_evaluate",
            "init",
            "is_running",
            "receive",
            "get_site_name",
            "send",
        ):
            monkeypatch.setattr(flare, function, getattr(self, function))

    def init(self) -> None:
        pass

    def is_train(self) -> bool:
        return self.task == "train"

    def is_evaluate(self) -> bool:
        return self.task == "evaluate"

    def is_running(self) -> Any:
        return len(self.sent) < self.rounds

    def receive(self) -> Any:
        assignment = Assignment(
            ["site-2", "site-10", "site-1"], len(self.sent), self.rounds, 5, self.transfer
        )
        model = {key: value.copy() for key, value in self.model.items()}
        return FLModelUtils.from_shareable(convert.message_from_model(model, assignment))

    def get_site_name(self) -> Any:
        return self.name

    def send(self, message: Any) -> None:
        self.sent.append(message)


def in_place(params: dict[str, Any], context: fc.Context) -> Any:
    """Changes the arrays that it was given, and sends only one of them."""
    params["w"] += np.float32(context.index + 0.5)
    params["n"] -= 9
    return fc.TrainResult({"w": params["w"]}, weight=2, metrics={"loss": 1})


def test_full_sends_the_model_that_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, "FULL")
    serve(in_place)
    assert [message.params_type for message in rounds.sent] == [ParamsType.FULL] * 2
    assert fc.same_bits(rounds.sent[1].params, {"w": MODEL["w"] + np.float32(1.5)})
    assert rounds.sent[1].meta["NUM_STEPS_CURRENT_ROUND"] == 2


def test_diff_sends_what_has_changed_though_train_changed_it_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = Rounds(monkeypatch, "DIFF")
    serve(in_place)
    assert [message.params_type for message in rounds.sent] == [ParamsType.DIFF] * 2
    assert fc.same_bits(rounds.sent[1].params, {"w": np.full(3, 1.5, dtype=np.float32)})


def test_train_is_told_what_a_federation_in_process_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def train(params: dict[str, Any], context: fc.Context) -> Any:
        seen.append(context)
        return in_place(params, context)

    Rounds(monkeypatch, "FULL", rounds=2)
    serve(train)
    assert seen == [
        fc.Context("site-2", 1, 3, number, 2, fc.contributor_seed(5, number, "site-2"))
        for number in (0, 1)
    ]


def test_without_a_model_train_gets_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch, "FULL", rounds=1, model={})
    serve(lambda params, context: fc.TrainResult({"w": np.ones(len(params) + 1)}, weight=1))
    assert rounds.sent[0].params["w"].tolist() == [1]


def leaves(params: dict[str, Any], context: fc.Context) -> Any:
    sys.exit(3)


@pytest.mark.parametrize("transfer", ["FULL", "DIFF"])
@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (lambda params, context: 1 / 0, "ZeroDivisionError: division by zero (test_serve.py, line"),
        (leaves, "SystemExit: 3 (test_serve.py, line"),
        (lambda params, context: None, "TypeError: expected a TrainResult, got a NoneType"),
    ],
)
def test_a_failure_is_one_line_in_the_log_and_an_answer_without_arrays(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    train: Any,
    problem: Any,
    transfer: Any,
) -> None:
    rounds = Rounds(monkeypatch, transfer)
    with caplog.at_level(logging.ERROR):
        serve(train)
    assert len(caplog.messages) == 2
    assert caplog.messages[1].startswith(f"failed in round 1: {problem}")
    assert [message.params for message in rounds.sent] == [{}, {}]
    assert {message.params_type.value for message in rounds.sent} == {transfer}


def test_a_client_that_has_failed_takes_part_in_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(params: dict[str, Any], context: fc.Context) -> Any:
        if context.round == 0:
            raise RuntimeError
        return in_place(params, context)

    rounds = Rounds(monkeypatch, "DIFF")
    serve(train)
    assert [list(message.params) for message in rounds.sent] == [[], ["w"]]


def test_what_train_raised_is_in_the_log_with_the_lines_that_led_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Rounds(monkeypatch, "FULL")
    with caplog.at_level(logging.INFO):
        serve(lambda params, context: 1 / 0)  # type: ignore[arg-type, return-value]
    assert "Traceback" in caplog.text
    assert "lambda params, context: 1 / 0" in caplog.text


@pytest.mark.parametrize(
    ("task", "evaluate", "expected"),
    [
        ("evaluate", lambda model: {"sum": np.float32(model["w"].sum())}, {"sum": 3.0}),
        ("evaluate", None, {}),
        ("submit_model", lambda model: {"sum": 1}, {}),
    ],
)
def test_other_tasks_than_training_are_answered(
    monkeypatch: pytest.MonkeyPatch, task: str, evaluate: Any, expected: Any
) -> None:
    rounds = Rounds(monkeypatch, "FULL", rounds=1)
    rounds.task = task
    serve(in_place, evaluate)
    assert [(message.params, message.metrics) for message in rounds.sent] == [(None, expected)]
