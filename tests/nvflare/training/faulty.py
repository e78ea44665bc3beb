"""A training file in which the second contributor does what the argument says.

``nan``: it sends a NaN in round 1; ``fail``: it raises in round 1 and exits in round 2;
``each``: it sends a NaN, then an array of another shape, raises, exits, from round 1 on;
``kill``: its process is killed in round 1; ``silent``: it does not answer from round 1 on;
``start``: nobody gets as far as training where NVFlare runs the file.
"""

import os
import signal
import sys
import time
from typing import Any

import numpy as np

import fedavg_core as fc
import nvflare_adapter

FAULT = sys.argv[1] if len(sys.argv) > 1 else "none"
IN_ROUNDS = {"fail": ["raise", "exit"], "each": ["nan", "shape", "raise", "exit"]}

if FAULT == "start" and "nvflare" in sys.modules:
    raise ValueError("no data here")


def initial_model(seed: int) -> dict[str, Any]:
    return {"w": np.full(3, seed, dtype=np.float32)}


def train(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    params["w"] += np.float32(1 + context.index)
    faults = ["none", *IN_ROUNDS.get(FAULT, [FAULT]), *["none"] * context.num_rounds]
    fault = faults[context.round] if context.index == 1 else "none"
    if fault == "nan":
        params["w"][2] = np.nan
    elif fault == "shape":
        params["w"] = params["w"][:2]
    elif fault == "raise":
        raise ValueError("the disk is on fire")
    elif fault == "exit":
        sys.exit(3)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "silent":
        time.sleep(10_000)
    return fc.TrainResult(params, weight=1 + context.index, metrics={"loss": 0.5})


if __name__ == "__main__":
    nvflare_adapter.serve(train)
