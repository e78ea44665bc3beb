"""Rounds, refusals, restarts and failing saves in any sequence: the state is always the right one.

A server is played that keeps its open round in a checkpoint store and is restarted from it. Beside
it runs a model that any reader can check: a dictionary of the updates that must count.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.checkpoint import Checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.comparison import same_bits
from fedavg_core.errors import CheckpointError, Reason
from fedavg_core.gate import Limits
from fedavg_core.model import ModelSpec
from fedavg_core.replay import verify
from fedavg_core.round import Round, RoundState
from fedavg_core.testing.strategies import weights
from fedavg_core.update import TransferType, Update
from tests.bad_updates import BAD_UPDATES, model, spoilt
from tests.faults import Faults

NAMES = [f"site-{number}" for number in range(5)]
PLAIN = [
    bad
    for bad in BAD_UPDATES
    if bad.limits == Limits()
    and bad.reason
    in (Reason.NON_FINITE, Reason.SHAPE, Reason.DTYPE, Reason.BAD_WEIGHT, Reason.BAD_NAME)
]
"""Updates that are bad in any round."""

floats = st.floats(-1e6, 1e6, width=32)


@st.composite
def sent(draw: st.DrawFn) -> dict[str, npt.NDArray[Any]]:
    """Some or all of the model's parameters, with other values."""
    keys = draw(st.lists(st.sampled_from(sorted(model())), unique=True, min_size=1))
    return {
        key: np.full(model()[key].shape, draw(floats)).astype(model()[key].dtype) for key in keys
    }


class Server(RuleBasedStateMachine):
    """A server whose round is offered updates, closed, stored and restarted."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = CheckpointStore(self.folder, keep=2)
        self.number = 0
        self.model: dict[str, npt.NDArray[Any]] = model()
        self.counted: dict[str, tuple[dict[str, npt.NDArray[Any]], float]] = {}
        self.refusals = 0

    @initialize(transfer=st.sampled_from(TransferType), least=st.integers(1, 3))
    def begin(self, transfer: TransferType, least: int) -> None:
        self.transfer, self.least = transfer, least
        self.open()

    def open(self) -> None:
        self.round = Round(
            self.model, self.number, min_updates=self.least, transfer=self.transfer, audit=True
        )
        self.counted, self.refusals = {}, 0

    def update(self, name: str, params: Any, weight: Any, **more: Any) -> Update:
        fields = {"round": self.number, "transfer": self.transfer, **more}
        return Update(name, params=params, weight=weight, **fields)

    @rule(name=st.sampled_from(NAMES), params=sent(), weight=weights())
    def offer(self, name: str, params: dict[str, npt.NDArray[Any]], weight: float) -> None:
        receipt = self.round.offer(self.update(name, params, weight, metrics={"w": weight}))
        if name in self.counted:
            assert receipt.reason is Reason.DUPLICATE
            self.refusals += 1
        else:
            assert receipt.accepted, receipt.detail
            self.counted[name] = (params, weight)

    @rule(name=st.sampled_from(NAMES), step=st.sampled_from([-2, -1, 1, 7]))
    def offer_for_another_round(self, name: str, step: int) -> None:
        receipt = self.round.offer(self.update(name, model(), 1, round=self.number + step))
        assert receipt.reason is (Reason.STALE_ROUND if step < 0 else Reason.FUTURE_ROUND)
        self.refusals += 1

    @rule(number=st.integers(0, len(PLAIN) - 1))
    def offer_a_bad_one(self, number: int) -> None:
        bad = PLAIN[number]
        fields = {"contributor": "site-9", "params": spoilt(), "weight": 1, **bad.changes}
        fields["transfer"] = self.transfer
        receipt = self.round.offer(Update(**{**fields, "round": self.number}))
        assert receipt.reason is bad.reason
        self.refusals += 1

    @rule()
    def restart(self) -> None:
        """Store, forget all, and go on from what is stored."""
        self.save()
        self.store = CheckpointStore(self.folder, keep=2)
        found = self.store.load()
        assert found.round == self.number
        assert same_bits(found.model, self.model)
        self.model = dict(found.model)
        digest = self.round._mean.digest()
        self.round = Round.from_state(found.extra["round"], found.arrays, self.model)
        assert self.round._mean.digest() == digest

    @rule(at=st.integers(0, 60), keep=st.booleans(), partly=st.booleans())
    def fail_to_save(self, at: int, keep: bool, partly: bool) -> None:
        """A save that fails leaves what was stored before, or what was to be stored."""
        before = self.stored_extra()
        meta = json.loads(json.dumps(self.round.state()[0]))
        with Faults(at, keep, partly):
            try:
                self.save()
            except CheckpointError:
                pass
            else:
                before = meta
        assert self.stored_extra() in (before, meta)

    def save(self) -> None:
        meta, arrays = self.round.state()
        self.store.save(Checkpoint(self.model, self.number, {}, {"round": meta}, arrays))

    def stored_extra(self) -> Any:
        return self.store.load().extra["round"] if self.store.paths() else None

    @rule()
    def close(self) -> None:
        outcome = self.round.close()
        assert self.round.status is RoundState.CLOSED
        assert self.round.offer(self.update("site-8", model(), 1)).reason is Reason.ROUND_CLOSED
        assert outcome.enough == (len(self.counted) >= self.least)
        if outcome.enough and outcome.problem is None:
            names = sorted(self.counted)
            expected = weighted_mean(
                [self.counted[name][0] for name in names],
                [self.counted[name][1] for name in names],
                base=self.model if self.transfer is TransferType.DIFF else None,
            )
            assert same_bits(outcome.model, {**self.model, **expected})
        else:
            assert same_bits(outcome.model, self.model)
        assert len(outcome.refused) == self.refusals
        assert outcome.audit is not None
        updates = {name: params for name, (params, _) in self.counted.items()}
        assert verify(outcome.audit, updates, self.model).same_bits
        self.model = outcome.model
        self.number += 1
        self.open()

    @invariant()
    def the_sums_hold_what_was_accepted_and_nothing_else(self) -> None:
        if not hasattr(self, "round"):
            return
        assert {receipt.contributor for receipt in self.round.accepted} == set(self.counted)
        assert len(self.round.accepted) == len(self.counted)
        assert len(self.round.refused) == self.refusals
        fresh = WeightedMean(ModelSpec.of(self.model))
        for name in sorted(self.counted):
            fresh.add(*self.counted[name])
        assert self.round._mean.digest() == fresh.digest()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestServer = Server.TestCase
# 300 runs of 50 steps in ci, 3,000 at night, 10 of 30 by default.
_EXAMPLES = settings().max_examples
TestServer.settings = settings(
    max_examples=_EXAMPLES * 3 // 10 if _EXAMPLES >= 1_000 else 10,
    stateful_step_count=50 if _EXAMPLES >= 1_000 else 30,
)
