"""What a contributor sends for one round.

An `Update` is a value: it is frozen, and whoever holds it may keep it. It is not judged here; an
update that makes no sense can be built, so that the gate can refuse it and say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fedavg_core.model import Params
from fedavg_core.plain import plain_text

__all__ = ["TransferType", "Update", "transfer_named"]


class TransferType(str, Enum):
    """What the arrays of an update are."""

    FULL = "FULL"
    """The contributor's whole model after training."""

    DIFF = "DIFF"
    """The contributor's model after training less the model that it was sent."""

    def __str__(self) -> str:
        """The bare name, the same on every Python version."""
        return self.value


@dataclass(frozen=True, eq=False)
class Update:
    """What a contributor sends for one round.

    Attributes:
        contributor: Who sends it.
        round: The number of the round it answers.
        params: The arrays, borrowed: they are read while the update is added and not kept.
        weight: How much it counts: samples, or local steps. A finite number above zero.
        transfer: Whether the arrays are a model or a difference.
        metrics: Numbers that the contributor reports, such as its training loss.
    """

    contributor: str
    round: int
    params: Params
    weight: float
    transfer: TransferType = TransferType.FULL
    metrics: Mapping[str, Any] = field(default_factory=dict)


def transfer_named(given: object) -> TransferType | None:
    """The transfer type that is meant.

    Args:
        given: One of them, or the text that it is; or anything.

    Returns:
        It; None if this is none.
    """
    text = plain_text(given)
    return next((kind for kind in TransferType if text == kind.value), None)
