"""``fedavg run``: a federation in this process, of as many clients as are asked for.

The run's folder holds the checkpoints, the record of the run (see `run_log`), and at the end the
model, as ``model.npz``. Whenever it is interrupted, ``--resume`` goes on after the last round whose
checkpoint is there, and ends with the bits of a run that was not interrupted, if the training file
takes all randomness from its context.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from fedavg_core.checkpoint import CheckpointStore, make_folder, replacing
from fedavg_core.cli.arguments import Subparsers
from fedavg_core.cli.console import (
    name_shown,
    open_console,
    outlasting_readers,
    print_json,
    print_line,
    printable,
    say,
    typed,
)
from fedavg_core.cli.run_log import (
    LOG,
    SETTINGS,
    Contribution,
    RoundRecord,
    append_round,
    read_log,
    start_log,
    write_settings,
)
from fedavg_core.cli.run_settings import (
    add_settings,
    settings_of,
    settle,
    training_before,
)
from fedavg_core.cli.training_file import read_training_file
from fedavg_core.cli.watch import Watch
from fedavg_core.cli.workers import Workers
from fedavg_core.codec import write_npz
from fedavg_core.errors import FedAvgError, UsageError, quoted
from fedavg_core.federation import Federation
from fedavg_core.model import Params
from fedavg_core.observer import Observer
from fedavg_core.outcome import Outcome
from fedavg_core.update import TransferType, Update

__all__ = ["add_commands"]

MODEL = "model.npz"
FIRST_MODEL = "first-model.npz"
_KEPT = 3  # checkpoints
_MOST_MEASURED = 4
_MOST_NOTES = 10
_AHEAD = 2  # so many clients for each worker, so that none waits for an earlier one's answer
_WIDTH = 8
_INDENT = " " * 7


def add_commands(commands: Subparsers) -> None:
    """Tell a parser about this command."""
    parser = commands.add_parser(
        "run",
        help="train a model with many clients, simulated on this machine",
        description="Run federated averaging on this machine. TRAIN.py says what a client does: it "
        "has a function train(params, context), called with the model as a dictionary of NumPy "
        "arrays, which returns a fedavg_core.TrainResult. It may have an initial_model(seed), "
        "which makes the first model (without it the first round's mean is the first), and an "
        "evaluate(params), which returns a dictionary of numbers. The clients are called site-1, "
        "site-2, ...; context tells train which of them it is.",
        epilog="The run's folder gets checkpoints, the record that fedavg report shows, and at the "
        "end model.npz. Ctrl-C stops a run; the same command with --checkpoint and --resume goes "
        "on with it. With --resume and with --workers a run has the same bits as without, if "
        "TRAIN.py takes all randomness from context.seed and keeps nothing from round to round.",
    )
    add = parser.add_argument
    add("train", type=Path, metavar="TRAIN.py", help="what a client does")
    add_settings(parser)
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="the run's folder; it is made, or is empty, unless --resume is given (default: a new "
        "one in fedavg-runs, named after the time and TRAIN.py)",
    )
    add(
        "--audit",
        action="store_true",
        help="write an audit file for each round to the folder: audit-00000004.json is of round 4, "
        "which begins after 4 rounds, with the checkpoint round-00000004",
    )
    add(
        "--keep-updates",
        action="store_true",
        help="write audits, and keep all that fedavg verify needs beside them: the updates that "
        "were averaged (those of round 4 in updates-00000004), every checkpoint, and the first "
        "model (first-model.npz); that is a model for each client and round",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in the folder of --checkpoint, with its settings where none are "
        "given; if no round of it is done, or the folder is new or empty, start at round 0 and say "
        "so",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object a round instead of the table; what TRAIN.py prints then goes "
        "to standard error",
    )
    parser.set_defaults(run=_run)


def _run(read: argparse.Namespace) -> int:
    with outlasting_readers():  # a run is worth more than what is shown of it
        return _run_in(read, _folder(read))


def _run_in(read: argparse.Namespace, folder: Path) -> int:
    settle(read, folder)
    with _Lines() if read.json else _Table(read) as display:
        model, done, problem = _play(read, folder, display)
    with replacing(folder / MODEL) as file:
        write_npz(file, model)
    if not read.json:
        print_line(f"model: {folder / MODEL}")
        print_line(f"to see how it went: fedavg report {typed(folder)} -o report.html")
        if read.keep_updates:
            print_line(f"to check the last round: {_check(folder, done - 1)}")
    if problem is not None:
        raise FedAvgError(f"the model is written, but no round could be evaluated: {problem}")
    return 0


def _play(
    read: argparse.Namespace, folder: Path, display: _Lines | _Table
) -> tuple[Params, int, str | None]:
    """Play the rounds that are left.

    Returns:
        The model, of how many rounds it is, and why none of these could be evaluated.
    """
    training = read_training_file(read.train)
    with contextlib.ExitStack() as stack:
        workers = None
        if read.workers > 1:
            workers = stack.enter_context(Workers(read.train, read.workers, quiet=read.json))
        watch = Watch(display.progress, workers)
        first = training.first_model(read.seed)
        recorder = _Recorder(folder, read, watch, first)
        federation = Federation(
            first,
            clients={f"site-{number}": training.train for number in range(1, read.clients + 1)},
            rounds=read.rounds,
            participation=read.fraction,
            transfer=TransferType(read.transfer.upper()),
            accumulator=read.accumulator,
            seed=read.seed,
            audit=read.audit,
            server_optimizer=read.optimizer,
            executor=watch,
            in_flight=1 if workers is None else _AHEAD * read.workers,
            evaluate=None
            if training.evaluate is None
            else watch.timed(partial(training.call, "evaluate")),
            stop_when=recorder.keep,
            observers=(recorder, watch),
            checkpoint=folder,
            keep=read.rounds if read.keep_updates else _KEPT,
            resume=read.resume and bool(CheckpointStore(folder).paths()),
        )
        before = federation.round
        if read.resume and before >= read.rounds:
            say(f"all {before} rounds are done; a larger --rounds adds to them")
        shown = 0
        try:
            for _ in federation:
                display.round(recorder.records[shown])
                shown += 1
        except KeyboardInterrupt:
            done = _rounds_stored(folder)
            for record in recorder.records[shown : done - before]:
                display.round(record)
            raise KeyboardInterrupt(
                f"interrupted; {done} of {read.rounds} rounds are done, and the same command goes "
                f"on with them, with --checkpoint {typed(folder)} --resume"
            ) from None
    if before == 0 and all(one.problem for one in recorder.records):
        raise FedAvgError(f"no round changed the model: {recorder.records[-1].problem}")
    problems = [one.evaluation_problem for one in recorder.records]
    problem = problems[-1] if problems and all(problems) else None
    return federation.model, federation.round, problem


def _rounds_stored(folder: Path) -> int:
    """Of how many rounds the newest checkpoint is."""
    paths = CheckpointStore(folder).paths()
    return int(paths[-1].stem.split("-")[1]) if paths else 0


def _folder(read: argparse.Namespace) -> Path:
    """The run's folder, which may be there only if a run is to be resumed, or empty."""
    folder: Path | None = read.checkpoint
    if folder is None:
        if read.resume:
            raise UsageError("--resume: expected --checkpoint DIR as well")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-4]
        return Path("fedavg-runs") / f"{stamp}-{read.train.stem}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--checkpoint: expected a folder, got {folder}")
    if not read.resume and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"--checkpoint: expected a new or empty folder, or --resume as well, got {folder}"
        )
    if read.resume:
        _see_that_it_is_a_run(folder)
    return folder


