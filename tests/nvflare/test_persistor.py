"""The persistor, without NVFlare's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

import fedavg_core as fc
from nvflare_adapter import CheckpointPersistor, global_model
from tests.nvflare.server_side import Server
from tests.nvflare.training import mixed

pytestmark = pytest.mark.nvflare


@pytest.fixture
def server(tmp_path: Path) -> Any:
    return Server(tmp_path)


def app_folder(server: Server, name: str) -> Any:
    folder = server.folder / "simulate_job" / "app_server" / name
    folder.mkdir(parents=True)
    return folder


def stored(server: Server) -> Any:
    return fc.CheckpointStore(server.folder / "simulate_job" / "models")


@pytest.mark.parametrize("place", ["config", "custom"])
def test_round_0_starts_from_the_file_that_came_with_the_job(server: Server, place: Any) -> None:
    model = mixed.initial_model(3)
    path = app_folder(server, place) / "start"
    fc.save_checkpoint(path, fc.Checkpoint(model=model, round=0))
    held = CheckpointPersistor("start").load_model(server.context())
    assert fc.same_bits(global_model.model_of(held), model)


def test_without_a_file_there_is_no_model_yet(server: Server) -> None:
    held = CheckpointPersistor().load_model(server.context())
    assert global_model.model_of(held) == {}
    assert held.is_empty()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_an_error_and_never_another_model(server: Server, damage: Any) -> None:
    path = app_folder(server, "config") / "start"
    fc.save_checkpoint(path, fc.Checkpoint(model=mixed.initial_model(3), round=0))
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(fc.CheckpointError, match="start"):
        CheckpointPersistor("start").load_model(server.context())


def test_a_round_is_stored_with_its_report_and_read_back_to_the_bit(server: Server) -> None:
    model = mixed.initial_model(4)
    report = {"round": 2, "metrics": {"loss": 0.1}, "accepted": {"site-1": 3}}
    held = global_model.learnable(model, {"report": report, "roster": ["site-1"]})
    CheckpointPersistor().save_model(held, server.context(round=2))
    checkpoint = stored(server).load()
    assert fc.same_bits(checkpoint.model, model)
    assert checkpoint.round == 3
    assert checkpoint.metrics == {"loss": 0.1}
    assert checkpoint.extra == {"report": report, "roster": ["site-1"]}


def test_only_the_newest_are_kept(server: Server) -> None:
    persistor = CheckpointPersistor(keep=2)
    for number in range(5):
        held = global_model.learnable({"w": np.array([number])})
        persistor.save_model(held, server.context(round=number))
    rounds = [fc.load_checkpoint(path).round for path in stored(server).paths()]
    assert rounds == [4, 5]


def test_another_programs_file_on_the_server_is_a_start(server: Server, tmp_path: Path) -> None:
    app_folder(server, "config")
    np.savez(tmp_path / "start.npz", a=np.arange(3.0))
    np.save(tmp_path / "start.npy", np.arange(2, dtype=np.int16))
    ended = fc.Checkpoint({"a": np.arange(4.0)}, round=7, extra={"searches": {"accuracy": [1, 2]}})
    fc.save_checkpoint(tmp_path / "start.ckpt", ended)
    held = [
        CheckpointPersistor(str(tmp_path / f"start.{kind}")).load_model(server.context())
        for kind in ("npz", "npy", "ckpt")
    ]
    assert fc.same_bits(global_model.model_of(held[0]), {"a": np.arange(3.0)})
    assert fc.same_bits(global_model.model_of(held[1]), {"numpy_key": np.arange(2, dtype=np.int16)})
    assert fc.same_bits(global_model.model_of(held[2]), ended.model)
    assert all(global_model.extra_of(one) == {"arrays": {}} for one in held)
    assert stored(server).paths() == ()
    (tmp_path / "start.npz").write_bytes(b"")
    with pytest.raises(fc.CheckpointError, match="start"):
        CheckpointPersistor(str(tmp_path / "start.npz")).load_model(server.context())


def test_a_job_that_goes_on_has_what_the_other_left_in_its_own_folder(server: Server) -> None:
    folder = app_folder(server, "config")
    extra = {"report": {"round": 2}, "job": {"roster": ["site-1"]}}
    start = fc.Checkpoint({"w": np.ones(2)}, round=3, extra=extra)
    fc.save_checkpoint(folder / "start", start)
    fc.save_checkpoint(folder / "best", fc.Checkpoint({"w": np.zeros(2)}, round=1))
    fc.save_checkpoint(folder / "open", fc.Checkpoint({}, round=3))
    persistor = CheckpointPersistor("start", best_file="best", open_file="open")
    held = persistor.load_model(server.context())
    assert global_model.extra_of(held).pop("open").round == 3
    assert global_model.extra_of(held) == {**extra, "arrays": {}}
    assert fc.same_bits(stored(server).load().model, start.model)
    best = fc.load_checkpoint(stored(server).folder / "best_model.npz")
    assert fc.same_bits(best.model, {"w": np.zeros(2)})
    held = global_model.learnable({"w": np.zeros(2)})
    CheckpointPersistor().save_model(held, server.context(round=3))
    assert [path.name for path in stored(server).paths()] == [
        "round-00000003.npz",
        "round-00000004.npz",
    ]


def test_what_is_no_json_is_stored_in_its_place(server: Server) -> None:
    state = {"momentum/w": np.ones(2)}
    extra = {"report": {"round": 0}, "arrays": state, "audit": "what happened"}
    held = global_model.learnable({"w": np.zeros(2)}, extra)
    CheckpointPersistor().save_model(held, server.context(round=0))
    folder = stored(server).folder
    assert (folder / "round-00000001.audit.json").read_text() == "what happened"
    checkpoint = stored(server).load()
    assert fc.same_bits(checkpoint.arrays, state)
    assert checkpoint.extra == {"report": {"round": 0}}
    (app_folder(server, "config") / "start").write_bytes(stored(server).paths()[-1].read_bytes())
    again = CheckpointPersistor("start").load_model(server.context())
    assert fc.same_bits(global_model.extra_of(again)["arrays"], state)


def test_a_single_array_is_stored_as_nvflares_own_persistor_does_too(server: Server) -> None:
    persistor = CheckpointPersistor(numpy_file="server.npy")
    held = global_model.learnable({"numpy_key": np.arange(3)})
    persistor.save_model(held, server.context())
    path = server.folder / "simulate_job" / "models" / "server.npy"
    assert np.load(path).tolist() == [0, 1, 2]
    for other in ({}, {"w": np.ones(3)}):  # clients may bring the first model
        persistor.save_model(global_model.learnable(other), server.context())
        assert np.load(path).tolist() == [0, 1, 2]
