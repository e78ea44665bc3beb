"""NVFlare's data classes, and what they are here: the only module that knows both.

* The global model travels to the clients as a DXO of weights, with an `Assignment` in its meta.
* A client's update travels back as a DXO of weights or of a difference, its weight under NVFlare's
  own meta key for the number of steps, its metrics under NVFlare's for initial metrics. So updates
  of client scripts that know nothing of this package are read as well, and NVFlare's own
  aggregators read ours. A client that failed sends no arrays, and why.
* The aggregator's result, within the server, is a whole model, never a difference to be added.

Nothing here judges an update: what cannot be read has holes, and the core's gate refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy.typing as npt
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import fedavg_core as fc
from fedavg_core.errors import a_type, quoted
from fedavg_core.gate import is_name
from nvflare_adapter.assignment import Assignment
from nvflare_adapter.dtypes import finite, pack, plain, unpack

__all__ = [
    "answer_from_message",
    "answer_to_fl_model",
    "assignment_of",
    "fl_model_from_result",
    "has_failed",
    "message_from_fl_model",
    "message_from_model",
    "metrics_to_fl_model",
    "model_from_message",
    "model_from_result",
    "named_fl_model",
    "result_from_fl_model",
    "result_from_model",
]

_ASSIGNMENT = "fedavg.assignment"
_DTYPES = "fedavg.dtypes"
_FAILURE = "fedavg.failure"
_EXTRA = "fedavg.extra"
_LINE = 200
_TRANSFER_TYPES = {"WEIGHTS": fc.TransferType.FULL, "WEIGHT_DIFF": fc.TransferType.DIFF}

Arrays = dict[str, npt.NDArray[Any]]


def message_from_model(model: fc.Params, assignment: Assignment) -> Shareable:
    """The global model as the server sends it out.

    Args:
        model: The model; borrowed until it is sent. May be empty.
        assignment: What the clients are told along with it.

    Returns:
        NVFlare's message.
    """
    params, dtypes = pack(model)
    meta = {_ASSIGNMENT: asdict(assignment), _DTYPES: dtypes}
    return DXO(DataKind.WEIGHTS, data=params, meta=meta).to_shareable()


def model_from_message(message: FLModel) -> Arrays:
    """The global model as it reached a client.

    Args:
        message: What NVFlare's client API received.

    Returns:
        The model, its memory shared with the message; empty if clients start from their own.
    """
    model: Arrays = unpack(message.params or {}, message.meta.get(_DTYPES))
    return model


def assignment_of(message: FLModel) -> Assignment:
    """What the server told a client along with the model.

    Args:
        message: What NVFlare's client API received.

    Returns:
        The assignment.

    Raises:
        UsageError: The server does not run this package's shareable generator.
    """
    told = message.meta.get(_ASSIGNMENT)
    if told is None:
        problem = "the model came without the job's roster, rounds and seed"
        raise fc.UsageError(f"{problem}: serve() works under this package's NumpyFedAvgRecipe")
    return Assignment(**told)


def answer_to_fl_model(answer: fc.Update | fc.Failure, transfer: fc.TransferType) -> FLModel:
    """What a client sends back.

    Args:
        answer: Its update, whose arrays are borrowed until they are sent, or why it has failed.
        transfer: What it was to send.

    Returns:
        The argument for NVFlare's client API, which takes no difference from what is one. That of
        a failure is without arrays.
    """
    kind = ParamsType(transfer.value)
    if isinstance(answer, fc.Failure):
        return FLModel(kind, {}, meta={_FAILURE: answer.problem})
    given: object = answer.params
    if not isinstance(given, Mapping):
        problem = f"expected params as a mapping from names to arrays, got {a_type(given)}"
        return FLModel(kind, {}, meta={_FAILURE: problem})
    params, dtypes = pack(given)
    told: object = answer.metrics  # left out, as in process, if they are none
    return FLModel(
        params_type=kind,
        params=params,
        metrics=metrics_to_fl_model(told if isinstance(told, Mapping) else {}).metrics,
        meta={MetaKey.NUM_STEPS_CURRENT_ROUND: plain(answer.weight), _DTYPES: dtypes},
    )


def metrics_to_fl_model(metrics: Mapping[str, Any]) -> FLModel:
    """What a client answers that was asked what a model is worth.

    Args:
        metrics: What it found; empty if it cannot say.

    Returns:
        The argument for NVFlare's client API.
    """
    return FLModel(metrics={str(name): plain(value) for name, value in metrics.items()})


def _origin_of(message: Shareable, fl_ctx: FLContext) -> tuple[Any, Any]:
    """Who sent a client's result, as NVFlare knows it, and which round it answers, or None."""
    name = message.get_peer_prop(ReservedKey.IDENTITY_NAME, None)
    if name is None and fl_ctx.get_peer_context() is not None:
        name = fl_ctx.get_peer_context().get_identity_name()
    return name, message.get_cookie(AppConstants.CONTRIBUTION_ROUND)


