"""A training file in which, in round 1, the second contributor does what the argument says."""

import sys
from typing import Any

import numpy as np

import fedavg_core as fc
import nvflare_adapter

FAULT = sys.argv[1] if len(sys.argv) > 1 else "none"


def initial_model(seed: int) -> dict[str, Any]:
    return {"w": np.full(3, seed, dtype=np.float32)}


def train(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    params["w"] += np.float32(1 + context.index)
    if context.round == 1 and context.index == 1:
        if FAULT == "nan":
            params["w"][2] = np.nan
        elif FAULT == "raise":
            raise ValueError("the disk is on fire")
    return fc.TrainResult(params, weight=1 + context.index, metrics={"loss": 0.5})


if __name__ == "__main__":
    nvflare_adapter.serve(train)
