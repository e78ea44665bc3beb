"""The federation: rounds, selection, evaluation, stopping, storing and resuming."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.checkpoint import Checkpoint, load_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.client import Client, Context, TrainResult, contributor_seed, draw_contributors
from fedavg_core.comparison import same_bits
from fedavg_core.errors import CheckpointError, Reason, RefusedUpdate, UsageError
from fedavg_core.federation import Federation
from fedavg_core.gate import Limits
from fedavg_core.model import ModelSpec, Params
from fedavg_core.observer import Observer
from fedavg_core.outcome import Failure, Outcome, Receipt
from fedavg_core.robust.rules import Krum
from fedavg_core.selection import Selection
from fedavg_core.server_optimizer import FedAdam
from fedavg_core.update import TransferType, Update
from tests.conftest import THOROUGH

FULL, DIFF = TransferType.FULL, TransferType.DIFF
ROOT = Path(__file__).parents[1]
KILLS = 20 if THOROUGH else 2
"""How often a run is killed; 20 times in ci."""


def model() -> dict[str, npt.NDArray[Any]]:
    return {"w": np.zeros((3, 4), np.float32), "b": np.ones(2)}


def train(params: dict[str, Any], context: Context) -> TrainResult:
    """A client whose every bit comes from its seed; some fail, and some send what is unfit."""
    rng = np.random.default_rng(context.seed)
    if context.seed % 11 == 0:
        raise RuntimeError("no data this time")
    for array in params.values():
        array += rng.normal(size=array.shape).astype(array.dtype)
    if context.seed % 7 == 0:
        params["w"][0, 0] = math.nan
    return TrainResult(params, int(rng.integers(1, 100)), {"loss": float(rng.random())})


def federation(rounds: int = 4, **more: Any) -> Federation:
    names = [f"site-{number}" for number in range(1, 11)]
    fields = {"model": model(), "clients": dict.fromkeys(names, train), "rounds": rounds}
    return Federation(**{**fields, **more})


def adding(step: float, weight: float = 1, **metrics: Any) -> Client:
    def client(params: dict[str, Any], context: Context) -> TrainResult:
        moved = {key: value + value.dtype.type(step) for key, value in params.items()}
        return TrainResult(moved, weight, metrics)

    return client


def scores(*values: float) -> Callable[[dict[str, Any]], dict[str, float]]:
    """An evaluation that gives these scores, one after the other."""
    left = list(values)
    return lambda params: {"score": left.pop(0)}


class TestARun:
    """Rounds and their outcomes."""

    def test_each_round_starts_from_the_outcome_of_the_one_before(self) -> None:
        fed = Federation(model(), {"a": adding(1), "b": adding(4, weight=2)}, 3)
        outcomes = list(fed)
        assert [outcome.round for outcome in outcomes] == [0, 1, 2]
        assert [outcome.model["w"][0, 0] for outcome in outcomes] == [3.0, 6.0, 9.0]
        assert same_bits(fed.model, outcomes[-1].model)
        assert (fed.round, fed.stopped, fed.best) == (3, None, None)

    def test_it_can_be_left_and_taken_up_again(self) -> None:
        fed, whole = federation(), federation()
        for outcome in fed:
            if outcome.round == 1:
                break
        rest = fed.run()
        assert [outcome.round for outcome in rest] == [2, 3]
        assert fed.run() == []
        whole.run()
        assert same_bits(fed.model, whole.model)

    def test_what_is_done_to_an_outcome_does_not_touch_the_run(self) -> None:
        given, fed = model(), federation(2, model=model())
        spoilt = Federation(given, dict.fromkeys((f"site-{n}" for n in range(1, 11)), train), 2)
        given["w"][:] = 7
        for outcome in spoilt:
            outcome.model["w"][:] = math.nan
            spoilt.model["w"][:] = math.nan
        fed.run()
        assert same_bits(spoilt.model, fed.model)

    def test_each_client_has_its_own_copy_to_write_to(self) -> None:
        seen = []

        def client(params: dict[str, Any], context: Context) -> TrainResult:
            seen.append(float(params["b"][0]))
            params["b"] *= 0
            del params["w"]
            return TrainResult({"b": np.full(2, 5.0)}, 1)

        list(Federation(model(), {"a": client, "b": client}, 2))
        assert seen == [1.0, 1.0, 5.0, 5.0]

    def test_clients_are_told_where_they_are(self) -> None:
        told: list[Context] = []

        def client(params: dict[str, Any], context: Context) -> TrainResult:
            told.append(context)
            return TrainResult(params, 1)

        names = ["site-10", "site-2", "site-1"]
        Federation(model(), dict.fromkeys(names, client), 2, seed=5, participation=2).run()
        for number in range(2):
            drawn = draw_contributors(names, 2, 5, number)
            for context in told[2 * number : 2 * number + 2]:
                assert context.contributor == drawn.pop(0)
                assert context.index == ["site-1", "site-2", "site-10"].index(context.contributor)
                assert (context.num_contributors, context.num_rounds) == (3, 2)
                assert context.round == number
                assert context.seed == contributor_seed(5, number, context.contributor)

    def test_full_and_diff_agree_where_differences_are_exact(self) -> None:
        clients = {"a": adding(1), "b": adding(2, weight=2), "c": adding(5, weight=5)}
        runs = [Federation(model(), clients, 3, transfer=transfer) for transfer in TransferType]
        for run in runs:
            run.run()
        assert same_bits(runs[0].model, runs[1].model)
        assert not same_bits(runs[0].model, model())

    def test_the_model_is_the_exact_mean_of_what_was_accepted(self) -> None:
        (outcome,) = federation(1, seed=3)
        sent, weights = [], []
        for receipt in outcome.accepted:
            number = int(receipt.contributor[5:]) - 1
            seed = contributor_seed(3, 0, receipt.contributor)
            result = train(model(), Context(receipt.contributor, number, 10, 0, 1, seed))
            sent.append(result.params)
            weights.append(result.weight)
        assert same_bits(outcome.model, weighted_mean(sent, weights))

    def test_clients_may_bring_the_first_model(self) -> None:
        def client(params: dict[str, Any], context: Context) -> TrainResult:
            start = params.get("w", np.array([1.0]))
            return TrainResult({"w": start + context.index}, 1)

        fed = Federation(None, {"a": client, "b": client}, 2)
        assert fed.model == {}
        assert [outcome.model["w"].tolist() for outcome in fed] == [[1.5], [2.0]]

    @pytest.mark.parametrize("accumulator", ["float64", "float32"])
    def test_other_arithmetic_is_used_where_asked_for(self, accumulator: Any) -> None:
        assert len(federation(accumulator=accumulator).run()) == 4

    def test_an_accumulator_of_the_callers_is_used_and_may_refuse(self, tmp_path: Path) -> None:
        class Small(WeightedMean):
            def add(self, params: Params, weight: float) -> None:
                if weight > 50:
                    raise RefusedUpdate(Reason.BAD_WEIGHT, expected="50", got=str(weight))
                super().add(params, weight)

        limited = federation(accumulator=Small(ModelSpec.of(model())), checkpoint=tmp_path).run()
        assert any(receipt.reason == Reason.BAD_WEIGHT for o in limited for receipt in o.refused)
        asked = federation(limits=Limits(max_weight=50)).run()
        for ours, theirs in zip(limited, asked, strict=True):
            assert same_bits(ours.model, theirs.model)
        assert federation(checkpoint=tmp_path, resume=True).round == 4


class TestClientsThatFail:
    """They are reported and left out, and the run goes on."""

    def test_one_that_raises_is_reported(self) -> None:
        def raising(params: dict[str, Any], context: Context) -> TrainResult:
            raise OSError("disk\ngone")

        fed = Federation(model(), {"a": raising, "b": adding(2)}, 2)
        for outcome in fed:
            line = raising.__code__.co_firstlineno + 1
            problem = f"OSError: disk\\ngone (test_federation.py, line {line})"
            assert outcome.failed == (Failure("a", outcome.round, problem),)
            assert [receipt.contributor for receipt in outcome.accepted] == ["b"]
        assert fed.model["b"].tolist() == [5.0, 5.0]

    def test_one_whose_update_is_unfit_is_refused(self) -> None:
        fed = Federation(model(), {"a": adding(math.nan), "b": adding(2), "c": adding(1, -1)}, 1)
        (outcome,) = fed
        assert [receipt.reason for receipt in outcome.refused] == [
            Reason.NON_FINITE,
            Reason.BAD_WEIGHT,
        ]
        assert fed.model["b"].tolist() == [3.0, 3.0]

    def test_too_few_keep_the_model_and_the_run_goes_on(self) -> None:
        def raising_first(params: dict[str, Any], context: Context) -> TrainResult:
            if context.round == 0:
                raise RuntimeError
            return adding(1)(params, context)

        fed = Federation(model(), {"a": raising_first, "b": adding(1)}, 2, min_updates=2)
        first, second = fed
        assert (first.enough, second.enough) == (False, True)
        assert first.problem == (
            "round 0: 1 accepted where at least 2 are needed; the model keeps its values"
        )
        assert same_bits(first.model, model())
        assert fed.model["b"].tolist() == [2.0, 2.0]

    def test_retries_are_made(self) -> None:
        tries = []

        def flaky(params: dict[str, Any], context: Context) -> TrainResult:
            tries.append(context.round)
            if len(tries) % 2:
                raise RuntimeError
            return TrainResult(params, 1)

        assert all(outcome.enough for outcome in Federation(model(), {"a": flaky}, 3, retries=1))
        assert tries == [0, 0, 1, 1, 2, 2]

    def test_one_that_is_late_is_reported(self) -> None:
        def slow(params: dict[str, Any], context: Context) -> TrainResult:
            time.sleep(0.5)
            return TrainResult(params, 1)

        with ThreadPoolExecutor(2) as executor:
            fed = Federation(
                model(), {"a": slow, "b": adding(1)}, 1, executor=executor, deadline=0.1
            )
            (outcome,) = fed
        assert [failure.contributor for failure in outcome.failed] == ["a"]
        assert outcome.failed[0].problem.startswith("late")
        assert outcome.enough


class TestWhatIsUnfit:
    """A round judges it, and judges whole models and differences alike."""

    @pytest.mark.parametrize(
        ("given", "limits", "reason"),
        [
            ({"w": model()["w"]}, Limits(allow_missing=False), Reason.MISSING_KEYS),
            ({**model(), "more": np.ones(2)}, Limits(), Reason.UNEXPECTED_KEYS),
            ({**model(), "b": np.ones(3)}, Limits(), Reason.SHAPE),
            ({**model(), "b": [1.0, 2.0]}, Limits(), Reason.DTYPE),
            ({**model(), "b": np.ones(2, complex)}, Limits(), Reason.DTYPE),
            ({**model(), "b": np.array([1, math.nan])}, Limits(), Reason.NON_FINITE),
            ([1.0], Limits(), Reason.DTYPE),
            (dict([(5, 0), *model().items()]), Limits(), Reason.BAD_NAME),
            ({**model(), "more": np.ones(2)}, Limits(allow_unexpected=True), None),
            ({**model(), "b": np.ones(3)}, Limits(exclude="^b$"), None),
            ({**model(), "b": np.ones(2, np.float32)}, Limits(), None),
            ({**model(), "w": np.ones((3, 4))}, Limits(), None),
            ({**model(), "b": np.array([1, 2])}, Limits(), None),
        ],
    )
    def test_it_is_the_same_for_models_and_for_differences(
        self, given: Any, limits: Limits, reason: Reason | None
    ) -> None:
        clients = {"a": lambda params, context: TrainResult(given, 1), "b": adding(1, weight=3)}
        outcomes = {
            transfer: Federation(model(), clients, 1, transfer=transfer, limits=limits).run()[0]
            for transfer in TransferType
        }
        for outcome in outcomes.values():
            assert outcome.failed == ()
            reasons = [receipt.reason for receipt in outcome.refused]
            assert reasons == ([] if reason is None else [reason])
        assert same_bits(outcomes[FULL].model, outcomes[DIFF].model)


class TestWhereClientsRun:
    """In line, on threads, on processes: the same outcomes to the bit."""

    @pytest.mark.parametrize("transfer", TransferType)
    @pytest.mark.parametrize(
        "make", [lambda: ThreadPoolExecutor(4), lambda: ProcessPoolExecutor(2)]
    )
    def test_the_outcomes_are_the_same(
        self, make: Callable[[], Executor], transfer: TransferType
    ) -> None:
        fixed: dict[str, Any] = {"transfer": transfer, "participation": 0.7, "seed": 9}
        expected = federation(5, **fixed).run()
        assert any(outcome.failed for outcome in expected)
        assert any(outcome.refused for outcome in expected)
        with make() as executor:
            found = federation(5, **fixed, executor=executor, in_flight=3).run()
        for a, b in zip(expected, found, strict=True):
            assert same_bits(a.model, b.model)
            assert (a.metrics, a.accepted, a.refused) == (b.metrics, b.accepted, b.refused)
            assert (a.failed, a.total_weight) == (b.failed, b.total_weight)

    @pytest.mark.parametrize("transfer", TransferType)
    def test_in_line_on_threads_on_processes_and_resumed_the_model_is_the_same_to_the_bit(
        self, transfer: TransferType, tmp_path: Path
    ) -> None:
        fixed: dict[str, Any] = {"transfer": transfer, "participation": 0.7, "seed": 5}
        whole = federation(6, **fixed)
        whole.run()
        with ThreadPoolExecutor(4) as threads, ProcessPoolExecutor(2) as processes:
            for number, executor in enumerate((threads, processes)):
                alone = federation(6, **fixed, executor=executor)
                alone.run()
                assert same_bits(alone.model, whole.model)
                # Begun in line, and gone on elsewhere.
                stored = {**fixed, "checkpoint": tmp_path / str(number)}
                for outcome in federation(6, **stored):
                    if outcome.round == 2:
                        break
                resumed = federation(6, **stored, resume=True, executor=executor)
                assert [outcome.round for outcome in resumed] == [3, 4, 5]
                assert same_bits(resumed.model, whole.model)

    def test_many_clients_take_no_more_memory_than_few(self) -> None:
        big = {"w": np.zeros(20_000)}

        def client(params: dict[str, Any], context: Context) -> TrainResult:
            return TrainResult(params, 1)

        peaks = []
        for count in (50, 350):
            fed = Federation(big, {f"s{n}": client for n in range(count)}, 2)
            tracemalloc.start()
            fed.run()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        # Receipts grow, at some hundreds of bytes each; 300 models would be 48 MB.
        assert peaks[1] - peaks[0] < 300 * 2_000


class TestParticipation:
    """Who is selected."""

    @pytest.mark.parametrize(
        ("participation", "count"),
        [(None, 10), (1, 1), (4, 4), (10, 10), (1.0, 10), (0.5, 5), (0.44, 4), (0.01, 1)],
    )
    def test_so_many_are_selected(self, participation: Any, count: int) -> None:
        for outcome in federation(participation=participation):
            assert len(outcome.accepted + outcome.refused + outcome.failed) == count

    def test_the_draw_is_by_the_seed_and_the_round(self) -> None:
        def who(outcome: Outcome) -> list[str]:
            answers = outcome.accepted + outcome.refused + outcome.failed
            return sorted(answer.contributor for answer in answers)

        names = [f"site-{number}" for number in range(1, 11)]
        for seed in (0, 1):
            for outcome in federation(participation=3, seed=seed):
                assert who(outcome) == sorted(draw_contributors(names, 3, seed, outcome.round))

    @pytest.mark.parametrize("participation", [0, 11, -1, 0.0, 1.1, -0.5, math.nan, True, "all"])
    def test_one_without_meaning_is_a_usage_error(self, participation: Any) -> None:
        with pytest.raises(UsageError, match="participation: expected a number of clients from 1"):
            federation(participation=participation)


class TestOverSelection:
    """More are asked than are wanted, and no more are taken."""

    @pytest.mark.parametrize(
        ("participation", "factor", "wanted", "asked"),
        [(5, 1, 5, 5), (5, 1.0, 5, 5), (5, 1.1, 5, 6), (5, 1.6, 5, 8),
         (10, 1.1, 10, 10), (0.3, 3, 3, 9),
         (None, 2.0, 10, 10), (4, 1e9, 4, 10)],
    )  # fmt: skip
    def test_so_many_are_asked_and_so_many_taken(
        self, participation: Any, factor: float, wanted: int, asked: int
    ) -> None:
        clients = {f"site-{number}": adding(1) for number in range(1, 11)}
        notes = Notes()
        settings: dict[str, Any] = {"participation": participation, "over_selection": factor}
        for outcome in Federation(model(), clients, 2, observers=[notes], **settings):
            assert len(outcome.accepted) == wanted
            assert len(outcome.not_needed) == asked - wanted
        assert [len(told) - 1 for what, told in notes.told if what == "started"] == [asked] * 2

    def test_without_failures_it_does_not_show(self) -> None:
        clients = {f"site-{number}": adding(number) for number in range(1, 11)}
        plain = Federation(model(), clients, 4, participation=4, seed=3).run()
        spare = Federation(model(), clients, 4, participation=4, seed=3, over_selection=2).run()
        for a, b in zip(plain, spare, strict=True):
            assert same_bits(a.model, b.model)
            assert a.accepted == b.accepted
            drawn = set(draw_contributors(clients, 8, 3, a.round))
            assert drawn == {*b.not_needed, *(receipt.contributor for receipt in b.accepted)}

    def test_spare_clients_stand_in_for_those_that_fail_or_are_refused(self) -> None:
        clients = {f"site-{number}": adding(number) for number in range(1, 11)}
        first, second, *_ = draw_contributors(clients, 4, 0, 0)
        clients[first] = adding(math.nan)
        clients[second] = lambda params, context: None  # type: ignore[assignment, return-value]
        fed = Federation(model(), clients, 1, participation=4, over_selection=1.75)
        (outcome,) = fed
        assert len(outcome.accepted) == 4
        assert [receipt.contributor for receipt in outcome.refused] == [first]
        assert [failure.contributor for failure in outcome.failed] == [second]
        asked = draw_contributors(clients, 7, 0, 0)
        answered = {a.contributor for a in outcome.accepted + outcome.refused + outcome.failed}
        assert outcome.not_needed == tuple(name for name in asked if name not in answered)
        assert len(outcome.not_needed) == 1

    def test_who_is_not_needed_is_not_run_in_line(self) -> None:
        ran = []

        def client(params: dict[str, Any], context: Context) -> TrainResult:
            ran.append(context.contributor)
            return TrainResult(params, 1)

        names = [f"site-{number}" for number in range(1, 11)]
        settings: dict[str, Any] = {"participation": 3, "over_selection": 3}
        (outcome,) = Federation(model(), dict.fromkeys(names, client), 1, **settings)
        assert ran == [receipt.contributor for receipt in outcome.accepted]

    @pytest.mark.parametrize(
        "make", [lambda: ThreadPoolExecutor(4), lambda: ProcessPoolExecutor(2)]
    )
    def test_the_outcomes_are_the_same_wherever_clients_run(
        self, make: Callable[[], Executor]
    ) -> None:
        fixed: dict[str, Any] = {"participation": 4, "over_selection": 1.8, "seed": 9}
        expected = federation(5, **fixed).run()
        assert any(outcome.failed or outcome.refused for outcome in expected)
        with make() as executor:
            found = federation(5, **fixed, executor=executor).run()
        for a, b in zip(expected, found, strict=True):
            assert same_bits(a.model, b.model)
            assert (a.accepted, a.refused, a.failed) == (b.accepted, b.refused, b.failed)
            assert a.not_needed == b.not_needed

    def test_a_straggler_is_not_waited_for_where_the_first_that_are_done_count(self) -> None:
        release = threading.Event()

        def straggler(params: dict[str, Any], context: Context) -> TrainResult:
            assert release.wait(30)
            return TrainResult(params, 1)

        clients = {"a": straggler, "b": adding(1), "c": adding(3), "d": straggler}
        with ThreadPoolExecutor(4) as executor:
            settings: dict[str, Any] = {"over_selection": 2.0, "first_come": True}
            fed = Federation(model(), clients, 1, participation=2, executor=executor, **settings)
            (outcome,) = fed
            release.set()
        assert {receipt.contributor for receipt in outcome.accepted} == {"b", "c"}
        assert set(outcome.not_needed) == {"a", "d"}
        assert outcome.failed == ()
        assert fed.model["b"].tolist() == [3.0, 3.0]

    def test_a_factor_of_numpy_counts_as_plain(self) -> None:
        assert Selection(list("abcdefghij"), 3, np.float64(1.1), 0).asked == 4

    @pytest.mark.parametrize("factor", [0.99, 0, -1, math.nan, math.inf, True, "2", 10**400])
    def test_a_factor_without_meaning_is_a_usage_error(self, factor: Any) -> None:
        with pytest.raises(
            UsageError, match=r"over_selection: expected a number from 1\.0 on, got"
        ):
            federation(participation=2, over_selection=factor)

    def test_a_run_with_another_factor_cannot_be_resumed(self, tmp_path: Path) -> None:
        federation(1, participation=2, checkpoint=tmp_path).run()
        with pytest.raises(UsageError, match="in clients asked, 2 to resume, got 4"):
            federation(2, participation=2, over_selection=2, checkpoint=tmp_path, resume=True)


class TestEvaluation:
    """What the new model is worth."""

    def test_it_is_in_the_outcome(self) -> None:
        def evaluate(params: dict[str, Any]) -> dict[str, Any]:
            return {"mean": params["b"].mean()}

        fed = Federation(model(), {"a": adding(1)}, 2, evaluate=evaluate)
        assert [outcome.evaluation for outcome in fed] == [{"mean": 2.0}, {"mean": 3.0}]

    def test_the_model_cannot_be_written_to(self) -> None:
        def evaluate(params: dict[str, Any]) -> dict[str, float]:
            with pytest.raises(ValueError, match="read-only"):
                params["b"][:] = 0
            params.clear()
            return {}

        (outcome,) = Federation(model(), {"a": adding(1)}, 1, evaluate=evaluate)
        assert outcome.model["b"].flags.writeable
        assert outcome.model["b"].tolist() == [2.0, 2.0]

    def test_it_is_made_every_so_many_rounds_and_in_the_last(self) -> None:
        outcomes = federation(8, evaluate=lambda params: {"x": 1}, evaluate_every=3).run()
        assert [o.round for o in outcomes if o.evaluation] == [2, 5, 7]

    def test_what_it_raises_ends_the_run_before_the_round_counts(self) -> None:
        calls = []

        def evaluate(params: dict[str, Any]) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no test data")
            return {}

        fed = Federation(model(), {"a": adding(1)}, 3, evaluate=evaluate)
        with pytest.raises(RuntimeError, match="no test data"):
            fed.run()
        assert fed.round == 1
        assert fed.model["b"].tolist() == [2.0, 2.0]
        assert [outcome.round for outcome in fed] == [1, 2]


class TestStopping:
    """Early, by the caller's word or for want of progress."""

    def test_it_stops_when_told_to(self) -> None:
        fed = federation(9, stop_when=lambda outcome: outcome.round == 2)
        assert len(fed.run()) == 3
        assert fed.stopped == "stop_when said so after round 2"
        assert fed.run() == []

    @pytest.mark.parametrize(
        ("mode", "values", "rounds", "best"),
        [
            ("max", [1, 2, 2, 1, 9], 4, 1),
            ("max", [1, 2, 1, 3, 0, 0], 6, 3),
            ("min", [1, 2, 2, 0], 3, 0),
            ("min", [3, 2, 1, 0], 4, 3),
            ("max", [1, math.nan, math.nan, 5], 3, 0),
            ("max", [math.nan, 1, math.inf, 0, 0], 5, 2),
        ],
    )
    def test_it_stops_without_progress(
        self, mode: Any, values: list[float], rounds: int, best: int
    ) -> None:
        fed = Federation(
            model(), {"a": adding(1)}, len(values), evaluate=scores(*values),
            monitor="score", mode=mode, patience=2,
        )  # fmt: skip
        outcomes = fed.run()
        assert len(outcomes) == rounds
        assert fed.best is not None
        assert (fed.best.round, fed.best.value) == (best, values[best])
        assert same_bits(fed.best.model, outcomes[best].model)
        if rounds < len(values):
            assert fed.stopped == "score was not better for 2 rounds"

    def test_a_metric_of_the_contributors_can_be_monitored(self) -> None:
        clients = {"a": adding(1, loss=2.0)}
        fed = Federation(model(), clients, 9, monitor="loss", mode="min", patience=3)
        assert len(fed.run()) == 4

    def test_the_evaluation_comes_before_the_contributors_word(self) -> None:
        fed = Federation(
            model(), {"a": adding(1, score=100)}, 2, evaluate=scores(1, 2), monitor="score"
        )
        fed.run()
        assert fed.best is not None
        assert fed.best.value == 2

    def test_a_round_without_the_metric_does_not_count(self) -> None:
        fed = Federation(
            model(), {"a": adding(1)}, 8, evaluate=scores(3, 2, 1, 0), evaluate_every=2,
            monitor="score", patience=2,
        )  # fmt: skip
        assert len(fed.run()) == 6

    def test_a_metric_that_no_round_has_is_told_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        clients = {"a": adding(1, loss=0.5)}
        assert Federation(model(), clients, 3, monitor="los", patience=1).run()[-1].round == 2
        assert caplog.messages == ["round 0 has no metric 'los' to monitor; it has 'loss'"]
        caplog.clear()
        evaluation = {"evaluate": scores(3, 2), "evaluate_every": 2}
        Federation(model(), clients, 4, **evaluation, monitor="score").run()  # type: ignore[arg-type]
        assert caplog.messages == []
        Federation(model(), clients, 2, evaluate=scores(1, 2), monitor="x").run()
        (told,) = caplog.messages
        assert told == "round 0 has no metric 'x' to monitor; it has 'loss', 'score'"


