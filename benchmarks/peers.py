"""Who averages, in one table: this package's accumulators, its peers, and a copy as the floor.

Everybody is driven in the three steps that a server takes. A `message` is what has arrived when the
server's own work begins: arrays, or, where a system's own functions unpack them, serialised bytes;
making it is the client's and the transport's part, and is not timed. ``add`` takes one message,
``mean`` ends the round and gives what the system gives; then the next round begins. What a system
keeps from one round to the next in real use is kept here as well.

A peer's system is imported when the peer is asked for, and none of them is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

import fedavg_core as fc
from benchmarks.workloads import Params
from fedavg_core.accumulator import Accumulator
from fedavg_core.testing.peers import PEERS

__all__ = ["CONTESTANTS", "Contestant", "Kind", "Server"]

Kind: TypeAlias = Literal["ours", "peer", "floor"]

_AT_HAND = 8  # updates that are added in one call


class Server(Protocol):
    """The server's side of averaging."""

    def message(self, params: Params, weight: int) -> Any:
        """What arrives from one client. The arrays may be borrowed."""

    def add(self, message: Any) -> object:
        """Take one message."""

    def mean(self) -> Any:
        """End the round; the next begins."""

    def arrays(self, mean: Any) -> Mapping[str, Any]:
        """What ``mean`` gave, as arrays by name."""


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        name: What it is called.
        kind: Whose it is.
        package: The distribution that it needs.
        make: Gives a server; ImportError if its system is not installed, or lacks it.
    """

    name: str
    kind: Kind
    package: str
    make: Callable[[], Server]


class _Plain:
    """Messages are arrays and weights, and so is the mean."""

    def message(self, params: Params, weight: int) -> Any:
        return params, weight

    def arrays(self, mean: Any) -> Mapping[str, Any]:
        arrays: Mapping[str, Any] = mean
        return arrays


class _Streaming(_Plain):
    """A `WeightedMean` that takes each update as it comes, and keeps its memory."""

    def __init__(self, accumulator: Accumulator, **options: Any) -> None:
        self._mean = fc.WeightedMean(accumulator=accumulator, **options)

    def add(self, message: Any) -> None:
        self._mean.add(*message)

    def mean(self) -> Any:
        mean = self._mean.mean()
        self._mean.reset()
        return mean


class _AtHand(_Streaming):
    """The same, given the updates a few at a time."""

    def __init__(self, accumulator: Accumulator) -> None:
        super().__init__(accumulator)
        self._waiting: list[Any] = []

    def add(self, message: Any) -> None:
        self._waiting.append(message)
        if len(self._waiting) == _AT_HAND:
            self._flush()

    def _flush(self) -> None:
        self._mean.add_many(self._waiting)
        self._waiting = []

    def mean(self) -> Any:
        if self._waiting:
            self._flush()
        return super().mean()


class _InRound(_Plain):
    """A `Round` for each round, over a `WeightedMean` that is kept."""

    def __init__(self, limits: fc.Limits) -> None:
        self._limits = limits
        self._mean = fc.WeightedMean()
        self._model: Params | None = None
        self._round: fc.Round | None = None
        self._senders = 0

    def message(self, params: Params, weight: int) -> Any:
        if self._model is None:
            self._model = {key: np.zeros_like(array) for key, array in params.items()}
        self._senders += 1
        return fc.Update(
            f"site-{self._senders}", 0, params, weight, metrics={"loss": 1 / self._senders}
        )

    def add(self, message: Any) -> None:
        if self._round is None:
            self._round = fc.Round(self._model, 0, limits=self._limits, accumulator=self._mean)
        receipt = self._round.offer(message)
        if not receipt.accepted:
            raise ValueError(receipt.detail)

    def mean(self) -> Any:
        if self._round is None:
            raise ValueError("expected a message before the mean")
        outcome, self._round = self._round.close(), None
        return outcome.model


class _Peer(_Plain):
    """A peer that the conformance kit knows; it begins anew after each mean."""

    def __init__(self, name: str) -> None:
        self._aggregator = PEERS[name]()()

    def add(self, message: Any) -> None:
        self._aggregator.add(*message)

    def mean(self) -> Any:
        return self._aggregator.mean()


class _Replies(_Plain):
    """All replies of a round are kept, and averaged at its end."""

    def __init__(self, average: Callable[[list[Any]], Any]) -> None:
        self._average = average
        self._names: list[str] = []
        self._replies: list[Any] = []

    def add(self, message: Any) -> None:
        self._replies.append(message)

    def mean(self) -> Any:
        mean = self._average(self._replies)
        self._replies = []
        return mean

    def arrays(self, mean: Any) -> Mapping[str, Any]:
        return dict(zip(self._names, mean, strict=True))


class _FlowerAggregate(_Replies):
    """Flower's ``aggregate`` over lists of arrays; what unpacks them before it is not timed."""

    def __init__(self) -> None:
        super().__init__(_imported("flwr.server.strategy.aggregate", "aggregate"))

    def message(self, params: Params, weight: int) -> Any:
        self._names = list(params)
        return list(params.values()), weight