def _see_that_it_is_a_run(folder: Path) -> None:
    """Refuse a folder without checkpoints that has something else in it, or did have them."""
    if not folder.exists() or CheckpointStore(folder).paths():
        return
    if not (folder / SETTINGS).exists():
        if any(not one.name.startswith(".") for one in folder.iterdir()):
            raise UsageError(
                f"--resume: expected the folder of a run, or a new or empty one, got {folder}, "
                f"which has neither checkpoints nor a {SETTINGS}"
            )
    elif (folder / LOG).exists():
        done = len(read_log(folder)) - 1  # the last may have been interrupted
        if done > 0:
            raise UsageError(
                f"--resume: expected a checkpoint of the {done} rounds that {folder / LOG} tells "
                f"of, got none in {folder}"
            )


def _say_where(read: argparse.Namespace, folder: Path, done: int) -> None:
    """Tell what a run that is resumed goes on from."""
    if done == 0:
        say(f"nothing to resume in {folder}: starts at round 0")
    elif (before := training_before(read.train, folder)) is None:
        return
    elif before == read.train.name:
        say(
            f"{read.train} has changed since the rounds that are done; those that are left are "
            "played with it as it is now"
        )
    else:
        say(
            f"the rounds that are done were played with {name_shown(before)}; those that are left "
            f"are played with {read.train}"
        )


def _check(folder: Path, round: int) -> str:
    """The command that averages the updates of a round again."""
    base = folder / (f"round-{round:08d}.npz" if round else FIRST_MODEL)
    parts = [f"fedavg verify {typed(folder / f'audit-{round:08d}.json')}"]
    parts.append(f"{typed(folder / f'updates-{round:08d}')}/*.npz")
    return " ".join([*parts, *([f"--base {typed(base)}"] if base.exists() else [])])


