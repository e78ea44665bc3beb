"""Paths, wherever the package takes one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedavg_core as fc
from fedavg_core.file_path import file_path

MODEL = {"w": np.ones(2, np.float32)}
TAKERS: dict[str, Callable[[Any, Path], object]] = {
    "load_model: path": lambda path, _: fc.load_model(path),
    "load_checkpoint: path": lambda path, _: fc.load_checkpoint(path),
    "save_checkpoint: path": lambda path, _: fc.save_checkpoint(
        path, fc.Checkpoint(model=MODEL, round=0)
    ),
    "CheckpointStore: folder": lambda path, _: fc.CheckpointStore(path),
    "Federation: checkpoint": lambda path, _: fc.Federation(
        MODEL, {"a": lambda params, _: fc.TrainResult(params, 1)}, rounds=1, checkpoint=path
    ),
    "aggregate_files: paths[1]": lambda path, model: fc.aggregate_files(
        [model, path], [1, 2], model.with_name("out.npz")
    ),
    "aggregate_files: output": lambda path, model: fc.aggregate_files([model], [1], path),
    "aggregate_files: base": lambda path, model: fc.aggregate_files(
        [model], [1], model.with_name("out.npz"), base=path
    ),
    "aggregate_files: scratch": lambda path, model: fc.aggregate_files(
        [model], [1], model.with_name("out.npz"), scratch=path
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("path", [5, b"m.npz", "", "m\0.npz", "\ud800.npz", Path("m\0.npz")])
def test_what_is_no_path_is_told_and_nothing_is_written(
    taker: str, path: object, tmp_path: Path
) -> None:
    model = tmp_path / "model.npz"
    np.savez(model, allow_pickle=False, **MODEL)
    _, name = taker.split(": ")
    with pytest.raises(fc.UsageError) as caught:
        TAKERS[taker](path, model)
    told = str(caught.value)
    assert told.startswith(f"{name}: expected a path, got "), told
    assert told.isprintable()
    assert os.listdir(tmp_path) == ["model.npz"]


class Odd:
    """Says that it is a path, and gives something else, or fails."""

    def __init__(self, given: object) -> None:
        self.given = given

    def __fspath__(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


class OddText(str):
    def __bool__(self) -> bool:
        raise RuntimeError

    def encode(self, *_: object) -> bytes:
        raise RuntimeError


@pytest.mark.parametrize("path", [Odd(3), Odd(b"a.npz"), Odd(RuntimeError("no"))])
def test_what_only_says_that_it_is_a_path_is_told(path: object) -> None:
    with pytest.raises(fc.UsageError, match="path: expected a path, got "):
        fc.load_model(path)  # type: ignore[arg-type]


def test_text_that_answers_oddly_is_read_as_text() -> None:
    assert file_path("path", OddText("a.npz")) == Path("a.npz")


@pytest.mark.parametrize("path", ["a\nforged: line.npz", "x" * 5000 + ".npz"])
def test_a_path_does_not_make_a_message_long_or_of_several_lines(path: str) -> None:
    odd: list[Callable[[], object]] = [
        lambda: fc.load_model(path),
        lambda: fc.load_checkpoint(path),
        lambda: fc.aggregate_files([path], [1], "out.npz"),
        lambda: fc.aggregate_files(["no.npz"], [1], path + ".txt"),
    ]
    for one in odd:
        with pytest.raises(fc.FedAvgError) as caught:
            one()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 4200


def test_a_path_is_taken_as_it_is() -> None:
    odd = os.fsdecode(b"\xff\n.npz")  # a name that is no text, as a folder may hold
    assert file_path("path", odd) == Path(odd)
    assert file_path("path", Path("a") / "..") == Path("a") / ".."
