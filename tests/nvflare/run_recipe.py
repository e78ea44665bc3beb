"""Runs a recipe on the simulator, in a process of its own.

    python -m tests.nvflare.run_recipe FOLDER ARGUMENTS

The recipe's arguments are JSON; an aggregator is named by its class in `custom_aggregators`. With
``"nvflares": true`` among them the recipe is NVFlare's own, with this package's aggregator in it;
with ``"tracked": true`` there is a tracker on the server, and NVFlare's reporters that there are;
with ``"evaluated": true`` the job ends with NVFlare's cross-site evaluation.
It fails if the model is not in the folder that the run gives as its result.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from nvflare.app_common.np.recipes import NumpyFedAvgRecipe as NVFlaresRecipe
from nvflare.recipe.sim_env import SimEnv
from nvflare.recipe.utils import add_cross_site_evaluation

import fedavg_core as fc
from nvflare_adapter import FedAvgAggregator, NumpyFedAvgRecipe
from tests.nvflare.custom_aggregators import Maximum, Tracker, WithoutSecond

NVFLARES_REPORTERS = [
    "nvflare.app_common.widgets.metrics_artifact_writer.MetricsArtifactWriter",
    "nvflare.app_common.widgets.job_stats_reporter.JobStatsReporter",
]
AGGREGATORS = {"Maximum": lambda: Maximum(bonus=100.0), "WithoutSecond": WithoutSecond}


def recipe_of(arguments: dict[str, Any]) -> Any:
    if arguments.pop("nvflares", False):
        return NVFlaresRecipe(name="job", aggregator=FedAvgAggregator(), **arguments)
    if "aggregator" in arguments:
        arguments["aggregator"] = AGGREGATORS[arguments["aggregator"]]()
    tracked, evaluated = arguments.pop("tracked", False), arguments.pop("evaluated", False)
    recipe = NumpyFedAvgRecipe(name="job", poll_interval=0.05, **arguments)
    if tracked:
        recipe._fed_job.to_server(Tracker(), id="receiver")
        for path in NVFLARES_REPORTERS:
            if find_spec(path.rpartition(".")[0]):
                recipe._fed_job.to_server(resolve_name(path)())
    if evaluated:
        add_cross_site_evaluation(recipe)
    return recipe


if __name__ == "__main__":
    arguments = {"num_rounds": 2, **json.loads(sys.argv[2])}
    recipe = recipe_of(arguments)
    names = [f"site-{number + 1}" for number in range(recipe.min_clients)]
    run = recipe.execute(SimEnv(clients=names, workspace_root=sys.argv[1]))
    models = Path(run.get_result(), "server", "simulate_job", "models")
    assert (models / "server.npy").is_file() or fc.CheckpointStore(models).load().round > 1
