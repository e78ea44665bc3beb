"""A training file whose model has an array of every kind: it moves each by a random step."""

from typing import Any

import ml_dtypes
import numpy as np

import fedavg_core as fc
import nvflare_adapter

SHAPES = {
    "half": ((3, 2), np.float16),
    "brain": ((4,), ml_dtypes.bfloat16),
    "single": ((5,), np.float32),
    "double": ((2, 3), np.float64),
    "count": ((3,), np.int64),
    "small": ((2, 2), np.int8),
    "scalar": ((), np.float64),
    "empty": ((0, 3), np.float32),
}


def initial_model(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        key: np.asarray(rng.standard_normal(shape) * 10).astype(dtype)
        for key, (shape, dtype) in SHAPES.items()
    }


def train(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    rng = np.random.default_rng(context.seed)
    for key, array in params.items():
        moved = array.astype(np.float64) + rng.standard_normal(array.shape) * 3
        params[key] = np.asarray(moved).astype(array.dtype)
    place = [context.index, context.num_contributors, context.round, context.num_rounds]
    params["count"][:] += place[:3]
    metrics = {"loss": rng.random(), "single": np.float32(0.1), "note": "no number"}
    return fc.TrainResult(params, weight=7 + 5 * context.index, metrics=metrics)


if __name__ == "__main__":
    nvflare_adapter.serve(train)
