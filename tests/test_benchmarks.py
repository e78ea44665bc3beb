"""The benchmarks measure what they say. No test here says anything about speed."""
# ruff: noqa: RUF001  (printed tables have such signs)

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import benchmarks.__main__ as command
import benchmarks.tables as tables
import fedavg_core as fc
from benchmarks import plots, suite
from benchmarks.averaging import averaging
from benchmarks.goals import GOALS, standings
from benchmarks.growth import Growth, Point, Series, peak_memory
from benchmarks.machine import describe_machine
from benchmarks.peers import CONTESTANTS, Server
from benchmarks.suite import BENCHMARKS
from benchmarks.tables import Table, show, table_of_machine, table_of_result
from benchmarks.timing import Pace, Row, Timing, middle, ratio, take_turns
from benchmarks.workloads import (
    MLP_2NN,
    ONE_TENSOR,
    WORKLOADS,
    Shapes,
    WeightedUpdate,
    bert_base,
    cut,
    draw_updates,
    llm_slice,
    lora_adapter,
    resnet50,
)
from fedavg_core.testing import exact_weighted_mean

SMALL: Shapes = {"dense.weight": (3, 4), "dense.bias": (3,), "norm.weight": (3,)}


def server_of(name: str) -> Server:
    contestant = CONTESTANTS[name]
    if contestant.kind == "peer":
        pytest.importorskip(contestant.package)
    return contestant.make()


def mean_of(server: Server, updates: list[WeightedUpdate]) -> dict[str, np.ndarray[Any, Any]]:
    for message in [server.message(params, weight) for params, weight in updates]:
        server.add(message)
    return {key: np.array(array) for key, array in server.arrays(server.mean()).items()}


# Workloads


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        (resnet50(), 161, 25_557_032),
        (bert_base(), 199, 109_482_240),
        (llm_slice(), 2, 2 * 4096 * 11008),
        (lora_adapter(), 1_200, 1_200 * 8_192),
        (MLP_2NN, 6, 199_210),
    ],
    ids=["resnet50", "bert", "llm", "lora", "2nn"],
)
def test_the_shapes_add_up_to_the_published_model(
    shapes: Shapes, tensors: int, parameters: int
) -> None:
    assert len(shapes) == tensors
    assert sum(prod(shape) for shape in shapes.values()) == parameters


def test_resnet50_has_53_convolutions_each_with_a_normalisation() -> None:
    shapes = resnet50()
    kernels = [shape for shape in shapes.values() if len(shape) == 4]
    assert len(kernels) == 53
    assert sum(len(shape) == 1 for shape in shapes.values()) == 2 * 53 + 1
    assert shapes["layer4.2.conv3.weight"] == (2048, 512, 1, 1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_cut_workload_keeps_the_tensors_and_is_small(name: str) -> None:
    whole, small = WORKLOADS[name], cut(WORKLOADS[name], most=1 << 10, clients=2)
    assert list(small.shapes) == list(whole.shapes)[:100]
    assert small.clients == 2
    assert small.parameters < whole.parameters
    assert small.nbytes == small.parameters * np.dtype(whole.dtype).itemsize
    for key, shape in small.shapes.items():
        assert shape[1:] == whole.shapes[key][1:]
        assert prod(shape) <= 1 << 10 or shape[0] == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_updates_are_drawn_apart_with_the_spread_of_their_kind(dtype: str) -> None:
    shapes: Shapes = {"fc.weight": (200, 50), "bn.weight": (500,), "bn.bias": (500,)}
    updates = draw_updates(shapes, 3, dtype)
    again = draw_updates(shapes, 3, dtype)
    assert all(
        fc.same_bits(a[0], b[0]) and a[1] == b[1] for a, b in zip(updates, again, strict=True)
    )
    for key, shape in shapes.items():
        arrays = [params[key] for params, _ in updates]
        assert {array.shape for array in arrays} == {shape}
        assert {array.dtype.name for array in arrays} == {dtype}
        assert not np.shares_memory(arrays[0], arrays[1])
        assert not np.array_equal(arrays[0], arrays[1])
    first = {key: array.astype(np.float64) for key, array in updates[0][0].items()}
    assert first["fc.weight"].std() == pytest.approx(sqrt(2 / 50), rel=0.1)
    assert first["bn.weight"].mean() == pytest.approx(1, abs=0.1)
    assert first["bn.bias"].mean() == pytest.approx(0, abs=0.1)


# Contestants


@pytest.mark.nvflare
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "copy"])
def test_a_contestant_averages_rightly_round_after_round(name: str, dtype: str) -> None:
    server = server_of(name)
    for seed in (1, 2):
        updates = draw_updates(SMALL, 11, dtype, seed=seed)
        before = [fc.ModelSpec.of(params) for params, _ in updates]
        copies = [{key: array.copy() for key, array in params.items()} for params, _ in updates]
        mean = mean_of(server, updates)
        right = exact_weighted_mean([p for p, _ in updates], [w for _, w in updates])
        tolerance = 2e-2 if dtype == "float16" else 1e-5
        assert set(mean) == set(right)
        for key, array in right.items():
            np.testing.assert_allclose(
                mean[key].astype(np.float64),
                array.astype(np.float64),
                rtol=tolerance,
                atol=tolerance,
            )
        assert [fc.ModelSpec.of(params) for params, _ in updates] == before
        assert all(fc.same_bits(p, c) for (p, _), c in zip(updates, copies, strict=True))
        if name.startswith(("exact", "Round")):
            assert fc.same_bits(mean, right)