class Notes(Observer):
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def round_started(self, round: int, contributors: Sequence[str]) -> None:
        self.told.append(("started", (round, *contributors)))

    def update_judged(self, receipt: Receipt) -> None:
        self.told.append(("judged", (receipt.contributor, receipt.accepted)))

    def update_accepted(self, update: Update) -> None:
        self.told.append(("accepted", (update.contributor, update.weight)))

    def client_failed(self, failure: Failure) -> None:
        self.told.append(("failed", failure.contributor))

    def round_ended(self, outcome: Outcome) -> None:
        self.told.append(("ended", outcome.round))


class TestObservers:
    """They are told what happens."""

    def test_they_are_told_everything_in_order(self) -> None:
        def raising(params: dict[str, Any], context: Context) -> TrainResult:
            raise RuntimeError

        notes = Notes()
        clients = {"a": adding(1), "b": raising, "c": adding(math.nan)}
        Federation(model(), clients, 2, observers=[Observer(), notes]).run()
        assert notes.told == [
            event
            for round in range(2)
            for event in (
                ("started", (round, "a", "b", "c")),
                ("judged", ("a", True)),
                ("accepted", ("a", 1)),
                ("failed", "b"),
                ("judged", ("c", False)),
                ("ended", round),
            )
        ]


class TestStoringAndResuming:
    """Checkpoints, and going on from them."""

    def test_each_round_is_stored(self, tmp_path: Path) -> None:
        fed = federation(checkpoint=tmp_path, evaluate=lambda params: {"x": 0.5})
        for outcome in fed:
            found = CheckpointStore(tmp_path).load()
            assert found.round == outcome.round + 1
            assert same_bits(found.model, outcome.model)
            assert found.metrics == {**outcome.metrics, "x": 0.5}

    def test_every_so_many_and_the_last_are_stored(self, tmp_path: Path) -> None:
        federation(5, checkpoint=tmp_path, checkpoint_every=2, keep=9).run()
        assert [load_checkpoint(path).round for path in CheckpointStore(tmp_path).paths()] == [
            2,
            4,
            5,
        ]

    def test_the_best_is_stored_and_kept(self, tmp_path: Path) -> None:
        fed = federation(
            6, checkpoint=tmp_path, keep=1, evaluate=scores(1, 5, 4, 3, 2, 1), monitor="score",
            checkpoint_every=9,
        )  # fmt: skip
        outcomes = fed.run()
        best = CheckpointStore(tmp_path).load_best()
        assert best is not None
        assert best.round == 2
        assert same_bits(best.model, outcomes[1].model)

    @pytest.mark.parametrize("stop", range(1, 6))
    @pytest.mark.parametrize("every", [1, 2])
    def test_a_resumed_run_ends_with_the_same_bits(
        self, tmp_path: Path, stop: int, every: int
    ) -> None:
        fixed: dict[str, Any] = {
            "participation": 0.6, "seed": 4, "monitor": "loss", "mode": "min", "patience": 4,
        }  # fmt: skip
        whole = federation(6, **fixed)
        expected = whole.run()
        stored: dict[str, Any] = {**fixed, "checkpoint": tmp_path, "checkpoint_every": every}
        for outcome in federation(6, **stored):
            if outcome.round + 1 == stop:
                break
        resumed = federation(6, **stored, resume=True)
        assert resumed.round <= stop
        rest = resumed.run()
        for a, b in zip(expected[::-1], rest[::-1], strict=False):
            assert same_bits(a.model, b.model)
            assert (a.round, a.metrics, a.accepted) == (b.round, b.metrics, b.accepted)
        assert same_bits(resumed.model, whole.model)
        assert resumed.stopped == whole.stopped
        assert whole.best is not None
        assert resumed.best is not None
        assert (resumed.best.round, resumed.best.value) == (whole.best.round, whole.best.value)
        assert same_bits(resumed.best.model, whole.best.model)

    def test_an_empty_folder_is_resumed_from_the_beginning(self, tmp_path: Path) -> None:
        assert len(federation(2, checkpoint=tmp_path, resume=True).run()) == 2

    def test_a_finished_run_has_nothing_left_and_can_be_made_longer(self, tmp_path: Path) -> None:
        federation(2, checkpoint=tmp_path).run()
        assert federation(2, checkpoint=tmp_path, resume=True).run() == []
        longer = federation(4, checkpoint=tmp_path, resume=True)
        assert [outcome.round for outcome in longer] == [2, 3]

    def test_a_run_that_stopped_early_stays_stopped(self, tmp_path: Path) -> None:
        stop: dict[str, Any] = {"stop_when": lambda outcome: True, "checkpoint": tmp_path}
        assert len(federation(4, **stop).run()) == 1
        resumed = federation(4, **stop, resume=True)
        assert resumed.run() == []
        assert resumed.stopped == "stop_when said so after round 0"

    def test_a_folder_that_is_in_use_is_not_overwritten(self, tmp_path: Path) -> None:
        federation(1, checkpoint=tmp_path).run()
        with pytest.raises(UsageError, match="resume=True to go on with the run that is stored in"):
            federation(1, checkpoint=tmp_path)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 1}, "seed 0 to resume, got 1"),
            ({"transfer": DIFF}, "transfer 'FULL' to resume, got 'DIFF'"),
            ({"participation": 3}, "participation, in updates, 10 to resume, got 3"),
            ({"clients": {"a": train}}, "other clients"),
            ({"clients": {f"x{n}": train for n in range(10)}}, "other clients"),
            ({"min_updates": 2}, "min_updates 1 to resume, got 2"),
            ({"accumulator": "float64"}, "accumulator 'exact' to resume, got 'float64'"),
            ({"limits": Limits(max_weight=5)}, "with limits: max_weight None to resume, got 5"),
            ({"monitor": "loss"}, "monitor None to resume, got 'loss'"),
            ({"mode": "min"}, "mode 'max' to resume, got 'min'"),
            ({"model": {"w": np.zeros(3)}}, r"key 'w': expected a model with .*, as it is stored"),
        ],
    )
    def test_another_run_cannot_be_resumed(
        self, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        federation(1, checkpoint=tmp_path).run()
        with pytest.raises(UsageError, match=named):
            federation(2, checkpoint=tmp_path, resume=True, **change)

    def test_a_round_that_could_not_be_stored_is_played_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = federation(4, monitor="loss", mode="min")
        whole.run()
        stopped = federation(4, monitor="loss", mode="min", checkpoint=tmp_path)
        real, saved = CheckpointStore.save, [0]

        def failing(store: CheckpointStore, checkpoint: Any) -> Any:
            saved[0] += 1
            if saved[0] == 2:
                raise KeyboardInterrupt
            return real(store, checkpoint)

        monkeypatch.setattr(CheckpointStore, "save", failing)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        assert stopped.round == 1
        assert [outcome.round for outcome in stopped.run()] == [1, 2, 3]
        assert same_bits(stopped.model, whole.model)
        resumed = federation(4, monitor="loss", mode="min", checkpoint=tmp_path, resume=True)
        assert same_bits(resumed.model, whole.model)
        assert resumed.best is not None
        assert whole.best is not None
        assert resumed.best.round == whole.best.round

    def test_the_model_need_not_be_given_again(self, tmp_path: Path) -> None:
        federation(2, checkpoint=tmp_path).run()
        resumed = federation(4, model=None, checkpoint=tmp_path, resume=True)
        resumed.run()
        whole = federation(4)
        whole.run()
        assert same_bits(resumed.model, whole.model)

    def test_a_damaged_checkpoint_is_an_error_and_never_a_new_beginning(
        self, tmp_path: Path
    ) -> None:
        federation(3, checkpoint=tmp_path).run()
        paths = CheckpointStore(tmp_path).paths()
        paths[-1].write_bytes(paths[-1].read_bytes()[:-9])
        with pytest.raises(CheckpointError) as error:
            federation(4, checkpoint=tmp_path, resume=True)
        assert error.value.newest_good == paths[-2]
        paths[-1].unlink()
        assert federation(4, checkpoint=tmp_path, resume=True).round == 2

    def test_a_best_model_that_is_gone_is_an_error(self, tmp_path: Path) -> None:
        fixed: dict[str, Any] = {"checkpoint": tmp_path, "monitor": "score"}
        federation(2, evaluate=scores(2, 1), **fixed).run()
        (tmp_path / "round-00000001-best.npz").unlink()
        with pytest.raises(CheckpointError, match="the best model of the run, that of round 0, is"):
            federation(3, evaluate=scores(2, 1), **fixed, resume=True)

    def test_other_checkpoints_are_a_usage_error(self, tmp_path: Path) -> None:
        CheckpointStore(tmp_path).save(Checkpoint(model(), 1))
        with pytest.raises(UsageError, match="its checkpoints are not those of a federation"):
            federation(2, checkpoint=tmp_path, resume=True)

    @pytest.mark.parametrize(
        "change",
        [
            {"waited": None},
            {"waited": -1},
            {"waited": True},
            {"stopped": 3},
            {"best": 3},
            {"best": [0]},
            {"best": [2, 1.0]},
            {"best": [-1, 1.0]},
            {"best": [0, "x"]},
            {"best": [0, math.nan]},
            {"best": [[], 1.0]},
            *("waited", "stopped", "best"),
        ],
    )
    def test_a_checkpoint_that_does_not_tell_how_the_run_was_going_is_an_error(
        self, tmp_path: Path, change: dict[str, Any] | str
    ) -> None:
        federation(2, checkpoint=tmp_path).run()
        store = CheckpointStore(tmp_path)
        found = store.load()
        extra = {**found.extra, **(change if isinstance(change, dict) else {})}
        if isinstance(change, str):
            del extra[change]
        path = store.save(Checkpoint(found.model, found.round, extra=extra))
        with pytest.raises(CheckpointError, match="does not tell as a federation does") as error:
            federation(3, checkpoint=tmp_path, resume=True)
        assert error.value.path == path

    def test_two_runs_cannot_share_a_folder(self, tmp_path: Path) -> None:
        first, second = (federation(2, checkpoint=tmp_path) for _ in range(2))
        rounds = iter(first)
        next(rounds)
        with pytest.raises(CheckpointError, match="another writer is at work"):
            second.run()
        assert len(list(rounds)) == 1


RUN = """
import json, sys, time
from fedavg_core.server_optimizer import FedAdam
from tests.test_federation import federation, train
def slow(params, context):
    time.sleep(0.002)
    return train(params, context)
names = [f"site-{number}" for number in range(1, 11)]
fed = federation(
    30, clients=dict.fromkeys(names, slow), participation=0.5, seed=8, monitor="loss",
    checkpoint=sys.argv[1], resume=True, keep=2, server_optimizer=FedAdam(),
)
print(fed.round, flush=True)
fed.run()
print("done", flush=True)
"""


def test_a_run_that_is_killed_and_resumed_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    whole = federation(30, participation=0.5, seed=8, monitor="loss", server_optimizer=FedAdam())
    whole.run()
    choice = random.Random(3)
    kills, number = 0, 0
    while kills < KILLS:
        folder, done = tmp_path / str(number), False
        number += 1
        while not done:
            child = subprocess.Popen(
                [sys.executable, "-c", RUN, str(folder)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            assert child.stdout is not None
            child.stdout.readline()
            if kills < KILLS:
                time.sleep(choice.random() * 0.4)
                child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
            child.stdout.close()
            code = child.wait()
            assert code in (0, -signal.SIGKILL)
            done = rest == "done\n"
            kills += code != 0
        found = CheckpointStore(folder).load()
        assert found.round == 30
        assert same_bits(found.model, whole.model)
        best = CheckpointStore(folder).load_best()
        assert best is not None
        assert whole.best is not None
        assert same_bits(best.model, whole.best.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: expected a whole number of at least 1, got 0"),
        ({"rounds": 2.0}, r"rounds: expected a whole number of at least 1, got 2\.0"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"evaluate_every": 0}, "evaluate_every: expected a whole number of at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected a whole number of at least 1"),
        ({"patience": 2}, "patience: expected the name of the metric to monitor"),
        ({"patience": 0, "monitor": "x"}, "patience: expected a whole number of at least 1"),
        ({"mode": "best"}, "mode: expected 'max' or 'min', got 'best'"),
        ({"clients": {}}, "clients: expected a mapping of at least one"),
        ({"clients": [train]}, "clients: expected a mapping"),
        (
            {"clients": {"a\n": train}},
            "clients: expected names of 1 to 256 printable characters, got",
        ),
        ({"model": [1.0]}, "model: expected a model as a mapping from names to arrays, got a list"),
        ({"model": {}}, "model: expected at least one parameter, got none"),
        (
            {"model": {"w": np.array([[0.0], [math.inf]])}},
            re.escape("model: key 'w': expected finite numbers, got inf at [1, 0]"),
        ),
        ({"executor": 4}, "executor: expected one of concurrent.futures"),
        ({"accumulator": Krum(9)}, "accumulator: a krum needs at least 21 updates a round, got 10"),
        ({"accumulator": "median"}, "robust mean, such as TrimmedMean"),
        ({"observers": Observer()}, "observers: expected a list of observers"),
        ({"observers": np.array(5)}, "observers: expected a list of observers, got array"),
        ({"observers": [5]}, re.escape("observers: expected a list of observers, got [5]")),
        ({"resume": "no"}, "resume: expected True or False, got 'no'"),
        ({"resume": True}, "resume: expected the folder of the run as well"),
        ({"checkpoint": ""}, "checkpoint: expected a path, got ''"),
        ({"checkpoint": 3}, "checkpoint: expected a path, got 3"),
        ({"model": None, "transfer": DIFF}, "differences need a model"),
        ({"transfer": "HALF"}, "transfer: expected FULL, DIFF or None, got 'HALF'"),
        ({"clients": {"a": 3}}, "clients: expected a function for each name, got 3 for 'a'"),
        ({"evaluate": 3}, "evaluate: expected a function or None, got 3"),
        ({"monitor": 3}, "monitor: expected the name of a metric, got 3"),
        ({"stop_when": "never"}, "stop_when: expected a function or None, got 'never'"),
        ({"min_updates": 0}, "min_updates: expected a whole number of at least 1"),
        (
            {"min_updates": 99},
            "min_updates: expected at most the [0-9]+ clients of a round, got 99",
        ),
        ({"accumulator": "half"}, "expected accumulator 'exact'"),
        ({"retries": -1}, "retries: expected a whole number of at least 0"),
        ({"deadline": 1.0}, "deadline: expected an executor as well"),
    ],
)
def test_an_argument_without_meaning_is_a_usage_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        federation(**change)


@pytest.mark.parametrize("worth", ["good", 0.5, {"accuracy": "good"}, {"accuracy": 10**400}, None])
def test_an_evaluation_that_is_no_mapping_of_numbers_is_a_usage_error(worth: Any) -> None:
    with pytest.raises(UsageError, match="evaluate: expected a mapping from names to numbers, got"):
        federation(evaluate=lambda model: worth).run()


def test_the_settings_that_are_stored_are_json() -> None:
    settings = federation(limits=Limits(roster=frozenset({"site-1"})))._settings()
    assert json.loads(json.dumps(settings)) == settings
