"""The recipe: its arguments, and the job that it makes."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DataKind
from nvflare.app_common.aggregators import InTimeAccumulateWeightedAggregator
from nvflare.app_common.np.recipes import NumpyFedAvgRecipe as NVFlaresRecipe
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.spec import Recipe
from nvflare.recipe.utils import add_cross_site_evaluation

import fedavg_core as fc
from fedavg_core.model import dtype_named
from nvflare_adapter import FedAvgAggregator, NumpyFedAvgRecipe
from tests.nvflare.custom_aggregators import Maximum, WithoutSecond
from tests.nvflare.training import mixed

pytestmark = pytest.mark.nvflare

SCRIPT = str(Path(mixed.__file__))
MODEL = {"w": np.ones((2, 2), dtype=np.float32)}

# The reference: NVFlare 2.7's NumpyFedAvgRecipe.
REFERENCE = {
    "name": "fedavg",
    "initial_model": None,
    "min_clients": inspect.Parameter.empty,
    "num_rounds": 2,
    "train_script": inspect.Parameter.empty,
    "train_args": "",
    "aggregator": None,
    "aggregator_data_kind": DataKind.WEIGHTS,
    "launch_external_process": False,
    "command": "python3 -u",
    "server_expected_format": ExchangeFormat.NUMPY,
    "params_transfer_type": TransferType.FULL,
}


def test_every_argument_of_the_installed_nvflares_own_recipe_is_there_with_its_default() -> None:
    theirs = dict(inspect.signature(NVFlaresRecipe).parameters)
    theirs.pop("save_filename", None)  # its default was a file of PyTorch's before 2.9
    ours = inspect.signature(NumpyFedAvgRecipe).parameters
    defaults = {name: ours[name].default for name in theirs}
    assert defaults == {name: parameter.default for name, parameter in theirs.items()}


def recipe(**arguments: Any) -> Any:
    return NumpyFedAvgRecipe(**{"min_clients": 2, "train_script": SCRIPT, **arguments})


def exported(folder: Path, **arguments: Any) -> Any:
    """The files of the job, as they are sent to the sites."""
    made = recipe(**arguments)
    made.export(str(folder))
    return Path(folder) / made.name / "app"


def server_config(app: Any) -> Any:
    return json.loads((app / "config" / "config_fed_server.json").read_text())


def test_every_argument_of_the_reference_is_there_with_its_default() -> None:
    parameters = inspect.signature(NumpyFedAvgRecipe).parameters
    defaults = {name: parameters[name].default for name in REFERENCE}
    assert defaults == REFERENCE
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_it_is_one_of_nvflares_recipes() -> None:
    assert isinstance(recipe(), Recipe)
    assert recipe(name="mine").name == "mine"


def test_the_arguments_can_be_read_back() -> None:
    made = recipe(num_rounds=7, train_args="--x 1", params_transfer_type="FULL")
    assert (made.min_clients, made.num_rounds, made.train_args) == (2, 7, "--x 1")
    assert made.params_transfer_type is TransferType.FULL


WRONG = [
    (
        {"name": "a/b"},
        "name: expected a job name of letters, digits, '_', '-' and '.', got 'a/b'",
    ),
    ({"min_clients": 0}, "min_clients: expected a whole number of at least 1, got 0"),
    ({"min_clients": True}, "min_clients: expected a whole number of at least 1, got True"),
    ({"min_clients": "2"}, "min_clients: expected a whole number of at least 1, got '2'"),
    ({"num_rounds": -1}, "num_rounds: expected a whole number of at least 1, got -1"),
    (
        {"train_script": "no/such.py"},
        "train_script: expected the path of a Python file that exists, got 'no/such.py'",
    ),
    (
        {"train_script": None},
        "train_script: expected the path of a Python file that exists, got None",
    ),
    (
        {"train_script": str(Path(SCRIPT).parent)},
        "train_script: expected the path of a Python file that exists, got",
    ),
    ({"train_args": 3}, "train_args: expected a string, got 3"),
    (
        {"aggregator": "mean"},
        "aggregator: expected an Aggregator, a ModelAggregator, or None, got 'mean'",
    ),
    (
        {"aggregator_data_kind": DataKind.METRICS},
        "aggregator_data_kind: expected DataKind.WEIGHTS, DataKind.WEIGHT_DIFF, or None, got",
    ),
    (
        {"launch_external_process": "yes"},
        "launch_external_process: expected True or False, got 'yes'",
    ),
    ({"command": ["python"]}, "command: expected a string, got a list"),
    (
        {"server_expected_format": "pytorch"},
        "server_expected_format: expected ExchangeFormat.NUMPY or ExchangeFormat.RAW, "
        "got 'pytorch'",
    ),
    (
        {"params_transfer_type": "HALF"},
        "params_transfer_type: expected TransferType.FULL or TransferType.DIFF, got 'HALF'",
    ),
    ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
    ({"min_updates": 0}, "min_updates: expected a whole number of at least 1, got 0"),
    (
        {"accumulator": "float16"},
        "accumulator: expected 'exact', 'float64' or 'float32', got 'float16'",
    ),
    ({"model": 3}, "model: expected an array, a list of numbers, a dict of arrays, or None, got 3"),
    (
        {"initial_ckpt": "no/such.npz"},
        "initial_ckpt: expected a file that exists here, the absolute path of one on the server, "
        "or None, got 'no/such.npz'",
    ),
    (
        {"per_site_config": {}},
        "per_site_config: expected a dict from clients' names to dicts of arguments, or None, got",
    ),
    (
        {"per_site_config": {"server": {}, "site-1": {}}},
        "per_site_config: expected a dict from clients' names to dicts of arguments, or None, got",
    ),
    (
        {"per_site_config": {"site-1": {}}},
        "per_site_config: expected at least min_clients, 2, clients, got 1",
    ),
    (
        {"per_site_config": {"site-1": {}, "site-2": {"seed": 3}}},
        "per_site_config: site-2: expected some of train_script, train_args,",
    ),
    (
        {"per_site_config": {"site-1": {}, "site-2": {"train_args": 3}}},
        "per_site_config: site-2: train_args: expected a string, got 3",
    ),
    (
        {"per_site_config": {"site-1": {}, "site-2": {"params_transfer_type": "DIFF"}}},
        "per_site_config: site-2: params_transfer_type: expected that of all,",
    ),
    ({"launch_once": 1}, "launch_once: expected True or False, got 1"),
    ({"shutdown_timeout": -1}, "shutdown_timeout: expected seconds of at least 0, got -1"),
    ({"key_metric": None}, "key_metric: expected a string, got None"),
    ({"key_metric_mode": "up"}, "key_metric_mode: expected 'max', 'min', or None, got 'up'"),
    ({"stop_cond": "loss"}, "stop_cond: expected '<metric> <op> <number>', or None, got 'loss'"),
    (
        {"stop_cond": "loss ~ 3"},
        "stop_cond: expected '<metric> <op> <number>', or None, got 'loss ~ 3'",
    ),
    ({"patience": 0}, "patience: expected a whole number of at least 1, or None, got 0"),
    (
        {"patience": 2, "key_metric": ""},
        "patience: expected a stop_cond or a key_metric to go by, got neither",
    ),
    (
        {"best_model_filename": "a/b"},
        "best_model_filename: expected the name of a file of its own, without a folder, or None, "
        "got 'a/b'",
    ),
    (
        {"save_filename": "round-00000001.npz"},
        "save_filename: expected the name of a file of its own, without a folder, or None, "
        "got 'round-00000001.npz'",
    ),
    (
        {"save_filename": "a", "best_model_filename": "b"},
        "save_filename: expected 'b', got 'a'",
    ),
    ({"exclude_vars": "("}, "exclude_vars: expected a regular expression, or None, got '('"),
    (
        {"aggregation_weights": {"site-1": 0}},
        "aggregation_weights: expected a dict from clients' names to numbers above 0, or None, got",
    ),
    (
        {"aggregation_weights": {"site-1": "2"}},
        "aggregation_weights: expected a dict from clients' names to numbers above 0, or None, got",
    ),
    (
        {"client_memory_gc_rounds": -1},
        "client_memory_gc_rounds: expected a whole number of at least 0, got -1",
    ),
    ({"cuda_empty_cache": "no"}, "cuda_empty_cache: expected True or False, got 'no'"),
    ({"max_norm": 0}, "max_norm: expected a number above 0, or None, got 0"),
    ({"deadline": 0.5}, "deadline: expected seconds, at least 1, or None, got 0.5"),
    (
        {"max_norm": 1.0, "aggregator": Maximum()},
        "max_norm: expected none beside an aggregator, which is its own",
    ),
    (
        {"server_optimizer": "sgd"},
        "server_optimizer: expected one of fedavg, fedavgm, fedadagrad, fedadam, fedyogi, "
        "an optimizer of these kinds, or None, got 'sgd'",
    ),
    (
        {"server_optimizer": type("Mine", (fc.FedAvg,), {})()},
        "server_optimizer: expected one of fedavg, fedavgm, fedadagrad, fedadam, fedyogi, "
        "an optimizer of these kinds, or None, got a Mine",
    ),
    ({"audit": 1}, "audit: expected True or False, got 1"),
    ({"audit": True, "aggregator": Maximum()}, "audit: expected none beside an aggregator"),
    (
        {"start_from": "no/such"},
        "start_from: expected a checkpoint, or a folder of them, that exists here, or None, "
        "got 'no/such'",
    ),
    ({"keep_open": 1}, "keep_open: expected True or False, got 1"),
    ({"keep_checkpoints": 0}, "keep_checkpoints: expected a whole number of at least 1, got 0"),
    ({"poll_interval": 0}, "poll_interval: expected seconds above 0, or None, got 0"),
    (
        {"initial_model": 3},
        "initial_model: expected an array, a list of numbers, a dict of arrays, or None, got 3",
    ),
    (
        {"initial_model": "weights"},
        "initial_model: expected an array, a list of numbers, a dict of arrays, or None, "
        "got 'weights'",
    ),
    (
        {"initial_model": {"w": "weights"}},
        "initial_model: key 'w': expected a NumPy array, got a str",
    ),
    ({"initial_model": {}}, "initial_model: expected at least one array, got an empty dict"),
    (
        {"initial_model": {"w": np.array(["a"])}},
        "initial_model: key 'w': expected an array of real numbers",
    ),
    (
        {"initial_model": {3: np.ones(1)}},
        "initial_model: expected parameter names that are strings, got 3",
    ),
    (
        {"initial_model": [[1, 2], [3]]},
        "initial_model: key 'numpy_key': expected lists of numbers, all of one shape, "
        "got [[1, 2], [3]]",
    ),
    (
        {"initial_model": ["x"]},
        "initial_model: key 'numpy_key': expected lists of numbers, all of one shape, got ['x']",
    ),
    (
        {"initial_model": np.array([1.0, np.nan])},
        "initial_model: key 'numpy_key': expected finite numbers, got NaN or infinity",
    ),
    (
        {"initial_model": {"w": np.array([np.nan], dtype_named("bfloat16"))}},
        "initial_model: key 'w': expected finite numbers, got NaN or infinity",
    ),
    (
        {"min_updates": 3},
        "min_updates: expected at most min_clients, 2, with which a round closes, got 3",
    ),
    (
        {"aggregator": FedAvgAggregator(min_updates=3)},
        "min_updates: expected at most min_clients, 2, with which a round closes, got 3",
    ),
    (
        {"model": [1.0], "initial_model": [1.0]},
        "initial_model: expected model or initial_model, an older name for it, got both",
    ),
    (
        {"params_transfer_type": "DIFF"},
        "model: expected a model for the differences of DIFF to be taken from, got None",
    ),
    (
        {"aggregator": FedAvgAggregator("DIFF")},
        "aggregator: expected one that takes FULL, which the clients send, "
        "got one that takes 'DIFF'",
    ),
    (
        {"aggregator": InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHT_DIFF")},
        "aggregator: expected one that takes WEIGHTS, which the clients send, "
        "got one that takes 'WEIGHT_DIFF'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_gets_one_line_with_what_was_expected_and_what_came(
    arguments: Any, message: Any
) -> None:
    with pytest.raises(fc.UsageError) as problem:
        recipe(**arguments)
    assert str(problem.value).startswith(message)
    assert "\n" not in str(problem.value)


def test_each_wrong_argument_gets_its_line() -> None:
    with pytest.raises(fc.UsageError) as problem:
        recipe(min_clients=0, num_rounds=0, accumulator="")
    assert [line.split(":")[0] for line in str(problem.value).splitlines()] == [
        "min_clients",
        "num_rounds",
        "accumulator",
    ]


def test_an_argument_that_is_left_out_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="train_script"):
        NumpyFedAvgRecipe(min_clients=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.ones((2, 3), np.float16), {"numpy_key": np.ones((2, 3), np.float16)}),
        ([[1, 2], [3, 16777217]], {"numpy_key": np.array([[1.0, 2.0], [3.0, 16777217.0]])}),
        ((0.1, 0.2), {"numpy_key": np.array([0.1, 0.2])}),
        (np.float32(3), {"numpy_key": np.array(3, np.float32)}),
        ({"a": [1.5], "b": np.arange(3)}, {"a": np.array([1.5]), "b": np.arange(3)}),
        (mixed.initial_model(1), mixed.initial_model(1)),
    ],
)
def test_the_initial_model_is_a_file_of_the_job_to_the_bit(
    tmp_path: Path, given: Any, expected: Any
) -> None:
    app = exported(tmp_path, initial_model=given)
    persistor = next(c for c in server_config(app)["components"] if c["id"] == "persistor")
    (shipped,) = app.rglob(persistor["args"]["initial_file"])
    assert fc.same_bits(fc.load_checkpoint(shipped).model, expected)


def test_the_initial_models_file_goes_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = recipe(initial_model=MODEL)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["initial_file.npz"]
    del made
    gc.collect()
    assert not folder.exists()


def built(component: Any) -> Any:
    """The component as NVFlare's server makes it, out of the job's JSON."""
    module, name = component["path"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**component["args"])


def components_of(app: Any) -> Any:
    """The server's components, as it makes them, by their ids."""
    return {one["id"]: built(one) for one in server_config(app)["components"]}


