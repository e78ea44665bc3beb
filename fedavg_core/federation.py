"""A federation in process: select, train, judge and add, close, evaluate, store, again.

Each round, the selected clients are given their own copy of the model and trained, one after the
other or on any `concurrent.futures.Executor`. What they give back is offered to the round in the
contributors' natural order (the spare ones last), whichever was ready first, so that a run's
outcomes, receipts and bits are the same in line, on threads and on processes.

What is promised:

* The outcome of a round depends on the model, the server optimizer's state, the clients, the
  settings and the round's number, and on nothing else that happened before.
  So a run that was stopped at any moment and resumed from its checkpoints ends with the bits of
  one that was not, provided that its clients take all randomness from their context and keep
  nothing from one round to the next.
* A client that raises or exits, or gives no `TrainResult`, is reported in the outcome's `failed`
  and left out; one that gives an unfit update is refused by the round. Neither ends the run. What
  the caller's own functions raise (`evaluate`, `stop_when`, observers) ends it.
* With a deadline, a client that is not done in time is reported and left out; and where the first
  that are done count, the others do not. Then, and only then, the outcome depends on the clock.
* A round takes as many updates as are wanted and no more. Where more clients are asked, the spare
  ones stand in for those that fail or are refused; the others are not waited for.
* Clients give whole models. The differences of a DIFF run are taken here, once, from the model that
  the client was sent; what cannot be one is judged by the round as in a FULL run.

The algorithm is FederatedAveraging of McMahan, Moore, Ramage, Hampson and Agüera y Arcas (2017).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Literal

import numpy.typing as npt

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.admission import check_model
from fedavg_core.any_accumulator import kind_of
from fedavg_core.arguments import PathLike, file_path, truth, whole_number
from fedavg_core.checkpoint import Checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.client import (
    Client,
    Context,
    TrainResult,
    contributor_order,
    contributor_seed,
)
from fedavg_core.dispatch import Dispatch
from fedavg_core.errors import CheckpointError, UsageError, quoted
from fedavg_core.gate import Limits, is_name
from fedavg_core.model import ModelSpec, Params, copy_params
from fedavg_core.observer import Observer
from fedavg_core.outcome import Outcome, evaluation_of
from fedavg_core.plain import plain_list
from fedavg_core.progress import Best, Progress
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.round import Round
from fedavg_core.selection import Selection
from fedavg_core.server_optimizer import ServerOptimizer
from fedavg_core.update import TransferType, Update

__all__ = [
    "Best",
    "Client",
    "Context",
    "Federation",
    "Observer",
    "TrainResult",
    "contributor_order",
    "contributor_seed",
]

_FOLDER_LENGTH = 200
_SHOWN = {"selected": "participation, in updates,", "asked": "over_selection, in clients asked,"}

_log = logging.getLogger(__name__)


class Federation:
    """A run of federated averaging. Iterate over it, or call `run`.

    A loop that was left can be taken up again: a new loop goes on with the next round.

    Args:
        model: The model to begin with; copied. None if the clients bring the first one.
        clients: From each contributor's name to its client.
        rounds: How many rounds to have in all.
        transfer: What is made of what the clients give, which is their whole model either way:
            that, or its difference from the model that they were sent. The means agree to the bit
            where each difference is exact in its dtype.
        seed: Of the selection and of the clients' seeds.
        min_updates: How many accepted updates it takes to change the model.
        participation: How many updates a round wants: a number, a fraction of all clients (rounded
            to the nearest, at least one), or None for all.
        over_selection: How many times as many clients are asked, rounded up; see `selection`.
        first_come: Whether the first that are done count, for use with an executor, and not the
            first in the order in which they are asked. What the others do is lost.
        executor: Where clients run; None for one after the other in this thread. It is not shut
            down. For one of processes the clients must be picklable.
        in_flight: How many clients an executor is given at a time; the memory of a run is that of
            so many updates.
        retries: How often a client that fails is tried again, with a new copy of the model.
        deadline: Seconds a round waits for its clients, for use with an executor; None for ever.
        evaluate: Given the new model, with arrays that cannot be written to, says what it is worth.
        evaluate_every: Evaluate in each so many-th round, and in the last.
        monitor: The metric that says which model is the best and when to stop: of the evaluation,
            else of the contributors' mean metrics.
        mode: Whether a larger (``"max"``) or smaller (``"min"``) value of it is better.
        patience: Stop after so many rounds that had the monitored metric and were not better than
            the best.
        stop_when: Given an outcome, says whether to stop after it.
        limits: What is asked of an update.
        accumulator: The arithmetic of the mean; or a `WeightedMean` for models like this one, or a
            robust mean, see `Round`.
        audit: Whether each outcome shall have an `Audit`.
        server_optimizer: What makes the next model of the mean; None: the mean is the next model.
        observers: Are told what happens, in this order.
        checkpoint: A folder to store the run in; None to store nothing.
        checkpoint_every: Store each so many-th round; the last and the best are stored anyway.
        keep: How many of the newest checkpoints to keep, beside the best.
        resume: Go on from the newest checkpoint of the folder; if it has none, begin with round 0,
            and log a warning that says so. Without it, a folder that has one is refused.

    Raises:
        UsageError: An argument has no meaning, or the checkpoint is that of another run.
        CheckpointError: The newest checkpoint is damaged, or the folder cannot be used.
    """

    def __init__(
        self,
        model: Params | None,
        clients: Mapping[str, Client],
        rounds: int,
        *,
        transfer: TransferType | str = TransferType.FULL,
        seed: int = 0,
        min_updates: int = 1,
        participation: int | float | None = None,
        over_selection: float = 1.0,
        first_come: bool = False,
        executor: Executor | None = None,
        in_flight: int = 64,
        retries: int = 0,
        deadline: float | None = None,
        evaluate: Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, float]] | None = None,
        evaluate_every: int = 1,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        patience: int | None = None,
        stop_when: Callable[[Outcome], bool] | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        accumulator: Accumulator | WeightedMean | RobustMean = "exact",
        audit: bool = False,
        server_optimizer: ServerOptimizer | None = None,
        observers: Sequence[Observer] = (),
        checkpoint: PathLike | None = None,
        checkpoint_every: int = 1,
        keep: int = 3,
        resume: bool = False,
    ) -> None:
        self._rounds = whole_number("rounds", rounds, 1)
        self._seed = seed = whole_number("seed", seed)
        self._min_updates = whole_number("min_updates", min_updates, 1)
        self._evaluate_every = whole_number("evaluate_every", evaluate_every, 1)
        self._checkpoint_every = whole_number("checkpoint_every", checkpoint_every, 1)
        if not isinstance(clients, Mapping) or not clients:
            raise UsageError(
                "clients: expected a mapping of at least one name to a client, "
                f"got {quoted(clients)}"
            )
        odd = [name for name in clients if not is_name(name)]
        if odd:
            raise UsageError(
                f"clients: expected names of 1 to 256 printable characters, got {quoted(odd[0])}"
            )
        idle = [name for name, client in clients.items() if not callable(client)]
        if idle:
            raise UsageError(
                f"clients: expected a function for each name, got {quoted(clients[idle[0]])} "
                f"for {quoted(idle[0])}"
            )
        if evaluate is not None and not callable(evaluate):
            raise UsageError(f"evaluate: expected a function or None, got {quoted(evaluate)}")
        told = plain_list(observers)
        if told is None or not all(isinstance(one, Observer) for one in told):
            raise UsageError(f"observers: expected a list of observers, got {quoted(observers)}")
        resume = truth("resume", resume)
        if model is not None:
            check_model(model, "model")
        self._clients = clients
        self._order = contributor_order(clients)
        self._index = {name: index for index, name in enumerate(self._order)}
        self._selection = Selection(self._order, participation, over_selection, seed)
        self._dispatch = Dispatch(executor, in_flight, retries, deadline, first_come)
        self._evaluate = evaluate
        self._progress = Progress(monitor, mode, patience, stop_when)
        self._limits = limits
        self._accumulator = accumulator
        self._audit = audit
        self._optimizer = server_optimizer
        self._optimizer_state: Params = {}
        self._mean: WeightedMean | None = None
        self._observers = told
        # A round that is never used checks the model and the settings once, before anything runs.
        first = Round(
            model,
            0,
            min_updates=min_updates,
            transfer=transfer,
            limits=limits,
            accumulator=accumulator,
            audit=audit,
            server_optimizer=server_optimizer,
        )
        self._transfer = first.transfer or TransferType.FULL
        if isinstance(accumulator, RobustMean) and accumulator.least > self._selection.wanted:
            raise UsageError(
                f"accumulator: a {accumulator.name} needs at least {accumulator.least} updates a "
                f"round, got {self._selection.wanted} clients"
            )
        if min_updates > self._selection.wanted:
            raise UsageError(
                f"min_updates: expected at most the {self._selection.wanted} clients of a round, "
                f"got {min_updates}"
            )
        self._model = copy_params(model or {})
        self._next = 0
        folder = None if checkpoint is None else file_path("checkpoint", checkpoint)
        self._store = None if folder is None else CheckpointStore(folder, keep)
        if self._store is None and resume:
            raise UsageError("resume: expected the folder of the run as well, as checkpoint")
        if self._store is not None:
            shown = quoted(str(self._store.folder), _FOLDER_LENGTH)
            if not self._store.paths():
                if resume:
                    _log.warning("nothing to resume in %s: starts at round 0", shown)
            elif resume:
                self._restore(self._store)
            else:
                raise UsageError(
                    "checkpoint: expected an empty folder, or resume=True to go on with the run "
                    f"that is stored in {shown}"
                )

    @property
    def model(self) -> dict[str, npt.NDArray[Any]]:
        """The global model as it is now; a copy."""
        return copy_params(self._model)

    @property
    def round(self) -> int:
        """How many rounds are completed."""
        return self._next

    @property
    def best(self) -> Best | None:
        """The best model by the monitored metric; None while there is none."""
        return self._progress.best

    @property
    def stopped(self) -> str | None:
        """Why the run stopped before its last round; None if it did not."""
        return self._progress.stopped

    def __iter__(self) -> Iterator[Outcome]:
        with contextlib.nullcontext() if self._store is None else self._store:
            while self._next < self._rounds and self.stopped is None:
                yield self._play()

    def run(self) -> list[Outcome]:
        """Play all rounds that are left.

        Returns:
            Their outcomes.

        Raises:
            CheckpointError: A checkpoint could not be written.
            Exception: Whatever `evaluate`, `stop_when` or an observer raises; the rounds that have
                ended stand, and a further call goes on after them.
        """
        return list(self)

    def _play(self) -> Outcome:
        number = self._next
        selected = self._selection.of_round(number)
        for observer in self._observers:
            observer.round_started(number, tuple(selected))
        round = Round(
            self._model,
            number,
            min_updates=self._min_updates,
            transfer=self._transfer,
            limits=self._limits,
            accumulator=self._sums(),
            audit=self._audit,
            server_optimizer=self._optimizer,
            optimizer_state=self._optimizer_state,
        )
        failed = []
        answered: set[str] = set()
        taken = 0
        tasks = ((self._clients[name], self._context(name)) for name in selected)
        with contextlib.closing(
            self._dispatch.answers(tasks, self._model, self._transfer)
        ) as answers:
            for answer in answers:
                answered.add(answer.contributor)
                if isinstance(answer, Update):
                    receipt = round.offer(answer)
                    taken += receipt.accepted
                    for observer in self._observers:
                        observer.update_judged(receipt)
                        if receipt.accepted:
                            observer.update_accepted(answer)
                else:
                    failed.append(answer)
                    for observer in self._observers:
                        observer.client_failed(answer)
                if taken == self._selection.wanted:
                    break
        spare = tuple(name for name in selected if name not in answered)
        outcome = replace(round.close(), failed=tuple(failed), not_needed=spare)
        outcome = replace(outcome, evaluation=self._evaluation(outcome))
        before = self._model, self._optimizer_state, self._next, copy.copy(self._progress)
        try:
            self._model = copy_params(outcome.model)
            self._optimizer_state = outcome.optimizer_state
            self._next += 1
            complete = outcome.problem is None and (
                self._evaluate is None or bool(outcome.evaluation)
            )
            is_best = self._progress.note(outcome, complete)
            last = self._next == self._rounds or self.stopped is not None
            if is_best or last or self._next % self._checkpoint_every == 0:
                self._save(outcome, is_best)
        except BaseException:
            # What is not stored has not been: the round is played again, as after a kill.
            self._model, self._optimizer_state, self._next, self._progress = before
            raise
        for observer in self._observers:
            observer.round_ended(outcome)
        return outcome

    def _sums(self) -> Accumulator | WeightedMean | RobustMean:
        """The accumulator, made once there is a model to make it for, and used in every round."""
        if isinstance(self._accumulator, (WeightedMean, RobustMean)):
            return self._accumulator
        if self._mean is None and self._model:
            spec = self._limits.averaged(ModelSpec.of(self._model))
            self._mean = WeightedMean(spec, accumulator=self._accumulator)
        return self._mean if self._mean is not None else self._accumulator

    def _context(self, name: str) -> Context:
        return Context(
            contributor=name,
            index=self._index[name],
            num_contributors=len(self._order),
            round=self._next,
            num_rounds=self._rounds,
            seed=contributor_seed(self._seed, self._next, name),
        )

    def _evaluation(self, outcome: Outcome) -> dict[str, float]:
        number = outcome.round + 1
        if self._evaluate is None or (number % self._evaluate_every and number != self._rounds):
            return {}
        views = {key: array.view() for key, array in outcome.model.items()}
        for view in views.values():
            view.flags.writeable = False
        return evaluation_of(self._evaluate(views))

    def _settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        names = "\n".join(self._order)
        own = self._accumulator
        kind = kind_of(own) if isinstance(own, (WeightedMean, RobustMean)) else own
        return {
            "clients": hashlib.sha256(names.encode("utf-8")).hexdigest(),
            "seed": self._seed,
            "transfer": str(self._transfer),
            "selected": self._selection.wanted,
            "asked": self._selection.asked,
            "min_updates": self._min_updates,
            "accumulator": kind,
            "limits": self._limits.to_json(),
            **self._progress.settings(),
            "server_optimizer": None if self._optimizer is None else self._optimizer.settings(),
        }

    def _save(self, outcome: Outcome, is_best: bool) -> None:
        if self._store is None:
            return
        self._store.save(
            Checkpoint(
                model=self._model,
                round=self._next,
                metrics={**outcome.metrics, **outcome.evaluation},
                extra={"settings": self._settings(), **self._progress.to_json()},
                arrays=self._optimizer_state,
                best=is_best,
            )
        )

    def _restore(self, store: CheckpointStore) -> None:
        found = store.load()
        kept, wanted = found.extra.get("settings"), self._settings()
        if not isinstance(kept, dict):
            raise UsageError(f"{store.folder}: its checkpoints are not those of a federation")
        for name, value in wanted.items():
            if kept.get(name) != value:
                raise UsageError(f"{store.folder}: {_unlike(name, kept.get(name), value)}")
        stored, given = ModelSpec.of(found.model), ModelSpec.of(self._model)
        if given and given != stored:
            key = next(key for key in (*stored, *given) if stored.get(key) != given.get(key))
            raise UsageError(
                f"{store.folder}: key {quoted(key)}: expected a model with {_shown(stored, key)}, "
                f"as it is stored, got one with {_shown(given, key)}"
            )
        self._model = copy_params(found.model)
        self._next = found.round
        try:
            if self._optimizer is not None:
                self._optimizer.check_state(ModelSpec.of(found.model), found.arrays)
        except UsageError as error:
            raise CheckpointError(store.paths()[-1], str(error)) from None
        self._optimizer_state = found.arrays
        self._progress.take_up(store, found)


def _shown(spec: ModelSpec, key: str) -> str:
    """What a model has under a name."""
    return str(spec.get(key, "none"))


def _unlike(name: str, kept: object, value: object) -> str:
    """In what the settings of a run and those of the one to resume are not alike."""
    if name == "clients":
        return "the run that is stored there has other clients"
    if isinstance(kept, Mapping) and isinstance(value, Mapping):
        odd = next(
            one
            for one in (*kept, *value)
            if (one in kept) != (one in value) or kept.get(one) != value.get(one)
        )
        name, kept, value = f"{name}: {odd}", kept.get(odd), value.get(odd)
    shown = _SHOWN.get(name, name)
    return f"expected a run with {shown} {quoted(kept)} to resume, got {quoted(value)}"
