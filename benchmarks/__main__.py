"""``python -m benchmarks``: measure everything, or what is named, and print tables.

Exit codes: 0, it was measured and shown; 1, something could not be written, or nobody read on; 2,
the command line is wrong; 130, it was interrupted (what `--save` has by then stays). A goal that is
missed is shown and is no failure: a time depends on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.goals import Standing, standings
from benchmarks.machine import describe_machine
from benchmarks.plots import save_plots
from benchmarks.suite import BENCHMARKS, Benchmark, Result
from benchmarks.tables import show, table_of_machine, table_of_result, table_of_standings
from benchmarks.timing import Timing
from fedavg_core.cli.arguments import Parser
from fedavg_core.cli.console import drop_output, say
from fedavg_core.errors import not_installed, quoted

__all__ = ["main"]

_FORMAT = 1
_SPEAKER = "benchmarks"


class _Parser(Parser):
    speaker = _SPEAKER


def _read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks",
        description="Measure the engine beside its peers, in turn, and print tables.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benchmarks:\n"
        + "\n".join(f"  {name:18} {entry.about}" for name, entry in BENCHMARKS.items()),
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a benchmark, or what the names of some begin with, up to a hyphen (default: all)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="write results.json there, after each benchmark, and PNG plots at the end",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="cut-down models and 3 laps: shows that all works, and little about speed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    read = parser.parse_args(arguments)
    read.benchmarks = []
    for name in read.names or BENCHMARKS:
        chosen = [
            entry
            for known, entry in BENCHMARKS.items()
            if known == name or known.startswith(f"{name}-")
        ]
        if not chosen:
            parser.error(f"NAME: expected one of {', '.join(BENCHMARKS)}, got {quoted(name)}")
        read.benchmarks += [entry for entry in chosen if entry not in read.benchmarks]
    if read.save is not None:
        if find_spec("matplotlib") is None:
            parser.error(f"argument --save: {not_installed({'matplotlib': 'bench'})}")
        try:
            read.save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --save: expected a folder to write to: {error}")
    return read


_QUICK_NOTE = (
    "--quick: models of toy sizes, a few laps. This shows that everything runs; no figure in it "
    "says how fast anything is."
)


def _measure(chosen: Sequence[Benchmark], quick: bool) -> Iterator[Result]:
    """Run benchmarks one after another, telling on the terminal which is under way."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # NVFlare logs each update that it takes
    try:
        for number, entry in enumerate(chosen, start=1):
            if sys.stderr.isatty():
                print(f"[{number}/{len(chosen)}] {entry.name} …", file=sys.stderr, flush=True)
            with np.errstate(all="ignore"):  # peers may overflow
                yield from entry.run(quick)
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class _Measured:
    """All that was found so far.

    Attributes:
        machine: What it was found on.
        quick: Whether it says little about speed.
        results: Of the benchmarks that are done.
    """

    machine: dict[str, Any]
    quick: bool
    results: list[Result]

    def standings(self) -> list[Standing]:
        """How it stands to the goals; nothing of what is quick."""
        return [] if self.quick else standings(self.results)

    def text(self) -> str:
        """It as JSON."""
        document = {
            "format": _FORMAT,
            "quick": self.quick,
            "machine": self.machine,
            "results": [
                {
                    "kind": "timing" if isinstance(result, Timing) else "growth",
                    **dataclasses.asdict(result),
                }
                for result in self.results
            ],
            "goals": [dataclasses.asdict(standing) for standing in self.standings()],
        }
        return json.dumps(_plain(document), indent=1)


def _plain(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for.

    Args:
        arguments: The command line without the program's name; the process's own if None.

    Returns:
        The exit code.
    """
    read = _read_arguments(arguments)
    start = time.perf_counter()
    measured = _Measured(describe_machine(), read.quick, [])
    code = 0
    try:
        try:
            _report(read, measured)
        except KeyboardInterrupt:
            is_kept = read.save is not None and measured.results
            kept = f"; what was measured is in {read.save}" if is_kept else ""
            say(f"interrupted{kept}", _SPEAKER)
            code = 130
        except BrokenPipeError:  # nobody reads on
            drop_output()
            code = 1
        if read.save is not None and measured.results:
            save_plots(measured.results, read.save)
    except OSError as error:
        say(str(error), _SPEAKER)
        return 1
    if sys.stderr.isatty() and not code:
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return code


def _report(read: argparse.Namespace, measured: _Measured) -> None:
    """Measure, and show each result as soon as it is there."""
    if not read.json:
        if read.quick:
            print(_QUICK_NOTE, end="\n\n")
        show(table_of_machine(measured.machine), sys.stdout)
    for result in _measure(read.benchmarks, read.quick):
        measured.results.append(result)
        if read.save is not None:
            _write(read.save, measured)
        if not read.json:
            show(table_of_result(result), sys.stdout)
            sys.stdout.flush()
    if read.json:
        print(measured.text())
    elif read.quick:
        print(_QUICK_NOTE)
    elif found := measured.standings():
        show(table_of_standings(found), sys.stdout)
    sys.stdout.flush()


def _write(folder: Path, measured: _Measured) -> None:
    (folder / "results.json").write_text(measured.text() + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
