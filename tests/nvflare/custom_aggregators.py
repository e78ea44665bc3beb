"""Components such as a user writes; a job ships this file to its server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.widgets.streaming import AnalyticsReceiver


class Maximum(Aggregator):  # type: ignore[misc]
    """An ``Aggregator``: the largest value of each element, with an argument of its own."""

    def __init__(self, bonus: Any = 0.0) -> None:
        super().__init__()
        self.bonus = bonus
        self._received: list[Any] = []

    def accept(self, shareable: Any, fl_ctx: Any) -> Any:
        self._received.append(from_shareable(shareable).data)
        return True

    def aggregate(self, fl_ctx: Any) -> Any:
        keys = self._received[0]
        largest = {key: np.max([one[key] for one in self._received], axis=0) for key in keys}
        return DXO(
            DataKind.WEIGHTS, data={key: value + self.bonus for key, value in largest.items()}
        ).to_shareable()

    def reset(self, fl_ctx: Any) -> None:
        self._received = []


class WithoutSecond(ModelAggregator):  # type: ignore[misc]
    """A ``ModelAggregator``: the sum of all but ``site-2``, which it refuses by raising."""

    def __init__(self) -> None:
        super().__init__()
        self._received: dict[str, Any] = {}

    def accept_model(self, model: FLModel) -> None:
        name = model.meta["client_name"]
        if name == "site-2":
            raise ValueError("site-2 is not welcome\nat all")
        self._received[name] = model.params

    def aggregate_model(self) -> Any:
        if not self._received:
            return None
        received = self._received.values()
        keys = next(iter(received))
        return FLModel(params={key: sum(one[key] for one in received) for key in keys})

    def reset_stats(self) -> None:
        self._received = {}


class Tracker(AnalyticsReceiver):  # type: ignore[misc]
    """An experiment tracker: writes down what the clients tell it, and the rounds' statistics."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: list[Any] = []

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == "_after_aggregation":
            self._heard.append(fl_ctx.get_prop("_aggregation_stats"))

    def initialize(self, fl_ctx: Any) -> None:
        pass

    def save(self, fl_ctx: Any, shareable: Any, record_origin: str) -> None:
        told = from_shareable(shareable).data
        self._heard.append([record_origin, told["track_key"], told["track_value"]])

    def finalize(self, fl_ctx: Any) -> None:
        root = fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id())
        (Path(root) / "tracked.json").write_text(json.dumps(self._heard))