def test_the_floor_copies_the_bytes_of_every_update() -> None:
    updates = draw_updates(SMALL, 2)
    server = server_of("copy")
    assert fc.same_bits(mean_of(server, updates), updates[-1][0])
    assert fc.same_bits(mean_of(server, updates[:1]), updates[0][0])


def test_a_round_that_refuses_is_not_timed_in_silence() -> None:
    server = server_of("Round")
    bad = server.message({"weight": np.array([np.nan], np.float32)}, 1)
    with pytest.raises(ValueError, match="NON_FINITE"):
        server.add(bad)
    with pytest.raises(ValueError, match="expected a message"):
        server_of("Round").mean()


def test_a_contestant_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.server.strategy.aggregate", None)
    workload = cut(WORKLOADS["lora-float32"], most=8, clients=2)
    timing = averaging("lora", workload, ("exact", "Flower aggregate"), pace=Pace(1, 1))
    assert timing.absent == ("Flower aggregate",)
    assert [row.name for row in timing.rows] == ["exact"]
    assert "not at hand: Flower aggregate" in table_of_result(timing).notes


def test_a_system_that_lacks_a_function_counts_as_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flwr.server.strategy.aggregate", object())
    with pytest.raises(ImportError, match="has no aggregate"):
        CONTESTANTS["Flower aggregate"].make()


def test_what_is_not_correctly_rounded_is_counted() -> None:
    workload = cut(WORKLOADS["resnet50-float32"], most=64, clients=3)
    timing = averaging("x", workload, ("exact", "float32", "copy"), pace=Pace(1, 1))
    found = {row.name: row.misrounded for row in timing.rows}
    assert found["exact"] == 0
    assert found["copy"] is None
    assert found["float32"] is not None
    assert 0.01 < found["float32"] < 0.99


# Timing


def test_tasks_take_turns_and_rivals_far_behind_sit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def task(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])
    disturbed = iter([9.0] + [1.0] * 3)
    tasks = {
        "a": task("a", 9.0),
        "b": task("b", 1.0),
        "c": task("c", 4.0),
        "d": lambda: task("d", next(disturbed))(),
    }
    monkeypatch.setattr("benchmarks.timing.time.process_time", lambda: clock[0] / 2)
    taken = take_turns(tasks, Pace(least=4, most=9, budget=55.0), rivals=["b", "c", "d"])
    laps = ["".join(order[at:end]) for at, end in [(0, 4), (4, 8), (8, 11), (11, 14)]]
    assert ["".join(sorted(lap)) for lap in laps] == ["abcd", "abcd", "abd", "abd"]
    assert taken["a"].laps == (9.0,) * 4
    assert taken["a"].cpu == (4.5,) * 4
    assert taken["c"].laps[:2] == (4.0, 4.0)
    assert all(map(math.isnan, taken["c"].laps[2:] + taken["c"].cpu[2:]))
    assert taken["d"].laps == (9.0, 1.0, 1.0, 1.0)
    assert middle(taken["c"].laps) == 4.0


def test_what_a_first_lap_gives_is_looked_at_once() -> None:
    given = {"a": iter("123"), "b": iter("456")}
    seen: list[object] = []
    take_turns(
        {name: partial(next, each) for name, each in given.items()},
        Pace(least=3, most=3),
        look=lambda name, found: seen.append((name, found)),
    )
    assert sorted(map(str, seen)) == ["('a', '1')", "('b', '4')"]


def test_tasks_take_turns_in_an_order_that_differs_from_lap_to_lap_and_not_from_run_to_run() -> (
    None
):
    def order() -> list[str]:
        began: list[str] = []
        tasks = {name: partial(began.append, name) for name in "abc"}
        assert list(take_turns(tasks, Pace(least=60, most=60))) == list("abc")
        laps = ["".join(began[at : at + 3]) for at in range(0, 180, 3)]
        assert {"".join(sorted(lap)) for lap in laps} == {"abc"}
        return laps

    laps = order()
    assert len(set(laps)) == 6
    assert order() == laps


