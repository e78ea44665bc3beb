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
* That holds as well when `offer` ends in an error from outside (KeyboardInterrupt, MemoryError),
  whenever it comes. Either the update was not added, and may be offered again; or it was, and its
  receipt is among those accepted, and to offer it again is a DUPLICATE. What tells the two apart is
  the `count` of the accumulator, which changes in one step with what it holds. (Sums that could not
  be had back, see `accumulator`, take no further update, and their round cannot be closed.)
* With the exact accumulator the outcome's model and metrics depend on which updates were accepted,
  and not on their order. The mean of a metric is the exact one, over the contributors that sent
  it, with their weights, rounded once to float64.
* The outcome's model has the keys, shapes and dtypes of the model that the round began with. A
  parameter that nobody sent, or that is excluded, keeps its value. With fewer accepted updates
  than `min_updates`, or where the mean is larger than the dtype's largest number, the whole model
  keeps its values, and the outcome says why.
* With a server optimizer the outcome's model is its step from there towards the mean. A round that
  keeps the model keeps the optimizer's state as well.
* The model that the round began with is only read, and shares no memory with the outcome's.
* An audit changes nothing but what is told: each receipt has the digest of what it is for, and the
  outcome an `Audit`, from which the round can be replayed (see `replay`).

A round without a model takes FULL updates only; the first accepted update to bring a parameter
says what it looks like, and the outcome's model has every parameter that came. There is nothing
to step from, so it is their mean.

The idea of a protocol without I/O, with its transitions in a table, is that of h11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy.typing as npt

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.any_accumulator import accumulator_for, accumulator_from_state, kind_of
from fedavg_core.arguments import truth, whole_number
from fedavg_core.audit import Audit
from fedavg_core.digest import digest, fingerprints
from fedavg_core.errors import OutOfRange, Reason, RefusedUpdate, UsageError, a_type, quoted
from fedavg_core.gate import Gate, Limits, is_name, shown_name
from fedavg_core.model import ModelSpec, Params, copy_params
from fedavg_core.next_model import next_model
from fedavg_core.outcome import Outcome, Receipt, mean_metrics, total_weight
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.server_optimizer import ServerOptimizer
from fedavg_core.update import TransferType, Update, transfer_named

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


class _Begun(NamedTuple):
    """An update that is being added: what will be so once it is, and how to tell."""

    held: int
    receipt: Receipt
    transfer: TransferType
    keys: frozenset[str] | None


