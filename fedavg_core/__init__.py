"""Federated averaging on NumPy arrays, with an exact mean.

    import fedavg_core as fc

    mean = fc.weighted_mean([params_a, params_b], weights=[120, 80])

* arithmetic: `weighted_mean`, `WeightedMean`, `diff`, `apply`
* one round, without input or output: `Round`, `Update`, `Receipt`, `Outcome`, `Limits`
* a whole federation in this process: `Federation`, `Context`, `TrainResult`
* means that bad updates cannot carry off: `robust_mean`, `CoordinateMedian`, `Krum` and others
* how the global model follows the mean: `optimizer_named`, `FedAdam` and others
* files: `Checkpoint`, `CheckpointStore`, `save_checkpoint`, `load_checkpoint`; `aggregate_files`
  for models larger than memory
* models: `ModelSpec`, `compare`, `same_bits`
* what a round did, and whether it did: `Audit`, `verify`, `Verdict`
* for tests of your own: the subpackage `fedavg_core.testing`
"""

from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.audit import Audit
from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.client import (
    Client,
    Context,
    TrainResult,
    contributor_order,
    contributor_seed,
)
from fedavg_core.comparison import KeyDifference, compare, same_bits
from fedavg_core.errors import (
    CheckpointError,
    FedAvgError,
    OutOfRange,
    Reason,
    RefusedUpdate,
    UsageError,
)
from fedavg_core.federation import Best, Federation
from fedavg_core.gate import Limits
from fedavg_core.model import ArraySpec, ModelSpec, Params
from fedavg_core.observer import Observer
from fedavg_core.out_of_core.aggregation import aggregate_files
from fedavg_core.out_of_core.model_file import load_model
from fedavg_core.outcome import Failure, Outcome, Receipt
from fedavg_core.replay import Verdict, verify
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.robust.rules import (
    ClippedMean,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    TrimmedMean,
    robust_mean,
)
from fedavg_core.round import Round, RoundState
from fedavg_core.server_optimizer import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    optimizer_named,
)
from fedavg_core.transfer import apply, diff
from fedavg_core.update import TransferType, Update

__all__ = [
    "ArraySpec",
    "Audit",
    "Best",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Client",
    "ClippedMean",
    "Context",
    "CoordinateMedian",
    "Failure",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgError",
    "FedAvgM",
    "FedYogi",
    "Federation",
    "GeometricMedian",
    "KeyDifference",
    "Krum",
    "Limits",
    "ModelSpec",
    "MultiKrum",
    "Observer",
    "OutOfRange",
    "Outcome",
    "Params",
    "Reason",
    "Receipt",
    "RefusedUpdate",
    "RobustMean",
    "Round",
    "RoundState",
    "ServerOptimizer",
    "TrainResult",
    "TransferType",
    "TrimmedMean",
    "Update",
    "UsageError",
    "Verdict",
    "WeightedMean",
    "aggregate_files",
    "apply",
    "compare",
    "contributor_order",
    "contributor_seed",
    "diff",
    "load_checkpoint",
    "load_model",
    "optimizer_named",
    "robust_mean",
    "same_bits",
    "save_checkpoint",
    "verify",
    "weighted_mean",
]
