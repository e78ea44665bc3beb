"""Dtypes that NVFlare cannot send, of arrays and of single numbers.

NVFlare sends an array as the bytes of an npy file, which has no name for the dtypes of `ml_dtypes`.
Such an array travels as bytes without a meaning (void), with which nobody can calculate by mistake,
and its dtype as a name beside it; everything else travels as it is. Of NumPy's scalars NVFlare can
send few, so none is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import quoted
from fedavg_core.model import is_extension

__all__ = ["finite", "pack", "plain", "unpack"]


def pack(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give arrays dtypes that NVFlare can send.

    Args:
        params: The arrays; borrowed.

    Returns:
        They, in such dtypes, and the true dtypes of those that were changed.
    """
    dtypes = {
        key: value.dtype.name
        for key, value in params.items()
        if isinstance(value, np.ndarray) and is_extension(value.dtype)
    }
    sent = {
        key: value.view(f"V{value.dtype.itemsize}") if key in dtypes else value
        for key, value in params.items()
    }
    return sent, dtypes


def unpack(params: Any, dtypes: Any) -> Any:
    """Give arrays the dtypes that they had before they were sent.

    Args:
        params: What came as the arrays; borrowed.
        dtypes: What came as their true dtypes.

    Returns:
        The arrays. One whose dtype makes no sense becomes None, and what is no mapping stays what
        it is, for the gate to refuse.
    """
    if not isinstance(dtypes, dict) or not dtypes or not isinstance(params, dict):
        return params
    import ml_dtypes

    def restored(key: Any, name: Any) -> npt.NDArray[Any] | None:
        try:
            array: npt.NDArray[Any] = params[key]
            viewed: npt.NDArray[Any] = array.view(getattr(ml_dtypes, name))
            return viewed.reshape(array.shape)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    return {**params, **{key: restored(key, name) for key, name in dtypes.items()}}


def plain(value: object) -> object:
    """A metric or a weight as something that NVFlare can send.

    Args:
        value: Anything.

    Returns:
        It, as a number of Python's or a string; what is no number does not count anyway.
    """
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (bool, int, float, str)) else quoted(value)


def finite(metrics: object) -> dict[str, float]:
    """Those metrics that are finite numbers.

    Args:
        metrics: What came as a mapping of metrics.

    Returns:
        They, as numbers of Python's.
    """
    given = (
        {str(name): plain(value) for name, value in metrics.items()}
        if isinstance(metrics, dict)
        else {}
    )
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
