"""Units in which times and sizes are told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MEMORY", "TIME", "Unit"]


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
        size: How many seconds, or bytes, it is.
        name: What it is called.
    """

    size: float
    name: str

    def tell(self, count: float) -> str:
        """So many of it."""
        return f"{count:.3g} {self.name}" if count < 1000 else f"{count:,.0f} {self.name}"

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
