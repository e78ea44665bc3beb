"""Charts as SVG: curves, dots, stacked bars.

Colours are classes of the style sheet; what a colour tells, a shape or a text tells too. What is
under the pointer is told by the attribute ``data-tip``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fedavg_core.cli.page.axes import HEIGHT, Frame, Places, Tell, linear, part, spread
from fedavg_core.cli.page.markup import element

__all__ = ["Curve", "Points", "bars", "curves", "dots", "figure"]

_MOST_DOTS = 80
_BREADTH = 1000
_BAR, _USUAL = 26, 450  # how wide a bar is in a chart of the usual width, in pixels


@dataclass(frozen=True)
class Curve:
    """A line through one value at each place.

    Attributes:
        name: What it shows.
        values: The values; None where there is none.
        style: The class that gives it its colour.
    """

    name: str
    values: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Points:
    """Several values at each place.

    Attributes:
        name: What they are.
        values: Those of each place.
        style: The class that gives them their colour.
        crosses: Whether they are crosses and not dots.
    """

    name: str
    values: Sequence[Sequence[float]]
    style: str
    crosses: bool = False


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    """A line through points, broken where one is missing."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{_BREADTH * point[0]:.2f} {point[1]:.2f}")
        pen = "L"
    return "".join(parts)


def _drawn(frame: Frame, curve: Curve) -> list[Element]:
    points = [
        None if value is None else (frame.x(place), frame.axis.y(value))
        for place, value in enumerate(curve.values)
    ]
    line = element(
        "svg",
        element("path", class_=f"curve {curve.style}", d=_path(points)),
        viewBox=f"0 0 {_BREADTH} {HEIGHT}",
        preserveAspectRatio="none",
        width="100%",
        height=HEIGHT,
    )
    few = len(points) <= _MOST_DOTS
    alone = [None, *points, None]
    marked = (
        point
        for at, point in enumerate(points)
        if point is not None and (few or alone[at] is alone[at + 2] is None)
    )
    dots = (
        element("circle", class_=f"dot {curve.style}", cx=part(x), cy=y, r=2.6) for x, y in marked
    )
    return [line, *dots]


def curves(
    places: Places, lines: Sequence[Curve], tell: Tell, label: str, *, from_zero: bool = False
) -> Element:
    """A chart of curves.

    Args:
        places: The rounds.
        lines: The curves.
        tell: How a value is written.
        label: What the chart shows, for those who do not see it.
        from_zero: Whether the axis begins at zero, however far the values are from it.

    Returns:
        The drawing.
    """
    values = [value for line in lines for value in line.values if value is not None]
    frame = Frame(places, linear([0.0, *values] if from_zero else values, tell))
    tips = [
        "\n".join(f"{line.name}: {_told(line.values[place], tell)}" for line in lines)
        for place in range(len(places.rounds))
    ]
    return frame.around(label, tips, [_drawn(frame, line) for line in lines])


def _told(value: float | None, tell: Tell) -> str:
    return "none" if value is None else tell(value)


def dots(
    places: Places, clouds: Sequence[Points], line: Curve, tell: Tell, most: int, label: str
) -> Element:
    """A chart of many values at each place, and a curve; logarithmic if they are far apart.

    Args:
        places: The rounds.
        clouds: The values.
        line: The curve.
        tell: How a value is written.
        most: How many dots there may be of each; where there are more, bars span them.
        label: What the chart shows, for those who do not see it.

    Returns:
        The drawing.
    """
    single = [value for value in line.values if value is not None]
    together = [value for cloud in clouds for values in cloud.values for value in values]
    frame = Frame(places, spread([*together, *single], tell))
    drawn = [
        _spans(frame, cloud) if sum(map(len, cloud.values)) > most else _marks(frame, cloud)
        for cloud in clouds
    ]
    tips = [
        "\n".join(
            [
                *(_span(cloud, place, tell) for cloud in clouds if cloud.values[place]),
                f"{line.name}: {_told(line.values[place], tell)}",
            ]
        )
        for place in range(len(places.rounds))
    ]
    return frame.around(label, tips, drawn, _drawn(frame, line))


