"""The persistor, without NVFlare's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

import fedavg_core as fc
from nvflare_adapter import CheckpointPersistor, convert
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
    assert fc.same_bits(convert.model_of(held), model)


def test_without_a_file_there_is_no_model_yet(server: Server) -> None:
    held = CheckpointPersistor().load_model(server.context())
    assert convert.model_of(held) == {}
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
    held = convert.learnable(model, {"report": report, "roster": ["site-1"]})
    CheckpointPersistor().save_model(held, server.context(round=2))
    checkpoint = stored(server).load()
    assert fc.same_bits(checkpoint.model, model)
    assert checkpoint.round == 3
    assert checkpoint.metrics == {"loss": 0.1}
    assert checkpoint.extra == {"report": report, "roster": ["site-1"]}


def test_only_the_newest_are_kept(server: Server) -> None:
    persistor = CheckpointPersistor(keep=2)
    for number in range(5):
        held = convert.learnable({"w": np.array([number])})
        persistor.save_model(held, server.context(round=number))
    rounds = [fc.load_checkpoint(path).round for path in stored(server).paths()]
    assert rounds == [4, 5]
