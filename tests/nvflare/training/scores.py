"""A training file whose accuracy goes up and down with the rounds, and which tells a tracker so."""

import sys
from typing import Any

import numpy as np
from nvflare.client.tracking import SummaryWriter

import fedavg_core as fc
import nvflare_adapter

SCORES = (0.5, 0.7, 0.6, 0.65, 0.9)
STEP = float(sys.argv[1])


def train(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    score = SCORES[context.round]
    SummaryWriter().add_scalar("accuracy", score, context.round)
    moved = {"w": params["w"] + np.float32(STEP)}
    return fc.TrainResult(moved, weight=1, metrics={"accuracy": score})


if __name__ == "__main__":
    nvflare_adapter.serve(train)