def _marks(frame: Frame, cloud: Points) -> list[Element]:
    made = []
    for place, values in enumerate(cloud.values):
        for value in values:
            x, y = frame.x(place), frame.axis.y(value)
            if cloud.crosses:
                cross = element("path", class_=f"cross {cloud.style}", d="M-4 -4l8 8m0 -8l-8 8")
                made.append(element("svg", cross, x=part(x), y=y))
            else:
                style = f"dot soft {cloud.style}"
                made.append(element("circle", class_=style, cx=part(x), cy=y, r=3.2))
    return made


def _spans(frame: Frame, cloud: Points) -> list[Element]:
    return [
        element(
            "rect",
            class_=f"band {cloud.style}",
            x=part(frame.x(place) - 0.4 * frame.step),
            y=frame.axis.y(max(values)) - 1,
            width=part(0.8 * frame.step),
            height=frame.axis.y(min(values)) - frame.axis.y(max(values)) + 2,
        )
        for place, values in enumerate(cloud.values)
        if values
    ]


def _span(cloud: Points, place: int, tell: Tell) -> str:
    values = cloud.values[place]
    low, high = tell(min(values)), tell(max(values))
    if len(values) == 1:
        return f"{cloud.name}: {low}"
    return f"{cloud.name}: {len(values):,}, from {low} to {high}"


def bars(places: Places, stacks: Sequence[Curve], tell: Tell, label: str) -> Element:
    """A chart of bars, each of parts that stand on one another.

    Args:
        places: The rounds.
        stacks: The parts, from the bottom; each has a value of at least zero at each place.
        tell: How a value is written.
        label: What the chart shows, for those who do not see it.

    Returns:
        The drawing.
    """
    tops = [0.0] * len(places.rounds)
    edges = []
    for stack in stacks:
        tops = [top + (value or 0.0) for top, value in zip(tops, stack.values, strict=True)]
        edges.append(tops)
    frame = Frame(places, linear([0.0, *tops], tell))
    width = min(_BAR / _USUAL, 0.72 * frame.step)
    drawn = (
        element(
            "rect",
            class_=f"bar {stack.style}",
            x=part(frame.x(place) - width / 2),
            y=frame.axis.y(top),
            width=part(width),
            height=frame.axis.y(top - (stack.values[place] or 0.0)) - frame.axis.y(top),
        )
        for stack, ends in zip(stacks, edges, strict=True)
        for place, top in enumerate(ends)
    )
    tips = [
        "\n".join(
            [
                *(f"{stack.name}: {_told(stack.values[place], tell)}" for stack in stacks),
                f"together: {tell(top)}",
            ]
        )
        for place, top in enumerate(tops)
    ]
    return frame.around(label, tips, drawn)


def figure(
    title: str, unit: str, legend: Sequence[tuple[str, str, str]], drawing: Element
) -> Element:
    """A chart with its title and its legend.

    Args:
        title: What it shows.
        unit: In which unit, or otherwise how it is to be read.
        legend: For each thing that is drawn its name, its style, and its shape: ``"line"``,
            ``"dot"``, ``"cross"``, ``"bar"`` or ``"empty"``.
        drawing: The chart.

    Returns:
        The figure.
    """
    entries = (element("span", _sign(style, shape), name) for name, style, shape in legend)
    return element(
        "figure",
        element(
            "figcaption",
            title,
            element("span", unit, class_="unit") if unit else None,
            element("span", entries, class_="legend"),
        ),
        drawing,
    )


def _sign(style: str, shape: str) -> Element:
    drawn: dict[str, list[Element]] = {
        "line": [
            element("path", class_=f"curve {style}", d="M1 6L15 6"),
            element("circle", class_=f"dot {style}", cx=8, cy=6, r=2.6),
        ],
        "dot": [element("circle", class_=f"dot soft {style}", cx=8, cy=6, r=3.4)],
        "cross": [element("path", class_=f"cross {style}", d="M4 2l8 8m0 -8l-8 8")],
        "bar": [element("rect", class_=f"bar {style}", x=2, y=0, width=12, height=12, rx=2)],
        "empty": [element("rect", class_="empty", x=2, y=0, width=12, height=12, rx=2)],
    }
    return element("svg", drawn[shape], viewBox="0 0 16 12", aria_hidden="true")