EVERYTHING = {
    "model": MODEL,
    "num_rounds": 9,
    "params_transfer_type": TransferType.DIFF,
    "key_metric": "loss",
    "key_metric_mode": "min",
    "stop_cond": "accuracy >= 0.9",
    "patience": 4,
    "best_model_filename": "champion.npz",
    "exclude_vars": "^n",
    "aggregation_weights": {"site-1": 0.5, "site-2": 3},
    "seed": 3,
    "min_updates": 2,
    "accumulator": "float64",
    "max_norm": 2.5,
    "server_optimizer": fc.FedAdam(learning_rate=0.25),
    "audit": True,
    "keep_checkpoints": 5,
    "keep_open": True,
    "poll_interval": 0.1,
}


def test_every_components_configuration_comes_back_from_the_jobs_json(tmp_path: Path) -> None:
    made = recipe(**EVERYTHING)
    made.export(str(tmp_path))
    config = server_config(tmp_path / made.name / "app")
    told = {one["id"]: one["args"] for one in [*config["components"], *config["workflows"]]}
    told["controller"] = told.pop(config["workflows"][0]["id"])
    assert told == {
        "aggregator": {
            "transfer": "DIFF",
            "min_updates": 2,
            "accumulator": "float64",
            "limits": {"exclude": "^n", "max_norm": 2.5},
            "aggregation_weights": {"site-1": 0.5, "site-2": 3},
            "server_optimizer": "fedadam",
            "optimizer_settings": {"learning_rate": 0.25, "beta1": 0.9, "tau": 1e-3, "beta2": 0.99},
            "audit": True,
            "keep_open": True,
        },
        "controller": {
            "min_clients": 2,
            "num_rounds": 9,
            "key_metric": "loss",
            "key_metric_mode": "min",
            "stop_cond": "accuracy >= 0.9",
            "patience": 4,
            "task_check_period": 0.1,
        },
        "persistor": {
            "initial_file": "initial_file.npz",
            "keep": 5,
            "best_model_filename": "champion.npz",
        },
        "shareable_generator": {"transfer": "DIFF", "seed": 3},
    }
    for one in [*config["components"], *config["workflows"]]:
        component = built(one)
        kept = {
            name: getattr(component, name, getattr(component, f"_{name}", None))
            for name in one["args"]
        }
        assert kept == one["args"]


