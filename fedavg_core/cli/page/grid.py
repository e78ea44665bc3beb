"""Who took part in which round: a grid of three drawings side by side.

Those of the names and of the shares are as wide as their texts, that of the cells between them as
wide as there is room for, up to a width at which cells look well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fedavg_core.cli.page.axes import Places, part, svg
from fedavg_core.cli.page.markup import Content, element

__all__ = ["Cell", "Row", "grid"]

_SHARES, _ROW, _CELL, _LETTER = 52, 22, 60, 7.4
_WIDE = 1078  # of the whole grid, in pixels, where there is room
_MANY = 24  # of so many cells, some do with scrolling on a narrow screen
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
    step = min(float(_CELL), (_WIDE - left - _SHARES) / count)
    gap = 2.0 if step > 9 else 0.5 if step > 4 else 0.0
    width = part((1 - gap / step) / count)
    names: list[Content] = []
    shares: list[Content] = []
    drawn: list[Content] = []
    for index, row in enumerate(rows):
        y = index * _ROW
        names.append(element("text", row.name, class_="end strong", x=left - 10, y=y + 15))
        shares.append(element("text", row.share, x=6, y=y + 15))
        for place, cell in enumerate(row.cells):
            drawn.append(
                element(
                    "rect",
                    class_=f"cell {cell.style}" if cell.style else "empty",
                    fill_opacity=0.2 + 0.8 * cell.strength if cell.style == "one" else None,
                    x=part(place / count),
                    y=y + 1,
                    width=width,
                    height=_ROW - 2,
                    rx=min(3.0, step / 5),
                    data_tip=f"{row.name}, {places.name(place)}\n{cell.tip}",
                )
            )
            if cell.style in _SIGNS and step > 9:
                sign = element("path", class_="on-cell", d=f"M0 0{_SIGNS[cell.style]}")
                middle = (place + 0.5 - gap / step / 2) / count
                drawn.append(element("svg", sign, x=part(middle), y=y + _ROW / 2))
    numbers = (
        element(
            "text", told, class_="middle", x=part((place + 0.5) / count), y=len(rows) * _ROW + 17
        )
        for place, told in places.labels()
    )
    height = len(rows) * _ROW + 24
    cells = svg("cells many" if count > _MANY else "cells", height, label, drawn, numbers)
    cells.set("width", str(round(count * step)))
    return element(
        "div",
        element("svg", names, width=round(left), height=height),
        cells,
        element("svg", shares, width=_SHARES, height=height),
        class_="grid",
    )
