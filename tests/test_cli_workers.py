"""``fedavg run --workers``: the bits of a run in line, whatever becomes of a process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

import fedavg_core as fc
from fedavg_core.cli.run_log import read_log, read_settings
from fedavg_core.cli.watch import Watch, _covered, _Training
from fedavg_core.cli.workers import Workers, _Worker, work
from fedavg_core.outcome import Failure
from tests.test_cli_files import Capture, closed, run
from tests.test_cli_run import TRAINING, final, written

ODD = """
    import functools, os, signal, sys
    import numpy as np
    import fedavg_core as fc

    class Trap:
        def __reduce__(self):
            return exec, ("raise RuntimeError('not here')",)

    def initial_model(seed):
        return {"w": np.zeros(3)}

    def deeds(params, context, step):
        if context.round == 0:
            if context.contributor == "site-1":
                os._exit(3)
            if context.contributor == "site-2":
                os.kill(os.getpid(), signal.SIGKILL)
            if context.contributor == "site-3":
                return fc.TrainResult(params, 1, {"loss": lambda: 0})
            if context.contributor == "site-4":
                return fc.TrainResult(params, 1, {"loss": Trap()})
            if context.contributor == "site-5":
                raise ValueError("bad data")
        print("trained")
        return fc.TrainResult({"w": params["w"] + step}, 1)

    train = functools.partial(deeds, step=1)  # which no pickle would find by its name
