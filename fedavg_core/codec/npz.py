"""Named arrays to bytes and back: an npz file with a table of contents and a checksum.

What is written is an ordinary npz file, that is a zip of npy members, which plain `numpy.load`
opens. Three things make it a file that can be trusted:

* A member `fedavg.json` names each array, the member that holds it and its dtype, and carries the
  caller's own JSON. Array names are free: one that would look like a path, or like anything but a
  plain word, is stored under a number, so no name ever becomes a file name. The dtypes of
  `ml_dtypes` (bfloat16 and the float8 kinds), which npy cannot tell from raw bytes, are kept by
  name; the package is imported only to read such an array.
* It is sealed (see `archive`): a flipped bit anywhere, a missing tail or a byte too many is found.
* Nothing is compressed, dates are fixed and the order is the caller's: equal arrays and JSON give
  equal bytes under one version of Python.

Other people's npz files (of `numpy.savez` and `numpy.savez_compressed`) are read too, with what
checks they carry. No size is believed before memory is asked for: the container is checked first
(see `archive`), then each array's header, which must be the literal that NumPy writes, for an array
of numbers that takes just the bytes that its member has. Pickles are not read, and nothing in a
file is evaluated.

For files that do not fit into memory there is the same in pieces: `list_npz` tells what a file
holds, and `NpzWriter` takes the elements as they come.

What would be beyond a limit of the reader is not written: that is a `UsageError` before the first
byte.

Whatever the bytes, what comes out is the right arrays or a `CheckpointError`, never another error.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedavg_core.codec.archive import (
    BLOCK,
    MOST_MEMBERS,
    UNSEALED,
    Damaged,
    Seal,
    check_archive,
    require,
)
from fedavg_core.codec.npy import (
    MOST_DIMENSIONS,
    decoded,
    encoded,
    fits,
    header_of,
    read_exactly,
    read_layout,
)
from fedavg_core.errors import CheckpointError, UsageError, a_type, quoted
from fedavg_core.model import ArraySpec, Params, dtype_named, number_format

__all__ = ["Entry", "NpzWriter", "damage_told", "list_npz", "read_npz", "write_npz"]

_FORMAT = 1
_INDEX = "fedavg.json"
_MOST_INDEX = 1 << 26
_DEFAULT_LIMIT = 1 << 36
_PLAIN_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_NUMBERED = re.compile(r"array-[0-9]+")


@dataclass(frozen=True)
class Entry:
    """What an npz file holds under a name.

    Attributes:
        name: The array's name.
        member: The member that holds it.
        dtype: Its dtype, where the file has an index to tell it.
    """

    name: str
    member: zipfile.ZipInfo
    dtype: np.dtype[Any] | None


def write_npz(file: IO[bytes], arrays: Params, meta: Mapping[str, Any] | None = None) -> None:
    """Write arrays, and JSON that goes with them.

    Args:
        file: An empty file, open for reading and writing in binary.
        arrays: From any name to an array of bool, integers or floats of up to 64 bits, the kinds
            of `ml_dtypes` among them; only read.
        meta: What JSON can hold.

    Raises:
        UsageError: A name is no string, an array is of another dtype, the meta is not for JSON, or
            this is more than `read_npz` reads. Nothing is written then.
        OSError: As the file raises it.
    """
    for name, array in arrays.items():
        plain = isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray)
        if not isinstance(name, str) or not plain:
            raise UsageError(
                f"expected arrays under names that are strings, got {quoted(name)} with "
                f"{a_type(array)}"
            )
    spec = {name: ArraySpec(array.shape, array.dtype) for name, array in arrays.items()}
    writer = NpzWriter(file, spec, meta)
    if writer.nbytes > _DEFAULT_LIMIT:
        raise UsageError(
            f"expected arrays of at most {_DEFAULT_LIMIT} bytes together with their names and the "
            f"meta, got {writer.nbytes}"
        )
    with writer:
        for array in arrays.values():
            writer.write(array)


class _Archive(zipfile.ZipFile):
    """One that does not go on writing when it is collected: by then the file may be closed."""

    def __del__(self) -> None:
        pass


class NpzWriter:
    """Writes an npz file whose arrays come in pieces.

    A context manager; the file is whole when the context has been left without an error.

    Args:
        file: An empty file, open for reading and writing in binary.
        spec: The arrays that will come, in that order.
        meta: What JSON can hold.

    Raises:
        UsageError: An array is of a dtype or of more dimensions than are written, there are too
            many of them, or the meta is not for JSON or too long; on leaving the context, that
            elements are missing.
        OSError: As the file raises it.
    """

    def __init__(
        self,
        file: IO[bytes],
        spec: Mapping[str, ArraySpec],
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if len(spec) >= MOST_MEMBERS:
            raise UsageError(f"expected at most {MOST_MEMBERS - 1} arrays, got {len(spec)}")
        entries = []
        for number, (name, array) in enumerate(spec.items()):
            if _dtype_name(array.dtype) is None:
                raise UsageError(
                    f"key {quoted(name)}: expected an array of bool, integers or floats of up to "
                    f"64 bits, got dtype {quoted(str(array.dtype))}"
                )
            if len(array.shape) > MOST_DIMENSIONS:
                raise UsageError(
                    f"key {quoted(name)}: expected an array of at most {MOST_DIMENSIONS} "
                    f"dimensions, got {len(array.shape)}"
                )
            if not fits(array.shape):
                raise UsageError(f"key {quoted(name)}: no file can hold the shape {array.shape}")
            plain = len(name) <= 200 and _PLAIN_NAME.fullmatch(name) and not _NUMBERED.match(name)
            member = f"{name if plain else f'array-{number}'}.npy"
            entries.append({"name": name, "member": member, "dtype": _dtype_name(array.dtype)})
        try:
            _check_names(meta)
            index = json.dumps({"format": _FORMAT, "meta": dict(meta or {}), "arrays": entries})
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"expected meta that JSON can hold: {quoted(str(error))}") from error
        if len(index) > _MOST_INDEX:
            raise UsageError(
                f"expected names of arrays and meta that take at most {_MOST_INDEX} bytes as JSON, "
                f"got {len(index)}"
            )
        self._file = file
        self._index = index
        self._spec = spec
        self._coming = zip([str(entry["member"]) for entry in entries], spec.values(), strict=True)
        self._member: IO[bytes] | None = None
        self._left = 0

    @property
    def nbytes(self) -> int:
        """How many bytes the members of the file will have together."""
        return len(self._index) + sum(
            len(header_of(array)) + math.prod(array.shape) * array.dtype.itemsize
            for array in self._spec.values()
        )

    def write(self, values: npt.NDArray[Any]) -> None:
        """Write the next elements.

        Args:
            values: Some or all elements of one array, in C order after those before them, in the
                dtype that was announced; only read. Arrays without elements need not come.

        Raises:
            UsageError: These are more elements than are left of an array.
        """
        while values.size and not self._left and self._next():
            pass
        if values.size > self._left:
            raise UsageError("expected the elements of the arrays in their order, got others")
        self._left -= values.size
        data = encoded(values)
        for start in range(0, len(data), BLOCK):
            self._member.write(data[start : start + BLOCK])  # type: ignore[union-attr]

    def _next(self) -> bool:
        """Begin the next array; False if that was the last."""
        if self._member is not None:
            self._member.close()
            self._seal.reach(self._file.tell())
        name, array = next(self._coming, (None, None))
        if name is None or array is None:
            return False
        self._member = self._archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)
        self._member.write(header_of(array))
        self._left = int(np.prod(array.shape, dtype=object))
        return True

    def __enter__(self) -> NpzWriter:
        self._archive = _Archive(self._file, "w", zipfile.ZIP_STORED)
        self._seal = Seal(self._file)
        try:
            self._archive.comment = UNSEALED
            self._archive.writestr(zipfile.ZipInfo(_INDEX), self._index)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                while not self._left and self._next():
                    pass
                if self._left:
                    raise UsageError("expected all elements of all arrays, some did not come")
                self._archive.close()
                self._seal.write()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Have all forget the file."""
        for part in (self._member, self._archive, self._seal):
            if part is not None:
                with suppress(OSError, ValueError):
                    part.close()


