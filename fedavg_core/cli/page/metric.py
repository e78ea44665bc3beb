"""The metrics of a run, and how their values are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedavg_core.cli.page.unit import written
from fedavg_core.cli.round_table import is_share
from fedavg_core.cli.run_log import RoundRecord

__all__ = ["Metric", "find_metrics", "left_out"]


class Metric:
    """A metric in all rounds: of the contributors, of the evaluation, or of both.

    Args:
        name: Its name.
        records: The rounds.
    """

    def __init__(self, name: str, records: Sequence[RoundRecord]) -> None:
        self.name = name
        self.train = [record.metrics.get(name) for record in records]
        self.test = [record.evaluation.get(name) for record in records]
        values = [value for value in (*self.train, *self.test) if value is not None]
        self.is_share = is_share(name, values)
        self.larger_is_better = "acc" in name.lower()
        self.has_best = self.larger_is_better or "loss" in name.lower()

    @property
    def lines(self) -> Iterator[tuple[str, list[float | None]]]:
        """What there is of it: whose, and the values."""
        for whose, values in (("test", self.test), ("train", self.train)):
            if any(value is not None for value in values):
                yield whose, values

    def tell(self, value: float, step: float = 0.0, /) -> str:
        """A value, for people; with the decimals that a step needs, see `written`."""
        if not self.is_share:
            return written(value, 4, step)
        return f"{written(100 * value, 4, 100 * step)}%"


def find_metrics(records: Sequence[RoundRecord]) -> list[Metric]:
    """All metrics: first what is evaluated, and of that first what tells the accuracy."""
    evaluated = dict.fromkeys(name for record in records for name in record.evaluation)
    reported = dict.fromkeys(name for record in records for name in record.metrics)
    names = sorted(evaluated, key=lambda name: "acc" not in name.lower())
    found = (Metric(name, records) for name in dict.fromkeys([*names, *reported]))
    return [metric for metric in found if list(metric.lines)]


def left_out(records: Sequence[RoundRecord]) -> list[str]:
    """The names of metrics that were, somewhere, no finite numbers."""
    found = {
        name
        for record in records
        for values in (record.metrics, record.evaluation)
        for name, value in values.items()
        if value is None
    }
    return sorted(found.union(*(record.skipped_metrics for record in records)))
