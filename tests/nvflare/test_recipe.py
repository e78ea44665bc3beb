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
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.recipe.spec import Recipe

import fedavg_core as fc
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
    ({"min_clients": 0}, "min_clients: expected an integer of at least 1, got 0"),
    ({"min_clients": True}, "min_clients: expected an integer of at least 1, got True"),
    ({"min_clients": "2"}, "min_clients: expected an integer of at least 1, got '2'"),
    ({"num_rounds": -1}, "num_rounds: expected an integer of at least 1, got -1"),
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
    ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
    ({"min_updates": 0}, "min_updates: expected an integer of at least 1, got 0"),
    (
        {"accumulator": "float16"},
        "accumulator: expected 'exact', 'float64' or 'float32', got 'float16'",
    ),
    ({"keep_checkpoints": 0}, "keep_checkpoints: expected an integer of at least 1, got 0"),
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
        {"min_updates": 3},
        "min_updates: expected at most min_clients, 2, with which a round closes, got 3",
    ),
    (
        {"aggregator": FedAvgAggregator(min_updates=3)},
        "min_updates: expected at most min_clients, 2, with which a round closes, got 3",
    ),
    (
        {"params_transfer_type": "DIFF"},
        "initial_model: expected a model for the differences of DIFF to be taken from, got None",
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
    assert [path.name for path in folder.iterdir()] == ["initial_model.npz"]
    del made
    gc.collect()
    assert not folder.exists()


def built(component: Any) -> Any:
    """The component as NVFlare's server makes it, out of the job's JSON."""
    module, name = component["path"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**component["args"])


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
    made = {component["id"]: built(component) for component in config["components"]}
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
    made = {component["id"]: built(component) for component in server_config(app)["components"]}
    assert made["aggregator"].transfer == made["shareable_generator"].transfer == "DIFF"


@pytest.mark.parametrize("inner", [Maximum(bonus=2.5), WithoutSecond()])
def test_a_users_aggregator_travels_with_its_arguments_and_its_file(
    tmp_path: Path, inner: Any
) -> None:
    app = exported(tmp_path, aggregator=inner)
    made = {component["id"]: built(component) for component in server_config(app)["components"]}
    custom = made[made["aggregator"].aggregator_id]
    assert type(custom) is type(inner)
    assert getattr(custom, "bonus", None) == getattr(inner, "bonus", None)
    assert list(app.glob("custom/**/custom_aggregators.py"))


def test_one_of_ours_given_as_the_aggregator_is_used_as_it_is(tmp_path: Path) -> None:
    ours = FedAvgAggregator("FULL", min_updates=2)
    components = server_config(exported(tmp_path, aggregator=ours))["components"]
    assert sorted(component["id"] for component in components) == [
        "aggregator",
        "persistor",
        "shareable_generator",
    ]
    assert built(components[0]).min_updates == 2


def test_the_packages_own_files_are_not_copied_into_the_job(tmp_path: Path) -> None:
    app = exported(tmp_path, initial_model=MODEL)
    copied = {path.name for path in app.rglob("*.py")}
    assert copied == {"mixed.py"}
