"""The folder of a run: what is where in it, and whether a run may begin or go on there."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.cli.run_log import LOG, SETTINGS, read_log
from fedavg_core.errors import UsageError

__all__ = [
    "FIRST_MODEL",
    "MODEL",
    "audit_file",
    "base_file",
    "folder_of",
    "rounds_stored",
    "updates_folder",
]

MODEL = "model.npz"
"""The model that a run ends with."""

FIRST_MODEL = "first-model.npz"
"""The model that it begins with, where updates are kept."""


def audit_file(folder: Path, round: int) -> Path:
    """The audit of a round."""
    return folder / f"audit-{round:08d}.json"


def updates_folder(folder: Path, round: int) -> Path:
    """The updates of a round, where they are kept."""
    return folder / f"updates-{round:08d}"


def base_file(folder: Path, round: int) -> Path:
    """The model that a round begins with: the checkpoint of those before it."""
    return folder / (f"round-{round:08d}.npz" if round else FIRST_MODEL)


def rounds_stored(folder: Path) -> int:
    """Of how many rounds the newest checkpoint is."""
    paths = CheckpointStore(folder).paths()
    return int(paths[-1].stem.split("-")[1]) if paths else 0


def folder_of(train: Path, folder: Path | None, resume: bool) -> Path:
    """The folder of a run that is to begin, or to go on.

    Args:
        train: The training file.
        folder: What was asked for; None for a new one.
        resume: Whether the run is to go on; else its folder may not be there, or is empty.

    Returns:
        The folder, which may not be there yet.

    Raises:
        UsageError: No such run can begin or go on there.
    """
    if folder is None:
        if resume:
            raise UsageError("--resume: expected --checkpoint DIR as well")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-4]
        return Path("fedavg-runs") / f"{stamp}-{train.stem}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--checkpoint: expected a folder, got {folder}")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"--checkpoint: expected a new or empty folder, or --resume as well, got {folder}"
        )
    if resume:
        _see_that_it_is_a_run(folder)
    return folder


def _see_that_it_is_a_run(folder: Path) -> None:
    """Refuse a folder without checkpoints that has something else in it, or did have them."""
    if not folder.exists() or CheckpointStore(folder).paths():
        return
    if not (folder / SETTINGS).exists():
        if any(not one.name.startswith(".") for one in folder.iterdir()):
            raise UsageError(
                f"--resume: expected the folder of a run, or a new or empty one, got {folder}, "
                f"which has neither checkpoints nor a {SETTINGS}"
            )
    elif (folder / LOG).exists():
        done = len(read_log(folder)) - 1  # the last may have been interrupted
        if done > 0:
            raise UsageError(
                f"--resume: expected a checkpoint of the {done} rounds that {folder / LOG} tells "
                f"of, got none in {folder}"
            )
