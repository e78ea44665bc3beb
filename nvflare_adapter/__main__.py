"""``python -m nvflare_adapter``: train a training file, by default the digits, on NVFlare.

The same file runs in this process alone, on NVFlare's simulator, on server and client processes of
NVFlare that are started here, and on a deployment of NVFlare, with the same numbers; what differs
is only who carries the models about. Either way a round ends in a checkpoint, which is kept; a line
of the table is made of it, and the global model in it is tested here.

Everything is written into one new folder. Exit codes: 0, the job was done; 1, it failed, or no
round of it changed the model; 2, something about the command or the training file is wrong; 130, it
was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fedavg_core as fc
from fedavg_core.cli.console import open_console, say, typed, uninterrupted
from fedavg_core.cli.round_table import RoundTable
from fedavg_core.errors import one_line
from fedavg_core.model import copy_params
from fedavg_core.outcome import evaluation_of
from fedavg_core.training_file import TrainingFile
from nvflare_adapter.client import read_training_file
from nvflare_adapter.command_line import BACKENDS, SPEAKER, read_arguments
from nvflare_adapter.follow import JobFailed, cause_of_failure
from nvflare_adapter.job import Job, models_folder, models_within
from nvflare_adapter.report import report_of_outcome, round_checkpoint

__all__ = ["main"]

_GOAL = 0.9


def _in_process(
    read: argparse.Namespace, training: TrainingFile, initial: dict[str, Any]
) -> Iterator[fc.Checkpoint]:
    federation = fc.Federation(
        initial or None,
        clients={f"site-{number}": training.train for number in range(1, read.clients + 1)},
        rounds=read.rounds,
        transfer=fc.TransferType(read.transfer.upper()),
        seed=read.seed,
    )
    with fc.CheckpointStore(models_folder(read.output, read.backend), read.rounds) as store:
        for outcome in federation:
            report = report_of_outcome(outcome)
            checkpoint = round_checkpoint(outcome.model, outcome.round + 1, report)
            store.save(checkpoint)
            yield checkpoint


def _job(read: argparse.Namespace, initial: dict[str, Any]) -> Job:
    """The job for NVFlare; makes the file that it starts from."""
    start = read.output / "initial_model.npz"
    from_file = bool(initial) and read.start_from is None
    if from_file:
        fc.save_checkpoint(start, fc.Checkpoint(model=initial, round=0))
    return Job(
        backend=read.backend,
        train_script=str(read.path.resolve()),
        train_args=read.train_args,
        initial_model=str(start.resolve()) if from_file else "",
        clients=read.clients,
        rounds=read.rounds,
        transfer=read.transfer.upper(),
        seed=read.seed,
        folder=str(read.output.resolve()),
        external=read.external,
        deadline=read.deadline or 0,
        start_from="" if read.start_from is None else str(read.start_from.resolve()),
        startup_kit="" if read.startup_kit is None else str(read.startup_kit.resolve()),
    )


def _evaluate(training: TrainingFile, model: fc.Params) -> dict[str, float]:
    if training.evaluate is None or not model:
        return {}
    return evaluation_of(
        training.call("evaluate", copy_params(model)), f"evaluate, of {training.name}"
    )


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """What there is to say of a round beside its line of the table."""
    yield from report["refused"]
    yield from report["failed"]
    if report["skipped_metrics"]:
        yield f"metrics left out, no finite numbers: {', '.join(report['skipped_metrics'])}"
    if report["problem"] is not None:
        yield report["problem"]


def _run(
    read: argparse.Namespace, training: TrainingFile, initial: dict[str, Any], done: int
) -> None:
    """Run the rounds, printing a line for each as it ends; then say what there is now."""
    console = open_console()
    job = None if read.backend == "in-process" else _job(read, initial)
    where = BACKENDS[read.backend]
    last = read.rounds - 1
    console.print(f"{read.path.name}: {read.clients} clients, rounds {done} to {last}, {where}")
    if not initial:
        console.print("without an initial_model(seed), the clients start from their own models")
    table = RoundTable(console)
    shown = fc.Checkpoint(model=initial, round=done)
    accuracies, problems = {}, []

    def show(checkpoint: fc.Checkpoint) -> None:
        nonlocal shown
        evaluation = _evaluate(training, checkpoint.model)
        with uninterrupted():
            report = checkpoint.extra["report"]
            accepted, weight = len(report["accepted"]), report["total_weight"]
            metrics = report["metrics"]
            table.round(report["round"], accepted, read.clients, weight, metrics, evaluation)
            for note in _notes(report):
                table.note(note)
            accuracies[checkpoint.round - 1] = evaluation.get("accuracy", 0.0)
            problems.append(report["problem"])
            shown = checkpoint

    with console.status(f"round {done} of {done} to {last}") as status:
        try:
            for checkpoint in _in_process(read, training, initial) if job is None else job.run():
                show(checkpoint)
                status.update(f"round {checkpoint.round} of {done} to {last}")
        except KeyboardInterrupt:
            stored = fc.CheckpointStore(models_folder(read.output, read.backend))
            for path in stored.paths():  # some rounds may have ended while the job was stopped
                later = fc.load_checkpoint(path)
                if later.round > shown.round:
                    show(later)
            raise
    if all(problems):
        unchanged = "no round changed the model: "
        if job is None:
            raise fc.FedAvgError(unchanged + problems[-1])
        raise JobFailed(unchanged + (cause_of_failure(job.log) or problems[-1]), job.log)
    saved = read.output / "model.npz"
    fc.save_checkpoint(saved, shown)
    if read.train_script is None:
        hits = [number for number, accuracy in accuracies.items() if accuracy >= _GOAL]
        reached = f"reached in round {hits[0]}" if hits else "not reached"
        final = f"the saved model has {accuracies[last]:.2%}"
        console.print(f"goal of {_GOAL:.0%} test accuracy: {reached}; {final}")
    console.print(f"model saved: {saved}")
    console.print(f"to load it: fedavg_core.load_checkpoint({str(saved)!r}).model")
    if job is not None:
        console.print(f"NVFlare's log: {read.output / job.log.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code.
    """
    read = read_arguments(arguments)
    try:
        training = read_training_file(read.path, read.train_args.split())
        initial = dict(training.first_model(read.seed) or {})
        if read.start_from is not None:
            read.start_from = models_within(read.start_from)
        start = read.start_from
        done = 0 if start is None else fc.CheckpointStore(start).load().round
        if done >= read.rounds:
            expected = f"--rounds: expected more than the {done} that {start} has"
            raise fc.UsageError(f"{expected}, got {read.rounds}")
        if not initial and read.transfer == "diff":
            raise fc.UsageError("--transfer diff: expected an initial_model in the training file")
        read.output.mkdir(parents=True, exist_ok=True)
    except SystemExit:
        return _say(f"{read.path.name} ended by itself, given {read.train_args!r}", 2)
    except (fc.FedAvgError, OSError) as error:
        return _say(str(error), 2)
    except Exception as error:
        return _say(f"{read.path.name} cannot be run: {one_line(error)}", 2)
    try:
        _run(read, training, initial, done)
    except JobFailed as failure:
        code = _say(f"{failure.reason}{_kept(read)}", 1)
        print(f"the end of NVFlare's log, {failure.log}:", file=sys.stderr)
        print(*(f"  {line}" for line in failure.tail()), sep="\n", file=sys.stderr)
        return code
    except fc.UsageError as error:
        return _say(str(error), 2)
    except (fc.FedAvgError, OSError) as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say(_stopped(read, done), 130)
    return 0


