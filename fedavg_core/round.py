"""One round of federated averaging as a state machine, without threads, clocks or files.

A round is OPEN from its making until it is closed, and CLOSED for ever after. What happens in each
state to each event is the table at the end of this module, and nowhere else:

    event    OPEN                                           CLOSED
    OFFER    judge the update, add it or refuse it          refuse it: ROUND_CLOSED
    CLOSE    give the outcome; the round is CLOSED          UsageError
    STATE    give what another process needs to go on       UsageError

What time it is, who failed and what arrived is told to a round; it asks nobody. It holds no lock:
whoever uses one round from several threads holds one of their own around each call.

Rules that hold at any time:

* Every `offer` of an `Update` gives exactly one receipt, and the round keeps it, in the order of
  arrival. Nothing that a contributor can put in an update makes `offer` raise.
* The sums hold exactly the updates whose receipts say accepted: an update is added whole or not at
  all, and a refused one leaves the sums as they were, to the bit.
* With the exact accumulator the outcome's model and metrics depend on which updates were accepted,
  and not on their order. The mean of a metric is the exact one, over the contributors that sent
  it, with their weights, rounded once to float64.
* The outcome's model has the keys, shapes and dtypes of the model that the round began with. A
  parameter that nobody sent, or that is excluded, keeps its value. With fewer accepted updates
  than `min_updates`, or where the mean is larger than the dtype's largest number, the whole model
  keeps its values, and the outcome says why.
* The model that the round began with is only read, and shares no memory with the outcome's.

A round without a model takes FULL updates only; the first accepted update to bring a parameter
says what it looks like, and the outcome's model has every parameter that came.

The idea of a protocol without I/O, with its transitions in a table, is that of h11.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, UsageError, quoted
from fedavg_core.gate import Gate, Limits, shown_name
from fedavg_core.model import Params, copy_params
from fedavg_core.update import TransferType, Update

__all__ = ["Outcome", "Receipt", "Round", "RoundState"]

_STATE_FORMAT = 1
_DETAIL_LENGTH = 400


class RoundState(Enum):
    """Where a round is."""

    OPEN = "OPEN"
    """It takes updates."""

    CLOSED = "CLOSED"
    """It has given its outcome."""


class _Event(Enum):
    OFFER = "offer"
    CLOSE = "close"
    STATE = "state"


@dataclass(frozen=True)
class Receipt:
    """What a round answers to one update.

    Attributes:
        contributor: Who sent it; where that is no name, what can be shown of it.
        round: The number of the round that it was offered to.
        accepted: Whether it was added.
        reason: Why not, if it was not.
        detail: One line of printable text: for a refusal who, when, which key, what was expected
            and what came; for an accepted update what was left out of it, or nothing.
        weight: The weight that it was added with, exactly; None if it was refused.
        metrics: The metrics that count, as they came; empty if it was refused.
        skipped_metrics: The names of those that are no finite numbers, escaped and cut.
    """

    contributor: str
    round: int
    accepted: bool
    reason: Reason | None = None
    detail: str = ""
    weight: int | float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    skipped_metrics: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round ends with.

    Attributes:
        round: The round's number.
        model: The new global model; its arrays are owned by whoever holds the outcome.
        metrics: The weighted means of the contributors' metrics, sorted by name.
        accepted: The receipts of the updates in the mean, in the order of arrival.
        refused: The receipts of all others, in the order of arrival.
        total_weight: The sum of the accepted weights, correctly rounded.
        enough: Whether at least `min_updates` were accepted.
        problem: One line of why the model kept its values; None if it is the mean.
        skipped_metrics: The names of metrics that were left out, each once, sorted.
        evaluation: What the new model was found to be worth, by whoever evaluates it.
    """

    round: int
    model: dict[str, npt.NDArray[Any]]
    metrics: dict[str, float]
    accepted: tuple[Receipt, ...]
    refused: tuple[Receipt, ...]
    total_weight: float
    enough: bool
    problem: str | None = None
    skipped_metrics: tuple[str, ...] = ()
    evaluation: dict[str, float] = field(default_factory=dict)


