"""Running clients: in line or on an executor, and what becomes of those that fail.

Whatever a client does, one answer comes of it: an `Update` for the round to judge, or a `Failure`
that says in one line why there is none. Answers come in the order of the tasks, whichever client is
ready first, so that nothing downstream can depend on timing; unless the first to come are asked
for. So many tasks as are in flight are held in memory, however many there are in all.

A failure names the line of the client's own file that it came from. The whole traceback goes to the
log of this module, at level INFO.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import TypeAlias

from fedavg_core.arguments import real_number, truth, whole_number
from fedavg_core.client import Client, Context, TrainResult
from fedavg_core.errors import UsageError, a_type, one_line, quoted
from fedavg_core.model import Params, copy_params
from fedavg_core.outcome import Failure
from fedavg_core.transfer import change
from fedavg_core.update import TransferType, Update

__all__ = ["Dispatch"]

_PROBLEM_LENGTH = 200
_HERE = Path(__file__).parent

_log = logging.getLogger(__name__)

_Answer: TypeAlias = "Update | Failure"


class Dispatch:
    """Runs the clients of a round.

    Args:
        executor: Where they run; None for one after the other in the caller's thread.
        in_flight: How many the executor is given at a time.
        retries: How often a client that fails is tried again.
        deadline: Seconds to wait for all of a round; None for ever.
        first_come: Whether answers come in the order in which they are ready.

    Raises:
        UsageError: An argument has no meaning.
    """

    def __init__(
        self,
        executor: Executor | None = None,
        in_flight: int = 64,
        retries: int = 0,
        deadline: float | None = None,
        first_come: bool = False,
    ) -> None:
        self._in_flight = whole_number("in_flight", in_flight, 1)
        self._retries = whole_number("retries", retries, 0)
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise UsageError(
                "executor: expected one of concurrent.futures, such as ThreadPoolExecutor(4), or "
                f"None, got {quoted(executor)}"
            )
        if deadline is not None:
            if executor is None:
                raise UsageError("deadline: expected an executor as well; in line nothing is late")
            deadline = real_number("deadline", deadline, "seconds above 0", lambda time: time > 0)
        first_come = truth("first_come", first_come)
        if first_come and executor is None:
            raise UsageError("first_come: expected an executor as well; in line all come in order")
        self._executor = executor
        self._first_come = first_come
        self._deadline = deadline

    def answers(
        self,
        tasks: Iterable[tuple[Client, Context]],
        model: Params,
        transfer: TransferType,
    ) -> Generator[_Answer, None, None]:
        """Run clients and give their answers.

        When no more answers are asked for (the generator is closed), what has not begun is
        cancelled. What has begun goes on in the executor, and is lost.

        Args:
            tasks: The clients, and what each is told.
            model: The model; each client gets its own copy.
            transfer: What an update is to hold.

        Yields:
            For each task an update, whose arrays are the client's, or a failure; in the order of
            the tasks, or in that in which they are ready.
        """
        if self._executor is None:
            for client, context in tasks:
                yield train_one(client, model, context, transfer, self._retries)
            return
        end = math.inf if self._deadline is None else time.monotonic() + self._deadline
        pending: dict[Future[_Answer], Context] = {}
        try:
            for client, context in tasks:
                if len(pending) >= self._in_flight:
                    future = self._next(pending, end)
                    yield self._collect(pending.pop(future), future, end)
                future = self._submit(self._executor, client, model, context, transfer)
                pending[future] = context
            while pending:
                future = self._next(pending, end)
                yield self._collect(pending.pop(future), future, end)
        finally:
            for future in pending:
                future.cancel()

    def _next(self, pending: Mapping[Future[_Answer], Context], end: float) -> Future[_Answer]:
        """Which answer comes next: the first in order, or the first of those that are ready."""
        if self._first_come:
            wait(pending, _left(end), FIRST_COMPLETED)
            return next((future for future in pending if future.done()), next(iter(pending)))
        return next(iter(pending))

    def _submit(
        self,
        executor: Executor,
        client: Client,
        model: Params,
        context: Context,
        transfer: TransferType,
    ) -> Future[_Answer]:
        try:
            return executor.submit(train_one, client, model, context, transfer, self._retries)
        except Exception as error:  # a pool that a client broke takes no more work
            refused: Future[_Answer] = Future()
            refused.set_exception(error)
            return refused

    def _collect(self, context: Context, future: Future[_Answer], end: float) -> _Answer:
        if not wait([future], _left(end)).done:
            future.cancel()
            problem = f"late: not done within the {self._deadline} s that the round waits"
            return Failure(context.contributor, context.round, problem)
        try:
            return future.result()
        except Exception as error:  # not the client's, which are caught where it runs
            problem = one_line(error, _PROBLEM_LENGTH)
            return Failure(context.contributor, context.round, problem)


def _left(end: float) -> float | None:
    """Seconds to wait; no more than can be waited."""
    if end == math.inf:
        return None
    return max(0.0, min(threading.TIMEOUT_MAX, end - time.monotonic()))


def train_one(
    client: Client, model: Params, context: Context, transfer: TransferType, retries: int
) -> _Answer:
    """Run one client, as often as it takes or is allowed.

    Args:
        client: The client.
        model: The model; the client gets a copy.
        context: What it is told.
        transfer: What the update is to hold.
        retries: How often to try again when it fails.

    Returns:
        Its update; or what it raised last, as a `Failure`, which any executor can carry.
    """
    problem = ""
    for _ in range(retries + 1):
        try:
            result = client(copy_params(model), context)
            if not isinstance(result, TrainResult):
                raise TypeError(f"expected a TrainResult, got {a_type(result)}")
            is_diff = transfer is TransferType.DIFF
            return Update(
                contributor=context.contributor,
                round=context.round,
                params=change(result.params, model) if is_diff else result.params,
                weight=result.weight,
                transfer=transfer,
                metrics=result.metrics,
            )
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # asyncio's CancelledError, say, or a SystemExit
            _log.info("what %s raised:", context.contributor, exc_info=True)
            place = _place(error)
            problem = one_line(error, _PROBLEM_LENGTH - len(place)) + place
    return Failure(context.contributor, context.round, problem)


def _place(error: BaseException) -> str:
    """The line that an error came from: the innermost one in the file that the client is in."""
    trace = BaseException.__dict__["__traceback__"].__get__(error)  # not as a subclass has it
    frames = list(traceback.walk_tb(trace))[1:]  # the first is that of `train_one`
    if not frames:
        return ""
    own = frames[0][0].f_code.co_filename
    if Path(own).parent == _HERE:
        return ""
    line = [line for frame, line in frames if frame.f_code.co_filename == own][-1]
    return f" ({quoted(Path(own).name)[1:-1]}, line {line})"
