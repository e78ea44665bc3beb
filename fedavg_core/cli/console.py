"""What the command shows: results on standard output, everything else on standard error.

Progress is shown on a terminal only, and leaves nothing behind. Names that came out of files are
shown as printable ASCII.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
    "print_json",
    "print_line",
    "print_table",
    "printable",
    "say",
    "typed",
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


def say(problem: str) -> None:
    """Tell of a problem, in one line on standard error."""
    line = f"fedavg: {printable(problem)}\n"
    sys.stderr.write(line.encode("ascii", "backslashreplace").decode("ascii"))


def open_console(*, stderr: bool = False) -> Console:
    """A console that shows text as it is, and does not cut it where it goes to no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


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


def drop_output() -> None:
    """Let standard output lead nowhere, and what is still buffered with it.

    For when whoever read it has seen enough: the interpreter would fail at writing it when it ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
