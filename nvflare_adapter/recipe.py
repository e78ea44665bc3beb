# mypy: disable-error-code="misc"
"""The recipe: one call that makes an NVFlare job of federated averaging on NumPy arrays.

It takes the arguments of NVFlare's own ``NumpyFedAvgRecipe``, those of 2.7 and those that came
until 2.9, with the same names and defaults, under any of these versions. It runs ScatterAndGather
with this package's aggregator, persistor and shareable generator. These things hold here that do
not hold there:

* The initial model is the model that round 0 starts from, whatever it is made of. It travels as a
  file of the job, so that every bit and every dtype arrives.
* A custom aggregator may be a ``ModelAggregator`` as well as an ``Aggregator``.
* The best model is kept, as a file that `fedavg_core.load_checkpoint` reads.
* Arguments that contradict each other are an error here and now, and not a job that ends well and
  has learnt nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare import FedJob
from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.job_def import ALL_SITES
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.widgets.convert_to_fed_event import ConvertToFedEvent
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.spec import Recipe

import fedavg_core as fc
from fedavg_core.errors import quoted
from nvflare_adapter.aggregator import FedAvgAggregator
from nvflare_adapter.arguments import (
    Arguments,
    RunnerArguments,
    check_together,
    checked,
    runner_keywords,
    transfer_type,
)
from nvflare_adapter.controller import FedAvgController, direction
from nvflare_adapter.custom_aggregator import CustomAggregator
from nvflare_adapter.persistor import BEST_FILE, CheckpointPersistor
from nvflare_adapter.shareable_generator import FedAvgShareableGenerator
from nvflare_adapter.start import SINGLE_ARRAY_KEY, read_start, resumed

__all__ = ["NumpyFedAvgRecipe"]


class NumpyFedAvgRecipe(Recipe):
    """An NVFlare job of federated averaging, on NumPy arrays, with the exact mean.

    Args:
        name: Name of the job.
        model: The model that round 0 starts from: an array or a list (one parameter, named
            ``"numpy_key"``), or a dict of arrays. A list is taken as float64. None: the clients
            start from their own, and the first round's mean is the first global model.
        initial_model: An older name for `model`.
        initial_ckpt: A model's npy, npz or safetensors file, or a checkpoint; it goes before
            both. A relative path is a file here, an absolute one is read by the server.
        min_clients: How many clients must have answered for a round to end. One whose training
            failed, or whose process was lost, has answered.
        num_rounds: How many rounds to train, in all.
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
        per_site_config: From a client's name to those arguments on how it runs its file that are
            others for it. The job then has these clients only.
        launch_once: Whether the process is started once, and not for every round.
        shutdown_timeout: How long it may take to end, in seconds.
        key_metric: The metric, a mean over the clients' own, that says which model is the best;
            ``""`` for no best model.
        key_metric_mode: Whether ``"max"`` or ``"min"`` is better. None: as `stop_cond` says, if it
            has the same metric, else ``"max"``.
        stop_cond: Stop after a round whose metrics meet it, such as ``"accuracy >= 0.9"``.
        patience: Stop after so many rounds whose metric was not better than the best: that of
            `stop_cond`, or the `key_metric`.
        best_model_filename: The best model's file, beside the rounds' checkpoints.
        save_filename: An older name for that.
        exclude_vars: A regular expression of the names of parameters that are not averaged.
        aggregation_weights: From a client's name to a factor of its weights; 1 for others.
        client_memory_gc_rounds: Collect garbage in the client each so many rounds; 0 for never.
        cuda_empty_cache: Whether to empty CUDA's cache then.
        seed: The seed of the job, from which each client's for each round is derived.
        min_updates: How many accepted updates it takes to change the model; at most `min_clients`.
        accumulator: ``"exact"``, or ``"float64"`` or ``"float32"``, which depend on arrival order.
        max_norm: The largest norm of what an update changes; one of a larger norm is refused.
        deadline: How many seconds a round waits for its clients, whole ones; None for ever.
        server_optimizer: What makes the next model of the mean, such as ``FedAdam(...)``, or its
            name. None: the mean is the next model.
        audit: Whether to store each round's audit, for ``fedavg verify``, beside its model.
        start_from: A checkpoint of another job, or the folder with its checkpoints: go on where it
            ended, with the bits that it would have had. Other arguments stay as they were.
        keep_checkpoints: How many rounds' models to keep, the newest.
        keep_open: Whether to keep, after each update, what a round has received so far, for a job
            that goes on in the middle of it. It is larger than the model.
        poll_interval: How often server and clients look for each other's news, in seconds; None
            leaves it to NVFlare, which takes its time (up to 2 s). Small values suit a simulation.

    Raises:
        UsageError: Arguments are wrong; a line for each.
        CheckpointError: A file that is to be read here is damaged.
    """

    framework = FrameworkType.RAW  # as NVFlare calls it where it asks

    def __init__(
        self,
        *,
        name: str = "fedavg",
        model: Any = None,
        initial_model: Any = None,
        initial_ckpt: str | None = None,
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
        per_site_config: Mapping[str, dict[str, Any]] | None = None,
        launch_once: bool = True,
        shutdown_timeout: float = 0.0,
        key_metric: str = "accuracy",
        key_metric_mode: str | None = None,
        stop_cond: str | None = None,
        patience: int | None = None,
        best_model_filename: str | None = None,
        save_filename: str | None = None,
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        seed: int = 0,
        min_updates: int = 1,
        accumulator: str = "exact",
        max_norm: float | None = None,
        deadline: int | None = None,
        server_optimizer: fc.ServerOptimizer | str | None = None,
        audit: bool = False,
        start_from: str | Path | None = None,
        keep_checkpoints: int = 3,
        keep_open: bool = False,
        poll_interval: float | None = None,
    ) -> None:
        arguments = checked(Arguments, locals())
        check_together(arguments)
        for key, value in arguments:
            setattr(self, key, value)
        self._arguments = arguments
        self._sites: dict[str, RunnerArguments] = {ALL_SITES: arguments}
        self._fed_job = FedJob(name=arguments.name)
        self._fed_job.set_app_packages(["fedavg_core", "nvflare_adapter"])
        self._prepare_server(self._fed_job, arguments, transfer_type(arguments))
        Recipe.__init__(self, self._fed_job)
        if arguments.per_site_config is not None:
            self._apply_per_site_config(arguments.per_site_config)
        if not hasattr(Recipe, "_prepare_client_apps"):  # nvflare before 2.9 does not ask for it
            self._prepare_client_apps()

    def _prepare_server(self, job: FedJob, arguments: Arguments, transfer: fc.TransferType) -> None:
        start = self._prepare_start(job, arguments, transfer)
        # For NVFlare an empty expression excludes nothing, as none does.
        limits = {"exclude": arguments.exclude_vars or None, "max_norm": arguments.max_norm}
        if arguments.aggregator is None:
            aggregator: Aggregator = FedAvgAggregator(
                transfer.value,
                arguments.min_updates,
                arguments.accumulator,
                {name: limit for name, limit in limits.items() if limit is not None},
                arguments.aggregation_weights,
                **_optimizer(arguments.server_optimizer),
                audit=arguments.audit,
                keep_open=arguments.keep_open,
            )
        elif isinstance(arguments.aggregator, FedAvgAggregator):
            aggregator = arguments.aggregator
        else:
            custom_id = job.to_server(arguments.aggregator, id="custom_aggregator")
            aggregator = CustomAggregator(custom_id)
        job.to_server(aggregator, id="aggregator")
        generator = FedAvgShareableGenerator(transfer.value, arguments.seed)
        job.to_server(generator, id="shareable_generator")
        stop_cond = arguments.stop_cond or ""
        watched, mode = direction(stop_cond) if stop_cond else ("", "max")
        if watched != arguments.key_metric:
            mode = "max"
        period = arguments.poll_interval
        controller = FedAvgController(
            min_clients=arguments.min_clients,
            num_rounds=arguments.num_rounds - start,
            start_round=start,
            key_metric=arguments.key_metric,
            key_metric_mode=arguments.key_metric_mode or mode,
            stop_cond=stop_cond,
            patience=arguments.patience or 0,
            train_timeout=arguments.deadline or 0,
            **({} if period is None else {"task_check_period": period}),
        )
        job.to_server(controller)
        if period is not None:
            job.to_server({"server": {"task_request_interval": period}})

    def _prepare_start(self, job: FedJob, arguments: Arguments, transfer: fc.TransferType) -> int:
        """Add the persistor, and the files of what the job starts from; say with which round."""
        best_name = arguments.best_model_filename or arguments.save_filename or BEST_FILE
        given = arguments.initial_model if arguments.model is None else arguments.model
        path, files = arguments.initial_ckpt or "", {}
        if arguments.start_from is not None:
            rounds, seed = arguments.num_rounds, arguments.seed
            job_now = {"num_rounds": rounds, "seed": seed, "transfer": transfer.value}
            files = resumed(arguments.start_from, best_name, job_now, given)
            # A round that is never used checks that the optimizer can go on with the state.
            start, optimizer = files["initial_file"], arguments.server_optimizer
            fc.Round(start.model, 0, server_optimizer=optimizer, optimizer_state=start.arrays)
        elif path and not Path(path).is_absolute():
            files["initial_file"] = read_start(Path(path))
        elif not path and given is not None:
            files["initial_file"] = fc.Checkpoint(given, round=0)
        self._persistor = CheckpointPersistor(
            keep=arguments.keep_checkpoints,
            best_model_filename=best_name,
            **{"initial_file": path, **{name: f"{name}.npz" for name in files}},
        )
        job.to_server(self._persistor, id="persistor")
        self._keys: list[str] = []
        if not files:
            return 0
        folder = Path(tempfile.mkdtemp(prefix="fedavg-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, checkpoint in files.items():
            file = folder / f"{name}.npz"
            fc.save_checkpoint(file, checkpoint)
            if hasattr(job, "add_file_to_server"):
                job.add_file_to_server(str(file), app_folder_type="config")
        if not hasattr(job, "add_file_to_server"):  # nvflare 2.7.0: they go to the custom folder
            job.to_server(str(folder))
        self._keys = sorted(files["initial_file"].model)
        return files["initial_file"].round

    def _apply_per_site_config(self, config: Mapping[str, dict[str, Any]]) -> None:
        """Check what is another for some clients; NVFlare's `set_per_site_config` calls it too."""
        most = self._arguments.min_clients
        if len(config) < most:
            expected = f"at least min_clients, {most}, clients"
            raise fc.UsageError(f"per_site_config: expected {expected}, got {len(config)}")
        common = {name: getattr(self._arguments, name) for name in RunnerArguments.model_fields}
        self._sites = {}
        for site, others in config.items():
            place = f"per_site_config: {site}: "
            for name, value in others.items():
                if name not in common:
                    raise fc.UsageError(f"{place}expected some of {', '.join(common)}, got {name}")
                if name == "params_transfer_type" and value not in (None, common[name]):
                    raise fc.UsageError(f"{place}{name}: expected that of all, {common[name]}")
            given = {name: value for name, value in others.items() if value is not None}
            self._sites[site] = checked(RunnerArguments, {**common, **given}, place)
        self.per_site_config = config

    def _prepare_client_apps(self) -> None:
        """Add what the clients run; NVFlare calls it, too."""
        for site, arguments in self._sites.items():
            runner = ScriptRunner(framework=FrameworkType.NUMPY, **runner_keywords(arguments))
            self._fed_job.to(runner, site)
            # What a training file tells NVFlare's trackers is to reach the server.
            self._fed_job.to(ConvertToFedEvent([ANALYTIC_EVENT_TYPE]), site, id="event_to_fed")

    def add_cse_validator_if_needed(self) -> None:
        """What NVFlare's `add_cross_site_evaluation` asks of a recipe.

        Its locator of the server's model reads one array from a file. Clients evaluate a model by
        their own training files, and not by NVFlare's validator, whose numbers are random.

        Raises:
            UsageError: The model has other parameters than that array.
        """
        if self._keys not in ([], [SINGLE_ARRAY_KEY]):
            raise fc.UsageError(
                f"add_cross_site_evaluation: expected a model of the array {SINGLE_ARRAY_KEY} "
                f"alone, got {quoted(self._keys)}"
            )
        self._persistor.numpy_file = "server.npy"


def _optimizer(given: fc.ServerOptimizer | None) -> dict[str, Any]:
    """The aggregator's arguments for it; NVFlare takes a dict with a name in it for a component."""
    settings = {} if given is None else given.settings()
    return {"server_optimizer": settings.pop("name", ""), "optimizer_settings": settings or None}