def test_the_budget_ends_the_laps_after_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def task() -> None:
        clock[0] += 2.0

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])
    assert len(take_turns({"a": task}, Pace(least=3, most=9, budget=7.0))["a"].laps) == 4
    assert len(take_turns({"a": task}, Pace(least=3, most=9, budget=1.0))["a"].laps) == 3
    assert len(take_turns({"a": task}, Pace(least=3, most=9, budget=99.0))["a"].laps) == 9


def test_a_ratio_is_of_medians_over_the_laps_that_both_ran() -> None:
    found = ratio((4.0, 6.0, 10.0, 6.0), (2.0, 2.0, 4.0, math.nan))
    assert (found.value, found.lower, found.upper, found.best) == (3.0, 2.25, 2.75, 2.0)
    assert ratio((3.0,), (2.0,)).upper == 1.5


def test_the_fastest_peer_is_the_reference_unless_one_is_named() -> None:
    rows = (
        Row("exact", "ours", (1.0,), (1.0,)),
        Row("NVFlare sum", "peer", (3.0,), (3.0,)),
        Row("np.average", "peer", (2.0,), (2.0,)),
        Row("copy", "floor", (0.5,), (0.5,)),
    )
    timing = Timing("x", "x", "x", 1, 1, 1, rows)
    assert timing.compared_with() == rows[2]
    assert timing.fastest("NVFlare") == rows[1]
    assert dataclasses.replace(timing, reference="exact").compared_with() == rows[0]
    assert dataclasses.replace(timing, rows=rows[:1]).compared_with() is None


# Growth


class KeepsAll:
    """A server that keeps every message until the mean, or none."""

    def __init__(self, keep: bool) -> None:
        self.kept: list[Any] = []
        self.keep = keep

    def message(self, params: Any, weight: int) -> Any:
        return params, weight

    def add(self, message: Any) -> None:
        if self.keep:
            self.kept.append(message)

    def mean(self) -> Any:
        return None

    def arrays(self, mean: Any) -> Any:
        return mean


def test_peak_memory_sees_what_is_kept_and_nothing_else() -> None:
    updates = draw_updates({"weight": (64, 256)}, 2)
    size = updates[0][0]["weight"].nbytes
    few, many = (peak_memory(lambda: KeepsAll(False), updates, n) for n in (10, 40))
    assert size <= few < 2.2 * size
    assert many < 1.02 * few
    few, many = (peak_memory(lambda: KeepsAll(True), updates, n) for n in (10, 40))
    assert 10 * size <= few < 12 * size
    assert 40 * size <= many < 42 * size


# Goals


def test_each_goal_names_a_benchmark_and_a_contestant_of_it() -> None:
    assert {goal.benchmark for goal in GOALS} <= set(BENCHMARKS)
    assert {goal.benchmark for goal in GOALS} & set(WORKLOADS) == set(suite._HELD)  # to many laps
    assert {goal.ours for goal in GOALS} <= set(CONTESTANTS)
    assert all(
        (goal.reach is None) or (goal.reach > goal.bound) == (goal.measure == "speed")
        for goal in GOALS
    )


def goal_timing(benchmark: str, seconds: dict[str, float], elements: int = 1) -> Timing:
    rows = tuple(
        Row(name, CONTESTANTS[name].kind, (took,), (took / 2,)) for name, took in seconds.items()
    )
    return Timing(benchmark, "x", "x", 1, elements, 1, rows)


def test_a_speed_is_held_against_the_fastest_peer_or_the_system_named() -> None:
    seconds = {"exact": 2.0, "float64": 0.9, "NVFlare sum": 1.0, "Flower aggregate": 0.8}
    found = standings([goal_timing("resnet50-float32", seconds)])
    figures = {(each.goal.ours, each.against): (each.measured.value, each.met) for each in found}
    assert figures == {
        ("float64", "NVFlare sum"): (1.0 / 0.9, True),
        ("exact", "Flower aggregate"): (0.4, False),
    }


@pytest.mark.parametrize(("seconds", "met"), [(1.15, True), (1.16, False)])
def test_the_time_of_a_round_is_held_against_the_mean_alone(seconds: float, met: bool) -> None:
    (found,) = standings([goal_timing("round", {"exact": 1.0, "Round": seconds})])
    assert found.against == "exact"
    assert found.measured.value == seconds
    assert found.cpu == seconds
    assert found.met is met


