"""Follows a job of NVFlare that runs in a process of its own.

NVFlare writes its log to the terminal, prints, and starts processes; so it is kept in a child whose
output goes to a file. Nothing of NVFlare is imported here. What is watched is the folder where a
checkpoint appears after each round, whole or not at all.

Whether the job went well is judged by what it left behind: some versions of NVFlare report success
whatever happened.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import fedavg_core as fc

__all__ = ["ClientLost", "JobFailed", "cause_of_failure", "follow"]

_POLL_SECONDS = 0.05
_STOP_SECONDS = 30
_SILENCE_SECONDS = 5
_ATTEMPTS = 3
_LOG_LINES = 15
_LOST = re.compile(r"((?:Communication error with|Subprocess died for) client .+)")
_NOT_AN_ABORT = "(?!RuntimeError: request to abort the job)"  # that is what others made of it
_REASONS = (
    re.compile(r"^nvflare_adapter: (.+)", re.M),
    re.compile(rf"\.py' is aborted, Traceback.*\n(?: .*\n)*{_NOT_AN_ABORT}(\S.+)"),
    re.compile(r"FATAL_SYSTEM_ERROR received: (.+)"),
    re.compile(r"Failing job \S+ due to (reported failure from .+)"),
    re.compile(
        rf"^{_NOT_AN_ABORT}((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Refused\w*)\b.*)",
        re.M,
    ),
    re.compile(r"^(NVFlare ended the job as .+)", re.M),
)


class JobFailed(Exception):
    """A job did not do what was asked of it.

    Args:
        reason: What went wrong, in one line.
        log: The file of NVFlare's log.
    """

    def __init__(self, reason: str, log: Path) -> None:
        self.reason = reason
        self.log = log
        super().__init__(f"{reason} (NVFlare's log: {log})")

    def tail(self) -> list[str]:
        """The end of NVFlare's log.

        Returns:
            Its last lines.
        """
        return _read(self.log).splitlines()[-_LOG_LINES:]


class ClientLost(JobFailed):
    """NVFlare's simulator lost the process of a client, and would wait for it for ever."""


def follow(
    command: Sequence[str], log: Path, checkpoints: Path, rounds: int, before: int = 0
) -> Iterator[fc.Checkpoint]:
    """Run a command that runs a job, and follow the job.

    Two processes of NVFlare's simulator find each other by a port that another process can take
    from under them; then it loses a client, and waits for it for ever. A job that loses one before
    its first round is over is started anew.

    Args:
        command: The command; its output goes to the log. It ends what it started when interrupted.
        log: The file of NVFlare's log; made, or written on.
        checkpoints: The folder where the job's persistor stores; without checkpoints yet.
        rounds: How many rounds the job has, with those before.
        before: How many were done by the job that this one goes on from, whose last checkpoint it
            stores at its start.

    Yields:
        The checkpoint of each round of its own, in order, as soon as it is stored. To stop before
        the end stops the job.

    Raises:
        JobFailed: The job ended without having stored every round, or lost a client.
    """
    for attempt in range(_ATTEMPTS):
        done = before
        try:
            with contextlib.closing(_attempt(command, log, checkpoints, rounds, before)) as stored:
                for checkpoint in stored:
                    done = checkpoint.round
                    yield checkpoint
            return
        except ClientLost:
            if done > before or attempt == _ATTEMPTS - 1:
                raise


def _attempt(
    command: Sequence[str], log: Path, folder: Path, rounds: int, before: int
) -> Generator[fc.Checkpoint, None, None]:
    with log.open("ab") as output:
        start = output.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen, done, last_news = 0, before, time.monotonic()
    try:
        while True:
            ended = child.poll() is not None
            paths = fc.CheckpointStore(folder).paths() if folder.is_dir() else ()
            for path in paths[seen:]:
                checkpoint = fc.load_checkpoint(path)
                if checkpoint.round > before:
                    done = checkpoint.round
                    yield checkpoint
            if len(paths) > seen:
                seen, last_news = len(paths), time.monotonic()
            if ended:
                break
            if time.monotonic() - last_news > _SILENCE_SECONDS:
                lost = _LOST.findall(_read(log, start))
                if lost:
                    cause = f"NVFlare's simulator lost a client: {lost[0].rstrip(': ')}"
                    raise ClientLost(_failed(done, rounds, cause), log)
                last_news = time.monotonic()
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(child)
    if done < rounds or child.returncode != 0:
        cause = cause_of_failure(log, start) or f"it ended with exit code {child.returncode}"
        raise JobFailed(_failed(done, rounds, cause), log)


def _failed(done: int, rounds: int, cause: str) -> str:
    return f"the job failed after {done} of {rounds} rounds: {cause}"


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child, if it has not ended by itself; on an interrupt it ends those it started."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cause_of_failure(log: Path, start: int = 0) -> str | None:
    """Why a job failed, as far as NVFlare's log tells.

    Args:
        log: The file of the log.
        start: Where in it the job's begins.

    Returns:
        One line; None if there is none to be found.
    """
    found = (pattern.findall(_read(log, start)) for pattern in _REASONS)
    return next((matches[0] for matches in found if matches), None)


def _read(path: Path, start: int = 0) -> str:
    return path.read_bytes()[start:].decode("utf-8", errors="replace")
