"""Bad updates by the table, and thousands from many threads at once, through the aggregator."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.app_common.app_event_type import AppEventType

import fedavg_core as fc
from fedavg_core.gate import Limits
from fedavg_core.testing import exact_weighted_mean
from nvflare_adapter import FedAvgAggregator, convert
from tests.bad_updates import BAD_UPDATES, ROUND, Bad, good, model
from tests.nvflare.server_side import Server, result

pytestmark = pytest.mark.nvflare

# Left out: what is refused under limits that a recipe does not set; the contributor and the
# transfer type, which come from NVFlare's message; and what it cannot carry in place of a dict.
ON_NVFLARE = [
    bad
    for bad in BAD_UPDATES
    if bad.limits == Limits()
    and not {"contributor", "transfer"} & set(bad.changes)
    and isinstance(bad.changes.get("params", {}), dict)
]


def opened(tmp_path: Path, base: Any, number: int) -> tuple[Any, Any]:
    aggregator = FedAvgAggregator()
    fl_ctx = Server(tmp_path).context(base, number, number + 1)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    return aggregator, fl_ctx


def message(update: fc.Update) -> Any:
    return result(
        update.params,
        update.contributor,
        update.round,
        "WEIGHTS",
        update.weight,
        update.metrics,
    )


def test_enough_of_the_table_reaches_nvflare() -> None:
    assert len(ON_NVFLARE) >= 72


@pytest.mark.parametrize("bad", ON_NVFLARE, ids=lambda bad: bad.what)
def test_a_bad_update_is_refused_by_name_and_leaves_no_trace(
    bad: Bad, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, fl_ctx = opened(tmp_path, model(), ROUND)
    with caplog.at_level(logging.WARNING):
        assert aggregator.accept(message(good("site-1")), fl_ctx)
        before = aggregator._round._mean.digest()
        assert not aggregator.accept(message(good(**bad.changes)), fl_ctx)
    assert aggregator._round._mean.digest() == before
    assert [line for line in caplog.messages if bad.reason.value in line]


def test_ten_thousand_updates_from_sixteen_threads_are_each_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    rng = np.random.default_rng(7)
    base: dict[str, Any] = {"w": np.zeros(6, np.float32), "n": np.zeros(2, np.int64)}
    aggregator, fl_ctx = opened(tmp_path, base, 0)
    spoil: list[Any] = [
        {"params": {"w": np.full(6, np.nan, np.float32)}},
        {"params": {"w": np.ones(7, np.float32)}},
        {"params": {"w": np.ones(6, complex)}},
        {"weight": 0},
        {"round": 9},
    ]
    updates = []
    for number in range(10_000):
        fields: dict[str, Any] = {
            "contributor": f"site-{number}",
            "round": 0,
            "weight": int(rng.integers(1, 1000)),
            "params": {
                "w": rng.standard_normal(6, np.float32),
                "n": rng.integers(-(2**62), 2**62, 2),
            },
        }
        if number % 5 == 4:
            fields.update(spoil[number // 5 % len(spoil)])
        updates.append(fc.Update(**fields))
    # Every thread is at work on all of them: of sixteen offers of an update one may be accepted.
    orders = [rng.permutation(len(updates))[: len(updates) // 4] for _ in range(15)]
    shares = [*orders, np.arange(len(updates))]

    def offer(share: Any) -> list[int]:
        return [int(i) for i in share if aggregator.accept(message(updates[i]), fl_ctx)]

    with ThreadPoolExecutor(16) as pool:
        accepted = [i for taken in pool.map(offer, shares) for i in taken]
    fine = [i for i in range(len(updates)) if i % 5 != 4]
    assert sorted(accepted) == fine
    got, _ = convert.model_from_result(aggregator.aggregate(fl_ctx), base)
    want = exact_weighted_mean([updates[i].params for i in fine], [updates[i].weight for i in fine])
    assert fc.same_bits(got, want)
