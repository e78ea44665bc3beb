"""Server optimizers against the published rules, written down a second time, and against Flower."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fedavg_core as fc
from fedavg_core.server_optimizer import (
    SERVER_OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    optimizer_named,
)
from fedavg_core.testing import exact_weighted_mean, fractions_of
from tests.conftest import THOROUGH

Model = dict[str, npt.NDArray[Any]]
ROUNDS = 8 if THOROUGH else 3


@dataclass
class Memory:
    """What the plain rules below remember of one number."""

    m: float = 0.0
    v: float = 0.0


def plain_fedavg(x: float, d: float, memory: Memory) -> float:
    return x + 0.25 * d


def plain_fedavgm(x: float, d: float, memory: Memory) -> float:
    memory.m = 0.7 * memory.m + d
    return x + 0.5 * memory.m


def plain_fedadagrad(x: float, d: float, memory: Memory) -> float:
    memory.m = 0.2 * memory.m + (1 - 0.2) * d
    memory.v = memory.v + d * d
    return x + 0.3 * memory.m / (math.sqrt(memory.v) + 0.01)


def plain_fedadam(x: float, d: float, memory: Memory) -> float:
    memory.m = 0.8 * memory.m + (1 - 0.8) * d
    memory.v = 0.95 * memory.v + (1 - 0.95) * (d * d)
    return x + 0.3 * memory.m / (math.sqrt(memory.v) + 0.01)


def plain_fedyogi(x: float, d: float, memory: Memory) -> float:
    memory.m = 0.8 * memory.m + (1 - 0.8) * d
    sign = (memory.v > d * d) - (memory.v < d * d)
    memory.v = memory.v - (1 - 0.95) * (d * d) * sign
    return x + 0.3 * memory.m / (math.sqrt(memory.v) + 0.01)


Rule = Callable[[float, float, Memory], float]
RULES: list[tuple[ServerOptimizer, Rule, float]] = [
    (FedAvg(0.25), plain_fedavg, 0.0),
    (FedAvgM(0.5, momentum=0.7), plain_fedavgm, 0.0),
    (FedAdagrad(0.3, beta1=0.2, tau=0.01), plain_fedadagrad, 0.01 * 0.01),
    (FedAdam(0.3, beta1=0.8, tau=0.01, beta2=0.95), plain_fedadam, 0.01 * 0.01),
    (FedYogi(0.3, beta1=0.8, tau=0.01, beta2=0.95), plain_fedyogi, 0.01 * 0.01),
]
"""Each optimizer, the same rule for a single number, and what its second moment is at first."""


def named(rule: tuple[ServerOptimizer, Rule, float]) -> str:
    return type(rule[0]).__name__


def start() -> Model:
    source = np.random.default_rng(1)
    return {
        "w": source.normal(size=(4, 3)).astype(np.float32),
        "half": source.normal(size=5).astype(np.float16),
        "double": source.normal(size=6),
        "scalar": np.array(0.5, np.float32),
        "none": np.zeros((0, 2), np.float32),
        "counter": np.array([10, 20]),
    }


def updates_of(model: Mapping[str, npt.NDArray[Any]], seed: int) -> list[tuple[Model, int]]:
    """Three contributors' models, and their weights."""
    source = np.random.default_rng(seed)
    return [
        (
            {
                key: array + source.integers(0, 9, array.shape)
                if array.dtype.kind == "i"
                else np.asarray(array + source.normal(size=array.shape) * 0.1).astype(array.dtype)
                for key, array in model.items()
            },
            int(weight),
        )
        for weight in source.integers(1, 100, 3)
    ]


def close(
    model: Model,
    updates: list[tuple[Model, int]],
    number: int = 0,
    transfer: fc.TransferType = fc.TransferType.FULL,
    **settings: Any,
) -> fc.Outcome:
    round = fc.Round(model, number, transfer=transfer, **settings)
    for index, (params, weight) in enumerate(updates):
        sent = fc.diff(params, model) if transfer is fc.TransferType.DIFF else params
        assert round.offer(fc.Update(f"site-{index}", number, sent, weight, transfer)).accepted
    return round.close()


