"""Work that is shared out to threads: each piece once, the first error, nobody left at work."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from fedavg_core.sums import threads
from fedavg_core.sums.threads import share_out

LONG = 20.0
"""Seconds after which a thread that waits for the others gives up."""


@pytest.mark.parametrize("threads", range(1, 6))
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_each_piece_is_done_once_however_many_threads_there_are(count: int, threads: int) -> None:
    done: list[int] = []
    share_out(count, lambda number, _: done.append(number), range(threads))
    assert sorted(done) == list(range(count))
    assert threads > 1 or done == list(range(count))


def test_each_piece_is_done_once_where_nothing_keeps_the_threads_apart() -> None:
    """On a Python without its lock, and on others by its switching as often as it can."""
    done: list[int] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        share_out(20_000, lambda number, _: done.append(number), range(4))
    finally:
        sys.setswitchinterval(before)
    assert sorted(done) == list(range(20_000))


def test_where_there_is_no_work_no_tools_are_needed() -> None:
    tools: list[None] = []
    share_out(0, lambda number, _: pytest.fail(f"piece {number}"), tools)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_thread_has_tools_of_its_own_and_the_calling_one_the_first(threads: int) -> None:
    together, used = threading.Barrier(threads), set[tuple[str, threading.Thread]]()

    def work(number: int, tools: str) -> None:
        together.wait(LONG)  # so that each round of pieces takes all threads
        used.add((tools, threading.current_thread()))

    share_out(3 * threads, work, "abcde"[:threads])
    assert len(used) == len({thread for _, thread in used}) == threads
    assert sorted(tools for tools, _ in used) == list("abcde"[:threads])
    assert ("a", threading.current_thread()) in used


def test_the_warnings_of_numpy_are_off_in_all_threads_and_then_as_they_were() -> None:
    together, states = threading.Barrier(3), list[object]()

    def work(number: int, tools: int) -> None:
        together.wait(LONG)
        states.append(np.geterr())

    with np.errstate(all="raise", under="warn"):
        before = np.geterr()
        share_out(3, work, range(3))
        assert np.geterr() == before
    assert states == [dict.fromkeys(before, "ignore")] * 3


@pytest.mark.parametrize("to_be_had", range(4))
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("lacking", [RuntimeError("can't start new thread"), MemoryError()])
def test_where_the_system_gives_fewer_threads_those_that_there_are_do_all(
    to_be_had: int, fails: bool, lacking: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    starts = iter(range(9))

    def start(run: Any, arguments: Any) -> None:
        if next(starts) >= to_be_had:
            raise lacking
        start_new_thread(run, arguments)

    def work(number: int, tools: int) -> None:
        done.append(number)
        if fails and number == 49:
            raise ValueError("of the last piece")

    monkeypatch.setattr(threads, "start_new_thread", start)
    if fails:
        with pytest.raises(ValueError, match="of the last piece"):
            share_out(50, work, range(5))
    else:
        share_out(50, work, range(5))
    assert sorted(done) == list(range(50))
    assert next(starts) == to_be_had + 1  # and it is asked for no more


class Told(Exception):
    """What a piece raises: its number."""


class Interrupted(KeyboardInterrupt):
    """The same as an interruption."""


@pytest.mark.parametrize("late", ["the earlier", "the later"])
@pytest.mark.parametrize(
    ("pieces", "first"),
    [
        *(("E--", 0), ("-E-", 1), ("--E", 2), ("EE-", 0), ("-EE", 1), ("E-E", 0), ("EEE", 0)),
        *(("K--", 0), ("KEE", 0), ("EKE", 1), ("EEK", 2), ("-EK", 2), ("EKK", 1), ("KKK", 0)),
    ],
)
def test_an_interruption_comes_before_an_error_and_else_the_first_piece_before_later_ones(
    pieces: str, first: int, late: str
) -> None:
    together = threading.Barrier(3)

    def work(number: int, tools: int) -> None:
        together.wait(LONG)  # each of the three has been handed out
        time.sleep(0.02 * (2 - number if late == "the earlier" else number))
        if pieces[number] != "-":
            raise (Told if pieces[number] == "E" else Interrupted)(number)

    with pytest.raises(Interrupted if "K" in pieces else Told) as error:
        share_out(3, work, range(3))
    assert error.value.args == (first,)


def test_after_a_failure_no_further_piece_begins_on_the_thread_that_failed() -> None:
    begun: list[int] = []

    def work(number: int, tools: int) -> None:
        begun.append(number)
        if number == 2:
            raise Told(number)

    with pytest.raises(Told):
        share_out(9, work, range(1))
    assert begun == [0, 1, 2]


def test_after_a_failure_what_others_have_begun_is_ended_and_nothing_else_begins() -> None:
    together, begun, ended = threading.Barrier(3), list[int](), list[int]()
    failing = threading.Event()

    def work(number: int, tools: int) -> None:
        begun.append(number)
        if tools == 1:
            failing.set()
        together.wait(LONG)
        if tools == 1:
            raise Told(number)
        failing.wait(LONG)
        time.sleep(0.1)  # until the failure is known
        ended.append(number)

    with pytest.raises(Told):
        share_out(99, work, range(3))
    assert sorted(begun) == [0, 1, 2]
    assert len(ended) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_is_at_work_any_more_when_it_returns_or_raises(fails: bool) -> None:
    together, ended = threading.Barrier(3), list[int]()

    def work(number: int, tools: int) -> None:
        together.wait(LONG)
        if tools == 0:  # the calling thread, which has the others to wait for
            if fails:
                raise Told(number)
        else:
            time.sleep(0.1)
        ended.append(number)

    before = set(threading.enumerate())
    if fails:
        with pytest.raises(Told):
            share_out(3, work, range(3))
    else:
        share_out(3, work, range(3))
    assert len(ended) == 3 - fails
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("moment", ["start", "wait", "wait, and again"])
def test_nobody_is_at_work_any_more_after_an_interruption_of_the_calling_thread(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, left, ended = threading.Event(), threading.Event(), list[int]()
    interruptions = iter([Interrupted(moment)] * (1 + moment.endswith("again")))

    def interrupted_start(run: Any, arguments: Any) -> None:
        def to_the_end(*given: Any) -> None:
            run(*given)
            left.set()

        start_new_thread(to_the_end, arguments)
        if moment == "start":
            assert begun.wait(LONG)
            raise Interrupted(moment)

    class InterruptedQueue:
        def __init__(self) -> None:
            self._queue: SimpleQueue[None] = SimpleQueue()
            self.put = self._queue.put

        def get(self, timeout: float) -> None:
            for interruption in interruptions:
                raise interruption
            self._queue.get(timeout=timeout)

    def work(number: int, tools: int) -> None:
        if tools == 1:
            begun.set()
            time.sleep(0.1)
        else:
            assert begun.wait(LONG)
        ended.append(number)

    monkeypatch.setattr(threads, "start_new_thread", interrupted_start)
    if moment != "start":
        monkeypatch.setattr(threads, "SimpleQueue", InterruptedQueue)
    with pytest.raises(Interrupted, match=moment):
        share_out(2, work, range(2))
    known = list(ended)
    assert left.wait(LONG)
    assert ended == known
    assert sorted(ended) == ([0] if moment == "start" else [0, 1])


def test_a_thread_that_begins_after_all_is_over_finds_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late: list[Callable[[], None]] = []
    done: list[int] = []

    def interrupted(run: Any, arguments: Any) -> None:
        late.append(partial(run, *arguments))
        raise Interrupted

    monkeypatch.setattr(threads, "start_new_thread", interrupted)
    with pytest.raises(Interrupted):
        share_out(9, lambda number, _: done.append(number), range(2))
    late[0]()
    assert done == []


def test_a_thread_that_never_begins_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one for which the system has no memory once it is started."""
    done: list[int] = []
    monkeypatch.setattr(threads, "start_new_thread", lambda run, arguments: None)
    share_out(9, lambda number, _: done.append(number), range(3))
    assert done == list(range(9))


def test_a_thread_that_cannot_say_that_it_has_ended_is_seen_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(SimpleQueue[None]):
        def put(self, *_: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                sys.exit()  # ends a thread without a word

    together = threading.Barrier(2)
    monkeypatch.setattr(threads, "SimpleQueue", Full)
    share_out(2, lambda number, tools: time.sleep(0.1 * tools + 0 * together.wait(LONG)), range(2))


class Update:
    """Anything large that a piece has at hand when it fails."""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_that_was_caught_keeps_nothing_in_memory(threads: int) -> None:
    together, alive = threading.Barrier(threads), dict[int, weakref.ref[Update]]()

    def work(number: int, tools: int) -> None:
        update = Update()
        alive[number] = weakref.ref(update)
        together.wait(LONG)
        raise Told(number)

    gc.disable()  # so that what refers to itself stays
    try:
        with contextlib.suppress(Told):
            share_out(threads, work, range(threads))
        assert len(alive) == threads
        assert [update() for update in alive.values()] == [None] * threads
    finally:
        gc.enable()
