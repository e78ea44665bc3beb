"""A conformance kit: which promises does an aggregator keep?

`check_aggregator` puts any aggregator through a fixed set of small trials and returns a table: for
each property whether it holds, and if not, the first counterexample. The properties are what a
federated server needs to be trusted: that the model depends neither on who answered first nor on
how partial sums were merged, that no average leaves the range of its inputs, that an update which
cannot be averaged is turned away whole, that what was handed in is neither changed nor kept.

An aggregator is anything with the two methods of `Aggregator`. To refuse an update is to raise an
exception, of any kind, from ``add``. ``mean`` is called at most once on each object, as the last
call, so that aggregators which start afresh after it can be checked too. With a method ``merge``
the aggregator is also tried on partial sums.

The trials are in `fedavg_core.testing.properties`. Each uses new objects, and all are the same in
every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedavg_core.errors import UsageError, quoted
from fedavg_core.testing.properties import (
    PROPERTIES,
    Counterexample,
    NotApplicable,
    shown_error,
)

__all__ = [
    "Aggregator",
    "ConformanceTable",
    "PropertyResult",
    "check_aggregator",
    "compare_tables",
]


class Aggregator(Protocol):
    """What an aggregator must be able to do, to be checked.

    A method ``merge(other)`` is optional: it adds to this object all that another of its kind
    holds.
    """

    def add(self, params: Any, weight: Any) -> object:
        """Take in one model with its weight, or raise an exception and take in nothing."""

    def mean(self) -> Mapping[str, Any]:
        """The weighted mean of what was taken in; called once, at the end."""


@dataclass(frozen=True)
class PropertyResult:
    """What was found about one property.

    Attributes:
        property: Its name.
        holds: Whether no counterexample was found; None if the property does not apply.
        detail: The first counterexample, or why the property does not apply; else empty.
    """

    property: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class ConformanceTable:
    """Which properties an aggregator has. Printed, it is a table in plain text.

    Attributes:
        name: What the aggregator is called.
        rows: One result for each property, always in the same order.
    """

    name: str
    rows: tuple[PropertyResult, ...]

    @property
    def conforms(self) -> bool:
        """Whether every property that applies holds."""
        return all(row.holds is not False for row in self.rows)

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the properties that do not hold."""
        return tuple(row.property for row in self.rows if row.holds is False)

    def __getitem__(self, name: str) -> PropertyResult:
        for row in self.rows:
            if row.property == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        return compare_tables([self])


def compare_tables(tables: Sequence[ConformanceTable]) -> str:
    """Several tables as one, with a column for each aggregator.

    Args:
        tables: The tables, with the same rows.

    Returns:
        Plain ASCII text: the table, and below it the counterexamples of each aggregator.
    """
    names = [table.name for table in tables]
    first = max(len(name) for name in PROPERTIES)
    widths = [max(len(name), 3) for name in names]

    def line(left: str, cells: Sequence[str]) -> str:
        filled = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([left.ljust(first), *filled]).rstrip()

    words = {True: "yes", False: "no", None: "n/a"}
    lines = [line("property", names), line("-" * first, ["-" * width for width in widths])]
    lines += [line(name, [words[table[name].holds] for table in tables]) for name in PROPERTIES]
    for table in tables:
        details = [f"  {row.property}: {row.detail}" for row in table.rows if row.detail]
        if details:
            lines += ["", f"{table.name}:", *details]
    return "\n".join(lines)


def check_aggregator(make: Callable[[], Aggregator], name: str = "aggregator") -> ConformanceTable:
    """Find out which properties an aggregator has.

    Args:
        make: Gives a new, empty aggregator; called many times.
        name: What to call it in the table.

    Returns:
        The table. Deterministic, as far as the aggregator is.

    Raises:
        UsageError: ``make`` does not give an object with the methods ``add`` and ``mean``.
    """
    sample = make()
    if not callable(getattr(sample, "add", None)) or not callable(getattr(sample, "mean", None)):
        raise UsageError(
            f"make() must give an object with the methods add and mean, got {quoted(sample)}"
        )
    rows = []
    with np.errstate(all="ignore"):
        for title, trial in PROPERTIES.items():
            holds: bool | None = True
            detail = ""
            try:
                trial(make)
            except Counterexample as found:
                holds, detail = False, str(found)
            except NotApplicable as reason:
                holds, detail = None, str(reason)
            except Exception as error:  # whatever a foreign aggregator may raise
                holds, detail = False, f"raised {shown_error(error)}"
            rows.append(PropertyResult(title, holds, detail))
    return ConformanceTable(name, tuple(rows))
