"""What model files that are read together may use together, and where their arrays lie.

Where an array lies in a file is found once, and kept in a record of a few bytes: in memory as far
as it goes, and then in a scratch file. What the arrays are is the same for many files, and is kept
once for all that are alike.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from fedavg_core.codec.npy import Layout
from fedavg_core.errors import CheckpointError
from fedavg_core.out_of_core.stored_array import StoredArray

__all__ = ["Allowance"]

_PLACES = 1 << 26
_RECORD = struct.Struct("<QQ?Q")  # of a `StoredArray`: offset, packed, deflated, crc
_NO_CRC = 1 << 32  # which no CRC-32 reaches
_DIRECTORY_BYTES = 512


@dataclass(frozen=True)
class _Directory:
    """What the arrays of a file are, without where they are: often the same for many files."""

    numbers: dict[str, int]
    layouts: tuple[Layout, ...]


class _Places(Mapping[str, StoredArray]):
    """The arrays of a file, in few bytes each: records, which may lie in a file themselves."""

    def __init__(self, directory: _Directory, record: Callable[[int], bytes]) -> None:
        self._directory = directory
        self._record = record

    def __getitem__(self, key: str) -> StoredArray:
        number = self._directory.numbers[key]
        offset, packed, deflated, crc = _RECORD.unpack(self._record(number))
        layout = self._directory.layouts[number]
        return StoredArray(layout, offset, packed, deflated, None if crc == _NO_CRC else crc)

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.numbers)

    def __len__(self) -> int:
        return len(self._directory.numbers)


class Allowance:
    """What the files that are read together may use together. A context manager.

    Args:
        scratch: The folder for scratch files; one is made in it when the first is needed, and taken
            away when the context is left.
        inflaters: How many unfinished deflated members may keep their state.
        places: How many bytes of memory it may take to keep where arrays are, from one visit to the
            next; what is more goes to a scratch file.
        header: The longest JSON in a file to parse, in bytes: the header of a safetensors file, the
            index of an npz. None for what each is ever allowed.
        members: How many arrays an npz may have; None for as many as are ever read.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        inflaters: int,
        places: int = _PLACES,
        header: int | None = None,
        members: int | None = None,
    ) -> None:
        self.inflaters = inflaters
        self.header = header
        self.members = members
        self._places = places
        self._scratch = scratch
        self._folder: str | None = None
        self._directories: dict[tuple[tuple[str, ...], tuple[Layout, ...]], _Directory] = {}
        self._records: IO[bytes] | None = None

    def __enter__(self) -> Allowance:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._tidy_up()
        finally:  # should that be interrupted
            self._tidy_up()

    def _tidy_up(self) -> None:
        if self._records is not None:
            self._records.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def kept(self, arrays: Mapping[str, StoredArray]) -> Mapping[str, StoredArray] | None:
        """The same in few bytes, to be kept; None if that is no longer allowed.

        Raises:
            CheckpointError: A scratch file cannot be written.
        """
        layouts = tuple(array.layout for array in arrays.values())
        alike = tuple(arrays), layouts
        directory = self._directories.get(alike)
        if directory is None:
            # Those who plan for the names and shapes of a model have planned for the first.
            if self._directories and not self._may_take(len(arrays) * _DIRECTORY_BYTES):
                return None
            directory = _Directory({key: number for number, key in enumerate(arrays)}, layouts)
            self._directories[alike] = directory
        records = b"".join(
            _RECORD.pack(
                one.offset, one.packed, one.deflated, _NO_CRC if one.crc is None else one.crc
            )
            for one in arrays.values()
        )
        if self._may_take(len(records)):
            return _Places(directory, partial(_record_in, records))
        return _Places(directory, partial(_record_of, *self._set_down(records)))

    def _may_take(self, nbytes: int) -> bool:
        allowed = nbytes <= self._places
        self._places -= nbytes if allowed else 0
        return allowed

    def _set_down(self, records: bytes) -> tuple[IO[bytes], int]:
        """Put records into the scratch file that is for them; where they begin there."""
        with self._writing_scratch():
            if self._records is None:
                handle, _ = tempfile.mkstemp(dir=self._scratch_folder())
                self._records = open(handle, "w+b")  # noqa: SIM115
            start = self._records.seek(0, os.SEEK_END)
            self._records.write(records)
            self._records.flush()
            return self._records, start

    @contextlib.contextmanager
    def scratch_file(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A new scratch file, open for writing.

        Raises:
            CheckpointError: It cannot be written.
        """
        with self._writing_scratch():
            handle, name = tempfile.mkstemp(dir=self._scratch_folder())
            with open(handle, "wb") as file:
                yield file, Path(name)

    def _scratch_folder(self) -> str:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix=".fedavg-", dir=self._scratch)
        return self._folder

    @contextlib.contextmanager
    def _writing_scratch(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                self._scratch, f"a scratch file could not be written ({error.strerror or error})"
            ) from error


def _record_in(records: bytes, number: int) -> bytes:
    return records[number * _RECORD.size : (number + 1) * _RECORD.size]


def _record_of(file: IO[bytes], start: int, number: int) -> bytes:
    file.seek(start + number * _RECORD.size)
    return file.read(_RECORD.size)
