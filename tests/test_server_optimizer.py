"""Server optimizers against the published rules, written down a second time, and against Flower."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
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
from fedavg_core.testing import averaged_dtypes, exact_weighted_mean, fractions_of
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

    @pytest.mark.parametrize(
        "dtype",
        [each for each in averaged_dtypes() if each.kind in "fV" and each.itemsize < 4],
        ids=str,
    )
    def test_narrow_formats_are_rounded_once(self, dtype: np.dtype[Any]) -> None:
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


@dataclass(frozen=True)
class Scheduled(Halfway):
    """One with a field that JSON gives back as another kind of object."""

    rates: Any = (1.0, 0.5)


def test_a_run_with_options_that_json_changes_is_resumed(tmp_path: Path) -> None:
    for outcome in federation(Scheduled(), checkpoint=tmp_path):
        if outcome.round == 1:
            break
    resumed = federation(Scheduled(), checkpoint=tmp_path, resume=True)
    assert [outcome.round for outcome in resumed] == [2, 3, 4]
    with pytest.raises(fc.UsageError, match="expected a run with server_optimizer"):
        federation(Scheduled(rates=(1.0, 0.25)), checkpoint=tmp_path, resume=True)


def test_options_that_json_cannot_hold_are_the_callers_mistake() -> None:
    with pytest.raises(fc.UsageError, match="scheduled: expected options that JSON can hold, got"):
        Scheduled(rates=object()).settings()


class TestByName:
    """For the command line and for settings that travel as JSON."""

    @pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
    def test_settings_make_it_again(self, name: str) -> None:
        optimizer = optimizer_named(name, learning_rate=0.5)
        assert json.loads(json.dumps(optimizer.settings())) == optimizer.settings()
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
                "expected options out of learning_rate, got 'beta1'",
            ),
            ({"name": "fedavg", "learning_rate": 0}, "learning_rate: expected a finite number ab"),
            ({"name": "fedavg", "learning_rate": math.inf}, "learning_rate: expected a finite"),
            ({"name": "fedavg", "learning_rate": "1"}, "learning_rate: expected a finite number"),
            ({"name": "fedavg", "learning_rate": True}, "learning_rate: expected a finite number"),
            ({"name": "fedavg", "learning_rate": 10**400}, "learning_rate: expected a finite numb"),
            (
                {"name": "fedadam", "tau": 10**400},
                "tau: expected a finite number above 0, got 1000",
            ),
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

        @dataclass(frozen=True)
        class Noted(FedAvg):
            note: str = "one"

        assert Noted(2).settings() == {"name": "noted", "learning_rate": 2.0, "note": "one"}
        settings = FedAdam(np.float64(0.5), tau=1, beta1=0).settings()
        assert all(type(value) is float for name, value in settings.items() if name != "name")
        assert Halfway().settings() == {"name": "halfway", "learning_rate": 1.0}


def drift(params: Model, context: fc.Context) -> fc.TrainResult:
    """A client whose every bit comes from its seed."""
    source = np.random.default_rng(context.seed)
    for array in params.values():
        array += np.asarray(source.normal(size=array.shape)).astype(array.dtype)
    return fc.TrainResult(params, int(source.integers(1, 100)))


def federation(optimizer: ServerOptimizer | None, rounds: int = 5, **more: Any) -> fc.Federation:
    clients = {f"site-{number}": drift for number in range(1, 7)}
    return fc.Federation(
        start(), clients, rounds, server_optimizer=optimizer, participation=4, **more
    )


class TestInAFederation:
    """The state is kept from round to round, stored, and taken up again."""

    @pytest.mark.parametrize("rule", RULES, ids=named)
    def test_it_is_that_of_the_rounds_one_by_one(
        self, rule: tuple[ServerOptimizer, Rule, float]
    ) -> None:
        fed, plain = federation(rule[0]), federation(None)
        state: Mapping[str, Any] = {}
        model = fed.model
        for outcome in fed:
            updates: list[Any] = [
                (drift(fc.apply(model, {}), context_of(receipt, fed)).params, receipt.weight)
                for receipt in outcome.accepted
            ]
            expected = close(
                model, updates, outcome.round, server_optimizer=rule[0], optimizer_state=state
            )  # fmt: skip
            assert fc.same_bits(outcome.model, expected.model)
            model, state = expected.model, expected.optimizer_state
        plain.run()
        assert not fc.same_bits(fed.model, plain.model)

    @pytest.mark.parametrize("stop", range(1, 5))
    @pytest.mark.parametrize("rule", RULES, ids=named)
    def test_a_resumed_run_ends_with_the_same_bits(
        self, tmp_path: Path, rule: tuple[ServerOptimizer, Rule, float], stop: int
    ) -> None:
        whole = federation(rule[0])
        expected = whole.run()
        for outcome in federation(rule[0], checkpoint=tmp_path):
            if outcome.round + 1 == stop:
                break
        stored = fc.CheckpointStore(tmp_path).load().arrays
        assert fc.same_bits(stored, expected[stop - 1].optimizer_state)
        resumed = federation(rule[0], checkpoint=tmp_path, resume=True)
        rest = resumed.run()
        assert len(rest) == 5 - stop
        assert fc.same_bits(resumed.model, whole.model)
        assert fc.same_bits(rest[-1].optimizer_state, expected[-1].optimizer_state)

    def test_clients_may_bring_the_first_model(self, tmp_path: Path) -> None:
        def client(params: Model, context: fc.Context) -> fc.TrainResult:
            return fc.TrainResult({"w": params.get("w", np.zeros(2)) + 1 + context.index}, 1)

        clients = {"a": client, "b": client}
        settings: dict[str, Any] = {"server_optimizer": FedAvgM(0.5, momentum=0.5)}
        fed = fc.Federation(None, clients, 3, checkpoint=tmp_path, **settings)
        outcomes = fed.run()
        assert [outcome.model["w"][0] for outcome in outcomes] == [1.5, 2.25, 3.375]
        longer = fc.Federation(None, clients, 4, checkpoint=tmp_path, resume=True, **settings)
        (last,) = longer
        assert last.model["w"][0] == 3.375 + 0.5 * (1.5 + 0.5 * (1.5 + 0.5 * 1.5))

    @pytest.mark.parametrize("transfer", fc.TransferType)
    def test_in_line_on_threads_and_on_processes_the_bits_are_the_same(
        self, transfer: fc.TransferType
    ) -> None:
        expected = federation(FedAdam(), transfer=transfer).run()[-1]
        for executor in (ThreadPoolExecutor(3), ProcessPoolExecutor(2)):
            with executor:
                found = federation(FedAdam(), transfer=transfer, executor=executor).run()[-1]
            assert fc.same_bits(found.model, expected.model)
            assert fc.same_bits(found.optimizer_state, expected.optimizer_state)

    @pytest.mark.parametrize("other", [None, FedYogi(), FedAdam(0.2)])
    def test_another_optimizer_cannot_resume_a_run(
        self, tmp_path: Path, other: ServerOptimizer | None
    ) -> None:
        federation(FedAdam(), 1, checkpoint=tmp_path).run()
        with pytest.raises(fc.UsageError, match=r"expected a run with server_optimizer[: ]"):
            federation(other, 2, checkpoint=tmp_path, resume=True)

    def test_a_checkpoint_with_another_state_is_an_error(self, tmp_path: Path) -> None:
        federation(FedAdam(), 1, checkpoint=tmp_path).run()
        store = fc.CheckpointStore(tmp_path)
        found = store.load()
        arrays = {**found.arrays, "momentum/w": np.zeros(2)}
        path = store.save(replace(found, arrays=arrays))
        with pytest.raises(fc.CheckpointError, match="'momentum/w': expected finite float64") as e:
            federation(FedAdam(), 2, checkpoint=tmp_path, resume=True)
        assert e.value.path == path

    def test_what_is_no_optimizer_is_a_usage_error(self) -> None:
        other: Any = "fedadam"
        with pytest.raises(fc.UsageError, match="server_optimizer: expected a ServerOptimizer or"):
            federation(other)
        with pytest.raises(fc.UsageError, match="optimizer_state: there is no server optimizer"):
            fc.Round(start(), 0, optimizer_state={"momentum/w": np.zeros((4, 3))})


def context_of(receipt: fc.Receipt, fed: fc.Federation) -> fc.Context:
    seed = fc.contributor_seed(0, receipt.round, receipt.contributor)
    return fc.Context(receipt.contributor, 0, 6, receipt.round, 5, seed)


class TestAnOpenRound:
    """It can go on in another process."""

    def test_it_goes_on_to_the_same_bits(self) -> None:
        model, updates = start(), updates_of(start(), 1)
        state = close(model, updates_of(model, 7), server_optimizer=FedAdam()).optimizer_state
        settings: dict[str, Any] = {"server_optimizer": FedAdam(), "optimizer_state": state}
        expected = close(model, updates, **settings)
        half = fc.Round(model, 0, transfer=fc.TransferType.FULL, **settings)
        half.offer(fc.Update("site-0", 0, *updates[0]))
        meta, arrays = half.state()
        rest = fc.Round.from_state(json.loads(json.dumps(meta)), arrays, model, **settings)
        for index in (1, 2):
            rest.offer(fc.Update(f"site-{index}", 0, *updates[index]))
        found = rest.close()
        assert fc.same_bits(found.model, expected.model)
        assert fc.same_bits(found.optimizer_state, expected.optimizer_state)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"server_optimizer": FedAdam(0.2)},
            {"server_optimizer": FedAdam(), "optimizer_state": {"momentum/w": np.ones((4, 3))}},
        ],
    )
    def test_another_optimizer_cannot_go_on_with_it(self, settings: dict[str, Any]) -> None:
        model = start()
        meta, arrays = fc.Round(model, 0, server_optimizer=FedAdam()).state()
        fc.Round.from_state(meta, arrays, model, server_optimizer=FedAdam())
        with pytest.raises(fc.UsageError, match="began with another server optimizer, or with"):
            fc.Round.from_state(meta, arrays, model, **settings)


class TestFlower:
    """The steps of Flower's strategies, where it is installed."""

    @pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
    def test_the_steps_are_the_same_to_the_bit(self, name: str) -> None:
        pytest.importorskip("flwr")
        common = importlib.import_module("flwr.common")
        strategies = importlib.import_module("flwr.server.strategy")
        # Few bits, so that Flower's own sums and differences are exact.
        source = np.random.default_rng(11)
        model = {"w": source.integers(-64, 64, (4, 3)) / 8, "b": source.integers(-64, 64, 5) / 8}
        initial = common.ndarrays_to_parameters(list(model.values()))
        theirs = {
            "fedavgm": lambda: strategies.FedAvgM(
                initial_parameters=initial, server_learning_rate=0.5, server_momentum=0.7
            ),
            "fedadagrad": lambda: strategies.FedAdagrad(
                initial_parameters=initial, eta=0.3, tau=0.01
            ),
            "fedadam": lambda: strategies.FedAdam(
                initial_parameters=initial, eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.01
            ),
            "fedyogi": lambda: strategies.FedYogi(
                initial_parameters=initial, eta=0.3, beta_1=0.8, beta_2=0.95, tau=0.01
            ),
        }[name]()
        # Flower's second moment begins with zero.
        state: Mapping[str, Any] = {f"second_moment/{k}": a * 0 for k, a in model.items()}
        if name == "fedavgm":
            state = {}
        for number in range(1, 6):
            ours = {
                "fedavgm": FedAvgM(0.5, momentum=0.7),
                "fedadagrad": FedAdagrad(0.3, tau=0.01),
                # Flower's rate for the round is corrected for Adam's bias.
                "fedadam": FedAdam(
                    0.3 * np.sqrt(1 - np.power(0.95, number + 1.0)).item()
                    / (1 - np.power(0.8, number + 1.0)).item(),
                    beta1=0.8, beta2=0.95, tau=0.01,
                ),
                "fedyogi": FedYogi(0.3, beta1=0.8, beta2=0.95, tau=0.01),
            }[name]  # fmt: skip
            updates = [
                {k: np.round(a * 8) / 8 + source.integers(-9, 9, a.shape) for k, a in model.items()}
                for _ in range(4)
            ]
            results = [
                (
                    None,
                    common.FitRes(
                        status=common.Status(code=common.Code.OK, message=""),
                        parameters=common.ndarrays_to_parameters(list(update.values())),
                        num_examples=4,
                        metrics={},
                    ),
                )
                for update in updates
            ]
            parameters, _ = theirs.aggregate_fit(number, results, [])
            expected = common.parameters_to_ndarrays(parameters)
            outcome = close(
                model, [(update, 4) for update in updates],
                server_optimizer=ours, optimizer_state=state,
            )  # fmt: skip
            model, state = outcome.model, outcome.optimizer_state
            for key, wanted in zip(model, expected, strict=True):
                assert fc.same_bits({key: model[key]}, {key: wanted})