def test_the_components_arrive_with_their_arguments(tmp_path: Path) -> None:
    app = exported(
        tmp_path,
        initial_model=MODEL,
        num_rounds=9,
        params_transfer_type=TransferType.DIFF,
        seed=3,
        min_updates=2,
        accumulator="float64",
        keep_checkpoints=5,
        poll_interval=0.1,
    )
    config = server_config(app)
    made = components_of(app)
    aggregator, generator = made["aggregator"], made["shareable_generator"]
    assert (aggregator.transfer, aggregator.min_updates) == ("DIFF", 2)
    assert aggregator.accumulator == "float64"
    assert (generator.transfer, generator.seed) == ("DIFF", 3)
    assert made["persistor"].keep == 5
    workflow = config["workflows"][0]["args"]
    assert (workflow["min_clients"], workflow["num_rounds"]) == (2, 9)
    assert workflow["task_check_period"] == 0.1
    assert config["server"] == {"task_request_interval": 0.1}


def test_a_weight_diff_data_kind_says_the_same_as_diff(tmp_path: Path) -> None:
    app = exported(tmp_path, initial_model=MODEL, aggregator_data_kind=DataKind.WEIGHT_DIFF)
    made = components_of(app)
    assert made["aggregator"].transfer == made["shareable_generator"].transfer == "DIFF"


