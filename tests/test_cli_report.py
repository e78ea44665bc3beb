"""``fedavg report``: what the page tells, and that a browser draws it and asks for nothing."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

pytest.importorskip("rich")

from fedavg_core.cli import run_settings
from fedavg_core.cli.page import page
from fedavg_core.cli.page.axes import Places, linear, spread, ticks
from fedavg_core.cli.page.markup import _hash, element, shown
from fedavg_core.cli.page.metric import Metric
from fedavg_core.cli.page.unit import MEMORY, TIME, Unit
from fedavg_core.cli.run_log import Contribution, RoundRecord, append_round, write_settings
from fedavg_core.robust.rules import ROBUST_MEANS
from tests.test_cli_files import Capture, fails, run
from tests.test_cli_run import TRAINING, written

HOSTILE = (
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "'onmouseover='document.title=1'",
    "</style></script></svg><b>bold",
    "nul\0\x1b[31m\u202edrawkcab\ud800",
    "&lt;&amp;",
    "Z\u00fcrich " + "\u00fc" * 500,
    "",
)
SETTINGS: dict[str, Any] = {
    "training_file": "digits.py",
    "clients": 9,
    "rounds": 12,
    "fraction": 0.5,
    "transfer": "full",
    "accumulator": "exact",
    "seed": 3,
    "started": "2026-11-24T06:59:56+00:00",
    "optimizer": {"name": "fedadam"},
}


def record(number: int, contributions: Sequence[Contribution] = (), **other: Any) -> RoundRecord:
    settings: dict[str, Any] = {
        "total_weight": 10.0,
        "metrics": {"loss": 2.0 / (number + 1)},
        "evaluation": {"loss": 3.0 / (number + 1), "accuracy": number / 20},
        "skipped_metrics": (),
        "problem": None,
        "norm": 1.0 / (number + 1),
        "seconds": {"training": 1.5, "averaging": 0.25, "evaluation": 0.5},
        "peak_bytes": (100 + number) << 20,
    }
    return RoundRecord(number, tuple(contributions), **{**settings, **other})


def accepted(name: str, weight: float = 5, norm: float | None = 1.0) -> Contribution:
    return Contribution(name, "accepted", weight, norm, 0.5, {"loss": 1.0})


def refused(name: str, norm: float | None = None, detail: str = "too large") -> Contribution:
    return Contribution(name, "refused", None, norm, 0.5, {}, "NORM", detail)


def failed(name: str, detail: str = "ValueError") -> Contribution:
    return Contribution(name, "failed", seconds=0.5, detail=detail)


def lively() -> list[RoundRecord]:
    """Twelve rounds of everything."""
    records = []
    for number in range(12):
        there = [
            accepted(f"site-{index}", index, 2.0**index / (number + 1)) for index in (1, 2, 10)
        ]
        there += [refused(HOSTILE[number % 8], 900.0, HOSTILE[(number + 1) % 8])]
        there += [failed(HOSTILE[(number + 2) % 8], HOSTILE[(number + 3) % 8])]
        metrics = {"loss": 1.0 / (number + 1), HOSTILE[number % 4]: float(number)}
        problem = HOSTILE[0] if number == 4 else None
        records.append(record(number, there, metrics=metrics, problem=problem))
    return records


class Texts(HTMLParser):
    """The page as a parser sees it: which elements, and which texts."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.tips: list[str] = []
        self.feed(content.decode("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.tips += [value or "" for name, value in attrs if name == "data-tip"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "|".join(self.texts)


def test_the_page_of_a_run_tells_what_happened(tmp_path: Path, capsys: Capture) -> None:
    training = written(tmp_path, TRAINING)
    folder = tmp_path / "run"
    given = ["--clients", 4, "--rounds", 3, "--fraction", 0.5, "--checkpoint", folder]
    assert run(capsys, "run", training, *given, "--optimizer", "fedadam")[0] == 0
    code, out, err = run(capsys, "report", folder)
    assert (code, out, err) == (0, f"report: {folder / 'report.html'}\n", "")
    text = Texts((folder / "report.html").read_bytes()).text
    assert "|training.py|" in text
    assert "4 clients, 50% of them a round · full updates · exact mean · fedadam as server" in text
    assert "optimizer (learning_rate 0.1, beta1 0.9, tau 0.001, beta2 0.99) · seed 0" in text
    assert "|rounds|3|of 3|" in text
    assert "|updates averaged|6|0 refused, 0 clients failed|" in text
    assert "Every update was averaged." in text
    assert "|0|2 of 2|" in text


def test_a_folder_that_is_none_of_a_run_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert fails(capsys, "report", tmp_path) == (
        f"{tmp_path}: this folder is not from fedavg run; a report needs one"
    )
    for other, got in ((tmp_path / "nowhere", "there is none"), (Path(__file__), "got a file")):
        assert fails(capsys, "report", other) == (
            f"{other}: expected the folder of a fedavg run, {got}"
        )
    assert list(tmp_path.iterdir()) == []


def test_one_client_is_told_as_one() -> None:
    for clients, told in ((1, "1 client ·"), (2, "2 clients ·")):
        settings = {**SETTINGS, "clients": clients, "fraction": 1.0}
        assert f"|{told}" in Texts(page(settings, [record(0)])).text


@pytest.mark.parametrize("name", ROBUST_MEANS)
def test_weights_that_the_mean_ignores_are_not_said_to_count(name: str) -> None:
    ignored = name in ("median", "trimmed-mean", "krum", "multi-krum")
    told = Texts(page({**SETTINGS, "accumulator": {"name": name}}, lively())).text
    assert (f"The mean of this run, {name}, ignores weights" in told) is ignored
    help = " ".join(run_settings._KNOWN["accumulator"].help.split())
    assert (name in help[help.index("; median") :]) is ignored


@pytest.mark.parametrize("accumulator", ["exact", None, ["median"], {"name": ["median"]}, {}])
def test_weights_count_in_any_other_mean(accumulator: object) -> None:
    told = Texts(page({**SETTINGS, "accumulator": accumulator}, lively())).text
    assert "ignores weights" not in told


def test_an_old_page_is_replaced_only_by_force(tmp_path: Path, capsys: Capture) -> None:
    write_settings(tmp_path, SETTINGS)
    append_round(tmp_path, record(0, [accepted("site-1")]))
    out = tmp_path / "page.html"
    out.write_text("precious")
    assert "is there already" in fails(capsys, "report", tmp_path, "-o", out)
    assert out.read_text() == "precious"
    assert run(capsys, "report", tmp_path, "-o", out, "--force")[0] == 0
    assert out.read_bytes() == page(
        json.loads((tmp_path / "run.json").read_bytes()), [record(0, [accepted("site-1")])]
    )


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    told = fails(capsys, "report", tmp_path)
    assert told == f"{tmp_path}: this folder is not from fedavg run; a report needs one"
    write_settings(tmp_path, SETTINGS)
    assert "rounds.jsonl: expected a file of a run" in fails(capsys, "report", tmp_path)
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    assert "line 1 is no round of a run" in fails(capsys, "report", tmp_path)
    assert "could not be written" in fails(
        capsys, "report", run_of(tmp_path / "run"), "-o", tmp_path / "none" / "page.html"
    )
    assert not (tmp_path / "report.html").exists()


def run_of(folder: Path) -> Path:
    folder.mkdir()
    write_settings(folder, SETTINGS)
    append_round(folder, record(0, [accepted("site-1")]))
    return folder


def test_names_from_outside_are_text_and_nothing_else() -> None:
    plain = page(SETTINGS, [record(0, [accepted("a"), refused("b", 9.0), failed("c")])])
    settings = dict(zip(SETTINGS, HOSTILE, strict=False))
    seen = Texts(page(settings, lively()))
    assert set(seen.tags) <= set(Texts(plain).tags)
    assert {name for name, _ in seen.attributes} == {name for name, _ in Texts(plain).attributes}
    assert seen.tags.count("script") == seen.tags.count("style") == 1
    assert HOSTILE[0][:40] in seen.text
    assert "nul\\x00\\x1b[31m\\u202edrawkcab\\ud800" in seen.text
    assert "&lt;&amp;" in seen.text
    assert all(char.isprintable() or char == "\n" for char in seen.text)
    assert all(len(text) <= 400 for text in seen.texts if "\u00fc" in text)


def test_the_tiles_know_how_many_they_are() -> None:
    for told, count in (({}, 5), ({"peak_bytes": None}, 4)):
        seen = Texts(page(SETTINGS, [record(0, [accepted("a")], **told)]))
        assert ("class", f"tiles of-{count}") in seen.attributes
        assert seen.attributes.count(("class", "tile")) == count
    nothing = record(0, [failed("a")], peak_bytes=None, metrics={}, evaluation={})
    assert ("class", "tiles of-3") in Texts(page(SETTINGS, [nothing])).attributes


def test_nothing_in_a_chart_is_scaled_but_its_curves() -> None:
    seen = Texts(page(SETTINGS, lively()))
    boxes = {value for name, value in seen.attributes if name == "viewbox"}
    assert boxes == {"0 0 1000 230", "0 0 16 12"}  # of curves, and of the signs of a legend


def test_the_page_names_no_address() -> None:
    content = page(SETTINGS, [record(number, [accepted("a")]) for number in range(3)])
    assert b"//" not in content.replace(b"'sha256-", b"").split(b"<script>")[0].split(b"<style>")[1]
    assert re.findall(rb"(?:src|href)=\"([^\"]*)\"", content) == [b"data:,"]
    assert b"url(" not in content
    assert b"@import" not in content
    policy = re.search(rb"Content-Security-Policy\" content=\"([^\"]*)\"", content)
    assert policy is not None
    assert policy[1].startswith(b"default-src 'none'; ")
    assert b"unsafe" not in policy[1]


def test_a_run_without_a_round_has_a_page() -> None:
    assert "No round is completed yet." in Texts(page(SETTINGS, [])).text
    assert "a training file" in Texts(page({}, [])).text


def test_a_run_in_which_nothing_is_known_has_a_page() -> None:
    empty = record(
        0,
        [refused("a"), failed("b")],
        metrics={},
        evaluation={"lost": None},
        total_weight=None,
        norm=None,
        seconds={},
        peak_bytes=None,
        problem="too few",
    )
    seen = Texts(page(SETTINGS, [empty]))
    assert "round by round" not in seen.text
    assert "Left out where they were no finite numbers: lost." in seen.text
    assert "of the process" not in seen.texts
    assert "Refused updates without a norm: 1." in seen.text
    assert "|model kept|too few|" in seen.text
    assert "a, round 0\nrefused: NORM" in seen.tips
    assert "b, round 0\nfailed: ValueError" in seen.tips


def test_what_is_under_the_pointer_is_told() -> None:
    there = [accepted("site-1", 5, 2.0), accepted("site-2", 15, None), refused("site-3", 90.0)]
    records = [record(7, there), record(8, there[:1], norm=None, metrics={})]
    seen = Texts(page(SETTINGS, records))
    assert "site-1, round 7\nweight 5\nnorm 2" in seen.tips
    assert "site-2, round 7\nweight 15" in seen.tips
    assert "site-2, round 8\nnot selected" in seen.tips
    assert "round 7\naveraged: 2\nrefused: 90\nglobal model: 0.125" in seen.tips
    assert "round 8\naveraged: 2\nglobal model: none" in seen.tips
    assert "round 7\ntest: 0.375\ntrain: 0.25" in seen.tips
    assert "round 8\ntest: 40%" in seen.tips
    assert "round 8\ntraining: 1.5 s\naveraging: 0.25 s\nevaluation: 0.5 s\ntogether: 2.25 s" in (
        seen.tips
    )
    assert "|site-2|" in seen.text
    assert "|60.0%|" in seen.text
    strengths = [value for name, value in seen.attributes if name == "fill-opacity"]
    assert strengths == ["0.47", "0.47", "1"]
    assert "best: 40% in round 8" in seen.text


def test_the_best_is_by_what_the_metric_means() -> None:
    def tile(**evaluations: Any) -> str:
        records = [
            record(number, [accepted("a")], metrics={}, evaluation={name: value})
            for name, values in evaluations.items()
            for number, value in enumerate(values)
        ]
        return Texts(page(SETTINGS, records)).text

    assert "|test accuracy|50%|best: 75% in round 1|" in tile(accuracy=[0.25, 0.75, 0.75, 0.5])
    assert "|test loss|2|best: 1 in round 1|" in tile(loss=[3, 1, 1, 2])
    assert "|test accuracy|2|best: 3 in round 0|" in tile(accuracy=[3, 1, 2])
    assert "|test size|2|the last|" in tile(size=[3, None, 2])


def test_many_rounds_and_contributors_keep_the_page_small() -> None:
    names = [f"site-{index}" for index in range(1000)]
    records = []
    for number in range(900):
        there = [accepted(names[(number * 7 + i) % 1000], 5 + i, 1.0 + i) for i in range(20)]
        there.append(refused(names[number % 11], 50.0) if number % 2 else failed(names[5]))
        metrics = {f"metric-{index}": float(number) for index in range(12)}
        evaluation = {"accuracy": None if number % 9 else 0.5}
        records.append(record(number, there, metrics=metrics, evaluation=evaluation))
    content = page(SETTINGS, records)
    assert len(content) < 3_000_000
    seen = Texts(content)
    assert "Shown are 40 of 1,000 contributors" in seen.text
    assert "700 more are in the record." in seen.text
    assert "5 more metrics are in the record." in seen.text
    assert any(
        "rounds 0 to 5\naveraged: 120, from 1 to 20\nrefused: 3, from 50" in one
        for one in seen.tips
    )
    assert any(re.search(r"\d accepted, \d failed", tip) for tip in seen.tips)
    assert "The last" not in seen.text
    long = page(SETTINGS, [record(number, [accepted("a")]) for number in range(1200)])
    assert "The last 1,000; the first 200 are in the record." in Texts(long).text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 7, [0, 2, 4, 6, 8]),
        (0.9, 1.3, [0.9, 1.0, 1.1, 1.2, 1.3]),
        (-3, 41, [-10, 0, 10, 20, 30, 40, 50]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 1e-9, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1e300, 1e300), (1e300, 1e300), (0, 5e-324), (1e16, 1e16 + 2), (1, 1 + 3e-16)],
)
def test_ticks_span_what_they_are_asked_for(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) <= 9


