"""The next global model: the mean of a round's updates, or a server optimizer's step towards it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.accumulator import WeightedMean
from fedavg_core.errors import UsageError, quoted
from fedavg_core.model import ModelSpec, Params, copy_params
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.server_optimizer import ServerOptimizer
from fedavg_core.update import TransferType

__all__ = ["mean_change", "next_model"]

Model: TypeAlias = dict[str, npt.NDArray[Any]]


def next_model(
    sums: WeightedMean | RobustMean,
    model: Params,
    spec: ModelSpec,
    transfer: TransferType | None,
    optimizer: ServerOptimizer | None,
    state: Params,
) -> tuple[Model, Model]:
    """What becomes of a model, given the updates that were made from it.

    Args:
        sums: The updates, at least one; only read.
        model: The model; only read. Empty if the updates are the first models.
        spec: The part of it that is averaged.
        transfer: What the updates' arrays are.
        optimizer: The server optimizer; None: the mean is the next model.
        state: Its state; only read.

    Returns:
        The next model, as new arrays, with the parameters of the model in its order; and the next
        state of the optimizer. Parameters that no update brought keep their values and their state.

    Raises:
        OutOfRange: A value is beyond the largest number of its dtype.
        UsageError: The accumulator is one for models of other dtypes.
    """
    if not model:
        mean = sums.mean()
        return {key: mean[key] for key in sorted(mean)}, {}
    mean = _mean(sums, model, spec, transfer)
    if optimizer is None or optimizer.is_plain:
        return mean, {}
    return optimizer.update(model, mean, mean_change(sums, model, transfer), state)


def _mean(
    sums: WeightedMean | RobustMean, model: Params, spec: ModelSpec, transfer: TransferType | None
) -> Model:
    if transfer is TransferType.DIFF:
        mean = sums.mean(base={key: model[key] for key in spec})
    else:
        mean = sums.mean()
    for key, array in mean.items():
        if array.dtype != spec[key].dtype:
            raise UsageError(
                f"key {quoted(key)}: the accumulator gives {array.dtype}, and the model has "
                f"{spec[key].dtype}; make it with the spec of the model"
            )
    kept = copy_params({key: value for key, value in model.items() if key not in mean})
    return {key: mean[key] if key in mean else kept[key] for key in model}


def mean_change(
    sums: WeightedMean | RobustMean, model: Params, transfer: TransferType | None
) -> Model:
    """By how much the mean of some updates differs from the model that they were made from.

    It comes from the sums, since a mean that is rounded to the model's dtype says less of it.

    Args:
        sums: The updates; only read.
        model: The model, which has their parameters; only read.
        transfer: What the updates' arrays are.

    Returns:
        For each parameter that some update brought, and that is no integer, Δ, rounded once to
        float64; new arrays.

    Raises:
        OutOfRange: A difference is beyond the largest number of float64.
    """
    start = {}
    spec = ModelSpec.of({key: model[key] for key in sums.keys})
    for key, one in spec.items():
        if transfer is TransferType.DIFF or one.number.kind == "integer":
            start[key] = np.zeros(one.shape)
        else:
            start[key] = -np.asarray(model[key], np.float64)
    change = sums.mean(base=start)
    return {key: change[key] for key, one in spec.items() if one.number.kind == "float"}
