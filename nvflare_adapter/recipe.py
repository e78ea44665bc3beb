# mypy: disable-error-code="misc"
"""The recipe: one call that makes an NVFlare job of federated averaging on NumPy arrays.

It takes the arguments of NVFlare's own ``NumpyFedAvgRecipe`` of version 2.7, with the same names
and defaults, and runs the ScatterAndGather controller with this package's aggregator, persistor and
shareable generator. Three things hold here that do not hold there:

* The initial model is the model that round 0 starts from, whatever it is made of. It travels as a
  file of the job, so that every bit and every dtype arrives.
* A custom aggregator may be a ``ModelAggregator`` as well as an ``Aggregator``.
* Arguments that contradict each other are an error here and now, and not a job that ends well and
  has learnt nothing.

Errors in the arguments are collected into one `UsageError`, a line for each: what was expected, and
what came.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from nvflare import FedJob
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.spec import Recipe
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

import fedavg_core as fc
from fedavg_core.errors import quoted
from nvflare_adapter.aggregator import CustomAggregator, FedAvgAggregator
from nvflare_adapter.persistor import CheckpointPersistor
from nvflare_adapter.shareable_generator import FedAvgShareableGenerator

__all__ = ["SINGLE_ARRAY_KEY", "NumpyFedAvgRecipe"]

SINGLE_ARRAY_KEY = "numpy_key"
"""The name of the only array of a model that has no names, as in NVFlare's own NumPy classes."""

_INITIAL_FILE = "initial_model.npz"
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

_AtLeastOne = Annotated[StrictInt, Field(ge=1)]


