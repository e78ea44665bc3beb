"""``python -m nvflare_adapter``, as far as it needs no NVFlare."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

import fedavg_core as fc
from nvflare_adapter import __main__ as command
from nvflare_adapter import follow
from nvflare_adapter.__main__ import main
from nvflare_adapter.job import Job, models_folder
from tests.interruption import InterruptedOutput
from tests.nvflare import training

FILES = Path(training.__file__).parent

WITHOUT_NVFLARE = """
import sys
sys.modules["nvflare"] = None
from nvflare_adapter.__main__ import main
code = main(sys.argv[1:])
loaded = [name for name in sys.modules if name.split(".")[0] == "nvflare"]
sys.exit(code if loaded == ["nvflare"] else 3)
"""


def run(*arguments: Any, cwd: Path) -> Any:
    """Runs the command where NVFlare cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NVFLARE, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_in_process_needs_no_nvflare_and_reaches_the_goal(tmp_path: Path) -> None:
    done = run("--backend", "in-process", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "digits.py: 4 clients, rounds 0 to 9, in this process"
    titles = "round  accepted    weight  train loss  test accuracy  test loss"
    assert lines[1].strip() == titles
    for number, line in enumerate(lines[2:12]):
        assert re.fullmatch(
            rf" *{number}    4 of 4     1,438      0\.\d{{4}} +\d\d\.\d\d%     \d\.\d{{4}}", line
        )
    assert re.fullmatch(r"goal of 90% .*: reached in round \d; the saved model has 9.*%", lines[12])
    saved = tmp_path / lines[13].removeprefix("model saved: ")
    checkpoint = fc.load_checkpoint(saved)
    assert checkpoint.round == 10
    assert lines[14] == (
        f"to load it: fedavg_core.load_checkpoint('{saved.relative_to(tmp_path)}').model"
    )


def test_the_same_seed_gives_the_same_model_and_another_one_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def model(name: str, *arguments: Any) -> Any:
        folder = tmp_path / name
        shared = ["--backend", "in-process", "--rounds", "2", "--output", str(folder)]
        assert main([*shared, *arguments]) == 0
        return fc.load_checkpoint(folder / "model.npz").model

    first = model("a", "--seed", "1", "--transfer", "diff", "--alpha", "2")
    assert fc.same_bits(first, model("b", "--seed", "1", "--transfer", "diff", "--alpha", "2"))
    assert not fc.same_bits(first, model("c", "--seed", "2", "--transfer", "diff", "--alpha", "2"))
    assert not fc.same_bits(first, model("d", "--seed", "1", "--transfer", "diff"))
    assert "goal of 90% test accuracy: not reached" in capsys.readouterr().out


def test_a_training_file_of_ones_own_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(FILES / "faulty.py"), "--backend", "in-process", "--clients", "3"]
    assert main([*arguments, "--rounds", "2", "--output", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "       1    3 of 3         6      0.5000" in out.splitlines()
    assert "goal" not in out
    trained = fc.load_checkpoint(tmp_path / "new" / "model.npz").model
    assert trained["w"].tolist() == pytest.approx([14 / 3] * 3)


def test_a_refused_update_stands_under_its_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(FILES / "faulty.py"), "--train-args", "nan", "--backend", "in-process"]
    assert main([*arguments, "--rounds", "2", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:4] == ["1", "3", "of", "4"]
    assert "NON_FINITE (contributor 'site-2', round 1, key 'w')" in lines[4]


def test_a_file_without_a_first_model_starts_from_the_clients_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(FILES / "own_start.py"), "--backend", "in-process", "--rounds", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "without an initial_model(seed), the clients start from their own models"
    assert "4 of 4" in lines[3]
    assert fc.load_checkpoint(tmp_path / "model.npz").model["w"].tolist() == [[3.5] * 2] * 2


WRONG = [
    (["--rounds", "0"], "argument --rounds: expected a whole number of at least 1, got '0'"),
    (["--clients", "-3"], "argument --clients: expected a whole number of at least 1, got '-3'"),
    (["--clients", "two"], "argument --clients: expected a whole number of at least 1, got 'two'"),
    (["--seed", "1.5"], "argument --seed: expected a whole number of at least 0, got '1.5'"),
    (["--transfer", "half"], "argument --transfer: expected full or diff, got 'half'"),
    (["--alpha", "nan"], "argument --alpha: expected a number above 0, got 'nan'"),
    (
        ["--backend", "cloud"],
        "argument --backend: expected in-process, simulator, poc or deployment, got 'cloud'",
    ),
    (
        ["--backend", "deployment"],
        "argument --startup-kit: expected a folder that has startup/fed_admin.json, got none",
    ),
    (
        ["--backend", "deployment", "--startup-kit", str(FILES)],
        f"argument --startup-kit: expected a folder that has startup/fed_admin.json, got {FILES}",
    ),
    (
        ["--startup-kit", "kit"],
        "argument --startup-kit: expected none, without a deployment, got kit",
    ),
    (
        ["--backend", "in-process", "--deadline", "3"],
        "argument --deadline: expected none in this process",
    ),
    (
        ["--backend", "in-process", "--start-from", "models"],
        "argument --start-from: expected none in this process",
    ),
    (["--start-from", "no/such"], "argument --start-from: expected a folder, got no/such"),
    (["no/such.py"], "TRAIN.py: expected a Python file, got 'no/such.py', which is not there"),
    ([str(FILES)], f"TRAIN.py: expected a Python file, got '{FILES}'"),
    (
        [str(FILES / "mixed.py"), "--alpha", "1"],
        "argument --alpha: expected only without TRAIN.py, got both",
    ),
    (["--train-args", "x"], "argument --train-args: expected TRAIN.py as well, got none"),
    (["--output", str(FILES)], f"argument --output: expected a new or empty folder, got {FILES}"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--round=3"], "unrecognized arguments: --round=3"),
    (["--start-from", "a\nb"], r"argument --start-from: expected a folder, got a\nb"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: Any, message: Any
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"nvflare_adapter: {message}\n"


def test_the_simulator_without_nvflare_is_told_what_to_install(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "nvflare_adapter: expected nvflare to be installed: get the extra 'nvflare' "
        "(in a clone: pip install -e '.[nvflare]')\n"
    )
    assert not list(tmp_path.iterdir())


def test_all_that_is_missing_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "nvflare"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == (
        "nvflare_adapter: expected rich and nvflare to be installed: get the extra 'cli' and the "
        "extra 'nvflare' (in a clone: pip install -e '.[cli,nvflare]')\n"
    )


def test_the_help_names_the_functions_that_a_training_file_may_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for name in ("serve(train)", "initial_model(seed)", "evaluate(params)"):
        assert name in said


def test_a_path_that_nvflares_simulator_would_split_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "my run")])
    error = capsys.readouterr().err
    assert error.startswith("nvflare_adapter: expected a path without spaces and quotes")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "given"),
    [("poc", "models"), ("poc", ""), ("deployment", ""), ("in-process", ""), ("simulator", "")],
)
def test_a_job_that_has_no_round_left_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, given: str
) -> None:
    """Whether its own folder is given or that of its models."""
    pytest.importorskip("nvflare")
    models = models_folder(tmp_path, backend)
    model = {"w": np.ones(3, dtype=np.float32)}
    fc.CheckpointStore(models).save(fc.Checkpoint(model=model, round=3))
    start = ["--start-from", str(tmp_path / given), "--output", str(tmp_path / "out")]
    assert main([str(FILES / "faulty.py"), *start, "--rounds", "3"]) == 2
    expected = f"--rounds: expected more than the 3 that {models} has, got 3"
    assert capsys.readouterr().err == f"nvflare_adapter: {expected}\n"
    assert not (tmp_path / "out").exists()


