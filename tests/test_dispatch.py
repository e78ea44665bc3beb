"""Running clients: each gives one answer, in order, whatever it does."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedavg_core.client import Client, Context, TrainResult
from fedavg_core.dispatch import Dispatch, train_one
from fedavg_core.errors import UsageError
from fedavg_core.outcome import Failure
from fedavg_core.update import TransferType, Update

FULL, DIFF = TransferType.FULL, TransferType.DIFF
MODEL = {"w": np.array([1.0, 2.0], np.float32)}


def context(index: int) -> Context:
    return Context(f"site-{index}", index, 9, 4, 5, seed=index)


def tasks(*clients: Client) -> Iterator[tuple[Client, Context]]:
    return ((client, context(index)) for index, client in enumerate(clients))


def train(params: dict[str, Any], told: Context) -> TrainResult:
    params["w"] += told.index
    return TrainResult(params, told.index + 1, {"index": told.index})


def slow(params: dict[str, Any], told: Context) -> TrainResult:
    time.sleep(0.05 * (3 - told.index))
    return train(params, told)


def raising(params: dict[str, Any], told: Context) -> TrainResult:
    raise RuntimeError("no data\non this site" + "!" * 10_000)


def leaving(params: dict[str, Any], told: Context) -> TrainResult:
    sys.exit(3)


def dying(params: dict[str, Any], told: Context) -> TrainResult:
    os._exit(3)


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Evasive(Exception):
    def __str__(self) -> str:
        class Text(str):
            __slots__ = ()

            def __len__(self) -> int:
                raise RuntimeError

        return Text("no")


def evasive(params: dict[str, Any], told: Context) -> TrainResult:
    raise Evasive


class Leaving(Exception):
    """One whose text ends the program."""

    def __str__(self) -> str:
        sys.exit(3)


class Untraceable(Exception):
    @property
    def __traceback__(self) -> Any:
        raise RuntimeError

    @__traceback__.setter
    def __traceback__(self, trace: Any) -> None:
        pass


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError


class Unnamed(Exception, metaclass=Nameless):
    pass


def raised(error: type[BaseException]) -> Client:
    def client(params: dict[str, Any], told: Context) -> TrainResult:
        raise error

    return client


def cancelled(params: dict[str, Any], told: Context) -> TrainResult:
    raise asyncio.CancelledError("by itself")


def unshowable(params: dict[str, Any], told: Context) -> TrainResult:
    raise Unshowable


def returning(value: Any) -> Client:
    return lambda params, told: value


EXECUTORS: list[Callable[[], Executor | None]] = [
    lambda: None,
    lambda: ThreadPoolExecutor(3),
    lambda: ProcessPoolExecutor(2),
]


@pytest.mark.parametrize("make", EXECUTORS)
def test_answers_come_in_the_order_of_the_tasks(make: Callable[[], Executor | None]) -> None:
    executor = make()
    dispatch = Dispatch(executor, in_flight=2)
    answers = list(dispatch.answers(tasks(slow, leaving, slow, train), MODEL, FULL))
    if executor is not None:
        executor.shutdown()
    assert [type(answer) for answer in answers] == [Update, Failure, Update, Update]
    assert [answer.contributor for answer in answers] == [f"site-{n}" for n in range(4)]
    assert {answer.round for answer in answers} == {4}
    last = answers[3]
    assert isinstance(last, Update)
    assert last.params["w"].tolist() == [4.0, 5.0]
    assert (last.weight, last.metrics, last.transfer) == (4, {"index": 3}, FULL)
    assert MODEL["w"].tolist() == [1.0, 2.0]


def waiting_for(event: threading.Event) -> Client:
    def client(params: dict[str, Any], told: Context) -> TrainResult:
        assert event.wait(30)
        return train(params, told)

    return client


@pytest.mark.parametrize("in_flight", [2, 9])
def test_answers_come_as_they_are_ready_where_that_is_asked_for(in_flight: int) -> None:
    event = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        dispatch = Dispatch(executor, in_flight, first_come=True)
        answers = dispatch.answers(tasks(waiting_for(event), train, raising, train), MODEL, FULL)
        first = {next(answers).contributor for _ in range(3)}
        assert first == {"site-1", "site-2", "site-3"}
        event.set()
        assert [answer.contributor for answer in answers] == ["site-0"]


def test_those_that_are_late_are_told_whoever_comes_first() -> None:
    event = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        dispatch = Dispatch(executor, deadline=0.2, first_come=True)
        answers = dispatch.answers(tasks(waiting_for(event), train, raising), MODEL, FULL)
        found = {answer.contributor: answer for answer in answers}
        event.set()
    assert isinstance(found["site-1"], Update)
    late = found["site-0"]
    assert isinstance(late, Failure)
    assert late.problem.startswith("late: not done within the 0.2 s")


def test_what_has_not_begun_when_no_more_is_asked_for_is_cancelled() -> None:
    event, ran = threading.Event(), []

    def noting(params: dict[str, Any], told: Context) -> TrainResult:
        ran.append(told.index)
        return train(params, told)

    with ThreadPoolExecutor(1) as executor:
        given = tasks(train, waiting_for(event), noting, noting)
        answers = Dispatch(executor, first_come=True).answers(given, MODEL, FULL)
        assert next(answers).contributor == "site-0"
        answers.close()
        event.set()
    assert ran == []


def test_differences_are_taken_from_the_model() -> None:
    (answer,) = Dispatch().answers([(train, context(3))], MODEL, DIFF)
    assert isinstance(answer, Update)
    assert answer.transfer is DIFF
    assert answer.params["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("client", "problem"),
    [
        (raising, "RuntimeError: no data\\non this site!!!"),
        (unshowable, "Unshowable (test_dispatch.py, line "),
        (evasive, "Evasive: no (test_dispatch.py, line "),
        (leaving, "SystemExit: 3 (test_dispatch.py, line "),
        (raised(Leaving), "Leaving (test_dispatch.py, line "),
        (raised(Untraceable), "Untraceable (test_dispatch.py, line "),
        (raised(Unnamed), "Unnamed (test_dispatch.py, line "),
        (raised(GeneratorExit), "GeneratorExit (test_dispatch.py, line "),
        (cancelled, "CancelledError: by itself (test_dispatch.py, line "),
        (returning(None), "TypeError: expected a TrainResult, got a NoneType"),
        (returning({"w": 1}), "TypeError: expected a TrainResult, got a dict"),
        (5, "TypeError: 'int' object is not callable"),
    ],
)
def test_a_client_that_fails_is_described_in_one_line(client: Any, problem: str) -> None:
    (answer,) = Dispatch().answers([(client, context(1))], MODEL, DIFF)
    assert isinstance(answer, Failure)
    assert (answer.contributor, answer.round) == ("site-1", 4)
    assert answer.problem.startswith(problem)
    assert answer.problem.isprintable()
    assert len(answer.problem) <= 200


def reading(text: str) -> Any:
    return json.loads(text)


def misread(params: dict[str, Any], told: Context) -> TrainResult:
    return TrainResult(reading("no JSON"), 1)


@pytest.mark.parametrize("client", [misread, partial(misread)])
def test_a_failure_names_the_innermost_line_of_the_clients_own_file(client: Any) -> None:
    (answer,) = Dispatch().answers([(client, context(1))], MODEL, FULL)
    assert isinstance(answer, Failure)
    line = reading.__code__.co_firstlineno + 1
    assert answer.problem.endswith(f" (test_dispatch.py, line {line})")


@pytest.mark.parametrize("client", [returning(None), 5])
def test_what_was_not_raised_in_a_clients_file_names_no_line(client: Any) -> None:
    (answer,) = Dispatch().answers([(client, context(1))], MODEL, DIFF)
    assert isinstance(answer, Failure)
    assert ".py" not in answer.problem


def test_what_a_client_raised_is_in_the_log_with_the_lines_that_led_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        list(Dispatch().answers([(raising, context(1))], MODEL, FULL))
    assert caplog.messages == ["what site-1 raised:"]
    assert "in raising" in caplog.text


def test_an_unfit_update_is_left_for_the_round_to_judge() -> None:
    unfit = TrainResult({"w": np.full(2, math.nan, np.float32)}, -1, {"x": "y"})
    (answer,) = Dispatch().answers([(returning(unfit), context(1))], MODEL, FULL)
    assert isinstance(answer, Update)


class Flaky:
    """Fails a few times; notes what model it was given each time."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.seen: list[float] = []

    def __call__(self, params: dict[str, Any], told: Context) -> TrainResult:
        self.seen.append(float(params["w"][0]))
        params["w"][:] = math.nan
        if len(self.seen) <= self.failures:
            raise RuntimeError(f"failure {len(self.seen)}")
        return TrainResult({"w": np.zeros(2)}, 1)


