"""A training file in which the second contributor does what the argument says.

``nan``: it sends a NaN in round 1; ``shape``: an array of another shape; ``fail``: it raises in
round 1 and exits in round 2; ``kill``: its process is killed in round 1; ``silent``: it does not
answer from round 1 on; ``start``: nobody gets as far as training where NVFlare runs the file.
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

if FAULT == "start" and "nvflare" in sys.modules:
    raise ValueError("no data here")


def initial_model(seed: int) -> dict[str, Any]:
    return {"w": np.full(3, seed, dtype=np.float32)}


def train(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    params["w"] += np.float32(1 + context.index)
    if context.index == 1 and context.round == 1:
        if FAULT == "nan":
            params["w"][2] = np.nan
        elif FAULT == "shape":
            params["w"] = params["w"][:2]
        elif FAULT == "fail":
            raise ValueError("the disk is on fire")
        elif FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif FAULT == "silent":
            time.sleep(10_000)
    if context.index == 1 and context.round == 2 and FAULT == "fail":
        sys.exit(3)
    return fc.TrainResult(params, weight=1 + context.index, metrics={"loss": 0.5})


if __name__ == "__main__":
    nvflare_adapter.serve(train)
