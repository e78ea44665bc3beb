"""A training file: the one Python file that says what a client does.

It has a function ``train(params, context)`` that gives a `TrainResult`, and may have an
``initial_model(seed)``, which makes the model of round 0, and an ``evaluate(params)``, which says
what a model is worth. The file is imported, not run as the main program; so what it does for other
worlds under ``if __name__ == "__main__":`` does not happen here. Meanwhile ``sys.argv`` is what it
would be for the file alone.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedavg_core.admission import check_model
from fedavg_core.client import Client
from fedavg_core.errors import UsageError, a_type, one_line
from fedavg_core.model import Params

__all__ = ["TrainingFile", "read_training_file"]

_MODULE = "fedavg_training_file"
_NOT_HERE = "; what is not for here belongs under: if __name__ == '__main__'"


@dataclass(frozen=True)
class TrainingFile:
    """What a training file has to offer.

    Attributes:
        name: Its name, without the folder.
        train: The client.
        initial_model: Makes the model of round 0 from a seed; None if clients bring their own.
        evaluate: Measures a model; None if the file has no such function.

    Raises:
        UsageError: There is no `train`, or one of them is no function.
    """

    name: str
    train: Client
    initial_model: Callable[[int], Params] | None
    evaluate: Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, float]] | None

    def __post_init__(self) -> None:
        for name in ("train", "initial_model", "evaluate"):
            function = getattr(self, name)
            if not callable(function) and (function is not None or name == "train"):
                got = "none" if function is None else a_type(function)
                raise UsageError(f"{self.name}: expected a function {name}, got {got}")

    def first_model(self, seed: int) -> Params | None:
        """The model of round 0.

        Args:
            seed: The run's.

        Returns:
            What `initial_model` gives; None if there is no such function.

        Raises:
            UsageError: It failed, or gave no model of finite numbers.
        """
        if self.initial_model is None:
            return None
        model: Params = self.call("initial_model", seed)
        check_model(model, f"{self.name}: initial_model")
        return model

    def call(self, function: str, argument: object) -> Any:
        """Call one of the functions.

        Args:
            function: Its name.
            argument: What it is given.

        Returns:
            What it gives.

        Raises:
            UsageError: It raised something, or tried to end the program.
        """
        try:
            return getattr(self, function)(argument)
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"{function}, of {self.name}, failed: {_told(error, self.name)}"
            ) from error


def read_training_file(path: Path) -> TrainingFile:
    """Import a training file.

    Its folder is added to the end of ``sys.path`` for good, so that modules beside it are found.

    Args:
        path: The file.

    Returns:
        Its functions.

    Raises:
        UsageError: It is no Python file, failed, or has no ``train``.
    """
    if path.suffix != ".py" or not path.is_file():
        absent = "" if path.exists() else ", which is not there"
        raise UsageError(f"expected a Python file, got {path}{absent}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:  # pragma: no cover  (a .py always has a loader)
        raise UsageError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses and pickles look there
    argv, sys.argv = sys.argv, [str(path)]
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        hint = _NOT_HERE if isinstance(error, SystemExit) else ""
        told = _told(error, path.name)
        raise UsageError(f"{path}: cannot be imported: {told}{hint}") from error
    finally:
        sys.argv = argv
    functions = {name: getattr(module, name, None) for name in ("initial_model", "evaluate")}
    return TrainingFile(path.name, getattr(module, "train", None), **functions)  # type: ignore[arg-type]


def _told(error: BaseException, name: str) -> str:
    """An error, and the line of the training file that it came from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == name
    ]
    return one_line(error) + (f" ({name}, line {lines[-1]})" if lines else "")
