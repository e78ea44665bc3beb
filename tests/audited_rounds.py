"""Rounds of three contributors, and their audits, for the tests of both audit and replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.audit import Audit
from fedavg_core.model import Params
from fedavg_core.round import Round
from fedavg_core.update import TransferType, Update
from tests.bad_updates import ROUND, model

Models = dict[str, dict[str, npt.NDArray[Any]]]


def three(seed: int = 0) -> Models:
    """What three contributors send, for `model`."""
    rng = np.random.default_rng(seed)
    return {
        f"site-{number}": {
            key: (value.astype(np.float64) + rng.normal(size=value.shape)).astype(value.dtype)
            for key, value in model().items()
        }
        for number in (1, 2, 3)
    }


def audited(
    updates: Models,
    base: Params | None,
    transfer: TransferType = TransferType.FULL,
    **settings: Any,
) -> Audit:
    """The audit of a round of some updates, each heavier than the last."""
    round = Round(base, ROUND, audit=True, **settings)
    for number, (name, params) in enumerate(updates.items()):
        assert round.offer(Update(name, ROUND, params, 0.1 + number, transfer)).accepted
    audit = round.close().audit
    assert audit is not None
    return audit
