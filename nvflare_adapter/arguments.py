# mypy: disable-error-code="misc"
"""The recipe's arguments: what each may be, and what they mean together.

Errors are collected into one `UsageError`, a line for each: what was expected, and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.client.config import ExchangeFormat, TransferType
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

import fedavg_core as fc
from fedavg_core.errors import quoted
from nvflare_adapter.aggregator import FedAvgAggregator

__all__ = ["SINGLE_ARRAY_KEY", "Arguments", "check_min_updates", "checked", "transfer_type"]

SINGLE_ARRAY_KEY = "numpy_key"
"""The name of the only array of a model that has no names, as in NVFlare's own NumPy classes."""

_EXPECTED = {
    "name": "a job name of letters, digits, '_', '-' and '.'",
    "initial_model": "an array, a list of numbers, a dict of arrays, or None",
    "min_clients": "an integer of at least 1",
    "num_rounds": "an integer of at least 1",
    "train_script": "the path of a Python file that exists",
    "train_args": "a string",
    "aggregator": "an Aggregator, a ModelAggregator, or None",
    "aggregator_data_kind": "DataKind.WEIGHTS, DataKind.WEIGHT_DIFF, or None",
    "launch_external_process": "True or False",
    "command": "a string",
    "server_expected_format": "ExchangeFormat.NUMPY or ExchangeFormat.RAW",
    "params_transfer_type": "TransferType.FULL or TransferType.DIFF",
    "seed": "an integer of at least 0",
    "min_updates": "an integer of at least 1",
    "accumulator": "'exact', 'float64' or 'float32'",
    "keep_checkpoints": "an integer of at least 1",
    "poll_interval": "seconds above 0, or None",
}


def _value(member: Any) -> Any:
    """What an enumeration's member stands for, so that its bare value may be given as well."""
    return getattr(member, "value", member)


def _must(hold: Callable[[Any], bool]) -> AfterValidator:
    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError
        return value

    return AfterValidator(check)


_AtLeastOne = Annotated[StrictInt, Field(ge=1)]


class Arguments(BaseModel):
    """The recipe's arguments, each in the type that it is used in."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    initial_model: Annotated[Any, AfterValidator(lambda given: _as_model(given))]
    min_clients: _AtLeastOne
    num_rounds: _AtLeastOne
    train_script: Annotated[
        StrictStr, _must(lambda path: path.endswith(".py") and Path(path).is_file())
    ]
    train_args: StrictStr
    aggregator: Annotated[Any, _must(lambda one: one is None or isinstance(one, Aggregator))]
    aggregator_data_kind: Annotated[
        Literal["WEIGHTS", "WEIGHT_DIFF"] | None, BeforeValidator(_value)
    ]
    launch_external_process: StrictBool
    command: StrictStr
    server_expected_format: Annotated[
        ExchangeFormat, BeforeValidator(_value), _must(lambda one: one.value in ("numpy", "raw"))
    ]
    params_transfer_type: Annotated[TransferType, BeforeValidator(_value)]
    seed: Annotated[StrictInt, Field(ge=0)]
    min_updates: _AtLeastOne
    accumulator: Literal["exact", "float64", "float32"]
    keep_checkpoints: _AtLeastOne
    poll_interval: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


def _as_model(given: Any) -> dict[str, npt.NDArray[Any]] | None:
    """A model out of an array, a list or a mapping; its arrays are the given ones where possible.

    Raises:
        ValueError: It cannot be one; the message says what was expected and what came, and is
            empty where it is none of these.
    """
    if given is None:
        return None
    if not isinstance(given, (Mapping, list, tuple, np.ndarray, np.generic)):
        raise ValueError
    named = dict(given) if isinstance(given, Mapping) else {SINGLE_ARRAY_KEY: given}
    if not named:
        raise ValueError("expected at least one array, got an empty dict")
    model = {}
    for key, value in named.items():
        if isinstance(value, (list, tuple)):
            value = _array_of_numbers(key, value)
        elif isinstance(value, np.generic):
            value = np.asarray(value)
        model[key] = value
    try:
        fc.ModelSpec.of(model)
    except fc.RefusedUpdate as refusal:
        place = "" if refusal.key is None else f"key {quoted(refusal.key)}: "
        raise ValueError(f"{place}expected {refusal.expected}, got {refusal.got}") from None
    for key, array in model.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"key {quoted(key)}: expected finite numbers, got NaN or infinity")
    return model


def _array_of_numbers(key: Any, numbers: Any) -> npt.NDArray[np.float64]:
    """A list, which says nothing of a dtype, as Python's own numbers: float64."""
    try:
        return np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"key {quoted(key)}: expected lists of numbers, all of one shape, got {quoted(numbers)}"
        ) from None


def checked(given: dict[str, Any]) -> Arguments:
    """Check the arguments one by one.

    Args:
        given: All of them, by name, and anything else.

    Returns:
        The arguments in the types that they are used in.

    Raises:
        UsageError: Some are wrong; a line for each.
    """
    given = {name: given[name] for name in _EXPECTED}
    try:
        return Arguments(**given)
    except ValidationError as errors:
        lines: dict[str, str] = {}
        for error in errors.errors(include_url=False):
            field = str(error["loc"][0])
            said = str(error.get("ctx", {}).get("error", ""))
            text = said or f"expected {_EXPECTED[field]}, got {_shown(given[field])}"
            lines.setdefault(field, f"{field}: {text}")
        raise fc.UsageError("\n".join(lines.values())) from None


def _shown(value: Any) -> str:
    simple = isinstance(value, (str, int, float, type(None)))
    return quoted(value) if simple else f"a {type(value).__name__}"


def check_min_updates(arguments: Arguments) -> None:
    """See that a round can have as many updates as it takes to change the model.

    Args:
        arguments: The arguments.

    Raises:
        UsageError: It cannot, as it closes when `min_clients` clients have answered.
    """
    ours = isinstance(arguments.aggregator, FedAvgAggregator)
    needed = arguments.aggregator.min_updates if ours else arguments.min_updates
    if needed > arguments.min_clients:
        raise fc.UsageError(
            f"min_updates: expected at most min_clients, {arguments.min_clients}, with which a "
            f"round closes, got {needed}"
        )


def transfer_type(arguments: Arguments) -> fc.TransferType:
    """What clients send, as the arguments say together.

    Args:
        arguments: The arguments.

    Returns:
        The transfer type that the server is to expect.

    Raises:
        UsageError: They contradict each other.
    """
    kind = arguments.aggregator_data_kind
    diff = arguments.params_transfer_type is TransferType.DIFF or kind == "WEIGHT_DIFF"
    transfer = fc.TransferType.DIFF if diff else fc.TransferType.FULL
    if diff and arguments.initial_model is None:
        raise fc.UsageError(
            "initial_model: expected a model for the differences of DIFF to be taken from, got None"
        )
    if isinstance(arguments.aggregator, FedAvgAggregator):
        wanted, expected = arguments.aggregator.transfer, transfer.value
    else:
        wanted = _value(getattr(arguments.aggregator, "expected_data_kind", None))
        expected = "WEIGHT_DIFF" if diff else "WEIGHTS"
    if isinstance(wanted, str) and wanted != expected:
        raise fc.UsageError(
            f"aggregator: expected one that takes {expected}, which the clients send, "
            f"got one that takes {quoted(wanted)}"
        )
    return transfer
