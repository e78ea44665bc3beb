"""What the server of a job tells every client along with the model."""

from __future__ import annotations

from dataclasses import dataclass

import fedavg_core as fc
from fedavg_core.errors import quoted

__all__ = ["Assignment"]


@dataclass(frozen=True)
class Assignment:
    """What the server tells every client along with the model.

    Attributes:
        roster: The names of all contributors of the job.
        round: The number of the round.
        num_rounds: How many rounds the job has, from round 0 on.
        seed: The seed of the job.
        transfer: What the clients are to send back.
    """

    roster: list[str]
    round: int
    num_rounds: int
    seed: int
    transfer: str

    def context(self, contributor: str) -> fc.Context:
        """What one contributor's training is told.

        Args:
            contributor: Its name.

        Returns:
            The same context as a federation in process with this roster gives.

        Raises:
            UsageError: The contributor is not on the roster.
        """
        order = fc.contributor_order(self.roster)
        if contributor not in order:
            raise fc.UsageError(
                f"{quoted(contributor)} is not among the job's contributors {quoted(order, 300)}"
            )
        return fc.Context(
            contributor=contributor,
            index=order.index(contributor),
            num_contributors=len(order),
            round=self.round,
            num_rounds=self.num_rounds,
            seed=fc.contributor_seed(self.seed, self.round, contributor),
        )
