"""Contestants average the same updates in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

import fedavg_core as fc
from benchmarks.peers import CONTESTANTS, Server
from benchmarks.timing import Pace, Row, Timing, take_turns
from benchmarks.workloads import Params, Workload, draw_updates

__all__ = ["AVERAGING", "averaging", "one_round"]

_ROUND = "one round: take each client's update, then give the mean; what is kept between rounds is"
AVERAGING = tuple(name for name in CONTESTANTS if not name.startswith("Round"))
"""All that take updates one by one and know no rounds' rules."""


def averaging(
    benchmark: str,
    workload: Workload,
    names: Iterable[str] = AVERAGING,
    *,
    pace: Pace,
    reference: str | None = None,
) -> Timing:
    """Let contestants average the same updates in turn.

    Args:
        benchmark: Which one this is of.
        workload: What to average.
        names: The contestants; those that are not installed are named in the result.
        pace: How long to go on.
        reference: What to compare with; None for the fastest peer.

    Returns:
        The laps, and how many elements of each contestant's mean are not correctly rounded.
    """
    updates = draw_updates(workload.shapes, workload.clients, workload.dtype)
    right = fc.weighted_mean([params for params, _ in updates], [weight for _, weight in updates])
    servers: dict[str, Server] = {}
    tasks, absent = {}, []
    misrounded: dict[str, float | None] = {}

    def look(name: str, mean: Any) -> None:
        if CONTESTANTS[name].kind != "floor":
            misrounded[name] = _share_off(servers[name].arrays(mean), right)

    with np.errstate(all="ignore"):
        for name in names:
            try:
                server = servers[name] = CONTESTANTS[name].make()
            except ImportError:
                absent.append(name)
                continue
            messages = [server.message(params, weight) for params, weight in updates]
            one_round(server, messages[:1])  # memory is taken, and code loaded, before clocks run
            tasks[name] = partial(one_round, server, messages)
        rivals = [name for name in tasks if CONTESTANTS[name].kind == "peer"]
        taken = take_turns(tasks, pace, rivals=rivals, look=look)
    return Timing(
        benchmark=benchmark,
        title=workload.title,
        timed=f"{_ROUND} kept, its memory is warm",
        clients=workload.clients,
        elements=workload.clients * workload.parameters,
        nbytes=workload.clients * workload.nbytes,
        rows=tuple(
            Row(
                name,
                CONTESTANTS[name].kind,
                taken[name].laps,
                taken[name].cpu,
                misrounded.get(name),
            )
            for name in tasks
        ),
        reference=reference,
        absent=tuple(absent),
    )


def one_round(server: Server, messages: Sequence[Any]) -> Any:
    """Let a server take messages and give their mean."""
    for message in messages:
        server.add(message)
    return server.mean()


def _share_off(mean: Mapping[str, Any], right: Params) -> float:
    """The share of elements that are not those of the correctly rounded mean."""
    off = sum(
        int(np.count_nonzero(np.asarray(mean[key]).astype(array.dtype) != array))
        for key, array in right.items()
    )
    return off / sum(array.size for array in right.values())
