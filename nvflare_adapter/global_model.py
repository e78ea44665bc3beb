"""The global model as NVFlare's controllers hold it, which call it a model learnable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
from nvflare.app_common.abstract.model import ModelLearnableKey as LearnableKey

import fedavg_core as fc

__all__ = ["extra_of", "learnable", "model_of"]

_EXTRA = "fedavg.extra"


def learnable(model: fc.Params, extra: Mapping[str, Any] | None = None) -> ModelLearnable:
    """The global model as NVFlare's controller holds it.

    Args:
        model: The model; borrowed. Empty if clients start from their own.
        extra: What goes with it (see `extra_of`).

    Returns:
        NVFlare's form of it.
    """
    return make_model_learnable(dict(model), {_EXTRA: dict(extra or {})})


def model_of(held: ModelLearnable | None) -> dict[str, npt.NDArray[Any]]:
    """The global model out of what NVFlare's controller holds.

    Args:
        held: The model learnable, or None.

    Returns:
        The model, borrowed; empty if there is none.
    """
    return {} if not held else (held.get(LearnableKey.WEIGHTS) or {})


def extra_of(held: ModelLearnable) -> dict[str, Any]:
    """What goes with the global model.

    Args:
        held: The model learnable.

    Returns:
        The dictionary that it holds; an empty one of its own if it held none. What happened in the
        round is under ``"report"``, its audit under ``"audit"``, the server optimizer's state under
        ``"arrays"``. All but that is as JSON holds it.
    """
    extra: dict[str, Any] = held.setdefault(LearnableKey.META, {}).setdefault(_EXTRA, {})
    return extra
