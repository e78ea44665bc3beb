"""Results as tables: in colour where `rich` is installed, in plain text elsewhere.

A table is told once, as a title, columns and rows of text, and drawn by either.
"""
# ruff: noqa: RUF001  (titles have the signs that printed tables have)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TextIO

from benchmarks.goals import Standing
from benchmarks.growth import Growth
from benchmarks.suite import Result
from benchmarks.timing import Ratio, Timing, middle, ratio

__all__ = ["Table", "show", "table_of_machine", "table_of_result", "table_of_standings"]

_STYLES = {"ours": "bold", "floor": "dim", "met": "green", "not met": "red"}


@dataclass(frozen=True)
class Table:
    """Text in columns; the first is set left, the others right.

    Attributes:
        title: Above it.
        columns: Their heads.
        rows: Their cells, each row with the name of its style, or "".
        notes: Below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()


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
    notes = (*table.notes, f"not at hand: {'; '.join(result.absent)}")
    return Table(table.title, table.columns, table.rows, notes)


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
    return Table(timing.title, tuple(columns), tuple(rows), tuple(notes))


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
    return Table(
        "Machine", ("", ""), tuple(("", (name, value)) for name, value in shown.items() if value)
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [table.title, ""]
    for number, cells in enumerate(lines):
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        drawn.append("  ".join(padded).rstrip())
        if number == 0:
            drawn.append("  ".join("-" * width for width in widths))
    return "\n".join([*drawn, *table.notes, ""])