@pytest.mark.parametrize("inner", [Maximum(bonus=2.5), WithoutSecond()])
def test_a_users_aggregator_travels_with_its_arguments_and_its_file(
    tmp_path: Path, inner: Any
) -> None:
    app = exported(tmp_path, aggregator=inner)
    made = components_of(app)
    custom = made[made["aggregator"].aggregator_id]
    assert type(custom) is type(inner)
    assert getattr(custom, "bonus", None) == getattr(inner, "bonus", None)
    assert list(app.glob("custom/**/custom_aggregators.py"))


def test_one_of_ours_given_as_the_aggregator_is_used_as_it_is(tmp_path: Path) -> None:
    ours = FedAvgAggregator("FULL", min_updates=2)
    components = components_of(exported(tmp_path, aggregator=ours))
    assert sorted(components) == ["aggregator", "persistor", "shareable_generator"]
    assert components["aggregator"].min_updates == 2


def test_the_packages_own_files_are_not_copied_into_the_job(tmp_path: Path) -> None:
    app = exported(tmp_path, initial_model=MODEL)
    copied = {path.name for path in app.rglob("*.py")}
    assert copied == {"mixed.py"}


def client_config(job: Path, app: str) -> Any:
    return json.loads((job / app / "config" / "config_fed_client.json").read_text())


