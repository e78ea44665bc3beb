"""Where things are in a chart: rounds to the right, values upwards, ticks at round numbers.

A chart is as wide as there is room for, and nothing in it is scaled: heights, texts and dots are in
pixels, what goes to the right is in parts of the width. So all texts of a page have one size.

A chart of more rounds than can be told apart on a screen has several of them at one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar
from xml.etree.ElementTree import Element

from fedavg_core.cli.page.markup import Content, element

__all__ = [
    *("HEIGHT", "Axis", "Frame", "Places", "Tell"),
    *("linear", "part", "spread", "svg", "ticks"),
]

T = TypeVar("T")
_WIDE_LABEL = 7


class Tell(Protocol):
    """How a value is written; with its step, where it is a mark of an axis."""

    def __call__(self, value: float, step: float = 0.0, /) -> str:
        """The text."""


HEIGHT = 230
"""How high a chart is, in pixels."""
TOP, BOTTOM = 10, 30
_MOST_LABELS = 9
_WIDE_SPAN = 30
_LARGEST = 1e307  # beyond it, the arithmetic here leaves the range of a float
_LEAST_POWER, _MOST_POWER = -323, 308  # of ten, that are floats


@dataclass(frozen=True)
class Places:
    """Where rounds are, from left to right.

    Attributes:
        rounds: The numbers of the rounds at each place; one of each, or several.
    """

    rounds: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, numbers: Sequence[int], most: int) -> Places:
        """Rounds at as many places as can be told apart.

        Args:
            numbers: The rounds' numbers, ascending; at least one.
            most: How many places there may be.

        Returns:
            The places.
        """
        each = math.ceil(len(numbers) / most)
        starts = range(0, len(numbers), each)
        return cls(tuple(tuple(numbers[at : at + each]) for at in starts))

    def gathered(self, values: Iterable[T]) -> list[list[T]]:
        """What there is for each round, by places."""
        source = iter(values)
        return [[next(source) for _ in rounds] for rounds in self.rounds]

    def name(self, place: int) -> str:
        """What a place is called."""
        rounds = self.rounds[place]
        if len(rounds) == 1:
            return f"round {rounds[0]}"
        return f"rounds {rounds[0]} to {rounds[-1]}"

    def labels(self) -> Iterator[tuple[int, str]]:
        """The places that bear a number, a round one."""
        span = self.rounds[-1][-1] - self.rounds[0][0] + 1
        step = max(1, round(ticks(0, span, _MOST_LABELS)[1]))
        for place, rounds in enumerate(self.rounds):
            mark = -(-rounds[0] // step) * step
            if mark <= rounds[-1]:
                yield place, f"{mark:,}"


@dataclass(frozen=True)
class Axis:
    """From values to heights.

    Attributes:
        low: What is at the bottom: a value, or the logarithm of one.
        high: What is at the top.
        marks: The values that have a tick, and what they say.
        logarithmic: Whether heights are those of logarithms.
    """

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def y(self, value: float) -> float:
        """The height of a value in the drawing, downwards; that of an end if it is beyond it."""
        at = math.log10(value) if self.logarithmic else value
        at = min(max(at, self.low), self.high)
        return TOP + (self.high - at) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from below a number to above another.

    Args:
        low: The one.
        high: The other; if they are hardly apart, numbers about them are given.
        most: About how many steps there may be.

    Returns:
        The numbers, at least two, ascending; up to about 1e307 in magnitude, whatever is asked for.
    """
    low, high = (min(max(number, -_LARGEST), _LARGEST) for number in (low, high))
    size = max(abs(low), abs(high))
    if size < 1e-300:
        high = 1.0
    elif not high - low > max(1e-12 * size, 1e-300):
        low, high = low - size / 2, high + size / 2
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def linear(values: Sequence[float], tell: Tell) -> Axis:
    """An axis that has room for some values, if any; from zero, where they are not far from it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    marks = ticks(0.0 if 0 <= low < 0.6 * high else low, high)
    step = marks[1] - marks[0]
    return Axis(marks[0], marks[-1], tuple((mark, tell(mark, step)) for mark in marks))


def spread(values: Sequence[float], tell: Tell) -> Axis:
    """An axis of logarithms, where values above zero are far apart; else a plain one."""
    if not values or min(values) <= 0 or max(values) / min(values) < _WIDE_SPAN:
        return linear(values, tell)
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    step = math.ceil((last - first) / 6)
    powers = range(max(first, _LEAST_POWER), min(last, _MOST_POWER) + 1, step)
    marks = tuple((10.0**power, tell(10.0**power)) for power in powers)
    return Axis(first, last, marks, logarithmic=True)


@dataclass(frozen=True)
class Frame:
    """The axes of a chart.

    Attributes:
        places: What goes to the right.
        axis: What goes upwards.
    """

    places: Places
    axis: Axis

    @property
    def step(self) -> float:
        """How far places are apart, as a part of the width."""
        return 1 / len(self.places.rounds)

    def x(self, place: int) -> float:
        """The middle of a place, as a part of the width."""
        return (place + 0.5) * self.step

    def around(self, label: str, tips: Sequence[str], *drawing: Content) -> Element:
        """The drawing, with the axes below it, and over it what tells of each place."""
        heights = [(self.axis.y(at), told) for at, told in self.axis.marks]
        rules = (element("line", class_="rule", x1=0, x2="100%", y1=y, y2=y) for y, _ in heights)
        values = (element("text", told, class_="end", x=-8, y=y + 4) for y, told in heights)
        numbers = (
            element("text", told, class_="middle", x=part(self.x(place)), y=HEIGHT - BOTTOM + 19)
            for place, told in self.places.labels()
        )
        hits = (
            element(
                "rect",
                class_="hit",
                x=part(self.x(place) - self.step / 2),
                y=TOP,
                width=part(self.step),
                height=HEIGHT - TOP - BOTTOM,
                data_tip=f"{self.places.name(place)}\n{tip}",
            )
            for place, tip in enumerate(tips)
        )
        wide = any(len(told) > _WIDE_LABEL for _, told in self.axis.marks)
        style = "chart wide" if wide else "chart"
        return svg(style, HEIGHT, label, rules, values, numbers, *drawing, hits)


def part(of_width: float) -> str:
    """A part of the width, as an attribute."""
    return f"{100 * of_width:.3f}".rstrip("0").rstrip(".") + "%"


def svg(style: str, height: float, label: str, *content: Content) -> Element:
    """A drawing whose width the style sheet tells, and what it shows for those who do not see."""
    return element("svg", *content, class_=style, height=height, role="img", aria_label=label)
