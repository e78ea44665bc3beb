"""What a round answers: a receipt for each update, and an outcome at the end.

These are values. They are frozen, and hold nothing that a round goes on working with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy.typing as npt

from fedavg_core.errors import Reason, quoted
from fedavg_core.gate import is_name

__all__ = ["Failure", "Outcome", "Receipt", "mean_metrics", "total_weight"]


@dataclass(frozen=True)
class Receipt:
    """What a round answers to one update.

    Attributes:
        contributor: Who sent it; where that is no name, what can be shown of it.
        round: The number of the round that it was offered to.
        accepted: Whether it was added.
        reason: Why not, if it was not.
        detail: One line of printable text: for a refusal who, when, which key, what was expected
            and what came; for an accepted update what was left out of it, or nothing.
        weight: The weight that it was added with, exactly; None if it was refused.
        metrics: The metrics that count, as they came; empty if it was refused.
        skipped_metrics: The names of those that are no finite numbers, escaped and cut.
    """

    contributor: str
    round: int
    accepted: bool
    reason: Reason | None = None
    detail: str = ""
    weight: int | float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    skipped_metrics: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The receipt as JSON can hold it; the round's number is left to whoever keeps it.

        Returns:
            A dictionary of its fields.
        """
        return {
            "contributor": self.contributor,
            "accepted": self.accepted,
            "reason": None if self.reason is None else str(self.reason),
            "detail": self.detail,
            "weight": self.weight,
            "metrics": dict(self.metrics),
            "skipped_metrics": list(self.skipped_metrics),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], round: int) -> Receipt:
        """The receipt that `to_json` was asked of.

        Args:
            entry: What it gave.
            round: The round's number.

        Returns:
            An equal receipt.

        Raises:
            AttributeError, KeyError, OverflowError, TypeError, ValueError: The entry is no receipt.
        """
        reason, skipped = entry["reason"], entry["skipped_metrics"]
        receipt = cls(
            contributor=entry["contributor"],
            round=round,
            accepted=entry["accepted"],
            reason=None if reason is None else Reason(reason),
            detail=entry["detail"],
            weight=entry["weight"],
            metrics={name: _number(value) for name, value in entry["metrics"].items()},
            skipped_metrics=tuple(skipped),
        )
        if not all(map(is_name, [receipt.contributor, *receipt.metrics])):
            raise ValueError("a receipt whose contributor or metric has no name")
        if not isinstance(receipt.detail, str) or isinstance(skipped, str):
            raise TypeError("a receipt whose text is none")
        if not all(isinstance(name, str) for name in skipped):
            raise TypeError("a receipt whose text is none")
        if receipt.accepted is True and receipt.reason is None:
            if not 0 < _number(receipt.weight) < math.inf:
                raise ValueError(f"a receipt for the weight {quoted(receipt.weight)}")
        elif receipt.accepted is not False or not receipt.reason or receipt.weight is not None:
            raise ValueError("a receipt that neither accepts nor refuses")
        return receipt


@dataclass(frozen=True)
class Failure:
    """A client of whom a round has no update to judge.

    Attributes:
        contributor: Its name.
        round: The round's number.
        problem: One line of printable text.
    """

    contributor: str
    round: int
    problem: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round ends with.

    Attributes:
        round: The round's number.
        model: The new global model; its arrays are owned by whoever holds the outcome.
        metrics: The weighted means of the contributors' metrics, sorted by name.
        accepted: The receipts of the updates in the mean, in the order of arrival.
        refused: The receipts of all others, in the order of arrival.
        total_weight: The sum of the accepted weights, correctly rounded.
        enough: Whether at least `min_updates` were accepted.
        problem: One line of why the model kept its values; None if it is the mean.
        skipped_metrics: The names of metrics that were left out, each once, sorted.
        evaluation: What the new model was found to be worth, by whoever evaluates it.
        failed: The clients that gave nothing to judge, as whoever ran them says.
    """

    round: int
    model: dict[str, npt.NDArray[Any]] = field(repr=False)
    metrics: dict[str, float]
    accepted: tuple[Receipt, ...]
    refused: tuple[Receipt, ...]
    total_weight: float
    enough: bool
    problem: str | None = None
    skipped_metrics: tuple[str, ...] = ()
    evaluation: dict[str, float] = field(default_factory=dict)
    failed: tuple[Failure, ...] = ()


def _number(value: object) -> float:
    """A finite number, as float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {quoted(value)}")
    return float(value)


def mean_metrics(accepted: Iterable[Receipt]) -> dict[str, float]:
    """The weighted mean of each metric over the contributors that sent it.

    Args:
        accepted: Receipts of accepted updates, in any order: it does not show in the bits.

    Returns:
        The exact means, each rounded once to float64; sorted by name.
    """
    sums: dict[str, tuple[Fraction, Fraction]] = {}
    for receipt in accepted:
        weight = Fraction(receipt.weight or 0)
        for name, value in receipt.metrics.items():
            total, weights = sums.get(name, (Fraction(0), Fraction(0)))
            sums[name] = (total + weight * Fraction(value), weights + weight)
    return {name: float(sums[name][0] / sums[name][1]) for name in sorted(sums)}


def total_weight(accepted: Iterable[Receipt]) -> float:
    """The sum of the weights of accepted updates.

    Args:
        accepted: Their receipts, in any order: it does not show in the bits.

    Returns:
        The exact sum rounded once to float64; infinity where it is larger than float64 can hold.
    """
    try:
        return float(sum(Fraction(receipt.weight or 0) for receipt in accepted))
    except OverflowError:
        return math.inf