def test_what_clients_tell_trackers_is_to_reach_the_server(tmp_path: Path) -> None:
    config = client_config(exported(tmp_path), "")
    assert [one["id"] for one in config["components"]] == ["event_to_fed"]


@pytest.mark.parametrize(
    "way", ["constructor"] + ["setter"] * hasattr(Recipe, "set_per_site_config")
)
def test_a_site_has_what_is_other_for_it(tmp_path: Path, way: str) -> None:
    sites = {
        "site-1": {"train_args": "--mine 1", "command": None, "params_transfer_type": None},
        "site-2": {"client_memory_gc_rounds": 7, "params_transfer_type": "FULL"},
    }
    if way == "constructor":
        made = recipe(train_args="--all", per_site_config=sites)
    else:
        made = recipe(train_args="--all")
        made.set_per_site_config(sites)
    made.export(str(tmp_path))
    job = tmp_path / made.name
    assert sorted(path.name for path in job.glob("app*")) == [
        "app_server",
        "app_site-1",
        "app_site-2",
    ]
    first, second = (
        client_config(job, f"app_{site}")["executors"][0]["executor"]["args"] for site in sites
    )
    assert (first["task_script_args"], second["task_script_args"]) == ("--mine 1", "--all")
    assert (first.get("memory_gc_rounds", 0), second["memory_gc_rounds"]) == (0, 7)
    assert made.per_site_config == sites