class Round:
    """One round: takes updates, and ends with an outcome.

    Args:
        model: The model that the contributors were sent. Borrowed: it is read until the round is
            closed, and must not be changed meanwhile. None or empty if the contributors bring the
            first one.
        number: The round's number.
        min_updates: How many accepted updates it takes to change the model.
        transfer: What the updates' arrays are; None to let the first accepted update say.
        limits: What is asked of an update.
        accumulator: How to add: ``"exact"``, ``"float64"`` or ``"float32"``; or a `WeightedMean`
            for models like this one, which is reset and used, so that its memory serves many
            rounds.

    Raises:
        UsageError: An argument has no meaning.
    """

    def __init__(
        self,
        model: Params | None,
        number: int,
        *,
        min_updates: int = 1,
        transfer: TransferType | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        accumulator: Accumulator | WeightedMean = "exact",
    ) -> None:
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"number: expected an integer, got {quoted(number)}")
        if isinstance(min_updates, bool) or not isinstance(min_updates, int) or min_updates < 1:
            raise UsageError(
                f"min_updates: expected an integer of at least 1, got {quoted(min_updates)}"
            )
        if transfer is not None and not isinstance(transfer, TransferType):
            raise UsageError(f"transfer: expected a TransferType or None, got {quoted(transfer)}")
        if not isinstance(limits, Limits):
            raise UsageError(f"limits: expected a Limits, got {quoted(limits)}")
        self._model: Params = {} if model is None else model
        self._gate = Gate(self._model, number, limits)
        if transfer is TransferType.DIFF and not self._model:
            raise UsageError("transfer: differences need a model that they are taken from")
        self._number = number
        self._min_updates = min_updates
        self._transfer = transfer
        self._limits = limits
        self._status = RoundState.OPEN
        self._receipts: list[Receipt] = []
        self._contributors: set[str] = set()
        self._keys: frozenset[str] | None = None
        if isinstance(accumulator, WeightedMean):
            accumulator.reset()
            self._mean = accumulator
        else:
            spec = self._gate.spec if self._model else None
            self._mean = WeightedMean(spec, accumulator=accumulator)

    @property
    def status(self) -> RoundState:
        """Whether the round takes updates."""
        return self._status

    @property
    def number(self) -> int:
        """The round's number."""
        return self._number

    @property
    def model(self) -> Params:
        """The model that the round began with; borrowed."""
        return self._model

    @property
    def transfer(self) -> TransferType | None:
        """What the updates' arrays are; None while no update has said."""
        return self._transfer

    @property
    def accepted(self) -> tuple[Receipt, ...]:
        """The receipts of the updates that were added, in the order of arrival."""
        return tuple(receipt for receipt in self._receipts if receipt.accepted)

    @property
    def refused(self) -> tuple[Receipt, ...]:
        """The receipts of all others, in the order of arrival."""
        return tuple(receipt for receipt in self._receipts if not receipt.accepted)

    def offer(self, update: Update) -> Receipt:
        """Add an update to the mean, or refuse it.

        Args:
            update: What a contributor sent. Its arrays are read and not kept.

        Returns:
            The receipt, which the round keeps as well.

        Raises:
            UsageError: What was offered is no `Update`.
        """
        if not isinstance(update, Update):
            raise UsageError(f"expected an Update, got {quoted(type(update).__name__)}")
        receipt: Receipt = self._happens(_Event.OFFER, update)
        return receipt

    def close(self) -> Outcome:
        """End the round.

        Returns:
            The outcome; its model is new memory.

        Raises:
            UsageError: The round is closed already.
        """
        outcome: Outcome = self._happens(_Event.CLOSE)
        return outcome

    def state(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """What another process needs to go on with this open round, but for the model.

        Returns:
            What JSON can hold (settings and receipts), and plain arrays (the sums).

        Raises:
            UsageError: The round is closed; its outcome is what to keep.
        """
        state: tuple[dict[str, Any], dict[str, npt.NDArray[Any]]] = self._happens(_Event.STATE)
        return state

    @classmethod
    def from_state(
        cls, meta: Mapping[str, Any], arrays: Params, model: Params | None = None
    ) -> Round:
        """Go on with a round whose state was kept.

        Args:
            meta: The first part of `state`, as it was or as JSON gives it back.
            arrays: The second part.
            model: The model that the round began with; borrowed.

        Returns:
            An open round that goes on as the other would have, to the bit.

        Raises:
            UsageError: The parts are no state of a round, or the model is another one.
        """
        try:
            if meta["format"] != _STATE_FORMAT:
                raise UsageError(
                    f"expected a round's state of format {_STATE_FORMAT}, "
                    f"got {quoted(meta['format'])}"
                )
            transfer = meta["transfer"]
            round = cls(
                model,
                meta["number"],
                min_updates=meta["min_updates"],
                transfer=None if transfer is None else TransferType(transfer),
                limits=Limits(**meta["limits"]),
            )
            if meta["model"] != _digest(round._model):
                raise UsageError("the round whose state this is began with another model")
            round._keys = None if meta["keys"] is None else frozenset(meta["keys"])
            round._receipts = [_receipt(entry, round._number) for entry in meta["receipts"]]
            round._contributors = {receipt.contributor for receipt in round.accepted}
            round._mean = WeightedMean.from_state(
                meta["mean"], arrays, round._gate.spec if round._model else None
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"this is no state of a round: {quoted(str(error))}") from error
        if round._mean.count != len(round._contributors):
            raise UsageError(
                f"this is no state of a round: {round._mean.count} updates were added, "
                f"and {len(round._contributors)} contributors have a receipt"
            )
        return round

    def _happens(self, event: _Event, *arguments: Any) -> Any:
        action, after = _TRANSITIONS[self._status, event]
        result = action(self, *arguments)
        self._status = after
        return result

    def _take(self, update: Update) -> Receipt:
        try:
            contribution = self._gate.judge(
                update, accepted=self._contributors, transfer=self._transfer, keys=self._keys
            )
            try:
                self._mean.add(contribution.params, contribution.weight)
            except RefusedUpdate as refusal:
                raise refusal.placed(
                    contributor=contribution.contributor, round=self._number
                ) from None
        except RefusedUpdate as refusal:
            return self._refuse(update, refusal)
        if self._transfer is None:
            self._transfer = contribution.transfer
        if self._keys is None and not self._model and not self._limits.allow_missing:
            self._keys = frozenset(contribution.params)
        self._contributors.add(contribution.contributor)
        skipped = contribution.skipped_metrics
        receipt = Receipt(
            contributor=contribution.contributor,
            round=self._number,
            accepted=True,
            detail=f"metrics left out: {', '.join(skipped)}"[:_DETAIL_LENGTH] if skipped else "",
            weight=contribution.weight,
            metrics=contribution.metrics,
            skipped_metrics=skipped,
        )
        self._receipts.append(receipt)
        return receipt

    def _turn_away(self, update: Update) -> Receipt:
        refusal = RefusedUpdate(
            Reason.ROUND_CLOSED,
            expected="an update while the round is open",
            got="one after it was closed",
            contributor=shown_name(update.contributor),
            round=self._number,
        )
        return self._refuse(update, refusal)

    def _refuse(self, update: Update, refusal: RefusedUpdate) -> Receipt:
        receipt = Receipt(
            contributor=shown_name(update.contributor),
            round=self._number,
            accepted=False,
            reason=refusal.reason,
            detail=str(refusal),
        )
        self._receipts.append(receipt)
        return receipt

    def _finish(self) -> Outcome:
        accepted = self.accepted
        enough = len(accepted) >= self._min_updates
        problem = None
        if enough:
            try:
                model = self._average()
            except OutOfRange as error:
                problem = str(error)
        else:
            problem = f"{len(accepted)} accepted where at least {self._min_updates} are needed"
        if problem is not None:
            model = copy_params(self._model)
            problem = f"round {self._number}: {problem}; the model keeps its values"
        try:
            total_weight = float(sum(Fraction(receipt.weight or 0) for receipt in accepted))
        except OverflowError:
            total_weight = math.inf
        return Outcome(
            round=self._number,
            model=model,
            metrics=_mean_metrics(accepted),
            accepted=accepted,
            refused=self.refused,
            total_weight=total_weight,
            enough=enough,
            problem=problem,
            skipped_metrics=tuple(sorted({n for r in accepted for n in r.skipped_metrics})),
        )

    def _average(self) -> dict[str, npt.NDArray[Any]]:
        if not self._model:
            mean = self._mean.mean()
            return {key: mean[key] for key in sorted(mean)}
        if self._transfer is TransferType.DIFF:
            mean = self._mean.mean(base={key: self._model[key] for key in self._gate.spec})
        else:
            mean = self._mean.mean()
        for key, array in mean.items():
            if array.dtype != self._gate.spec[key].dtype:
                raise UsageError(
                    f"key {quoted(key)}: the accumulator gives {array.dtype}, and the model has "
                    f"{self._gate.spec[key].dtype}; make it with the spec of the model"
                )
        kept = copy_params({k: value for k, value in self._model.items() if k not in mean})
        return {key: mean[key] if key in mean else kept[key] for key in self._model}

    def _save(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        mean, arrays = self._mean.state()
        limits = self._limits
        meta = {
            "format": _STATE_FORMAT,
            "number": self._number,
            "min_updates": self._min_updates,
            "transfer": None if self._transfer is None else str(self._transfer),
            "limits": {
                "roster": None if limits.roster is None else sorted(limits.roster),
                "allow_missing": limits.allow_missing,
                "allow_unexpected": limits.allow_unexpected,
                "max_norm": limits.max_norm,
                "max_weight": limits.max_weight,
                "exclude": limits.exclude,
            },
            "model": _digest(self._model),
            "keys": None if self._keys is None else sorted(self._keys),
            "receipts": [
                {
                    "contributor": receipt.contributor,
                    "accepted": receipt.accepted,
                    "reason": None if receipt.reason is None else str(receipt.reason),
                    "detail": receipt.detail,
                    "weight": receipt.weight,
                    "metrics": dict(receipt.metrics),
                    "skipped_metrics": list(receipt.skipped_metrics),
                }
                for receipt in self._receipts
            ],
            "mean": mean,
        }
        return meta, arrays

    def _misused(self, *_: Any) -> None:
        raise UsageError(f"round {self._number} is closed; its outcome was given by close()")


_TRANSITIONS: dict[tuple[RoundState, _Event], tuple[Callable[..., Any], RoundState]] = {
    (RoundState.OPEN, _Event.OFFER): (Round._take, RoundState.OPEN),
    (RoundState.OPEN, _Event.CLOSE): (Round._finish, RoundState.CLOSED),
    (RoundState.OPEN, _Event.STATE): (Round._save, RoundState.OPEN),
    (RoundState.CLOSED, _Event.OFFER): (Round._turn_away, RoundState.CLOSED),
    (RoundState.CLOSED, _Event.CLOSE): (Round._misused, RoundState.CLOSED),
    (RoundState.CLOSED, _Event.STATE): (Round._misused, RoundState.CLOSED),
}


def _mean_metrics(accepted: tuple[Receipt, ...]) -> dict[str, float]:
    # Fractions, for the sum must not depend on the order; one float() at the end rounds once.
    sums: dict[str, tuple[Fraction, Fraction]] = {}
    for receipt in accepted:
        weight = Fraction(receipt.weight or 0)
        for name, value in receipt.metrics.items():
            total, weights = sums.get(name, (Fraction(0), Fraction(0)))
            sums[name] = (total + weight * Fraction(value), weights + weight)
    return {name: float(sums[name][0] / sums[name][1]) for name in sorted(sums)}


def _receipt(entry: Mapping[str, Any], number: int) -> Receipt:
    reason = entry["reason"]
    return Receipt(
        contributor=entry["contributor"],
        round=number,
        accepted=entry["accepted"],
        reason=None if reason is None else Reason(reason),
        detail=entry["detail"],
        weight=entry["weight"],
        metrics=dict(entry["metrics"]),
        skipped_metrics=tuple(entry["skipped_metrics"]),
    )


def _digest(model: Params) -> str:
    """A digest of every bit of a model: names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for key in sorted(model):
        native = np.ascontiguousarray(model[key], model[key].dtype.newbyteorder("<"))
        head = f"{key!r} {native.dtype.name} {model[key].shape}\n"
        digest.update(head.encode("utf-8", "surrogatepass"))
        digest.update(native.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
