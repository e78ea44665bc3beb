"""Clients that train several at a time, each in a process that has imported the training file.

They are processes and not threads, of which the interpreter lets one at a time work; and processes
that begin anew and are told the file by its path, which is the same on every platform and asks
nothing of the file. A worker does what the run's own process would do in line (`train_one`), with
the same copy of the model, and answers are taken in the order of the clients. So the run has the
bits that it has in line, if the training file takes all randomness from its context.

What one client does ends no other: one that ends its process has failed, and the next client gets a
new process. Workers do not hear Ctrl-C, which is for the run's own process to act on; a second one
does not keep it from ending them. When that process is gone, they end with what they are at.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from fedavg_core.cli.console import open_missing, outlasting_readers
from fedavg_core.client import Client, Context
from fedavg_core.dispatch import train_one
from fedavg_core.errors import UsageError, one_line
from fedavg_core.model import Params
from fedavg_core.outcome import Failure
from fedavg_core.training_file import read_training_file
from fedavg_core.update import TransferType, Update

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Workers", "work"]

T = TypeVar("T")
_Answer: TypeAlias = "Update | Failure"

_PATIENCE = 10.0


class Workers:
    """Processes that train. A context manager, whose end is theirs.

    Args:
        path: The training file.
        count: How many clients may train at a time.
        quiet: Whether what the file prints goes to standard error.
    """

    def __init__(self, path: Path, count: int, *, quiet: bool) -> None:
        self._path = path
        self._quiet = quiet
        self._threads = ThreadPoolExecutor(count, "fedavg-worker", _block_interrupts)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False
        self._hears = False

    def submit(self, function: Callable[..., T], /, *given: Any) -> Future[T]:
        """Call a function in a thread, with `train` as its first argument and what is given."""
        if self._hears:  # pragma: no branch  (else in another thread)
            signal.signal(signal.SIGINT, self._interrupt)  # again, if something caught one
        return self._threads.submit(function, self.train, *given)

    def train(
        self, _: Client, model: Params, context: Context, transfer: TransferType, retries: int
    ) -> _Answer:
        """Train a client in a process: see `train_one`. The client is that of the training file."""
        try:
            request = pickle.dumps((model, context, transfer, retries), -1)
            with self._lock:
                if self._closed:
                    return _failure(context, "the run has ended")
                worker = self._idle.pop() if self._idle else _Worker(self._path, quiet=self._quiet)
                self._busy.add(worker)
            data = worker.ask(request)
            with self._lock:
                self._busy.discard(worker)
                if data is not None:
                    self._idle.append(worker)
            if data is None:
                return _failure(context, worker.ending())
            answer: _Answer = pickle.loads(data)
            return answer
        except Exception as error:  # such as an update that cannot be made again out of its pickle
            return _failure(context, f"its update could not be taken over: {one_line(error)}")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Interrupt once: a second Ctrl-C would interrupt the end of the workers."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    def __enter__(self) -> Workers:
        self._hears = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._hears:  # pragma: no branch  (else in another thread)
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._hears:  # pragma: no branch  (else in another thread)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with self._lock:
                self._closed = True
                for worker in self._busy:
                    worker.process.kill()
            self._threads.shutdown(cancel_futures=True)
        finally:
            try:
                self._end_idle()
            finally:
                if self._hears:  # pragma: no branch  (else in another thread)
                    signal.signal(signal.SIGINT, signal.default_int_handler)

    def _end_idle(self) -> None:
        """End those that have nothing to do, and forget them while no Ctrl-C is heard.

        One that comes while they are collected would end in a trace, and in nothing else.
        """
        for worker in self._idle:
            worker.connection.close()  # they end at the same time
        while self._idle:
            self._idle.pop().ending()


class _Worker:
    """One process, and the line to it."""

    def __init__(self, path: Path, *, quiet: bool) -> None:
        from multiprocessing import get_context  # no other command needs it

        spawn = get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, path, quiet))
        self.process.start()
        theirs.close()

    def ask(self, task: bytes) -> bytes | None:
        """Give it a task; the answer, or None if it has ended."""
        try:
            self.connection.send_bytes(task)
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def ending(self) -> str:
        """Wait for its end, and not for ever; how it came."""
        self.connection.close()  # and not when it is collected, where a Ctrl-C would be lost
        self.process.join(_PATIENCE)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the process that it trained in ended {how}"


def work(connection: Connection, path: Path, quiet: bool) -> None:
    """What a worker does: train a client whenever it is asked, until nobody can ask any more.

    Args:
        connection: The line to the run's own process.
        path: The training file.
        quiet: Whether what it prints goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open_missing()
    with (
        outlasting_readers(),
        contextlib.redirect_stdout(sys.stderr if quiet else sys.stdout),
    ):
        train, problem = None, ""
        try:
            train = read_training_file(path).train
        except UsageError as error:
            problem = str(error)
        with contextlib.suppress(EOFError, OSError):
            while True:
                model, context, transfer, retries = pickle.loads(connection.recv_bytes())
                answer = (
                    _failure(context, problem)
                    if train is None
                    else train_one(train, model, context, transfer, retries)
                )
                sys.stdout.flush()
                connection.send_bytes(_pickled(answer, context))


def _pickled(answer: _Answer, context: Context) -> bytes:
    try:
        return pickle.dumps(answer, -1)
    except Exception as error:
        problem = f"its update cannot be sent from one process to another: {one_line(error)}"
        return pickle.dumps(_failure(context, problem), -1)


def _failure(context: Context, problem: str) -> Failure:
    return Failure(context.contributor, context.round, problem)


def _block_interrupts() -> None:
    """Have no Ctrl-C in this thread, nor in the processes that it starts, from their first step."""
    if sys.platform != "win32":  # pragma: no branch
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # the first process would, and end the blocking with it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
