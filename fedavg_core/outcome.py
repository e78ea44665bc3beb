"""What a round ends with.

An outcome is a value: it is frozen, and holds nothing that a round goes on working with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.audit import Audit
from fedavg_core.errors import UsageError, quoted
from fedavg_core.plain import plain_text
from fedavg_core.receipt import Receipt

__all__ = ["Failure", "Outcome", "Receipt", "evaluation_of", "mean_metrics", "total_weight"]


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
        problem: One line of why the model kept its values; None if it is the mean, or the server
            optimizer's step.
        skipped_metrics: The names of metrics that were left out, each once, sorted.
        evaluation: What the new model was found to be worth, by whoever evaluates it.
        failed: The clients that gave nothing to judge, as whoever ran them says.
        not_needed: Those that were asked and not waited for, in the order in which they were asked.
        audit: What it takes to see later that the model is the mean of the updates (see
            `fedavg_core.audit`), if the round was asked for it.
        optimizer_state: What the server optimizer needs to go on; empty without one. Its arrays
            are to be read only.
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
    not_needed: tuple[str, ...] = ()
    audit: Audit | None = field(default=None, repr=False)
    optimizer_state: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)


def evaluation_of(found: object, whose: str = "evaluate") -> dict[str, float]:
    """The numbers that an evaluation of a model gave.

    Args:
        found: What the function returned.
        whose: What a message is to call the function.

    Returns:
        Names and numbers, as Python's own. What counts as a number is whatever gives a float, such
        as an array or a tensor of one, but no truth value, text or complex number.

    Raises:
        UsageError: It is no mapping from the one to the other.
    """
    try:
        if isinstance(found, Mapping):
            return {_name(name): _number(value) for name, value in found.items()}
    except Exception:  # whatever a foreign number or mapping raises
        pass
    raise UsageError(f"{whose}: expected a mapping from names to numbers, got {quoted(found)}")


def _name(name: object) -> str:
    text = plain_text(name)
    if text is None:
        raise TypeError
    return text


def _number(value: Any) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(
        value, (bool, np.bool_, str, bytes, bytearray, np.complexfloating, np.timedelta64)
    ):
        raise TypeError
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
