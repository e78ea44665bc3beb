"""What a client is, and what it is told: the same words in every world it runs in.

A client is a callable ``train(params, context)`` that gives a `TrainResult`. All that it may want
to know about where it is stands in the `Context`. Both the federation in process and any framework
that this package is deployed on fill it in by the rules of this module, which use nothing but the
contributors' names, the round and the run's seed; so a client that takes its randomness from
``context.seed`` and its share of the data from ``context.index`` does the same everywhere.

Every draw is by SHA-256 and not by a random generator, whose stream may differ from one version or
platform to another:

* A client's seed for a round is the first 63 bits of the hash of the run's seed, the round and its
  name.
* To select m of n clients for a round, each gets the hash of the run's seed, the round and its
  name, and the m smallest are taken: a uniform draw without replacement.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy.typing as npt

from fedavg_core.model import Params

__all__ = [
    "Client",
    "Context",
    "TrainResult",
    "contributor_order",
    "contributor_seed",
    "draw_contributors",
]


@dataclass(frozen=True)
class Context:
    """What a client is told beside the model.

    Attributes:
        contributor: The client's name.
        index: Its position among all clients of the run, in `contributor_order`.
        num_contributors: How many clients the run has, whether selected for this round or not.
        round: The round's number, from 0 on.
        num_rounds: How many rounds the run is to have.
        seed: For this client in this round (see `contributor_seed`).
    """

    contributor: str
    index: int
    num_contributors: int
    round: int
    num_rounds: int
    seed: int


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a client gives back.

    Attributes:
        params: Its whole model after training, or some of its parameters; with DIFF transfer too,
            since the difference is taken for it. Handed over: the client does not change these
            arrays afterwards.
        weight: How much it counts: samples, or local steps.
        metrics: Numbers to report, such as the training loss.
    """

    params: Params
    weight: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


Client: TypeAlias = Callable[[dict[str, npt.NDArray[Any]], Context], TrainResult]
"""``train(params, context)``: the params are the client's own copy, writeable."""


def contributor_order(names: Iterable[str]) -> list[str]:
    """Names in natural order: ``site-2`` comes before ``site-10``.

    Args:
        names: The contributors' names.

    Returns:
        They, sorted by their parts: digits by number, all else by code points.
    """
    return sorted(names, key=_natural_key)


def contributor_seed(seed: int, round: int, contributor: str) -> int:
    """The seed of one client for one round.

    Args:
        seed: The run's.
        round: The round's number.
        contributor: The client's name.

    Returns:
        A whole number from 0 to 2**63 - 1, the same on every platform and Python.
    """
    return int.from_bytes(_hash("train", seed, round, contributor)[:8], "big") >> 1


def draw_contributors(names: Iterable[str], count: int, seed: int, round: int) -> list[str]:
    """Select some of the contributors for one round.

    Args:
        names: All of them, in any order.
        count: How many to select.
        seed: The run's.
        round: The round's number.

    Returns:
        The selected names in `contributor_order`, the same on every platform and Python.
    """
    drawn = heapq.nsmallest(count, names, key=lambda name: _hash("select", seed, round, name))
    return contributor_order(drawn)


def _hash(purpose: str, seed: int, round: int, contributor: str) -> bytes:
    text = f"fedavg-core {purpose} {seed} {round} {contributor}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _natural_key(name: str) -> tuple[str, str]:
    # A number is its length and then its digits: so, one of any length is in order. The mark
    # before it is below every character that a name may have.
    marked = re.sub("[0-9]+", _marked, name)
    return marked, name


def _marked(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"