def _stopped(read: argparse.Namespace, done: int) -> str:
    """What there is after an interruption, and how to go on.

    Args:
        read: The arguments.
        done: How many rounds were done when the command began.

    Returns:
        One line.
    """
    models, start = models_folder(read.output, read.backend), read.start_from
    kept = ""
    if fc.CheckpointStore(models).paths():
        done, start = fc.CheckpointStore(models).load().round, read.output
        kept = f"; to load the model: fedavg_core.CheckpointStore({str(models)!r}).load().model"
    return f"stopped after {done} of {read.rounds} rounds{kept}{_going_on(read, done, start)}"


def _kept(read: argparse.Namespace) -> str:
    """How to go on with what a job that failed has left, if it has left anything."""
    try:
        done = fc.CheckpointStore(models_folder(read.output, read.backend)).load().round
    except fc.CheckpointError:
        return ""
    return _going_on(read, done, read.output)


def _going_on(read: argparse.Namespace, done: int, start: Path | None) -> str:
    """How to go on with the rounds that are done, where there are some."""
    if start is None or done >= read.rounds:
        return ""
    given = f"--start-from {typed(start)}{' and another --output' if read.own_output else ''}"
    if read.backend == "in-process":
        return f"; the same command without --backend goes on with them on NVFlare, with {given}"
    return f"; the same command goes on with them, with {given}"


def _say(problem: str, code: int) -> int:
    say(problem, SPEAKER)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that NVFlare's processes end too
    sys.exit(main())