@pytest.mark.parametrize(
    ("values", "share", "labels"),
    [
        ([49.88, 49.99], False, ["49.875", "49.900", "49.925", "49.950", "49.975", "50.000"]),
        ([0.9, 0.9025], True, ["90.00%", "90.05%", "90.10%", "90.15%", "90.20%", "90.25%"]),
        ([1000.0, 1000.4], False, ["1,000.0", "1,000.1", "1,000.2", "1,000.3", "1,000.4"]),
        ([0, 7], False, ["0", "2", "4", "6", "8"]),
        ([0, 1e-9], False, ["0", "2e-10", "4e-10", "6e-10", "8e-10", "1e-09"]),
        ([0, 4e9], False, ["0", "1e+09", "2e+09", "3e+09", "4e+09"]),
        ([1 + 1e-9, 1 + 3e-9], False, []),
    ],
)
def test_labels_have_the_decimals_that_their_steps_need(
    values: list[float], share: bool, labels: list[str]
) -> None:
    metric = Metric("accuracy" if share else "loss", [])
    told = [text for _, text in linear(values, metric.tell).marks]
    assert not labels or told == labels
    assert len(set(told)) == len(told)
    size = 100 if share else 1
    numbers = [float(text.rstrip("%").replace(",", "")) / size for text in told]
    steps = np.diff(numbers)
    assert steps == pytest.approx(steps[0], rel=1e-6)
    units = [text for _, text in linear(values, Unit(1.0, "s").tell).marks]
    assert len(set(units)) == len(units)


