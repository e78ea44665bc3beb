"""Jobs on a deployment of NVFlare: server and clients are processes that talk gRPC."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare")
pytest.importorskip("rich")

import psutil

import fedavg_core as fc
from nvflare_adapter import read_training_file
from nvflare_adapter.poc import Poc, deployed
from tests.nvflare import training

# One after the other, beside those on the simulator.
pytestmark = [pytest.mark.simulator, pytest.mark.poc, pytest.mark.xdist_group("poc")]

FILES = Path(training.__file__).parent
CLIENTS = ["site-1", "site-2", "site-3"]


@pytest.fixture(scope="module")
def poc() -> Iterator[Poc]:
    with deployed(CLIENTS) as running:
        yield running
    assert running.processes() == []


class Command:
    """The command, under way."""

    def __init__(self, folder: Path, script: str, *arguments: Any, clients: int = 3) -> None:
        self.output = folder
        self.out, self.error = folder.with_suffix(".out"), folder.with_suffix(".err")
        given = [FILES / script, "--clients", clients, "--output", folder, *arguments]
        with self.out.open("w") as out, self.error.open("w") as error:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nvflare_adapter", *map(str, given)],
                cwd=folder.parent,
                stdout=out,
                stderr=error,
            )

    def until(self, round: int) -> None:
        """Waits for the line of a round."""
        while not re.search(rf"^ +{round} ", self.out.read_text(), re.M):
            assert self.process.poll() is None, self.error.read_text()
            time.sleep(0.05)

    def started(self, program: str = "") -> list[psutil.Process]:
        """The processes under it whose command line has this in it."""
        under = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in under if any(program in word for word in one.cmdline())]

    def ended(self) -> tuple[int, str, str]:
        """Waits for the end: the exit code, and what it printed."""
        code = self.process.wait(timeout=300)
        return code, self.out.read_text(), self.error.read_text()

    def model(self) -> Any:
        """Waits for the end; the model that was saved."""
        code, _, error = self.ended()
        assert (code, error) == (0, "")
        return fc.load_checkpoint(self.output / "model.npz").model


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts the command in a folder of that name; ends what has not ended."""
    running = []

    def start(name: str, *arguments: Any, **settings: Any) -> Command:
        running.append(Command(tmp_path / name, *arguments, **settings))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGINT)
            one.process.wait()


def on(poc: Poc) -> list[Any]:
    return ["--backend", "deployment", "--startup-kit", poc.kit]


def in_process(
    script: str,
    rounds: int,
    transfer: fc.TransferType = fc.TransferType.FULL,
    arguments: Any = (),
    lost: str = "",
    clients: int = 3,
) -> Any:
    """The last model of a federation in process, which may lose a client after round 0."""
    offered = read_training_file(FILES / script, arguments)
    assert offered.initial_model is not None

    def lose(params: Any, context: fc.Context) -> fc.TrainResult:
        if context.contributor == lost and context.round > 0:
            raise RuntimeError("lost")
        return offered.train(params, context)

    everyone = dict.fromkeys(CLIENTS[:clients], lose)
    federation = fc.Federation(offered.initial_model(0), everyone, rounds, transfer=transfer)
    federation.run()
    return federation.model


@pytest.mark.parametrize("swapped", [pytest.param(False, marks=pytest.mark.sample), True])
def test_two_jobs_at_once_end_in_the_bits_of_the_federation_in_process(
    poc: Poc, run: Callable[..., Command], swapped: bool
) -> None:
    """One of each transfer type, and one of each kind of client."""
    jobs = {}
    for transfer in fc.TransferType:
        external = (transfer is fc.TransferType.DIFF) is not swapped
        settings = ["--rounds", 3, "--transfer", transfer.value.lower()]
        kind = ["--external"] if external else []
        jobs[transfer] = run(transfer.value, "mixed.py", *on(poc), *settings, *kind)
    for transfer, job in jobs.items():
        assert fc.same_bits(job.model(), in_process("mixed.py", 3, transfer))


