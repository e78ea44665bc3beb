"""Work for several threads, which an error or an interruption ends without leaving one behind.

Threads are worth their start where the work is NumPy's on large arrays: it gives up the
interpreter's lock. On a Python that has none they are held apart by nothing but what is said here.
They are made for one call of `share_out` each and end with it, so nothing waits between calls, and
a process that is forked then has none. They are started without those of `threading`, which wait
for each to begin: one that finds no memory to begin with would be waited for in vain.
"""

from __future__ import annotations

import contextlib
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np

__all__ = ["share_out"]

Tools = TypeVar("Tools")

_PATIENCE = 0.05  # seconds, should a thread be unable to say that it has ended


def share_out(count: int, work: Callable[[int, Tools], None], tools: Sequence[Tools]) -> None:
    """Do numbered pieces of work on several threads, the calling one among them.

    When this returns or raises, no thread is at work any more. NumPy's warnings are off in all.

    Args:
        count: How many pieces there are.
        work: Does one, given its number and the tools of the thread that it is on.
        tools: For each thread what it alone may use; at least for one if there is any work. Should
            the system give fewer threads, those that there are do all.

    Raises:
        BaseException: What a piece has raised. Of several the first, whatever the threads: numbers
            are handed out in order, and each that was handed out is tried. But an interruption
            comes before an error.
    """
    numbers = deque(range(count))  # which any thread may take from; an iterator is for one
    failed: list[tuple[int, BaseException]] = []
    busy: list[None] = []
    ended: SimpleQueue[None] = SimpleQueue()

    def run(own: Tools, busy: list[None]) -> None:
        busy.append(None)  # before it looks whether something failed: see below
        number: int | None = None
        try:
            with np.errstate(all="ignore"):  # each thread has its own
                while not failed:
                    try:
                        number = numbers.popleft()
                    except IndexError:
                        return
                    work(number, own)
        except BaseException as error:
            failed.append((count if number is None else number, error))
        finally:
            busy.pop()
            ended.put(None)

    try:
        # What the system has no more of is done by those that there are.
        with contextlib.suppress(RuntimeError, MemoryError):
            for own in tools[1:]:
                start_new_thread(run, (own, busy))
        if count:
            run(tools[0], [])
    except BaseException as error:
        failed.append((count, error))
    # A thread may have been started, and not have begun; it will find nothing to do, or see that
    # something failed before it does anything. One that lacks the memory to begin never does.
    waiting = True
    while waiting:
        try:
            while busy:
                with contextlib.suppress(Empty):
                    ended.get(timeout=_PATIENCE)
            waiting = False
        except BaseException as error:
            failed.append((count, error))
    try:
        if failed:
            # An interruption comes first: a refusal is an answer, and would hide it.
            raise min(failed, key=lambda one: (isinstance(one[1], Exception), one[0]))[1]
    finally:
        numbers.clear()  # a thread that begins this late finds nothing to do
        failed.clear()  # an error that refers to itself would keep the update in memory