"""


def never(params: Any, context: Any) -> fc.TrainResult:
    """Stands for the client, which workers have from the training file."""
    raise NotImplementedError


@pytest.mark.parametrize(
    "params", [5, {"w": [1.0]}, {"w": np.array([1j])}, {"w": np.array(["a"])}, {"v": np.ones(2)}]
)
def test_an_odd_update_has_no_norm(params: Any) -> None:
    watch = Watch(lambda *told: None)
    watch._base = {"w": np.zeros(2)}
    assert watch._norm(fc.Update("site-1", 0, params, 1)) is None
    assert watch._norm(fc.Update("site-1", 0, {"w": np.array([3.0, 4.0])}, 1)) == 5.0


def test_a_norm_leaves_alone_the_filters_of_warnings_that_all_threads_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        "fedavg_core.cli.watch.norm_of_difference",
        lambda params, base: seen.append(warnings.filters),
    )
    Watch(lambda *told: None)._norm(fc.Update("site-1", 0, {"w": np.ones(2)}, 1))
    assert seen[0] is warnings.filters  # and no copy that is put in its place meanwhile


@pytest.mark.parametrize("transfer", ["full", "diff"])
def test_the_run_is_the_same_to_the_bit_as_in_line(
    transfer: str, tmp_path: Path, capsys: Capture
) -> None:
    training = written(tmp_path, TRAINING)
    shared = ["run", training, "--clients", 7, "--rounds", 3, "--transfer", transfer, "--audit"]
    folders = {workers: tmp_path / f"run-{workers}" for workers in (1, 3)}
    told = {}
    for workers, folder in folders.items():
        code, out, err = run(capsys, *shared, "--workers", workers, "--checkpoint", folder)
        assert (code, err) == (0, "")
        lines = [line.split()[:-1] for line in out.splitlines()[:4]]
        told[workers] = (
            lines,
            [path.read_bytes() for path in sorted(folder.glob("audit-*"))],
            [
                (one.contributor, one.weight, one.norm, one.metrics)
                for record in read_log(folder)
                for one in record.contributions
            ],
        )
        assert read_settings(folder)["workers"] == workers
    assert told[1] == told[3]
    assert run(capsys, "report", folders[3])[0] == 0
    assert b"3 workers" in (folders[3] / "report.html").read_bytes()
    assert fc.same_bits(final(folders[1]), final(folders[3]))


def test_what_a_client_does_to_its_process_is_told_and_ends_no_other(
    tmp_path: Path, capsys: Capture
) -> None:
    training = written(tmp_path, ODD)
    folder = tmp_path / "run"
    given = ["--clients", 6, "--rounds", 2, "--workers", 2, "--checkpoint", folder]
    code, out, err = run(capsys, "run", training, *given)
    assert (code, err) == (0, "")
    for problem in (
        "site-1 failed: the process that it trained in ended with exit code 3",
        "site-2 failed: the process that it trained in ended by signal 9",
        "site-3 failed: its update cannot be sent from one process to another: ",
        "site-4 failed: its update could not be taken over: RuntimeError: not here",
        "site-5 failed: ValueError: bad data (training.py, line 24)",
    ):
        assert problem in out
    assert [record.count("accepted") for record in read_log(folder)] == [1, 6]
    assert final(folder)["w"].tolist() == [2, 2, 2]
    assert multiprocessing.active_children() == []


def test_prints_of_workers_do_not_get_between_the_json(tmp_path: Path) -> None:
    training = written(tmp_path, ODD.replace("context.round == 0", "False"))
    given = ["--clients", 4, "--rounds", 1, "--workers", 2, "--checkpoint", tmp_path / "run"]
    shown = {}
    for how in ("--json", "--audit"):
        done = subprocess.run(
            [sys.executable, "-m", "fedavg_core.cli", "run", training, *map(str, given), how],
            capture_output=True,
            text=True,
            check=True,
        )
        shown[how] = done.stdout, done.stderr
        given[-1] = tmp_path / "another"
    assert [json.loads(line)["round"] for line in shown["--json"][0].splitlines()] == [0]
    # Two at a time: a word and the end of its line may come apart.
    assert shown["--json"][1].replace("\n", "") == "trained" * 4
    assert shown["--audit"][0].count("trained") == 4
    assert shown["--audit"][1] == ""


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_fail_no_client(streams: str, tmp_path: Path) -> None:
    training = written(tmp_path, ODD.replace("context.round == 0", "False"))
    given = ["--clients", 3, "--rounds", 1, "--workers", 2, "--checkpoint", tmp_path / "run"]
    for how in ([], ["--resume", "--rounds", 2, "--json"]):
        code, _, err = closed(streams, "run", training, *given, *how)
        assert code == 0
        assert err.replace("trained", "").strip() == ""
    assert [record.count("accepted") for record in read_log(tmp_path / "run")] == [3, 3]


def test_ctrl_c_ends_the_workers_and_the_run_goes_on_with_the_same_bits(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "slow").mkdir()
    training = written(tmp_path, TRAINING)
    wait = """
        import time, os, pathlib, signal
        deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # from the first step
        if "PIDS" in os.environ and context.round == 2 and deaf:
            pathlib.Path(os.environ["PIDS"], str(os.getpid())).touch()
            time.sleep(100)
        rng = np"""
    slow = written(tmp_path / "slow", TRAINING.replace("\n        rng = np", wait))
    folder, pids = tmp_path / "run", tmp_path / "pids"
    pids.mkdir()
    shared = ["--clients", 4, "--rounds", 4, "--workers", 2, "--checkpoint"]
    with subprocess.Popen(
        [sys.executable, "-m", "fedavg_core.cli", "run", slow, *map(str, [*shared, folder])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PIDS": str(pids)},
        start_new_session=True,
    ) as process:
        end = time.monotonic() + 60
        while len(os.listdir(pids)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert err.startswith(b"fedavg: interrupted; 2 of 4 rounds are done, "), err.decode()
    assert err.count(b"\n") == 1, err.decode()
    assert len(os.listdir(pids)) == 2
    for pid in os.listdir(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    for file, there in ((slow, folder), (training, tmp_path / "whole")):
        assert run(capsys, "run", file, *shared, there, "--resume")[0] == 0
    assert fc.same_bits(final(folder), final(tmp_path / "whole"))


class TestAWorker:
    """`work`, in this process."""

    def answers(
        self, path: Path, sites: list[str], monkeypatch: pytest.MonkeyPatch, *, quiet: bool
    ) -> list[Any]:
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "path", list(sys.path))
        ours, theirs = multiprocessing.Pipe()
        for site in sites:
            context = fc.Context(site, 0, 9, 0, 1, 5)
            ours.send_bytes(pickle.dumps(({}, context, fc.TransferType.FULL, 0)))
        ours.send_bytes(b"")  # no task, which ends it as a line that is closed does
        work(theirs, path, quiet)
        return [pickle.loads(ours.recv_bytes()) for _ in sites]

    def test_trains_with_the_file_and_tells_what_cannot_be_sent(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        training = written(tmp_path, ODD.replace('params["w"]', "np.ones(1)"))
        sites = ["site-3", "site-5", "site-6"]
        unsent, failed, update = self.answers(training, sites, monkeypatch, quiet=True)
        assert unsent.problem.startswith("its update cannot be sent from one process to another: ")
        assert failed.problem.startswith("ValueError: bad data (training.py, line ")
        assert update.params["w"].tolist() == [2]
        assert capsys.readouterr().err == "trained\n"

    def test_whose_file_cannot_be_imported_any_more_says_so_for_each_client(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        training = written(tmp_path, "raise OSError('in use')")
        sites = ["site-3", "site-4"]
        assert self.answers(training, sites, monkeypatch, quiet=False) == [
            Failure(
                name, 0, f"{training}: cannot be imported: OSError: in use (training.py, line 1)"
            )
            for name in sites
        ]


def test_after_the_end_nothing_is_begun(tmp_path: Path) -> None:
    with Workers(tmp_path / "training.py", 2, quiet=True) as workers:
        pass
    context = fc.Context("site-1", 0, 1, 4, 5, 0)
    told = workers.train(never, {}, context, fc.TransferType.FULL, 0)
    assert told == Failure("site-1", 4, "the run has ended")


def test_the_end_does_not_wait_for_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[_Worker] = []
    ending = _Worker.ending

    def noted(worker: _Worker) -> str:
        ended.append(worker)
        return ending(worker)

    monkeypatch.setattr(_Worker, "ending", noted)
    begun = tmp_path / "begun"
    training = written(
        tmp_path,
        f"""
        import pathlib, time

        def train(params, context):
            pathlib.Path({str(begun)!r}).touch()
            time.sleep(100)
        """,
    )
    context = fc.Context("site-1", 0, 1, 4, 5, 0)
    with Workers(training, 2, quiet=True) as workers:
        future = workers.submit(lambda train: train(never, {}, context, fc.TransferType.FULL, 0))
        end = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < end:
            time.sleep(0.01)
    problem = "the process that it trained in ended by signal 9"
    assert future.result() == Failure("site-1", 4, problem)
    assert multiprocessing.active_children() == []
    # Not when they are collected, where a Ctrl-C would end in a trace and nothing else.
    assert [one.connection.closed for one in ended] == [True]


ENDLESS = """
    import time
    import numpy as np
    import fedavg_core as fc

    def initial_model(seed):
        return {"w": np.zeros(3)}

    def train(params, context):
        time.sleep(0.01)
        return fc.TrainResult(params, 1)
