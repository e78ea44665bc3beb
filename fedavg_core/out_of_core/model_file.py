"""A model in a file, read piece by piece.

Three formats are read: npz (members as they are, or deflated), safetensors, and npy, which holds
one array without a name, here called ``arr_0`` as `numpy.savez` calls it. The name's suffix says
which it is, or the first bytes if it is none of theirs.

A checkpoint counts as the model in it, under the model's own names; what else it holds is no part
of the model, and is not read.

A `ModelFile` is open only while it is visited, so that any number of them can be at hand. The first
look at one checks the container and each array's header; from then on the file may not change. A
visit reads, of some arrays, runs of elements in C order. How, depends on how an array lies:

* The elements of npy and safetensors lie there as they are, and any run is read directly. (By plain
  reads and not by a memory map: a map of a file that someone cuts short ends the process by a
  signal, and the pages that were touched count as memory of the process.)
* A member of an npz has a checksum over all of it, so it is read from its first element to its last
  in turn. Where one visit ends, the next goes on.
* Three kinds are first copied to a scratch file, once, in C order where that pays: a deflated
  member for which the allowance has no zlib state left, a member in Fortran order of which a visit
  does not want all, and any array in Fortran order of which a visit wants a few rows. The copy is
  taken away when its last element has been read. At any time there is at most one for each file.

Nothing a file declares is believed, and whatever is wrong with it is a `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.arguments import PathLike, file_path
from fedavg_core.checkpoint import MODEL, Checkpoint, described
from fedavg_core.codec.archive import Damaged, check_archive, require
from fedavg_core.codec.npy import MAGIC, Layout, decoded, read_layout
from fedavg_core.codec.npz import Entry, damage_told, list_npz
from fedavg_core.codec.safetensors import list_safetensors
from fedavg_core.errors import CheckpointError, RefusedUpdate, UsageError, quoted, shown_path
from fedavg_core.model import check_array
from fedavg_core.out_of_core.allowance import Allowance
from fedavg_core.out_of_core.stored_array import (
    DeflatedMember,
    Member,
    OpenBytes,
    StoredArray,
    Unpacked,
)

__all__ = ["ModelFile", "load_model"]

Array: TypeAlias = npt.NDArray[Any]

_SUFFIXES = {".npz", ".npy", ".safetensors"}
_UNBOUNDED = 1 << 62
_HEADER = 1 << 23  # bytes of a safetensors header, where nothing else is said
_LOCAL_HEADER = struct.Struct("<26x2H")
_NPY_NAME = "arr_0"


class ModelFile:
    """A model file, checked.

    Args:
        path: The file.
        allowance: What it may use, shared with others.

    Raises:
        CheckpointError: It is not there, or is damaged.
        RefusedUpdate: It holds something else than arrays of real numbers (DTYPE).
    """

    def __init__(self, path: Path, allowance: Allowance) -> None:
        self.path = path
        self._allowance = allowance
        self._identity: tuple[int, ...] | None = None
        self._sealed: bool | None = None
        self._under_way: tuple[str, int, Member | Unpacked] | None = None
        self._arrays = allowance.kept(self._list())

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the file is, without its arrays; None if it is another model.

        Raises:
            CheckpointError: The file has changed, or is no longer there.
        """
        if not self._sealed:
            return None
        with self._opened() as file, zipfile.ZipFile(file) as archive:
            entries, meta = list_npz(archive, True, self._allowance.header)
            return _described(entries, meta)

    def arrays(self) -> Mapping[str, StoredArray]:
        """The arrays that the file holds, in its order.

        Raises:
            CheckpointError: The file has changed, or is no longer there.
        """
        return self._list() if self._arrays is None else self._arrays

    def read(self, runs: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        """Visit the file: read runs of elements.

        It is quick where a member of an npz is read in turn from its first element to its last,
        from visit to visit, and to its end before the next one is begun.

        Args:
            runs: From array to the first element of the run, in C order, and their number (at least
                one). Arrays that the file does not hold are passed over.

        Returns:
            The elements, one dimension each, as new memory in native byte order.

        Raises:
            CheckpointError: The file is damaged or has changed, or a scratch file could not be
                written.
        """
        arrays = self.arrays()
        if arrays.keys().isdisjoint(runs):
            return {}
        with self._opened(buffering=0) as file:
            return {
                key: self._run(file, key, arrays[key], start, size)
                for key, (start, size) in runs.items()
                if key in arrays
            }

    @contextlib.contextmanager
    def _opened(self, buffering: int = -1) -> Iterator[IO[bytes]]:
        """The file, open, and known to be the one that was opened before, to the end."""
        try:
            regular = stat.S_ISREG(os.stat(self.path).st_mode)
            file = open(self.path, "rb", buffering) if regular else None  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(
                self.path, f"could not be read ({error.strerror or error})"
            ) from error
        if file is None:
            raise CheckpointError(self.path, "expected a file, got a folder or a device")
        with file, damage_told(str(self.path)):
            self._check_unchanged(file)
            yield file
            self._check_unchanged(file)

    def _check_unchanged(self, file: IO[bytes]) -> None:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        require(self._identity in (None, identity), "it has changed while it was read")
        self._identity = identity

    def _list(self) -> dict[str, StoredArray]:
        """Find the arrays; the container as a whole is checked the first time only."""
        with self._opened() as file:
            suffix = self.path.suffix.lower()
            if suffix in _SUFFIXES:
                return self._list_as(suffix, file)
            start = file.read(len(MAGIC))
            kind = ".npz" if start[:2] == b"PK" else ".safetensors"
            kind = ".npy" if start == MAGIC else kind
            file.seek(0)
            try:
                with damage_told(str(self.path)):
                    return self._list_as(kind, file)
            except CheckpointError as error:
                if not suffix:
                    raise
                # What begins like none of them may be anything.
                told = "" if kind == ".safetensors" else f" ({error.problem})"
                got = f"got suffix {quoted(suffix)}{told}"
                raise Damaged(f"expected npz, npy or safetensors, {got}") from None

    def _list_as(self, kind: str, file: IO[bytes]) -> dict[str, StoredArray]:
        """Find the arrays of a file of that suffix."""
        size = os.fstat(file.fileno()).st_size
        if kind == ".npz":
            if self._sealed is None:
                self._sealed = check_archive(file, _UNBOUNDED, self._allowance.members)
            arrays = _list_npz(file, self._sealed, self._allowance.header)
        elif kind == ".npy":
            layout = read_layout(file, size, None, "the file")
            arrays = {_NPY_NAME: StoredArray(layout, 0, size)}
        else:
            longest = self._allowance.header
            layouts = list_safetensors(file, size, _HEADER if longest is None else longest)
            arrays = {key: StoredArray(layout, 0, size) for key, layout in layouts.items()}
        for key, array in arrays.items():
            check_array(key, np.empty(0, array.layout.dtype))
        return arrays

    def _run(self, file: IO[bytes], key: str, array: StoredArray, start: int, size: int) -> Array:
        """Read a run of one array."""
        layout = array.layout
        shown = f"key {quoted(key)}"
        plain = OpenBytes(layout)
        if array.crc is None and (size == layout.size or not plain.is_scattered(size)):
            return decoded(plain.read(file, start, size), layout, shown)
        try:
            source = self._resumed(file, key, start) or self._begun(file, array, start, size)
            values = source.read(file, start, size)
            if start + size == layout.size:
                source.finish(file)
        except (Damaged, EOFError, zlib.error) as problem:
            raise Damaged(f"{shown}: {problem}") from None
        if start + size < layout.size:
            self._allowance.inflaters -= isinstance(source, DeflatedMember)
            self._under_way = key, start + size, source
        return decoded(values, layout, shown)

    def _resumed(self, file: IO[bytes], key: str, start: int) -> Member | Unpacked | None:
        """The member under way, if this is where it goes on; it is then no longer under way."""
        if self._under_way is None:
            return None
        *place, source = self._under_way
        self._under_way = None
        self._allowance.inflaters += isinstance(source, DeflatedMember)
        if place == [key, start]:
            return source
        if isinstance(source, Unpacked):
            source.finish(file)
        return None

    def _begun(
        self, file: IO[bytes], array: StoredArray, start: int, size: int
    ) -> Member | Unpacked:
        """A member, to be read from some element on."""
        layout = array.layout
        if array.crc is None:
            return self._in_order(file, layout)
        member = DeflatedMember(array) if array.deflated else Member(array)
        kept = start + size < layout.size
        in_turn = not layout.fortran or size == layout.size
        if in_turn and not (kept and array.deflated and self._allowance.inflaters < 1):
            member.skip(file, start)
            return member
        with self._allowance.scratch_file() as (out, path):
            member.unpack(file, out)
        unpacked = Unpacked(path, layout)
        if not OpenBytes(layout).is_scattered(size):
            return unpacked
        with open(path, "rb", 0) as whole:
            ordered = self._in_order(whole, layout)
        unpacked.finish(file)
        return ordered

    def _in_order(self, file: IO[bytes], layout: Layout) -> Unpacked:
        """A copy, in C order, of an array in Fortran order."""
        with self._allowance.scratch_file() as (out, path):
            return Unpacked(path, OpenBytes(layout).put_in_order(file, out))


def load_model(path: PathLike) -> dict[str, Array]:
    """Read a model whole, from an npz, npy or safetensors file, or out of a checkpoint.

    Args:
        path: The file.

    Returns:
        Its arrays under their names, in the order of the file: new memory, in native byte order.
        The one array of an npy file is called ``arr_0``.

    Raises:
        CheckpointError: It is not there, is no file of these kinds, or is damaged.
        UsageError: The path is none, or it holds something else than arrays of real numbers.
    """
    result = {}
    target = file_path("path", path)
    with Allowance(Path(tempfile.gettempdir()), inflaters=1) as allowance:
        try:
            file = ModelFile(target, allowance)
        except RefusedUpdate as refusal:
            raise UsageError(f"{shown_path(target)}: {refusal}") from None
        for key, array in file.arrays().items():
            shape, dtype = array.layout.shape, array.layout.dtype
            size = math.prod(shape)
            values = file.read({key: (0, size)})[key] if size else np.empty(0, dtype)
            result[key] = values.reshape(shape)
    return result


def _list_npz(file: IO[bytes], sealed: bool, longest: int | None) -> dict[str, StoredArray]:
    """Find the arrays of an npz file that has been checked as a container."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        entries, meta = list_npz(archive, sealed, longest)
        prefix = "" if _described(entries, meta) is None else MODEL
        for entry in entries:
            if not entry.name.startswith(prefix):
                continue
            member = entry.member
            with archive.open(member) as stream:
                shown = f"member {quoted(member.filename)}"
                layout = read_layout(stream, member.file_size, entry.dtype, shown)
            file.seek(member.header_offset)
            *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            arrays[entry.name.removeprefix(prefix)] = StoredArray(
                layout,
                member.header_offset + _LOCAL_HEADER.size + name_length + extra_length,
                member.compress_size,
                member.compress_type == zipfile.ZIP_DEFLATED,
                member.CRC,
            )
    return arrays


def _described(entries: list[Entry], meta: Mapping[str, Any]) -> Checkpoint | None:
    return described(meta, [entry.name for entry in entries]) if "checkpoint" in meta else None
