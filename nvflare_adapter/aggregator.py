# mypy: disable-error-code="misc"
"""NVFlare's aggregator over the core's round, for either of its controllers.

`FedAvgAggregator` opens a `fedavg_core.Round` when a round starts, offers it each client's result,
and hands the controller the whole new model when the round is closed. It judges nothing itself. It
has two faces: ``accept`` and ``aggregate`` for ScatterAndGather, and ``accept_model`` and
``aggregate_model`` for the FedAvg controller, so that the recipes that run it, PyTorch's included,
take the exact mean by ``aggregator=FedAvgAggregator()``.

What NVFlare makes of an answer decides what may be answered here:

* An exception out of ``accept`` ends the round at once, without the clients still to come, and the
  job is counted as a success. So ``accept`` never raises: it answers False and logs one line.
* The FedAvg controller does not look at what ``accept_model`` answers, so that one raises to
  refuse: there an exception costs one client's update, and a line of the log.
* An exception out of ``aggregate`` ends the job; a round with too few updates is no failure, but
  keeps the model and says so.
* ``accept`` runs on NVFlare's callback threads, ``aggregate`` and ``reset`` on another, and a late
  result can arrive between two rounds or in a later one. So there is a lock, and each result names
  the round that it answers.

Constructor arguments travel to the server as JSON under the names of the attributes that hold them.
They are therefore kept as they were given, and made use of when the run starts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

import fedavg_core as fc
from fedavg_core.accumulator import Accumulator
from fedavg_core.errors import one_line, quoted
from nvflare_adapter import convert, global_model
from nvflare_adapter.dtypes import plain
from nvflare_adapter.report import report_of_outcome, statistics

__all__ = ["FedAvgAggregator"]

# NVFlare has had a name for it since 2.9.
_STATISTICS = getattr(AppConstants, "AGGREGATION_STATS", "_aggregation_stats")

_LATE = "late: no answer before the round was closed"


class FedAvgAggregator(ModelAggregator):
    """The exact weighted mean of what the clients send.

    Args:
        transfer: ``"FULL"`` or ``"DIFF"``: what clients are to send; results of the other kind
            are refused. None: what the round's first accepted result is.
        min_updates: How many accepted updates it takes to change the model.
        accumulator: ``"exact"``, ``"float64"`` or ``"float32"``.
        limits: What else is asked of an update: the fields of `fedavg_core.Limits`, by name.
        aggregation_weights: From a contributor's name to a factor of its weights; 1 for others.
        server_optimizer: The name of the optimizer that makes the next model of the mean; empty
            where the mean is the next model.
        optimizer_settings: Its settings.
        audit: Whether to keep what it takes to see later that the model is what it should be.
        keep_open: Whether to keep, after each update, what the open round has received.
    """

    def __init__(
        self,
        transfer: str | None = None,
        min_updates: int = 1,
        accumulator: Accumulator = "exact",
        limits: Mapping[str, Any] | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        server_optimizer: str = "",
        optimizer_settings: Mapping[str, Any] | None = None,
        audit: bool = False,
        keep_open: bool = False,
    ) -> None:
        Aggregator.__init__(self)
        ModelAggregator.__init__(self)
        self.transfer = transfer
        self.min_updates = min_updates
        self.accumulator = accumulator
        self.limits = limits
        self.aggregation_weights = aggregation_weights
        self.server_optimizer = server_optimizer
        self.optimizer_settings = optimizer_settings
        self.audit = audit
        self.keep_open = keep_open
        self._lock = threading.Lock()
        self._round: fc.Round | None = None
        self._failed: dict[str, fc.Failure] = {}
        self._clients: list[str] = []
        self._received: Counter[str] = Counter()
        self._known: set[str] = set()
        self._mean: fc.WeightedMean | None = None
        self._spec: fc.ModelSpec | None = None  # of the last outcome, and so of what that one takes
        self._state: fc.Params = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Open a round when NVFlare starts one; take note of clients that NVFlare has lost.

        Args:
            event_type: NVFlare's name of the event.
            fl_ctx: Its context.
        """
        if event_type in (AppEventType.ROUND_STARTED, AppEventType.BEFORE_AGGREGATION):
            self.fl_ctx = fl_ctx
        if event_type == AppEventType.ROUND_STARTED:
            with self._lock:
                self._failed, self._received, self._known = {}, Counter(), set()
                self._round = self._open(fl_ctx)
                self._clients = [client.name for client in fl_ctx.get_engine().get_clients()]
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            if convert.has_failed(result):
                self.accept(result, fl_ctx)

    def _open(self, fl_ctx: FLContext) -> fc.Round:
        held, number = (
            fl_ctx.get_prop(name)
            for name in (AppConstants.GLOBAL_MODEL, AppConstants.CURRENT_ROUND)
        )
        model = global_model.model_of(held)
        extra = {} if held is None else global_model.extra_of(held)
        state, kept = extra.get("arrays", self._state), extra.pop("open", None)
        named, settings = self.server_optimizer, self.optimizer_settings or {}
        optimizer = fc.optimizer_named(named, **settings) if named else None
        if kept is not None and kept.round == number:
            round = fc.Round.from_state(kept.extra["round"], kept.arrays, model, optimizer, state)
            self._received.update(kept.extra["received"])
            self._known = {receipt.contributor for receipt in round.accepted}
            self._mean = None
            return round
        if self._mean is None or not model or fc.ModelSpec.of(model) != self._spec:
            spec = self._asked().averaged(fc.ModelSpec.of(model)) if model else None
            self._mean = fc.WeightedMean(spec, accumulator=self.accumulator)
        return fc.Round(
            model,
            number,
            min_updates=self.min_updates,
            transfer=None if self.transfer is None else fc.TransferType(self.transfer),
            limits=self._asked(),
            accumulator=self._mean,
            audit=self.audit,
            server_optimizer=optimizer,
            optimizer_state=state,
        )

    def _asked(self) -> fc.Limits:
        return fc.Limits(**(self.limits or {}))

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Offer a client's result to the round, or note that the client has failed.

        Args:
            shareable: The result; its arrays are read and not kept.
            fl_ctx: The context, which names the client.

        Returns:
            Whether it is in the mean. If not, one line of the log says why, and the sums are as
            they were, to the bit.
        """
        problem = self._take(shareable, fl_ctx)
        if problem is not None:
            self.log_warning(fl_ctx, problem)
        elif self.keep_open:
            self._keep(fl_ctx)
        return problem is None

    def accept_model(self, model: Any) -> None:
        """Offer a client's result to the round, for the FedAvg controller.

        Args:
            model: The result, as an ``FLModel``; its arrays are read and not kept.

        Raises:
            FedAvgError: It is not in the mean; the message says why.
        """
        open_round = self._round  # which may be set aside meanwhile
        number = None if open_round is None else open_round.number
        problem = self._take(convert.message_from_fl_model(model, number), self.fl_ctx)
        if problem is not None:
            raise fc.FedAvgError(problem)

    def _take(self, message: Shareable, fl_ctx: FLContext) -> str | None:
        """Judge a client's result; say in one line why it is not in the mean, if it is not."""
        try:
            answer = convert.answer_from_message(message, fl_ctx)
            with self._lock:
                if self._round is None:
                    return f"refused {quoted(answer.contributor)}: no round is open"
                if isinstance(answer, fc.Failure):
                    if answer.round == self._round.number:
                        self._failed[answer.contributor] = answer
                        return f"{answer.contributor} failed: {answer.problem}"
                    # The round is to judge it: it refuses an answer for another round unread.
                    answer = fc.Update(answer.contributor, answer.round, params={}, weight=1)
                if self._known and answer.contributor in self._known:
                    self._known.remove(answer.contributor)  # once, it is what came before
                    return None
                receipt = self._round.offer(self._weighted(answer))
                if receipt.accepted:
                    self._received.update(k for k in answer.params if isinstance(k, str))
        except Exception as error:  # an exception here would end the round for everyone
            return f"refused: {one_line(error)}"
        return None if receipt.accepted else f"refused: {receipt.detail}"

    def _keep(self, fl_ctx: FLContext) -> None:
        """Have the persistor store what the open round has received."""
        try:
            persistor = fl_ctx.get_engine().get_component(AppConstants.DEFAULT_PERSISTOR_ID)
            with self._lock:
                if self._round is not None and self._round.status is fc.RoundState.OPEN:
                    state, arrays = self._round.state()
                    extra = {"round": state, "received": dict(self._received)}
                    persistor.save_open(
                        fc.Checkpoint({}, self._round.number, extra=extra, arrays=arrays), fl_ctx
                    )
        except Exception as error:  # as in accept
            self.log_warning(fl_ctx, f"the open round could not be kept: {one_line(error)}")

    def _weighted(self, update: fc.Update) -> fc.Update:
        factor = (self.aggregation_weights or {}).get(update.contributor)
        weight = plain(update.weight)
        if factor is None or isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return update
        return replace(update, weight=weight * factor)

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Close the round.

        Args:
            fl_ctx: The context; the round's statistics are put there.

        Returns:
            The whole new model and the report of the round, in which clients that have not
            answered are told as failed; the model of before where there were too few updates.

        Raises:
            UsageError: No round is open.
        """
        return self._aggregate(fl_ctx, self._clients)

    def _aggregate(self, fl_ctx: FLContext, expected: Collection[str]) -> Shareable:
        with self._lock:
            if self._round is None:
                raise fc.UsageError("aggregate: no round is open")
            outcome = self._round.close()
            answered = {one.contributor for one in (*outcome.accepted, *outcome.refused)}
            for name in set(expected) - answered - set(self._failed):
                self._failed[name] = fc.Failure(name, outcome.round, _LATE)
            failed = (self._failed[name] for name in fc.contributor_order(self._failed))
            outcome = replace(outcome, failed=tuple(failed))
            told = statistics(outcome, self._received, self._asked())
        if outcome.problem is not None:
            self.log_warning(fl_ctx, outcome.problem)
        fl_ctx.set_prop(_STATISTICS, told, private=True, sticky=False)
        self._state = outcome.optimizer_state
        self._spec = fc.ModelSpec.of(outcome.model)
        extra: dict[str, Any] = {"report": report_of_outcome(outcome), "arrays": self._state}
        if outcome.audit is not None:
            extra["audit"] = outcome.audit.to_text()
        return convert.result_from_model(outcome.model, extra)

    def aggregate_model(self) -> Any:
        """Close the round, for the FedAvg controller.

        Returns:
            What `aggregate` gives, as an ``FLModel``.

        Raises:
            UsageError: No round is open.
        """
        return convert.fl_model_from_result(self._aggregate(self.fl_ctx, expected=()))

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the round; the memory of its sums is kept for the next.

        Args:
            fl_ctx: The context.
        """
        with self._lock:
            self._round = None

    def reset_stats(self) -> None:
        """Nothing: the FedAvg controller asks for it when the new round is open already."""
