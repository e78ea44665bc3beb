"""NVFlare's messages, there and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DXO
from nvflare.apis.fl_constant import ReservedKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs

import fedavg_core as fc
from fedavg_core.outcome import Failure
from nvflare_adapter import convert, global_model
from nvflare_adapter.assignment import Assignment
from tests.nvflare.server_side import Server, result
from tests.nvflare.training import mixed

pytestmark = pytest.mark.nvflare

ASSIGNMENT = Assignment(
    roster=["site-10", "site-1", "site-2"], round=3, num_rounds=7, seed=11, transfer="DIFF"
)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    return Server(tmp_path)


def over_the_wire(message: Any) -> Any:
    """What arrives of a message: NVFlare's own bytes, with the arrays as npy files in them."""
    from nvflare.app_common.decomposers import numpy_decomposers

    numpy_decomposers.register()
    return fobs.loads(fobs.dumps(message))


def test_a_model_of_every_dtype_reaches_the_client_to_the_bit() -> None:
    model = mixed.initial_model(5)
    sent = over_the_wire(convert.message_from_model(model, ASSIGNMENT))
    message = FLModelUtils.from_shareable(sent)
    assert fc.same_bits(convert.model_from_message(message), model)
    assert list(convert.model_from_message(message)) == list(model)
    assert convert.assignment_of(message) == ASSIGNMENT


def test_the_models_own_arrays_are_not_changed_by_sending_them() -> None:
    model = mixed.initial_model(5)
    convert.message_from_model(model, ASSIGNMENT)
    assert fc.same_bits(model, mixed.initial_model(5))


def test_no_model_reaches_the_client_as_an_empty_one() -> None:
    sent = over_the_wire(convert.message_from_model({}, ASSIGNMENT))
    assert convert.model_from_message(FLModelUtils.from_shareable(sent)) == {}


def test_the_context_is_that_of_a_federation_in_process() -> None:
    context = ASSIGNMENT.context("site-10")
    assert context == fc.Context(
        contributor="site-10",
        index=2,
        num_contributors=3,
        round=3,
        num_rounds=7,
        seed=fc.contributor_seed(11, 3, "site-10"),
    )


def test_a_client_that_is_not_on_the_roster_is_told_so() -> None:
    with pytest.raises(fc.UsageError, match=r"'site-9' is not among .*'site-1', 'site-2'"):
        ASSIGNMENT.context("site-9")


def test_a_server_that_assigns_nothing_is_named_as_the_problem() -> None:
    with pytest.raises(fc.UsageError, match="NumpyFedAvgRecipe"):
        convert.assignment_of(FLModel(params={}))


@pytest.mark.parametrize("transfer", list(fc.TransferType))
def test_an_update_reaches_the_server_with_all_that_it_says(
    server: Server, transfer: fc.TransferType
) -> None:
    trained = fc.Update(
        "site-1",
        4,
        mixed.initial_model(5),
        transfer=transfer,
        weight=np.int32(120),
        metrics={"loss": np.float16(0.5), "hits": np.int64(3), "name": "x", "odd": [1, 2]},
    )
    sent = convert.answer_to_fl_model(trained, transfer)
    assert sent.params_type == ParamsType(transfer.value)
    message = over_the_wire(FLModelUtils.to_shareable(sent))
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, 4)
    update = convert.answer_from_message(message, server.context())
    assert isinstance(update, fc.Update)
    assert (update.contributor, update.round, update.weight) == (None, 4, 120)
    assert update.transfer is transfer
    assert update.metrics == {"loss": 0.5, "hits": 3, "name": "x", "odd": "[1, 2]"}
    assert fc.same_bits(update.params, trained.params)


def test_a_failure_reaches_the_server_with_its_line(server: Server) -> None:
    failure = Failure("site-2", 3, "OSError: no disk (train.py, line 3)")
    for transfer in fc.TransferType:
        sent = FLModelUtils.to_shareable(convert.answer_to_fl_model(failure, transfer))
        message = over_the_wire(sent)
        message.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
        message.add_cookie(AppConstants.CONTRIBUTION_ROUND, 3)
        assert convert.answer_from_message(message, server.context()) == failure


@pytest.mark.parametrize("problem", ["a\nb", "x" * 10_000, 5, ["x"]])
def test_a_failures_line_is_one_line_whoever_sent_it(server: Server, problem: Any) -> None:
    sent = convert.answer_to_fl_model(Failure("?", 0, problem), fc.TransferType.FULL)
    message = FLModelUtils.to_shareable(sent)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: "site\n2"})
    failure = convert.answer_from_message(message, server.context())
    assert isinstance(failure, Failure)
    assert failure.contributor == r"'site\n2'"
    assert failure.problem.isprintable()
    assert len(failure.problem) <= 200


def test_an_update_without_a_weight_counts_once(server: Server) -> None:
    message = DXO("WEIGHTS", data={"w": np.ones(2)}).to_shareable()
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
    update = convert.answer_from_message(message, server.context())
    assert isinstance(update, fc.Update)
    assert update.weight == 1.0


def judged(message: Any, fl_ctx: Any, model: Any) -> Any:
    """What a round says of a message, as the aggregator would offer it."""
    update = convert.answer_from_message(message, fl_ctx)
    assert isinstance(update, fc.Update)
    return fc.Round(model, 0).offer(update)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (result({"w": 1}, kind="METRICS"), fc.Reason.TRANSFER),
        (result({"w": np.ones(2)}, round=None), fc.Reason.STALE_ROUND),
        (result({"w": np.ones(2)}, round="1"), fc.Reason.STALE_ROUND),
        (result({"w": np.ones(2)}, None), fc.Reason.BAD_NAME),
        (result({"w": np.ones(2)}, metrics=[1]), None),
        (result({"w": np.ones(2)}, metrics=np.ones(3)), None),
    ],
)
def test_what_is_no_update_is_left_for_the_gate_to_refuse(
    server: Server, message: Any, reason: Any
) -> None:
    receipt = judged(message, server.context(), {"w": np.ones(2)})
    assert receipt.reason is reason


