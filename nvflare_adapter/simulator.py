"""Runs a training file on NVFlare's simulator, in a process of its own, and follows it.

NVFlare writes its log to the terminal, prints, and starts processes; so `simulate` runs it in a
child whose output goes to a file. The child is this module, run with a `SimulatorJob` as JSON. The
parent imports nothing of NVFlare. It watches the folder where the job's persistor stores a
checkpoint after each round, whole or not at all, and gives them on as they appear.

Whether the job went well is judged by what it left behind: some versions of NVFlare report success
whatever happened.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fedavg_core as fc
from nvflare_adapter.client import FAILURE

__all__ = ["JobFailed", "SimulatorJob", "simulate"]

_JOB = "fedavg"
_POLL_SECONDS = 0.05
_STOP_SECONDS = 20
_LOG_LINES = 15
_MOST_PROCESSES = 16
_REASONS = (
    re.compile(rf"({re.escape(FAILURE)}.+)"),
    re.compile(r"FATAL_SYSTEM_ERROR received: (.+)"),
    re.compile(r"^((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Refused\w*)\b.*)", re.M),
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


@dataclass(frozen=True)
class SimulatorJob:
    """What is to be run, in what JSON holds.

    Attributes:
        train_script: The training file.
        train_args: Its arguments, separated by spaces.
        initial_model: The checkpoint of the model that round 0 starts from; empty for none.
        clients: How many clients to simulate, each in a process of its own; more than 16 take
            turns.
        rounds: How many rounds.
        transfer: ``"FULL"`` or ``"DIFF"``.
        seed: The seed of the job.
        folder: A new folder for NVFlare's workspace and its log.
    """

    train_script: str
    train_args: str
    initial_model: str
    clients: int
    rounds: int
    transfer: str
    seed: int
    folder: str

    @property
    def log(self) -> Path:
        """The file that NVFlare's log goes to."""
        return Path(self.folder) / "nvflare.log"

    @property
    def checkpoints(self) -> Path:
        """Where the job's persistor stores the global models."""
        return Path(self.folder) / _JOB / "server" / "simulate_job" / "models"


def simulate(job: SimulatorJob) -> Iterator[fc.Checkpoint]:
    """Run a job on the simulator.

    Args:
        job: What to run.

    Yields:
        The checkpoint of each round, in order, as soon as it is stored. To stop before the end
        stops the job.

    Raises:
        JobFailed: The job ended without having stored every round.
    """
    with job.log.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "nvflare_adapter.simulator", json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen, folder = 0, job.checkpoints
    try:
        while True:
            ended = child.poll() is not None
            paths = fc.CheckpointStore(folder).paths() if folder.is_dir() else ()
            for path in paths[seen:]:
                yield fc.load_checkpoint(path)
            seen = len(paths)
            if ended:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(child)
    if seen < job.rounds or child.returncode != 0:
        raise JobFailed(_reason(job.log, seen, job.rounds, child.returncode), job.log)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child, if it has not ended by itself; on an interrupt it ends those it started."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _reason(log: Path, seen: int, rounds: int, code: int) -> str:
    text = _read(log)
    found = (pattern.findall(text) for pattern in _REASONS)
    cause = next((matches[0] for matches in found if matches), f"it ended with exit code {code}")
    return f"the job failed after {seen} of {rounds} rounds: {cause}"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def main(argument: str) -> None:
    """What the child does.

    Args:
        argument: The `SimulatorJob` as JSON.
    """
    from nvflare.recipe.sim_env import SimEnv

    from nvflare_adapter.recipe import NumpyFedAvgRecipe

    job = SimulatorJob(**json.loads(argument))
    recipe = NumpyFedAvgRecipe(
        name=_JOB,
        initial_model=fc.load_checkpoint(job.initial_model).model if job.initial_model else None,
        min_clients=job.clients,
        num_rounds=job.rounds,
        train_script=job.train_script,
        train_args=job.train_args,
        params_transfer_type=job.transfer,
        seed=job.seed,
        keep_checkpoints=job.rounds,
        poll_interval=_POLL_SECONDS,
    )
    environment = SimEnv(
        num_clients=job.clients,
        num_threads=min(job.clients, _MOST_PROCESSES),
        workspace_root=job.folder,
    )
    try:
        recipe.execute(environment)
    except RuntimeError as error:  # from NVFlare 2.9 on; what failed stands further up in the log
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