def answer_from_message(message: Shareable, fl_ctx: FLContext) -> fc.Update | fc.Failure:
    """A client's result as the core's update, for the core's gate to judge.

    Args:
        message: A client's result, or whatever came instead.
        fl_ctx: The context in which it is offered.

    Returns:
        The update; its arrays are the message's, and what the message lacks is None. If it tells
        why the client has failed, or NVFlare sent it in the client's stead, the failure.
    """
    name, number = _origin_of(message, fl_ctx)
    shown = name if is_name(name) else quoted(name)
    if has_failed(message):
        code = quoted(message.get_return_code())
        return fc.Failure(shown, number, f"its NVFlare client answered {code}")
    try:
        dxo = from_shareable(message)
    except Exception:  # a foreign message may be anything
        return fc.Update(name, number, params=None, weight=1.0)  # type: ignore[arg-type]
    meta = dxo.meta or {}
    if _FAILURE in meta:
        problem = meta[_FAILURE]
        if not (isinstance(problem, str) and problem.isprintable() and len(problem) <= _LINE):
            problem = quoted(problem, _LINE)
        return fc.Failure(shown, number, problem)
    metrics = meta.get(MetaKey.INITIAL_METRICS)
    return fc.Update(
        contributor=name,
        round=number,
        params=unpack(dxo.data, meta.get(_DTYPES)),
        weight=meta.get(MetaKey.NUM_STEPS_CURRENT_ROUND, 1.0),
        transfer=_transfer_type(dxo.data_kind),
        metrics={} if metrics is None else metrics,
    )


def has_failed(message: Shareable) -> bool:
    """Whether NVFlare sent a result in the stead of a client, whose process is lost or failed.

    Args:
        message: A client's result.

    Returns:
        Whether it is no result. NVFlare's controllers do not offer such a one to an aggregator.
    """
    return message.get_return_code() not in (ReturnCode.OK, None)


def _transfer_type(kind: Any) -> Any:
    """The transfer type of a data kind; another kind as it is."""
    name = getattr(kind, "value", kind)
    return _TRANSFER_TYPES.get(name, name) if isinstance(name, str) else name


def named_fl_model(message: Shareable, fl_ctx: FLContext) -> FLModel:
    """A client's result for a user's aggregator: with the dtypes that it had before it was sent.

    Args:
        message: A client's result, which gets those dtypes in place.
        fl_ctx: The context in which it is offered.

    Returns:
        NVFlare's own form of it for a ``ModelAggregator``, with the name under
        ``meta["client_name"]`` and the round under ``meta["current_round"]``, where NVFlare's
        FedAvg controller puts them.

    Raises:
        ValueError: It is no DXO.
    """
    dxo = from_shareable(message)
    dxo.data = unpack(dxo.data, dxo.meta.pop(_DTYPES, None))
    dxo.update_shareable(message)
    model = FLModelUtils.from_shareable(message, fl_ctx)
    model.meta["client_name"], model.meta["current_round"] = _origin_of(message, fl_ctx)
    return model


def message_from_fl_model(model: FLModel, number: int | None) -> Shareable:
    """A client's result as NVFlare's FedAvg controller hands it on, in the form that it came in.

    Args:
        model: The result, with the name under ``meta["client_name"]``; borrowed.
        number: The round that is on, for a result that does not say which round it answers.

    Returns:
        The message, for `answer_from_message`.

    Raises:
        ValueError: There are neither parameters nor metrics in it.
    """
    message = FLModelUtils.to_shareable(model)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: (model.meta or {}).get("client_name")})
    answered = number if model.current_round is None else model.current_round
    message.add_cookie(AppConstants.CONTRIBUTION_ROUND, answered)
    return message


def result_from_model(model: fc.Params, extra: Mapping[str, Any]) -> Shareable:
    """A round's outcome as the aggregator hands it to the controller.

    Args:
        model: The whole new global model; borrowed.
        extra: What goes with it (see `nvflare_adapter.global_model.extra_of`).

    Returns:
        The result, for `model_from_result`.
    """
    meta = {_EXTRA: dict(extra), MetaKey.INITIAL_METRICS: dict(extra["report"]["metrics"])}
    return DXO(DataKind.WEIGHTS, data=dict(model), meta=meta).to_shareable()


def fl_model_from_result(result: Shareable) -> FLModel:
    """A round's outcome as a ``ModelAggregator`` hands it to NVFlare's FedAvg controller.

    Args:
        result: The result.

    Returns:
        The whole new global model and its metrics. What else goes with it stays here, as that
        controller would send it to the clients. Without a model, a difference that changes nothing.
    """
    model = FLModelUtils.from_shareable(result)
    model.meta = {}
    if not model.params:
        model.params_type = ParamsType.DIFF
    return model


def result_from_fl_model(model: FLModel | None) -> Shareable:
    """What a ``ModelAggregator`` made, as the controller takes it.

    Args:
        model: Its mean, a whole model or a difference; None or without parameters if it made none.

    Returns:
        The result, for `model_from_result`.
    """
    if model is None or not model.params:
        return DXO(DataKind.WEIGHTS, data={}, meta={}).to_shareable()
    return FLModelUtils.to_shareable(model)


def model_from_result(result: Shareable, base: fc.Params) -> tuple[Arrays, dict[str, Any]]:
    """The new global model out of any aggregator's result.

    Args:
        result: Parameters: a whole model, some of its keys, or a difference from the base.
        base: The global model of the round; only read.

    Returns:
        The new model, in which keys that the result lacks have the base's values (borrowed), and
        what goes with it; of another aggregator, a report of its metrics alone.

    Raises:
        UsageError: The result is of another kind, or a difference that does not fit the base.
        OutOfRange: Base and difference add up to more than the dtype can hold.
    """
    dxo = from_shareable(result)
    transfer = _transfer_type(dxo.data_kind)
    if transfer is fc.TransferType.FULL:
        model = {**base, **dxo.data}
    elif transfer is fc.TransferType.DIFF:
        model = fc.apply(base, dxo.data)
    else:
        raise fc.UsageError(f"expected parameters from the aggregator, got {quoted(transfer)}")
    meta = dxo.meta or {}
    return model, meta.get(_EXTRA) or {
        "report": {"metrics": finite(meta.get(MetaKey.INITIAL_METRICS))}
    }
