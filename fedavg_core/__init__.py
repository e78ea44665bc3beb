"""Federated averaging on NumPy arrays, with an exact mean."""

from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.errors import (
    CheckpointError,
    FedAvgError,
    OutOfRange,
    Reason,
    RefusedUpdate,
    UsageError,
)
from fedavg_core.model import ModelSpec, Params, compare, same_bits
from fedavg_core.transfer import apply, diff
from fedavg_core.update import TransferType, Update

__all__ = [
    "CheckpointError",
    "FedAvgError",
    "ModelSpec",
    "OutOfRange",
    "Params",
    "Reason",
    "RefusedUpdate",
    "TransferType",
    "Update",
    "UsageError",
    "WeightedMean",
    "apply",
    "compare",
    "diff",
    "same_bits",
    "weighted_mean",
]
