"""A job, as the command gives it to the process in which NVFlare runs it.

That process is this module, run with the job as JSON. It is started in the same way for each
backend, a module of this package whose `run` runs the job: `simulator`, `poc` or `deployment`. It
ends what it started when it is interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import fedavg_core as fc
from nvflare_adapter.follow import follow

if TYPE_CHECKING:
    from nvflare_adapter.recipe import NumpyFedAvgRecipe

__all__ = ["NAME", "Job", "models_folder", "models_within"]

NAME = "fedavg"
_POLL_SECONDS = 0.05


def models_folder(folder: Path, backend: str) -> Path:
    """Where the global models' checkpoints are stored.

    Args:
        folder: The folder of the job.
        backend: What runs it.

    Returns:
        A folder in it.
    """
    on_simulator = Path(NAME, "server", "simulate_job", "models")
    return folder / (on_simulator if backend == "simulator" else "models")


def models_within(folder: Path) -> Path:
    """Where the checkpoints to go on from are, in a folder that a user names.

    Args:
        folder: A folder of checkpoints, or that of a whole job.

    Returns:
        The folder that has them; the given one if none has.
    """
    places = [folder, *(models_folder(folder, backend) for backend in ("simulator", "poc"))]
    return next((place for place in places if any(place.glob("round-*.npz"))), folder)


@dataclass(frozen=True)
class Job:
    """What is to be run, in what JSON holds.

    Attributes:
        backend: ``"simulator"``, ``"poc"`` or ``"deployment"``.
        train_script: The training file, an absolute path.
        train_args: Its arguments, separated by spaces.
        initial_model: The checkpoint of the model that round 0 starts from; empty for none.
        clients: How many clients there are; more than 16 on the simulator take turns.
        rounds: How many rounds.
        transfer: ``"FULL"`` or ``"DIFF"``.
        seed: The seed of the job.
        folder: A new folder for the log and the models, an absolute path.
        external: Whether each client trains in a process of its own, which NVFlare starts.
        deadline: How many seconds a round waits for its clients; 0 for ever.
        start_from: The folder of another job's models, to go on from its last; empty for none.
        startup_kit: Of a deployment: the folder of an administrator's startup kit.
    """

    backend: str
    train_script: str
    train_args: str
    initial_model: str
    clients: int
    rounds: int
    transfer: str
    seed: int
    folder: str
    external: bool = False
    deadline: int = 0
    start_from: str = ""
    startup_kit: str = ""

    @property
    def log(self) -> Path:
        """The file that NVFlare's log goes to."""
        return Path(self.folder) / "nvflare.log"

    @property
    def models(self) -> Path:
        """The folder of the global models' checkpoints."""
        return models_folder(Path(self.folder), self.backend)

    def run(self) -> Iterator[fc.Checkpoint]:
        """Run the job in a process of its own.

        Returns:
            The checkpoint of each round, in order, as soon as it is stored (see `follow`).
        """
        command = [sys.executable, "-m", "nvflare_adapter.job", json.dumps(asdict(self))]
        done = fc.CheckpointStore(self.start_from).load().round if self.start_from else 0
        return follow(command, self.log, self.models, self.rounds, done)

    def recipe(self) -> NumpyFedAvgRecipe:
        """The job as NVFlare takes it.

        The training file goes by its name, from its own folder: NVFlare does not find a file with
        an absolute path again where it starts it in a process of its own.

        Returns:
            The recipe.
        """
        from nvflare_adapter.recipe import NumpyFedAvgRecipe

        script = Path(self.train_script)
        os.chdir(script.parent)
        start = self.initial_model
        return NumpyFedAvgRecipe(
            name=NAME,
            initial_model=fc.load_checkpoint(start).model if start else None,
            min_clients=self.clients,
            num_rounds=self.rounds,
            train_script=script.name,
            train_args=self.train_args,
            launch_external_process=self.external,
            command=f"{sys.executable} -u",
            params_transfer_type=self.transfer,
            seed=self.seed,
            keep_checkpoints=self.rounds,
            poll_interval=_POLL_SECONDS,
            deadline=self.deadline or None,
            start_from=self.start_from or None,
        )


def main(argument: str) -> None:
    """What the process does.

    Args:
        argument: The `Job` as JSON.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = Job(**json.loads(argument))
    import_module(f"nvflare_adapter.{job.backend}").run(job)


if __name__ == "__main__":
    main(sys.argv[1])
