"""How cost grows with the work: memory and time against the number of clients, time against size.

Memory is what NumPy and Python have allocated at the worst moment beyond what they had when the
first update was about to arrive, as `tracemalloc` counts it; unlike the resident set, that is the
same in every run. Each update arrives as new arrays, and is let go by everybody but those who keep
it.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers import Kind, Server
from benchmarks.timing import Laps, Pace, Ratio, middle, ratio, take_turns
from benchmarks.workloads import WeightedUpdate

__all__ = ["Growth", "Point", "Series", "peak_memory", "times_by_work"]


@dataclass(frozen=True)
class Point:
    """What so much work cost: ``laps`` measurements of it."""

    x: int
    laps: Laps

    @property
    def y(self) -> float:
        """The median."""
        return middle(self.laps)


@dataclass(frozen=True)
class Series:
    """One contestant's costs."""

    name: str
    kind: Kind
    points: tuple[Point, ...]

    def growth(self) -> Ratio:
        """How the cost of the most work stands to that of the least."""
        return ratio(self.points[-1].laps, self.points[0].laps)


@dataclass(frozen=True)
class Growth:
    """Costs as work grows.

    Attributes:
        benchmark: Which one this is of.
        title: What was worked on.
        measured: What a cost is.
        x: What grows.
        y: The cost and its unit.
        series: The contestants.
        absent: Contestants that were not at hand.
    """

    benchmark: str
    title: str
    measured: str
    x: str
    y: str
    series: tuple[Series, ...]
    absent: tuple[str, ...] = ()

    def of(self, name: str) -> Series | None:
        """The series of that name, if it was at hand."""
        return next((series for series in self.series if series.name == name), None)


def peak_memory(make: Callable[[], Server], updates: Sequence[WeightedUpdate], clients: int) -> int:
    """The memory of one round.

    Args:
        make: Gives a server.
        updates: Are sent, copied, one after another and again from the first.
        clients: How many are sent.

    Returns:
        Bytes at the worst moment, from the arrival of the first update to the mean.
    """
    server = make()
    tracemalloc.start()
    try:
        for number in range(clients):
            params, weight = updates[number % len(updates)]
            arrived = {key: array.copy() for key, array in params.items()}
            server.add(server.message(arrived, weight))
            del arrived
        mean = server.mean()
        _, peak = tracemalloc.get_traced_memory()
        del mean
    finally:
        tracemalloc.stop()
    return peak


def times_by_work(
    tasks: Mapping[tuple[str, int], Callable[[], object]],
    units: Mapping[tuple[str, int], int],
    kinds: Mapping[str, Kind],
    pace: Pace,
    scale: float,
) -> tuple[Series, ...]:
    """The time of a unit of work, by how much of it is done.

    Args:
        tasks: By a contestant's name and the amount of work.
        units: By how many to divide the time of each.
        kinds: Whose each contestant is.
        pace: How long to go on.
        scale: By how much to multiply seconds.

    Returns:
        The contestants' series, in scaled seconds a unit; all tasks took turns.
    """
    taken = take_turns({f"{name} {x}": task for (name, x), task in tasks.items()}, pace)
    points: dict[str, list[Point]] = {}
    for name, x in tasks:
        unit = scale / units[name, x]
        costs = tuple(seconds * unit for seconds in taken[f"{name} {x}"].laps)
        points.setdefault(name, []).append(Point(x, costs))
    return tuple(Series(name, kinds[name], tuple(found)) for name, found in points.items())