def test_long_labels_have_room() -> None:
    for step, expected in ((0.25, False), (1e-5, True)):
        records = [record(n, metrics={}, evaluation={"loss": 49.5 + n * step}) for n in (0, 1)]
        seen = Texts(page(SETTINGS, records))
        assert (("class", "chart wide") in seen.attributes) is expected


def test_metrics_that_are_no_numbers_are_named() -> None:
    told = "Left out where they were no finite numbers: far, loss."
    lost = record(0, metrics={}, evaluation={"far": None}, skipped_metrics=("loss",))
    assert told in Texts(page(SETTINGS, [lost])).text
    some = page(SETTINGS, [lost, record(1)])
    assert told in Texts(some).text
    assert b"loss, round by round" in some
    assert "Left out" not in Texts(page(SETTINGS, [record(1)])).text
    none = Texts(page(SETTINGS, [record(1, metrics={}, evaluation={})])).text
    assert "Learning" not in none


def test_values_far_apart_are_on_a_logarithmic_axis() -> None:
    axis = spread([0.01, 5.0, 300.0], "{:g}".format)
    assert axis.logarithmic
    assert [told for _, told in axis.marks] == ["0.01", "0.1", "1", "10", "100", "1000"]
    assert axis.y(1000) < axis.y(300) < axis.y(0.01)
    assert axis.y(10) - axis.y(100) == pytest.approx(axis.y(1) - axis.y(10))
    for values in ([], [0.0, 100.0], [1.0, 20.0], [-5.0, 100.0]):
        assert not spread(values, "{:g}".format).logarithmic
    assert linear([90.0, 100.0], "{:g}".format).low == 90
    assert linear([10.0, 100.0], "{:g}".format).low == 0