def exact_changes(
    model: Model, updates: list[tuple[Model, int]], key: str, transfer: fc.TransferType
) -> list[Fraction]:
    """By how much the mean of the updates differs from the model, element for element."""
    total = sum(weight for _, weight in updates)
    base = fractions_of(model[key])
    changes = [Fraction(0)] * len(base)
    for params, weight in updates:
        if transfer is fc.TransferType.DIFF:
            sent = fractions_of(fc.diff({key: params[key]}, {key: model[key]})[key])
        else:
            sent = [a - b for a, b in zip(fractions_of(params[key]), base, strict=True)]
        changes = [old + weight * new for old, new in zip(changes, sent, strict=True)]
    return [change / total for change in changes]


class TestThePublishedRules:
    """Element for element, over several rounds, in the bits of float64 and rounded once."""

    @pytest.mark.parametrize("transfer", fc.TransferType)
    @pytest.mark.parametrize("rule", RULES, ids=named)
    def test_a_round_makes_the_step_of_the_plain_rule(
        self, rule: tuple[ServerOptimizer, Rule, float], transfer: fc.TransferType
    ) -> None:
        optimizer, plain, first = rule
        state: Mapping[str, Any] = {}
        model = start()
        memory = {key: [Memory(0.0, first) for _ in range(a.size)] for key, a in model.items()}
        for number in range(ROUNDS):
            updates = updates_of(model, number)
            outcome = close(
                model, updates, number, transfer, server_optimizer=optimizer, optimizer_state=state
            )
            for key, array in model.items():
                if key == "counter":
                    continue
                changes = exact_changes(model, updates, key, transfer)
                expected = [
                    plain(float(x), float(change), of)
                    for x, change, of in zip(array.ravel(), changes, memory[key], strict=True)
                ]
                wanted = np.array(expected).astype(array.dtype).reshape(array.shape)
                assert fc.same_bits({key: outcome.model[key]}, {key: wanted})
                for name, of in (("momentum", "m"), ("second_moment", "v")):
                    if name in optimizer.start:
                        found = outcome.optimizer_state[f"{name}/{key}"]
                        assert found.shape == array.shape
                        assert found.ravel().tolist() == [getattr(one, of) for one in memory[key]]
            model, state = outcome.model, outcome.optimizer_state
        moments = {f"{name}/{key}" for name in optimizer.start for key in model}
        assert state.keys() == {name for name in moments if "counter" not in name}

    @pytest.mark.parametrize("rule", RULES, ids=named)
    def test_the_order_of_the_updates_does_not_show(
        self, rule: tuple[ServerOptimizer, Rule, float]
    ) -> None:
        model = start()
        updates = updates_of(model, 5)
        state = close(model, updates, server_optimizer=rule[0]).optimizer_state
        settings: dict[str, Any] = {"server_optimizer": rule[0], "optimizer_state": state}
        expected = close(model, updates, **settings)
        for _ in range(5):
            random.Random(2).shuffle(updates)
            found = close(model, updates, **settings)
            assert fc.same_bits(found.model, expected.model)
            assert fc.same_bits(found.optimizer_state, expected.optimizer_state)

    @pytest.mark.parametrize("transfer", fc.TransferType)
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
    def test_fedavg_with_rate_1_gives_the_exact_mean(
        self, dtype: str, transfer: fc.TransferType
    ) -> None:
        pytest.importorskip("ml_dtypes")
        source = np.random.default_rng(3)
        model = {"w": source.normal(size=500).astype(dtype)}
        updates = updates_of(model, 4)
        found = close(model, updates, transfer=transfer, server_optimizer=FedAvg())
        expected = close(model, updates, transfer=transfer)
        assert fc.same_bits(found.model, expected.model)
        assert found.optimizer_state == {}

    def test_integers_become_their_exact_mean_and_have_no_state(self) -> None:
        model = start()
        updates = updates_of(model, 1)
        outcome = close(model, updates, server_optimizer=FedAdam())
        mean = exact_weighted_mean([params for params, _ in updates], [w for _, w in updates])
        assert fc.same_bits({"n": outcome.model["counter"]}, {"n": mean["counter"]})
        assert "momentum/counter" not in outcome.optimizer_state

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
    def test_narrow_formats_are_rounded_once(self, dtype: str) -> None:
        pytest.importorskip("ml_dtypes")
        # Just above the midpoint of two neighbours: a detour by float32 would make it a tie.
        one = np.ones(1, dtype)
        above = float(np.nextafter(one, np.asarray(2, dtype))[0])
        change = {"w": np.array([(1 + above) / 2 + 2.0**-40 - 1])}
        found, _ = FedAvg(0.5).update({"w": one}, {"w": one}, {"w": 2 * change["w"]}, {})
        assert found["w"].dtype == one.dtype
        assert float(found["w"][0]) == above

    def test_a_change_that_vanishes_in_the_models_dtype_still_counts(self) -> None:
        model = {"w": np.full(3, 1.0, np.float16)}
        state: Mapping[str, Any] = {}
        for number in range(4):
            moved = {"w": np.array([1.0, 1.0, 1.0 + 2.0**-10], np.float16)}
            outcome = close(
                model, [({"w": model["w"]}, 9), (moved, 1)], number,
                server_optimizer=FedAvgM(1.0, momentum=0.9), optimizer_state=state,
            )  # fmt: skip
            state = outcome.optimizer_state
        expected, change = 0.0, float(Fraction(1, 10 * 2**10))
        for _ in range(4):
            expected = 0.9 * expected + change
        assert state["momentum/w"].tolist() == [0.0, 0.0, expected]


