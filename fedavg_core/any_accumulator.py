"""Accumulators of any kind, weighted or robust: made, told by a name and options, and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.errors import RefusedUpdate, UsageError, quoted
from fedavg_core.model import ModelSpec, Params
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.robust.rules import robust_mean

__all__ = ["accumulator_for", "accumulator_from_state", "kind_of"]


def _of_settings(settings: Mapping[str, Any], spec: ModelSpec | None) -> RobustMean:
    """The robust mean of which these are the settings, or might be."""
    is_named = "name" in settings and all(isinstance(key, str) for key in settings)
    if not is_named or "spec" in settings:
        raise UsageError(f"robust mean: expected its name and its options, got {quoted(settings)}")
    return robust_mean(**settings, spec=spec)


def accumulator_for(
    kind: Accumulator | RobustMean | Mapping[str, Any], spec: ModelSpec | None
) -> WeightedMean | RobustMean:
    """An empty accumulator of some kind.

    Args:
        kind: The arithmetic of a weighted mean; or a robust mean that this one shall be like, or
            the settings of one.
        spec: As for the constructors.

    Returns:
        It, new.

    Raises:
        UsageError: There is no such kind.
    """
    if isinstance(kind, RobustMean):
        return kind.empty(spec)
    if isinstance(kind, Mapping):
        return _of_settings(kind, spec)
    return WeightedMean(spec, accumulator=kind)


def accumulator_from_state(
    meta: Mapping[str, Any], arrays: Params, spec: ModelSpec | None
) -> WeightedMean | RobustMean:
    """An accumulator of any kind that goes on from a state.

    Args:
        meta: The dictionary that its `state` gave.
        arrays: The arrays that it gave; copied.
        spec: As for a new one.

    Returns:
        A new accumulator, which holds the same.

    Raises:
        UsageError: This is no such state, or one of a robust mean that `robust_mean` does not know.
    """
    try:
        if isinstance(meta["accumulator"], str):
            return WeightedMean.from_state(meta, arrays, spec)
        mean = _of_settings(meta["accumulator"], spec)
        mean.take_up(meta, arrays)
        return mean
    except (
        AttributeError, ArithmeticError, LookupError, RefusedUpdate, TypeError, ValueError
    ) as error:  # fmt: skip
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"expected the state of an accumulator, got {quoted(error)}") from None


def kind_of(mean: WeightedMean | RobustMean) -> Accumulator | dict[str, Any]:
    """What `accumulator_for` makes another one like this of, as JSON can hold it.

    Args:
        mean: An accumulator.

    Returns:
        The arithmetic of a weighted mean; the settings of a robust one.
    """
    return mean.settings() if isinstance(mean, RobustMean) else mean.accumulator