@pytest.mark.parametrize("axis_of", [linear, spread])
@pytest.mark.parametrize(
    "values",
    [
        [5e-324, 1.0],
        [5e-324, 2e-322],
        [5e-324, 1.7e308],
        [1e300, 1.7e308],
        [1.7e308],
        [-1.7e308],
        [-1.7e308, 1.7e308],
        [0.0, 1.7e308],
    ],
)
def test_an_axis_is_of_numbers_at_either_end_of_the_range(axis_of: Any, values: Any) -> None:
    axis = axis_of(values, "{:g}".format)
    heights = [axis.y(value) for value in values]
    assert heights == sorted(heights, reverse=True)
    assert all(10 <= height <= 200 for height in heights)
    assert len(axis.marks) >= 2
    assert all(math.isfinite(mark) and 10 <= axis.y(mark) <= 200 for mark, _ in axis.marks)


def test_numbers_without_sense_do_not_break_the_page(tmp_path: Path, capsys: Capture) -> None:
    folder = run_of(tmp_path / "run")
    text = (folder / "rounds.jsonl").read_text()
    for old, new in (
        ('"training": 1.5', '"training": -1e308'),
        ('"norm": 1.0', '"norm": 1e308'),
        ('"weight": 5', '"weight": -1e300'),
        ('"accuracy": 0.0', '"accuracy": NaN, "x": -Infinity, "y": 1e300, "z": -1e300'),
        ('"peak_bytes": 104857600', f'"peak_bytes": {2**62 - 1}'),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "rounds.jsonl").write_text(text)
    assert run(capsys, "report", folder)[0] == 0
    attributes = dict.fromkeys(Texts((folder / "report.html").read_bytes()).attributes)
    assert not [one for one in attributes if re.search("nan|inf$", one[1] or "")]