class Round:
    """One round: takes updates, and ends with an outcome.

    Args:
        model: The model that the contributors were sent. Borrowed: it is read until the round is
            closed, and must not be changed meanwhile. None or empty if the contributors bring the
            first one.
        number: The round's number.
        min_updates: How many accepted updates it takes to change the model.
        transfer: What the updates' arrays are, or its name; None to let the first accepted update
            say.
        limits: What is asked of an update.
        accumulator: How to add: ``"exact"``, ``"float64"`` or ``"float32"``; or a `WeightedMean`
            for models like this one, which is reset and used, so that its memory serves many
            rounds; or a `RobustMean`, which says how, and of which an empty one is made. The least
            number of updates that it needs is that of the round, if `min_updates` is not more.
            One of the caller's own may refuse an update: ``add`` raises `RefusedUpdate`. It is no
            part of the round's state.
        audit: Whether the outcome shall have an `Audit`. It takes a SHA-256 of each update, and of
            the model and the optimizer's state before and after.
        server_optimizer: What makes the next model of the mean; None: the mean is the next model.
        optimizer_state: The state that its last step gave; None or empty at first. Borrowed like
            the model.

    Raises:
        UsageError: An argument has no meaning.
    """

    def __init__(
        self,
        model: Params | None,
        number: int,
        *,
        min_updates: int = 1,
        transfer: TransferType | str | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        accumulator: Accumulator | WeightedMean | RobustMean = "exact",
        audit: bool = False,
        server_optimizer: ServerOptimizer | None = None,
        optimizer_state: Params | None = None,
    ) -> None:
        self._number = whole_number("number", number, 0)
        self._min_updates = whole_number("min_updates", min_updates, 1)
        wanted = transfer_named(transfer)
        if wanted is None and transfer is not None:
            raise UsageError(f"transfer: expected FULL, DIFF or None, got {quoted(transfer)}")
        transfer = wanted
        if not isinstance(limits, Limits):
            raise UsageError(f"limits: expected a Limits, got {quoted(limits)}")
        audit = truth("audit", audit)
        self._model: Params = {} if model is None else model
        self._gate = Gate(self._model, self._number, limits)
        self._optimizer = server_optimizer
        self._optimizer_state: Params = {} if optimizer_state is None else optimizer_state
        if server_optimizer is not None:
            if not isinstance(server_optimizer, ServerOptimizer):
                raise UsageError(
                    f"server_optimizer: expected a ServerOptimizer or None, "
                    f"got {quoted(server_optimizer)}"
                )
            server_optimizer.check_state(ModelSpec.of(self._model), self._optimizer_state)
        elif self._optimizer_state:
            raise UsageError(
                "optimizer_state: there is no server optimizer whose state it could be"
            )
        if transfer is TransferType.DIFF and not self._model:
            raise UsageError("transfer: differences need a model that they are taken from")
        self._transfer = transfer
        self._limits = limits
        self._audit = audit
        self._status = RoundState.OPEN
        self._receipts: list[Receipt] = []
        self._contributors: set[str] = set()
        self._keys: frozenset[str] | None = None
        self._begun: _Begun | None = None
        self._mean: WeightedMean | RobustMean
        if isinstance(accumulator, WeightedMean):
            accumulator.reset()
            self._mean = accumulator
        else:
            self._mean = accumulator_for(accumulator, self._gate.spec if self._model else None)
        if isinstance(self._mean, RobustMean):
            self._min_updates = max(self._min_updates, self._mean.least)
            if self._mean.needs_differences and transfer is not TransferType.DIFF:
                raise UsageError(
                    f"accumulator: a {self._mean.name} is of differences; expected transfer DIFF, "
                    f"got {transfer}"
                )

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
        if not issubclass(type(update), Update):
            raise UsageError(f"expected an Update, got {a_type(update)}")
        receipt: Receipt = self._happens(_Event.OFFER, update)
        return receipt

    def close(self) -> Outcome:
        """End the round.

        Returns:
            The outcome; its model is new memory.

        Raises:
            UsageError: The round is closed already; or its model is not finite, so that nothing can
                be added to it, or its sums are unusable (see `WeightedMean`). The round stays open.
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
        cls,
        meta: Mapping[str, Any],
        arrays: Params,
        model: Params | None = None,
        server_optimizer: ServerOptimizer | None = None,
        optimizer_state: Params | None = None,
    ) -> Round:
        """Go on with a round whose state was kept.

        Args:
            meta: The first part of `state`, as it was or as JSON gives it back.
            arrays: The second part.
            model: The model that the round began with; borrowed.
            server_optimizer: Its server optimizer, if it has one.
            optimizer_state: The state that the optimizer had when the round began; borrowed.

        Returns:
            An open round that goes on as the other would have, to the bit.

        Raises:
            UsageError: The parts are no state of a round, or the model is another one, or the
                server optimizer or its state.
        """
        try:
            if meta["format"] != _STATE_FORMAT:
                raise UsageError(
                    f"expected a round's state of format {_STATE_FORMAT}, "
                    f"got {quoted(meta['format'])}"
                )
            round = cls(
                model,
                meta["number"],
                min_updates=meta["min_updates"],
                transfer=meta["transfer"],
                limits=Limits(**meta["limits"]),
                audit=meta.get("audit", False),
                server_optimizer=server_optimizer,
                optimizer_state=optimizer_state,
            )
            if meta["model"] != digest(fingerprints(round._model)):
                raise UsageError("the round whose state this is began with another model")
            if meta.get("optimizer") != round._optimizer_facts():
                raise UsageError(
                    "the round whose state this is began with another server optimizer, or with "
                    "another state of it"
                )
            keys = meta["keys"]
            if isinstance(keys, str) or not all(map(is_name, keys or ())):
                raise TypeError(f"the keys {quoted(keys)}")
            round._keys = None if keys is None else frozenset(keys)
            round._receipts = [
                Receipt.from_json(entry, round._number) for entry in meta["receipts"]
            ]
            round._contributors = {receipt.contributor for receipt in round.accepted}
            round._mean = accumulator_from_state(
                meta["mean"], arrays, round._gate.spec if round._model else None
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"this is no state of a round: {quoted(str(error))}") from error
        round._check_restored()
        return round

    def _check_restored(self) -> None:
        """See that receipts, sums and model tell of the same round."""
        problem = None
        contributors, added = len(self._contributors), self._mean.count
        if added != contributors:
            problem = f"{added} updates were added, and {contributors} contributors have a receipt"
        elif len(self.accepted) != contributors:
            problem = "a contributor has two receipts for an update that was added"
        elif self._audit and not all(receipt.digest for receipt in self.accepted):
            problem = "a receipt for an update that was added, without its digest"
        if problem is not None:
            raise UsageError(f"this is no state of a round: {problem}")

    def _happens(self, event: _Event, *arguments: Any) -> Any:
        self._settle()
        action, after = _TRANSITIONS[self._status, event]
        result = action(self, *arguments)
        self._status = after
        return result

    def _take(self, update: Update) -> Receipt:
        try:
            contribution = self._gate.judge(
                update, accepted=self._contributors, transfer=self._transfer, keys=self._keys
            )
            skipped = contribution.skipped_metrics
            told = f"metrics left out: {', '.join(skipped)}" if skipped else ""
            receipt = Receipt(
                contributor=contribution.contributor,
                round=self._number,
                accepted=True,
                detail=told[:_DETAIL_LENGTH],
                weight=contribution.weight,
                metrics=contribution.metrics,
                skipped_metrics=skipped,
                digest=digest(fingerprints(contribution.params)) if self._audit else None,
            )
            keys = self._keys
            if keys is None and not self._model and not self._limits.allow_missing:
                keys = frozenset(contribution.params)
            self._begun = _Begun(self._mean.count, receipt, contribution.transfer, keys)
            try:
                self._mean.add(contribution.params, contribution.weight)
                self._settle(added=True)
            except RefusedUpdate as refusal:
                self._begun = None
                raise refusal.placed(
                    contributor=contribution.contributor, round=self._number
                ) from None
            except BaseException:
                self._settle()
                raise
        except RefusedUpdate as refusal:
            return self._refuse(update, refusal)
        return receipt

    def _settle(self, added: bool = False) -> None:
        """Take note of the update that was begun to be added, if it was added.

        It may be interrupted itself: the next one does all of it.
        """
        if self._begun is None:
            return
        held, receipt, transfer, keys = self._begun
        if added or self._mean.count > held:
            self._transfer, self._keys = transfer, keys
            if not self._receipts or self._receipts[-1] is not receipt:
                self._receipts.append(receipt)
            self._contributors.add(receipt.contributor)
        self._begun = None

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
            digest=_digest_of_refused(update.params) if self._audit else None,
        )
        self._receipts.append(receipt)
        return receipt

    def _finish(self) -> Outcome:
        accepted = self.accepted
        enough = len(accepted) >= self._min_updates
        problem = None
        if enough:
            try:
                model, state = next_model(
                    self._mean,
                    self._model,
                    self._gate.spec,
                    self._transfer,
                    self._optimizer,
                    self._optimizer_state,
                )
            except OutOfRange as error:
                problem = str(error)
        else:
            least = f"{self._min_updates} {'is' if self._min_updates == 1 else 'are'}"
            problem = f"{len(accepted)} accepted where at least {least} needed"
        if problem is not None:
            model, state = copy_params(self._model), copy_params(self._optimizer_state)
            problem = f"round {self._number}: {problem}; the model keeps its values"
        return Outcome(
            round=self._number,
            model=model,
            metrics=mean_metrics(accepted),
            accepted=accepted,
            refused=self.refused,
            total_weight=total_weight(accepted),
            enough=enough,
            problem=problem,
            skipped_metrics=tuple(sorted({n for r in accepted for n in r.skipped_metrics})),
            audit=self._audited(model, state) if self._audit else None,
            optimizer_state=state,
        )

    def _optimizer_facts(self) -> list[Any] | None:
        """What tells one server optimizer with its state from another."""
        if self._optimizer is None:
            return None
        return [self._optimizer.settings(), digest(fingerprints(self._optimizer_state))]

    def _audited(self, model: Params, state: Params) -> Audit:
        return Audit(
            round=self._number,
            transfer=self._transfer,
            accumulator=kind_of(self._mean),
            min_updates=self._min_updates,
            averaged=tuple(sorted(self._gate.spec if self._model else self._mean.keys)),
            base=fingerprints(self._model),
            receipts=tuple(self._receipts),
            output=fingerprints(model),
            optimizer=None if self._optimizer is None else self._optimizer.settings(),
            state=fingerprints(self._optimizer_state),
            output_state=fingerprints(state),
        )

    def _save(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        mean, arrays = self._mean.state()
        meta = {
            "format": _STATE_FORMAT,
            "number": self._number,
            "min_updates": self._min_updates,
            "transfer": None if self._transfer is None else str(self._transfer),
            "limits": self._limits.to_json(),
            "audit": self._audit,
            "optimizer": self._optimizer_facts(),
            "model": digest(fingerprints(self._model)),
            "keys": None if self._keys is None else sorted(self._keys),
            "receipts": [receipt.to_json() for receipt in self._receipts],
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


def _digest_of_refused(params: Any) -> str | None:
    """The digest of what a contributor sent, which may be anything; None if it is no model."""
    try:
        return digest(fingerprints(params))
    except Exception:  # a foreign mapping may fail in any way
        return None
