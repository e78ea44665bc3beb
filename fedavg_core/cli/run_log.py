"""The record of a run: what its folder holds beside the checkpoints.

* ``run.json``: the settings, as one JSON object.
* ``rounds.jsonl``: one JSON object a line for each round, written before the round's checkpoint.

So the log is never behind the checkpoints. It may be ahead of them by what an interruption or a
loss of power cut off; those rounds are played again by the run that resumes, which takes their
lines away first. A last line that was not finished is passed over by whoever reads it.

Numbers that JSON does not have (NaN, the infinities) are null, and so are, when it is read, those
beyond 1e300, of which a sum may have none. Nothing in a file is believed: a log of another shape is
a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedavg_core.atomic_file import replacing
from fedavg_core.errors import CheckpointError, quoted

__all__ = [
    "LOG",
    "PARTS",
    "SETTINGS",
    "STATES",
    "Contribution",
    "RoundRecord",
    "append_round",
    "read_log",
    "read_settings",
    "start_log",
    "write_settings",
]

SETTINGS = "run.json"
LOG = "rounds.jsonl"
_FORMAT = 1
STATES = ("accepted", "refused", "failed")
PARTS = ("training", "averaging", "evaluation")
_MOST_BYTES = 1 << 31
_EXACT = 1 << 53
_LARGEST = 1e300


@dataclass(frozen=True)
class Contribution:
    """What came of one client in one round.

    Attributes:
        contributor: Its name.
        status: ``"accepted"``, ``"refused"`` or ``"failed"``.
        weight: The weight it was averaged with; None if it was not.
        norm: The L2 norm of its change of the model; None if that is no finite number.
        seconds: How long it trained.
        metrics: What it reported.
        reason: Why it was refused, in a word.
        detail: The same, or why it failed, in a line.
    """

    contributor: str
    status: str
    weight: float | None = None
    norm: float | None = None
    seconds: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round.

    Attributes:
        round: Its number.
        contributions: One for each client that was selected.
        total_weight: The sum of the accepted weights.
        metrics: The contributors' mean metrics.
        evaluation: What the new model was found to be worth.
        skipped_metrics: The names of metrics that were left out.
        problem: Why the model kept its values; None if it did not.
        norm: The L2 norm of the change of the global model.
        seconds: How long training, averaging and evaluation took.
        peak_bytes: The most memory that the process had until then; None if that is not known.
        evaluation_problem: Why the new model could not be evaluated; None if nothing went wrong.
    """

    round: int
    contributions: tuple[Contribution, ...]
    total_weight: float | None
    metrics: Mapping[str, float | None]
    evaluation: Mapping[str, float | None]
    skipped_metrics: tuple[str, ...]
    problem: str | None
    norm: float | None
    seconds: Mapping[str, float]
    peak_bytes: int | None
    evaluation_problem: str | None = None

    def count(self, status: str) -> int:
        """How many contributions have a status."""
        return sum(one.status == status for one in self.contributions)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return {
            "round": self.round,
            "contributions": [
                {
                    "contributor": one.contributor,
                    "status": one.status,
                    "weight": _finite(one.weight),
                    "norm": _finite(one.norm),
                    "seconds": one.seconds,
                    "metrics": dict(one.metrics),
                    "reason": one.reason,
                    "detail": one.detail,
                }
                for one in self.contributions
            ],
            "total_weight": _finite(self.total_weight),
            "metrics": dict(self.metrics),
            "evaluation": {name: _finite(value) for name, value in self.evaluation.items()},
            "skipped_metrics": list(self.skipped_metrics),
            "problem": self.problem,
            "norm": _finite(self.norm),
            "seconds": dict(self.seconds),
            "peak_bytes": self.peak_bytes,
            "evaluation_problem": self.evaluation_problem,
        }

    @classmethod
    def from_json(cls, entry: Any) -> RoundRecord:
        """The record that `to_json` was asked of.

        Args:
            entry: What it gave, through JSON.

        Returns:
            The record.

        Raises:
            ValueError: It is another.
        """
        seconds = _numbers(entry, "seconds")
        return cls(
            round=_whole(entry, "round"),
            contributions=tuple(map(_contribution, _typed(entry, "contributions", list))),
            total_weight=_number(entry, "total_weight"),
            metrics=_numbers(entry, "metrics"),
            evaluation=_numbers(entry, "evaluation"),
            skipped_metrics=tuple(map(str, _typed(entry, "skipped_metrics", list))),
            problem=_typed(entry, "problem", str, type(None)),
            norm=_number(entry, "norm"),
            seconds={part: max(0.0, seconds.get(part) or 0.0) for part in PARTS},
            peak_bytes=None
            if _typed(entry, "peak_bytes", int, type(None)) is None
            else _whole(entry, "peak_bytes"),
            evaluation_problem=_typed(entry, "evaluation_problem", str, type(None)),
        )


