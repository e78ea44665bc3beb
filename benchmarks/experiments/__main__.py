"""``python -m benchmarks.experiments``: how many rounds federated averaging takes, as a table.

Exit codes: 0, it was played and shown; 2, the command line or the data are wrong; 130, interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TypeVar

import fedavg_core as fc
from benchmarks.experiments.data import digits, mnist
from benchmarks.experiments.paper import figure
from benchmarks.experiments.play import Experiment, Found, Setting, play
from benchmarks.experiments.split import SPLITS
from benchmarks.tables import Table, show
from fedavg_core.cli.arguments import Parser
from fedavg_core.errors import quoted

__all__ = ["main"]

T = TypeVar("T")


class _Parser(Parser):
    speaker = "experiments"


def _several(parse: Callable[[str], T], expected: str) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        try:
            return [parse(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {expected}, with commas between them, got {quoted(text)}"
            ) from None

    return read


def _checked(value: float, fine: bool) -> float:
    if not fine:
        raise ValueError(value)
    return value


def _fraction(text: str) -> float:
    return _checked(float(text), 0 <= float(text) <= 1)


def _rate(text: str) -> float:
    return _checked(float(text), 0 < float(text) < 1e6)


def _whole(text: str) -> int:
    return int(_checked(int(text), int(text) >= 1))


def _batch(text: str) -> int | None:
    return None if text == "all" else _whole(text)


def _split(text: str) -> str:
    if text not in SPLITS:
        raise ValueError(text)
    return text


def _read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks.experiments",
        description="Rounds of federated averaging to a test accuracy, after McMahan et al. 2017.",
    )
    add = parser.add_argument
    add("--mnist", type=Path, metavar="FOLDER", help="where the four files of MNIST are")
    add("--splits", type=_several(_split, "iid or non-iid"), default=list(SPLITS))
    add(
        "--fractions",
        type=_several(_fraction, "numbers from 0 to 1"),
        help="C; 0 is one client a round (default: 0,0.1,0.2,0.5,1)",
        default=[0.0, 0.1, 0.2, 0.5, 1.0],
    )
    add(
        "--batches",
        type=_several(_batch, "whole numbers or all"),
        help="B; all of a client's examples, or so many (default: all,10)",
        default=[None, 10],
    )
    add("--epochs", type=_several(_whole, "whole numbers"), default=[1], help="E (default: 1)")
    add(
        "--rates",
        type=_several(_rate, "numbers above 0"),
        default=[0.1],
        help="learning rates, of which the best counts (default: 0.1)",
    )
    add("--clients", type=_whole, help="how many (default: 100; of the digits 20)")
    add("--rounds", type=_whole, help="after which to give up (default: 5000; of the digits 300)")
    add("--goal", type=_fraction, help="the test accuracy (default: 0.97; of the digits 0.93)")
    add("--seed", type=int, default=0)
    add("--save", type=Path, metavar="FILE", help="write the curves there, as JSON")
    return parser.parse_args(arguments)


def _experiment(read: argparse.Namespace) -> Experiment:
    if read.mnist is None:
        base = Experiment("digits", digits(), (32,), clients=20, goal=0.93, rounds=300)
    else:
        data = mnist(read.mnist)
        base = Experiment("MNIST, 2NN", data, (200, 200), clients=100, goal=0.97, rounds=5000)
    given = {name: getattr(read, name) for name in ("clients", "rounds", "goal")}
    return dataclasses.replace(base, **{k: v for k, v in given.items() if v is not None})


def _table(experiment: Experiment, found: Sequence[Found], with_paper: bool) -> Table:
    rows = []
    for one in found:
        setting = one.setting
        cells = [
            setting.split,
            f"{setting.fraction:g}",
            "all" if setting.batch is None else str(setting.batch),
            str(setting.epochs),
            f"{one.rate:g}",
            "not reached" if one.rounds is None else f"{one.rounds:,.0f}",
            f"{max(one.accuracies):.2%}",
            f"{one.seconds:.1f}",
        ]
        if with_paper:
            paper = figure(setting.split, setting.fraction, setting.batch, setting.epochs)
            cells.insert(6, paper)
        rows.append(("", tuple(cells)))
    columns = ["split", "C", "B", "E", "rate", f"rounds to {experiment.goal:.0%}"]
    columns += ["table 1"] * with_paper + ["best", "seconds"]
    notes = [f"{experiment.clients} clients, at most {experiment.rounds:,} rounds"]
    if with_paper:
        notes.append("table 1: of McMahan et al. 2017, whose learning rates were tuned")
    return Table(
        f"Federated averaging: {experiment.name}", tuple(columns), tuple(rows), tuple(notes)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the settings, and show a table.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code.
    """
    read = _read_arguments(arguments)
    found = []
    try:
        experiment = _experiment(read)
        settings = product(read.splits, read.fractions, read.batches, read.epochs)
        for setting in (Setting(*one) for one in settings):
            tries = [play(experiment, setting, rate, read.seed) for rate in read.rates]
            found.append(min(tries, key=lambda one: (one.rounds is None, one.rounds or 0)))
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        show(_table(experiment, found, read.mnist is not None), sys.stdout)
        if read.save is not None:
            entries = [dataclasses.asdict(one) for one in found]
            read.save.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    except (fc.FedAvgError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if found:
            show(_table(experiment, found, read.mnist is not None), sys.stdout)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
