"""Checkpoints by number, for the tests of what writes and reads them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fedavg_core.checkpoint import Checkpoint
from fedavg_core.comparison import same_bits


def checkpoint(number: int, **more: Any) -> Checkpoint:
    model = {"w": np.full((3, 4), number, np.float32), "h": np.full(5, number, ml_dtypes.bfloat16)}
    return Checkpoint(**{"model": model, "round": number, "extra": {"number": number}, **more})


def number_in(found: Checkpoint) -> int:
    """Which of `checkpoint`'s this is; fails unless it is one of them, whole."""
    assert same_bits(found.model, checkpoint(found.round).model)
    assert found.extra == {"number": found.round}
    return found.round