def _contribution(entry: Any) -> Contribution:
    status = _typed(entry, "status", str)
    if status not in STATES:
        raise ValueError(f"a status is {quoted(status)}")
    return Contribution(
        contributor=_typed(entry, "contributor", str),
        status=status,
        weight=_number(entry, "weight"),
        norm=_number(entry, "norm"),
        seconds=_number(entry, "seconds"),
        metrics=_numbers(entry, "metrics"),
        reason=_typed(entry, "reason", str, type(None)),
        detail=_typed(entry, "detail", str),
    )


def _finite(value: int | float | None) -> float | None:
    """A number that JSON has; whole ones as such, as far as float64 tells them apart."""
    if isinstance(value, int) and abs(value) <= _EXACT:
        return value
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else None


def _typed(entry: Any, name: str, *types: type) -> Any:
    """A field of a JSON object, of one of some types."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {quoted(entry)}")
    value = entry.get(name)
    if type(value) not in types:  # JSON gives no subclasses, and a bool is no number
        raise ValueError(f"{name} is {quoted(value)}")
    return value


def _whole(entry: Any, name: str) -> int:
    value: int = _typed(entry, name, int)
    if not 0 <= value < 1 << 62:
        raise ValueError(f"{name} is {quoted(value)}")
    return value


def _number(entry: Any, name: str) -> float | None:
    value = _finite(_typed(entry, name, int, float, type(None)))
    return None if value is None or abs(value) > _LARGEST else value


def _numbers(entry: Any, name: str) -> dict[str, float | None]:
    found = _typed(entry, name, dict)
    return {key: _number(found, key) for key in found}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``run.json``, in one commit.

    Args:
        folder: The run's.
        settings: What JSON can hold.

    Raises:
        CheckpointError: It could not be written.
    """
    with replacing(folder / SETTINGS) as file:
        file.write(json.dumps({"fedavg_run": _FORMAT, **settings}, indent=1).encode() + b"\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Args:
        folder: The run's.

    Returns:
        The settings.

    Raises:
        CheckpointError: It is not there, or is another file.
    """
    path = folder / SETTINGS
    try:
        found = json.loads(_read(path))
        if not isinstance(found, dict) or found.get("fedavg_run") != _FORMAT:
            raise ValueError(f"expected a run of format {_FORMAT}")
    except (RecursionError, ValueError) as error:
        raise CheckpointError(path, f"no settings of a run ({quoted(str(error), 200)})") from error
    return found


def start_log(folder: Path, rounds: int) -> None:
    """Take away what a log has of rounds that will be played, again or for the first time.

    Args:
        folder: The run's.
        rounds: How many rounds are done.

    Raises:
        CheckpointError: The log that is there is damaged, or could not be written.
    """
    path = folder / LOG
    records = read_log(folder) if path.exists() else []
    with replacing(path) as file:
        for record in records:
            if record.round < rounds:
                file.write(_line(record))


def append_round(folder: Path, record: RoundRecord) -> None:
    """Write a round's line.

    Args:
        folder: The run's.
        record: The round.

    Raises:
        CheckpointError: It could not be written.
    """
    try:
        with open(folder / LOG, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            folder / LOG, f"could not be written ({error.strerror or error})"
        ) from error


def read_log(folder: Path) -> list[RoundRecord]:
    """Read the rounds.

    Args:
        folder: The run's.

    Returns:
        What the log tells, by the rounds' numbers.

    Raises:
        CheckpointError: It is not there, or holds something else.
    """
    path = folder / LOG
    lines = _read(path).split(b"\n")[:-1]
    records: dict[int, RoundRecord] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = RoundRecord.from_json(json.loads(line))
            if record.round in records:
                raise ValueError(f"round {record.round} is there twice")
            records[record.round] = record
        except (RecursionError, ValueError) as error:
            raise CheckpointError(
                path, f"line {number} is no round of a run ({quoted(str(error), 200)})"
            ) from error
    return [records[number] for number in sorted(records)]


def _line(record: RoundRecord) -> bytes:
    return json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(path, "expected a file of a run, there is none")
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(path, "it is too long")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"could not be read ({error.strerror or error})") from error
