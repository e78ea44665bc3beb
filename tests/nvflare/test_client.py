"""The one line that joins a training file to either world."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
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
    with pytest.raises(fc.UsageError, match="expected a function, got an int"):
        nvflare_adapter.serve(3)  # type: ignore[arg-type]


BY_HAND = """
import sys
if sys.argv[1] == "without":
    sys.modules["nvflare"] = None
sys.argv[0] = "my/train.py"
import nvflare_adapter
nvflare_adapter.serve(print)
"""


@pytest.mark.parametrize(
    "nvflare",
    [
        "without",
        pytest.param(
            "with",
            marks=[
                pytest.mark.nvflare,
                pytest.mark.skipif(find_spec("nvflare") is None, reason="needs NVFlare"),
            ],
        ),
    ],
)
def test_a_training_file_that_is_run_by_hand_says_in_one_line_how_to_run_it(nvflare: str) -> None:
    command = [sys.executable, "-c", BY_HAND, nvflare]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "nvflare_adapter: it is NVFlare that runs this file; "
        "try python -m nvflare_adapter my/train.py\n"
    )


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
try:
    from nvflare_adapter import NumpyFedAvgRecipe
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("package", ["nvflare", "pydantic"])
def test_what_needs_a_package_that_is_not_installed_names_its_extra(package: str) -> None:
    if package == "pydantic":
        pytest.importorskip("nvflare")
    command = [sys.executable, "-c", WITHOUT, package]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"ImportError NumpyFedAvgRecipe: expected {package} to be installed: get the extra "
        "'nvflare' (in a clone: pip install -e '.[nvflare]')\n"
    )


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = nvflare_adapter.no_such_name
