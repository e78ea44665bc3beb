# mypy: disable-error-code="misc"
"""A place for an aggregator of the user's in a round of ScatterAndGather.

`CustomAggregator` stands in for an ``Aggregator`` or a ``ModelAggregator``, which is a component of
its own and is found by its id. It adds what ScatterAndGather withholds from one: a contributor's
name, and shelter for the round (see `nvflare_adapter.aggregator`). What the user's own code raises
in ``aggregate`` is let through, and ends the job.
"""

from __future__ import annotations

import threading
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

import fedavg_core as fc
from fedavg_core.errors import a_type, one_line, quoted
from nvflare_adapter import convert

__all__ = ["CustomAggregator"]


class CustomAggregator(Aggregator):
    """A user's own aggregator, sheltered.

    Args:
        aggregator_id: The id of the component that it is.
    """

    def __init__(self, aggregator_id: str = "custom_aggregator") -> None:
        super().__init__()
        self.aggregator_id = aggregator_id
        self._lock = threading.Lock()
        self._inner: Any = None
        self._number: int | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Find the user's aggregator when the run starts, and note which round is on.

        Args:
            event_type: NVFlare's name of the event.
            fl_ctx: Its context.

        Raises:
            UsageError: There is no such component.
        """
        if event_type == EventType.START_RUN:
            inner = fl_ctx.get_engine().get_component(self.aggregator_id)
            if not isinstance(inner, Aggregator):
                raise fc.UsageError(
                    f"component {quoted(self.aggregator_id)}: expected an Aggregator or a "
                    f"ModelAggregator, got {a_type(inner)}"
                )
            self._inner = inner
        elif event_type == AppEventType.ROUND_STARTED:
            with self._lock:
                self._number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Pass a client's result on.

        Args:
            shareable: The result.
            fl_ctx: The context, which names the client.

        Returns:
            What the user's aggregator answers; False if it raised, if the client has failed, or
            if the result is for another round. A ``ModelAggregator`` refuses by raising.
        """
        name = None
        try:
            answer = convert.answer_from_message(shareable, fl_ctx)
            name, number = answer.contributor, answer.round
            with self._lock:
                if number != self._number or number is None:
                    raise fc.UsageError(
                        f"expected a result for round {self._number}, got one for {quoted(number)}"
                    )
                if isinstance(answer, fc.Failure):
                    self.log_warning(fl_ctx, f"{name} failed: {answer.problem}")
                    return False
                model = convert.named_fl_model(shareable, fl_ctx)
                if not isinstance(self._inner, ModelAggregator):
                    return bool(self._inner.accept(shareable, fl_ctx))
                self._inner.fl_ctx = fl_ctx
                self._inner.accept_model(model)
        except Exception as error:  # an exception here would end the round for everyone
            self.log_warning(fl_ctx, f"refused {quoted(name)}: {one_line(error)}")
            return False
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Ask the user's aggregator for its mean.

        Args:
            fl_ctx: The context.

        Returns:
            Its result.
        """
        with self._lock:
            self._number = None
            if not isinstance(self._inner, ModelAggregator):
                return self._inner.aggregate(fl_ctx)
            self._inner.fl_ctx = fl_ctx
            return convert.result_from_fl_model(self._inner.aggregate_model())

    def reset(self, fl_ctx: FLContext) -> None:
        """Let the user's aggregator forget the round.

        Args:
            fl_ctx: The context.
        """
        with self._lock:
            if isinstance(self._inner, ModelAggregator):
                self._inner.reset_stats()
            else:
                self._inner.reset(fl_ctx)