@pytest.mark.parametrize(("retries", "answer"), [(1, Failure), (2, Update), (3, Update)])
def test_a_client_that_fails_is_tried_again_with_a_new_copy(retries: int, answer: type) -> None:
    client = Flaky(2)
    found = train_one(client, MODEL, context(0), FULL, retries)
    assert type(found) is answer
    assert client.seen == [1.0] * min(3, retries + 1)
    if isinstance(found, Failure):
        assert found.problem.startswith("RuntimeError: failure 2 (")


def test_a_keyboard_interrupt_is_not_a_clients_failure() -> None:
    def interrupted(params: dict[str, Any], told: Context) -> TrainResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Dispatch().answers([(interrupted, context(0))], MODEL, FULL))


def test_no_more_tasks_are_taken_than_are_in_flight() -> None:
    taken = 0

    def endless() -> Iterator[tuple[Client, Context]]:
        nonlocal taken
        while True:
            yield train, context(taken)
            taken += 1

    with ThreadPoolExecutor(2) as executor:
        answers = Dispatch(executor, in_flight=3).answers(endless(), MODEL, FULL)
        for number in range(20):
            assert next(answers).contributor == f"site-{number}"
            assert taken <= number + 4
        answers.close()


def test_a_pool_that_a_client_breaks_fails_its_clients_and_nothing_else() -> None:
    with ProcessPoolExecutor(1) as executor:
        clients = [dying] + [train] * 5
        answers = list(Dispatch(executor, in_flight=2).answers(tasks(*clients), MODEL, FULL))
    assert [type(answer) for answer in answers] == [Failure] * 6
    assert all("Broken" in answer.problem for answer in answers if isinstance(answer, Failure))


