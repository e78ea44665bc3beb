"""``fedavg run``: the federation's bits, the record it keeps, and going on after a stop."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

import fedavg_core as fc
from fedavg_core.cli import main, watch
from fedavg_core.cli import run as run_module
from fedavg_core.cli.run_log import (
    LOG,
    SETTINGS,
    append_round,
    read_log,
    read_settings,
    start_log,
    write_settings,
)
from fedavg_core.cli.watch import Watch, peak_bytes
from fedavg_core.codec.npz import read_npz
from fedavg_core.norm import norm_of_difference
from tests.interruption import InterruptedOutput
from tests.model_files import Model
from tests.test_cli_files import Capture, fails, run

TRAINING = """
    import numpy as np
    import fedavg_core as fc

    def initial_model(seed):
        return {"w": np.random.default_rng(seed).standard_normal(6).astype(np.float32)}

    def train(params, context):
        rng = np.random.default_rng(context.seed)
        params["w"] += rng.standard_normal(6).astype(np.float32)
        loss = float(np.abs(params["w"]).mean())
        return fc.TrainResult(params, weight=context.index + 1, metrics={"loss": loss})

    def evaluate(params):
        return {"size": float(np.abs(params["w"]).max())}
"""


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return written(tmp_path, TRAINING)


def written(folder: Path, text: str, name: str = "training.py") -> Path:
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return path


def final(folder: Path) -> Model:
    with open(folder / "model.npz", "rb") as file:
        return read_npz(file, own=True)[0]


def in_memory(training: Path, **settings: Any) -> fc.Federation:
    names: dict[str, Any] = {}
    exec(training.read_text(), names)
    federation = fc.Federation(
        names["initial_model"](settings.get("seed", 0)),
        clients={f"site-{number}": names["train"] for number in range(1, 5)},
        **{"rounds": 4, **settings},
    )
    federation.run()
    return federation


@pytest.mark.parametrize("transfer", ["full", "diff"])
def test_the_model_is_that_of_a_federation_in_a_program(
    training: Path, tmp_path: Path, capsys: Capture, transfer: str
) -> None:
    folder = tmp_path / "run"
    given = ["--clients", 4, "--rounds", 4, "--fraction", 0.5, "--seed", 5, "--transfer", transfer]
    code, out, err = run(capsys, "run", training, *given, "--checkpoint", folder)
    assert (code, err) == (0, "")
    wanted = in_memory(
        training, seed=5, participation=2, transfer=fc.TransferType(transfer.upper())
    )
    assert fc.same_bits(final(folder), wanted.model)
    assert fc.same_bits(fc.CheckpointStore(folder).load().model, wanted.model)
    lines = out.splitlines()
    assert lines[0].split() == [
        *("round", "accepted", "weight", "train", "loss", "test", "size", "seconds"),
    ]
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert lines[1].split()[1:4] == ["2", "of", "2"]
    assert lines[5:] == [
        f"model: {folder / 'model.npz'}",
        f"to see how it went: fedavg report {folder} -o report.html",
    ]


@pytest.mark.parametrize("accumulator", ["exact", "float64", "float32"])
def test_the_accumulator_is_the_one_asked_for(
    training: Path, tmp_path: Path, capsys: Capture, accumulator: str
) -> None:
    given = ["--clients", 4, "--rounds", 4, "--checkpoint", tmp_path / "run"]
    assert run(capsys, "run", training, *given, "--accumulator", accumulator)[0] == 0
    wanted = in_memory(training, accumulator=accumulator)
    assert fc.same_bits(final(tmp_path / "run"), wanted.model)


@pytest.mark.parametrize("text", ["fedadam", "fedyogi:learning_rate=0.5, tau=0.25", "fedavg"])
def test_the_server_optimizer_is_the_one_asked_for_and_goes_on_after_a_stop(
    training: Path, tmp_path: Path, capsys: Capture, text: str
) -> None:
    folder = tmp_path / "run"
    shared = ["run", training, "--clients", 4, "--checkpoint", folder, "--resume"]
    for rounds in (2, 4):
        assert run(capsys, *shared, "--rounds", rounds, "--optimizer", text)[0] == 0
    wanted = {
        "fedadam": fc.FedAdam(),
        "fedyogi": fc.FedYogi(learning_rate=0.5, tau=0.25),
        "fedavg": fc.FedAvg(),
    }[text.partition(":")[0]]
    assert fc.same_bits(final(folder), in_memory(training, server_optimizer=wanted).model)
    assert read_settings(folder)["optimizer"] == wanted.settings()
    told = fails(capsys, *shared, "--rounds", 5, "--optimizer", "fedavgm:momentum=0.5")
    assert told.startswith(f"--optimizer: this run has {text.partition(':')[0]}")
    assert told.endswith(", got fedavgm:learning_rate=1.0,momentum=0.5")
    assert run(capsys, *shared, "--rounds", 5)[0] == 0
    going_on = in_memory(training, server_optimizer=wanted, rounds=5)
    assert fc.same_bits(final(folder), going_on.model)


@pytest.mark.parametrize("text", ["median", "trimmed-mean:trim=0.25", "multi-krum:faulty=0,keep=3"])
def test_a_robust_mean_stands_in_for_the_mean_and_goes_on_after_a_stop(
    training: Path, tmp_path: Path, capsys: Capture, text: str
) -> None:
    folder = tmp_path / "run"
    shared = ["run", training, "--clients", 4, "--checkpoint", folder, "--resume"]
    for rounds in (2, 4):
        assert run(capsys, *shared, "--rounds", rounds, "--accumulator", text)[0] == 0
    wanted = {
        "median": fc.robust_mean("median"),
        "trimmed-mean": fc.robust_mean("trimmed-mean", trim=0.25),
        "multi-krum": fc.robust_mean("multi-krum", faulty=0, keep=3),
    }[text.partition(":")[0]]
    assert fc.same_bits(final(folder), in_memory(training, accumulator=wanted).model)
    assert read_settings(folder)["accumulator"] == wanted.settings()
    told = fails(capsys, *shared, "--rounds", 5, "--accumulator", "exact")
    assert told == f"--accumulator: this run has {text}, got exact"
    assert run(capsys, *shared, "--rounds", 5)[0] == 0
    assert fc.same_bits(final(folder), in_memory(training, accumulator=wanted, rounds=5).model)
    assert run(capsys, "report", folder)[0] == 0


def test_the_record_tells_what_happened(training: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    given = ["--clients", 3, "--rounds", 2, "--checkpoint", folder]
    code, out, err = run(capsys, "run", training, *given, "--json")
    assert (code, err) == (0, "")
    assert out == (folder / LOG).read_text()
    records = read_log(folder)
    assert [record.to_json() for record in records] == list(map(json.loads, out.splitlines()))
    assert [record.round for record in records] == [0, 1]
    model = read_settings(folder)
    assert model["training_file"] == "training.py"
    assert (model["clients"], model["rounds"], model["fraction"]) == (3, 2, 1.0)

    names: dict[str, Any] = {}
    exec(training.read_text(), names)
    start = names["initial_model"](0)
    outcomes = fc.Federation(
        start, clients={f"site-{number}": names["train"] for number in (1, 2, 3)}, rounds=2
    ).run()
    for record, outcome in zip(records, outcomes, strict=True):
        assert [one.contributor for one in record.contributions] == ["site-1", "site-2", "site-3"]
        assert [one.weight for one in record.contributions] == [1, 2, 3]
        assert [one.status for one in record.contributions] == ["accepted"] * 3
        assert record.metrics == outcome.metrics
        assert record.evaluation == names["evaluate"](outcome.model)
        assert record.total_weight == 6
        assert record.norm == norm_of_difference(outcome.model, start)
        context = fc.Context(
            "site-2", 1, 3, record.round, 2, fc.contributor_seed(0, record.round, "site-2")
        )
        trained = names["train"]({"w": start["w"].copy()}, context)
        assert record.contributions[1].norm == norm_of_difference(trained.params, start)
        assert record.contributions[1].metrics == trained.metrics
        assert all(seconds >= 0 for seconds in record.seconds.values())
        assert record.peak_bytes is not None
        assert record.peak_bytes > 2**20
        start = outcome.model


def test_the_norm_of_a_difference_is_that_of_what_was_sent(
    training: Path, tmp_path: Path, capsys: Capture
) -> None:
    norms = []
    for transfer in ("full", "diff"):
        folder = tmp_path / transfer
        given = ["--clients", 2, "--rounds", 1, "--transfer", transfer, "--checkpoint", folder]
        assert run(capsys, "run", training, *given)[0] == 0
        norms.append([one.norm for one in read_log(folder)[0].contributions])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


FAULTY = """
    import numpy as np
    import fedavg_core as fc

    class Odd:
        def __iter__(self):
            raise RuntimeError("odd")

    def initial_model(seed):
        return {"w": np.zeros(3)}

    def train(params, context):
        good = {"w": params["w"] + 1}
        what = {
            "site-2": lambda: 1 / 0,
            "site-3": lambda: fc.TrainResult({"w": good["w"] * np.nan}, 1),
            "site-4": lambda: fc.TrainResult({"w": np.zeros(4)}, 1),
            "site-5": lambda: fc.TrainResult(Odd(), 1),
            "site-6": lambda: fc.TrainResult({"w": good["w"] * 1j}, 1),
            "site-7": lambda: fc.TrainResult(good, -1),
            "site-8": lambda: fc.TrainResult({"v": np.zeros(3)}, 1),
            "site-9": lambda: exit(3),
            "site-10": lambda: fc.TrainResult(good, 1, {"loss": float("nan")}),
        }
        default = lambda: fc.TrainResult(good, 2.5)
        return what.get(context.contributor, default)()