def test_what_the_installed_nvflare_cannot_do_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = inspect.signature(ScriptRunner).parameters
    older = [known[name] for name in known if name != "launch_once"]
    signature = inspect.Signature(older)
    monkeypatch.setattr(inspect, "signature", lambda _: signature)
    with pytest.raises(fc.UsageError, match=r"^launch_once: .*, as nvflare .* cannot do that, got"):
        recipe(launch_once=False)


def start_of(app: Path) -> Any:
    persistor = components_of(app)["persistor"]
    return fc.load_checkpoint(app / "config" / persistor.initial_file)


@pytest.mark.parametrize("suffix", ["npy", "NPY", "npz", "safetensors", "checkpoint"])
def test_a_file_that_is_here_is_the_model_that_the_job_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"numpy_key": np.arange(3.0)}
    path = Path(f"start.{suffix}")
    if suffix in ("npy", "NPY"):
        with open(path, "wb") as file:
            np.save(file, model["numpy_key"])
    elif suffix == "npz":
        np.savez(path, numpy_key=model["numpy_key"])
    elif suffix == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(model, path)
    else:
        fc.save_checkpoint(path, fc.Checkpoint(model, round=9, extra={"job": {"seed": 8}}))
    app = exported(tmp_path / "job", initial_ckpt=str(path), model=MODEL)
    assert fc.same_bits(start_of(app).model, model)
    assert (start_of(app).round, start_of(app).extra) == (0, {})
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    np.savez("bad.npz", w=np.array(["no number"]))
    for bad in ("bad.npy", "bad.npz"):
        with pytest.raises(fc.CheckpointError, match="bad"):
            recipe(initial_ckpt=bad)


def test_a_file_that_is_the_servers_is_named_to_it(tmp_path: Path) -> None:
    app = exported(tmp_path, initial_ckpt="/on/the/server.npz", params_transfer_type="DIFF")
    assert components_of(app)["persistor"].initial_file == "/on/the/server.npz"
    assert list(app.rglob("*.npz")) == []


def ended(folder: Path, round: int = 3, best: int = 2) -> Path:
    """The folder of a job that has ended after a round, and found its best model in another."""
    job = {"roster": ["site-1"], "seed": 5, "transfer": "FULL"}
    store = fc.CheckpointStore(folder)
    store.save(fc.Checkpoint(MODEL, round=round - 1))
    store.save(fc.Checkpoint({"w": MODEL["w"] * round}, round=round, extra={"job": job}))
    best_model = fc.Checkpoint({"w": MODEL["w"] * best}, round=best)
    fc.save_checkpoint(folder / "best_model.npz", best_model)
    return folder


@pytest.mark.parametrize("place", ["", "round-00000003.npz"])
def test_a_job_goes_on_where_another_ended(tmp_path: Path, place: str) -> None:
    path = ended(tmp_path / "models") / place
    app = exported(tmp_path, start_from=path, num_rounds=5, seed=5, model=MODEL)
    assert fc.same_bits(start_of(app).model, {"w": MODEL["w"] * 3})
    controller = server_config(app)["workflows"][0]["args"]
    assert (controller["start_round"], controller["num_rounds"]) == (3, 2)
    best = fc.load_checkpoint(app / "config" / components_of(app)["persistor"].best_file)
    assert fc.same_bits(best.model, {"w": MODEL["w"] * 2})