def read_npz(
    file: IO[bytes], *, own: bool = False, limit: int = _DEFAULT_LIMIT
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write_npz` wrote, or another program's npz file.

    Args:
        file: A seekable file, open for reading in binary.
        own: Whether to refuse a file that `write_npz` did not write.
        limit: The most bytes of arrays to make.

    Returns:
        The arrays, as new memory in C order (or in Fortran order where they were written so) and
        in native byte order, and the meta: empty for another program's file.

    Raises:
        CheckpointError: The bytes are damaged, are not what they claim to be, or ask for more than
            the limit.
    """
    with damage_told(str(getattr(file, "name", "<bytes>"))):
        sealed = check_archive(file, limit)
        require(
            sealed or not own,
            "damaged, or no checkpoint of fedavg-core: its checksum is missing (load_model reads "
            "other models)",
        )
        with zipfile.ZipFile(file) as archive:
            entries, meta = list_npz(archive, sealed)
            return {entry.name: _read_array(archive, entry) for entry in entries}, meta


@contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Turn whatever error reading damaged bytes may end in into the one that tells so.

    Args:
        name: The file, for the message.

    Raises:
        CheckpointError: In the place of the other error.
    """
    try:
        yield
    except Damaged as problem:
        raise CheckpointError(name, str(problem)) from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OSError,
        OverflowError,
        RecursionError,
        RuntimeError,
        ValueError,
    ) as error:
        raise CheckpointError(name, f"unreadable ({quoted(str(error), 200)})") from error


def list_npz(
    archive: zipfile.ZipFile, sealed: bool, longest: int | None = None
) -> tuple[list[Entry], dict[str, Any]]:
    """What an npz file holds.

    Args:
        archive: The file, which has been checked.
        sealed: Whether it is sealed.
        longest: The longest index to read, in bytes, if that is less than any file's may be.

    Returns:
        Its arrays, and the meta: empty for another program's file.

    Raises:
        Damaged: Its index is missing, or is not what it should be.
        ValueError, RecursionError: The same, by `json`.
    """
    members = {member.filename: member for member in archive.infolist()}
    index = members.pop(_INDEX, None)
    require((index is not None) == sealed, "either its index or its checksum is missing")
    if index is not None:
        most = _MOST_INDEX if longest is None else min(_MOST_INDEX, longest)
        length = index.file_size
        require(length <= most, f"its index has {length} bytes; the limit is {most}")
        return _read_index(archive, index, members)
    return [Entry(_stem(name), member, None) for name, member in members.items()], {}


def _check_names(held: object) -> None:
    """See that names within JSON are strings; it would make strings of others, of two maybe one."""
    if isinstance(held, dict):
        for name in held:
            if not isinstance(name, str):
                raise TypeError(f"the name {name!r} is no string")
        held = held.values()
    elif not isinstance(held, (list, tuple)):
        return
    for item in held:
        _check_names(item)


def _dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The name that a dtype is kept under; None for one that is not written."""
    if dtype.kind != "b" and number_format(dtype) is None:
        return None
    return str(dtype.name)


def _dtype_named(name: object) -> np.dtype[Any]:
    """The dtype that a file names, in native byte order."""
    if name == "bool":
        return np.dtype(np.bool_)
    if not isinstance(name, str):
        raise Damaged(f"a dtype's name is {quoted(name)}")
    try:
        return dtype_named(name)
    except UsageError as problem:
        raise Damaged(str(problem)) from None


def _stem(member: str) -> str:
    """The array's name that a member of another program's file stands for."""
    require(member.endswith(".npy"), f"member {quoted(member)}: expected an array, a .npy")
    return member[: -len(".npy")]


def _read_index(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, members: Mapping[str, zipfile.ZipInfo]
) -> tuple[list[Entry], dict[str, Any]]:
    index = json.loads(archive.read(member))
    require(isinstance(index, dict), "its index is no JSON object")
    version, meta, listed = (index.get(field) for field in ("format", "meta", "arrays"))
    require(version == _FORMAT, f"its format is {quoted(version)}; this version reads {_FORMAT}")
    require(isinstance(meta, dict) and isinstance(listed, list), "its index is incomplete")
    found: list[tuple[str, str, np.dtype[Any]]] = []
    for entry in listed:
        require(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("member"), str),
            "its index is incomplete",
        )
        found.append((entry["name"], entry["member"], _dtype_named(entry.get("dtype"))))
    require(
        len({name for name, *_ in found}) == len(found) == len(members)
        and {member for _, member, _ in found} == members.keys(),
        "its index lists other arrays than it holds",
    )
    return [Entry(name, members[member], dtype) for name, member, dtype in found], meta


def _read_array(archive: zipfile.ZipFile, entry: Entry) -> npt.NDArray[Any]:
    shown = f"member {quoted(entry.member.filename)}"
    with archive.open(entry.member) as stream:
        layout = read_layout(stream, entry.member.file_size, entry.dtype, shown)
        flat = np.empty(layout.size, dtype=layout.stored)
        view = flat.view(np.uint8).data
        for start in range(0, len(view), BLOCK):
            view[start : start + BLOCK] = read_exactly(stream, min(BLOCK, len(view) - start))
        stream.read(1)  # where the checksum of the member is compared
    flat = decoded(flat, layout, shown)
    shape = layout.shape
    return flat.reshape(shape[::-1]).T if layout.fortran else flat.reshape(shape)
