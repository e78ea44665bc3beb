"""Deploys `fedavg_core` through NVIDIA FLARE.

`serve` ends a training file, and needs NVFlare only when NVFlare runs that file. All other names
are taken from NVFlare's side of the package when they are first asked for, so that this package
can be imported where NVFlare is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedavg_core.errors import not_installed
from nvflare_adapter.client import read_training_file, serve

if TYPE_CHECKING:
    from nvflare_adapter.aggregator import FedAvgAggregator
    from nvflare_adapter.controller import FedAvgController
    from nvflare_adapter.custom_aggregator import CustomAggregator
    from nvflare_adapter.persistor import CheckpointPersistor
    from nvflare_adapter.recipe import NumpyFedAvgRecipe
    from nvflare_adapter.shareable_generator import FedAvgShareableGenerator

__all__ = [
    "CheckpointPersistor",
    "CustomAggregator",
    "FedAvgAggregator",
    "FedAvgController",
    "FedAvgShareableGenerator",
    "NumpyFedAvgRecipe",
    "read_training_file",
    "serve",
]

_HOMES = {
    "CheckpointPersistor": "persistor",
    "CustomAggregator": "custom_aggregator",
    "FedAvgAggregator": "aggregator",
    "FedAvgController": "controller",
    "FedAvgShareableGenerator": "shareable_generator",
    "NumpyFedAvgRecipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("nvflare", "pydantic"):
            raise
        raise ImportError(f"{name}: {not_installed({package: 'nvflare'})}") from None