class TestWhatIsLeftAlone:
    """Parameters that nobody sent, and rounds that keep the model."""

    def test_a_parameter_that_nobody_sent_keeps_its_value_and_its_state(self) -> None:
        model = start()
        settings: dict[str, Any] = {"server_optimizer": FedAdam()}
        first = close(model, updates_of(model, 1), **settings)
        updates = [({"w": p["w"]}, weight) for p, weight in updates_of(first.model, 2)]
        second = close(first.model, updates, optimizer_state=first.optimizer_state, **settings)
        for key in model:
            same = fc.same_bits({key: first.model[key]}, {key: second.model[key]})
            assert same == (key != "w")
            for name in ("momentum/" + key, "second_moment/" + key):
                if name in first.optimizer_state:
                    before, after = first.optimizer_state[name], second.optimizer_state[name]
                    assert np.array_equal(before, after) == (key != "w")

    def test_an_excluded_parameter_has_no_state(self) -> None:
        model = start()
        limits = fc.Limits(exclude="^half$")
        outcome = close(model, updates_of(model, 1), server_optimizer=FedAdam(), limits=limits)
        assert fc.same_bits({"x": outcome.model["half"]}, {"x": model["half"]})
        assert "momentum/half" not in outcome.optimizer_state
        assert list(outcome.model) == list(model)

    def test_a_round_with_too_few_updates_keeps_the_state(self) -> None:
        model = start()
        settings: dict[str, Any] = {"server_optimizer": FedYogi()}
        state = close(model, updates_of(model, 1), **settings).optimizer_state
        outcome = close(
            model, updates_of(model, 2), optimizer_state=state, min_updates=4, **settings
        )
        assert fc.same_bits(outcome.model, model)
        assert fc.same_bits(outcome.optimizer_state, state)

    @pytest.mark.parametrize(
        ("optimizer", "dtype", "value", "told"),
        [
            (FedAvg(3.0), "float16", 60000.0, "key 'w': the server optimizer's step leads beyond"),
            (FedAvg(3.0), "bfloat16", 3e38, "key 'w': the result at"),
            (FedAvg(1e9), "float64", 1e300, "key 'w': the server optimizer's step leads beyond"),
            (FedAdam(), "float64", 1e200, "'second_moment/w': the server optimizer's state is"),
        ],
    )
    def test_what_is_beyond_the_largest_number_changes_nothing(
        self, optimizer: ServerOptimizer, dtype: str, value: float, told: str
    ) -> None:
        pytest.importorskip("ml_dtypes")
        model = {"w": np.zeros(2, dtype)}
        updates = [({"w": np.array([0, value], dtype)}, 1)]
        outcome = close(model, updates, server_optimizer=optimizer)
        assert outcome.problem is not None
        assert told in outcome.problem
        assert fc.same_bits(outcome.model, model)
        assert outcome.optimizer_state == {}

    def test_a_round_without_a_model_gives_the_mean_and_no_state(self) -> None:
        round = fc.Round(None, 0, server_optimizer=FedAdam())
        round.offer(fc.Update("a", 0, {"w": np.ones(3)}, 1))
        outcome = round.close()
        assert outcome.model["w"].tolist() == [1.0, 1.0, 1.0]
        assert outcome.optimizer_state == {}


