"""The audit of a round: what it records, how it is read, and what a replay finds."""

from __future__ import annotations

import numpy as np

import fedavg_core as fc
from tests.bad_updates import ROUND, good, model


def test_a_replay_of_the_updates_of_a_round_gives_the_same_bits() -> None:
    round = fc.Round(model(), ROUND, audit=True)
    assert round.offer(good("site-1")).accepted
    assert round.offer(good("site-2", params={"w": model()["w"] * np.float32(0.1)})).accepted
    audit = round.close().audit
    assert audit is not None
    updates = {"site-1": good().params, "site-2": {"w": model()["w"] * np.float32(0.1)}}
    assert fc.verify(audit, updates).same_bits
    assert not fc.verify(audit, {**updates, "site-1": model()}).same_bits
