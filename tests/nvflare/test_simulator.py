"""Whole jobs on NVFlare's simulator."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")
pytest.importorskip("rich")

import fedavg_core as fc
from nvflare_adapter import digits, read_training_file
from nvflare_adapter.follow import follow
from nvflare_adapter.job import Job
from tests.nvflare import training

# One after the other, beside the tests that start none.
pytestmark = [pytest.mark.simulator, pytest.mark.xdist_group("simulator")]

FILES = Path(training.__file__).parent
MIXED = FILES / "mixed.py"
DIGITS = Path(digits.__file__)


def command(*arguments: Any, cwd: Path) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "nvflare_adapter", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def stored(folder: Path, clients: int, script: str, rounds: int = 2, **arguments: Any) -> Any:
    """Runs a recipe on the simulator, and gives the checkpoints that it stored: so many."""
    folder.mkdir(exist_ok=True)
    recipe = {"min_clients": clients, "train_script": str(FILES / script), **arguments}
    command = [sys.executable, "-m", "tests.nvflare.run_recipe", str(folder), json.dumps(recipe)]
    models = folder / "job" / "server" / "simulate_job" / "models"
    return list(follow(command, folder / "log", models, rounds))


def last_model(folder: Path, clients: int, script: str, **arguments: Any) -> Any:
    """The last of the models that a recipe stored on the simulator."""
    return stored(folder, clients, script, **arguments)[-1].model


@pytest.mark.parametrize(
    ("path", "arguments", "clients", "external", "transfer"),
    [
        (DIGITS, "--alpha 0.3", 4, False, fc.TransferType.DIFF),
        pytest.param(MIXED, "", 3, False, fc.TransferType.FULL, marks=pytest.mark.sample),
        pytest.param(MIXED, "", 3, False, fc.TransferType.DIFF, marks=pytest.mark.sample),
        (MIXED, "", 2, True, fc.TransferType.FULL),
    ],
)
def test_every_round_ends_in_the_bits_of_the_federation_in_process(
    tmp_path: Path,
    path: Any,
    arguments: Any,
    clients: Any,
    external: bool,
    transfer: fc.TransferType,
) -> None:
    seed, rounds = 17, 3
    offered = read_training_file(path, arguments.split())
    assert offered.initial_model is not None
    initial = offered.initial_model(seed)
    start = tmp_path / "start"
    fc.save_checkpoint(start, fc.Checkpoint(model=initial, round=0))
    job = Job(
        backend="simulator",
        train_script=str(path),
        train_args=arguments,
        initial_model=str(start),
        clients=clients,
        rounds=rounds,
        transfer=transfer.value,
        seed=seed,
        folder=str(tmp_path),
        external=external,
    )
    checkpoints = list(job.run())
    federation = fc.Federation(
        initial,
        clients={f"site-{number + 1}": offered.train for number in range(clients)},
        rounds=rounds,
        transfer=transfer,
        seed=seed,
    )
    outcomes = list(federation)
    assert len(checkpoints) == len(outcomes) == rounds
    for checkpoint, outcome in zip(checkpoints, outcomes, strict=True):
        assert fc.compare(checkpoint.model, outcome.model).keys() == initial.keys()
        assert fc.same_bits(checkpoint.model, outcome.model)
        assert checkpoint.metrics == outcome.metrics
        assert checkpoint.extra["report"]["total_weight"] == outcome.total_weight
        assert len(checkpoint.extra["report"]["accepted"]) == clients
    assert not fc.same_bits(checkpoints[-1].model, initial)
    assert fc.ModelSpec.of(checkpoints[-1].model) == fc.ModelSpec.of(initial)


def test_the_main_job_reaches_its_goal_and_names_what_it_leaves(tmp_path: Path) -> None:
    done = command(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "digits.py: 4 clients, rounds 0 to 9, on NVFlare's simulator"
    assert [line.split()[0] for line in lines[2:12]] == [str(number) for number in range(10)]
    assert lines[12].startswith("goal of 90% test accuracy: reached in round ")
    saved = tmp_path / lines[13].removeprefix("model saved: ")
    accuracy = digits.evaluate(fc.load_checkpoint(saved).model)["accuracy"]
    assert accuracy >= 0.9
    assert lines[12].endswith(f"the saved model has {accuracy:.2%}")
    log = tmp_path / lines[15].removeprefix("NVFlare's log: ")
    assert "END_RUN received" in log.read_text()
    in_process = command("--backend", "in-process", cwd=tmp_path)
    assert in_process.stdout.splitlines()[1:13] == lines[1:13]


def test_a_refused_update_stands_under_its_round(tmp_path: Path) -> None:
    arguments = ["--train-args", "nan", "--clients", 3, "--rounds", 2, "--output", "out"]
    done = command(FILES / "faulty.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split()[:5] == ["0", "3", "of", "3", "6"]
    assert lines[3].split()[:5] == ["1", "2", "of", "3", "4"]
    assert "NON_FINITE (contributor 'site-2', round 1, key 'w')" in lines[4]
    assert "refused: NON_FINITE" in (tmp_path / "out" / "nvflare.log").read_text()


def test_a_client_that_fails_is_left_out_and_the_model_has_the_bits_of_the_run_in_process(
    tmp_path: Path,
) -> None:
    arguments = ["--train-args", "fail", "--clients", 3, "--rounds", 4]
    tables, models = [], []
    for backend in ("simulator", "in-process"):
        where = ["--backend", backend, "--output", backend]
        done = command(FILES / "faulty.py", *arguments, *where, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        tables.append(done.stdout.splitlines()[1:8])
        models.append(fc.load_checkpoint(tmp_path / backend / "model.npz").model)
    assert tables[0] == tables[1]
    assert [tables[0][row].split()[1] for row in (1, 2, 4, 6)] == ["3", "2", "2", "3"]
    assert "site-2 failed: ValueError: the disk is on fire (faulty.py, line" in tables[0][3]
    assert "site-2 failed: SystemExit: 3 (faulty.py, line" in tables[0][5]
    assert fc.same_bits(*models)


def test_a_failed_job_is_told_in_plain_words_with_the_end_of_the_log(tmp_path: Path) -> None:
    arguments = ["--train-args", "start", "--clients", 2, "--rounds", 3, "--output", "out"]
    done = command(FILES / "faulty.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    problem, where, *tail = done.stderr.splitlines()
    assert problem in (
        "nvflare_adapter: the job failed after 0 of 3 rounds: ValueError: no data here",
        # NVFlare 2.7 takes a client that cannot start for one that fails in every round.
        "nvflare_adapter: no round changed the model: ValueError: no data here",
    )
    log = tmp_path / "out" / "nvflare.log"
    assert where == f"the end of NVFlare's log, {log}:"
    assert [line[2:] for line in tail] == log.read_text().splitlines()[-len(tail) :]
    assert "model saved" not in done.stdout


def test_clients_start_from_their_own_model_where_none_is_given(tmp_path: Path) -> None:
    model = last_model(tmp_path, 2, "own_start.py")
    assert fc.same_bits(model, {"w": np.full((2, 2), 2.5, dtype=np.float32)})


def test_a_client_script_of_nvflares_own_kind_is_served(tmp_path: Path) -> None:
    start = [[1, 2], [3, 16777217]]
    model = last_model(
        tmp_path,
        2,
        "plain_client.py",
        initial_model=start,
        params_transfer_type="DIFF",
        evaluated=True,
    )
    assert fc.same_bits(model, {"numpy_key": np.array([[3.0, 4.0], [5.0, 16777219.0]])})
    results = tmp_path / "job" / "server" / "simulate_job" / "cross_site_val"
    found = json.loads((results / "cross_val_results.json").read_text())
    measured = {"weight_mean": float(model["numpy_key"].mean())}
    assert [found[site]["SRV_server"] for site in ("site-1", "site-2")] == [measured] * 2


@pytest.mark.parametrize(("aggregator", "expected"), [("Maximum", 206.0), ("WithoutSecond", 12.0)])
def test_a_users_aggregator_makes_the_model(
    tmp_path: Path, aggregator: str, expected: float
) -> None:
    start = {"w": [0.0, 0.0, 0.0]}
    model = last_model(tmp_path, 3, "faulty.py", initial_model=start, aggregator=aggregator)
    assert fc.same_bits(model, {"w": np.full(3, expected)})


def test_nvflares_own_recipe_takes_the_exact_mean(tmp_path: Path) -> None:
    recipe = {"nvflares": True, "initial_model": [0.0, 0.0], "num_rounds": 1}
    stored(tmp_path, 4, "cancelling_client.py", 0, **recipe)
    model = np.load(tmp_path / "job" / "server" / "simulate_job" / "models" / "server.npy")
    assert fc.same_bits({"w": model}, {"w": np.full(2, 1 / 3).astype(np.float32)})
    log = (tmp_path / "log").read_text()
    assert log.count("refused: NON_FINITE (contributor 'site-4'") == 1


def test_a_job_keeps_its_best_model_stops_early_and_goes_on_as_if_it_had_been_one(
    tmp_path: Path,
) -> None:
    arguments = {
        "num_rounds": 5,
        "patience": 2,
        "keep_checkpoints": 5,
        "model": {"w": [0.1, 0.2]},
        "per_site_config": {"site-1": {"train_args": "0.1"}, "site-2": {"train_args": "0.7"}},
        "server_optimizer": "fedadam",
        "audit": True,
        "tracked": True,
    }
    whole = stored(tmp_path / "whole", 2, "scores.py", 4, **arguments)
    results = tmp_path / "whole" / "job" / "server" / "simulate_job"
    start = str(results / "models" / "round-00000002.npz")
    rest = stored(tmp_path / "rest", 2, "scores.py", 3, start_from=start, **arguments)
    assert [one.round for one in whole] == [1, 2, 3, 4]
    assert [one.round for one in rest] == [2, 3, 4]
    for one, other in zip(whole[1:], rest, strict=True):
        assert fc.same_bits(one.model, other.model)
        assert fc.same_bits(one.arrays, other.arrays)
        assert (one.extra, one.metrics) == (other.extra, other.metrics)
    best = [
        fc.load_checkpoint(tmp_path / name / "job/server/simulate_job/models/best_model.npz")
        for name in ("whole", "rest")
    ]
    assert [one.metrics for one in best] == [{"accuracy": 0.7}] * 2
    assert all(fc.same_bits(one.model, whole[1].model) for one in best)
    for number, before in enumerate(
        [{"w": np.array([0.1, 0.2])}, *(one.model for one in whole[:3])]
    ):
        audit = fc.Audit.from_text(
            (results / f"models/round-{number + 1:08d}.audit.json").read_text()
        )
        state = whole[number - 1].arrays if number else None
        updates = {f"site-{n}": {"w": before["w"] + np.float32(s)} for n, s in ((1, 0.1), (2, 0.7))}
        assert fc.verify(audit, updates, base=before, optimizer_state=state).same_bits
    check_what_nvflares_components_heard(results)


def check_what_nvflares_components_heard(results: Path) -> None:
    heard = json.loads((results / "tracked.json").read_text())
    statistics = [one for one in heard if isinstance(one, dict)]
    assert [one["round"] for one in statistics] == [0, 1, 2, 3]
    assert all(one["contributors"] == ["site-1", "site-2"] for one in statistics)
    tracked = sorted(one for one in heard if isinstance(one, list))
    scores = [0.5, 0.6, 0.65, 0.7]
    assert tracked == [[f"site-{n}", "accuracy", score] for n in (1, 2) for score in scores]
    if (results / "metrics").exists():  # NVFlare's reporters, since 2.9
        summary = json.loads((results / "metrics" / "metrics_summary.json").read_text())
        assert (summary["best_round"], summary["final_round"]) == (1, 3)
        reported = json.loads((results / "job_stats_run_summary.json").read_text())
        assert [one["accepted_clients"] for one in reported["rounds"]] == [2] * 4


def processes_that_name(text: str) -> list[str]:
    """The command lines, of all processes of this machine, that have the text in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if text in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_no_process_behind(tmp_path: Path, sent: signal.Signals) -> None:
    arguments = [sys.executable, "-m", "nvflare_adapter", "--rounds", "200", "--output", "out"]
    with subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        # A job whose client does not start waits for it, and would be waited for as long.
        limit = threading.Timer(300, os.killpg, (job.pid, signal.SIGKILL))
        limit.start()
        lines = iter(job.stdout.readline, "")
        has_begun = any(line.split()[0] == "0" for line in lines)
        limit.cancel()
        assert has_begun, "no round within 300 s"
        assert len(processes_that_name(str(tmp_path))) > 2
        job.send_signal(sent)
        rest, error = job.communicate(timeout=60)
    found = re.fullmatch(
        r"nvflare_adapter: stopped after (\d+) of 200 rounds; "
        r"to load the model: fedavg_core\.CheckpointStore\('(.+)'\)\.load\(\)\.model; "
        r"the same command goes on with them, with --start-from out and another --output\n",
        error,
    )
    assert found is not None, error
    assert fc.CheckpointStore(tmp_path / found[2]).load().round == int(found[1])
    rows = [line.split()[0] for line in rest.splitlines() if line.split()[:1]]
    assert [row for row in rows if row.isdigit()] == [str(n) for n in range(1, int(found[1]))]
    assert job.returncode == 130
    deadline = time.monotonic() + 20
    while processes_that_name(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_that_name(str(tmp_path)) == []
