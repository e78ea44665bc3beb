"""Results as tables: in colour where `rich` is installed, in plain text elsewhere.

A table is told once, as a title, columns and rows of text, and drawn by either.
"""
# ruff: noqa: RUF001  (titles have the signs that printed tables have)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TextIO

from benchmarks.goals import Standing
from benchmarks.growth import Growth
from benchmarks.suite import Result
from benchmarks.timing import Ratio, Timing, middle, ratio

__all__ = ["Table", "show", "table_of_machine", "table_of_result", "table_of_standings"]

_GAP = 3  # characters between two columns, at most
_STYLES = {"ours": "bold", "floor": "dim", "met": "green", "not met": "red"}


@dataclass(frozen=True)
class Table:
    """Text in columns; the first is set left, the others right.

    Attributes:
        title: Above it.
        columns: Their heads.
        rows: Their cells, each row with the name of its style, or "".
        notes: Below it.
        spare: Heads of columns that a narrow terminal does without, the first to go first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def within(self, width: int) -> Table:
        """The same without as many of the spare columns as it takes to fit.

        Args:
            width: Of the terminal, in characters.

        Returns:
            The table; its last note names what was left out.
        """
        table, out = self, 0
        while sum(table.widths()) + _GAP * (len(table.columns) - 1) > width and out < len(
            self.spare
        ):
            out += 1
            places = [
                place for place, head in enumerate(self.columns) if head not in self.spare[:out]
            ]
            table = Table(
                self.title,
                tuple(self.columns[place] for place in places),
                tuple((style, tuple(cells[at] for at in places)) for style, cells in self.rows),
                (*self.notes, f"not shown, for want of width: {', '.join(self.spare[:out])}"),
            )
        return table

    def widths(self) -> list[int]:
        """Of each column, in characters."""
        lines = [self.columns, *(cells for _, cells in self.rows)]
        return [max(map(len, column)) for column in zip(*lines, strict=True)]


def table_of_result(result: Result) -> Table:
    """One benchmark's result as a table.

    Args:
        result: Of any benchmark.

    Returns:
        The table, with what was measured as its first note.
    """
    table = _of_timing(result) if isinstance(result, Timing) else _of_growth(result)
    if not result.absent:
        return table
    return replace(table, notes=(*table.notes, f"not at hand: {'; '.join(result.absent)}"))


def _of_timing(timing: Timing) -> Table:
    reference = timing.compared_with()
    looked_at = any(row.misrounded is not None for row in timing.rows)
    columns = ["", "ms a client" if timing.clients > 1 else "ms", "ns an element", "GB/s"]
    columns += ["speed", "quartiles", "fastest laps", "CPU time"]
    rows = []
    for row in timing.rows:
        seconds = middle(row.laps)
        figures = None if reference is None else ratio(reference.laps, row.laps)
        cells = [
            row.name,
            f"{seconds / timing.clients * 1e3:.3g}",
            f"{seconds / timing.elements * 1e9:.2f}",
            f"{timing.nbytes / seconds / 1e9:.2f}",
            "" if figures is None else f"{figures.value:.2f}",
            "" if figures is None or row is reference else _quartiles(figures),
            "" if figures is None or row is reference else f"{figures.best:.2f}",
            "" if reference in (None, row) else f"{ratio(reference.cpu, row.cpu).value:.2f}",
        ]
        if looked_at:
            cells.append("" if row.misrounded is None else _share(row.misrounded))
        rows.append((row.kind, tuple(cells)))
    if looked_at:
        columns.append("misrounded")
    run = {row.name: sum(not math.isnan(seconds) for seconds in row.laps) for row in timing.rows}
    laps = max(run.values())
    notes = [f"timed: {timing.timed}; {laps} laps"]
    if few := [f"{name} ({run[name]})" for name in run if run[name] < laps]:
        notes.append(
            f"far behind, and timed in the first laps only: {', '.join(few)}; these laps of both "
            "are compared"
        )
    if reference is not None:
        notes.append(
            f"speed: how many times as fast as {reference.name}, by the medians; quartiles: of the "
            "ratios lap by lap; then the same ratio by the fastest laps, and by processor time"
        )
    spare = ("CPU time", "fastest laps", "GB/s", "ms a client", "misrounded", "quartiles")
    return Table(timing.title, tuple(columns), tuple(rows), tuple(notes), spare)


def _of_growth(growth: Growth) -> Table:
    amounts = sorted({point.x for series in growth.series for point in series.points})
    rows = []
    for series in growth.series:
        costs = {point.x: f"{point.y:.3g}" for point in series.points}
        figures = series.growth()
        cells = [series.name, *(costs.get(x, "") for x in amounts)]
        rows.append((series.kind, (*cells, f"{figures.value:.3f}", _quartiles(figures))))
    return Table(
        f"{growth.title} ({growth.y})",
        (growth.x, *(f"{x:,}" for x in amounts), "last / first", "quartiles"),
        tuple(rows),
        (f"measured: {growth.measured}",),
    )


def _share(share: float) -> str:
    return "none" if share == 0 else "< 0.1%" if share < 0.001 else f"{share:.1%}"


def _quartiles(figures: Ratio) -> str:
    return f"{figures.lower:.2f}–{figures.upper:.2f}"


def table_of_standings(found: Sequence[Standing]) -> Table:
    """What the engine is held to, and where it stands.

    Args:
        found: The standings.

    Returns:
        The table.
    """
    rows = []
    for standing in found:
        goal = standing.goal
        sign = "≥" if goal.measure == "speed" else "≤"
        verdict = "met" if standing.met else "not met"
        cells = (
            goal.work,
            standing.against,
            f"{standing.measured.value:#.4g}×",
            _quartiles(standing.measured),
            f"{standing.measured.best:.3g}×",
            "" if standing.cpu is None else f"{standing.cpu:.3g}×",
            f"{sign} {goal.bound:g}×",
            "" if goal.reach is None else f"{goal.reach:g}×",
            verdict,
        )
        rows.append((verdict, cells))
    return Table(
        "What it is held to",
        ("", "against", "measured", "quartiles", "fastest laps", "CPU time", "bound", "reach", ""),
        tuple(rows),
        (
            "speeds (≥): how many times as fast; the others (≤): how many times as much of time or "
            "memory",
            "bound: what the measured figure is held to; reach: what is striven for",
        ),
        ("CPU time", "fastest laps", "reach", "quartiles"),
    )


def table_of_machine(machine: dict[str, Any]) -> Table:
    """Where it was measured.

    Args:
        machine: As `describe_machine` gives it.

    Returns:
        The table.
    """
    shown = {
        "processor": f"{machine['processor']}, {machine['processors']} usable",
        "caches": ", ".join(machine["caches"]),
        "memory": f"{machine['memory_gib']} GiB",
        "load": f"{machine['load']} processes when this began" if machine["load"] else "",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": ", ".join(f"{name} {found}" for name, found in machine["versions"].items()),
        "SIMD": " ".join(machine["simd"]),
        "environment": ", ".join(
            f"{name}={value}" for name, value in machine["environment"].items()
        ),
    }
    is_busy = machine["load"] and machine["load"] > machine["processors"] / 2
    return Table(
        "Machine",
        ("", ""),
        tuple(("", (name, value)) for name, value in shown.items() if value),
        ("others are at work here: do not rely on what follows",) if is_busy else (),
    )


def show(table: Table, out: TextIO) -> None:
    """Print a table.

    Args:
        table: What to print.
        out: Where to.
    """
    if find_spec("rich") is None:
        print(_plain(table), file=out)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=out, width=None if out.isatty() else 150, highlight=False)
    table = table.within(console.width)
    drawn = RichTable(
        title=Text(table.title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for number, column in enumerate(table.columns):
        left = number == 0 or len(table.columns) == 2
        drawn.add_column(Text(column), justify="left" if left else "right")
    for style, cells in table.rows:
        drawn.add_row(*map(Text, cells), style=_STYLES.get(style, ""))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note, "dim"))
    console.print()


def _plain(table: Table) -> str:
    lines = [table.columns, *(cells for _, cells in table.rows)]
    widths = table.widths()
    drawn = [table.title, ""]
    for number, cells in enumerate(lines):
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        drawn.append("  ".join(padded).rstrip())
        if number == 0:
            drawn.append("  ".join("-" * width for width in widths))
    return "\n".join([*drawn, *table.notes, ""])
