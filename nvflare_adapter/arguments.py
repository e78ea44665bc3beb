# mypy: disable-error-code="misc"
"""The recipe's arguments: what each may be, and what they mean together.

Errors are collected into one `UsageError`, a line for each: what was expected, and what came.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.job_config.script_runner import ScriptRunner
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
from fedavg_core.errors import a_type, quoted
from fedavg_core.server_optimizer import SERVER_OPTIMIZERS
from nvflare_adapter.aggregator import FedAvgAggregator
from nvflare_adapter.controller import direction
from nvflare_adapter.start import as_model, as_optimizer

__all__ = [
    "Arguments",
    "RunnerArguments",
    "check_together",
    "checked",
    "runner_keywords",
    "transfer_type",
]

_RUNNER_NAMES = {
    "train_script": "script",
    "train_args": "script_args",
    "client_memory_gc_rounds": "memory_gc_rounds",
}
"""What NVFlare's runner of a client's file calls arguments that have other names there."""

_OURS = [
    "exclude_vars",
    "aggregation_weights",
    "max_norm",
    "server_optimizer",
    "audit",
    "keep_open",
]
"""What the exact mean can do, and another aggregator is not asked to."""

_Kind = TypeVar("_Kind", bound=BaseModel)


def _value(member: Any) -> Any:
    """What an enumeration's member stands for, so that its bare value may be given as well."""
    return getattr(member, "value", member)


def _must(hold: Callable[[Any], Any]) -> AfterValidator:
    def check(value: Any) -> Any:
        try:
            if value is None or hold(value):
                return value
        except Exception as error:
            raise ValueError from error
        raise ValueError

    return AfterValidator(check)


def _says(expected: str) -> Any:
    return Field(description=expected)


_Model = Annotated[
    Any,
    AfterValidator(as_model),
    _says("an array, a list of numbers, a dict of arrays, or None"),
]
_Count = Annotated[StrictInt, Field(ge=1), _says("a whole number of at least 1")]
_CountOrZero = Annotated[StrictInt, Field(ge=0), _says("a whole number of at least 0")]
_Text = Annotated[StrictStr, _says("a string")]
_YesNo = Annotated[StrictBool, _says("True or False")]
_Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
_FileName = Annotated[
    StrictStr | None,
    _must(lambda name: Path(name).name == name and not name.startswith((".", "round-", "open_"))),
    _says("the name of a file of its own, without a folder, or None"),
]


class RunnerArguments(BaseModel):
    """How a client runs its file."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    train_script: Annotated[
        StrictStr,
        _must(lambda path: path.endswith(".py") and Path(path).is_file()),
        _says("the path of a Python file that exists"),
    ]
    train_args: _Text
    launch_external_process: _YesNo
    command: _Text
    server_expected_format: Annotated[
        ExchangeFormat,
        BeforeValidator(_value),
        _must(lambda one: one.value in ("numpy", "raw")),
        _says("ExchangeFormat.NUMPY or ExchangeFormat.RAW"),
    ]
    params_transfer_type: Annotated[
        TransferType, BeforeValidator(_value), _says("TransferType.FULL or TransferType.DIFF")
    ]
    launch_once: _YesNo
    shutdown_timeout: Annotated[
        float, Field(ge=0, strict=True, allow_inf_nan=False), _says("seconds of at least 0")
    ]
    client_memory_gc_rounds: _CountOrZero
    cuda_empty_cache: _YesNo


class Arguments(RunnerArguments):
    """The recipe's arguments, each in the type that it is used in."""

    name: Annotated[
        StrictStr,
        Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"),
        _says("a job name of letters, digits, '_', '-' and '.'"),
    ]
    model: _Model
    initial_model: _Model
    initial_ckpt: Annotated[
        StrictStr | None,
        _must(lambda path: Path(path).is_absolute() or Path(path).is_file()),
        _says("a file that exists here, the absolute path of one on the server, or None"),
    ]
    min_clients: _Count
    num_rounds: _Count
    aggregator: Annotated[
        Any,
        _must(lambda one: isinstance(one, Aggregator)),
        _says("an Aggregator, a ModelAggregator, or None"),
    ]
    aggregator_data_kind: Annotated[
        Literal["WEIGHTS", "WEIGHT_DIFF"] | None,
        BeforeValidator(_value),
        _says("DataKind.WEIGHTS, DataKind.WEIGHT_DIFF, or None"),
    ]
    per_site_config: Annotated[
        dict[Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], dict[str, Any]] | None,
        _must(lambda sites: sites and "server" not in sites),
        _says("a dict from clients' names to dicts of arguments, or None"),
    ]
    key_metric: _Text
    key_metric_mode: Annotated[Literal["max", "min"] | None, _says("'max', 'min', or None")]
    stop_cond: Annotated[
        StrictStr | None,
        _must(lambda text: direction(text)[0]),
        _says("'<metric> <op> <number>', or None"),
    ]
    patience: Annotated[_Count | None, _says("a whole number of at least 1, or None")]
    best_model_filename: _FileName
    save_filename: _FileName
    exclude_vars: Annotated[
        StrictStr | None, _must(re.compile), _says("a regular expression, or None")
    ]
    aggregation_weights: Annotated[
        dict[str, _Positive | StrictInt] | None,
        _must(lambda weights: all(weight > 0 for weight in weights.values())),
        _says("a dict from clients' names to numbers above 0, or None"),
    ]
    seed: _CountOrZero
    min_updates: _Count
    accumulator: Annotated[
        Literal["exact", "float64", "float32"], _says("'exact', 'float64' or 'float32'")
    ]
    max_norm: Annotated[_Positive | None, _says("a number above 0, or None")]
    server_optimizer: Annotated[
        Any,
        AfterValidator(as_optimizer),
        _says(f"one of {', '.join(SERVER_OPTIMIZERS)}, an optimizer of these kinds, or None"),
    ]
    audit: _YesNo
    deadline: Annotated[StrictInt | None, Field(ge=1), _says("seconds, at least 1, or None")]
    start_from: Annotated[
        Path | None,
        _must(lambda path: path.exists()),
        _says("a checkpoint, or a folder of them, that exists here, or None"),
    ]
    keep_checkpoints: _Count
    keep_open: _YesNo
    poll_interval: Annotated[_Positive | None, _says("seconds above 0, or None")]


