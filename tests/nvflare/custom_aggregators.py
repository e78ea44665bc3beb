"""Aggregators such as a user writes; a job ships this file to its server."""

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator


class Maximum(Aggregator):
    """An ``Aggregator``: the largest value of each element, with an argument of its own."""

    def __init__(self, bonus=0.0):
        super().__init__()
        self.bonus = bonus
        self._received = []

    def accept(self, shareable, fl_ctx):
        self._received.append(from_shareable(shareable).data)
        return True

    def aggregate(self, fl_ctx):
        keys = self._received[0]
        largest = {key: np.max([one[key] for one in self._received], axis=0) for key in keys}
        return DXO(
            DataKind.WEIGHTS, data={key: value + self.bonus for key, value in largest.items()}
        ).to_shareable()

    def reset(self, fl_ctx):
        self._received = []


class WithoutSecond(ModelAggregator):
    """A ``ModelAggregator``: the sum of all but ``site-2``, which it refuses by raising."""

    def __init__(self):
        super().__init__()
        self._received = {}

    def accept_model(self, model: FLModel):
        name = model.meta["client_name"]
        if name == "site-2":
            raise ValueError("site-2 is not welcome\nat all")
        self._received[name] = model.params

    def aggregate_model(self):
        if not self._received:
            return None
        received = self._received.values()
        keys = next(iter(received))
        return FLModel(params={key: sum(one[key] for one in received) for key in keys})

    def reset_stats(self):
        self._received = {}
