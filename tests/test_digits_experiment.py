"""A whole federated experiment as a test: ten contributors learn handwritten digits.

To be copied: put your own `train`, `initial_model` and `evaluate` in the place of those of the
digits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fedavg_core as fc
from nvflare_adapter.digits import evaluate, initial_model, train

CLIENTS = dict.fromkeys((f"site-{number}" for number in range(1, 11)), train)


def test_ten_contributors_learn_handwritten_digits_in_twenty_rounds() -> None:
    federation = fc.Federation(initial_model(seed=0), CLIENTS, rounds=20, evaluate=evaluate)
    outcomes = federation.run()
    assert all(len(outcome.accepted) == 10 for outcome in outcomes)
    assert outcomes[0].evaluation["accuracy"] < 0.8
    assert outcomes[-1].evaluation["accuracy"] > 0.9
    assert outcomes[-1].metrics["loss"] < outcomes[0].metrics["loss"]


def test_it_ends_with_the_same_bits_on_threads_and_after_a_stop(tmp_path: Path) -> None:
    whole = fc.Federation(initial_model(seed=0), CLIENTS, rounds=6, participation=0.5)
    whole.run()
    with ThreadPoolExecutor(2) as executor:
        settings: dict[str, Any] = {"rounds": 6, "participation": 0.5, "executor": executor}
        for outcome in fc.Federation(initial_model(0), CLIENTS, checkpoint=tmp_path, **settings):
            if outcome.round == 2:
                break
        resumed = fc.Federation(None, CLIENTS, checkpoint=tmp_path, resume=True, **settings)
        resumed.run()
    assert resumed.round == 6
    assert fc.same_bits(resumed.model, whole.model)


def test_a_server_optimizer_and_a_robust_mean_take_one_argument_each() -> None:
    federation = fc.Federation(
        initial_model(seed=0),
        CLIENTS,
        rounds=10,
        accumulator=fc.TrimmedMean(0.1),
        server_optimizer=fc.FedAdam(),
        evaluate=evaluate,
        monitor="accuracy",
    )
    federation.run()
    assert federation.best is not None
    assert federation.best.value > 0.85
