"""What ``fedavg run`` shows of a run while it goes on: a table with a bar, or JSON."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from fedavg_core.cli.console import open_console, print_json
from fedavg_core.cli.round_table import RoundTable
from fedavg_core.cli.run_log import Contribution, RoundRecord
from fedavg_core.errors import quoted

__all__ = ["Lines", "Table"]

_MOST_NOTES = 10


class Lines(contextlib.ExitStack):
    """A JSON object for each round; what a training file prints goes to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._out = sys.stdout
        self.enter_context(contextlib.redirect_stdout(sys.stderr))

    def progress(self, round: int, done: int, selected: int) -> None:
        """Nothing is shown while clients train."""

    def round(self, record: RoundRecord) -> None:
        """Print a round."""
        print_json(record.to_json(), self._out)


class Table(contextlib.ExitStack):
    """A line for each round; on a terminal also a bar while its clients train."""

    def __init__(self, rounds: int) -> None:
        from rich import progress

        super().__init__()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=open_console(),
            transient=True,
        )
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=None)
        self._last = rounds - 1
        self._table = RoundTable(self._bar.console)
        self.enter_context(self._bar)

    def progress(self, round: int, done: int, selected: int) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            description=f"round {round} (0 to {self._last})",
            completed=done,
            total=selected,
        )

    def round(self, record: RoundRecord) -> None:
        """Print a round."""
        self._table.round(
            record.round,
            record.count("accepted"),
            len(record.contributions),
            record.total_weight or 0,
            record.metrics,
            record.evaluation,
            sum(record.seconds.values()),
        )
        for note in _notes(record):
            self._table.note(note)


def _notes(record: RoundRecord) -> Iterator[str]:
    """What there is to say of a round beside its line of the table."""
    told = [
        f"{one.contributor} {one.status}: {_why(one, record.round)}"
        for one in record.contributions
        if one.status != "accepted"
    ]
    yield from told[:_MOST_NOTES]
    if len(told) > _MOST_NOTES:
        yield f"and {len(told) - _MOST_NOTES} more"
    if record.skipped_metrics:
        yield f"metrics left out, no finite numbers: {', '.join(record.skipped_metrics)}"
    if record.problem is not None:
        yield record.problem
    if record.evaluation_problem is not None:
        yield record.evaluation_problem


def _why(one: Contribution, round: int) -> str:
    """Why a client's update was not averaged, without what its line of the table says already."""
    head = f"{one.reason} (contributor {quoted(one.contributor)}, round {round}"
    key, told, words = one.detail.removeprefix(head).partition("): ")
    if one.status == "failed" or not told or not one.detail.startswith(head):
        return one.detail
    return f"{words} ({one.reason}{key})"