"""


def test_refusals_and_failures_are_told_and_end_nothing(tmp_path: Path, capsys: Capture) -> None:
    training = written(tmp_path, FAULTY)
    folder = tmp_path / "run"
    given = ["--clients", 11, "--rounds", 2, "--checkpoint", folder]
    code, out, err = run(capsys, "run", training, *given)
    assert (code, err) == (0, "")
    assert "3 of 11" in out
    assert "site-2 failed: ZeroDivisionError: division by zero (training.py, line 15)" in out
    refusals = {
        "site-3": "expected finite numbers, got nan at [0] (NON_FINITE, key 'w')",
        "site-7": "expected a finite number above 0, got -1 (BAD_WEIGHT)",
        "site-8": "expected no parameter but the 1 of the model, got another "
        "(UNEXPECTED_KEYS, key 'v')",
    }
    for name, refusal in refusals.items():
        assert f"       {name} refused: {refusal}\n" in out
    assert "metrics left out, no finite numbers: loss" in out
    record = read_log(folder)[1]
    status = {one.contributor: (one.status, one.reason) for one in record.contributions}
    assert status == {
        "site-1": ("accepted", None),
        "site-2": ("failed", None),
        "site-3": ("refused", "NON_FINITE"),
        "site-4": ("refused", "SHAPE"),
        "site-5": ("refused", "DTYPE"),
        "site-6": ("refused", "DTYPE"),
        "site-7": ("refused", "BAD_WEIGHT"),
        "site-8": ("refused", "UNEXPECTED_KEYS"),
        "site-9": ("failed", None),
        "site-10": ("accepted", None),
        "site-11": ("accepted", None),
    }
    norms = {one.contributor: one.norm for one in record.contributions}
    assert {name for name, norm in norms.items() if norm is not None} == {
        *("site-1", "site-7", "site-10", "site-11")
    }
    assert norms["site-1"] == pytest.approx(math.sqrt(3))
    assert final(folder)["w"].tolist() == [2, 2, 2]


def test_many_refusals_are_not_all_printed(tmp_path: Path, capsys: Capture) -> None:
    training = written(
        tmp_path,
        """
        import numpy as np
        import fedavg_core as fc

        def train(params, context):
            return fc.TrainResult({"w": np.zeros(2)}, 1 if context.index == 0 else 0)
        """,
    )
    given = ["--clients", 20, "--rounds", 1, "--checkpoint", tmp_path / "run"]
    out = run(capsys, "run", training, *given)[1]
    assert out.count("BAD_WEIGHT") == 10
    assert "       and 9 more\n" in out


def test_a_run_in_which_nothing_was_learned_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    training = written(tmp_path, "def train(params, context):\n    raise ValueError('no')\n")
    given = ["--clients", 2, "--rounds", 2, "--checkpoint", tmp_path / "run"]
    code, out, err = run(capsys, "run", training, *given)
    assert code == 2
    assert "site-1 failed: ValueError: no (training.py, line 2)" in out
    assert err == (
        "fedavg: no round changed the model: round 1: 0 accepted where at least 1 is needed; "
        "the model keeps its values\n"
    )
    assert len(read_log(tmp_path / "run")) == 2
    assert run(capsys, "run", training, *given, "--resume") == (
        2,
        "",
        "fedavg: all 2 rounds are done; a larger --rounds adds to them\n" + err,
    )
    assert not (tmp_path / "run" / "model.npz").exists()


def test_a_run_that_goes_on_and_learns_nothing_more_keeps_what_it_had(
    training: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    shared = ["run", training, "--clients", 2, "--checkpoint", folder, "--resume"]
    assert run(capsys, *shared, "--rounds", 1)[0] == 0
    before = final(folder)
    training.write_text(training.read_text().replace("rng = np", "1 / 0; rng = np"))
    code, _, err = run(capsys, *shared, "--rounds", 2)
    assert code == 2
    assert err.splitlines()[-1] == (
        "fedavg: the model is written, but no round since round 0 changed it: round 1: "
        "0 accepted where at least 1 is needed; the model keeps its values"
    )
    assert fc.same_bits(final(folder), before)
    assert read_log(folder)[1].problem is not None


def test_what_a_training_file_prints_does_not_get_between_the_json(
    training: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = training.read_text().replace("rng = np", "print('hello'); rng = np")
    training.write_text(text)
    given = ["--clients", 2, "--rounds", 1, "--checkpoint", tmp_path / "run"]
    code, out, err = run(capsys, "run", training, *given, "--json")
    assert (code, err) == (0, "hello\n" * 2)
    assert len(list(map(json.loads, out.splitlines()))) == 1
    out = run(capsys, "run", training, "--rounds", 1, "--checkpoint", tmp_path / "2")[1]
    assert out.count("hello") == 10


def test_an_error_leaves_standard_output_and_the_terminal_as_they_were(
    training: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.write_text("print('hello'); raise ValueError('no')")
    before = sys.stdout
    given = ["run", training, "--checkpoint", tmp_path / "run"]
    code, out, err = run(capsys, *given, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("hello\nfedavg: ")
    assert sys.stdout is before
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    code, out, _ = run(capsys, *given)
    assert code == 2
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor hidden, and shown
    assert sys.stdout is before


@pytest.mark.parametrize(
    ("folder", "typed"), [("my run", "'my run'"), ("-run", "./-run"), ("it's", "'it'\"'\"'s'")]
)
def test_what_is_to_be_typed_next_can_be_pasted(
    folder: str,
    typed: str,
    training: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["run", training, "--rounds", 2, "--clients", 1, f"--checkpoint={folder}"]
    out = run(capsys, *given)[1]
    assert out.splitlines()[-1] == f"to see how it went: fedavg report {typed} -o report.html"
    *_, words = (shlex.split(line) for line in out.splitlines()[-1:])
    assert run(capsys, *words[6:])[0] == 0
    assert Path("report.html").stat().st_size > 0


def test_without_a_folder_there_is_a_new_one(
    training: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "run", training, "--rounds", 1, "--clients", 1)[0] == 0
    (folder,) = (tmp_path / "fedavg-runs").iterdir()
    assert folder.name.endswith("-training")
    assert final(folder).keys() == {"w"}


class TestKeepingUpdates:
    """With ``--keep-updates`` each round of a run can be averaged again."""

    @pytest.mark.parametrize(
        "settings", [[], ["--transfer", "diff", "--workers", 2, "--optimizer", "fedadam"]]
    )
    def test_every_round_is_verified_from_its_folder(
        self, training: Path, tmp_path: Path, capsys: Capture, settings: list[Any]
    ) -> None:
        folder = tmp_path / "run"
        given = ["run", training, "--checkpoint", folder, "--clients", 3, *settings]
        code, out, _ = run(capsys, *given, "--rounds", 4, "--keep-updates")
        assert code == 0
        command = out.splitlines()[-1].removeprefix("to check the last round: fedavg ")
        name, record, pattern, *rest = shlex.split(command)
        files = sorted(Path(pattern).parent.glob(Path(pattern).name))
        assert run(capsys, name, record, *files, *rest)[0] == 0
        assert run(capsys, *given, "--rounds", 6, "--resume")[0] == 0  # it still keeps them
        for number in range(6):
            updates = sorted((folder / f"updates-{number:08d}").iterdir())
            assert [path.name for path in updates] == [f"site-{n}.npz" for n in (1, 2, 3)]
            audit = folder / f"audit-{number:08d}.json"
            name = f"round-{number:08d}.npz" if number else "first-model.npz"
            code, out, err = run(capsys, "verify", audit, *updates, "--base", folder / name)
            assert (code, err) == (0, "")
            assert out.startswith(f"round {number}: the same bits (updates: 3")

    def test_what_is_refused_is_not_kept_nor_what_an_interrupted_round_had(
        self, tmp_path: Path, capsys: Capture
    ) -> None:
        training = written(
            tmp_path,
            """
            import numpy as np
            import fedavg_core as fc

            def train(params, context):
                if context.contributor == "site-2":
                    return fc.TrainResult({"w": np.array([np.nan])}, 1)
                return fc.TrainResult({"w": np.array([1.0]), "scalar": np.float64(2)}, 1)
            """,
        )
        folder = tmp_path / "run"
        stale = folder / "updates-00000000" / "site-9.npz"
        stale.parent.mkdir(parents=True)
        stale.touch()
        write_settings(folder, {})
        given = ["--clients", 3, "--rounds", 1, "--checkpoint", folder, "--keep-updates"]
        assert run(capsys, "run", training, *given, "--resume")[0] == 0
        kept = sorted(stale.parent.iterdir())
        assert [path.name for path in kept] == ["site-1.npz", "site-3.npz"]
        assert run(capsys, "verify", folder / "audit-00000000.json", *kept)[0] == 0

    def test_updates_that_cannot_be_written_are_one_line(
        self, training: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "updates-00000000").touch()
        write_settings(folder, {})
        given = ["--checkpoint", folder, "--keep-updates", "--resume"]
        code, _, err = run(capsys, "run", training, *given)
        updates = folder / "updates-00000000"
        assert code == 2
        assert err.endswith(f"\nfedavg: {updates}: the folder could not be made (File exists)\n")


class TestResuming:
    """A run that is stopped anywhere and resumed has the bits of one that is not."""

    @pytest.fixture
    def whole(self, training: Path, tmp_path: Path, capsys: Capture) -> Path:
        folder = tmp_path / "whole"
        given = ["--clients", 4, "--rounds", 4, "--checkpoint", folder]
        assert run(capsys, "run", training, *given)[0] == 0
        return folder

    def same_runs(self, one: Path, other: Path) -> bool:
        def told(folder: Path) -> list[Any]:
            return [
                (record.round, record.metrics, record.evaluation, record.norm)
                for record in read_log(folder)
            ]

        return fc.same_bits(final(one), final(other)) and told(one) == told(other)

    def test_more_rounds_are_added_to_a_run(
        self, training: Path, whole: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "run"
        shared = ["run", training, "--clients", 4, "--checkpoint", folder, "--resume"]
        said = [
            f"fedavg: nothing to resume in {folder}: starts at round 0\n",
            *("", ""),
            "fedavg: all 4 rounds are done; a larger --rounds adds to them\n",
        ]
        for rounds, expected in zip((1, 3, 4, 4), said, strict=True):
            code, out, err = run(capsys, *shared, "--rounds", rounds)
            assert (code, err) == (0, expected)
        assert out.splitlines()[0] == f"model: {folder / 'model.npz'}"
        assert self.same_runs(folder, whole)
        assert read_settings(folder)["rounds"] == 4

    @pytest.mark.parametrize(
        ("lost", "named"),
        [
            ("round-*", "expected a checkpoint of the 3 rounds that .*rounds.jsonl tells of"),
            ("r*", "expected the folder of a run, or a new or empty one, got .*nor a run.json"),
        ],
    )
    def test_a_folder_that_is_no_run_s_or_has_lost_too_much_is_left_alone(
        self, training: Path, whole: Path, lost: str, named: str, capsys: Capture
    ) -> None:
        for path in whole.glob(lost):
            path.unlink()
        before = {path: path.read_bytes() for path in whole.iterdir()}
        arguments = ["run", training, "--clients", 4, "--checkpoint", whole, "--resume"]
        assert re.search(f"--resume: {named}", fails(capsys, *arguments))
        assert {path: path.read_bytes() for path in whole.iterdir()} == before

    def test_a_run_that_was_stopped_in_its_first_round_begins_anew(
        self, training: Path, whole: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        stopped, empty = tmp_path / "stopped", tmp_path / "empty"
        for folder in (stopped, empty):
            folder.mkdir()
            (folder / ".lock").touch()
        write_settings(stopped, read_settings(whole))
        append_round(stopped, read_log(whole)[0])
        for folder in (stopped, empty):
            arguments = ["run", training, "--clients", 4, "--rounds", 4]
            code, _, err = run(capsys, *arguments, "--checkpoint", folder, "--resume")
            assert (code, err) == (0, f"fedavg: nothing to resume in {folder}: starts at round 0\n")
            assert self.same_runs(folder, whole)

    def test_the_last_round_is_the_last_that_was_played(
        self, training: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "run"
        shared = ["run", training, "--checkpoint", folder, "--resume", "--keep-updates"]
        for rounds in 3, 2:
            _, out, _ = run(capsys, *shared, "--rounds", rounds)
            assert f"to check the last round: fedavg verify {folder / 'audit-00000002'}" in out

    @pytest.mark.parametrize("when", ["train", "evaluate", "log", "checkpoint", "stored"])
    def test_a_run_that_was_interrupted_goes_on(
        self,
        when: str,
        training: Path,
        whole: Path,
        tmp_path: Path,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = tmp_path / "run"
        shared = ["run", training, "--clients", 4, "--rounds", 4, "--checkpoint", folder]
        calls = 0

        def interrupting(function: Any, at: int) -> Any:
            def called(*given: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise KeyboardInterrupt
                return function(*given, **named)

            return called

        with monkeypatch.context() as patch:
            if when == "log":
                patch.setattr(run_module, "append_round", interrupting(append_round, 3))
            elif when == "checkpoint":
                save = interrupting(fc.CheckpointStore.save, 3)
                patch.setattr(fc.CheckpointStore, "save", lambda *given: save(*given))
            elif when == "stored":
                patch.setattr(fc.CheckpointStore, "_prune", interrupting(lambda _: None, 2))
            elif when == "train":
                patch.setattr(Watch, "_norm", interrupting(lambda *_: None, 10))
            else:
                patch.setattr(Watch, "record", interrupting(Watch.record, 3))
            code, out, err = run(capsys, *shared)
        assert code == 130
        assert [line.split()[0] for line in out.splitlines()] == ["round", "0", "1"]
        assert err == (
            "fedavg: interrupted; 2 of 4 rounds are done, and the same command goes on with them, "
            f"with --checkpoint {folder} --resume\n"
        )
        assert not (folder / "model.npz").exists()
        assert len(read_log(folder)) == (3 if when == "checkpoint" else 2)
        assert run(capsys, *shared, "--resume")[0] == 0
        assert self.same_runs(folder, whole)

    @pytest.mark.parametrize("word", ["0", "1"])
    def test_a_round_is_shown_once_when_the_run_is_interrupted_while_it_is_shown(
        self, word: str, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = InterruptedOutput(word)
        monkeypatch.setattr(sys, "stdout", output)
        given = ["run", str(training), "--checkpoint", str(tmp_path / "run"), "--rounds", "3"]
        assert main(given) == 130
        assert output.rows() == ["0", "1"][: int(word) + 1]

    def test_a_line_that_was_cut_off_is_passed_over(
        self, training: Path, whole: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "run"
        shared = ["run", training, "--clients", 4, "--checkpoint", folder]
        assert run(capsys, *shared, "--rounds", 2)[0] == 0
        with open(folder / LOG, "ab") as file:
            file.write(b'{"round": 2, "contri')
        assert len(read_log(folder)) == 2
        assert run(capsys, *shared, "--rounds", 4, "--resume")[0] == 0
        assert self.same_runs(folder, whole)

    def test_only_the_run_that_it_was_is_resumed(
        self, training: Path, whole: Path, capsys: Capture
    ) -> None:
        shared = ["run", training, "--clients", 4, "--checkpoint", whole]
        before = (whole / LOG).read_bytes()
        told = fails(capsys, *shared)
        assert (
            told
            == f"--checkpoint: expected a new or empty folder, or --resume as well, got {whole}"
        )
        for setting, had, other in (
            ("clients", 4, 10),
            ("fraction", 1.0, 0.5),
            ("transfer", "full", "diff"),
            ("accumulator", "exact", "float64"),
            ("optimizer", "none", "fedavg:learning_rate=0.5"),
            ("seed", 0, 9),
        ):
            told = fails(
                capsys, "run", training, "--checkpoint", whole, "--resume", f"--{setting}", other
            )
            assert told == f"--{setting}: this run has {had}, got {other}"
        assert (whole / LOG).read_bytes() == before

    def test_settings_that_are_not_given_are_those_of_the_run(
        self, training: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        first, other = tmp_path / "first", tmp_path / "other"
        settings = ["--clients", 4, "--fraction", 0.5, "--seed", 7, "--transfer", "diff"]
        settings += ["--accumulator", "trimmed-mean:trim=0.1", "--optimizer", "fedadam:tau=0.25"]
        assert run(capsys, "run", training, "--checkpoint", other, *settings, "--rounds", 4)[0] == 0
        given = ["run", training, "--checkpoint", first]
        assert run(capsys, *given, *settings, "--rounds", 2, "--audit")[0] == 0
        code, _, err = run(capsys, *given, "--resume", "--rounds", 4)
        assert (code, err) == (0, "")
        assert self.same_runs(first, other)
        kept = read_settings(first)
        for name in ("clients", "fraction", "seed", "transfer", "accumulator", "optimizer"):
            assert kept[name] == read_settings(other)[name]
        assert [path.name for path in sorted(first.glob("audit-*"))] == [
            f"audit-{number:08d}.json" for number in range(4)
        ]
        code, out, err = run(capsys, *given, "--resume", "--json")
        assert (code, out) == (0, "")
        assert err == "fedavg: all 4 rounds are done; a larger --rounds adds to them\n"

    def test_a_run_that_is_done_and_lost_its_log_still_gives_its_model(
        self, training: Path, whole: Path, capsys: Capture
    ) -> None:
        before = final(whole)
        (whole / LOG).unlink()
        assert run(capsys, "run", training, "--checkpoint", whole, "--resume")[0] == 0
        assert fc.same_bits(final(whole), before)

    def test_a_training_file_that_has_changed_is_told(
        self, training: Path, whole: Path, capsys: Capture
    ) -> None:
        with open(training, "a", encoding="utf-8") as file:
            file.write("# another\n")
        given = ["run", training, "--checkpoint", whole, "--resume", "--rounds"]
        said = (
            f"fedavg: {training} has changed since the rounds that are done; those that are left "
            "are played with it as it is now\n"
        )
        for rounds, expected in ((5, said), (6, "")):
            code, _, err = run(capsys, *given, rounds)
            assert (code, err) == (0, expected)

    def test_another_training_file_is_told_with_the_one_before(
        self, training: Path, whole: Path, capsys: Capture
    ) -> None:
        same = written(training.parent, TRAINING, "same.py")
        other = written(training.parent, TRAINING + "    # another\n", "other.py")
        given = ["--checkpoint", whole, "--resume", "--rounds"]
        assert run(capsys, "run", same, *given, 5)[::2] == (0, "")
        assert run(capsys, "run", other, *given, 6)[::2] == (
            0,
            "fedavg: the rounds that are done were played with same.py; those that are left are "
            f"played with {other}\n",
        )
        assert read_settings(whole)["training_file"] == "other.py"

    @pytest.mark.parametrize("kept", ["2020-02-03T04:05:06+00:00", None])
    def test_it_began_when_its_first_round_did(
        self, training: Path, whole: Path, capsys: Capture, kept: str | None
    ) -> None:
        now = read_settings(whole)["started"]
        write_settings(whole, {**read_settings(whole), "started": kept})
        given = ["run", training, "--checkpoint", whole, "--resume", "--rounds", 5]
        assert run(capsys, *given)[0] == 0
        began = read_settings(whole)["started"]
        assert began == kept if kept else began >= now

    def test_a_run_that_tells_no_settings_has_those_that_are_given(
        self, training: Path, whole: Path, capsys: Capture
    ) -> None:
        (whole / SETTINGS).unlink()
        given = ["run", training, "--checkpoint", whole, "--resume", "--rounds", 5]
        assert "has other clients" in fails(capsys, *given)
        assert run(capsys, *given, "--clients", 4)[::2] == (0, "")

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("clients", "many", "clients: expected a whole number of at least 1, got 'many'"),
            ("transfer", [], "transfer: expected full or diff, got '[]'"),
            ("accumulator", {"trim": 1}, "accumulator: "),
            ("optimizer", {"name": "fedadam", "tau": "x"}, "optimizer: expected settings as name"),
        ],
    )
    def test_settings_of_another_shape_are_not_believed(
        self, name: str, value: Any, problem: str, training: Path, whole: Path, capsys: Capture
    ) -> None:
        settings = {**read_settings(whole), name: value}
        (whole / SETTINGS).write_text(json.dumps(settings))
        told = fails(capsys, "run", training, "--checkpoint", whole, "--resume")
        assert told.startswith(f"{whole / SETTINGS}: {problem}")

    def test_ctrl_c_leaves_what_the_same_command_goes_on_with(
        self, training: Path, whole: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "run"
        slow = tmp_path / "slow" / "training.py"
        slow.parent.mkdir()
        wait = "import time, os; time.sleep(float(os.environ.get('WAIT', 0))); rng = np"
        slow.write_text(training.read_text().replace("rng = np", wait, 1))
        given = ["run", slow, "--clients", 4, "--rounds", 4, "--checkpoint", folder]
        process = subprocess.Popen(
            [sys.executable, "-m", "fedavg_core.cli", *map(str, given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "WAIT": "0.05"},
        )
        end = time.monotonic() + 60
        while len(fc.CheckpointStore(folder).paths()) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.07)  # into the third round
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.startswith(b"fedavg: interrupted; ")
        assert err.count(b"\n") == 1
        assert not (folder / "model.npz").exists()
        code, _, told = run(capsys, *given, "--resume")
        assert (code, told) == (0, "")
        assert self.same_runs(folder, whole)


def test_two_runs_do_not_write_to_one_folder(
    training: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "run"
    shared = ["run", training, "--clients", 2, "--checkpoint", folder, "--resume"]
    assert run(capsys, *shared, "--rounds", 1)[0] == 0
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with fc.CheckpointStore(folder):
        assert fails(capsys, *shared, "--rounds", 2) == (
            f"{folder}: another writer is at work in this folder"
        )
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


BAD_TRAINING: dict[str, tuple[str, str]] = {
    "syntax": ("def train(:", "cannot be imported: SyntaxError: invalid syntax"),
    "raises": ("x = 1\nraise ValueError('a\\nb')", r"ValueError: a\nb (training.py, line 2)"),
    "exits": (
        "import sys; sys.exit('bye')",
        "SystemExit: bye (training.py, line 1); what is not for here belongs under: if __name__ ==",
    ),
    "empty": ("", "expected a function train, got none"),
    "number": ("train = 3", "expected a function train, got an int"),
    "evaluate": ("def train(p, c): ...\nevaluate = 3", "expected a function evaluate, got an int"),
    "initial": (
        "def train(p, c): ...\ndef initial_model(seed): return seed / 0",
        "initial_model, of training.py, failed: ZeroDivisionError: division by zero (training.py, ",
    ),
    "model": (
        "def train(p, c): ...\ndef initial_model(seed): return [seed]",
        "training.py: initial_model: expected a model as a mapping from names to arrays, "
        "got a list",
    ),
    "no model": (
        "def train(p, c): ...\ndef initial_model(seed): ...",
        "training.py: initial_model: expected a model as a mapping from names to arrays, got ",
    ),
    "empty model": (
        "def train(p, c): ...\ndef initial_model(seed): return {}",
        "training.py: initial_model: expected at least one parameter, got none",
    ),
    "list": (
        "def train(p, c): ...\ndef initial_model(seed): return {'w': [1.0, 2.0]}",
        "training.py: initial_model: key 'w': expected a NumPy array, got a list",
    ),
    "key": (
        "import numpy as np\ndef train(p, c): ...\ndef initial_model(seed): return {3: np.ones(2)}",
        "training.py: initial_model: expected parameter names that are strings, got 3",
    ),
    "nan": (
        "import numpy as np\ndef train(p, c): ...\n"
        "def initial_model(seed): return {'b': np.ones(1), 'w': np.array([[1, np.nan]])}",
        "training.py: initial_model: key 'w': expected finite numbers, got nan at [0, 1]",
    ),
    "infinite": (
        "import numpy as np\ndef train(p, c): ...\n"
        "def initial_model(seed): return {'w': np.float32(-np.inf)}",
        "training.py: initial_model: key 'w': expected finite numbers, got -inf at []",
    ),
    "nulls": ("\0", "cannot be imported: "),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_a_bad_training_file_is_one_line(name: str, tmp_path: Path, capsys: Capture) -> None:
    text, problem = BAD_TRAINING[name]
    training = written(tmp_path, text)
    assert problem in fails(capsys, "run", training, "--checkpoint", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_file_may_have_classes_and_modules_of_its_own(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_training_file.py").write_text("HALF = 0.5\n")
    training = written(
        tmp_path,
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import ClassVar
        import numpy as np
        import fedavg_core as fc

        @dataclass
        class Step:
            none: ClassVar[float] = 0
            size: float = 1

        def train(params, context):
            from beside_the_training_file import HALF
            return fc.TrainResult({"w": np.full(2, Step(HALF).size)}, weight=1)

        if __name__ == "__main__":
            raise SystemExit("not here")
        """,
    )
    assert run(capsys, "run", training, "--rounds", 1, "--checkpoint", tmp_path / "run")[0] == 0
    assert final(tmp_path / "run")["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("evaluation", "problem"),
    [
        (
            "raise KeyError('a')",
            "evaluate, of training.py, failed: KeyError: 'a' (training.py, line 19)",
        ),
        ("exit('no')", "evaluate, of training.py, failed: SystemExit: no (training.py, line 19)"),
        ("return 3", "evaluate: expected a mapping from names to numbers, got 3"),
        ("return {'a': 'b'}", "evaluate: expected a mapping from names to numbers, got {'a': 'b'}"),
    ],
)
def test_an_evaluation_that_fails_is_told_and_ends_nothing(
    evaluation: str, problem: str, training: Path, tmp_path: Path, capsys: Capture
) -> None:
    wanted = in_memory(training)
    with open(training, "a", encoding="utf-8") as file:
        file.write("\nrounds = [0, 1, 2, 3]\n")
        file.write(
            f"def evaluate(params):\n    if rounds.pop(0) in bad: {evaluation}\n"
            "    return {'a': 1}\n"
        )
    source = training.read_text()
    folder = tmp_path / "some"
    training.write_text(f"{source}bad = [0, 2]\n")
    given = ["run", training, "--clients", 4, "--rounds", 4, "--checkpoint"]
    code, out, err = run(capsys, *given, folder)
    assert (code, err) == (0, "")
    told = [line.split()[0] for line in out.splitlines()]
    assert told == ["round", "0", problem.split()[0], "round", "1", "2", told[2], "3", *told[-2:]]
    assert out.count(f"       {problem}\n") == 2
    assert [record.evaluation for record in read_log(folder)] == [{}, {"a": 1}, {}, {"a": 1}]
    assert fc.same_bits(final(folder), wanted.model)
    assert run(capsys, "report", folder)[0] == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("not evaluated") == 2

    training.write_text(f"{source}bad = [0, 1, 2, 3]\n")
    code, out, err = run(capsys, *given, tmp_path / "none")
    assert code == 2
    assert err.startswith(
        f"fedavg: the model is written, but no round could be evaluated: {problem}"
    )
    assert fc.same_bits(final(tmp_path / "none"), wanted.model)


