"""The checkpoints of one run: a folder with one writer.

**No silent repair.** Loading gives what was saved or raises `CheckpointError`. It never turns to
another file by itself: the error names the newest checkpoint that is whole, and whether to go on
from that one is for the caller to say.

**One writer.** A `CheckpointStore` holds a lock on its folder while it writes, or from entering it
to leaving it as a context manager. The lock is the operating system's (`flock`), so that it ends
with the process that holds it, however that ends. A second writer is told at once. What killed
writers have left under names that no reader looks at, the next one takes away.

A store keeps the last few checkpoints, and of those that were the best when they were saved, the
last. Which is which shows in their names, so that it is part of the same commit: a round that is
saved again, and is now the best where it was not, or the other way round, has the number of that
save in its name, after its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fedavg_core.arguments import PathLike, file_path, truth, whole_number
from fedavg_core.atomic_file import make_folder, meant_for
from fedavg_core.checkpoint import Checkpoint, load_checkpoint, round_of, save_checkpoint
from fedavg_core.errors import CheckpointError, UsageError

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

__all__ = ["CheckpointStore"]

_NAME = re.compile(r"round-([0-9]{8,18})(?:-([0-9]{1,18}))?(-best)?\.npz")
_LOCK = ".lock"
_READ_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class _Stored(NamedTuple):
    """A checkpoint that is there. In their order, the last of them is what was saved last."""

    round: int
    turn: int
    best: bool
    path: Path


class CheckpointStore:
    """A folder of the checkpoints of one run.

    Entering it as a context manager keeps every other writer out until it is left. Outside of that,
    each save does so for its own duration. One store is for one thread at a time; others may have
    their own, of the same folder.

    Args:
        folder: Where they are; made by the first who writes there.
        keep: How many of the newest to keep. The last that was the best when it was saved is kept
            in addition.

    Raises:
        UsageError: The folder is no path, or fewer than one is to be kept.
    """

    def __init__(self, folder: PathLike, keep: int = 3) -> None:
        self._folder = file_path("folder", folder)
        self._keep = whole_number("keep", keep, 1)
        self._lock: int | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self._folder

    def paths(self) -> tuple[Path, ...]:
        """The checkpoints that are there, the oldest round first. None of them is opened.

        Returns:
            Their files; empty if there are none.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        return tuple(stored.path for stored in self._listing())

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and then take away those that are no longer to be kept.

        Args:
            checkpoint: What to write; only read. It replaces one of the same round, but for the
                last best: that is kept beside it, as `load_best` gives it, until there is another.

        Returns:
            Its file.

        Raises:
            CheckpointError: It could not be written, or another writer is at work in the folder;
                all that was there before is as it was, unless the message says that the new one is
                in place.
            UsageError: It holds what a checkpoint cannot (see `save_checkpoint`), or is of an
                earlier round than one that is there.
        """
        number, best = round_of(checkpoint), truth("best", checkpoint.best)
        with contextlib.nullcontext() if self._lock is not None else self:
            newest, turn = number, 1
            for last in self._listing()[-1:]:
                newest = last.round
                if newest == number:  # a name of its own, after that one's, or the very same
                    turn = last.turn + (last.best != best)
            if newest > number:
                raise UsageError(
                    f"{self._folder}: expected a checkpoint of round {newest}, "
                    f"the newest that is there, or later, got one of round {number}"
                )
            again = f"-{turn}" if turn > 1 else ""
            path = self._folder / f"round-{number:08d}{again}{'-best' if best else ''}.npz"
            save_checkpoint(path, checkpoint)
            self._prune()
        return path

    def load(self) -> Checkpoint:
        """Read the newest checkpoint.

        Returns:
            What was saved last.

        Raises:
            CheckpointError: There is none, or it is damaged; then the error names the newest one
                that is whole, which is not loaded instead.
        """
        paths = self.paths()
        if not paths:
            there = "checkpoint in this" if self._folder.exists() else "such"
            raise CheckpointError(self._folder, f"there is no {there} folder")
        try:
            return load_checkpoint(paths[-1])
        except CheckpointError as error:
            good = next((path for path in reversed(paths[:-1]) if _is_whole(path)), None)
            raise CheckpointError(error.path, error.problem, newest_good=good) from error

    def load_best(self) -> Checkpoint | None:
        """Read the last checkpoint that was the best when it was saved.

        Returns:
            It, or None if none was saved as the best.

        Raises:
            CheckpointError: It is damaged.
        """
        best = [stored.path for stored in self._listing() if stored.best]
        return load_checkpoint(best[-1]) if best else None

    def __enter__(self) -> CheckpointStore:
        if self._lock is not None:
            raise UsageError(f"{self._folder}: this store has been entered already")
        make_folder(self._folder)
        path = self._folder / _LOCK
        try:
            lock = os.open(path, _READ_WRITE, 0o644)
        except OSError as error:
            raise CheckpointError(
                self._folder, f"cannot be written to ({error.strerror or error})"
            ) from error
        try:
            try:
                if sys.platform == "win32":  # pragma: no cover
                    msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                busy = isinstance(error, (BlockingIOError, PermissionError))
                raise CheckpointError(
                    self._folder,
                    "another writer is at work in this folder"
                    if busy
                    else f"cannot be locked ({error.strerror or error})",
                ) from error
            self._lock = lock
            _entered.add(self)
            self._sweep()
            return self
        except BaseException:
            self._lock = None
            _close(lock)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            _close(lock)

    def _listing(self) -> list[_Stored]:
        """The checkpoints, in their order."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                self._folder, f"could not be read ({error.strerror or error})"
            ) from error
        found = ((_NAME.fullmatch(name), name) for name in names)
        return sorted(
            _Stored(int(match[1]), int(match[2] or 1), match[3] is not None, self._folder / name)
            for match, name in found
            if match
        )

    def _sweep(self) -> None:
        """Take away what killed writers of checkpoints left: with the lock held, nobody else's."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                if _NAME.fullmatch(meant_for(name) or ""):
                    _unlink(self._folder / name)

    def _prune(self) -> None:
        """Take away what is not to be kept. A file that cannot be taken away does no harm."""
        with contextlib.suppress(CheckpointError):
            listing = self._listing()
            newest = list({stored.round: stored.path for stored in listing}.values())
            best = [stored.path for stored in listing if stored.best]
            keep = {*best[-1:], *newest[-self._keep :]}
            for stored in listing:
                if stored.path not in keep:
                    _unlink(stored.path)


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _unlink(path: Path) -> None:
    """Take a file away, if that can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _leave_all() -> None:  # pragma: no cover  (in a process that was forked)
    """Give up what a process that was forked has of its parent's locks: they are the parent's."""
    for store in list(_entered):
        store.__exit__(None, None, None)


_entered: weakref.WeakSet[CheckpointStore] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # pragma: no branch  (all but Windows)
    os.register_at_fork(after_in_child=_leave_all)


def _close(lock: int) -> None:
    """Give up a lock. That is done even where the system reports an error."""
    with contextlib.suppress(OSError):
        os.close(lock)