def test_places_bear_round_numbers() -> None:
    assert list(Places.of(range(12), 100).labels()) == [
        (place, str(place)) for place in range(0, 12, 2)
    ]
    several = Places.of(range(1000), 160)
    assert several.rounds[0] == (0, 1, 2, 3, 4, 5, 6)
    assert several.rounds[-1] == (994, 995, 996, 997, 998, 999)
    assert [told for _, told in several.labels()] == [
        f"{number:,}" for number in range(0, 1000, 200)
    ]
    assert several.name(1) == "rounds 7 to 13"
    assert several.gathered(range(1000))[1] == [7, 8, 9, 10, 11, 12, 13]
    assert list(Places.of([5], 3).labels()) == [(0, "5")]


def test_units_fit_what_is_told() -> None:
    times = [0, 2e-5, 0.25, 1, 59, 61, 7200, 1e7]
    assert [Unit.write(time, TIME) for time in times] == [
        *("0 ms", "0.02 ms", "250 ms", "1 s", "59 s", "1.02 min", "2 h", "2,778 h"),
    ]
    sizes = [1, 5 << 20, 3 << 30, 2 << 40]
    assert [Unit.write(size, MEMORY) for size in sizes] == [
        *("9.54e-07 MiB", "5 MiB", "3 GiB", "2 TiB"),
    ]


def test_elements_take_texts_and_elements_in_any_order() -> None:
    made = element("p", "a", element("b", "c"), "d", ["e", None, [element("i")]], "f", x=0.5)
    assert made.text == "a"
    assert [child.tail for child in made] == ["de", "f"]
    assert made.attrib == {"x": "0.5"}
    assert shown("x" * 100, 5) == "xxxx\u2026"
    assert shown("a\tb") == "a\\tb"


CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)

