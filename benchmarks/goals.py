"""What the engine is held to, in one table."""
# ruff: noqa: RUF001  (titles have the signs that printed tables have)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks.growth import Growth
from benchmarks.suite import Result
from benchmarks.timing import Ratio, Row, Timing, ratio
from benchmarks.workloads import WORKLOADS

__all__ = ["GOALS", "Goal", "Standing", "standings"]

Measure: TypeAlias = Literal["speed", "time", "growth"]


@dataclass(frozen=True)
class Goal:
    """One line of what is promised.

    Attributes:
        work: What is done.
        benchmark: The one that measures it.
        ours: The contestant that is held to it.
        against: What it is compared with: ``"best peer"``, a peer's system, or a row's name.
        measure: ``"speed"``: how many times as fast, at least; ``"time"``: how many times as long,
            at most; ``"growth"``: the cost of the most work over that of the least, at most.
        bound: The figure to be kept.
        reach: The figure to strive for; None if there is none.
    """

    work: str
    benchmark: str
    ours: str
    against: str
    measure: Measure
    bound: float
    reach: float | None = None


_RESNET, _LLM, _LORA = (
    (name, WORKLOADS[name].title.removesuffix(", float32"))
    for name in ("resnet50-float32", "llm-float32", "lora-float32")
)
_AT_HAND = "at-hand", "ResNet-50 × 8"
_FLOAT32 = "float32", "float32, add_many of 8"
_FLOAT64 = "float64", "float64, add_many of 8"
_EXACT = "exact", "exact, add_many of 8"

GOALS: tuple[Goal, ...] = (
    *(
        Goal(f"{ours}, {title}", benchmark, ours, against, "speed", bound, reach)
        for (benchmark, title), contestants, against, bound, reach in (
            (_RESNET, _FLOAT32, "best peer", 1.6, 2.5),
            (_LLM, _FLOAT32, "best peer", 2.0, 4.0),
            (_RESNET, _FLOAT64, "NVFlare", 1.0, 1.5),
            (_LLM, _FLOAT64, "NVFlare", 1.0, 1.5),
            (_RESNET, ("exact",), "best peer", 0.45, 1.0),
            (_LLM, ("exact",), "best peer", 0.9, 1.5),
            (_AT_HAND, ("exact, add_many of 8",), "best peer", 0.6, 1.5),
            (_LORA, _EXACT, "best peer", 0.5, 2.0),
        )
        for ours in contestants
    ),
    Goal("Round with the gate, ResNet-50 × 10", "round", "Round", "exact", "time", 1.15, 1.02),
    Goal("memory, 10 → 1,000 clients", "memory", "exact", "itself", "growth", 1.02),
    Goal("time per client, 10 → 10,000", "clients", "exact", "itself", "growth", 1.10),
)
"""Every promise, in the order of the printed table."""


@dataclass(frozen=True)
class Standing:
    """A goal, and what was measured.

    Attributes:
        goal: The goal.
        against: What it was compared with in this run.
        measured: The figure.
        cpu: The same figure in processor time; None where it was not taken.
        met: Whether the figure is within the bound.
    """

    goal: Goal
    against: str
    measured: Ratio
    cpu: float | None
    met: bool


def standings(results: Sequence[Result]) -> list[Standing]:
    """Hold what was measured against the goals.

    Args:
        results: Of any benchmarks.

    Returns:
        One standing for each goal that the results speak about.
    """
    found = []
    for goal in GOALS:
        for result in results:
            measured = _measured(goal, result) if result.benchmark == goal.benchmark else None
            if measured is not None:
                against, figure, cpu = measured
                kept = figure.value >= goal.bound
                if goal.measure != "speed":
                    kept = figure.value <= goal.bound
                found.append(Standing(goal, against, figure, cpu, kept))
                break
    return found


def _measured(goal: Goal, result: Result) -> tuple[str, Ratio, float | None] | None:
    if isinstance(result, Growth):
        series = result.of(goal.ours)
        return None if series is None else (goal.against, series.growth(), None)
    ours, other = result.row(goal.ours), _opponent(goal, result)
    if ours is None or other is None:
        return None
    above, below = (ours, other) if goal.measure == "time" else (other, ours)
    return other.name, ratio(above.laps, below.laps), ratio(above.cpu, below.cpu).value


def _opponent(goal: Goal, timing: Timing) -> Row | None:
    if goal.against == "best peer":
        return timing.fastest()
    return timing.row(goal.against) or timing.fastest(goal.against)