def test_a_file_for_nvflare_runs_as_it_is(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    training = written(
        tmp_path,
        """
        import sys
        import numpy as np
        import fedavg_core as fc
        import nvflare_adapter

        FAULT = sys.argv[1] if len(sys.argv) > 1 else "none"

        def initial_model(seed):
            return {"w": np.zeros(3, np.float32)}

        def train(params, context):
            if context.contributor == "site-2":
                raise ValueError("the disk is on fire")
            if context.contributor == "site-3":
                params["w"][1] = np.nan
            return fc.TrainResult({"w": params["w"] + 1}, weight=1)

        def evaluate(params):
            if params["w"][0] == 1:
                raise OSError("no test data")
            return {"accuracy": 0.5, "fault": float(FAULT == "none")}

        if __name__ == "__main__":
            nvflare_adapter.serve(train, evaluate)
        """,
    )
    for workers in (1, 2):
        folder = tmp_path / f"run-{workers}"
        given = ["--clients", 4, "--rounds", 2, "--workers", workers, "--checkpoint", folder]
        code, out, err = run(capsys, "run", training, *given)
        assert (code, err) == (0, "")
        lines = [line.strip() for line in out.splitlines()[:-2]]
        assert [line for line in lines if not line[0].isdecimal()] == [
            "round  accepted    weight   seconds",
            "site-3 refused: expected finite numbers, got nan at [1] (NON_FINITE, key 'w')",
            "site-2 failed: ValueError: the disk is on fire (training.py, line 14)",
            "evaluate, of training.py, failed: OSError: no test data (training.py, line 21)",
            "round  accepted    weight  test accuracy  test fault   seconds",
            "site-3 refused: expected finite numbers, got nan at [1] (NON_FINITE, key 'w')",
            "site-2 failed: ValueError: the disk is on fire (training.py, line 14)",
        ]
        rounds = [line.split()[:6] for line in lines if line[0].isdecimal()]
        assert rounds[0][:5] == ["0", "2", "of", "4", "2"]
        assert rounds[1] == ["1", "2", "of", "4", "2", "50.00%"]
        assert final(folder)["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.py"], "expected a Python file, got nowhere.py, which is not there"),
        (["."], "expected a Python file, got ."),
        (["t.py", "--clients", "0"], "argument --clients: expected a whole number of at least 1, "),
        (["t.py", "--rounds", "ten"], "argument --rounds: expected a whole number of at least 1, "),
        (
            ["t.py", "--fraction", "0"],
            "argument --fraction: expected a fraction above 0 and up",
        ),
        (
            ["t.py", "--fraction", "x"],
            "argument --fraction: expected a fraction above 0 and up",
        ),
        (["t.py", "--transfer", "x"], "argument --transfer: expected full or diff, "),
        (["t.py", "--optimizer", "x"], "argument --optimizer: server optimizer: expected one of "),
        (["t.py", "--optimizer", "fedadam:x=1"], "argument --optimizer: server optimizer fedadam:"),
        (["t.py", "--optimizer", "fedadam:tau"], "argument --optimizer: expected settings as name"),
        (["t.py", "--optimizer", "fedadam:tau=0"], "argument --optimizer: tau: expected a finite "),
        (
            ["t.py", "--accumulator", "x"],
            "argument --accumulator: expected one of exact, float64, ",
        ),
        (
            ["t.py", "--accumulator", "float64:x=1"],
            "argument --accumulator: expected one of exact, f",
        ),
        (
            ["t.py", "--accumulator", "krum", "--clients", "3"],
            "argument --accumulator: a krum needs at least 5 updates a round, got 3 clients",
        ),
        (
            ["t.py", "--accumulator", "multi-krum:faulty=2,keep=1", "--fraction", ".2"],
            "argument --accumulator: a multi-krum needs at least 7 updates a round, got 2 clients",
        ),
        (["t.py", "--accumulator", "krum:x=1"], "argument --accumulator: robust mean krum: expec"),
        (
            ["t.py", "--accumulator", "clipped-mean"],
            "argument --accumulator: a clipped-mean is of ",
        ),
        (["t.py", "--accumulator", "krum:name=3"], "argument --accumulator: expected settings as"),
        (["t.py", "--accumulator", "krum:spec=3"], "argument --accumulator: expected settings as"),
        (["t.py", "--resume"], "--resume: expected --checkpoint DIR as well"),
        (["t.py", "--checkpoint", "t.py"], "--checkpoint: expected a folder, got t.py"),
        (["t.py", "--checkpoint", "t.py", "--resume"], "--checkpoint: expected a folder, got t.py"),
        (["t.py", "--transfer", "diff"], "argument --transfer: "),
    ],
)
def test_what_is_wrong_with_the_arguments_is_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "def train(params, context): ...", "t.py")
    assert fails(capsys, "run", *arguments).startswith(problem)


