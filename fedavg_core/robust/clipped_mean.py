"""The mean of differences that are cut down to a norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.accumulator import WeightedMean
from fedavg_core.admission import check_finite
from fedavg_core.arguments import is_whole_number, real_number
from fedavg_core.errors import RefusedUpdate, quoted
from fedavg_core.model import ModelSpec, Params
from fedavg_core.norm import scale_of, sum_of_squares
from fedavg_core.robust.robust_mean import RobustMean, State

__all__ = ["ClippedMean"]

Array: TypeAlias = npt.NDArray[Any]


class ClippedMean(RobustMean):
    """The weighted mean of differences that are cut down to a norm.

    A difference whose L2 norm, over all its parameters together, is larger than the limit is
    multiplied by limit / norm (R. Pascanu, T. Mikolov and Y. Bengio, "On the Difficulty of Training
    Recurrent Neural Networks", 2013); then all are averaged with their weights, exactly. The
    factor has the precision of a float64. A cut difference counts with its whole weight in the
    denominator.

    It keeps no updates: its memory is that of a `WeightedMean`.

    Args:
        limit: The largest norm.
        spec: See `RobustMean`.

    Raises:
        UsageError: The limit is no finite number above 0.
    """

    name = "clipped-mean"
    options = ("limit",)

    def __init__(self, limit: float = 1.0, spec: ModelSpec | None = None) -> None:
        self.limit = real_number("limit", limit, "a finite number above 0", lambda norm: norm > 0)
        super().__init__(spec)
        self._mean = WeightedMean(spec)
        # How many updates that is for so many terms of the mean, before a change and after it.
        self._counts = {0: 0}

    @property
    def needs_differences(self) -> bool:
        """True: the norm of a whole model says nothing of an update."""
        return True

    @property
    def count(self) -> int:
        """See `RobustMean.count`."""
        return self._counts[self._mean.count]

    @property
    def keys(self) -> tuple[str, ...]:
        """See `RobustMean.keys`."""
        return self._mean.keys

    @property
    def total_weight(self) -> Fraction:
        """See `RobustMean.total_weight`."""
        return self._mean.total_weight

    @property
    def nbytes(self) -> int:
        """0: no updates are kept."""
        return 0

    def add_many(self, updates: Iterable[tuple[Params, float]]) -> None:
        """See `RobustMean.add_many`."""
        admitted = self._mean._admitted(updates)
        terms: list[tuple[Params, Any]] = []
        for number, (params, exact) in enumerate(admitted):
            with RefusedUpdate.numbered(number, admitted):
                check_finite(params)
            factor = self._factor(params)
            if factor == 1:
                terms.append((params, exact))
            else:
                # What was cut off counts as zeros, so that the weight remains whole.
                nothing = {
                    key: np.broadcast_to(np.zeros((), a.dtype), a.shape)
                    for key, a in params.items()
                }
                terms += [(params, exact * factor), (nothing, exact * (1 - factor))]
        self._expect(len(terms), len(admitted))
        self._mean.add_many(terms)

    def _expect(self, terms: int, updates: int) -> None:
        """Say what the next change adds: the mean's own count then tells whether it was made."""
        now, count = self._mean.count, self.count
        self._counts = {now: count, now + terms: count + updates}

    def _factor(self, params: Params) -> Fraction:
        """What a difference is multiplied by: limit / norm, of the precision of a float64."""
        scale = scale_of([params])
        norm = math.sqrt(sum_of_squares(params, {}, scale))
        if norm == 0:
            return Fraction(1)
        # The quotient itself may be too small for a float64.
        fraction, exponent = math.frexp(self.limit)
        factor = Fraction(fraction / norm) * Fraction(2) ** exponent * Fraction(scale)
        return min(factor, Fraction(1))

    def merge(self, other: ClippedMean) -> None:
        """See `RobustMean.merge`."""
        self._check_alike(other)
        self._expect(other._mean.count, other.count)
        self._mean.merge(other._mean)

    def mean(self, base: Params | None = None) -> dict[str, Array]:
        """See `RobustMean.mean`."""
        return self._mean.mean(base)

    def digest(self) -> str:
        """See `RobustMean.digest`."""
        return self._mean.digest()

    def state(self) -> State:
        """See `RobustMean.state`."""
        mean, arrays = self._mean.state()
        return {"accumulator": self.settings(), "count": self.count, "mean": mean}, arrays

    def take_up(self, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """See `RobustMean.take_up`."""
        count = meta["count"]
        # Each update is one term of the mean, or two.
        if not is_whole_number(count) or not count <= meta["mean"]["count"] <= 2 * count:
            raise ValueError(f"the count {quoted(count)}")
        mean = WeightedMean.from_state(meta["mean"], arrays, self._given)
        self._counts = {0: 0, mean.count: count}
        self._mean = mean

    def reset(self) -> None:
        """See `RobustMean.reset`."""
        self._counts = {self._mean.count: self.count, 0: 0}
        self._mean.reset()
