"""A checkpoint: one file that a run can go on from.

It is a file that `codec` can read: an npz of the model's arrays (named ``model/...``) and of any
further ones (``arrays/...``), with the rest as JSON, and a checksum over all of it. It is written
in one commit (see `atomic_file`). Loading gives what was saved or raises `CheckpointError`. The
checkpoints of a run are a `CheckpointStore`'s.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedavg_core.arguments import PathLike, file_path, truth, whole_number
from fedavg_core.atomic_file import replacing
from fedavg_core.codec.archive import Damaged, require
from fedavg_core.codec.npz import damage_told, read_npz, write_npz
from fedavg_core.errors import CheckpointError, UsageError, a_type, quoted
from fedavg_core.model import Params

__all__ = [
    "MODEL",
    "Checkpoint",
    "described",
    "load_checkpoint",
    "round_of",
    "save_checkpoint",
]

MODEL = "model/"
"""What stands in a file before the names of the model's arrays."""

_FORMAT = 1
_ARRAYS = "arrays/"
_LAST_ROUND = 10**18 - 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        model: The global model.
        round: How many rounds are completed.
        metrics: Numbers about the model.
        extra: Anything else that JSON can hold, such as settings.
        arrays: Further arrays, such as the state of a server optimizer.
        best: Whether the model was the best so far when it was saved.
    """

    model: Params
    round: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    arrays: Params = field(default_factory=dict)
    best: bool = False


def save_checkpoint(path: PathLike, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to a file, in one commit.

    Args:
        path: The file; an old one of that name is replaced. Its folder must be there.
        checkpoint: What to write; only read.

    Raises:
        CheckpointError: It could not be written; an old file is as it was, unless the message says
            that the new one is in place.
        UsageError: The path is none; or it is no checkpoint, or holds what one cannot: arrays that
            are not of numbers or bool, names that are no strings, a round that is no whole number,
            a metric that float64 cannot hold, what JSON cannot hold, or more than `load_checkpoint`
            reads. Nothing is written then.
    """
    number = round_of(checkpoint)
    target = file_path("path", path)
    for field_name in ("model", "arrays", "metrics", "extra"):
        held: object = getattr(checkpoint, field_name)
        if not isinstance(held, Mapping):
            raise UsageError(f"{field_name}: expected a mapping, got {quoted(held)}")
    arrays = {MODEL + _name(key): value for key, value in checkpoint.model.items()}
    arrays.update({_ARRAYS + _name(key): value for key, value in checkpoint.arrays.items()})
    meta = {
        "checkpoint": _FORMAT,
        "round": number,
        "metrics": {_name(name): _number(value) for name, value in checkpoint.metrics.items()},
        "extra": dict(checkpoint.extra),
        "best": truth("best", checkpoint.best),
    }
    with replacing(target) as file:
        write_npz(file, arrays, meta)


def load_checkpoint(path: PathLike) -> Checkpoint:
    """Read a checkpoint from a file.

    Args:
        path: The file.

    Returns:
        What was saved. The arrays are new memory, in the dtypes that they had, in native byte
        order; what JSON holds is as JSON gives it back (a tuple is a list).

    Raises:
        CheckpointError: The file is not there, is no regular file, is damaged, or is no checkpoint.
        UsageError: The path is none.
    """
    target = file_path("path", path)
    try:
        with open(target, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(target, "not a regular file")
            arrays, meta = read_npz(file, own=True)
    except OSError as error:
        raise CheckpointError(target, f"could not be read ({error.strerror or error})") from error
    with damage_told(str(target)):
        found = described(meta, arrays)
    model, others = (
        {key.removeprefix(part): array for key, array in arrays.items() if key.startswith(part)}
        for part in (MODEL, _ARRAYS)
    )
    return replace(found, model=model, arrays=others)


def round_of(given: object) -> int:
    """The round of what is to be saved.

    Args:
        given: A checkpoint, which is checked no further.

    Returns:
        How many rounds are completed.

    Raises:
        UsageError: It is no checkpoint, or its round is no whole number.
    """
    if not isinstance(given, Checkpoint):
        raise UsageError(f"expected a Checkpoint to save, got {a_type(given)}")
    return _round(given.round)


def described(meta: Mapping[str, Any], names: Iterable[str]) -> Checkpoint:
    """What a file tells of the checkpoint in it, beside the arrays.

    Args:
        meta: The JSON that goes with its arrays.
        names: Their names.

    Returns:
        The checkpoint, without its arrays.

    Raises:
        Damaged: It is no checkpoint.
    """
    require("checkpoint" in meta, "no checkpoint, but a model alone, which load_model reads")
    version = meta["checkpoint"]
    require(
        version == _FORMAT,
        f"no checkpoint of format {_FORMAT}, the one that this version reads, but "
        f"{quoted(version)}",
    )
    try:
        for name in names:
            if not name.startswith((MODEL, _ARRAYS)):
                raise KeyError(name)
        return Checkpoint(
            model={},
            round=_round(meta["round"]),
            metrics={name: _number(value) for name, value in meta["metrics"].items()},
            extra=dict(meta["extra"]),
            best=bool(meta["best"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"its contents are not those of a checkpoint ({quoted(str(error))})"
        ) from error


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"expected names that are strings, got {quoted(name)}")
    return name


def _round(number: object) -> int:
    number = whole_number("round", number, 0)
    if number > _LAST_ROUND:
        raise UsageError(f"round: expected no more than {_LAST_ROUND}, got {quoted(number)}")
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise UsageError(f"metrics: expected numbers, got {quoted(value)}")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(
            f"metrics: expected numbers that float64 can hold, got {quoted(value)}"
        ) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever might be at the other end of it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