LOOK = """
window.taken = [];
addEventListener("error", (event) => taken.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => taken.push(event.violatedDirective));
addEventListener("load", () => {
  const hit = document.querySelector(".hit");
  hit.scrollIntoView({block: "center"});
  const box = hit.getBoundingClientRect();
  const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};
  const under = document.elementFromPoint(at.clientX, at.clientY);
  under.dispatchEvent(new PointerEvent("pointermove", at));
  const told = [tip.hidden, tip.textContent, tip.getBoundingClientRect().width > 40];
  document.body.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
  const all = (what, how) => Array.from(document.querySelectorAll(what), how);
  document.body.dataset.found = JSON.stringify({
    told, hiddenAgain: tip.hidden, errors: taken, title: document.title,
    asked: performance.getEntriesByType("resource").map((entry) => entry.name),
    curves: all("svg.chart .curve", (curve) => curve.getTotalLength()),
    stroke: getComputedStyle(document.querySelector("svg.chart .curve")).stroke,
    charts: all("svg.chart", (chart) => chart.getBoundingClientRect().width),
    heights: all("svg text", (text) => text.getBoundingClientRect().height),
    cells: all("svg .cell", (cell) => getComputedStyle(cell).fill).length,
    page: getComputedStyle(document.body).backgroundColor,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    images: document.images.length, scripts: document.scripts.length,
  });
});
"""


def chromium(folder: Path, content: bytes, *arguments: str) -> tuple[str, str]:
    """Opens a page in the browser; its document afterwards, and what the browser said."""
    assert CHROMIUM is not None
    (folder / "page.html").write_bytes(content)
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--disable-background-networking", "--no-first-run"),
            *("--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"),
            *arguments,
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("utf-8"), done.stderr.decode("utf-8", "replace")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
class TestInABrowser:
    """The page in headless Chromium."""

    def scheme(self, name: str) -> str:
        return f"--blink-settings=preferredColorScheme={0 if name == 'dark' else 1}"

    def test_it_is_drawn_answers_the_pointer_and_asks_for_nothing(
        self, tmp_path: Path, scheme: str
    ) -> None:
        content = page({**SETTINGS, "training_file": HOSTILE[0]}, lively())
        start = content.index(b"<script>") + len(b"<script>")
        script = content[start : content.index(b"</script>", start)].decode("utf-8")
        looking = content.replace(script.encode(), (LOOK + script).encode())
        looking = looking.replace(_hash(script).encode(), _hash(LOOK + script).encode())
        told, said = chromium(
            tmp_path,
            looking,
            "--dump-dom",
            f"--window-size={1200 if scheme == 'light' else 600},900",
            self.scheme(scheme),
        )
        assert "CONSOLE" not in said
        match = re.search(r'data-found="([^"]*)"', told)
        assert match is not None
        found = json.loads(html.unescape(match[1]))
        assert found["errors"] == found["asked"] == []
        assert found["told"] == [False, "round 0\ntest: 0%", True]
        assert found["hiddenAgain"] is True
        assert found["title"].startswith("<script>")
        assert (found["images"], found["scripts"]) == (0, 1)
        assert len(found["charts"]) >= 6
        assert all(width > 400 for width in found["charts"])
        assert sum(length > 100 for length in found["curves"]) >= 5
        assert found["cells"] >= 36
        heights = [height for height in found["heights"] if height]  # a name may be empty
        assert 10 < min(heights) <= max(heights) < min(heights) + 0.5
        assert found["wide"] <= 0
        dark = scheme == "dark"
        assert found["page"] == ("rgb(16, 19, 26)" if dark else "rgb(246, 247, 249)")
        assert found["stroke"] == ("rgb(120, 166, 255)" if dark else "rgb(43, 99, 217)")

    def test_its_curves_are_on_the_screen(self, tmp_path: Path, scheme: str) -> None:
        records = [record(number, [accepted("a"), accepted("b", 9)]) for number in range(12)]
        picture = tmp_path / "page.png"
        _, said = chromium(
            tmp_path,
            page(SETTINGS, records),
            f"--screenshot={picture}",
            "--window-size=1200,2000",
            self.scheme(scheme),
        )
        assert "CONSOLE" not in said
        pixels = np.rint(matplotlib.image.imread(picture)[..., :3] * 255)
        dark = scheme == "dark"
        one, two = ((120, 166, 255), (243, 165, 91)) if dark else ((43, 99, 217), (210, 105, 14))
        for colour in (one, two):
            assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 300
        background = (16, 19, 26) if dark else (246, 247, 249)
        assert (pixels == background).all(axis=2).mean() > 0.2
