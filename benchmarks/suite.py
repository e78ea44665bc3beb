"""The benchmarks, in one table.

Each is a function that takes how thorough to be and gives what it found. Inputs are made once,
before any clock runs, and hold for all contestants of a benchmark.
"""
# ruff: noqa: RUF001  (titles have the signs that printed tables have)

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import fedavg_core as fc
from benchmarks.averaging import AVERAGING, averaging, one_round
from benchmarks.growth import Growth, Point, Series, peak_memory, times_by_work
from benchmarks.peers import CONTESTANTS, Server
from benchmarks.timing import Pace, Row, Timing, take_turns
from benchmarks.workloads import (
    MLP_2NN,
    MLP_SMALL,
    ONE_TENSOR,
    WORKLOADS,
    Params,
    WeightedUpdate,
    Workload,
    cut,
    draw_updates,
    resnet50,
)

__all__ = ["BENCHMARKS", "Benchmark", "Result"]

Result: TypeAlias = "Timing | Growth"

_QUICK = Pace(least=3, most=3)
_FEW = Pace(least=3, most=7, budget=6)
_HALF = Pace(least=2, most=7, budget=6)  # NumPy's float16 arithmetic is slow
_HELD = ("resnet50-float32", "llm-float32", "lora-float32")  # to figures that need many laps
_HALF_NAMES = tuple(
    name
    for name in AVERAGING
    if name not in ("exact, 1 thread", "float64") and not name.endswith("add_many of 8")
)
_AT_HAND_NAMES = ("exact", *(name for name in AVERAGING if name.endswith("add_many of 8")),
                  "NVFlare sum", "NVFlare aggregator", "copy")  # fmt: skip
_RING, _MANY = 64, 512  # distinct updates of small models: 51 MB, more than most caches hold
_AT_HAND_CLIENTS = 8
_KINDS_CLIENTS = 3


@dataclass(frozen=True)
class Benchmark:
    """One thing to run.

    Attributes:
        name: On the command line.
        about: What it measures, in a few words.
        run: Given whether to be quick, measures it.
    """

    name: str
    about: str
    run: Callable[[bool], list[Result]]


def _cut(quick: bool) -> str:
    """What a title says of a benchmark that is none."""
    return ", cut down" * quick


def _model(name: str, quick: bool) -> list[Result]:
    workload = cut(WORKLOADS[name]) if quick else WORKLOADS[name]
    names = _HALF_NAMES if workload.dtype == "float16" else AVERAGING
    pace = Pace() if name in _HELD else _HALF if workload.dtype == "float16" else _FEW
    return [averaging(name, workload, names, pace=_QUICK if quick else pace)]


def _at_hand(quick: bool) -> list[Result]:
    title = f"ResNet-50 × {_AT_HAND_CLIENTS}, float32, all at hand"
    workload = Workload("at-hand", title, resnet50, _AT_HAND_CLIENTS, "float32")
    pace = _QUICK if quick else Pace()
    workload = cut(workload) if quick else workload
    return [averaging("at-hand", workload, _AT_HAND_NAMES, pace=pace)]


def _round(quick: bool) -> list[Result]:
    found: list[Result] = []
    for name in ("resnet50-float32", "lora-float32"):
        workload = cut(WORKLOADS[name]) if quick else WORKLOADS[name]
        pace = _QUICK if quick else Pace(least=5, budget=8)
        names = ("exact", "Round", "Round, norm limited", "copy")
        found.append(averaging("round", workload, names, pace=pace, reference="exact"))
    return found


def _tasks(
    benchmark: str,
    title: str,
    timed: str,
    model: Params,
    tasks: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    floor: str = "",
    quick: bool,
    pace: Pace = Pace(budget=8),  # noqa: B008  (frozen)
) -> Timing:
    """Let a few functions that do one thing to a model take turns."""
    for task in tasks.values():
        task()
    taken = take_turns(tasks, _QUICK if quick else pace)
    return Timing(
        benchmark=benchmark,
        title=title,
        timed=timed,
        clients=1,
        elements=sum(array.size for array in model.values()),
        nbytes=sum(array.nbytes for array in model.values()),
        rows=tuple(
            Row(
                name,
                "floor" if name == floor else "peer" if name == reference else "ours",
                taken[name].laps,
                taken[name].cpu,
            )
            for name in tasks
        ),
        reference=reference,
    )


def _one_model(quick: bool) -> tuple[str, Params]:
    workload = cut(WORKLOADS["resnet50-float32"]) if quick else WORKLOADS["resnet50-float32"]
    return f"ResNet-50, float32{_cut(quick)}", draw_updates(workload.shapes, 1)[0][0]


def _small(quick: bool) -> str:
    return "One tensor" if quick else "2NN"


