"""What a round answers to one update.

A receipt is a value: it is frozen, and holds nothing that a round goes on working with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedavg_core.digest import is_digest
from fedavg_core.errors import Reason, quoted
from fedavg_core.gate import is_name

__all__ = ["Receipt"]


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
        digest: In a round with an audit, the digest (see `fedavg_core.digest`) of the parameters
            that were added; for a refused update that of all it brought, or None where those are
            no arrays of numbers.
    """

    contributor: str
    round: int
    accepted: bool
    reason: Reason | None = None
    detail: str = ""
    weight: int | float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    skipped_metrics: tuple[str, ...] = ()
    digest: str | None = None

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
            "digest": self.digest,
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
            digest=entry.get("digest"),
        )
        if not all(map(is_name, [receipt.contributor, *receipt.metrics])):
            raise ValueError("a receipt whose contributor or metric has no name")
        if not isinstance(receipt.detail, str) or isinstance(skipped, str):
            raise TypeError("a receipt whose text is none")
        if not all(isinstance(name, str) for name in skipped):
            raise TypeError("a receipt whose text is none")
        if receipt.digest is not None and not is_digest(receipt.digest):
            raise ValueError(f"a receipt with the digest {quoted(receipt.digest)}")
        if receipt.accepted is True and receipt.reason is None:
            if not 0 < _number(receipt.weight) < math.inf:
                raise ValueError(f"a receipt for the weight {quoted(receipt.weight)}")
        elif receipt.accepted is not False or not receipt.reason or receipt.weight is not None:
            raise ValueError("a receipt that neither accepts nor refuses")
        return receipt


def _number(value: object) -> float:
    """A finite number, as float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {quoted(value)}")
    return float(value)