"""


@pytest.mark.parametrize("pause", [0, 0.001, 0.003, 0.02])
def test_a_second_ctrl_c_does_not_keep_the_first_from_ending_the_run(
    pause: float, tmp_path: Path
) -> None:
    training = written(tmp_path, ENDLESS)
    folder = tmp_path / "run"
    given = ["--clients", 4, "--rounds", 100_000, "--workers", 2, "--checkpoint", folder]
    with subprocess.Popen(
        [sys.executable, "-m", "fedavg_core.cli", "run", training, *map(str, given)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        end = time.monotonic() + 60
        while len(fc.CheckpointStore(folder).paths()) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (130, -signal.SIGINT)
    assert err.startswith(b"fedavg: interrupted; "), err.decode()
    assert err.count(b"\n") == 1, err.decode()


def test_an_interrupted_end_ends_the_processes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = fc.Context("site-1", 0, 1, 4, 5, 0)
    before = signal.getsignal(signal.SIGINT)
    workers = Workers(written(tmp_path, ENDLESS), 2, quiet=True)

    def shutdown(**_: Any) -> None:
        raise KeyboardInterrupt

    workers.__enter__()
    answer = workers.train(never, {}, context, fc.TransferType.FULL, 0)
    assert isinstance(answer, fc.Update)
    monkeypatch.setattr(workers._threads, "shutdown", shutdown)
    idle = weakref.ref(workers._idle[0])
    hear, forgotten = signal.signal, []

    def noted(number: int, handler: Any) -> Any:
        forgotten.append(idle() is None)
        return hear(number, handler)

    monkeypatch.setattr(signal, "signal", noted)
    with pytest.raises(KeyboardInterrupt):
        workers.__exit__(None, None, None)
    assert forgotten == [False, True]  # before a Ctrl-C is heard again
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_was_caught_is_not_the_last_that_is_heard(tmp_path: Path) -> None:
    with Workers(tmp_path / "training.py", 2, quiet=True) as workers:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # while it is acted on
            assert workers.submit(lambda _: 3).result() == 3


def test_time_in_which_several_train_counts_once() -> None:
    spans = [(5.0, 7.0), (1.0, 3.0), (2.0, 2.5), (2.5, 4.0), (9.0, 9.0)]
    assert _covered(_Training(*span, None) for span in spans) == 5
    assert _covered([]) == 0