def test_what_the_next_round_had_received_goes_along_and_that_of_another_round_does_not(
    tmp_path: Path,
) -> None:
    path = ended(tmp_path / "models")
    for number, expected in ((3, "open_file.npz"), (2, "")):
        fc.save_checkpoint(path / "open_round.npz", fc.Checkpoint({}, round=number))
        app = exported(tmp_path / str(number), start_from=path, num_rounds=5, seed=5)
        assert components_of(app)["persistor"].open_file == expected
        assert (app / "config" / "open_file.npz").exists() == bool(expected)


def test_a_best_model_of_a_round_that_is_played_again_is_not_taken_along(tmp_path: Path) -> None:
    path = ended(tmp_path / "models", best=4)
    app = exported(tmp_path, start_from=str(path), num_rounds=5, seed=5)
    assert components_of(app)["persistor"].best_file == ""


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"num_rounds": 3}, "num_rounds: expected more than the 3 rounds that start_from has"),
        ({"seed": 4}, "start_from: expected a job of seed 4, got 5"),
        ({"params_transfer_type": "DIFF"}, "start_from: expected a job of transfer DIFF, got FULL"),
        ({"model": [1.0]}, "start_from: expected a model like the given one, got another"),
    ],
)
def test_a_job_that_is_another_does_not_go_on(tmp_path: Path, others: Any, message: str) -> None:
    path = ended(tmp_path / "models")
    with pytest.raises(fc.UsageError) as problem:
        recipe(**{"start_from": path, "num_rounds": 5, "seed": 5, **others})
    assert str(problem.value).startswith(message)


def test_a_server_optimizer_that_cannot_go_on_is_an_error_here_and_now(tmp_path: Path) -> None:
    state = {"momentum/w": np.zeros((2, 2))}
    path = tmp_path / "checkpoint"
    fc.save_checkpoint(path, fc.Checkpoint(MODEL, round=1, arrays=state))
    assert recipe(start_from=path, server_optimizer="fedavgm").server_optimizer == fc.FedAvgM()
    for optimizer in (None, "fedavg"):
        with pytest.raises(fc.UsageError, match=r"whose state|the state of"):
            recipe(start_from=path, server_optimizer=optimizer)


def test_a_jobs_folder_in_place_of_that_of_its_models_is_an_error_that_names_the_latter(
    tmp_path: Path,
) -> None:
    ended(tmp_path / "server" / "models")
    with pytest.raises(fc.CheckpointError, match="in this folder, but in 'server/models'"):
        recipe(start_from=tmp_path, num_rounds=5)


def test_a_damaged_checkpoint_to_start_from_is_named(tmp_path: Path) -> None:
    path = ended(tmp_path / "models")
    (path / "round-00000003.npz").write_bytes(b"nothing")
    with pytest.raises(fc.CheckpointError, match="round-00000003"):
        recipe(start_from=path, num_rounds=5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("accuracy", "max")),
        ({"key_metric": "loss", "stop_cond": "loss <= 0.1"}, ("loss", "min")),
        ({"key_metric": "loss", "stop_cond": "accuracy > 0.1"}, ("loss", "max")),
        (
            {"key_metric": "loss", "stop_cond": "loss < 1", "key_metric_mode": "max"},
            ("loss", "max"),
        ),
    ],
)
def test_which_metric_is_better_is_what_nvflares_recipe_takes(given: Any, expected: Any) -> None:
    (workflow,) = recipe(**given)._fed_job._deploy_map["server"].app_config.workflows
    controller = workflow.controller
    assert (controller.key_metric, controller.key_metric_mode) == expected


def test_nvflares_cross_site_evaluation_finds_the_model_where_it_looks(tmp_path: Path) -> None:
    made = recipe(model=[1.0, 2.0])
    add_cross_site_evaluation(made)
    made.export(str(tmp_path))
    app = tmp_path / made.name / "app"
    assert components_of(app)["persistor"].numpy_file == "server.npy"
    names = [one["path"].rpartition(".")[2] for one in server_config(app)["workflows"]]
    assert names == ["FedAvgController", "CrossSiteModelEval"]
    with pytest.raises(fc.UsageError, match=r"of the array numpy_key alone, got \['w'\]"):
        add_cross_site_evaluation(recipe(model=MODEL))
