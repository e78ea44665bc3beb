"""A disk that fails at an operation of one's choice."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest

from fedavg_core import atomic_file, checkpoint_store

__all__ = ["Faults", "fault_points"]


class Faults:
    """Stands in for `os` and `open`, and fails at the n-th operation, once or from there on."""

    def __init__(self, at: int = -1, keep: bool = False, partly: bool = False) -> None:
        self.at, self.keep, self.partly = at, keep, partly
        self.steps: list[str] = []
        self.trace: list[tuple[Any, ...]] = []
        self._inodes = itertools.count()

    def fails(self, step: str) -> bool:
        self.steps.append(step)
        now = len(self.steps) - 1
        return now == self.at or (self.keep and 0 <= self.at < now)

    def step(self, step: str) -> None:
        if self.fails(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_file(self, path: Any, mode: str) -> IO[bytes]:
        self.step("create")
        file: Any = _FaultyFile(self, open(path, mode), next(self._inodes))  # noqa: SIM115
        self.trace.append(("create", os.fspath(path), file.inode))
        return file  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("replace", "unlink", "fsync", "open", "close", "listdir"):
            return real

        def faulty(*arguments: Any, **more: Any) -> Any:
            if name == "close":  # which gives the descriptor up even where it fails
                real(*arguments)
                self.step(name)
                return None
            self.step(name)
            result = real(*arguments, **more)
            if name == "fsync":
                is_folder = stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                self.trace.append(("fsync folder",) if is_folder else ("fsync", self.last_inode))
            elif name in ("replace", "unlink"):
                self.trace.append((name, *map(os.fspath, arguments)))
            return result

        return faulty

    def __enter__(self) -> Faults:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(atomic_file, "os", self)
        self._patch.setattr(checkpoint_store, "os", self)
        self._patch.setattr(atomic_file, "open", self.open_file, raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class _FaultyFile:
    def __init__(self, faults: Faults, file: IO[bytes], inode: int) -> None:
        self._faults, self._file, self.inode = faults, file, inode
        faults.last_inode = inode  # type: ignore[attr-defined]

    def write(self, data: Any) -> int:
        position = self._file.tell()
        if self._faults.fails("write"):
            if self._faults.partly:
                self._file.write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._faults.trace.append(("write", self.inode, position, bytes(data)))
        return self._file.write(data)

    def flush(self) -> None:
        self._faults.step("flush")
        self._faults.trace.append(("flush", self.inode))
        self._file.flush()

    def seek(self, *arguments: int) -> int:
        self._faults.step("seek")
        return self._file.seek(*arguments)

    def read(self, *arguments: int) -> bytes:
        self._faults.step("read")
        return self._file.read(*arguments)

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._faults.step("close file")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fault_points(save: Callable[[], object]) -> Iterator[tuple[int, bool, bool]]:
    """What `Faults` takes to fail at each operation of a save, in each way."""
    with Faults() as faults:
        save()
    steps = faults.steps
    assert {"create", "write", "flush", "fsync", "replace", "open", "close"} <= set(steps)
    yield from itertools.product(range(len(steps)), (False, True), (False, True))