def test_failing_clients_are_told_and_the_model_is_that_of_the_others(
    poc: Poc, run: Callable[..., Command]
) -> None:
    jobs = {
        fault: run(fault, "faulty.py", *on(poc), "--train-args", fault, *arguments)
        for fault, arguments in {
            "each": ["--rounds", 6],
            "kill": ["--rounds", 3, "--external"],
            "silent": ["--rounds", 2, "--deadline", 20],
        }.items()
    }
    too_few = run("few", "faulty.py", *on(poc), clients=4)
    said = {fault: job.ended() for fault, job in jobs.items()}
    assert {(code, error) for code, _, error in said.values()} == {(0, "")}
    models = {
        fault: fc.load_checkpoint(job.output / "model.npz").model for fault, job in jobs.items()
    }
    lines = said["each"][1].splitlines()
    assert fc.same_bits(models["each"], in_process("faulty.py", 6, arguments=["each"]))
    accepted = [line.split()[1] for line in lines if " of 3 " in line]
    assert accepted == ["3", "2", "2", "2", "2", "3"]
    notes = [line.strip() for line in lines if line.startswith(" " * 7) and " of " not in line]
    assert [note.split(" (")[0] for note in notes] == [
        "NON_FINITE",
        "SHAPE",
        "site-2 failed: ValueError: the disk is on fire",
        "site-2 failed: SystemExit: 3",
    ]
    assert "site-2 failed: its NVFlare client answered '" in said["kill"][1]
    assert fc.same_bits(models["kill"], in_process("faulty.py", 3, lost="site-2"))
    assert "site-2 failed: late: no answer before the round was closed" in said["silent"][1]
    assert fc.same_bits(models["silent"], in_process("faulty.py", 2, lost="site-2"))
    code, _, error = too_few.ended()
    assert code == 1
    assert "expected 4 connected clients, got site-1, site-2, site-3" in error


def test_after_a_server_is_killed_another_job_goes_on_to_the_bits_of_one_undisturbed(
    poc: Poc, run: Callable[..., Command]
) -> None:
    """Whether it is the server itself that is killed, or its process that runs the job."""
    killed = {
        program: run(program, "mixed.py", "--backend", "poc", "--rounds", 200)
        for program in ("server_train", "runner_process")
    }
    for program, job in killed.items():
        job.until(1)
        (server,) = job.started(f"nvflare.private.fed.app.server.{program}")
        server.kill()
    rest = []
    for program, job in killed.items():
        code, _, error = job.ended()
        assert code == 1
        assert re.match(r"nvflare_adapter: the job failed after \d+ of 200 rounds: ", error)
        assert program == "runner_process" or "the server ended with exit code -9" in error
        models = job.output / "models"
        rounds = fc.CheckpointStore(models).load().round + 2
        start = ["--start-from", job.output, "--rounds", rounds]
        rest.append((rounds, run(f"rest-{program}", "mixed.py", *on(poc), *start)))
    for rounds, job in rest:
        assert fc.same_bits(job.model(), in_process("mixed.py", rounds))


def test_of_two_at_once_one_is_interrupted_and_leaves_nothing_behind(run: Any) -> None:
    first, second = (
        run(name, "mixed.py", "--backend", "poc", "--rounds", rounds, clients=2)
        for name, rounds in (("first", 200), ("second", 4))
    )
    first.until(0)
    processes = first.started()
    assert len(processes) > 6
    first.process.send_signal(signal.SIGINT)
    code, _, error = first.ended()
    assert code == 130
    found = re.search(r"stopped after (\d+) of 200 rounds; .*CheckpointStore\('(.+)'\)", error)
    assert found is not None, error
    assert fc.CheckpointStore(found[2]).load().round == int(found[1])
    deadline = time.monotonic() + 20
    while any(one.is_running() for one in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [one for one in processes if one.is_running()] == []
    assert fc.same_bits(second.model(), in_process("mixed.py", 4, clients=2))
