"""What a job starts from: a model that is given, one in a file, or where another job ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fedavg_core as fc
from fedavg_core.codec.npy import MAGIC
from fedavg_core.errors import quoted
from fedavg_core.server_optimizer import SERVER_OPTIMIZERS

__all__ = ["OPEN_FILE", "SINGLE_ARRAY_KEY", "as_model", "as_optimizer", "read_start", "resumed"]

OPEN_FILE = "open_round.npz"
"""What an open round has received, beside the checkpoints; its round is the number of the round."""

SINGLE_ARRAY_KEY = "numpy_key"
"""The name of the only array of a model that has no names, as in NVFlare's own NumPy classes."""


def as_model(given: Any) -> dict[str, npt.NDArray[Any]] | None:
    """A model out of what a user gives for one.

    Args:
        given: An array, a list of numbers, a mapping of these, or None.

    Returns:
        The model; its arrays are the given ones where possible. None for None.

    Raises:
        ValueError: It cannot be one; the message says what was expected and what came, and is
            empty where it is none of these.
    """
    if given is None:
        return None
    if not isinstance(given, (Mapping, list, tuple, np.ndarray, np.generic)):
        raise ValueError
    named = dict(given) if isinstance(given, Mapping) else {SINGLE_ARRAY_KEY: given}
    if not named:
        raise ValueError("expected at least one array, got an empty dict")
    model = {}
    for key, value in named.items():
        if isinstance(value, (list, tuple)):
            value = _array_of_numbers(key, value)
        elif isinstance(value, np.generic):
            value = np.asarray(value)
        model[key] = value
    try:
        fc.ModelSpec.of(model)
    except fc.RefusedUpdate as refusal:
        place = "" if refusal.key is None else f"key {quoted(refusal.key)}: "
        raise ValueError(f"{place}expected {refusal.expected}, got {refusal.got}") from None
    for key, array in model.items():
        if not np.isfinite(array).all():
            raise ValueError(f"key {quoted(key)}: expected finite numbers, got NaN or infinity")
    return model


def _array_of_numbers(key: Any, numbers: Any) -> npt.NDArray[np.float64]:
    """A list, which says nothing of a dtype, as Python's own numbers: float64."""
    try:
        return np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"key {quoted(key)}: expected lists of numbers, all of one shape, got {quoted(numbers)}"
        ) from None


def as_optimizer(given: Any) -> fc.ServerOptimizer | None:
    """A server optimizer out of what a user gives for one.

    Args:
        given: Its name, or one of the core's, or None.

    Returns:
        The optimizer, which can travel as its name and settings. None for None.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(given, str):
        return fc.optimizer_named(given)
    if given is not None and type(given) not in SERVER_OPTIMIZERS.values():
        raise ValueError
    return given  # type: ignore[no-any-return]


def read_start(path: Path) -> fc.Checkpoint:
    """Read the model that round 0 is to start from.

    Args:
        path: A checkpoint of any round, or a model's npz, npy or safetensors file.

    Returns:
        The model, as a checkpoint of round 0.

    Raises:
        CheckpointError: The file is missing or damaged, or holds no model.
    """
    try:
        model = fc.load_model(path)
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                model = {SINGLE_ARRAY_KEY: model["arr_0"]}
        return fc.Checkpoint(as_model(model) or {}, round=0)
    except (OSError, ValueError) as error:
        raise fc.CheckpointError(path, f"could not be read ({quoted(str(error))})") from error


def resumed(
    path: Path, best_name: str, job: Mapping[str, Any], given: fc.Params | None
) -> dict[str, fc.Checkpoint]:
    """Where another job ended, for one that goes on with it.

    Args:
        path: Its checkpoint, or the folder of its checkpoints.
        best_name: The name of its best model's file, beside them.
        job: What the two must have in common, and ``num_rounds``.
        given: A model like the stored one, or None.

    Returns:
        By the names of the persistor's arguments: the checkpoint; that of the best model, if it is
        there; and what the round after it had received, if that is there.

    Raises:
        UsageError: It is the checkpoint of another job, or there is no round left.
        CheckpointError: A file is missing or damaged.
    """
    folder = path if path.is_dir() else path.parent
    start = _newest_in(path) if path.is_dir() else fc.load_checkpoint(path)
    if start.round >= job["num_rounds"]:
        raise fc.UsageError(
            f"num_rounds: expected more than the {start.round} rounds that start_from has "
            f"completed, got {job['num_rounds']}"
        )
    for name, value in start.extra.get("job", {}).items():
        if job.get(name, value) != value:
            raise fc.UsageError(f"start_from: expected a job of {name} {job[name]}, got {value}")
    if given is not None and fc.ModelSpec.of(given) != fc.ModelSpec.of(start.model):
        raise fc.UsageError("start_from: expected a model like the given one, got another")
    files = {"initial_file": start}
    for name, file in (("best_file", folder / best_name), ("open_file", folder / OPEN_FILE)):
        found = fc.load_checkpoint(file) if file.is_file() else None
        # A best model that is newer comes of a round that is to be played again.
        if found is not None and (
            found.round <= start.round if name == "best_file" else found.round == start.round
        ):
            files[name] = found
    return files


def _newest_in(folder: Path) -> fc.Checkpoint:
    """The newest checkpoint in a folder; if they are in folders below it, the error says where."""
    store = fc.CheckpointStore(folder)
    below = {str(path.parent.relative_to(folder)) for path in folder.rglob("*/round-*.npz")}
    if below and not store.paths():
        places = ", ".join(map(quoted, sorted(below)))
        raise fc.CheckpointError(folder, f"there is no checkpoint in this folder, but in {places}")
    return store.load()