def checked(kind: type[_Kind], given: Mapping[str, Any], place: str = "") -> _Kind:
    """Check arguments one by one.

    Args:
        kind: Which.
        given: All of them, by name, and anything else.
        place: What an error's line is to begin with.

    Returns:
        The arguments in the types that they are used in.

    Raises:
        UsageError: Some are wrong; a line for each.
    """
    try:
        return kind(**{name: given[name] for name in kind.model_fields})
    except ValidationError as errors:
        lines: dict[str, str] = {}
        for error in errors.errors(include_url=False):
            field = str(error["loc"][0])
            said = str(error.get("ctx", {}).get("error", ""))
            expected = f"expected {kind.model_fields[field].description}"
            told = said.startswith(("expected", "key"))
            text = said if told else f"{expected}, got {_shown(given[field])}"
            lines.setdefault(field, f"{place}{field}: {text}")
        raise fc.UsageError("\n".join(lines.values())) from None


def _shown(value: Any) -> str:
    simple = isinstance(value, (str, int, float, type(None)))
    return quoted(value) if simple else a_type(value)


def check_together(arguments: Arguments) -> None:
    """See that no argument asks for what another, or this version of NVFlare, does not allow.

    Args:
        arguments: The arguments.

    Raises:
        UsageError: One does.
    """
    ours = isinstance(arguments.aggregator, FedAvgAggregator)
    needed = arguments.aggregator.min_updates if ours else arguments.min_updates
    if needed > arguments.min_clients:
        raise fc.UsageError(
            f"min_updates: expected at most min_clients, {arguments.min_clients}, with which a "
            f"round closes, got {needed}"
        )
    for name in _OURS:
        if arguments.aggregator is not None and getattr(arguments, name):
            raise fc.UsageError(f"{name}: expected none beside an aggregator, which is its own")
    names = arguments.best_model_filename, arguments.save_filename
    if None not in names and names[0] != names[1]:
        raise fc.UsageError(f"save_filename: expected {quoted(names[0])}, got {quoted(names[1])}")
    if arguments.patience is not None and not (arguments.stop_cond or arguments.key_metric):
        raise fc.UsageError("patience: expected a stop_cond or a key_metric to go by, got neither")
    runner_keywords(arguments)


def runner_keywords(arguments: RunnerArguments) -> dict[str, Any]:
    """The arguments of NVFlare's runner of a client's file.

    Args:
        arguments: The recipe's.

    Returns:
        Those that the runner of this version of NVFlare has.

    Raises:
        UsageError: It lacks one that is asked for.
    """
    known = inspect.signature(ScriptRunner).parameters
    keywords = {}
    for field in RunnerArguments.model_fields:
        value, name = getattr(arguments, field), _RUNNER_NAMES.get(field, field)
        if name in known:
            keywords[name] = value
        elif value != (field == "launch_once"):
            needed = f"nvflare {version('nvflare')} cannot do that"
            raise fc.UsageError(f"{field}: expected none, as {needed}, got {_shown(value)}")
    return keywords


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
    given = arguments.model, arguments.initial_model, arguments.initial_ckpt, arguments.start_from
    if arguments.model is not None and arguments.initial_model is not None:
        raise fc.UsageError(
            "initial_model: expected model or initial_model, an older name for it, got both"
        )
    if diff and all(one is None for one in given):
        raise fc.UsageError(
            "model: expected a model for the differences of DIFF to be taken from, got None"
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
