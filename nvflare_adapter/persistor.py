# mypy: disable-error-code="misc"
"""Keeps the global model of an NVFlare job in the core's checkpoints.

The model that the job starts from comes with it, as a checkpoint in the app's folder; after each
round the new one is stored under the job's result folder, with the report of the round. The best
model, whoever finds it (NVFlare has an event for that), is a checkpoint of its own in that folder.
A checkpoint is written whole or not at all. A damaged one ends the job: training never starts from
anything but what was asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

import fedavg_core as fc
from fedavg_core.atomic_file import make_folder, replacing
from nvflare_adapter import global_model
from nvflare_adapter.report import round_checkpoint
from nvflare_adapter.start import OPEN_FILE, SINGLE_ARRAY_KEY, read_start

__all__ = ["BEST_FILE", "CheckpointPersistor"]

BEST_FILE = "best_model.npz"
"""What the best model's file is called, unless the job says otherwise."""


class CheckpointPersistor(ModelPersistor):
    """Loads the model that a job starts from, and stores the global model after each round.

    Args:
        initial_file: The name of the checkpoint that was shipped with the job, or the path of a
            model's file that the server has; empty if clients start from their own model.
        folder: Where to store, below the job's result folder.
        keep: How many checkpoints to keep, the newest.
        best_model_filename: The name of the best model's file, in that folder.
        best_file: The name of the file, shipped with the job, of the best model so far.
        open_file: The same of what the first round has received already.
        numpy_file: Where to store the model in addition, if it is a single array, as NVFlare's own
            persistor does; empty for nowhere.
    """

    def __init__(
        self,
        initial_file: str = "",
        folder: str = "models",
        keep: int = 3,
        best_model_filename: str = BEST_FILE,
        best_file: str = "",
        open_file: str = "",
        numpy_file: str = "",
    ) -> None:
        super().__init__()
        self.initial_file = initial_file
        self.folder = folder
        self.keep = keep
        self.best_model_filename = best_model_filename
        self.best_file = best_file
        self.open_file = open_file
        self.numpy_file = numpy_file

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Store the global model as the best when NVFlare says that it is.

        Args:
            event_type: NVFlare's name of the event.
            fl_ctx: Its context.
        """
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            held = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
            completed = global_model.extra_of(held).get("report", {}).get("round", -1) + 1
            path = self._store(fl_ctx).folder / self.best_model_filename
            fc.save_checkpoint(path, _checkpoint(held, completed))
            self.log_info(fl_ctx, f"stored the best model: {path}")

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The model that the job starts from.

        Of a job that goes on where another ended, this one's folder also gets the checkpoint and
        the best model, as if it had been one job.

        Args:
            fl_ctx: The context, which knows where the app is.

        Returns:
            The model; empty if clients start from their own.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        if not self.initial_file:
            return global_model.learnable({})
        path = Path(self.initial_file)
        if path.is_absolute():
            start = read_start(path)
        else:
            path = self._shipped(self.initial_file, fl_ctx)
            start = fc.load_checkpoint(path)
        if start.round:
            self._store(fl_ctx).save(start)
        if self.best_file:
            best = fc.load_checkpoint(self._shipped(self.best_file, fl_ctx))
            fc.save_checkpoint(self._store(fl_ctx).folder / self.best_model_filename, best)
        spec = fc.ModelSpec.of(start.model)
        self.log_info(fl_ctx, f"round {start.round} starts from {path}: {spec!r}")
        extra: dict[str, Any] = {**start.extra, "arrays": start.arrays}
        if self.open_file:
            extra["open"] = fc.load_checkpoint(self._shipped(self.open_file, fl_ctx))
        return global_model.learnable(start.model, extra)

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Store the global model after a round; before that, the round's audit, if there is one.

        Args:
            model: What the controller holds; only read.
            fl_ctx: The context, which has the number of the round.

        Raises:
            CheckpointError: It cannot be written; what is stored is as it was.
        """
        completed = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) + 1
        store, audit = self._store(fl_ctx), global_model.extra_of(model).get("audit")
        if audit is not None:
            with replacing(store.folder / f"round-{completed:08d}.audit.json") as file:
                file.write(audit.encode())
        path = store.save(_checkpoint(model, completed))
        self.log_info(fl_ctx, f"stored the global model: {path}")
        if self.numpy_file:
            run = Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id())) / self.folder
            run.mkdir(parents=True, exist_ok=True)
            array = global_model.model_of(model).get(SINGLE_ARRAY_KEY)
            if array is None:
                self.log_info(fl_ctx, f"no {self.numpy_file}: no array {SINGLE_ARRAY_KEY}")
                return
            with replacing(run / self.numpy_file) as file:
                np.save(file, array)

    def save_open(self, received: fc.Checkpoint, fl_ctx: FLContext) -> None:
        """Store what an open round has received.

        Args:
            received: The aggregator's state; only read.
            fl_ctx: The context.

        Raises:
            CheckpointError: It cannot be written; what is stored is as it was.
        """
        fc.save_checkpoint(self._store(fl_ctx).folder / OPEN_FILE, received)

    def _store(self, fl_ctx: FLContext) -> fc.CheckpointStore:
        root = fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id())
        folder = Path(root) / self.folder
        make_folder(folder)  # more than checkpoints is written there
        return fc.CheckpointStore(folder, keep=self.keep)

    def _shipped(self, name: str, fl_ctx: FLContext) -> Path:
        workspace, job = fl_ctx.get_workspace(), fl_ctx.get_job_id()
        folders = workspace.get_app_config_dir(job), workspace.get_app_custom_dir(job)
        places = [Path(folder) / name for folder in folders]
        return next((place for place in places if place.is_file()), places[0])


def _checkpoint(held: ModelLearnable, completed: int) -> fc.Checkpoint:
    """The checkpoint of a global model; its audit is no part of it."""
    extra = {"report": {}, **global_model.extra_of(held)}
    arrays = extra.pop("arrays", {})
    extra.pop("audit", None)
    checkpoint = round_checkpoint(global_model.model_of(held), completed, **extra)
    return replace(checkpoint, arrays=arrays)
