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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fedavg_core.atomic_file import make_folder, replacing
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.cli.arguments import Subparsers
from fedavg_core.cli.console import (
    name_shown,
    outlasting_readers,
    print_line,
    say,
    typed,
    uninterrupted,
)
from fedavg_core.cli.run_display import Lines, Table
from fedavg_core.cli.run_folder import (
    FIRST_MODEL,
    MODEL,
    audit_file,
    base_file,
    folder_of,
    rounds_stored,
    updates_folder,
)
from fedavg_core.cli.run_log import (
    LOG,
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
from fedavg_core.cli.watch import Watch
from fedavg_core.cli.workers import Workers
from fedavg_core.codec.npz import write_npz
from fedavg_core.errors import FedAvgError
from fedavg_core.federation import Federation
from fedavg_core.model import Params
from fedavg_core.observer import Observer
from fedavg_core.outcome import Outcome
from fedavg_core.training_file import read_training_file
from fedavg_core.update import TransferType, Update

__all__ = ["add_commands"]

_KEPT = 3  # checkpoints
_AHEAD = 2  # so many clients for each worker, so that none waits for an earlier one's answer


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
        "which begins after 4 rounds, with the checkpoint round-00000004.npz",
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
        return _run_in(read, folder_of(read.train, read.checkpoint, read.resume))


def _run_in(read: argparse.Namespace, folder: Path) -> int:
    settle(read, folder)
    if read.json and read.checkpoint is None:
        say(f"the run's folder: {folder}")
    with Lines() if read.json else Table(read.rounds) as display:
        model, done, trouble = _play(read, folder, display)
    with replacing(folder / MODEL) as file:
        write_npz(file, model)
    if not read.json:
        print_line(f"model: {folder / MODEL}")
        print_line(f"to see how it went: fedavg report {typed(folder)} -o report.html")
        if read.keep_updates:
            print_line(f"to check the last round: {_command_to_verify(folder, done - 1)}")
    if trouble is not None:
        raise FedAvgError(f"the model is written, but {trouble}")
    return 0


def _play(
    read: argparse.Namespace, folder: Path, display: Lines | Table
) -> tuple[Params, int, str | None]:
    """Play the rounds that are left.

    Returns:
        The model, of how many rounds it is, and what is wrong with it; None if nothing.
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
                with uninterrupted():
                    display.round(recorder.records[shown])
                    shown += 1
        except KeyboardInterrupt:
            done = rounds_stored(folder)
            for record in recorder.records[shown : done - before]:
                display.round(record)
            raise KeyboardInterrupt(
                f"interrupted; {done} of {read.rounds} rounds are done, and the same command goes "
                f"on with them, with --checkpoint {typed(folder)} --resume"
            ) from None
    return federation.model, federation.round, _trouble(folder, before)


def _trouble(folder: Path, before: int) -> str | None:
    """What is wrong with the model after a run, or the part of one after some rounds.

    Raises:
        FedAvgError: It is the one that the run began with.
    """
    records = read_log(folder) if (folder / LOG).exists() else []
    recent = records[before:] or records
    if records and all(one.problem for one in records):
        raise FedAvgError(f"no round changed the model: {records[-1].problem}")
    if recent and all(one.problem for one in recent):
        return f"no round since round {before - 1} changed it: {recent[-1].problem}"
    if recent and all(one.evaluation_problem for one in recent):
        return f"no round could be evaluated: {recent[-1].evaluation_problem}"
    return None


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


def _command_to_verify(folder: Path, round: int) -> str:
    """The command that averages the updates of a round again."""
    base = base_file(folder, round)
    parts = [f"fedavg verify {typed(audit_file(folder, round))}"]
    parts.append(f"{typed(updates_folder(folder, round))}/*.npz")
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
            self._updates = updates_folder(self._folder, round)
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
            with replacing(audit_file(self._folder, outcome.round)) as file:
                file.write(outcome.audit.to_text().encode())
        self.records.append(record)
        return False
