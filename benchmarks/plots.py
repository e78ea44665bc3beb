"""Results as pictures.

Colours are those of Okabe and Ito (2008), which people with any kind of colour vision tell apart;
no difference is told by colour alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.growth import Growth
from benchmarks.suite import Result
from benchmarks.timing import Row, Timing, middle

__all__ = ["save_plots"]

_COLOURS = {"ours": "#0072B2", "peer": "#E69F00", "floor": "#999999"}
_KINDS = {
    "ours": "fedavg-core, on several threads",
    "peer": "peers, on one",
    "floor": "copying the bytes, on one (▶: cut off)",
}
_LINES = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#000000")
_MARKERS = "osD^vXP*h<>"
_COLUMNS = 4
_WIDE = 30  # costs further apart than this are drawn on a logarithmic axis
_TITLE_WIDTH = 36
_FLOOR_SHOWN = 1.5  # times the fastest of the others: up to there


def save_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what can be drawn of the results.

    Args:
        results: Of any benchmarks.
        folder: Where to put the files; it is there.

    Returns:
        The PNG files written: ``throughput.png``, and one for each kind of growth.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    written = []
    settings = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        averaged = [
            result for result in results if isinstance(result, Timing) and result.reference is None
        ]
        if averaged:
            figure = figures.Figure(layout="constrained")
            _throughput(figure, averaged)
            written.append(folder / "throughput.png")
            figure.savefig(written[-1], dpi=120)
        grown = [result for result in results if isinstance(result, Growth)]
        names = list(dict.fromkeys(series.name for result in grown for series in result.series))
        for result in grown:
            figure = figures.Figure(figsize=(7.5, 4.5), layout="constrained")
            _growth(figure, result, names)
            written.append(folder / f"{result.benchmark}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def _throughput(figure: Any, timings: Sequence[Timing]) -> None:
    names = list(dict.fromkeys(row.name for timing in timings for row in timing.rows))
    ours = {row.name for timing in timings for row in timing.rows if row.kind == "ours"}
    columns = min(_COLUMNS, len(timings))
    lines = -(-len(timings) // columns)
    figure.set_size_inches(1.6 + 3.1 * columns, 0.9 + (0.7 + 0.24 * len(names)) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for number, panel in enumerate(panels.flat):
        if number >= len(timings):
            panel.set_visible(False)
            continue
        timing = timings[number]
        contest = [row for row in timing.rows if row.kind != "floor"]
        edge = _FLOOR_SHOWN * max(_speeds(timing, row)[2] for row in contest or timing.rows)
        for place, name in enumerate(names):  # the same place in every panel
            row = timing.row(name)
            if row is None:
                panel.text(0, place, " not run", va="center", fontsize=7.5, color="#777777")
                continue
            low, mid, high = _speeds(timing, row)
            if mid > edge:  # the floor is cut off, lest it squeeze the others
                panel.barh(place, edge, color=_COLOURS[row.kind])
                label, at, side = f"{mid:.2g} ▶ ", edge, "right"
            else:
                panel.barh(
                    place,
                    mid,
                    color=_COLOURS[row.kind],
                    xerr=[[mid - low], [high - mid]],
                    error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                )
                label, at, side = f" {mid:.2g}", high, "left"
            panel.text(at, place, label, va="center", ha=side, fontsize=7.5)
        panel.set_yticks(range(len(names)), names if number % columns == 0 else [])
        for label, name in zip(panel.get_yticklabels(), names, strict=False):
            label.set_fontweight("bold" if name in ours else "normal")
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.invert_yaxis()
        panel.set_title(fill(timing.title, _TITLE_WIDTH), fontsize=9)
        panel.margins(x=0.16)
        panel.set_xlim(left=0)
        panel.set_xlabel(
            "10⁹ parameters averaged per second\n(medians; lines: quartiles)", fontsize=8
        )
    patches: Any = importlib.import_module("matplotlib.patches")
    present = {row.kind for timing in timings for row in timing.rows}
    figure.legend(
        handles=[
            patches.Patch(color=_COLOURS[kind], label=label)
            for kind, label in _KINDS.items()
            if kind in present
        ],
        loc="outside upper center",
        ncols=3 if columns > 1 else 1,
        frameon=False,
    )


def _speeds(timing: Timing, row: Row) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of 10⁹ elements a second."""
    numpy: Any = importlib.import_module("numpy")
    low, _, high = numpy.nanpercentile(timing.elements / numpy.array(row.laps) / 1e9, [25, 50, 75])
    mid = timing.elements / middle(row.laps) / 1e9
    return min(low, mid), mid, max(high, mid)


def _growth(figure: Any, growth: Growth, names: Sequence[str]) -> None:
    panel = figure.subplots()
    for series in growth.series:
        number = names.index(series.name)  # the same looks in every figure
        panel.plot(
            [point.x for point in series.points],
            [point.y for point in series.points],
            label=series.name,
            color=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linestyle="-" if series.kind == "ours" else "--",
            linewidth=1.6,
        )
    ticker: Any = importlib.import_module("matplotlib.ticker")
    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.6g}")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(plain)
    costs = [point.y for series in growth.series for point in series.points]
    if max(costs) > _WIDE * min(costs):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0, top=1.08 * max(costs))
    panel.yaxis.set_major_formatter(plain)
    panel.set_xlabel(growth.x)
    panel.set_ylabel(growth.y)
    panel.set_title(growth.title, fontsize=10)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
