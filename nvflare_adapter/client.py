"""The client loop, and the one line by which a training file joins either world.

A training file ends in ``serve(train)``. Started by NVFlare it is served the global model round by
round. Read by `read_training_file`, as a federation in process does, the same line only hands
`train` over, and nothing of NVFlare is imported.

A round of training is the core's, so that the copy that ``train`` may change, and the difference
that is taken once, from the model as it was received, are those of a federation in process. What
is sent is marked as a difference, so that NVFlare takes no second one. A client that fails says so
in its answer, and the job goes on without it, as the federation does.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TypeAlias

import fedavg_core as fc
from fedavg_core.dispatch import train_one
from fedavg_core.errors import a_type
from fedavg_core.outcome import Failure
from fedavg_core.training_file import TrainingFile

__all__ = ["read_training_file", "serve"]

Evaluate: TypeAlias = Callable[[fc.Params], dict[str, float]]
_log = logging.getLogger(__name__)
_handed_over: ContextVar[list[fc.Client] | None] = ContextVar("handed_over", default=None)


def read_training_file(path: Path, arguments: Sequence[str] = ()) -> TrainingFile:
    """Run a training file as NVFlare would, and take what it hands to `serve`.

    The file's folder is added to the end of ``sys.path`` for good, so that modules beside the file
    are found, now and when `train` is called.

    Args:
        path: The file.
        arguments: Its command line arguments.

    Returns:
        Its functions (a `fedavg_core.training_file.TrainingFile`).

    Raises:
        UsageError: The file ended without calling `serve`.
    """
    taken: list[fc.Client] = []
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
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
    return TrainingFile(path.name, taken[-1], names.get("initial_model"), names.get("evaluate"))


def serve(train: fc.Client, evaluate: Evaluate | None = None) -> None:
    """Train whenever NVFlare's server asks for it, until the job ends.

    Args:
        train: Called with a copy of the global model, its to change, and the context; returns the
            trained parameters (all or some), their weight, and metrics.
        evaluate: Measures a model, where NVFlare's cross-site evaluation asks for it.

    Raises:
        UsageError: `train` cannot be called, or the server is not one of this package's.
        SystemExit: The file was not started by NVFlare. A line says how it can be run.
    """
    if not callable(train):
        raise fc.UsageError(f"serve: expected a function, got {a_type(train)}")
    taken = _handed_over.get()
    if taken is not None:
        taken.append(train)
        return

    try:
        from nvflare import client as flare

        flare.init()
    except (ModuleNotFoundError, RuntimeError):
        _log.debug("NVFlare's client API cannot be used:", exc_info=True)
        hint = f"it is NVFlare that runs this file; try python -m nvflare_adapter {sys.argv[0]}"
        print(f"nvflare_adapter: {hint}", file=sys.stderr)
        sys.exit(2)

    from nvflare_adapter import convert

    while flare.is_running():
        message = flare.receive()
        if message is None:
            break
        if not flare.is_train():
            measured = {}
            if evaluate is not None and flare.is_evaluate():
                measured = evaluate(convert.model_from_message(message))
            flare.send(convert.metrics_to_fl_model(measured))
            continue
        assignment = convert.assignment_of(message)
        context = assignment.context(flare.get_site_name())
        model = convert.model_from_message(message)
        transfer = fc.TransferType(assignment.transfer)
        answer = train_one(train, model, context, transfer, retries=0)
        if isinstance(answer, Failure):
            _log.error("failed in round %d: %s", answer.round, answer.problem)
        flare.send(convert.answer_to_fl_model(answer, transfer))
