"""``fedavg verify``: exit codes and lines over what `fedavg_core.audit` finds."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

import fedavg_core as fc
from tests.model_files import Model, write_model
from tests.test_cli_files import Capture, fails, run
from tests.test_cli_run import TRAINING, written

KINDS = ("npz", "safetensors", "deflated")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", "npz", model(9))


def model(seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((4, 3)).astype(np.float32),
        "b": np.array(rng.standard_normal()),
        "none": np.ones((2, 0)),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write_model(tmp_path / f"site-{index}", kind, model(index))
        for index, kind in enumerate(KINDS)
    ]


def audited(path: Path, transfer: fc.TransferType) -> Path:
    round = fc.Round(model(9), 3, transfer=transfer, audit=True)
    for index in range(3):
        round.offer(fc.Update(f"site-{index}", 3, model(index), index + 1, transfer))
    outcome = round.close()
    assert outcome.audit is not None
    path.write_text(outcome.audit.to_text())
    return path


def test_help_says_where_a_run_keeps_updates_and_how_audits_are_numbered(
    capsys: Capture,
) -> None:
    run_help, verify_help = (
        " ".join(run(capsys, name, "--help")[1].split()) for name in ("run", "verify")
    )
    assert "those of round 4 in updates-00000004" in run_help
    assert "audit-00000004.json is of round 4" in run_help
    assert "those of audit-00000004.json are in updates-00000004" in verify_help
    assert "the base of audit-00000004.json is round-00000004" in verify_help
    for told in (run_help, verify_help):
        assert "the difference is taken for it" in told


def test_the_updates_of_a_round_give_its_model(
    tmp_path: Path, files: list[Path], base: Path, capsys: Capture
) -> None:
    audit = audited(tmp_path / "audit.json", fc.TransferType.FULL)
    code, out, err = run(capsys, "verify", audit, *files[::-1])
    assert (code, err) == (0, "")
    assert out.startswith("round 3: the same bits (updates: 3, digest of the model: ")
    code, out, err = run(capsys, "verify", audit, *files, "--base", base, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["round"], told["same_bits"], told["missing"]) == (3, True, [])
    assert fails(capsys, "verify", audit, tmp_path) == (
        f"expected the files of updates, got a folder; {tmp_path}/*.npz names some"
    )


def test_a_checkpoint_is_the_model_in_it(
    tmp_path: Path, files: list[Path], capsys: Capture
) -> None:
    audit = audited(tmp_path / "audit.json", fc.TransferType.FULL)
    fc.save_checkpoint(files[1].with_suffix(".npz"), fc.Checkpoint(model(1), 7))
    files[1] = files[1].with_suffix(".npz")
    assert run(capsys, "verify", audit, *files)[0] == 0
    files[1].write_bytes(files[1].read_bytes()[:-5])
    code, out, err = run(capsys, "verify", audit, *files)
    assert (code, err) == (1, "")
    assert "no end of a zip archive" in out


def test_differences_need_their_base(
    tmp_path: Path, files: list[Path], base: Path, capsys: Capture
) -> None:
    audit = audited(tmp_path / "audit.json", fc.TransferType.DIFF)
    assert run(capsys, "verify", audit, *files, "--base", base)[0] == 0
    assert fails(capsys, "verify", audit, *files) == (
        "--base is needed: expected the model before round 3, for its updates are differences from "
        "it, got none (fedavg run --keep-updates keeps it as round-00000003.npz)"
    )
    code, out, _ = run(capsys, "verify", audit, *files, "--base", files[0])
    assert code == 1
    assert "base, key 'w': recorded" in out


@pytest.mark.parametrize("optimizer", [fc.FedAdam(), None])
def test_the_base_may_be_a_checkpoint_which_has_the_state_of_a_server_optimizer(
    tmp_path: Path, files: list[Path], capsys: Capture, optimizer: fc.ServerOptimizer | None
) -> None:
    before: Model = model(9)
    state: dict[str, Any] = {}
    for number in range(2):
        round = fc.Round(
            before, number, audit=True, server_optimizer=optimizer, optimizer_state=state
        )
        for index in range(3):
            round.offer(fc.Update(f"site-{index}", number, model(index), index + 1))
        outcome = round.close()
        assert outcome.audit is not None
        audit, checkpoint = tmp_path / f"audit-{number}.json", tmp_path / f"before-{number}.npz"
        audit.write_text(outcome.audit.to_text())
        fc.save_checkpoint(checkpoint, fc.Checkpoint(before, number, arrays=state))
        before, state = outcome.model, outcome.optimizer_state
    for number in range(2):
        given = [tmp_path / f"audit-{number}.json", *files]
        assert run(capsys, "verify", *given, "--base", tmp_path / f"before-{number}.npz")[0] == 0
    assert run(capsys, "verify", *given, "--base", tmp_path / "before-0.npz")[0] == 1
    model_alone = write_model(tmp_path / "alone", "npz", fc.load_checkpoint(checkpoint).model)
    code, out, _ = run(capsys, "verify", *given, "--base", model_alone)
    assert code == (0 if optimizer is None else 1)
    assert ("key 'momentum/w': recorded float64[4, 3]" in out) == (optimizer is not None)


@pytest.mark.parametrize(
    "optimizer", [{"name": "fedadam"}, {"name": "fedavg"}, {"name": "mine"}], ids=str
)
def test_a_server_optimizer_needs_the_base(
    tmp_path: Path, files: list[Path], capsys: Capture, optimizer: dict[str, Any]
) -> None:
    round = fc.Round(model(9), 0, audit=True)
    for index in range(3):
        round.offer(fc.Update(f"site-{index}", 0, model(index), 1))
    audit = round.close().audit
    assert audit is not None
    path = tmp_path / "audit.json"
    path.write_text(replace(audit, optimizer=optimizer).to_text())
    if optimizer["name"] == "fedadam":
        assert fails(capsys, "verify", path, *files) == (
            "--base is needed: expected the model before round 0, for the server optimizer steps "
            "from it, got none (fedavg run --keep-updates keeps it as first-model.npz)"
        )
    else:
        code, out, _ = run(capsys, "verify", path, *files)
        assert code == 1
        assert "server optimizer" in out


def test_a_round_that_kept_its_model_needs_no_base(tmp_path: Path, capsys: Capture) -> None:
    base: Model = {"w": np.ones(2)}
    round = fc.Round(base, 0, transfer=fc.TransferType.DIFF, audit=True, min_updates=2)
    round.offer(fc.Update("site-1", 0, base, 1, fc.TransferType.DIFF))
    audit = round.close().audit
    assert audit is not None
    path = tmp_path / "audit.json"
    path.write_text(audit.to_text())
    update = write_model(tmp_path / "site-1", "npz", base)
    assert run(capsys, "verify", path, update)[0] == 0


def test_what_is_missing_changed_surplus_or_cannot_be_read_is_told(
    tmp_path: Path, files: list[Path], base: Path, capsys: Capture
) -> None:
    audit = audited(tmp_path / "audit.json", fc.TransferType.FULL)
    write_model(tmp_path / "other", "npz", model(1)).rename(files[0])
    files[2].write_bytes(b"junk")
    code, out, err = run(capsys, "verify", audit, files[0], base, files[2], "--json")
    assert (code, err) == (1, "")
    told = json.loads(out)
    assert told["same_bits"] is False
    assert told["surplus"] == [str(base)]
    assert told["unread"] == [str(files[2])]
    assert set(told["missing"]) == {"site-0", "site-2"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"audit": 1}'])
def test_what_is_no_audit_is_one_line(
    content: bytes, tmp_path: Path, files: list[Path], capsys: Capture
) -> None:
    audit = tmp_path / "audit.json"
    audit.write_bytes(content)
    told = fails(capsys, "verify", audit, *files)
    assert told.startswith(f"{audit}: this is no audit of a round: ")


def test_an_audit_that_is_not_there_or_without_end_is_one_line(
    tmp_path: Path, files: list[Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = tmp_path / "audit.json"
    problem = f"{audit}: expected the file of an audit, there is none"
    assert fails(capsys, "verify", audit, *files) == problem
    problem = f"{tmp_path}: expected the file of an audit, got a folder"
    assert fails(capsys, "verify", tmp_path, *files) == problem
    audit.touch()
    os.truncate(audit, 1 << 40)
    assert fails(capsys, "verify", audit, *files) == f"{audit}: it is too long for an audit"
    os.truncate(audit, 0)

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    problem = f"{audit}: could not be read (Input/output error)"
    assert fails(capsys, "verify", audit, *files) == problem


def test_a_run_can_be_audited(tmp_path: Path, capsys: Capture) -> None:
    training = written(tmp_path, TRAINING)
    folder = tmp_path / "run"
    given = ["--clients", 2, "--rounds", 2, "--checkpoint", folder, "--audit"]
    assert run(capsys, "run", training, *given)[0] == 0
    names: dict[str, Any] = {}
    exec(training.read_text(), names)
    before = fc.CheckpointStore(folder).paths()[0]
    updates = []
    for index, name in enumerate(("site-1", "site-2")):
        context = fc.Context(name, index, 2, 1, 2, fc.contributor_seed(0, 1, name))
        trained = names["train"](dict(fc.load_checkpoint(before).model), context)
        updates.append(write_model(tmp_path / name, "npz", trained.params))
    audit = folder / "audit-00000001.json"
    assert run(capsys, "verify", audit, *updates, "--base", before)[0] == 0
    assert run(capsys, "verify", folder / "audit-00000000.json", *updates)[0] == 1