BROKEN = [
    ("1/0", "cannot be run: ZeroDivisionError: division by zero"),
    ("def", "cannot be run: SyntaxError: "),
    ("import sys; sys.exit(3)", "ended by itself, given ''"),
    (
        "import nvflare_adapter\nnvflare_adapter.serve(print)\ndef initial_model(s): return [1]",
        "broken.py: initial_model: expected a model as a mapping from names to arrays, got a list",
    ),
    (
        "import nvflare_adapter\nnvflare_adapter.serve(print)\n"
        "def initial_model(s): return {'w': 1}",
        "broken.py: initial_model: key 'w': expected a NumPy array, got an int",
    ),
    ("x = 1", "expected the file to end by calling nvflare_adapter.serve(train)"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_training_file_that_is_broken_gets_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: Any
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    output = tmp_path / "out"
    assert main([str(path), "--backend", "in-process", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nvflare_adapter: ")
    assert error.count("\n") == 1
    assert not output.exists()


def test_differences_without_a_first_model_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(FILES / "own_start.py"), "--backend", "in-process", "--transfer", "diff"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "expected an initial_model in the training file" in capsys.readouterr().err


def written(folder: Path, ending: str, source: str = "faulty.py") -> list[str]:
    """Arguments that run a training file of ours with another ending in process."""
    path = folder / "train.py"
    text = (FILES / source).read_text()
    head, main_line, tail = text.partition("if __name__")
    path.write_text(f"{head}{ending}\n\n\n{main_line}{tail}")
    return [str(path), "--backend", "in-process", "--rounds", "2", "--output", str(folder / "out")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return model[0]", "evaluate, of train.py, failed: KeyError: 0 (train.py, line 50)"),
        (
            "return {'a': 10**400}",
            "evaluate, of train.py: expected a mapping from names to numbers, got {'a': 1"
            + "0" * 70
            + "...",
        ),
        (
            "return 0.5",
            "evaluate, of train.py: expected a mapping from names to numbers, got 0.5",
        ),
        (
            "return {'accuracy': 'good'}",
            "evaluate, of train.py: expected a mapping from names to numbers, "
            "got {'accuracy': 'good'}",
        ),
    ],
)
def test_an_evaluate_function_that_is_broken_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, message: str
) -> None:
    assert main(written(tmp_path, f"def evaluate(model): {body}")) == 2
    assert capsys.readouterr().err == f"nvflare_adapter: {message}\n"


def test_metrics_that_were_left_out_stand_under_their_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = """
trained = train
def train(params, context):
    metrics = {"loss": "low", "error": float("nan"), "size": 1}
    return fc.TrainResult(trained(params, context).params, 1, metrics)
"""
    assert main(written(tmp_path, ending)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "       metrics left out, no finite numbers: error, loss"
    assert lines[5] == lines[3]


@pytest.mark.parametrize("has_evaluate", [True, False])
def test_a_run_in_which_no_round_changed_the_model_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_evaluate: bool
) -> None:
    """As with a file that is to train a model of which it has none."""
    ending = """
def train(params, context):
    return fc.TrainResult(params, 1)
"""
    if has_evaluate:
        ending += "\n\ndef evaluate(params): return {'accuracy': params['w'].sum()}\n"
    assert main(written(tmp_path, ending, "own_start.py")) == 1
    printed = capsys.readouterr()
    assert "MISSING_KEYS" in printed.out
    assert "model saved" not in printed.out
    assert printed.err == (
        "nvflare_adapter: no round changed the model: round 1: 0 accepted where at least 1 is "
        "needed; the model keeps its values\n"
    )
    assert not (tmp_path / "out" / "model.npz").exists()


@pytest.mark.parametrize(("stop_in", "kept"), [(0, False), (1, True)])
def test_an_interrupted_run_keeps_its_rounds_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_in: int, kept: bool
) -> None:
    ending = f"""
trained = train
def train(params, context):
    if context.round == {stop_in}:
        raise KeyboardInterrupt
    return trained(params, context)
"""
    assert main(written(tmp_path, ending)) == 130
    models = tmp_path / "out" / "models"
    going_on = (
        f"; to load the model: fedavg_core.CheckpointStore({str(models)!r}).load().model"
        "; the same command without --backend goes on with them on NVFlare, with --start-from "
        f"{tmp_path / 'out'} and another --output"
    )
    error = capsys.readouterr().err
    stopped = f"nvflare_adapter: stopped after {stop_in} of 2 rounds"
    assert error == f"{stopped}{going_on if kept else ''}\n"
    if kept:
        assert fc.CheckpointStore(models).load().model["w"].tolist() == [3.0] * 3


@pytest.mark.parametrize("word", ["0", "1"])
def test_a_round_is_shown_once_when_the_run_is_interrupted_while_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    output = InterruptedOutput(word)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(written(tmp_path, "")) == 130
    assert output.rows() == ["0", "1"][: int(word) + 1]


def test_a_round_whose_model_was_being_tested_when_the_run_was_interrupted_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = """
interrupted = False
def evaluate(params):
    global interrupted
    if not interrupted:
        interrupted = True
        raise KeyboardInterrupt
    return {"accuracy": 0.5}
"""
    assert main(written(tmp_path, ending)) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["round", "0"]
    assert lines[2].endswith("50.00%")


@pytest.mark.parametrize(
    ("backend", "options", "stored", "told"),
    [
        ("simulator", [], None, "0 of 5 rounds"),
        ("simulator", ["--output", "out"], 2, "2 of 5 rounds; {load}; {same} out{other}"),
        ("simulator", [], 2, "2 of 5 rounds; {load}; {same} {output}"),
        ("poc", ["--output", "out"], 4, "4 of 5 rounds; {load}; {same} out{other}"),
        ("poc", ["--output", "out"], 5, "5 of 5 rounds; {load}"),
        ("poc", ["--start-from", "before"], 3, "3 of 5 rounds; {load}; {same} {output}"),
        ("poc", ["--start-from", "before"], None, "1 of 5 rounds; {same} before/models"),
    ],
)
def test_an_interrupted_job_says_how_to_go_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    options: list[str],
    stored: int | None,
    told: str,
) -> None:
    pytest.importorskip("nvflare")
    monkeypatch.chdir(tmp_path)
    model = {"w": np.ones(3, dtype=np.float32)}
    fc.CheckpointStore("before/models").save(fc.Checkpoint(model, 1))
    output = Path("nowhere")

    def interrupted(read: Any, *_: Any) -> None:
        nonlocal output
        output = read.output
        if stored is not None:
            fc.CheckpointStore(models_folder(output, backend)).save(fc.Checkpoint(model, stored))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    given = [str(FILES / "faulty.py"), "--backend", backend, "--rounds", "5", *options]
    assert main(given) == 130
    models = str(models_folder(output, backend))
    expected = told.format(
        load=f"to load the model: fedavg_core.CheckpointStore({models!r}).load().model",
        same="the same command goes on with them, with --start-from",
        other=" and another --output",
        output=output,
    )
    assert capsys.readouterr().err == f"nvflare_adapter: stopped after {expected}\n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", None),
        (
            "Traceback (most recent call last):\n  File x\nOSError: left out\n"
            "x - ERROR - ask to abort job: reason: '/a/train.py' is aborted, Traceback (most\n"
            "  File x\n    raise y\nMyTrouble: fire\n"
            "Aborting: FATAL_SYSTEM_ERROR received: Result is bad",
            "MyTrouble: fire",
        ),
        (
            "Aborting due to FATAL_SYSTEM_ERROR received: Result is bad.\nValueError: x",
            "Result is bad.",
        ),
        ("Traceback:\n  File x\nnvflare.bad.JobError: no job\n", "nvflare.bad.JobError: no job"),
        ("OSError: x\nnvflare_adapter: the server ended\n", "the server ended"),
        (
            "ask to abort job: reason: '/a/train.py' is aborted, Traceback (most\n  File x\n"
            "RuntimeError: request to abort the job for reason 'train' is aborted\n"
            "RuntimeError: request to abort the job for reason 'train' is aborted\n"
            "Server - INFO - Failing job a-1 due to reported failure from site-2: exception",
            "reported failure from site-2: exception",
        ),
        ("NVFlare ended the job as FINISHED:ABORTED", "NVFlare ended the job as FINISHED:ABORTED"),
    ],
)
def test_the_cause_of_a_failed_job_is_found_in_the_log(
    tmp_path: Path, log: str, cause: str | None
) -> None:
    path = tmp_path / "log"
    path.write_text(f"an earlier job's\n{log}")
    found = follow.cause_of_failure(path, len("an earlier job's\n"))
    assert found == cause