class _Arguments(BaseModel):
    """The recipe's arguments, checked one by one."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: StrictStr
    initial_model: Any
    min_clients: _AtLeastOne
    num_rounds: _AtLeastOne
    train_script: StrictStr
    train_args: StrictStr
    aggregator: Any
    aggregator_data_kind: Any
    launch_external_process: StrictBool
    command: StrictStr
    server_expected_format: Any
    params_transfer_type: Any
    seed: Annotated[StrictInt, Field(ge=0)]
    min_updates: _AtLeastOne
    accumulator: Literal["exact", "float64", "float32"]
    keep_checkpoints: _AtLeastOne
    poll_interval: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None

    @field_validator("name")
    @classmethod
    def _is_job_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError
        return name

    @field_validator("train_script")
    @classmethod
    def _is_python_file(cls, path: str) -> str:
        if not path.endswith(".py") or not Path(path).is_file():
            raise ValueError
        return path

    @field_validator("aggregator")
    @classmethod
    def _is_aggregator(cls, aggregator: Any) -> Any:
        if aggregator is not None and not isinstance(aggregator, Aggregator):
            raise ValueError
        return aggregator

    @field_validator("aggregator_data_kind")
    @classmethod
    def _is_data_kind(cls, kind: Any) -> Any:
        if kind is not None and _value(kind) not in ("WEIGHTS", "WEIGHT_DIFF"):
            raise ValueError
        return kind

    @field_validator("server_expected_format")
    @classmethod
    def _is_array_format(cls, exchange_format: Any) -> ExchangeFormat:
        if _value(exchange_format) not in ("numpy", "raw"):
            raise ValueError
        return ExchangeFormat(_value(exchange_format))

    @field_validator("params_transfer_type")
    @classmethod
    def _is_transfer_type(cls, transfer: Any) -> TransferType:
        if _value(transfer) not in ("FULL", "DIFF"):
            raise ValueError
        return TransferType(_value(transfer))

    @field_validator("initial_model")
    @classmethod
    def _is_model(cls, model: Any) -> dict[str, npt.NDArray[Any]] | None:
        return None if model is None else _as_model(model)


def _value(member: Any) -> Any:
    return getattr(member, "value", member)


def _as_model(given: Any) -> dict[str, npt.NDArray[Any]]:
    """A model out of an array, a list or a mapping; its arrays are the given ones where possible.

    Raises:
        ValueError: It is none of these; the message says what was expected and what came.
    """
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


class NumpyFedAvgRecipe(Recipe):
    """An NVFlare job of federated averaging, on NumPy arrays, with the exact mean.

    Args:
        name: Name of the job.
        initial_model: The model that round 0 starts from: an array or a list (one parameter, named
            ``"numpy_key"``), or a dict of arrays. A list is taken as float64. None: the clients
            start from their own, and the first round's mean is the first global model.
        min_clients: How many clients must have answered for a round to end.
        num_rounds: How many rounds to train.
        train_script: The training file that each client runs.
        train_args: Its command line arguments.
        aggregator: Combines the clients' results instead of the exact mean: an ``Aggregator`` or a
            ``ModelAggregator``. It travels as its class and its constructor's arguments.
        aggregator_data_kind: What clients send: ``WEIGHT_DIFF`` says the same as
            `params_transfer_type` DIFF, for clients that take the difference themselves.
        launch_external_process: Whether the training file runs in a process of its own.
        command: What starts that process.
        server_expected_format: How parameters travel: NUMPY, or RAW, which is the same here.
        params_transfer_type: FULL: clients send their models. DIFF: they send what has changed.
        seed: The seed of the job, from which each client's for each round is derived.
        min_updates: How many accepted updates it takes to change the model.
        accumulator: ``"exact"``, or ``"float64"`` or ``"float32"``, which depend on arrival order.
        keep_checkpoints: How many rounds' models to keep, the newest.
        poll_interval: How often server and clients look for each other's news, in seconds; None
            leaves it to NVFlare, which takes its time (up to 2 s). Small values suit a simulation.

    Raises:
        UsageError: Arguments are wrong; a line for each.
    """

    def __init__(
        self,
        *,
        name: str = "fedavg",
        initial_model: Any = None,
        min_clients: int,
        num_rounds: int = 2,
        train_script: str,
        train_args: str = "",
        aggregator: Aggregator | None = None,
        aggregator_data_kind: str | None = "WEIGHTS",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        server_expected_format: ExchangeFormat = ExchangeFormat.NUMPY,
        params_transfer_type: TransferType = TransferType.FULL,
        seed: int = 0,
        min_updates: int = 1,
        accumulator: str = "exact",
        keep_checkpoints: int = 3,
        poll_interval: float | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in _EXPECTED}
        checked = _checked(given)
        for key, value in checked:
            setattr(self, key, value)
        transfer = _transfer(checked)
        self._fed_job = _job(checked, transfer, self._initial_file(checked.initial_model))
        Recipe.__init__(self, self._fed_job)

    def _initial_file(self, model: dict[str, npt.NDArray[Any]] | None) -> Path | None:
        """The initial model as a file, which is there for as long as the recipe is."""
        if model is None:
            return None
        folder = Path(tempfile.mkdtemp(prefix="fedavg-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / _INITIAL_FILE
        fc.save_checkpoint(path, fc.Checkpoint(model, round=0, metrics={}, extra={}, arrays={}))
        return path


def _checked(given: dict[str, Any]) -> _Arguments:
    try:
        return _Arguments(**given)
    except ValidationError as errors:
        lines = {}
        for error in errors.errors(include_url=False):
            field = str(error["loc"][0])
            said = str(error.get("ctx", {}).get("error", ""))
            text = said or f"expected {_EXPECTED[field]}, got {_shown(given[field])}"
            lines.setdefault(field, f"{field}: {text}")
        raise fc.UsageError("\n".join(lines.values())) from None


def _shown(value: Any) -> str:
    simple = isinstance(value, (str, int, float, type(None)))
    return quoted(value) if simple else f"a {type(value).__name__}"


def _transfer(arguments: _Arguments) -> fc.TransferType:
    """What clients send, as the arguments say together.

    Raises:
        UsageError: They contradict each other.
    """
    kind = _value(arguments.aggregator_data_kind)
    diff = arguments.params_transfer_type == TransferType.DIFF or kind == "WEIGHT_DIFF"
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


def _job(arguments: _Arguments, transfer: fc.TransferType, initial: Path | None) -> FedJob:
    job = FedJob(name=arguments.name)
    job.set_app_packages(["fedavg_core", "nvflare_adapter"])
    if arguments.aggregator is None:
        aggregator: Aggregator = FedAvgAggregator(
            transfer.value, arguments.min_updates, arguments.accumulator
        )
    elif isinstance(arguments.aggregator, FedAvgAggregator):
        aggregator = arguments.aggregator
    else:
        custom_id = job.to_server(arguments.aggregator, id="custom_aggregator")
        aggregator = CustomAggregator(custom_id)
    persistor = CheckpointPersistor(
        initial_file="" if initial is None else initial.name, keep=arguments.keep_checkpoints
    )
    period = arguments.poll_interval
    controller = ScatterAndGather(
        min_clients=arguments.min_clients,
        num_rounds=arguments.num_rounds,
        wait_time_after_min_received=0,
        aggregator_id=job.to_server(aggregator, id="aggregator"),
        persistor_id=job.to_server(persistor, id="persistor"),
        shareable_generator_id=job.to_server(
            FedAvgShareableGenerator(transfer.value, arguments.seed), id="shareable_generator"
        ),
        allow_empty_global_weights=True,
        **({} if period is None else {"task_check_period": period}),
    )
    job.to_server(controller)
    if period is not None:
        job.to_server({"server": {"task_request_interval": period}})
    if initial is not None:
        if hasattr(job, "add_file_to_server"):
            job.add_file_to_server(str(initial), app_folder_type="config")
        else:  # nvflare 2.7.0: a folder's content goes to the app's custom folder
            job.to_server(str(initial.parent))
    job.to_clients(
        ScriptRunner(
            script=arguments.train_script,
            script_args=arguments.train_args,
            launch_external_process=arguments.launch_external_process,
            command=arguments.command,
            framework=FrameworkType.NUMPY,
            server_expected_format=arguments.server_expected_format,
            params_transfer_type=arguments.params_transfer_type,
        )
    )
    return job
