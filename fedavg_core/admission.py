"""Whether what came can be used: updates, bases, models to begin with.

Names, kinds of arrays and shapes are looked at here. An update's values are not, where whoever adds
them looks on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.bad_element import not_finite
from fedavg_core.errors import Reason, RefusedUpdate, UsageError, a_type, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, check_array
from fedavg_core.plain import plain_list

__all__ = ["base_spec", "check_base", "check_finite", "check_model", "check_update", "pairs"]

Array: TypeAlias = npt.NDArray[Any]


def pairs(updates: Iterable[tuple[Params, float]]) -> list[tuple[Params, float]]:
    """See that updates to be added at once are such, each with a weight.

    Args:
        updates: Pairs of params and weight.

    Returns:
        The pairs.

    Raises:
        UsageError: They are not.
    """
    listed = plain_list(updates)
    if listed is None:
        raise UsageError(f"updates: expected pairs of params and weight, got {a_type(updates)}")
    for number, pair in enumerate(listed):
        got = a_type(pair)
        if isinstance(pair, tuple | list):
            if len(pair) == 2 and not isinstance(pair[1], Mapping):
                continue
            got = f"{got} of {' and '.join(map(a_type, pair)) or 'nothing'}"
        raise UsageError(f"updates[{number}]: expected a pair of params and weight, got {got}")
    return listed


def check_update(params: Params, spec: Mapping[str, ArraySpec], fixed: bool) -> dict[str, Array]:
    """Refuse what can be refused without reading the values; read the mapping, once.

    Args:
        params: What came for an update; only read.
        spec: What is known of the parameters.
        fixed: Whether it may have no others.

    Returns:
        The entries of ``params``, as plain arrays; these are borrowed.

    Raises:
        RefusedUpdate: It is not fit to be added, whatever its values.
    """
    if not isinstance(params, Mapping):
        raise RefusedUpdate(
            Reason.DTYPE,
            expected="a mapping from names to arrays",
            got=a_type(params),
        )
    params = dict(params)
    if not params:
        raise RefusedUpdate(Reason.MISSING_KEYS, expected="at least one parameter", got="none")
    for key, value in params.items():
        known = spec.get(key)
        if (
            known is not None
            and type(value) is np.ndarray
            and value.dtype == known.dtype
            and value.shape == known.shape
        ):
            continue  # as nearly all do: to check the rest takes longer than this
        array = params[key] = check_array(key, value)
        if known is None and fixed:
            raise RefusedUpdate(
                Reason.UNEXPECTED_KEYS, key=key, expected="parameters of the model", got="another"
            )
        if known is not None and array.shape != known.shape:
            raise RefusedUpdate(
                Reason.SHAPE, key=key, expected=f"shape {known.shape}", got=f"{array.shape}"
            )
    return params


def base_spec(base: Params) -> ModelSpec:
    """What a base looks like.

    Args:
        base: The base; its values are not read.

    Returns:
        Its spec.

    Raises:
        UsageError: It is no mapping of names to arrays of numbers.
    """
    try:
        return ModelSpec.of(base)
    except RefusedUpdate as refusal:
        raise UsageError(
            f"key {quoted(refusal.key)}: expected {refusal.expected} in the base, got {refusal.got}"
        ) from None


def check_base(
    base: Params, keys: Iterable[str], spec: Mapping[str, ArraySpec]
) -> dict[str, ArraySpec]:
    """See that the mean of some updates can be added to a base.

    Args:
        base: The base; its values are not read.
        keys: The parameters that some update brought.
        spec: What they look like.

    Returns:
        What the base looks like.

    Raises:
        UsageError: It is no model, lacks one of them, or has it in another shape.
    """
    targets = dict(base_spec(base))
    for key in keys:
        if key not in targets:
            raise UsageError(f"key {quoted(key)}: the base does not have it")
        if targets[key].shape != spec[key].shape:
            raise UsageError(
                f"key {quoted(key)}: expected a base of shape {spec[key].shape}, "
                f"got {targets[key].shape}"
            )
    return targets


def check_finite(params: Params) -> None:
    """See that all numbers of an update are finite.

    Args:
        params: The update; only read.

    Raises:
        RefusedUpdate: One is not (NON_FINITE).
    """
    for key, array in params.items():
        finite = np.isfinite(array)
        if not finite.all():
            raise not_finite(params, key, int(np.argmin(finite)))


def check_model(model: Params, what: str) -> None:
    """See that clients can begin with a model.

    Args:
        model: The model; only read.
        what: What a message is to call it.

    Raises:
        UsageError: It is no mapping of names to arrays of finite numbers, or has none.
    """
    try:
        if not ModelSpec.of(model):
            raise UsageError("expected at least one parameter, got none")
        check_finite(model)
    except RefusedUpdate as refusal:
        place = what if refusal.key is None else f"{what}: key {quoted(refusal.key)}"
        raise UsageError(f"{place}: expected {refusal.expected}, got {refusal.got}") from None
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