def test_a_client_that_no_process_can_be_sent_is_a_failure() -> None:
    with ProcessPoolExecutor(1) as executor:
        (answer,) = Dispatch(executor).answers(tasks(lambda params, told: None), MODEL, FULL)  # type: ignore[arg-type, return-value]
    assert isinstance(answer, Failure)
    assert "<lambda>" in answer.problem  # in words that differ from one Python to the next


class TestTheDeadline:
    """Late is a failure, and the rest goes on."""

    def test_what_is_not_done_by_then_is_late(self) -> None:
        release = threading.Event()

        def stuck(params: dict[str, Any], told: Context) -> TrainResult:
            release.wait(30)
            return train(params, told)

        with ThreadPoolExecutor(2) as executor:
            dispatch = Dispatch(executor, deadline=0.2)
            started = time.monotonic()
            answers = list(dispatch.answers(tasks(stuck, train, stuck, stuck), MODEL, FULL))
            assert time.monotonic() - started < 10
            release.set()
        assert [type(answer) for answer in answers] == [Failure, Update, Failure, Failure]
        late = answers[0]
        assert isinstance(late, Failure)
        assert late.problem == "late: not done within the 0.2 s that the round waits"

    def test_what_is_done_in_time_is_not(self) -> None:
        with ThreadPoolExecutor(2) as executor:
            dispatch = Dispatch(executor, deadline=60)
            answers = list(dispatch.answers(tasks(train, raising), MODEL, FULL))
        assert [type(answer) for answer in answers] == [Update, Failure]

    def test_what_was_done_while_others_were_waited_for_is_not(self) -> None:
        done: Future[Any] = Future()
        done.set_result(train_one(train, MODEL, context(0), FULL, 0))
        answer = Dispatch(ThreadPoolExecutor(1), deadline=1)._collect(context(0), done, end=0.0)
        assert isinstance(answer, Update)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_flight": 0}, "in_flight: expected a whole number of at least 1, got 0"),
        ({"in_flight": 1.5}, r"in_flight: expected a whole number of at least 1, got 1\.5"),
        ({"retries": -1}, "retries: expected a whole number of at least 0, got -1"),
        ({"retries": True}, "retries: expected a whole number of at least 0, got True"),
        ({"deadline": 1.0}, "deadline: expected an executor as well"),
        ({"first_come": True}, "first_come: expected an executor as well; in line all come in"),
        ({"first_come": 1}, "first_come: expected True or False, got 1"),
    ],
)
def test_an_argument_without_meaning_is_a_usage_error(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Dispatch(**arguments)


@pytest.mark.parametrize("first_come", [False, True])
def test_a_deadline_beyond_what_can_be_waited_is_never_met(first_come: bool) -> None:
    with ThreadPoolExecutor(1) as executor:
        dispatch = Dispatch(executor, deadline=1e300, first_come=first_come)
        (answer,) = dispatch.answers(tasks(train), MODEL, FULL)
    assert isinstance(answer, Update)


@pytest.mark.parametrize("deadline", [0, -1, math.inf, math.nan, "soon", True, 10**400])
def test_a_deadline_without_meaning_is_a_usage_error(deadline: Any) -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(UsageError, match="seconds above 0"):
        Dispatch(executor, deadline=deadline)


def test_a_difference_that_no_number_holds_is_a_failure() -> None:
    client = returning(TrainResult({"w": np.array([-3e38], np.float32)}, 1))
    base = {"w": np.array([3e38], np.float32)}
    (answer,) = Dispatch().answers([(client, context(1))], base, DIFF)
    assert isinstance(answer, Failure)
    assert answer.problem == (
        "OutOfRange: key 'w': a difference is beyond the largest number of float32"
    )
