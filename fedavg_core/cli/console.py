"""What the command shows: results on standard output, everything else on standard error.

Progress is shown on a terminal only, and leaves nothing behind. Names that came out of files are
shown as printable ASCII.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from fedavg_core.errors import quoted

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Progress",
    "byte_progress",
    "drop_output",
    "name_shown",
    "open_console",
    "open_missing",
    "outlasting_readers",
    "print_json",
    "print_line",
    "print_table",
    "printable",
    "say",
    "typed",
    "uninterrupted",
]

Progress: TypeAlias = Callable[[int, int], None]
"""Is told how many bytes have been worked through, of how many."""

_UNBOUNDED = 10_000
_NAME_LENGTH = 120


def printable(text: str) -> str:
    """Text as one line, with whatever cannot be printed escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def name_shown(name: str) -> str:
    """A name out of a file: printable ASCII of bounded length."""
    return quoted(name, _NAME_LENGTH)[1:-1] if name else "''"


def typed(path: Path) -> str:
    """A path as it is to be typed in a shell, where it is not taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def say(problem: str, speaker: str = "fedavg") -> None:
    """Tell of a problem, in one line on standard error that begins with the command's name."""
    line = f"{speaker}: {printable(problem)}\n"
    try:
        sys.stderr.write(line.encode("ascii", "backslashreplace").decode("ascii"))
    except BrokenPipeError:  # pragma: no cover  (in a process of its own)
        drop_output(sys.stderr)


def open_console(*, stderr: bool = False) -> Console:
    """A console that shows text as it is, and does not cut it where it goes to no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def open_missing() -> None:
    """Let the standard streams that this process was begun without lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # pragma: no cover  (in a process of its own)
            # The first one's descriptor is the lowest that is free.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print a table.

    Args:
        columns: Their titles.
        rows: The cells.
        words: How many of the first columns hold words; the others hold numbers.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if index < words else "right",
            overflow="fold",
            no_wrap=index > 0,
        )
    for row in rows:
        table.add_row(*row)
    console = open_console()
    with console.capture() as captured:
        console.print(table, soft_wrap=False)
    sys.stdout.write(captured.get())


def print_line(text: str) -> None:
    """Print one line."""
    print(printable(text), flush=True)


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print JSON, one line; to standard output if no other file is given."""
    print(json.dumps(value, allow_nan=False), file=file, flush=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interruption wait for the end of the block, in which something is shown and noted.

    An interrupted console may have written a line that it still holds, and writes it again with the
    next. A second interruption does not wait, as whoever reads the output may read no more.
    """
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []
    ended = False

    def wait(number: int, frame: FrameType | None) -> None:
        if ended or waiting:
            handlers[number](number, frame)
        else:
            waiting.append(number)

    try:
        if threading.current_thread() is threading.main_thread():  # no other is interrupted
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, wait)
        yield
    finally:
        ended = True
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def drop_output(stream: TextIO | None = None) -> None:
    """Let standard output lead nowhere, and what is still buffered with it.

    For when whoever read it has seen enough: the interpreter would fail at writing it when it ends.

    Args:
        stream: Another stream that is to lead nowhere.
    """
    _drop((stream or sys.stdout).fileno())


def _drop(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Outlasting(io.FileIO):
    """A file of which nobody need read all: what comes after its reader's end is dropped."""

    def write(self, data: Any, /) -> int:  # pragma: no cover  (in a process of its own)
        """Write; whole, where nobody reads it."""
        try:
            return super().write(data)
        except BrokenPipeError:
            _drop(self.fileno())
            return memoryview(data).nbytes


@contextlib.contextmanager
def outlasting_readers() -> Iterator[None]:
    """Go on without output when nobody reads it any more, whoever writes it."""
    with (
        _outlasting(sys.stdout) as out,
        _outlasting(sys.stderr) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield


@contextlib.contextmanager
def _outlasting(stream: TextIO) -> Iterator[TextIO]:
    """The same stream, if it is a file, that fails at no reader's end."""
    descriptor = _descriptor(stream)
    if not isinstance(stream, io.TextIOWrapper) or descriptor is None or stream.isatty():
        yield stream
        return
    try:
        stream.flush()
    except BrokenPipeError:  # pragma: no cover  (in a process of its own)
        drop_output(stream)
    file = _Outlasting(descriptor, "w", closefd=False)
    text = io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    try:
        yield text
    finally:
        text.flush()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:
        return None


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Progress]:
    """Show a bar while bytes are worked through.

    Args:
        label: What is done.

    Yields:
        What is to be told how far it is.
    """
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=open_console(stderr=True),
        transient=True,
    )
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
