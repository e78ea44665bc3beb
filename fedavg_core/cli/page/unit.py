"""How numbers are told, and the units of times and sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["MEMORY", "TIME", "Unit", "written"]

_MOST_PLAIN = 1e6
_MOST_DECIMALS = 6
_MOST_DIGITS = 17


def written(value: float, digits: int, step: float = 0.0) -> str:
    """A number, for people.

    Args:
        value: The number.
        digits: How many significant digits it has where it stands alone.
        step: How far it is from the next one of a row, which is a round number; 0 if it stands
            alone. Then it has as many decimals as the step needs, so that equal steps look equal.

    Returns:
        The text.
    """
    if step <= 0:
        return f"{value:.{digits}g}"
    exponent = Decimal(f"{step:.2e}").normalize().as_tuple().exponent
    last = exponent if isinstance(exponent, int) else 0  # the power of ten of its last digit
    if abs(value) < _MOST_PLAIN and last >= -_MOST_DECIMALS:
        return f"{value:,.{max(0, -last)}f}"
    size = math.floor(math.log10(abs(value))) if value else last
    return f"{value:.{min(max(1, size - last + 1), _MOST_DIGITS)}g}"


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
        size: How many seconds, or bytes, it is.
        name: What it is called.
    """

    size: float
    name: str

    def tell(self, count: float, step: float = 0.0, /) -> str:
        """So many of it; with the decimals that a step needs, see `written`."""
        alone = f"{count:,.0f}" if count >= 1000 else written(count, 3)
        return f"{written(count, 3, step) if step else alone} {self.name}"

    @classmethod
    def fit(cls, most: float, units: tuple[Unit, ...]) -> Unit:
        """The largest unit of which there is at least one; else the smallest."""
        return next((unit for unit in reversed(units) if most >= unit.size), units[0])

    @classmethod
    def write(cls, value: float, units: tuple[Unit, ...]) -> str:
        """A value in the unit that fits it."""
        unit = cls.fit(value, units)
        return unit.tell(value / unit.size)


TIME = (Unit(1e-3, "ms"), Unit(1.0, "s"), Unit(60.0, "min"), Unit(3600.0, "h"))
MEMORY = (Unit(2.0**20, "MiB"), Unit(2.0**30, "GiB"), Unit(2.0**40, "TiB"))
