# mypy: disable-error-code="misc"
"""ScatterAndGather that knows the best model, stops early, and goes on where another job ended.

NVFlare's controller does the rounds, and fires all its events. This one listens to them:

* When a round has made the new global model, the round's mean metrics are that model's, as they are
  in a federation in process. (NVFlare's model selector takes them for the model's that the round
  began with, so it never judges the last one.) Where they are the best so far, the controller fires
  NVFlare's event for that, and the persistor keeps the model.
* When a round is done, and metrics or patience say so, it was the last.

How the search stands is stored with each model, so that a job that goes on from one decides as the
first would have.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.math_utils import parse_compare_criteria
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.fuel.utils.memory_utils import cleanup_memory

from nvflare_adapter import global_model

__all__ = ["FedAvgController", "direction"]

# NVFlare has had a name for it since 2.9.
_SELECTION_INFO = getattr(AppConstants, "METRICS_SELECTION_INFO", "metrics_selection_info")


def direction(stop_cond: str) -> tuple[str, str]:
    """What a condition to stop says of its metric.

    Args:
        stop_cond: The condition, such as ``"accuracy >= 0.9"``.

    Returns:
        The metric's name, and whether larger (``"max"``) or smaller (``"min"``) is better.

    Raises:
        ValueError: It is no condition.
    """
    name, _, compare = parse_compare_criteria(stop_cond)
    return name, "min" if compare in (operator.lt, operator.le) else "max"


@dataclass
class _Search:
    """The best value of a metric so far, and how many rounds had one that was not better."""

    mode: str
    best: float | None = None
    waited: int = 0

    def sees(self, value: float) -> bool:
        """Take note of a round's value; say whether it is the best."""
        sign = 1.0 if self.mode == "max" else -1.0
        if self.best is not None and not sign * value > sign * self.best:
            self.waited += 1
            return False
        self.best, self.waited = value, 0
        return True


class FedAvgController(ScatterAndGather):
    """The rounds of a job.

    Args:
        min_clients: How many clients must have answered for a round to end.
        num_rounds: How many rounds to play.
        start_round: The number of the first.
        key_metric: The metric that says which model is the best; empty for no such search.
        key_metric_mode: ``"max"`` or ``"min"``.
        stop_cond: Stop after a round whose metrics meet it; empty for never.
        patience: Stop after so many rounds that were not better; 0 for never. It goes by the metric
            of `stop_cond`, if there is one, else by `key_metric`.
        train_timeout: How many seconds a round waits for its clients; 0 for ever.
        task_check_period: How often to look for answers, in seconds.
    """

    def __init__(
        self,
        min_clients: int,
        num_rounds: int,
        start_round: int = 0,
        key_metric: str = "",
        key_metric_mode: str = "max",
        stop_cond: str = "",
        patience: int = 0,
        train_timeout: int = 0,
        task_check_period: float = 0.5,
    ) -> None:
        super().__init__(
            min_clients=min_clients,
            num_rounds=num_rounds,
            start_round=start_round,
            wait_time_after_min_received=0,
            persistor_id=AppConstants.DEFAULT_PERSISTOR_ID,
            train_timeout=train_timeout,
            ignore_result_error=True,  # the aggregator's `min_updates` says how many it takes
            allow_empty_global_weights=True,
            task_check_period=task_check_period,
        )
        self.key_metric = key_metric
        self.key_metric_mode = key_metric_mode
        self.stop_cond = stop_cond
        self.patience = patience
        self._searches: dict[str, _Search] = {}
        self._watched = key_metric
        self._stopped: str | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the rounds.

        Args:
            event_type: NVFlare's name of the event.
            fl_ctx: Its context.
        """
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            self._begin(fl_ctx)
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            cleanup_memory()  # what came in is in the sums; the mean needs the room
        elif event_type == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE:
            self._judge(fl_ctx)
        elif event_type == AppEventType.ROUND_DONE and self._stopped is not None:
            self.log_info(fl_ctx, f"round {self._current_round} was the last: {self._stopped}")
            self._num_rounds = self._current_round + 1 - self._start_round

    def _begin(self, fl_ctx: FLContext) -> None:
        extra = global_model.extra_of(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL))
        if self.key_metric:
            self._searches[self.key_metric] = _Search(self.key_metric_mode)
        if self.stop_cond:
            self._watched, mode = direction(self.stop_cond)
            self._searches.setdefault(self._watched, _Search(mode))
        for name, (best, waited) in extra.get("searches", {}).items():
            if name in self._searches:
                self._searches[name].best, self._searches[name].waited = best, waited
        self._stopped = self._reason_to_stop(extra.get("report", {}).get("metrics", {}))
        if self._stopped is not None:
            self.log_info(fl_ctx, f"no round is left: {self._stopped}")
            self._num_rounds = 0

    def _judge(self, fl_ctx: FLContext) -> None:
        """Take note of the metrics of a new global model."""
        extra = global_model.extra_of(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL))
        metrics = extra.get("report", {}).get("metrics", {})
        better = {
            name: search.sees(metrics[name])
            for name, search in self._searches.items()
            if name in metrics
        }
        extra["searches"] = {name: [one.best, one.waited] for name, one in self._searches.items()}
        if metrics and self._watched not in metrics and (self.stop_cond or self.patience):
            expected = f"expected the metric {self._watched!r} from the clients"
            self.log_warning(fl_ctx, f"{expected}, got {sorted(metrics)}")
        self._stopped = self._reason_to_stop(metrics)
        if better.get(self.key_metric):
            self._announce(metrics[self.key_metric], fl_ctx)

    def _announce(self, value: float, fl_ctx: FLContext) -> None:
        """Tell NVFlare's components that the global model is the best so far."""
        self.log_info(fl_ctx, f"the best model so far: {self.key_metric} is {value}")
        told = {
            "source": type(self).__name__,
            "key_metric": {"name": self.key_metric, "mode": self.key_metric_mode},
            "best_round": self._current_round,
            "best_metrics": {self.key_metric: value},
        }
        fl_ctx.set_prop(AppConstants.VALIDATION_RESULT, value, private=True, sticky=False)
        fl_ctx.set_prop(_SELECTION_INFO, told, private=True, sticky=False)
        self.fire_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)

    def _reason_to_stop(self, metrics: dict[str, float]) -> str | None:
        watched, search = self._watched, self._searches.get(self._watched)
        if self.patience and search is not None and search.waited >= self.patience:
            return f"{watched} was not better for {search.waited} rounds"
        if self.stop_cond and watched in metrics:
            _, goal, compare = parse_compare_criteria(self.stop_cond)
            if compare(metrics[watched], goal):
                return f"{self.stop_cond}, it is {metrics[watched]}"
        return None