LOSES_A_CLIENT = """
import pathlib, sys, time
import numpy, fedavg_core as fc

def store(done):
    fc.CheckpointStore(stored).save(fc.Checkpoint(model={"w": numpy.ones(1)}, round=done))

starts, stored = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
before = int(sys.argv[4])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if before:
    store(before)
if len(starts.read_text()) < int(sys.argv[3]):
    print("x - ERROR - Communication error with client site-2: reset by peer", flush=True)
    time.sleep(600)
store(before + 1)
"""


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize(("starts_needed", "is_lost"), [(2, False), (4, True)])
def test_a_job_that_loses_a_client_before_its_first_round_is_started_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts_needed: int,
    is_lost: bool,
    before: int,
) -> None:
    monkeypatch.setattr(follow, "_SILENCE_SECONDS", 0.3)
    starts, stored, log = tmp_path / "starts", tmp_path / "models", tmp_path / "log"
    arguments = [str(starts), str(stored), str(starts_needed), str(before)]
    followed = follow.follow(
        [sys.executable, "-c", LOSES_A_CLIENT, *arguments], log, stored, before + 1, before
    )
    if is_lost:
        with pytest.raises(follow.ClientLost, match=r"lost a client: Communication .* site-2"):
            list(followed)
        assert starts.read_text() == "xxx"
    else:
        assert [checkpoint.round for checkpoint in followed] == [before + 1]
        assert starts.read_text() == "xx"


def test_a_job_knows_its_log_and_its_models() -> None:
    job = Job("simulator", "t.py", "", "", 2, 3, "FULL", 0, "/x")
    assert job.log == Path("/x/nvflare.log")
    assert job.models == Path("/x/fedavg/server/simulate_job/models")
    assert replace(job, backend="poc").models == Path("/x/models")
