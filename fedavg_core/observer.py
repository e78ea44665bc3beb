"""What a run tells those who watch it."""

from __future__ import annotations

from collections.abc import Sequence

from fedavg_core.outcome import Failure, Outcome, Receipt
from fedavg_core.update import Update

__all__ = ["Observer"]


class Observer:
    """Is told what happens in a run. Override what is of interest; the rest does nothing."""

    def round_started(self, round: int, contributors: Sequence[str]) -> None:
        """A round begins.

        Args:
            round: Its number.
            contributors: Those that were selected, in order.
        """

    def update_judged(self, receipt: Receipt) -> None:
        """An update was added or refused.

        Args:
            receipt: The round's answer to it.
        """

    def update_accepted(self, update: Update) -> None:
        """An update was added; after `update_judged`.

        Args:
            update: It. Its arrays are borrowed: only read, and not kept.
        """

    def client_failed(self, failure: Failure) -> None:
        """A client gave nothing to judge.

        Args:
            failure: Which, and why.
        """

    def round_ended(self, outcome: Outcome) -> None:
        """A round is over, evaluated and, where it is due, stored.

        Args:
            outcome: What it ended with.
        """