@pytest.mark.parametrize(("last", "met"), [(1.02, True), (0.5, True), (1.03, False)])
def test_growth_is_held_against_its_own_beginning(last: float, met: bool) -> None:
    series = (Series("exact", "ours", (Point(10, (1.0,)), Point(1_000, (last,)))),)
    (found,) = standings([Growth("memory", "x", "x", "clients", "memory", series)])
    assert found.measured.value == last
    assert found.met is met


def test_without_a_peer_or_the_contestant_nothing_is_claimed() -> None:
    assert standings([goal_timing("llm-float32", {"exact": 1.0})]) == []
    assert standings([goal_timing("llm-float32", {"NVFlare sum": 1.0})]) == []
    assert standings([Growth("memory", "x", "x", "clients", "memory", ())]) == []


# Tables


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_shows_every_cell_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(tables, "find_spec", lambda name: None)
    table = Table(
        "A title", ("", "ms"), (("ours", ("[b]", "1.5")), ("", ("slow", "20"))), ("a note",)
    )
    out = io.StringIO()
    show(table, out)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "A title"
    assert [line.split() for line in lines if "[b]" in line or "slow" in line] == [
        ["[b]", "1.5"],
        ["slow", "20"],
    ]
    assert "a note" in lines


def test_a_timing_is_told_per_client_and_element() -> None:
    timing = dataclasses.replace(
        goal_timing("round", {"exact": 2.0, "copy": 1.0}),
        clients=4,
        elements=10**9,
        nbytes=4 * 10**9,
        reference="exact",
    )
    rows = {cells[0]: cells[1:] for _, cells in table_of_result(timing).rows}
    assert rows["exact"][:4] == ("500", "2.00", "2.00", "1.00")
    assert rows["copy"] == ("250", "1.00", "4.00", "2.00", "2.00–2.00", "2.00", "2.00")


# The command


def run(*arguments: str) -> int:
    return command.main([*arguments])


@pytest.mark.nvflare
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_gives_finite_figures(name: str) -> None:
    with np.errstate(all="ignore"):
        results = BENCHMARKS[name].run(True)
    assert results
    for result in results:
        assert result.benchmark == name
        rows: Iterator[tuple[float, ...]]
        if isinstance(result, Timing):
            assert result.row(result.reference or "exact")
            rows = (row.laps for row in result.rows)
        else:
            assert result.of("exact")
            rows = (point.laps for series in result.series for point in series.points)
        for laps in rows:
            assert 0 < middle(laps) < math.inf
        assert table_of_result(result).rows


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_saved_can_be_read_and_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    assert run("llm-float32", "memory", "sizes", "--quick", "--save", str(folder)) == 0
    out = capsys.readouterr().out
    assert "LLM slice" in out
    assert "memory of a round" in out
    assert "What it is held to" not in out
    stored = json.loads(
        (folder / "results.json").read_text("utf-8"), parse_constant=refuse_constant
    )
    assert stored["format"] == 1
    assert stored["quick"] is True
    assert stored["machine"]["versions"]["numpy"] == np.__version__
    assert [result["benchmark"] for result in stored["results"]] == [
        "llm-float32",
        "memory",
        "sizes",
    ]
    assert {row["name"] for row in stored["results"][0]["rows"]} >= {"exact", "float32", "copy"}
    pictures = sorted(folder.glob("*.png"))
    assert [path.name for path in pictures] == ["memory.png", "sizes.png", "throughput.png"]
    for path in pictures:
        head = path.read_bytes()
        assert head.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(head[16:20], "big") > 500


def test_json_is_all_that_is_printed_when_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", "--quick", "--json") == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)
    assert [result["kind"] for result in printed["results"]] == ["timing", "timing"]
    assert printed["goals"] == []


def test_goals_are_shown_after_a_whole_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = goal_timing("round", {"exact": 1.0, "Round": 1.1})
    entry = dataclasses.replace(BENCHMARKS["round"], run=lambda quick: [timing])
    monkeypatch.setitem(BENCHMARKS, "round", entry)
    assert run("round") == 0
    out = capsys.readouterr().out
    assert "What it is held to" in out
    assert "≤ 1.15×" in out


