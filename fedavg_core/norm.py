"""The L2 norm of a difference between models, in the same bits everywhere.

It is computed in float64 in an order that is fixed: the elements in C order, in blocks of 65,536
that are folded in halves, and the sums of the blocks added without rounding (Shewchuk 1997, as
`math.fsum` does it). Elementwise operations of IEEE 754 give the same bits on every machine, so the
norm depends neither on the processor nor on how the arrays lie in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.model import Params, flat

__all__ = ["norm_above", "norm_of_difference", "scale_of", "sum_of_squares"]

_BLOCK = 1 << 16
_LARGEST_SCALE = 1000  # as an exponent; the square of what is left over is nothing


def norm_above(params: Params, base: Params, limit: float) -> float | None:
    """The norm of the difference between two models, if it is above a limit.

    Args:
        params: The one; only read.
        base: The other, with the same shapes; only read. A parameter that it lacks is zero there.
        limit: The limit, above zero.

    Returns:
        None if the norm, over all parameters of ``params`` together, is at most the limit; else
        the norm, which may be infinite or NaN. Deterministic.
    """
    # Scaled by a power of two, so that the squares of what is within the limit are near 1: what
    # overflows is beyond the limit, and what underflows cannot matter.
    scale = 2.0 ** -max(-_LARGEST_SCALE, min(_LARGEST_SCALE, math.frexp(limit)[1]))
    total = sum_of_squares(params, base, scale)
    return None if total <= (limit * scale) ** 2 else math.sqrt(total) / scale


def norm_of_difference(params: Params, base: Params) -> float:
    """The norm of the difference between two models.

    Args:
        params: The one; only read.
        base: The other, with the same shapes; only read. A parameter that it lacks is zero there.

    Returns:
        The norm over all parameters of ``params`` together. It is NaN or infinite where an element
        is, and infinite where a square is beyond the largest float64; squares that float64 does not
        tell from zero do not count. Deterministic.
    """
    return math.sqrt(sum_of_squares(params, base, 1.0))


def sum_of_squares(params: Params, base: Params, scale: float) -> float:
    """The sum of the squares of all elements of the difference between two models.

    Args:
        params: The one; only read.
        base: The other, with the same shapes; only read. A parameter that it lacks is zero there.
        scale: What the elements of both are multiplied by before; a power of two.

    Returns:
        The sum; infinite if it is beyond float64, or NaN or infinite where an element is. The same
        whatever the order of the parameters, and with the two models changed over. Deterministic.
    """
    parts = [
        part
        for key, array in params.items()
        for part in _block_sums_of_squares(array, base.get(key), scale)
    ]
    try:
        return math.fsum(parts)
    except OverflowError:
        return math.inf


def scale_of(models: Iterable[Params]) -> float:
    """A power of two that brings the numbers of some models to 1 and below.

    Scaled by it, squares of differences neither overflow nor vanish where they matter.

    Args:
        models: The models; only read.

    Returns:
        It; the same whatever their order.
    """
    largest = max(
        (
            max(float(array.max()), -float(array.min()))
            for model in models
            for array in model.values()
            if array.size
        ),
        default=0.0,
    )
    return 2.0 ** -max(-_LARGEST_SCALE, min(_LARGEST_SCALE, math.frexp(largest)[1]))


def _block_sums_of_squares(
    array: npt.NDArray[Any], base: npt.NDArray[Any] | None, scale: float
) -> Iterator[float]:
    for start in range(0, array.size, _BLOCK):
        count = min(_BLOCK, array.size - start)
        with np.errstate(all="ignore"):
            block = flat(array, start, count).astype(np.float64) * scale
            if base is not None:
                block -= flat(base, start, count).astype(np.float64) * scale
            block *= block
            size = block.size
            while size > 1:
                half = (size + 1) // 2
                block[: size - half] += block[half:size]
                size = half
        yield float(block[0])
