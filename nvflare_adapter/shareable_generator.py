# mypy: disable-error-code="misc"
"""What ScatterAndGather sends out, and what it makes of the aggregator's result.

NVFlare's own generator replaces the whole model by a result of weights, so that keys which nobody
sent vanish from it, and adds a difference key by key into the model that the round began with, so
that an error half-way leaves it half changed. This one makes a new model, in which such keys keep
their values. It also tells the clients what a training function is told in process: the roster,
the round, the number of rounds and the seed.
"""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.abstract.shareable_generator import ShareableGenerator
from nvflare.app_common.app_constant import AppConstants

from nvflare_adapter import convert, global_model
from nvflare_adapter.assignment import Assignment

__all__ = ["FedAvgShareableGenerator"]


class FedAvgShareableGenerator(ShareableGenerator):
    """Converts between the model that the controller holds and what is sent.

    Args:
        transfer: ``"FULL"`` or ``"DIFF"``: what clients are to send back.
        seed: The seed of the job.
    """

    def __init__(self, transfer: str = "FULL", seed: int = 0) -> None:
        super().__init__()
        self.transfer = transfer
        self.seed = seed
        self._roster: list[str] = []

    def learnable_to_shareable(
        self, model_learnable: ModelLearnable, fl_ctx: FLContext
    ) -> Shareable:
        """The model of a round, with what the clients are told along with it.

        The roster is read once, in the first round: who leaves later keeps its place, so that
        nobody else's changes. It is kept with the model, for a job that goes on from there.

        Args:
            model_learnable: What the controller holds; borrowed until it is sent.
            fl_ctx: The context of the round.

        Returns:
            The message.
        """
        if not self._roster:
            before = global_model.extra_of(model_learnable).get("job", {})
            present = {client.name for client in fl_ctx.get_engine().get_clients()}
            self._roster = sorted(present.union(before.get("roster", ())))
        start = fl_ctx.get_prop(AppConstants.START_ROUND, 0)
        assignment = Assignment(
            roster=self._roster,
            round=fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
            num_rounds=start + fl_ctx.get_prop(AppConstants.NUM_ROUNDS),
            seed=self.seed,
            transfer=self.transfer,
        )
        return convert.message_from_model(global_model.model_of(model_learnable), assignment)

    def shareable_to_learnable(self, shareable: Shareable, fl_ctx: FLContext) -> ModelLearnable:
        """The new global model out of the aggregator's result.

        Args:
            shareable: The result: a whole model, some of its keys, or a difference.
            fl_ctx: The context, which has the model that the round began with.

        Returns:
            What the controller is to hold; the former is unchanged.
        """
        base = global_model.model_of(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL))
        model, extra = convert.model_from_result(shareable, base)
        report = {"round": fl_ctx.get_prop(AppConstants.CURRENT_ROUND), **extra["report"]}
        job = {"roster": self._roster, "seed": self.seed, "transfer": self.transfer}
        return global_model.learnable(model, {**extra, "report": report, "job": job})