def test_the_beginning_of_a_name_chooses_all_that_begin_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    for name in ("bert-float32", "bert-float16"):

        def note(quick: bool, name: str = name) -> list[Any]:
            asked.append((name, quick))
            return []

        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], run=note))
    assert run("bert-float16", "bert", "--json") == 0
    assert asked == [("bert-float16", False), ("bert-float32", False)]
    assert json.loads(capsys.readouterr().out)["results"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lor"], "benchmarks: NAME: expected one of resnet50-float32, "),
        (["--fast"], "benchmarks: unrecognized arguments: --fast"),
        (["--save"], "benchmarks: argument --save: expected one argument"),
        (["--save", __file__], "benchmarks: argument --save: expected a folder to write to: "),
        (
            ["--save", f"{__file__}/x"],
            "benchmarks: argument --save: expected a folder to write to: ",
        ),
    ],
)
def test_a_wrong_command_line_gives_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("floor", "drawn", "label"), [(0.8, 1.25, " 1.2"), (0.1, 1.5, "10 ▶ ")])
def test_a_floor_that_is_far_faster_is_cut_off_and_labelled_with_its_figure(
    floor: float, drawn: float, label: str
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    plots._throughput(figure, [goal_timing("lora-float32", {"exact": 1.0, "copy": floor}, 10**9)])
    panel = figure.axes[0]
    bars = [bar for bar in panel.patches if bar.get_height() == 0.8]
    assert [bar.get_width() for bar in bars] == [1.0, drawn]
    assert [text.get_text() for text in panel.texts] == [" 1", label]
    assert panel.get_xlim()[1] > drawn


def test_plots_need_matplotlib_and_say_so_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run("--save", str(tmp_path / "plots"))
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "get the extra 'bench' (in a clone: pip install -e '.[bench]')" in told
    assert not (tmp_path / "plots").exists()


def test_an_interrupt_gives_exit_code_130_and_a_file_that_cannot_be_written_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(quick: bool) -> NoReturn:
        raise KeyboardInterrupt

    original = BENCHMARKS["round"]
    monkeypatch.setitem(BENCHMARKS, "round", dataclasses.replace(original, run=interrupt))
    assert run("round") == 130
    assert capsys.readouterr().err == "benchmarks: interrupted\n"

    found = goal_timing("round", {"exact": 1.0})
    fine = dataclasses.replace(original, run=lambda quick: [found])
    monkeypatch.setitem(BENCHMARKS, "round", fine)
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    (tmp_path / "results.json").mkdir()
    assert run("round", "--save", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("benchmarks: [Errno ")


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (KeyboardInterrupt, 130, "benchmarks: interrupted; what was measured is in {}\n"),
        (BrokenPipeError, 1, ""),
    ],
)
def test_what_was_measured_before_an_end_is_saved(
    end: type[BaseException],
    code: int,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    found = goal_timing("lora-float32", {"exact": 1.0, "NVFlare sum": 0.5})

    def stop(quick: bool) -> NoReturn:
        assert json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]
        raise end

    runs: dict[str, Callable[[bool], Any]] = {"lora-float32": lambda quick: [found], "round": stop}
    for name, play in runs.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], run=play))
    monkeypatch.setattr(command, "drop_output", lambda: None)
    assert run("lora-float32", "round", "--save", str(tmp_path)) == code
    assert capsys.readouterr().err == told.format(tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [result["benchmark"] for result in stored["results"]] == ["lora-float32"]
    assert [goal["goal"]["ours"] for goal in stored["goals"]] == ["exact"]
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_a_reader_who_has_seen_enough_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", "transfer"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_narrow_terminal_is_spared_columns_and_told_which() -> None:
    table = Table(
        "x",
        ("", "speed", "quartiles", "CPU time"),
        (("ours", ("exact", "0.77", "0.74–0.93", "0.41")),),
        ("a note",),
        ("CPU time", "quartiles"),
    )
    assert table.within(36) == table
    cut = table.within(35)
    assert cut.columns == ("", "speed", "quartiles")
    assert cut.rows == (("ours", ("exact", "0.77", "0.74–0.93")),)
    assert cut.notes == ("a note", "not shown, for want of width: CPU time")
    assert table.within(3).columns == ("", "speed")
    assert table.within(3).notes[-1] == "not shown, for want of width: CPU time, quartiles"


@pytest.mark.parametrize(("load", "is_told"), [(None, False), (1.0, False), (1.1, True)])
def test_a_machine_where_others_are_at_work_is_told(load: float | None, is_told: bool) -> None:
    notes = table_of_machine({**describe_machine(), "load": load, "processors": 2}).notes
    assert notes == ("others are at work here: do not rely on what follows",) * is_told


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    for name, entry in BENCHMARKS.items():
        assert name in done.stdout
        assert entry.about in done.stdout


def test_the_machine_is_described_in_json() -> None:
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["processors"] >= 1
    assert machine["python"].startswith("3.")


def test_one_tensor_is_small() -> None:
    assert sum(map(prod, ONE_TENSOR.values())) <= 1 << 12
