"""How a run is going: which model was the best so far, and whether to go on.

The monitored metric of a round is that of the evaluation of the new model or, if that has none of
its name, the mean of what the contributors reported. A round that has it and is not better than the
best one counts towards the patience; a NaN is never better, and a round without the metric counts
for nothing. That is logged, once, for a round that should have had it if any has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from fedavg_core.arguments import whole_number
from fedavg_core.checkpoint import Checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.errors import CheckpointError, UsageError, quoted
from fedavg_core.model import copy_params
from fedavg_core.outcome import Outcome

__all__ = ["Best", "Progress"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Best:
    """The best model of a run so far.

    Attributes:
        round: The round that it came out of.
        value: The monitored metric's value.
        model: The model; a copy.
    """

    round: int
    value: float
    model: dict[str, npt.NDArray[Any]]


class Progress:
    """Takes note of each round.

    Args:
        monitor: The metric that says which model is the best; None for no such thing.
        mode: Whether a larger (``"max"``) or smaller (``"min"``) value of it is better.
        patience: Stop after so many rounds that were not better than the best; None for never.
        stop_when: Given an outcome, says whether to stop after it.

    Attributes:
        best: The best model; None while there is none.
        stopped: Why to stop; None if not.

    Raises:
        UsageError: An argument has no meaning.
    """

    def __init__(
        self,
        monitor: str | None,
        mode: Literal["max", "min"],
        patience: int | None,
        stop_when: Callable[[Outcome], bool] | None,
    ) -> None:
        if patience is not None:
            patience = whole_number("patience", patience, 1)
            if monitor is None:
                raise UsageError("patience: expected the name of the metric to monitor as well")
        if monitor is not None and not isinstance(monitor, str):
            raise UsageError(f"monitor: expected the name of a metric, got {quoted(monitor)}")
        if mode not in ("max", "min"):
            raise UsageError(f"mode: expected 'max' or 'min', got {quoted(mode)}")
        if stop_when is not None and not callable(stop_when):
            raise UsageError(f"stop_when: expected a function or None, got {quoted(stop_when)}")
        self._monitor = monitor
        self._mode = mode
        self._patience = patience
        self._stop_when = stop_when
        self.best: Best | None = None
        self._waited = 0
        self._told = False
        self.stopped: str | None = None

    def note(self, outcome: Outcome, complete: bool) -> bool:
        """Take note of a round.

        Args:
            outcome: What it ended with; its model is copied if it is the best.
            complete: Whether it has all the metrics that any round has.

        Returns:
            Whether its model is the best so far.
        """
        is_best = self._track(outcome, complete)
        self.stopped = self._reason_to_stop(outcome)
        return is_best

    def _track(self, outcome: Outcome, complete: bool) -> bool:
        if self._monitor is None:
            return False
        metrics = {**outcome.metrics, **outcome.evaluation}
        value = metrics.get(self._monitor)
        if value is None:
            if complete and not self._told and self.best is None:
                self._told = True
                _log.warning(
                    "round %d has no metric %s to monitor; it has %s",
                    outcome.round,
                    quoted(self._monitor),
                    ", ".join(map(quoted, metrics)) or "none",
                )
            return False
        sign = 1.0 if self._mode == "max" else -1.0
        if math.isnan(value) or (self.best and not sign * value > sign * self.best.value):
            self._waited += 1
            return False
        self.best = Best(outcome.round, value, copy_params(outcome.model))
        self._waited = 0
        return True

    def _reason_to_stop(self, outcome: Outcome) -> str | None:
        if self._stop_when is not None and self._stop_when(outcome):
            return f"stop_when said so after round {outcome.round}"
        if self._patience is not None and self._waited >= self._patience:
            return f"{self._monitor} was not better for {self._waited} rounds"
        return None

    def settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes.

        Returns:
            A dictionary that JSON can hold.
        """
        return {"monitor": self._monitor, "mode": self._mode}

    def to_json(self) -> dict[str, Any]:
        """How the run is going, to be stored beside the model.

        Returns:
            A dictionary that JSON can hold. Of the best model it has the round and the value.
        """
        best = None if self.best is None else [self.best.round, self.best.value]
        return {"best": best, "waited": self._waited, "stopped": self.stopped}

    def take_up(self, store: CheckpointStore, found: Checkpoint) -> None:
        """Take up what `to_json` told of a run.

        Args:
            store: Where the run is stored, with its best model.
            found: Its newest checkpoint, whose `extra` holds what was told.

        Raises:
            CheckpointError: It does not tell this, or the best model is not there.
        """
        waited, stopped, marked = (
            found.extra.get(name, False) for name in ("waited", "stopped", "best")
        )
        if not (
            _is_count(waited)
            and (stopped is None or isinstance(stopped, str))
            and (marked is None or _is_best(marked, found.round))
        ):
            raise CheckpointError(
                store.paths()[-1],
                "it does not tell as a federation does how the run was going: "
                f"waited {quoted(waited)}, stopped {quoted(stopped)}, best {quoted(marked)}",
            )
        if marked is not None:
            round, value = marked
            best = store.load_best()
            if best is None or best.round != round + 1:
                raise CheckpointError(
                    store.folder, f"the best model of the run, that of round {round}, is not there"
                )
            self.best = Best(round, value, copy_params(best.model))
        self._waited = waited
        self.stopped = stopped


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_best(value: object, rounds: int) -> bool:
    """Whether this is one of so many rounds, and the value of a metric."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_count(value[0])
        and value[0] < rounds
        and isinstance(value[1], float)
        and not math.isnan(value[1])
    )
