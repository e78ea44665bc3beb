"""Where a mask is true."""

from __future__ import annotations

from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

__all__ = ["positions"]

Indices: TypeAlias = npt.NDArray[np.intp]

_FEW = 1 << 16  # places that are looked at one by one


@overload
def positions(mask: npt.NDArray[np.bool_]) -> Indices: ...
@overload
def positions(mask: npt.NDArray[np.bool_], most: int) -> Indices | None: ...
def positions(mask: npt.NDArray[np.bool_], most: int | None = None) -> Indices | None:
    """Where a mask is true, fast if that is in few places.

    Args:
        mask: One dimension, contiguous; only read.
        most: How many places the caller cares for; None for all.

    Returns:
        The positions, ascending; None if they are more than that.
    """
    if most is None:
        most = mask.size
    if mask.size <= _FEW:
        found: Indices = mask.nonzero()[0]
    else:
        whole = mask.size & -8
        eights = mask[:whole].view(np.uint64)
        hits = positions(eights != 0, most)
        if hits is None:
            return None
        inside = eights[hits].view(np.bool_).nonzero()[0]
        found = (hits[inside >> 3] << 3) + (inside & 7)
        if whole < mask.size:
            found = np.concatenate([found, whole + np.flatnonzero(mask[whole:])])
    return found if found.size <= most else None
