"""A table of rounds, line by line as they end; what the rounds have measured makes its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from fedavg_core.cli.console import name_shown, printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["RoundTable", "is_share"]

_MOST_MEASURED = 4
_WIDTH = 8
_INDENT = " " * 7

Measured = Mapping[str, "float | None"]


class RoundTable:
    """Prints a line for each round, and the titles whenever there is something new to tell.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._measured: dict[tuple[str, str], None] = {}
        self._titles: list[str] = []

    def round(
        self,
        number: int,
        accepted: int,
        clients: int,
        weight: float,
        metrics: Measured,
        evaluation: Measured,
        seconds: float | None = None,
    ) -> None:
        """Print a round.

        Args:
            number: Its number.
            accepted: How many updates were accepted.
            clients: How many there might have been.
            weight: The sum of their weights.
            metrics: The contributors' mean metrics.
            evaluation: What the new model was found to be worth.
            seconds: How long it took, if that is to be told.
        """
        values = {("train", name): value for name, value in metrics.items()}
        values.update({("test", name): value for name, value in evaluation.items()})
        self._measured.update(dict.fromkeys(values))
        cells = {
            "round": str(number),
            "accepted": f"{accepted} of {clients}",
            "weight": f"{weight:,.6g}",
        }
        for place in islice(self._measured, _MOST_MEASURED):
            cells[name_shown(" ".join(place))] = _told(place[1], values.get(place))
        if seconds is not None:
            cells["seconds"] = f"{seconds:.2f}"
        titles, self._titles = self._titles, list(cells)
        if titles != self._titles:
            self._console.print(_line(zip(cells, cells, strict=True)), style="bold")
        self._console.print(_line(iter(cells.items())))

    def note(self, text: str) -> None:
        """Print what there is to say of the round beside its line."""
        self._console.print(f"{_INDENT}{printable(text)}", style="yellow")


def _line(cells: Iterator[tuple[str, str]]) -> str:
    return "  ".join(cell.rjust(max(_WIDTH, len(title))) for title, cell in cells)


def _told(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if is_share(name, [value]) else f"{value:.4f}"


def is_share(name: str, values: Iterable[float]) -> bool:
    """Whether a metric is told in percent.

    Args:
        name: Its name.
        values: What it was.

    Returns:
        Whether it is an accuracy, of zero to one.
    """
    return "acc" in name.lower() and all(0 <= value <= 1 for value in values)