def test_on_a_terminal_a_bar_moves_while_clients_train(
    training: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    given = ["--clients", 3, "--rounds", 2, "--checkpoint", tmp_path / "run"]
    code, out, err = run(capsys, "run", training, *given)
    assert (code, err) == (0, "")
    assert "round 1 (0 to 1)" in out
    assert "3/3" in out


class TestTheLog:
    """What is read back from a run's folder, whatever is in it."""

    @pytest.fixture
    def folder(self, training: Path, tmp_path: Path, capsys: Capture) -> Path:
        folder = tmp_path / "run"
        given = ["--clients", 2, "--rounds", 2, "--checkpoint", folder]
        assert run(capsys, "run", training, *given)[0] == 0
        return folder

    def test_numbers_that_json_does_not_have_are_null(
        self, tmp_path: Path, capsys: Capture
    ) -> None:
        training = written(
            tmp_path,
            """
            import numpy as np
            import fedavg_core as fc

            def train(params, context):
                return fc.TrainResult({"w": np.full(3, 1e308)}, weight=2**400)

            def evaluate(params):
                return {"lost": float("nan"), "far": float("inf"), "good": 1}
            """,
        )
        given = ["--clients", 2, "--rounds", 1, "--checkpoint", tmp_path / "run", "--json"]
        code, out, err = run(capsys, "run", training, *given)
        assert (code, err) == (0, "")
        told = json.loads(out, parse_constant=lambda name: pytest.fail(name))
        assert told["evaluation"] == {"lost": None, "far": None, "good": 1.0}
        assert told["contributions"][0]["norm"] is None
        assert told["contributions"][0]["weight"] == 2.0**400
        assert read_log(tmp_path / "run")[0].evaluation["good"] == 1.0
        code, out, _ = run(capsys, "run", training, "--rounds", 1, "--checkpoint", tmp_path / "2")
        assert code == 0
        assert out.splitlines()[1].split()[-4:-1] == ["nan", "inf", "1.0000"]

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda line: b"[]", "line 2 is no round of a run ("),
            (lambda line: b"[" * 100_000, "line 2 is no round of a run ("),
            (lambda line: b"{" + line, "line 2 is no round of a run ("),
            (lambda line: b"\xff", "line 2 is no round of a run ("),
            (lambda line: line.replace(b'"round": 1', b'"round": true'), "round is True"),
            (lambda line: line.replace(b'"round": 1', b'"round": -1'), "round is -1"),
            (lambda line: line.replace(b'"round": 1', b'"round": 0'), "round 0 is there twice"),
            (lambda line: line.replace(b'"accepted"', b'"lost"'), "a status is 'lost'"),
            (lambda line: line.replace(b'"norm": ', b'"norm": [], "lost": ', 1), "norm is []"),
            (lambda line: line.replace(b'"problem": null', b'"problem": 3'), "problem is 3"),
            (lambda line: line.replace(b'"peak_bytes": ', b'"peak_bytes": -'), "peak_bytes is -"),
            (lambda line: line.replace(b'"site-1"', b"null"), "contributor is None"),
            (lambda line: line.replace(b'"weight": 1', b'"weight": "1"'), "weight is '1'"),
        ],
    )
    def test_a_line_of_another_shape_is_an_error(
        self, folder: Path, change: Any, problem: str
    ) -> None:
        first, second, _ = (folder / LOG).read_bytes().split(b"\n")
        (folder / LOG).write_bytes(first + b"\n" + change(second) + b"\n")
        with pytest.raises(fc.CheckpointError) as caught:
            read_log(folder)
        assert problem in str(caught.value)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"fedavg_run": 2}', b"[" * 100_000])
    def test_settings_of_another_shape_are_an_error(self, folder: Path, text: bytes) -> None:
        (folder / SETTINGS).write_bytes(text)
        with pytest.raises(fc.CheckpointError, match="no settings of a run"):
            read_settings(folder)

    def test_what_is_not_there_or_not_a_file_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(fc.CheckpointError, match="expected a file of a run, there is none"):
            read_log(tmp_path)
        (tmp_path / SETTINGS).mkdir()
        with pytest.raises(fc.CheckpointError, match="expected a file of a run, there is none"):
            read_settings(tmp_path)

    def test_a_log_without_end_is_not_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        os.truncate(folder / LOG, 1 << 32)
        with pytest.raises(fc.CheckpointError, match="it is too long"):
            read_log(folder)

    def test_an_error_of_the_system_is_told(
        self, folder: Path, training: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            with pytest.raises(fc.CheckpointError, match=r"could not be read \(Input/output"):
                read_log(folder)
        record = read_log(folder)[0]
        with pytest.raises(fc.CheckpointError, match=r"could not be written \(No such file"):
            append_round(folder / "none", record)
        given = ["--clients", 2, "--rounds", 3, "--checkpoint", folder, "--resume"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert "could not be written (Input/output error)" in fails(
                capsys, "run", training, *given
            )

    def test_a_number_beyond_float64_is_unknown(self, folder: Path) -> None:
        text = (
            (folder / LOG).read_bytes().replace(b'"weight": 1,', b'"weight": 1' + b"0" * 400 + b",")
        )
        (folder / LOG).write_bytes(text)
        assert [one.weight for one in read_log(folder)[0].contributions] == [None, 2]

    def test_a_log_begins_anew_where_rounds_are_played_again(self, folder: Path) -> None:
        start_log(folder, 1)
        assert [record.round for record in read_log(folder)] == [0]
        start_log(folder, 0)
        assert read_log(folder) == []


def test_the_most_memory_is_what_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mib() -> float:
        return (peak_bytes() or 0) / 2**20

    assert 10 < mib() < 1 << 20
    status = tmp_path / "status"
    monkeypatch.setattr(watch, "_STATUS", status)
    assert 10 < mib() < 1 << 20
    status.write_text("VmPeak:\t 9 kB\n")
    assert 10 < mib() < 1 << 20
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t    2048 kB\n")
    assert mib() == 2


def test_norms_are_those_of_linear_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a: Model = {
        "w": rng.standard_normal((300, 300)),
        "b": rng.standard_normal(3).astype(np.float16),
    }
    b = {"w": rng.standard_normal((300, 300))}
    flat = np.concatenate([(a["w"] - b["w"]).reshape(-1), a["b"]])
    assert norm_of_difference(a, b) == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)
    assert norm_of_difference({}, {}) == 0
    assert math.isnan(norm_of_difference({"w": np.array([np.nan])}, {}))
    assert norm_of_difference({"w": np.array([np.inf])}, {}) == math.inf
    assert norm_of_difference({"a": np.full(9, 1e154), "b": np.full(9, 1e154)}, {}) > 1e154
    assert norm_of_difference({str(i): np.full(2, 1.3e154) for i in range(9)}, {}) == math.inf


def test_a_folder_that_was_not_asked_for_is_told_beside_the_json(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "run", training, "--clients", 1, "--rounds", 1, "--json")
    (folder,) = Path("fedavg-runs").iterdir()
    assert (code, err) == (0, f"fedavg: the run's folder: {folder}\n")
    assert json.loads(out)["round"] == 0


CHATTY = TRAINING.replace("rng = np", "print('x' * 99_999); rng = np", 1)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "given", [[], ["--json"], ["--workers", "2"], ["--workers", "2", "--json"]]
)
def test_a_run_whose_output_nobody_reads_goes_on(
    given: list[str], unbuffered: str, tmp_path: Path, capsys: Capture
) -> None:
    training = written(tmp_path, CHATTY)
    read, write = os.pipe()
    os.close(read)
    shared = ["run", training, "--clients", 2, "--rounds", 2, "--checkpoint"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedavg_core.cli"),
            *map(str, [*shared, tmp_path / "run", *given]),
        ],
        stdout=write,
        stderr=write if "--json" in given else subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr or b"") == (0, b"")
    assert [one.count("accepted") for one in read_log(tmp_path / "run")] == [2, 2]
    assert run(capsys, *shared, tmp_path / "whole")[0] == 0
    assert fc.same_bits(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_a_problem_that_nobody_reads_is_an_error_all_the_same(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fedavg_core.cli", "inspect", str(tmp_path / "missing.npz")],
        stderr=write,
        check=False,
    )
    os.close(write)
    assert done.returncode == 2
