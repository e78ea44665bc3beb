"""What happened in a round, as JSON holds it: it travels and is stored beside the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import fedavg_core as fc

__all__ = ["report_of_outcome", "round_checkpoint", "statistics"]


def report_of_outcome(outcome: fc.Outcome) -> dict[str, Any]:
    """What happened in a round, without the model.

    Args:
        outcome: The closed round's outcome.

    Returns:
        ``round``, ``accepted`` (name to weight), ``refused`` and ``failed`` (one line each), all
        three in the order of the names; ``total_weight``, ``metrics``, ``skipped_metrics`` (the
        names of those that were left out) and ``problem``.
    """
    weights = {receipt.contributor: receipt.weight for receipt in outcome.accepted}
    order = fc.contributor_order({receipt.contributor for receipt in outcome.refused})
    place = {name: index for index, name in enumerate(order)}
    refused = sorted(outcome.refused, key=lambda receipt: place[receipt.contributor])
    return {
        "round": outcome.round,
        "accepted": {name: weights[name] for name in fc.contributor_order(weights)},
        "refused": [receipt.detail for receipt in refused],
        "failed": [f"{one.contributor} failed: {one.problem}" for one in outcome.failed],
        "total_weight": outcome.total_weight,
        "metrics": dict(outcome.metrics),
        "skipped_metrics": list(outcome.skipped_metrics),
        "problem": outcome.problem,
    }


def round_checkpoint(
    model: fc.Params, rounds: int, report: dict[str, Any], **more: Any
) -> fc.Checkpoint:
    """The checkpoint that is stored after a round.

    Args:
        model: The global model; borrowed.
        rounds: How many rounds are completed.
        report: What happened in the last of them; empty if nothing is known.
        **more: What else JSON can hold, by name.

    Returns:
        The checkpoint; all but the model is in its ``extra``, the report under ``"report"``.
    """
    extra = {"report": report, **more}
    return fc.Checkpoint(model, rounds, metrics=report.get("metrics", {}), extra=extra)


def statistics(outcome: fc.Outcome, received: Counter[str], limits: fc.Limits) -> dict[str, Any]:
    """What happened in a round, in the words of NVFlare's aggregation statistics.

    Args:
        outcome: The closed round's outcome.
        received: For each parameter how many accepted updates had it.
        limits: What was asked of an update.

    Returns:
        The statistics that NVFlare's own aggregators publish, and ``refused`` and ``failed``.
    """
    report, accepted = report_of_outcome(outcome), len(outcome.accepted)
    averaged = [count for key, count in received.items() if not limits.excludes(key)]
    matched = averaged.count(accepted)
    return {
        "round": outcome.round,
        "accepted_contributions": accepted,
        "contributors": sorted(report["accepted"]),
        "keys_seen": len(received),
        "keys_aggregated": len(averaged),
        "fully_matched_keys": matched,
        "partially_matched_keys": len(averaged) - matched,
        "skipped_keys": len(received) - len(averaged),
        "refused": report["refused"],
        "failed": report["failed"],
    }