class TestTheState:
    """Plain arrays, which nobody can change by accident."""

    def test_it_cannot_be_written_to_and_what_was_given_is_only_read(self) -> None:
        model = start()
        given = close(model, updates_of(model, 1), server_optimizer=FedAdam()).optimizer_state
        copies = {name: array.copy() for name, array in given.items()}
        mine = {name: array.copy() for name, array in given.items()}
        outcome = close(
            model, updates_of(model, 2), server_optimizer=FedAdam(), optimizer_state=mine
        )
        assert fc.same_bits(mine, copies)
        for name, array in outcome.optimizer_state.items():
            assert array.dtype == np.float64
            assert mine[name].flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ([], "expected a server optimizer's state as a mapping, got"),
            ({"w": np.zeros(3)}, "'w': expected the state of a parameter under one of the names"),
            ({"momentum/v": np.zeros(3)}, "'momentum/v': expected the state of a parameter"),
            ({"velocity/w": np.zeros(3)}, "'velocity/w': expected the state of a parameter"),
            ({7: np.zeros(3)}, "7: expected the state of a parameter"),
            ({"momentum/w": [0.0] * 3}, "'momentum/w': expected finite float64 numbers of shape"),
            ({"momentum/w": np.zeros(3, np.float32)}, "'momentum/w': expected finite float64"),
            ({"momentum/w": np.zeros(4)}, "'momentum/w': expected finite float64 numbers"),
            ({"momentum/w": np.full(3, np.nan)}, "'momentum/w': expected finite float64 numbers"),
        ],
    )
    def test_another_state_is_a_usage_error(self, state: Any, message: str) -> None:
        with pytest.raises(fc.UsageError, match=message):
            fc.Round({"w": np.zeros(3)}, 0, server_optimizer=FedAvgM(), optimizer_state=state)


class Halfway(ServerOptimizer):
    """An optimizer as a user would write it: no fields, no state."""

    @property
    def start(self) -> Mapping[str, float]:
        return {}

    def step(self, change: Any, state: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return change / 2, {}


class TestByName:
    """For the command line and for settings that travel as JSON."""

    @pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
    def test_settings_make_it_again(self, name: str) -> None:
        optimizer = optimizer_named(name, learning_rate=0.5)
        assert optimizer.settings()["name"] == name
        assert optimizer_named(**optimizer.settings()) == optimizer

    def test_defaults_are_those_of_the_class(self) -> None:
        assert optimizer_named("fedavg") == FedAvg(learning_rate=1.0)
        assert optimizer_named("fedadam") == FedAdam(0.1, beta1=0.9, tau=1e-3, beta2=0.99)
        assert optimizer_named("fedadagrad").settings() == {
            "name": "fedadagrad", "learning_rate": 0.1, "beta1": 0.0, "tau": 1e-3,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "adam"}, "expected one of fedavg, fedavgm, fedadagrad, fedadam, fedyogi"),
            (
                {"name": "fedavg", "beta1": 0.9},
                "expected settings out of learning_rate, got 'beta1'",
            ),
            ({"name": "fedavg", "learning_rate": 0}, "learning_rate: expected a finite number ab"),
            ({"name": "fedavg", "learning_rate": math.inf}, "learning_rate: expected a finite"),
            ({"name": "fedavg", "learning_rate": "1"}, "learning_rate: expected a finite number"),
            ({"name": "fedavg", "learning_rate": True}, "learning_rate: expected a finite number"),
            ({"name": "fedadam", "tau": -1}, "tau: expected a finite number above 0, got -1"),
            ({"name": "fedadam", "beta1": 1}, "beta1: expected a number from 0 to below 1, got 1"),
            ({"name": "fedyogi", "beta2": -0.1}, "beta2: expected a number from 0 to below 1"),
            ({"name": "fedavgm", "momentum": None}, "momentum: expected a number from 0 to below"),
        ],
    )
    def test_others_are_a_usage_error(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(fc.UsageError, match=message):
            optimizer_named(**arguments)

    def test_an_optimizer_of_ones_own_works(self) -> None:
        model = {"w": np.zeros(2, np.float32)}
        outcome = close(
            model, [({"w": np.full(2, 3.0, np.float32)}, 1)], server_optimizer=Halfway()
        )
        assert outcome.model["w"].tolist() == [1.5, 1.5]
        assert Halfway().settings() == {"name": "halfway", "learning_rate": 1.0}
