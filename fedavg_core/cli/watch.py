"""Watching a run: how long each client trains, and by how much it changes the model.

Clients run in line or in workers, through an executor that looks at what they give back on its way
to the round.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedavg_core.cli.run_log import Contribution, RoundRecord
from fedavg_core.cli.workers import Workers
from fedavg_core.errors import UsageError
from fedavg_core.model import Params, check_array
from fedavg_core.norm import norm_of_difference
from fedavg_core.observer import Observer
from fedavg_core.outcome import Failure, Outcome, Receipt, evaluation_of
from fedavg_core.update import TransferType, Update

if sys.platform == "win32":  # pragma: no cover
    resource = None
else:
    import resource

__all__ = ["Watch", "peak_bytes"]

_STATUS = Path("/proc/self/status")
_Evaluate = Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, float]]


@dataclass(frozen=True)
class _Training:
    """When a client trained, and by how much it changed the model."""

    started: float
    ended: float
    norm: float | None

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def _covered(trainings: Iterable[_Training]) -> float:
    """How long at least one client trained."""
    covered, until = 0.0, 0.0
    for one in sorted(trainings, key=lambda one: one.started):
        covered += max(0.0, one.ended - max(one.started, until))
        until = max(until, one.ended)
    return covered


class Watch(Executor, Observer):
    """An executor that runs clients, and an observer of the same run.

    Args:
        told: Called when a round begins and whenever one of its clients is done, with the round,
            how many are done, and of how many.
        workers: Where they train; None for in line.
    """

    def __init__(
        self, told: Callable[[int, int, int], None], workers: Workers | None = None
    ) -> None:
        self._told = told
        self._workers = workers
        self._round = self._done = self._selected = 0
        self._started = self._evaluating = 0.0
        self._evaluation_problem: str | None = None
        self._base: Params = {}
        self._seen: dict[str, _Training] = {}

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Train a client, now or in a worker: `dispatch.train_one`, and what it is given."""
        _, self._base, *_ = given
        if self._workers is not None:
            return self._workers.submit(self._watched, *given)
        done: Future[Any] = Future()
        done.set_result(self._watched(function, *given))
        return done

    def _watched(self, train: Callable[..., Any], *given: Any) -> Any:
        _, _, context, *_ = given
        started = time.perf_counter()
        answer = train(*given)
        ended = time.perf_counter()
        norm = self._norm(answer) if isinstance(answer, Update) else None
        self._seen[context.contributor] = _Training(started, ended, norm)
        return answer

    def _norm(self, update: Update) -> float | None:
        """The norm of what a client changed; None where its update is too odd to have one."""
        base = {} if update.transfer is TransferType.DIFF else self._base
        try:
            params = {key: check_array(key, value) for key, value in update.params.items()}
            shapes = {key: array.shape for key, array in params.items()}
            alike = all(array.shape == shapes.get(key) for key, array in base.items())
            return norm_of_difference(params, base) if alike else None
        except Exception:  # nothing is known of the update yet; the round will judge it
            return None

    def round_started(self, round: int, contributors: Sequence[str]) -> None:
        """See `Observer`."""
        self._round, self._done, self._selected = round, 0, len(contributors)
        self._seen = {}
        self._evaluating = 0.0
        self._evaluation_problem = None
        self._started = time.perf_counter()
        self._told(round, 0, self._selected)

    def update_judged(self, receipt: Receipt) -> None:
        """See `Observer`."""
        self._count()

    def client_failed(self, failure: Failure) -> None:
        """See `Observer`."""
        self._count()

    def _count(self) -> None:
        self._done += 1
        self._told(self._round, self._done, self._selected)

    def timed(self, evaluate: _Evaluate) -> _Evaluate:
        """The same evaluation, whose time is taken; if it fails, that is told and ends nothing."""

        def timed(params: dict[str, npt.NDArray[Any]]) -> Mapping[str, float]:
            started = time.perf_counter()
            try:
                return evaluation_of(evaluate(params))
            except UsageError as error:
                self._evaluation_problem = str(error)
            finally:
                self._evaluating = time.perf_counter() - started
            return {}

        return timed

    def record(self, outcome: Outcome) -> RoundRecord:
        """What there is to tell of the round that has just been played.

        Args:
            outcome: What it ended with.

        Returns:
            The record for the log.
        """
        training = _covered(self._seen.values())
        rest = time.perf_counter() - self._started - training - self._evaluating
        return RoundRecord(
            round=outcome.round,
            contributions=(
                *map(self._judged, (*outcome.accepted, *outcome.refused)),
                *(
                    Contribution(
                        one.contributor,
                        "failed",
                        seconds=self._seconds(one.contributor),
                        detail=one.problem,
                    )
                    for one in outcome.failed
                ),
            ),
            total_weight=outcome.total_weight,
            metrics=outcome.metrics,
            evaluation=outcome.evaluation,
            skipped_metrics=outcome.skipped_metrics,
            problem=outcome.problem,
            norm=norm_of_difference(outcome.model, self._base),
            seconds={
                "training": training,
                "averaging": rest,
                "evaluation": self._evaluating,
            },
            peak_bytes=peak_bytes(),
            evaluation_problem=self._evaluation_problem,
        )

    def _seconds(self, contributor: str) -> float | None:
        """How long a client trained; None for one that could not be begun with."""
        training = self._seen.get(contributor)
        return None if training is None else training.seconds

    def _judged(self, receipt: Receipt) -> Contribution:
        training = self._seen[receipt.contributor]
        return Contribution(
            receipt.contributor,
            "accepted" if receipt.accepted else "refused",
            weight=receipt.weight,
            norm=training.norm,
            seconds=training.seconds,
            metrics=receipt.metrics,
            reason=None if receipt.reason is None else str(receipt.reason),
            detail=receipt.detail,
        )


def peak_bytes() -> int | None:
    """The most memory that this process has had so far; None where the system does not tell."""
    # Linux's `ru_maxrss` counts what the process was before it became this program as well.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*([0-9]+) kB", _STATUS.read_text(encoding="ascii"))
        if found is not None:
            return int(found[1]) * 1024
    if sys.platform == "win32":  # pragma: no cover
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
