"""Paths that callers give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from fedavg_core.errors import UsageError, quoted
from fedavg_core.plain import plain_text

__all__ = ["PathLike", "file_path"]

PathLike: TypeAlias = "str | os.PathLike[str]"


def file_path(name: str, value: object) -> Path:
    """An argument that is to be the path of a file or a folder.

    Args:
        name: The argument's.
        value: What was given.

    Returns:
        The path; whether anything is there is not looked at.

    Raises:
        UsageError: It is none, is empty, or has characters that no path has.
    """
    try:
        given = plain_text(os.fspath(value))  # type: ignore[call-overload]
    except Exception:  # a foreign object's method may do anything
        given = None
    if given and _can_be(given):
        return Path(given)
    raise UsageError(f"{name}: expected a path, got {quoted(value)}")


def _can_be(path: str) -> bool:
    """Whether the system can be asked for such a path."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
