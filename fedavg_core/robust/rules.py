"""Robust means: a few updates, however bad, cannot carry off the model.

| rule | what it averages | weights |
|---|---|---|
| `CoordinateMedian` | of each coordinate the middle value, or the two | ignored |
| `TrimmedMean` | of each coordinate all but the largest and the smallest | ignored |
| `Krum` | the update that has the nearest neighbours | ignored |
| `MultiKrum` | so many of those | ignored |
| `GeometricMedian` | all, the farther from the middle the less | used |
| `ClippedMean` | all, each cut down to a norm | used |

A weight is its contributor's own claim. Where it is ignored, one that claims a billion samples
counts as one; where it is used, as its paper has it, `Limits(max_weight=…)` bounds it.

Coordinate-wise median and trimmed mean: D. Yin, Y. Chen, K. Ramchandran and P. Bartlett,
"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018. Krum and
Multi-Krum: P. Blanchard, E. M. El Mhamdi, R. Guerraoui and J. Stainer, "Machine Learning with
Adversaries: Byzantine Tolerant Gradient Descent", 2017. Geometric median: K. Pillutla, S. M. Kakade
and Z. Harchaoui, "Robust Aggregation for Federated Learning", 2022.

Distances are the same in whatever order the updates come (see `norm`); where two updates of Krum
have the same score, the digest of what they hold decides.

All but `ClippedMean` keep a copy of every update (see `kept_updates`). Krum takes time that grows
with the square of their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.arguments import real_number, whole_number
from fedavg_core.digest import digest, fingerprints
from fedavg_core.model import ArraySpec, ModelSpec, Params
from fedavg_core.norm import scale_of, sum_of_squares
from fedavg_core.robust.clipped_mean import ClippedMean
from fedavg_core.robust.kept_updates import CoordinateWise, WholeVector, of_the_sorted
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.settings import kind_named
from fedavg_core.weight import Weight

__all__ = [
    "ROBUST_MEANS",
    "ClippedMean",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "TrimmedMean",
    "robust_mean",
]

Array: TypeAlias = npt.NDArray[Any]

_SMALLEST_NORMAL = 2.0**-1022


class CoordinateMedian(CoordinateWise):
    """The coordinate-wise median (Yin et al. 2018).

    Each coordinate is the middle one of its values or, of an even number of them, the exact mean of
    the middle two. Weights do not count.

    Args:
        spec: See `RobustMean`.
    """

    name = "median"

    def rows(self, count: int) -> slice:
        """See `CoordinateWise.rows`."""
        return _middle(count)


class TrimmedMean(CoordinateWise):
    """The coordinate-wise trimmed mean (Yin et al. 2018).

    Each coordinate is the exact mean of what is left of its values without the largest and the
    smallest. Weights do not count.

    Args:
        trim: The part of the values to leave out at either end, from 0 to below 1/2, rounded down
            to a whole number of them. It is taken for the decimal number that it is written as.
        spec: See `RobustMean`.

    Raises:
        UsageError: The part is out of range.
    """

    name = "trimmed-mean"
    options = ("trim",)

    def __init__(self, trim: float = 0.1, spec: ModelSpec | None = None) -> None:
        self.trim = real_number(
            "trim", trim, "a number from 0 to below 0.5", lambda part: 0 <= part < 0.5
        )
        super().__init__(spec)

    def rows(self, count: int) -> slice:
        """See `CoordinateWise.rows`."""
        left_out = math.floor(Fraction(repr(self.trim)) * count)
        return slice(left_out, count - left_out)


class Krum(WholeVector):
    """Krum (Blanchard et al. 2017): the one update that has the nearest neighbours.

    With n updates, of which f may be faulty, the score of one is the sum of its squared distances
    from the n − f − 2 nearest others. That of the least score is the result. It takes at least
    2f + 3 updates. Weights do not count.

    Args:
        faulty: How many may be faulty, f.
        spec: See `RobustMean`.

    Raises:
        UsageError: The number has no meaning.
    """

    name = "krum"
    options: ClassVar[tuple[str, ...]] = ("faulty",)
    ignores_weights = True
    keep = 1

    def __init__(self, faulty: int = 1, spec: ModelSpec | None = None) -> None:
        self.faulty = whole_number("faulty", faulty, 0)
        super().__init__(spec)

    @property
    def least(self) -> int:
        """See `RobustMean.least`."""
        return max(2 * self.faulty + 3, self.keep)

    def weights(self) -> list[Weight]:
        """See `WholeVector.weights`."""
        models = [update.params for update in self.updates]
        scale = scale_of(models)
        squares = [[0.0] * len(models) for _ in models]
        for i, one in enumerate(models):
            for j in range(i):
                squares[i][j] = squares[j][i] = sum_of_squares(one, models[j], scale)
        near = len(models) - self.faulty - 2
        # The smallest of a row is the update's distance from itself.
        scores = [math.fsum(sorted(row)[1 : near + 1]) for row in squares]
        ranks = sorted(
            (score, digest(fingerprints(model)), index)
            for index, (score, model) in enumerate(zip(scores, models, strict=True))
        )
        chosen = {index for _, _, index in ranks[: self.keep]}
        return [int(index in chosen) for index in range(len(models))]


class MultiKrum(Krum):
    """Multi-Krum (Blanchard et al. 2017): the exact mean of the best updates by Krum's score.

    All that are kept count the same, whatever their weights.

    Args:
        faulty: How many may be faulty, f.
        keep: How many of the best to average.
        spec: See `RobustMean`.

    Raises:
        UsageError: A number has no meaning.
    """

    name = "multi-krum"
    options = ("faulty", "keep")

    def __init__(self, faulty: int = 1, keep: int = 2, spec: ModelSpec | None = None) -> None:
        self.keep = whole_number("keep", keep, 1)
        super().__init__(faulty, spec)


class GeometricMedian(WholeVector):
    """The geometric median (Pillutla et al. 2022), by the smoothed Weiszfeld algorithm.

    It begins with the coordinate-wise median z, which is near already, however far off a few
    updates are. In each iteration an update at the distance d from z gets its weight divided by d,
    or by the smoothing ν where d is smaller, and z becomes the mean with these weights: the exact
    one in the last iteration, and before that one in float64, added up in an order that the
    updates' digests fix.

    Args:
        iterations: How many iterations to make; it stops before where nothing changes any more.
        smoothing: ν, above 0 and up to 1.
        spec: See `RobustMean`.

    Raises:
        UsageError: A number has no meaning.
    """

    name = "geometric-median"
    options = ("iterations", "smoothing")

    def __init__(
        self, iterations: int = 10, smoothing: float = 1e-6, spec: ModelSpec | None = None
    ) -> None:
        self.iterations = whole_number("iterations", iterations, 1)
        self.smoothing = real_number(
            "smoothing", smoothing, "a number above 0 and up to 1", lambda part: 0 < part <= 1
        )
        super().__init__(spec)

    def weights(self) -> list[Weight]:
        """See `WholeVector.weights`."""
        models = [update.params for update in self.updates]
        scale = scale_of(models)
        total = self.total_weight  # a sum over all updates
        shares = [float(update.weight / total) for update in self.updates]
        least = max(self.smoothing * scale, _SMALLEST_NORMAL)
        targets = {
            key: ArraySpec(array.shape, np.dtype(np.float64)) for key, array in models[0].items()
        }
        center = self._means(of_the_sorted(_middle), targets)
        order = sorted(
            range(len(models)), key=lambda i: (digest(fingerprints(models[i])), shares[i])
        )
        weights: list[float] = []
        for _ in range(self.iterations):
            if weights:
                center = _plain_mean([models[i] for i in order], [weights[i] for i in order])
            far = [math.sqrt(sum_of_squares(model, center, scale)) for model in models]
            before, weights = (
                weights,
                [share / max(least, distance) for share, distance in zip(shares, far, strict=True)],
            )
            if weights == before:
                break
        return [Fraction(weight) for weight in weights]


ROBUST_MEANS: dict[str, type[RobustMean]] = {
    kind.name: kind
    for kind in (CoordinateMedian, TrimmedMean, Krum, MultiKrum, GeometricMedian, ClippedMean)
}
"""From the name of each rule to its class."""


def robust_mean(name: str, spec: ModelSpec | None = None, **options: Any) -> RobustMean:
    """A robust mean by its name.

    Args:
        name: ``"median"``, ``"trimmed-mean"``, ``"krum"``, ``"multi-krum"``,
            ``"geometric-median"`` or ``"clipped-mean"``.
        spec: See `RobustMean`.
        options: Those of the rule, where they shall not have the default value.

    Returns:
        A new one; ``robust_mean(**mean.settings())`` is another like it.

    Raises:
        UsageError: There is none of this name, or it has no such option, or the value has no
            meaning.
    """
    kind = kind_named("robust mean", ROBUST_MEANS, name, options, lambda kind: kind.options)
    return kind(spec=spec, **options)


def _middle(count: int) -> slice:
    return slice((count - 1) // 2, count // 2 + 1)


def _plain_mean(models: Sequence[Params], weights: Sequence[float]) -> dict[str, Array]:
    """The weighted mean in float64, added up in the order that is given."""
    total = math.fsum(weights)
    mean = {key: np.zeros(array.shape) for key, array in models[0].items()}
    for model, weight in zip(models, weights, strict=True):
        for key, array in model.items():
            with np.errstate(all="ignore"):
                mean[key] += array.astype(np.float64) * (weight / total)
    return mean