def _transfer(quick: bool) -> list[Result]:
    title, base = _one_model(quick)
    local = {key: array + np.float32(0.01) for key, array in base.items()}
    change = fc.diff(local, base)
    return [
        _tasks(
            "transfer",
            f"{title}: the difference of two models",
            "the difference of every tensor, into new memory",
            base,
            {
                "diff": lambda: fc.diff(local, base),
                "local - base": lambda: {key: local[key] - base[key] for key in base},
            },
            reference="local - base",
            quick=quick,
        ),
        _tasks(
            "transfer",
            f"{title}: a difference applied",
            "the sum of every tensor and its difference, into new memory",
            base,
            {
                "apply": lambda: fc.apply(base, change),
                "base + difference": lambda: {key: base[key] + change[key] for key in base},
            },
            reference="base + difference",
            quick=quick,
        ),
    ]


def _kinds(quick: bool) -> list[Result]:
    workload = WORKLOADS["resnet50-float32"]
    workload = cut(workload) if quick else workload
    rng = np.random.default_rng(0)
    drawn = draw_updates(workload.shapes, _KINDS_CLIENTS)
    narrow = [params for params, _ in drawn]
    weights = [weight for _, weight in drawn]
    shares = [weight / sum(weights) for weight in weights]
    small = [{key: a * np.float32(0.01) for key, a in params.items()} for params in narrow]
    wide = [
        {key: rng.standard_normal(array.shape) for key, array in params.items()}
        for params in narrow
    ]

    def rounds(
        models: Sequence[Params], weights: Sequence[float], base: Params | None = None
    ) -> Callable[[], object]:
        total = fc.WeightedMean()

        def one() -> object:
            total.reset()
            for params, weight in zip(models, weights, strict=True):
                total.add(params, weight)
            return total.mean(base)

        return one

    return [
        _tasks(
            "kinds",
            f"ResNet-50 × {_KINDS_CLIENTS}{_cut(quick)}, exact, by dtype and weights",
            f"one round: {_KINDS_CLIENTS} updates taken, and the mean given",
            narrow[0],
            {
                "float32": rounds(narrow, weights),
                "float32, differences": rounds(small, weights, narrow[0]),
                "float32, weights n / N": rounds(narrow, shares),
                "float64": rounds(wide, weights),
                "float64, weights n / N": rounds(wide, shares),
            },
            reference="float32",
            quick=quick,
            pace=_FEW,
        )
    ]


