"""Who took part in which round: a grid as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fedavg_core.cli.page.axes import WIDE, Places, svg
from fedavg_core.cli.page.markup import Content, element

__all__ = ["Cell", "Row", "grid"]

_SHARES, _ROW, _CELL, _LETTER = 52, 22, 60, 7.4
_SIGNS = {"bad": "m-3.5 -3.5l7 7m0 -7l-7 7", "warn": "m0 -4.5l0 5.5m0 3l0 .1"}


@dataclass(frozen=True)
class Cell:
    """What one contributor did at one place.

    Attributes:
        strength: How much it counted there, from 0 to 1.
        style: The class that gives it its colour; None if it was not there.
        tip: The same in words.
    """

    strength: float
    style: str | None
    tip: str


@dataclass(frozen=True)
class Row:
    """A contributor in the grid.

    Attributes:
        name: Its name.
        cells: One for each place.
        share: Its part of the whole weight, in words.
    """

    name: str
    cells: Sequence[Cell]
    share: str


def grid(places: Places, rows: Sequence[Row], label: str) -> Element:
    """Who took part: a row for each contributor, a cell for each place.

    Args:
        places: The rounds.
        rows: The contributors.
        label: What the chart shows, for those who do not see it.

    Returns:
        The drawing.
    """
    count = len(places.rounds)
    left = 12 + _LETTER * max((len(row.name) for row in rows), default=0)
    step = min(float(_CELL), (WIDE - left - _SHARES) / count)
    gap = 2.0 if step > 9 else 0.5 if step > 4 else 0.0
    drawn: list[Content] = []
    for index, row in enumerate(rows):
        y = index * _ROW
        drawn.append(element("text", row.name, class_="end strong", x=left - 10, y=y + 15))
        for place, cell in enumerate(row.cells):
            x = left + place * step
            drawn.append(
                element(
                    "rect",
                    class_=f"cell {cell.style}" if cell.style else "empty",
                    fill_opacity=0.2 + 0.8 * cell.strength if cell.style == "one" else None,
                    x=x,
                    y=y + 1,
                    width=step - gap,
                    height=_ROW - 2,
                    rx=min(3.0, step / 5),
                    data_tip=f"{row.name}, {places.name(place)}\n{cell.tip}",
                )
            )
            if cell.style in _SIGNS and step > 9:
                path = f"M{x + (step - gap) / 2:.2f} {y + _ROW / 2:.2f}{_SIGNS[cell.style]}"
                drawn.append(element("path", class_="on-cell", d=path, pointer_events="none"))
        drawn.append(element("text", row.share, x=left + count * step + 6, y=y + 15))
    height = len(rows) * _ROW
    numbers = (
        element("text", told, class_="middle", x=left + (place + 0.5) * step, y=height + 17)
        for place, told in places.labels()
    )
    return svg(WIDE, height + 24, label, drawn, numbers)
