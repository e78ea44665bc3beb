"""Checkpoints: one file each, old or new, never torn.

A checkpoint is a file that `codec` can read: an npz of the model's arrays (named ``model/...``) and
of any further ones (``arrays/...``), with the rest as JSON, and a checksum over all of it.

**One commit.** A save writes a temporary file in the same folder, flushes it to the disk, renames
it over the final name, and flushes the folder. The rename is the commit: whatever happens before
it, the old file is as it was; from then on the new one is there, whole, since its bytes were on the
disk before its name was. A save that fails takes its temporary file away; one that is killed leaves
it, under a name that no reader looks at, for the next writer to take away.

**No silent repair.** Loading gives what was saved or raises `CheckpointError`. It never turns to
another file by itself: the error names the newest checkpoint that is whole, and whether to go on
from that one is for the caller to say.

**One writer.** A `CheckpointStore` holds a lock on its folder while it writes, or from entering it
to leaving it as a context manager. The lock is the operating system's (`flock`), so that it ends
with the process that holds it, however that ends. A second writer is told at once.

A store keeps the last few checkpoints, and of those that were the best when they were saved, the
last. Which is which shows in their names, so that it is part of the same commit: a round that is
saved again, and is now the best where it was not, or the other way round, has the number of that
save in its name, after its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from fedavg_core.archive import Damaged, require
from fedavg_core.codec import damage_told, read_npz, write_npz
from fedavg_core.errors import CheckpointError, UsageError, a_type, quoted
from fedavg_core.model import Params

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

__all__ = [
    "MODEL",
    "Checkpoint",
    "CheckpointStore",
    "described",
    "load_checkpoint",
    "make_folder",
    "replacing",
    "save_checkpoint",
]

MODEL = "model/"
"""What stands in a file before the names of the model's arrays."""

