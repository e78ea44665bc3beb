"""Who gets which examples: at random, or the paper's pathological split (section 3).

There, the examples are sorted by what they show and cut into shards, two for each client, which are
dealt out at random; so most clients have examples of two digits only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import fedavg_core as fc

__all__ = ["SPLITS", "iid", "two_shards"]

Indices = npt.NDArray[np.int64]


def iid(labels: Indices, clients: int, seed: int) -> list[Indices]:
    """Deal the examples out at random, in shares as even as can be.

    Args:
        labels: What each example shows, int64, shape (n,).
        clients: How many shares to make, from 1 to n.
        seed: Draws who gets what.

    Returns:
        For each client the indices of its examples, ascending; together all of them.

    Raises:
        UsageError: There are too few examples.
    """
    _check(len(labels), clients, 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, clients)]


def two_shards(labels: Indices, clients: int, seed: int) -> list[Indices]:
    """Sort the examples by label, cut them into shards, and give each client two.

    Args:
        labels: What each example shows, int64, shape (n,).
        clients: How many shares to make, from 1 to n / 2.
        seed: Draws who gets which shards.

    Returns:
        For each client the indices of its examples, ascending; together all of them.

    Raises:
        UsageError: There are too few examples.
    """
    _check(len(labels), clients, 2)
    shards = np.array_split(np.argsort(labels, kind="stable"), 2 * clients)
    order = np.random.default_rng(seed).permutation(2 * clients)
    return [
        np.sort(np.concatenate([shards[one], shards[other]]))
        for one, other in order.reshape(clients, 2)
    ]


SPLITS = {"iid": iid, "non-iid": two_shards}


def _check(examples: int, clients: int, each: int) -> None:
    if not 1 <= clients * each <= examples:
        raise fc.UsageError(
            f"expected from 1 to {examples // each} clients for {examples} examples, got {clients}"
        )