def _checkpoint(quick: bool) -> list[Result]:
    title, model = _one_model(quick)
    raw = b"".join(array.tobytes() for array in model.values())
    checkpoint = fc.Checkpoint(model=model, round=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, numpys, floor = folder / "ours.npz", folder / "numpys.npz", folder / "raw"

        def savez(flush: bool) -> None:
            with open(numpys, "wb") as file:
                np.savez(file, allow_pickle=False, **model)
                _flush(file, flush)

        def write() -> None:
            with open(floor, "wb") as file:
                file.write(raw)
                _flush(file, True)

        def load() -> Params:
            with np.load(numpys) as stored:
                return {key: stored[key] for key in stored.files}

        return [
            _tasks(
                "checkpoint",
                f"{title}: saved",
                "the model into a file; ours is checksummed, flushed to the disk and renamed",
                model,
                {
                    "save_checkpoint": lambda: fc.save_checkpoint(ours, checkpoint),
                    "np.savez": partial(savez, False),
                    "np.savez, then flushed": partial(savez, True),
                    "raw bytes, then flushed": write,
                },
                reference="np.savez",
                floor="raw bytes, then flushed",
                quick=quick,
            ),
            _tasks(
                "checkpoint",
                f"{title}: loaded",
                "the model out of a file that the system's cache holds; ours checks every byte",
                model,
                {
                    "load_checkpoint": lambda: fc.load_checkpoint(ours),
                    "np.load": load,
                    "raw bytes": floor.read_bytes,
                },
                reference="np.load",
                floor="raw bytes",
                quick=quick,
            ),
        ]


def _flush(file: Any, flush: bool) -> None:
    file.flush()
    if flush:
        os.fsync(file.fileno())


def _federation(quick: bool) -> list[Result]:
    clients = 100 if quick else 10_000
    (model, _), *changes = draw_updates(ONE_TENSOR if quick else MLP_2NN, 1 + _RING)

    def train(params: Params, context: fc.Context) -> fc.TrainResult:
        change, weight = changes[context.index % _RING]
        for key, array in params.items():
            array += change[key]
        return fc.TrainResult(params, weight, {"loss": 0.5})

    names = [f"site-{number}" for number in range(clients)]

    def alone() -> None:
        for number, name in enumerate(names):
            copy = {key: array.copy() for key, array in model.items()}
            train(copy, fc.Context(name, number, clients, 0, 1, 0))

    def federation() -> object:
        return fc.Federation(model, dict.fromkeys(names, train), rounds=1).run()

    taken = take_turns({"clients alone": alone, "Federation": federation}, Pace(least=2, most=3))
    elements = clients * sum(array.size for array in model.values())
    return [
        Timing(
            benchmark="federation",
            title=f"{_small(quick)} × {clients:,}, float32{_cut(quick)}, a federation in process",
            timed="one round: each client gets its copy of the model, adds an array to it and "
            "sends it; alone, nobody averages",
            clients=clients,
            elements=elements,
            nbytes=4 * elements,
            rows=tuple(
                Row(name, "floor" if name == "clients alone" else "ours", each.laps, each.cpu)
                for name, each in taken.items()
            ),
            reference="clients alone",
        )
    ]


def _memory(quick: bool) -> list[Result]:
    shapes = ONE_TENSOR if quick else MLP_2NN
    updates = draw_updates(shapes, 4)
    size = sum(array.nbytes for array in updates[0][0].values())
    names = ("exact", "float64", "float32", "Round", "NVFlare aggregator", "Flower aggregate",
             "Flower records")  # fmt: skip
    found, absent = [], []
    for name in names:
        contestant = CONTESTANTS[name]
        try:
            peak_memory(contestant.make, updates, 2)  # what is loaded late is loaded now
        except ImportError:
            absent.append(name)
            continue
        points = [
            Point(clients, (peak_memory(contestant.make, updates, clients) / size,))
            for clients in ((10, 30, 100) if quick else (10, 30, 100, 300, 1_000))
        ]
        found.append(Series(name, contestant.kind, tuple(points)))
    return [
        Growth(
            benchmark="memory",
            title=f"{_small(quick)} of {size / 1e6:.2f} MB{_cut(quick)}: memory of a round",
            measured="the most that is allocated at any moment of a round beyond what there was "
            "before, the update that arrives and the mean included",
            x="clients",
            y="memory, in models",
            series=tuple(found),
            absent=tuple(absent),
        )
    ]


def _clients(quick: bool) -> list[Result]:
    amounts = (10, 100) if quick else (10, 100, 1_000, 10_000)
    updates = draw_updates(ONE_TENSOR if quick else MLP_SMALL, _MANY)
    return [
        Growth(
            benchmark="clients",
            title=f"{'One tensor' if quick else 'MLP of 25,450'}, float32{_cut(quick)}: "
            "time of a client",
            measured="a round, its mean included, divided by the number of clients",
            x="clients",
            y="time per client, µs",
            series=series,
            absent=absent,
        )
        for series, absent in [_by_clients(updates, amounts)]
    ]


def _by_clients(
    updates: Sequence[WeightedUpdate], amounts: Sequence[int]
) -> tuple[tuple[Series, ...], tuple[str, ...]]:
    tasks, units, kinds, absent = {}, {}, {}, []
    total = amounts[-1]
    for name in ("exact", "float32", "Round", "NVFlare aggregator"):
        try:
            server = CONTESTANTS[name].make()
        except ImportError:
            absent.append(name)
            continue
        kinds[name] = CONTESTANTS[name].kind
        senders = [server.message(*updates[number % len(updates)]) for number in range(total)]
        one_round(server, senders[:10])
        for amount in amounts:
            rounds = -(-total // amount // 10)
            tasks[name, amount] = partial(_rounds, server, senders[:amount], rounds)
            units[name, amount] = rounds * amount
    return times_by_work(tasks, units, kinds, Pace(3, 9, 15), 1e6), tuple(absent)


def _rounds(server: Server, messages: Sequence[Any], rounds: int) -> None:
    for _ in range(rounds):
        one_round(server, messages)


def _sizes(quick: bool) -> list[Result]:
    amounts = [1 << bits for bits in range(10, 18 if quick else 26, 3)]
    updates = {amount: draw_updates({"weight": (amount,)}, 4, seed=amount) for amount in amounts}
    tasks, units, kinds, absent = {}, {}, {}, []
    for name in ("exact", "exact, 1 thread", "float32", "NVFlare aggregator", "copy"):
        contestant = CONTESTANTS[name]
        kinds[name] = contestant.kind
        for amount in amounts:
            try:
                server = contestant.make()
            except ImportError:
                absent.append(name)
                break
            messages = [server.message(*update) for update in updates[amount]]
            rounds = max(1, min(_MANY, amounts[-1] // amount // 8))
            one_round(server, messages)
            tasks[name, amount] = partial(_rounds, server, messages, rounds)
            units[name, amount] = rounds * amount * len(messages)
    return [
        Growth(
            benchmark="sizes",
            title=f"One tensor × 4, float32{_cut(quick)}: time of an element",
            measured="one round, divided by the elements of all updates",
            x="elements of the tensor",
            y="time per element, ns",
            series=times_by_work(tasks, units, kinds, Pace(3, 3 if quick else 7, 10), 1e9),
            absent=tuple(absent),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *(
            Benchmark(name, f"{workload.title}, by everybody", partial(_model, name))
            for name, workload in WORKLOADS.items()
        ),
        Benchmark("at-hand", "ResNet-50 × 8, updates that are at hand together", _at_hand),
        Benchmark("round", "a whole round, gate included, beside the mean alone", _round),
        Benchmark("kinds", "the exact mean by dtype and weights, and of differences", _kinds),
        Benchmark("transfer", "the difference of two models, and its application", _transfer),
        Benchmark("checkpoint", "a checkpoint saved and loaded", _checkpoint),
        Benchmark("federation", "a federation of 10,000 clients in this process", _federation),
        Benchmark("memory", "memory by the number of clients", _memory),
        Benchmark("clients", "time of a client by their number", _clients),
        Benchmark("sizes", "time of an element by the size of the tensor", _sizes),
    )
}
"""By name, in the order in which they are run."""
