"""What the page tells, section by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from fedavg_core.cli.page.axes import Places
from fedavg_core.cli.page.charts import Curve, Points, bars, curves, dots, figure
from fedavg_core.cli.page.grid import Cell, Row, grid
from fedavg_core.cli.page.markup import Content, element, shown
from fedavg_core.cli.page.metric import Metric, find_metrics, left_out
from fedavg_core.cli.page.unit import MEMORY, TIME, Unit, written
from fedavg_core.cli.run_log import PARTS, STATES, Contribution, RoundRecord
from fedavg_core.client import contributor_order
from fedavg_core.errors import counted
from fedavg_core.robust.rules import ROBUST_MEANS

__all__ = [
    *("costs", "learning", "participation", "sizes", "table", "tiles"),
    *("trained_elsewhere", "troubles"),
]

_MOST_CHARTS = 8
_MOST_ROWS = 40
_MOST_DOTS = 3000
_MOST_TROUBLES = 200
_MOST_TABLE = 1000
_STYLES = ("one", "two")
_ROW_NAME = 22


def trained_elsewhere(settings: dict[str, Any]) -> bool:
    """Whether clients trained in processes of their own."""
    workers = settings.get("workers")
    return isinstance(workers, int) and workers > 1


def tiles(settings: dict[str, Any], records: Sequence[RoundRecord]) -> Element:
    """The run in a few numbers."""
    tiles = [_tile("rounds", f"{len(records):,}", f"of {settings.get('rounds')}")]
    for metric in find_metrics(records)[:1]:
        whose, values = next(metric.lines)
        known = [
            (value, record.round)
            for value, record in zip(values, records, strict=True)
            if value is not None
        ]
        best, when = (
            max(known, key=lambda one: (one[0], -one[1])) if metric.larger_is_better else min(known)
        )
        note = f"best: {metric.tell(best)} in round {when}" if metric.has_best else "the last"
        name = f"{whose} {shown(metric.name)}"
        tiles.insert(0, _tile(name, metric.tell(known[-1][0]), note))
    count = {status: sum(record.count(status) for record in records) for status in STATES}
    tiles.append(
        _tile(
            "updates averaged",
            f"{count['accepted']:,}",
            f"{count['refused']:,} refused, {counted(count['failed'], 'client')} failed",
        )
    )
    parts = {part: sum(record.seconds.get(part, 0.0) for record in records) for part in PARTS}
    total = sum(parts.values())
    shares = (f"{parts[part] / total:.0%} {part}" for part in parts if total > 0)
    tiles.append(_tile("time", Unit.write(total, TIME), ", ".join(shares)))
    peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
    if peaks:
        whose = "that averages" if trained_elsewhere(settings) else "in which clients train as well"
        most = Unit.write(max(peaks), MEMORY)
        tiles.append(_tile("most memory", most, f"of the process {whose}"))
    return element("div", tiles, class_=f"tiles of-{len(tiles)}")


def _tile(name: str, value: str, note: str) -> Element:
    return element(
        "div",
        element("div", name, class_="name"),
        element("div", value, class_="value"),
        element("div", note, class_="note"),
        class_="tile",
    )


def _section(title: str, what: str, *content: Content) -> Element:
    return element("section", element("h2", title), element("p", what), *content)


def learning(places: Places, records: Sequence[RoundRecord]) -> Content:
    """How the metrics went; None if there are none."""
    metrics = find_metrics(records)
    names = left_out(records)
    if not metrics and not names:
        return None
    figures = []
    for metric in metrics[:_MOST_CHARTS]:
        lines = [
            Curve(whose, list(map(_last, places.gathered(values))), style)
            for (whose, values), style in zip(metric.lines, _STYLES, strict=False)
        ]
        name = shown(metric.name)
        drawing = curves(places, lines, metric.tell, f"{name}, round by round")
        legend = [(line.name, line.style, "line") for line in lines]
        figures.append(figure(name, "by round", legend, drawing))
    more = len(metrics) - len(figures)
    return _section(
        "Learning",
        "Test: the new global model, evaluated. Train: what the contributors reported, averaged "
        f"with their weights.{f' {more} more metrics are in the record.' if more else ''}"
        + (
            f" Left out where they were no finite numbers: {shown(', '.join(names), 400)}."
            if names
            else ""
        ),
        element("div", figures, class_="charts") if figures else None,
    )


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def participation(
    settings: dict[str, Any], places: Places, records: Sequence[RoundRecord]
) -> Element:
    """Who took part, and with what weight."""
    weights: Counter[str] = Counter()
    troubles: Counter[str] = Counter()
    for record in records:
        for one in record.contributions:
            weights[one.contributor] += one.weight or 0  # type: ignore[assignment]
            troubles[one.contributor] += one.status != "accepted"
    total = sum(weights.values())
    names = contributor_order(
        sorted(weights, key=lambda name: (-troubles[name], -weights[name], name))[:_MOST_ROWS]
    )
    taken = [{one.contributor: one for one in record.contributions} for record in records]
    by_place = places.gathered(taken)
    most = max((one.weight or 0 for record in taken for one in record.values()), default=0)
    rows = [
        Row(
            shown(name, _ROW_NAME),
            [_cell([rounds[name] for rounds in here if name in rounds], most) for here in by_place],
            f"{weights[name] / total:.1%}" if total else "-",
        )
        for name in names
    ]
    hidden = len(weights) - len(rows)
    return _section(
        "Who took part",
        "The stronger the colour, the more weight. On the right: each contributor's part of the "
        "whole weight."
        + _ignored(settings)
        + (
            f" Shown are {len(rows)} of {len(weights):,} contributors: those with refusals or "
            "failures first, then the heaviest."
            if hidden
            else ""
        ),
        figure(
            "contributors",
            "by round",
            [
                ("averaged", "one", "bar"),
                ("refused", "bad", "bar"),
                ("failed", "warn", "bar"),
                ("not selected", "", "empty"),
            ],
            grid(places, rows, "who took part in which round"),
        ),
    )


def _ignored(settings: dict[str, Any]) -> str:
    """A sentence about weights where the mean ignores them."""
    accumulator = settings.get("accumulator")
    name = str(accumulator.get("name") if isinstance(accumulator, dict) else accumulator)
    if name not in ROBUST_MEANS or not ROBUST_MEANS[name].ignores_weights:
        return ""
    return (
        f" The mean of this run, {name}, ignores weights: they count in the train metrics only, "
        "and not in the model."
    )


def _cell(there: Sequence[Contribution], most: float) -> Cell:
    """What a contributor did in the rounds of one place."""
    if not there:
        return Cell(0.0, None, "not selected")
    states = Counter(one.status for one in there)
    style = "bad" if states["refused"] else "warn" if states["failed"] else "one"
    weight = fmean(one.weight or 0 for one in there)
    if len(there) > 1:
        tip = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    else:
        tip = _tip(there[0])
    return Cell(weight / most if most else 0.0, style, tip)


def _tip(one: Contribution) -> str:
    if one.status != "accepted":
        return f"{one.status}: {shown(one.reason or one.detail)}"
    size = "" if one.norm is None else f"\nnorm {one.norm:.4g}"
    return f"weight {one.weight or 0:,.6g}{size}"


def troubles(records: Sequence[RoundRecord]) -> Element:
    """What was refused or failed, and why."""
    found = [
        (record.round, one)
        for record in records
        for one in record.contributions
        if one.status != "accepted"
    ]
    others = [
        (record.round, what, problem)
        for record in records
        for what, problem in (
            ("model kept", record.problem),
            ("not evaluated", record.evaluation_problem),
        )
        if problem is not None
    ]
    if not found and not others:
        nothing = element("div", element("div", "Every update was averaged."), class_="table good")
        return _section(
            "Refused and failed", "What did not become part of a model, and why.", nothing
        )
    reasons = Counter(one.reason or one.status for _, one in found)
    chips = (
        element("span", _badge(shown(reason), reason), f" {count:,}")
        for reason, count in reasons.most_common()
    )
    rows = [
        element(
            "tr",
            element("td", f"{number:,}", class_="number"),
            element("td", shown(one.contributor, 40), class_="name"),
            element("td", _badge(shown(one.reason or one.status), one.reason or one.status)),
            element("td", shown(one.detail, 400), class_="detail"),
        )
        for number, one in found[:_MOST_TROUBLES]
    ]
    rows += [
        element(
            "tr",
            element("td", f"{number:,}", class_="number"),
            element("td", "-", class_="name"),
            element("td", _badge(what, "failed")),
            element("td", shown(problem, 400), class_="detail"),
        )
        for number, what, problem in others[:_MOST_TROUBLES]
    ]
    more = len(found) + len(others) - len(rows)
    return _section(
        "Refused and failed",
        "What did not become part of a model, and why. A refused update leaves no trace in it."
        + (f" {more:,} more are in the record." if more else ""),
        element("div", chips, class_="chips"),
        _table_of(("round", "contributor", "what", "why"), rows, numbers=1),
    )


def _badge(text: str, reason: str) -> Element:
    return element("span", text, class_=f"badge {'warn' if reason == 'failed' else 'bad'}")


def _table_of(titles: Sequence[str], rows: Sequence[Element], numbers: int) -> Element:
    heads = (
        element("th", title, class_="number" if index < numbers else None)
        for index, title in enumerate(titles)
    )
    return element(
        "div",
        element("table", element("thead", element("tr", heads)), element("tbody", rows)),
        class_="table",
    )


def sizes(places: Places, records: Sequence[RoundRecord]) -> Element:
    """How large the updates were."""

    def norms(*states: str) -> list[list[float]]:
        by_round = (
            [
                one.norm
                for one in record.contributions
                if one.norm is not None and one.status in states
            ]
            for record in records
        )
        return [[norm for norms in here for norm in norms] for here in places.gathered(by_round)]

    def tell(norm: float, step: float = 0.0, /) -> str:
        return written(norm, 3, step)

    clouds = [
        Points("averaged", norms("accepted"), "one"),
        Points("refused", norms("refused"), "bad", crosses=True),
    ]
    steps = [_last(norms) for norms in places.gathered(record.norm for record in records)]
    line = Curve("global model", steps, "two")
    unknown = sum(
        one.norm is None and one.status == "refused"
        for record in records
        for one in record.contributions
    )
    drawing = dots(places, clouds, line, tell, _MOST_DOTS, "norms of the updates")
    return _section(
        "Size of the updates",
        "By how much each contributor changed the model it was sent, and by how much the round "
        "changed the global model (L2 norms). A contributor far from the others stands out."
        + (f" Refused updates without a norm: {unknown:,}." if unknown else ""),
        element(
            "div",
            figure(
                "norms",
                "by round",
                [
                    *(
                        (cloud.name, cloud.style, "cross" if cloud.crosses else "dot")
                        for cloud in clouds
                        if any(cloud.values)
                    ),
                    (line.name, line.style, "line"),
                ],
                drawing,
            ),
            class_="charts",
        ),
    )


def costs(settings: dict[str, Any], places: Places, records: Sequence[RoundRecord]) -> Element:
    """Time and memory."""
    unit = Unit.fit(max(sum(record.seconds.values()) for record in records), TIME)

    def part(name: str, style: str) -> Curve:
        taken = places.gathered(record.seconds.get(name, 0.0) / unit.size for record in records)
        return Curve(name, list(map(fmean, taken)), style)

    stacks = [part("training", "one"), part("averaging", "two"), part("evaluation", "three")]
    figures = [
        figure(
            "time",
            "by round" if len(places.rounds) == len(records) else "a round, mean",
            [(stack.name, stack.style, "bar") for stack in stacks],
            bars(places, stacks, unit.tell, "time of each round"),
        )
    ]
    peaks = [record.peak_bytes for record in records]
    most = max((peak for peak in peaks if peak is not None), default=0)
    if most:
        memory = Unit.fit(most, MEMORY)
        scaled = [None if peak is None else peak / memory.size for peak in peaks]
        line = Curve("most so far", list(map(_last, places.gathered(scaled))), "one")
        drawing = curves(places, [line], memory.tell, "memory of the process", from_zero=True)
        figures.append(figure("memory", "of the process", [(line.name, "one", "line")], drawing))
    return _section(
        "Time and memory",
        "Averaging is all that the server does: judging updates, adding them up, rounding. "
        + (
            "It goes on while clients train, and is told as training then. Memory is that of the "
            "process that averages, without the workers."
            if trained_elsewhere(settings)
            else "Memory is that of the whole process, in which the clients train as well."
        ),
        element("div", figures, class_="charts"),
    )


def table(records: Sequence[RoundRecord]) -> Element:
    """All rounds in numbers."""
    metrics = [(metric, whose) for metric in find_metrics(records) for whose, _ in metric.lines]
    metrics = metrics[:_MOST_CHARTS]
    titles = [
        *("round", "accepted", "weight"),
        *(f"{whose} {shown(metric.name, 40)}" for metric, whose in metrics),
        *("norm of the change", "time"),
    ]
    rows = [
        element("tr", (element("td", cell, class_="number") for cell in _row(record, metrics)))
        for record in records[-_MOST_TABLE:]
    ]
    less = len(records) - len(rows)
    return _section(
        "All rounds",
        f"The last {len(rows):,}; the first {less:,} are in the record."
        if less
        else "What the charts show, in numbers.",
        _table_of(titles, rows, numbers=len(titles)),
    )


def _row(record: RoundRecord, metrics: Iterable[tuple[Metric, str]]) -> Iterator[str]:
    yield f"{record.round:,}"
    yield f"{record.count('accepted'):,} of {len(record.contributions):,}"
    yield "-" if record.total_weight is None else f"{record.total_weight:,.6g}"
    for metric, whose in metrics:
        values = record.evaluation if whose == "test" else record.metrics
        value = values.get(metric.name)
        yield "-" if value is None else metric.tell(value)
    yield "-" if record.norm is None else f"{record.norm:.4g}"
    yield Unit.write(sum(record.seconds.values()), TIME)
