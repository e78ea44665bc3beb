"""Files that are old or new, never torn, and folders that outlast a power cut.

**One commit.** A temporary file in the same folder is written, flushed to the disk and renamed over
the final name, and the folder is flushed. The rename is the commit: whatever happens before it, the
old file is as it was; from then on the new one is there, whole, since its bytes were on the disk
before its name was. A write that fails takes its temporary file away; one that is killed leaves it,
under a name that begins with a dot and ends in ``.tmp``.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedavg_core.errors import CheckpointError

__all__ = ["make_folder", "meant_for", "replacing"]

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")


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
        old: Whether an old file of that name is replaced. If not, what has that name at the start
            or at the commit stays as it is, and there is an error: the new name is a hard link,
            which no system puts in the place of another. Where the file system has no hard links,
            an empty file is made under the name, which is as exclusive, and then replaced; only
            there may a loss of power between the two leave it empty.

    Yields:
        An empty file beside it to write to, open for reading and writing.

    Raises:
        CheckpointError: It could not be written, or may not be replaced; an old file is as it was,
            unless the message says that the new one is in place.
    """
    if not old and os.path.lexists(path):
        raise CheckpointError(path, "it is there already, and is not replaced")
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
        reason = error.strerror or str(error)
        if not path.parent.is_dir():
            reason = f"there is no folder {path.parent}"
        raise CheckpointError(path, f"could not be written ({reason}); {state}") from error


def meant_for(name: str) -> str | None:
    """What a temporary file of `replacing` was to be.

    Args:
        name: The name of a file.

    Returns:
        The name that it was to have at the end; None if it is no temporary one.
    """
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else None


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


def _flush_folder(folder: Path) -> None:
    """Have the folder's entries written to the disk, on systems where a folder can be opened."""
    if sys.platform == "win32":  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
