"""The one line that joins a training file to either world."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import fedavg_core as fc
import nvflare_adapter
from nvflare_adapter import digits
from tests.nvflare.training import faulty, no_serve, own_start


def test_a_training_file_hands_over_its_functions() -> None:
    training: Any = nvflare_adapter.read_training_file(Path(digits.__file__), ["--alpha", "2"])
    assert training.train.keywords == {"alpha": 2.0}
    assert training.initial_model(0).keys() == digits.initial_model(0).keys()
    assert training.evaluate(training.initial_model(0)).keys() == {"accuracy", "loss"}


def test_a_training_file_may_have_a_train_function_alone() -> None:
    training = nvflare_adapter.read_training_file(Path(own_start.__file__))
    assert training.initial_model is None
    assert training.evaluate is None


def test_a_training_file_sees_its_own_arguments_and_nobody_elses_change() -> None:
    before = list(sys.argv)
    training: Any = nvflare_adapter.read_training_file(Path(faulty.__file__), ["nan"])
    assert training.train.__globals__["FAULT"] == "nan"
    assert sys.argv == before


def test_a_training_file_finds_the_modules_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "steps_beside_it.py").write_text("SIZE = 3")
    path = tmp_path / "train.py"
    path.write_text(
        "import nvflare_adapter\n"
        "def train(params, context):\n"
        "    from steps_beside_it import SIZE\n"
        "    return SIZE\n"
        "nvflare_adapter.serve(train)\n"
    )
    training: Any = nvflare_adapter.read_training_file(path)
    assert training.train({}, None) == 3


def test_a_training_file_that_serves_nothing_is_told_so() -> None:
    with pytest.raises(fc.UsageError, match=r"no_serve\.py: expected the file to end by calling"):
        nvflare_adapter.read_training_file(Path(no_serve.__file__))


def test_what_cannot_be_called_cannot_be_served() -> None:
    with pytest.raises(fc.UsageError, match="expected a function, got int"):
        nvflare_adapter.serve(3)  # type: ignore[arg-type]


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = nvflare_adapter.no_such_name