class _Recorder(Observer):
    """Keeps the record of the run, each round before its checkpoint is written."""

    def __init__(
        self, folder: Path, read: argparse.Namespace, watch: Watch, first: Params | None
    ) -> None:
        self._folder = folder
        self._first = first
        self._read = read
        self._watch = watch
        self._begun = False
        self._updates = folder
        self.records: list[RoundRecord] = []

    def round_started(self, round: int, contributors: Sequence[str]) -> None:
        """Begin the record; only now no other writer can be in the folder."""
        if not self._begun:
            if self._read.resume:
                _say_where(self._read, self._folder, round)
            write_settings(self._folder, settings_of(self._read, self._folder))
            start_log(self._folder, round)
            self._begun = True
        if self._read.keep_updates:
            self._updates = self._folder / f"updates-{round:08d}"
            # Of the same round, if a run was interrupted in it.
            shutil.rmtree(self._updates, ignore_errors=True)
            make_folder(self._updates)
            if round == 0 and self._first is not None:
                with replacing(self._folder / FIRST_MODEL) as file:
                    write_npz(file, self._first)

    def update_accepted(self, update: Update) -> None:
        """Keep an update, if they are to be kept."""
        if self._read.keep_updates:
            params = {key: np.asarray(value) for key, value in update.params.items()}
            with replacing(self._updates / f"{update.contributor}.npz") as file:
                write_npz(file, params)

    def keep(self, outcome: Outcome) -> bool:
        """Write the line of a round; as `stop_when`, which is asked before the checkpoint."""
        record = self._watch.record(outcome)
        append_round(self._folder, record)
        if outcome.audit is not None:
            with replacing(self._folder / f"audit-{outcome.round:08d}.json") as file:
                file.write(outcome.audit.to_text().encode())
        self.records.append(record)
        return False


class _Lines(contextlib.ExitStack):
    """A JSON object for each round; what a training file prints goes to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._out = sys.stdout
        self.enter_context(contextlib.redirect_stdout(sys.stderr))

    def progress(self, round: int, done: int, selected: int) -> None:
        """Nothing is shown while clients train."""

    def round(self, record: RoundRecord) -> None:
        """Print a round."""
        print_json(record.to_json(), self._out)


class _Table(contextlib.ExitStack):
    """A line for each round; on a terminal also a bar while its clients train."""

    def __init__(self, read: argparse.Namespace) -> None:
        from rich import progress

        super().__init__()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=open_console(),
            transient=True,
        )
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=None)
        self._last = read.rounds - 1
        self._measured: dict[str, tuple[str, str]] = {}
        self._columns: dict[str, Callable[[RoundRecord], str]] = {}
        self.enter_context(self._bar)

    def progress(self, round: int, done: int, selected: int) -> None:
        """Move the bar."""
        self._bar.update(
            self._task,
            description=f"round {round} (0 to {self._last})",
            completed=done,
            total=selected,
        )

    def round(self, record: RoundRecord) -> None:
        """Print a round."""
        self._measured.update(_measured(record))
        columns = _columns(self._measured)
        if columns.keys() != self._columns.keys():
            self._columns = columns
            self._bar.console.print(self._line(list(self._columns)), style="bold")
        self._bar.console.print(self._line([cell(record) for cell in self._columns.values()]))
        for note in _notes(record):
            self._bar.console.print(f"{_INDENT}{printable(note)}", style="yellow")

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(max(_WIDTH, len(title)))
            for title, cell in zip(self._columns, cells, strict=True)
        )


def _measured(record: RoundRecord) -> dict[str, tuple[str, str]]:
    """What a round has metrics of: title, and where it is."""
    measured = {f"train {name}": ("metrics", name) for name in record.metrics}
    measured.update({f"test {name}": ("evaluation", name) for name in record.evaluation})
    return measured


def _columns(measured: Mapping[str, tuple[str, str]]) -> dict[str, Callable[[RoundRecord], str]]:
    """What to show of each round: title, and how to get it."""
    return {
        "round": lambda one: str(one.round),
        "accepted": lambda one: f"{one.count('accepted')} of {len(one.contributions)}",
        "weight": lambda one: f"{one.total_weight or 0:,.6g}",
        **{
            name_shown(title): partial(_cell, field, name)
            for title, (field, name) in islice(measured.items(), _MOST_MEASURED)
        },
        "seconds": lambda one: f"{sum(one.seconds.values()):.2f}",
    }


def _cell(field: str, name: str, record: RoundRecord) -> str:
    value = getattr(record, field).get(name)
    return "-" if value is None else f"{value:.4f}"


def _notes(record: RoundRecord) -> Iterator[str]:
    """What there is to say of a round beside its line of the table."""
    told = [
        f"{one.contributor} {one.status}: {_why(one, record.round)}"
        for one in record.contributions
        if one.status != "accepted"
    ]
    yield from told[:_MOST_NOTES]
    if len(told) > _MOST_NOTES:
        yield f"and {len(told) - _MOST_NOTES} more"
    if record.skipped_metrics:
        yield f"metrics left out, no finite numbers: {', '.join(record.skipped_metrics)}"
    if record.problem is not None:
        yield record.problem
    if record.evaluation_problem is not None:
        yield record.evaluation_problem


def _why(one: Contribution, round: int) -> str:
    """Why a client's update was not averaged, without what its line of the table says already."""
    head = f"{one.reason} (contributor {quoted(one.contributor)}, round {round}"
    key, told, words = one.detail.removeprefix(head).partition("): ")
    if one.status == "failed" or not told or not one.detail.startswith(head):
        return one.detail
    return f"{words} ({one.reason}{key})"