_FORMAT = 1
_ARRAYS = "arrays/"
_NAME = re.compile(r"round-([0-9]{8,18})(?:-([0-9]{1,18}))?(-best)?\.npz")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]{{16}}\.tmp")
_LOCK = ".lock"
_READ_WRITE = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        model: The global model.
        round: How many rounds are completed.
        metrics: Numbers about the model.
        extra: Anything else that JSON can hold, such as settings.
        arrays: Further arrays, such as the state of a server optimizer.
        best: Whether the model was the best so far when it was saved.
    """

    model: Params
    round: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    arrays: Params = field(default_factory=dict)
    best: bool = False


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint to a file, in one commit.

    Args:
        path: The file; an old one of that name is replaced. Its folder must be there.
        checkpoint: What to write; only read.

    Raises:
        CheckpointError: It could not be written; an old file is as it was, unless the message says
            that the new one is in place.
        UsageError: It is no checkpoint, or holds what one cannot: arrays that are not of numbers or
            bool, names that are no strings, a round that is no whole number, a metric that float64
            cannot hold, what JSON cannot hold, or more than `load_checkpoint` reads. Nothing is
            written then.
    """
    _check_kind(checkpoint)
    target = Path(path)
    for field_name in ("model", "arrays", "metrics", "extra"):
        held: object = getattr(checkpoint, field_name)
        if not isinstance(held, Mapping):
            raise UsageError(f"{field_name}: expected a mapping, got {quoted(held)}")
    arrays = {MODEL + _name(key): value for key, value in checkpoint.model.items()}
    arrays.update({_ARRAYS + _name(key): value for key, value in checkpoint.arrays.items()})
    meta = {
        "checkpoint": _FORMAT,
        "round": _round(checkpoint.round),
        "metrics": {_name(name): _number(value) for name, value in checkpoint.metrics.items()},
        "extra": dict(checkpoint.extra),
        "best": bool(checkpoint.best),
    }
    with replacing(target) as file:
        write_npz(file, arrays, meta)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in, where they are not there; they outlast a power cut.

    Args:
        path: The folder.

    Raises:
        CheckpointError: It could not be made.
    """
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            _flush_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            path, f"the folder could not be made ({error.strerror or error})"
        ) from error


@contextlib.contextmanager
def replacing(path: Path, *, old: bool = True) -> Iterator[IO[bytes]]:
    """Write a file in one commit: when the context is left without an error, and not before.

    Args:
        path: The file. Its folder must be there.
        old: Whether an old file of that name is replaced. If not, what has that name at the commit
            stays as it is, and there is an error: the new name is a hard link, which no system
            puts in the place of another. Where the file system has no hard links, an empty file is
            made under the name, which is as exclusive, and then replaced; only there may a loss of
            power between the two leave it empty.

    Yields:
        An empty file beside it to write to, open for reading and writing.

    Raises:
        CheckpointError: It could not be written, or may not be replaced; an old file is as it was,
            unless the message says that the new one is in place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    committed = False
    try:
        try:
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if old:
                os.replace(temporary, path)
            else:
                _name_new(temporary, path)
            committed = True
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _flush_folder(path.parent)
    except FileExistsError as error:
        raise CheckpointError(
            path, "it came to be while this was written, and is not replaced"
        ) from error
    except OSError as error:
        state = (
            "it is in place, but may not outlast a loss of power"
            if committed
            else "what was there before is as it was"
        )
        raise CheckpointError(
            path, f"could not be written ({error.strerror or error}); {state}"
        ) from error


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint from a file.

    Args:
        path: The file.

    Returns:
        What was saved. The arrays are new memory, in the dtypes that they had, in native byte
        order; what JSON holds is as JSON gives it back (a tuple is a list).

    Raises:
        CheckpointError: The file is not there, is no regular file, is damaged, or is no checkpoint.
    """
    target = Path(path)
    try:
        with open(target, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(target, "not a regular file")
            arrays, meta = read_npz(file, own=True)
    except OSError as error:
        raise CheckpointError(target, f"could not be read ({error.strerror or error})") from error
    with damage_told(str(target)):
        found = described(meta, arrays)
    model, others = (
        {key.removeprefix(part): array for key, array in arrays.items() if key.startswith(part)}
        for part in (MODEL, _ARRAYS)
    )
    return replace(found, model=model, arrays=others)


def described(meta: Mapping[str, Any], names: Iterable[str]) -> Checkpoint:
    """What a file tells of the checkpoint in it, beside the arrays.

    Args:
        meta: The JSON that goes with its arrays.
        names: Their names.

    Returns:
        The checkpoint, without its arrays.

    Raises:
        Damaged: It is no checkpoint.
    """
    require("checkpoint" in meta, "no checkpoint, but a model alone, which load_model reads")
    version = meta["checkpoint"]
    require(
        version == _FORMAT,
        f"no checkpoint of format {_FORMAT}, the one that this version reads, but "
        f"{quoted(version)}",
    )
    try:
        for name in names:
            if not name.startswith((MODEL, _ARRAYS)):
                raise KeyError(name)
        return Checkpoint(
            model={},
            round=_round(meta["round"]),
            metrics={name: _number(value) for name, value in meta["metrics"].items()},
            extra=dict(meta["extra"]),
            best=bool(meta["best"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"its contents are not those of a checkpoint ({quoted(str(error))})"
        ) from error


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
        UsageError: Fewer than one is to be kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise UsageError(f"keep: expected a whole number of at least 1, got {quoted(keep)}")
        self._folder = Path(folder)
        self._keep = keep
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
        _check_kind(checkpoint)
        number, best = _round(checkpoint.round), bool(checkpoint.best)
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
                if _TEMPORARY.fullmatch(name):
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


def _check_kind(given: object) -> None:
    if not isinstance(given, Checkpoint):
        raise UsageError(f"expected a Checkpoint to save, got {a_type(given)}")


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"expected names that are strings, got {quoted(name)}")
    return name


def _round(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 10**18:
        raise UsageError(f"round: expected a whole number from 0 on, got {quoted(number)}")
    return number


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise UsageError(f"metrics: expected numbers, got {quoted(value)}")
    try:
        return float(value)
    except OverflowError:
        raise UsageError(
            f"metrics: expected numbers that float64 can hold, got {quoted(value)}"
        ) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever might be at the other end of it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _name_new(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing else has; the old one may stay.

    Raises:
        FileExistsError: Something has it.
        OSError: The system does not do it.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # there are no hard links, or something else is wrong, which will show
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(path)
            raise


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


def _flush_folder(folder: Path) -> None:
    """Have the folder's entries written to the disk, on systems where a folder can be opened."""
    if sys.platform == "win32":  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
