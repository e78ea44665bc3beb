"""The aggregators of other systems, in the shape that the conformance kit asks for.

This is the one place in the package that names other federated systems. Each is imported when its
aggregator is asked for, and not before; none of them is needed for anything else.

A system is judged by what its own code does. These classes only carry arguments in and results out,
and check nothing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["PEERS"]


def _nvflare_in_time() -> Callable[[], Any]:
    """NVFlare's aggregator for ScatterAndGather, driven as its controller drives it."""
    dxo = importlib.import_module("nvflare.apis.dxo")
    events = importlib.import_module("nvflare.apis.event_type").EventType
    reserved = importlib.import_module("nvflare.apis.fl_constant").ReservedKey
    context = importlib.import_module("nvflare.apis.fl_context").FLContext
    constants = importlib.import_module("nvflare.app_common.app_constant").AppConstants
    aggregators = importlib.import_module(
        "nvflare.app_common.aggregators.intime_accumulate_model_aggregator"
    )

    class InTime:
        def __init__(self) -> None:
            self.context = context()
            self.context.set_prop(constants.CURRENT_ROUND, 0, private=True, sticky=False)
            self.aggregator = aggregators.InTimeAccumulateWeightedAggregator(
                expected_data_kind=dxo.DataKind.WEIGHTS
            )
            self.aggregator.handle_event(events.START_RUN, self.context)
            self.contributors = 0

        def add(self, params: Any, weight: Any) -> None:
            self.contributors += 1
            meta = {dxo.MetaKey.NUM_STEPS_CURRENT_ROUND: weight}
            update = dxo.DXO(data_kind=dxo.DataKind.WEIGHTS, data=params, meta=meta).to_shareable()
            update.set_peer_props({reserved.IDENTITY_NAME: f"site-{self.contributors}"})
            update.add_cookie(constants.CONTRIBUTION_ROUND, 0)
            if not self.aggregator.accept(update, self.context):
                raise ValueError("not accepted")

        def mean(self) -> Any:
            return dxo.from_shareable(self.aggregator.aggregate(self.context)).data

    return InTime


def _nvflare_sum() -> Callable[[], Any]:
    """The weighted sum inside NVFlare's aggregators, by itself."""
    module = importlib.import_module("nvflare.app_common.aggregators.weighted_aggregation_helper")

    class Sum:
        def __init__(self) -> None:
            self.sum = module.WeightedAggregationHelper()

        def add(self, params: Any, weight: Any) -> None:
            self.sum.add(params, weight, "site", 0)

        def mean(self) -> Any:
            return self.sum.get_result()

    return Sum


def _flower() -> Callable[[], Any]:
    """Flower's average of all replies of a round, which are lists of arrays."""
    average = importlib.import_module("flwr.server.strategy.aggregate").aggregate

    class Replies:
        def __init__(self) -> None:
            self.names: list[str] = []
            self.replies: list[tuple[list[Any], Any]] = []

        def add(self, params: Any, weight: Any) -> None:
            self.names = self.names or list(params)
            # Flower unpacks each reply from its message into arrays of its own.
            self.replies.append((copy.deepcopy(list(params.values())), weight))

        def mean(self) -> Any:
            return dict(zip(self.names, average(self.replies), strict=True))

    return Replies


PEERS: dict[str, Callable[[], Callable[[], Any]]] = {
    "nvflare": _nvflare_in_time,
    "nvflare-helper": _nvflare_sum,
    "flower": _flower,
}
"""From a name to a function that imports the system and gives a maker of aggregators."""
