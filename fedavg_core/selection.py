"""Which clients are asked in a round, and how many of them are enough.

`participation` says how many updates a round wants. With over-selection more clients are asked than
that, so that some may fail (K. Bonawitz and others, "Towards Federated Learning at Scale: System
Design", 2019); the round takes no more than it wants.

The draw is that of `draw_contributors`. Over-selection does not change who is drawn: the same
clients are asked as without it and, behind them, spare ones. As long as none of the first fails,
the answers that count are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from fedavg_core.arguments import real_number
from fedavg_core.client import draw_contributors
from fedavg_core.errors import UsageError, quoted
from fedavg_core.plain import plain_number

__all__ = ["Selection"]


class Selection:
    """The clients of each round.

    Args:
        names: All clients, in `contributor_order`.
        participation: How many updates a round wants: a number, a fraction of all (rounded to the
            nearest, at least one), or None for all.
        over_selection: How many times as many clients are asked, rounded up. It is taken for the
            decimal number that it is written as.
        seed: Of the draw.

    Attributes:
        wanted: How many updates a round wants.
        asked: How many clients are asked.

    Raises:
        UsageError: An argument has no meaning.
    """

    def __init__(
        self,
        names: Sequence[str],
        participation: int | float | None,
        over_selection: float,
        seed: int,
    ) -> None:
        times = real_number(
            "over_selection", over_selection, "a number from 1.0 on", lambda times: times >= 1
        )
        self._names = names
        self._seed = seed
        self.wanted = _count(participation, len(names))
        self.asked = min(len(names), math.ceil(Fraction(repr(times)) * self.wanted))

    def of_round(self, number: int) -> list[str]:
        """The clients that are asked in a round.

        Args:
            number: The round's number.

        Returns:
            Their names: first as many as are wanted, then the spare ones; each part in
            `contributor_order`. The same on every platform and Python.
        """
        first = self._draw(self.wanted, number)
        if self.asked == self.wanted:
            return first
        drawn = set(first)
        return first + [name for name in self._draw(self.asked, number) if name not in drawn]

    def _draw(self, count: int, number: int) -> list[str]:
        if count == len(self._names):
            return list(self._names)
        return draw_contributors(self._names, count, self._seed, number)


def _count(participation: int | float | None, clients: int) -> int:
    if participation is None:
        return clients
    number = plain_number(participation)
    if isinstance(number, int):
        if 1 <= number <= clients:
            return number
    elif number is not None and 0 < number <= 1:
        return max(1, round(number * clients))
    raise UsageError(
        f"participation: expected a number of clients from 1 to {clients}, or a fraction of them "
        f"above 0.0 and up to 1.0, got {quoted(participation)}"
    )
