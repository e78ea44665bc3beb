"""Times of things done in turn, and how they stand to each other.

One lap of each task, then the next lap of each: a disturbance that lasts longer than a lap falls on
all of them. The order is drawn anew for each lap, and is the same in every run. In one order for
all laps somebody would always come after a task that has just given its memory back, which he is
then given at once, and who comes after one that keeps its memory would wait for the system's.

What is reported of two tasks is the ratio of their median times; the quartiles of the ratios of the
single laps tell how far to trust it, and the ratio of the fastest laps is what is left when every
disturbance, which can only add time, has been escaped once. Beside the time that passed, the
processor time of all threads is taken: it says nothing of what threads gain, and is the better
guide while other programs compete for the machine.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, TypeAlias

from benchmarks.peers import Kind

__all__ = ["Laps", "Pace", "Ratio", "Row", "Taken", "Timing", "middle", "ratio", "take_turns"]

Laps: TypeAlias = "tuple[float, ...]"
"""Seconds, lap by lap; NaN where the task sat out."""

_FAR_BEHIND = 2.0  # times what the fastest rival takes
_TRIAL = 2  # laps after which rivals may be far behind


@dataclass(frozen=True)
class Pace:
    """How long to go on measuring.

    Attributes:
        least: Laps that are run whatever they take.
        most: Laps after which to stop.
        budget: Seconds after which to stop, once the least are run.
    """

    least: int = 7
    most: int = 20
    budget: float = 12.0


@dataclass(frozen=True)
class Ratio:
    """How one thing stands to another.

    Attributes:
        value: The ratio of the medians.
        lower: The lower quartile of the ratios lap by lap.
        upper: The upper one.
        best: The ratio of the least.
    """

    value: float
    lower: float
    upper: float
    best: float


@dataclass(frozen=True)
class Taken:
    """What a task took, lap by lap.

    Attributes:
        laps: Seconds that passed.
        cpu: Seconds of processor time, all threads together.
    """

    laps: Laps
    cpu: Laps


@dataclass(frozen=True)
class Row:
    """One task's laps.

    Attributes:
        name: Of the task.
        kind: Whose it is.
        laps: Seconds a lap.
        cpu: Seconds of processor time a lap, all threads together.
        misrounded: Of the elements of its mean, the share that are not the correctly rounded ones;
            None where there is no mean to look at.
    """

    name: str
    kind: Kind
    laps: Laps
    cpu: Laps
    misrounded: float | None = None


@dataclass(frozen=True)
class Timing:
    """Tasks that did the same work in turn.

    Attributes:
        benchmark: Which one this is of.
        title: What was worked on.
        timed: What a lap is.
        clients: By how many the seconds of a lap are divided where they are told per client.
        elements: How many elements a lap reads.
        nbytes: How many bytes a lap reads.
        rows: The tasks.
        reference: The row that the others are compared with; None for the fastest peer.
        absent: Contestants that were not at hand.
    """

    benchmark: str
    title: str
    timed: str
    clients: int
    elements: int
    nbytes: int
    rows: tuple[Row, ...]
    reference: str | None = None
    absent: tuple[str, ...] = field(default=())

    def row(self, name: str) -> Row | None:
        """The row of that name, if it was at hand."""
        return next((row for row in self.rows if row.name == name), None)

    def fastest(self, prefix: str = "") -> Row | None:
        """The peer of the least median, among those whose names begin so; None without any."""
        peers = [row for row in self.rows if row.kind == "peer" and row.name.startswith(prefix)]
        return min(peers, key=lambda row: middle(row.laps), default=None)

    def compared_with(self) -> Row | None:
        """The row that the others are compared with."""
        return self.fastest() if self.reference is None else self.row(self.reference)


def take_turns(
    tasks: Mapping[str, Callable[[], object]],
    pace: Pace,
    *,
    rivals: Collection[str] = (),
    look: Callable[[str, Any], object] | None = None,
) -> dict[str, Taken]:
    """Run tasks in turn and time each.

    Args:
        tasks: What to run. What a task returns is let go after its clock has stopped.
        pace: How long to go on.
        rivals: Tasks of which only the fastest matters: those that are far behind it after two
            laps, by the faster of the two, sit out the others.
        look: Is given each task's name and what its first lap has returned, while no clock runs.

    Returns:
        The laps of each task, as many for each, in the order of the tasks.
    """
    laps: dict[str, list[float]] = {name: [] for name in tasks}
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    out: set[str] = set()
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for lap in range(pace.most):
            if lap >= pace.least and time.perf_counter() - start > pace.budget:
                break
            if lap == _TRIAL and rivals:
                best = min(min(laps[name]) for name in rivals)
                out = {name for name in rivals if min(laps[name]) > _FAR_BEHIND * best}
            for name in order.sample(list(tasks), len(tasks)):
                passed, used = math.nan, math.nan
                if name not in out:
                    passed, used, found = _timed(tasks[name])
                    if look is not None and lap == 0:
                        look(name, found)
                    del found
                laps[name].append(passed)
                cpu[name].append(used)
    finally:
        if collecting:
            gc.enable()
    return {name: Taken(tuple(laps[name]), tuple(cpu[name])) for name in tasks}


def _timed(task: Callable[[], object]) -> tuple[float, float, object]:
    used, start = time.process_time(), time.perf_counter()
    found = task()
    return time.perf_counter() - start, time.process_time() - used, found


def middle(laps: Sequence[float]) -> float:
    """The median of the laps that were run."""
    return median(seconds for seconds in laps if not math.isnan(seconds))


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How two tasks that took turns stand to each other.

    Args:
        above: The laps of one.
        below: The laps of the other.

    Returns:
        The first over the second, from the laps that both ran.
    """
    pairs = [
        (a, b) for a, b in zip(above, below, strict=True) if not (math.isnan(a) or math.isnan(b))
    ]
    value = median(a for a, _ in pairs) / median(b for _, b in pairs)
    best = min(a for a, _ in pairs) / min(b for _, b in pairs)
    if len(pairs) == 1:
        return Ratio(value, value, value, best)
    lower, _, upper = quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    return Ratio(value, lower, upper, best)