class _FlowerInPlace(_Replies):
    """Flower's ``aggregate_inplace``, which unpacks the replies itself."""

    def __init__(self) -> None:
        super().__init__(_imported("flwr.server.strategy.aggregate", "aggregate_inplace"))
        self._reply = _imported("flwr.common", "FitRes")
        self._status = _imported("flwr.common", "Status")(
            _imported("flwr.common", "Code").OK, "Success"
        )
        self._pack = _imported("flwr.common", "ndarrays_to_parameters")

    def message(self, params: Params, weight: int) -> Any:
        self._names = list(params)
        return None, self._reply(self._status, self._pack(list(params.values())), weight, {})


class _FlowerRecords(_Replies):
    """Flower's message API: ``aggregate_arrayrecords``, as its FedAvg strategy calls it."""

    def __init__(self) -> None:
        average = _imported("flwr.serverapp.strategy.strategy_utils", "aggregate_arrayrecords")
        super().__init__(lambda replies: average(replies, "num-examples"))
        names = ("Array", "ArrayRecord", "MetricRecord", "RecordDict")
        self._array, self._arrays, self._metrics, self._record = (
            _imported("flwr.app", name) for name in names
        )

    def message(self, params: Params, weight: int) -> Any:
        arrays = self._arrays({key: self._array(value) for key, value in params.items()})
        metrics = self._metrics({"num-examples": weight})
        return self._record({"arrays": arrays, "metrics": metrics})

    def arrays(self, mean: Any) -> Mapping[str, Any]:
        return {key: array.numpy() for key, array in mean.items()}


class _NumpyAverage(_Replies):
    """``np.average`` over the clients, one parameter after the other."""

    def __init__(self) -> None:
        super().__init__(_numpy_average)

    def arrays(self, mean: Any) -> Mapping[str, Any]:
        arrays: Mapping[str, Any] = mean
        return arrays


def _numpy_average(replies: list[Any]) -> Params:
    weights = [weight for _, weight in replies]
    models = [params for params, _ in replies]
    return {
        key: np.average([model[key] for model in models], axis=0, weights=weights).astype(
            array.dtype
        )
        for key, array in models[0].items()
    }


class _Copy(_Plain):
    """Copies each update into the same memory, on one thread."""

    def __init__(self) -> None:
        self._memory: Params = {}

    def add(self, message: Any) -> None:
        params, _ = message
        if not self._memory:
            self._memory = {key: np.empty_like(array) for key, array in params.items()}
        for key, array in params.items():
            np.copyto(self._memory[key], array)

    def mean(self) -> Any:
        return self._memory


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{module} has no {name}") from error


def _own(name: str, make: Callable[[], Server]) -> Contestant:
    return Contestant(name, "ours", "fedavg-core", make)


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        _own("exact", partial(_Streaming, "exact")),
        _own("exact, 1 thread", partial(_Streaming, "exact", threads=1)),
        _own("exact, add_many of 8", partial(_AtHand, "exact")),
        _own("float64", partial(_Streaming, "float64")),
        _own("float64, add_many of 8", partial(_AtHand, "float64")),
        _own("float32", partial(_Streaming, "float32")),
        _own("float32, add_many of 8", partial(_AtHand, "float32")),
        _own("Round", partial(_InRound, fc.Limits())),
        _own("Round, norm limited", partial(_InRound, fc.Limits(max_norm=1e30))),
        Contestant("NVFlare sum", "peer", "nvflare", partial(_Peer, "nvflare-helper")),
        Contestant("NVFlare aggregator", "peer", "nvflare", partial(_Peer, "nvflare")),
        Contestant("Flower aggregate", "peer", "flwr", _FlowerAggregate),
        Contestant("Flower in place", "peer", "flwr", _FlowerInPlace),
        Contestant("Flower records", "peer", "flwr", _FlowerRecords),
        Contestant("np.average", "peer", "numpy", _NumpyAverage),
        Contestant("copy", "floor", "numpy", _Copy),
    )
}
"""By name. Ours first, then NVFlare's (its `WeightedAggregationHelper`, and end to end its
`InTimeAccumulateWeightedAggregator` through Shareable, DXO and FLContext), Flower's three ways,
NumPy's, and the floor."""
