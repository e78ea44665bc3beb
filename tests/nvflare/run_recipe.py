"""Runs a recipe on the simulator, in a process of its own.

    python -m tests.nvflare.run_recipe FOLDER ARGUMENTS

The recipe's arguments are JSON; an aggregator is named by its class in `custom_aggregators`. It
fails if the model is not in the folder that the run gives as its result.
"""

import json
import sys

from nvflare.recipe.sim_env import SimEnv

import fedavg_core as fc
from nvflare_adapter import NumpyFedAvgRecipe
from tests.nvflare.custom_aggregators import Maximum, WithoutSecond

AGGREGATORS = {"Maximum": lambda: Maximum(bonus=100.0), "WithoutSecond": WithoutSecond}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    if "aggregator" in arguments:
        arguments["aggregator"] = AGGREGATORS[arguments["aggregator"]]()
    recipe = NumpyFedAvgRecipe(name="job", num_rounds=2, poll_interval=0.05, **arguments)
    run = recipe.execute(SimEnv(num_clients=recipe.min_clients, workspace_root=sys.argv[1]))
    models = fc.CheckpointStore(f"{run.get_result()}/server/simulate_job/models")
    assert models.load().round == 2
