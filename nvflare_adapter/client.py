"""The client loop, and the one line by which a training file joins either world.

A training file ends in ``serve(train)``. Started by NVFlare it is served the global model round by
round. Read by `read_training_file`, as a federation in process does, the same line only hands
`train` over, and nothing of NVFlare is imported.

The difference is taken here, once, from the model as it was received: what ``train`` gets is a
copy, so that it may change arrays in place. It is marked as a difference, so that NVFlare takes no
second one.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

import fedavg_core as fc
from fedavg_core.errors import quoted
from fedavg_core.model import copy_params

__all__ = ["FAILURE", "TrainingFile", "failure_line", "read_training_file", "serve"]

FAILURE = "training of "
"""How a line of the log begins that tells of a training function's failure."""

_log = logging.getLogger(__name__)
_handed_over: ContextVar[list[fc.Client] | None] = ContextVar("handed_over", default=None)


@dataclass(frozen=True)
class TrainingFile:
    """What a training file has to offer.

    Attributes:
        train: What it hands to `serve`.
        initial_model: Makes the model of round 0 from a seed; None if clients start from their own.
        evaluate: Measures a model; None if the file has no such function.
    """

    train: fc.Client
    initial_model: Callable[[int], dict[str, npt.NDArray[Any]]] | None
    evaluate: Callable[[fc.Params], dict[str, float]] | None


def read_training_file(path: Path, arguments: Sequence[str] = ()) -> TrainingFile:
    """Run a training file as NVFlare would, and take what it hands to `serve`.

    Args:
        path: The file.
        arguments: Its command line arguments.

    Returns:
        Its functions.

    Raises:
        UsageError: The file ended without calling `serve`.
    """
    taken: list[fc.Client] = []
    token = _handed_over.set(taken)
    argv, sys.argv = sys.argv, [str(path), *arguments]
    try:
        names = runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = argv
        _handed_over.reset(token)
    if not taken:
        raise fc.UsageError(
            f"{path}: expected the file to end by calling nvflare_adapter.serve(train), it did not"
        )
    return TrainingFile(taken[-1], names.get("initial_model"), names.get("evaluate"))


def serve(train: fc.Client) -> None:
    """Train whenever NVFlare's server asks for it, until the job ends.

    Args:
        train: Called with a copy of the global model, its to change, and the context; returns the
            trained parameters (all or some), their weight, and metrics.

    Raises:
        UsageError: `train` is not callable or returns something else; or the server is not one of
            this package's.
    """
    if not callable(train):
        raise fc.UsageError(f"serve: expected a function, got {type(train).__name__}")
    taken = _handed_over.get()
    if taken is not None:
        taken.append(train)
        return

    from nvflare import client as flare

    from nvflare_adapter import convert

    flare.init()
    while flare.is_running():
        message = flare.receive()
        if message is None:
            break
        assignment = convert.assignment_of(message)
        received = convert.model_from_message(message)
        context = assignment.context(flare.get_site_name())
        transfer = fc.TransferType(assignment.transfer)
        try:
            result = _trained(train, received, context, transfer)
        except Exception as error:
            _log.error(failure_line(context.contributor, context.round, error))
            raise
        flare.send(convert.update_to_fl_model(result, transfer))


def failure_line(contributor: str, round: int, error: Exception) -> str:
    """How a failure of a contributor's training stands in the log.

    Args:
        contributor: Who failed.
        round: In which round.
        error: What was raised.

    Returns:
        One line, which begins with `FAILURE`.
    """
    what = f"{type(error).__name__}: {quoted(str(error), 300)}"
    return f"{FAILURE}{contributor} failed in round {round}: {what}"


def _trained(
    train: fc.Client,
    received: dict[str, npt.NDArray[Any]],
    context: fc.Context,
    transfer: fc.TransferType,
) -> fc.TrainResult:
    result = train(copy_params(received), context)
    if not isinstance(result, fc.TrainResult):
        raise fc.UsageError(f"expected train to return a TrainResult, got {type(result).__name__}")
    if transfer is fc.TransferType.DIFF:
        return replace(result, params=fc.diff(result.params, received))
    return result