@pytest.mark.parametrize("metrics", [np.ones(3), [1], [], 0, "loss"])
def test_metrics_that_are_no_mapping_are_left_out_by_name(server: Server, metrics: Any) -> None:
    message = result({"w": np.ones(2)}, metrics=metrics)
    receipt = judged(message, server.context(), {"w": np.ones(2)})
    assert receipt.accepted
    assert receipt.metrics == {}
    assert "metrics left out: <an object of type" in receipt.detail


def test_a_message_without_parameters_is_left_for_the_gate_to_refuse(server: Server) -> None:
    message = result({"w": np.ones(2)})
    del message["DXO"]
    receipt = judged(message, server.context(), {"w": np.ones(2)})
    assert receipt.reason is fc.Reason.DTYPE


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        (["w"], fc.Reason.DTYPE),
        (np.ones(3), fc.Reason.DTYPE),
        ({"w": "no_such_dtype"}, fc.Reason.DTYPE),
        ({"w": 3}, fc.Reason.DTYPE),
        ({"w": "float8_e4m3fn"}, fc.Reason.DTYPE),
        ({"v": "bfloat16"}, fc.Reason.DTYPE),
        ({"w": "__name__"}, fc.Reason.DTYPE),
        ({7: "bfloat16"}, fc.Reason.DTYPE),
    ],
)
def test_dtypes_that_make_no_sense_are_left_for_the_gate_to_refuse(
    server: Server, dtypes: Any, reason: Any
) -> None:
    message = result({"w": np.ones(2, dtype=np.uint16).view("V2")})
    message["DXO"]["meta"]["fedavg.dtypes"] = dtypes
    receipt = judged(message, server.context(), {"w": np.ones(2, dtype=np.uint16)})
    assert receipt.reason is reason


def test_the_sender_and_the_round_are_what_nvflare_says(server: Server) -> None:
    fl_ctx = server.context()

    def origin(contributor: Any, round: Any) -> Any:
        answer = convert.answer_from_message(result({}, contributor, round=round), fl_ctx)
        return answer.contributor, answer.round

    assert origin("site-7", 3) == ("site-7", 3)
    assert origin(None, None) == (None, None)
    fl_ctx.set_peer_context(server.context())
    assert origin(None, 0) == ("server", 0)


def test_a_result_of_some_keys_leaves_the_others_as_they_were() -> None:
    base = {"a": np.ones(2), "b": np.zeros(1)}
    new, extra = convert.model_from_result(
        DXO("WEIGHTS", data={"a": np.full(2, 5.0)}).to_shareable(), base
    )
    assert fc.same_bits(new, {"a": np.full(2, 5.0), "b": np.zeros(1)})
    assert extra == {"report": {"metrics": {}}}


@pytest.mark.parametrize("metrics", [{"loss": np.float32(0.5), "f": math.nan, "s": "x"}, [1], None])
def test_of_another_aggregators_metrics_the_finite_numbers_are_kept(metrics: Any) -> None:
    message = result({"a": np.ones(2)}, metrics=metrics)
    extra = convert.model_from_result(message, {})[1]
    assert extra == {"report": {"metrics": {"loss": 0.5} if isinstance(metrics, dict) else {}}}


def test_a_result_that_is_a_difference_is_added_to_a_new_model() -> None:
    base = {"a": np.ones(2), "b": np.zeros(1)}
    new, _ = convert.model_from_result(
        DXO("WEIGHT_DIFF", data={"a": np.full(2, 5.0)}).to_shareable(), base
    )
    assert fc.same_bits(new, {"a": np.full(2, 6.0), "b": np.zeros(1)})
    assert fc.same_bits(base, {"a": np.ones(2), "b": np.zeros(1)})


def test_a_result_that_is_no_parameters_is_refused() -> None:
    with pytest.raises(fc.UsageError, match="got 'METRICS'"):
        convert.model_from_result(DXO("METRICS", data={"a": 1}).to_shareable(), {})


def test_what_goes_with_the_model_stays_with_it() -> None:
    held = global_model.learnable({"a": np.ones(1)}, {"report": {"round": 2}})
    global_model.extra_of(held)["roster"] = ["site-1"]
    assert global_model.extra_of(held) == {"report": {"round": 2}, "roster": ["site-1"]}
    assert fc.same_bits(global_model.model_of(held), {"a": np.ones(1)})
    assert global_model.model_of(None) == {}
    assert global_model.extra_of(global_model.learnable({})) == {}
    assert global_model.extra_of(make_model_learnable({}, {})) == {}


def test_what_train_answers_in_place_of_names_and_numbers_does_not_end_the_client(
    server: Server,
) -> None:
    params: Any = [np.ones(2)]
    failed = convert.answer_to_fl_model(fc.Update("site-1", 0, params, 1), fc.TransferType.FULL)
    message = over_the_wire(FLModelUtils.to_shareable(failed))
    message.set_peer_props({ReservedKey.IDENTITY_NAME: "site-1"})
    answer = convert.answer_from_message(message, server.context())
    assert isinstance(answer, Failure)
    assert answer.problem == "expected params as a mapping from names to arrays, got a list"
    metrics: Any = None
    update = fc.Update("site-1", 0, {"w": np.ones(2)}, 1, metrics=metrics)
    assert not convert.answer_to_fl_model(update, fc.TransferType.FULL).metrics
