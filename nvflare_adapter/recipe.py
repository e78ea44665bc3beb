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
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy.typing as npt
from nvflare import FedJob
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.spec import Recipe

import fedavg_core as fc
from nvflare_adapter.aggregator import CustomAggregator, FedAvgAggregator
from nvflare_adapter.arguments import Arguments, check_min_updates, checked, transfer_type
from nvflare_adapter.persistor import CheckpointPersistor
from nvflare_adapter.shareable_generator import FedAvgShareableGenerator

__all__ = ["NumpyFedAvgRecipe"]

_INITIAL_FILE = "initial_model.npz"


class NumpyFedAvgRecipe(Recipe):
    """An NVFlare job of federated averaging, on NumPy arrays, with the exact mean.

    Args:
        name: Name of the job.
        initial_model: The model that round 0 starts from: an array or a list (one parameter, named
            ``"numpy_key"``), or a dict of arrays. A list is taken as float64. None: the clients
            start from their own, and the first round's mean is the first global model.
        min_clients: How many clients must have answered for a round to end. One whose training
            failed has answered.
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
        min_updates: How many accepted updates it takes to change the model; at most `min_clients`.
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
        arguments = checked(locals())
        check_min_updates(arguments)
        for key, value in arguments:
            setattr(self, key, value)
        initial = self._initial_file(arguments.initial_model)
        self._fed_job = _job(arguments, transfer_type(arguments), initial)
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


def _job(arguments: Arguments, transfer: fc.TransferType, initial: Path | None) -> FedJob:
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
