# mypy: disable-error-code="misc"
"""Keeps the global model of an NVFlare job in the core's checkpoints.

The initial model comes with the job, as a checkpoint file in the app's folder; after each round
the new one is stored under the job's result folder, with the report of the round. A checkpoint is
written whole or not at all. A damaged one ends the job: training never starts from anything but
what was asked for.
"""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

import fedavg_core as fc
from nvflare_adapter import convert
from nvflare_adapter.report import round_checkpoint

__all__ = ["CheckpointPersistor"]


class CheckpointPersistor(ModelPersistor):
    """Loads the initial model, and stores the global model after each round.

    Args:
        initial_file: The name of the checkpoint that was shipped with the job; empty if clients
            start from their own model.
        folder: Where to store, below the job's result folder.
        keep: How many checkpoints to keep, the newest.
    """

    def __init__(self, initial_file: str = "", folder: str = "models", keep: int = 3) -> None:
        super().__init__()
        self.initial_file = initial_file
        self.folder = folder
        self.keep = keep

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The model that round 0 starts from.

        Args:
            fl_ctx: The context, which knows where the app is.

        Returns:
            The model; empty if clients start from their own.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        if not self.initial_file:
            return convert.learnable({})
        workspace, job = fl_ctx.get_workspace(), fl_ctx.get_job_id()
        places = [
            Path(folder) / self.initial_file
            for folder in (workspace.get_app_config_dir(job), workspace.get_app_custom_dir(job))
        ]
        path = next((place for place in places if place.is_file()), places[0])
        model = fc.load_checkpoint(path).model
        self.log_info(fl_ctx, f"round 0 starts from {path}: {fc.ModelSpec.of(model)!r}")
        return convert.learnable(model)

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Store the global model after a round.

        Args:
            model: What the controller holds; only read.
            fl_ctx: The context, which has the number of the round.

        Raises:
            CheckpointError: It cannot be written; what is stored is as it was.
        """
        root = fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id())
        completed = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) + 1
        extra = {"report": {}, **convert.extra_of(model)}
        checkpoint = round_checkpoint(convert.model_of(model), completed, **extra)
        path = fc.CheckpointStore(Path(root) / self.folder, keep=self.keep).save(checkpoint)
        self.log_info(fl_ctx, f"stored the global model: {path}")
