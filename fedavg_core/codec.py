"""Named arrays to bytes and back: an npz file with a table of contents and a checksum.

What is written is an ordinary npz file, that is a zip of npy members, which plain `numpy.load`
opens. Three things make it a file that can be trusted:

* A member `fedavg.json` names each array, the member that holds it and its dtype, and carries the
  caller's own JSON. Array names are free: one that would look like a path, or like anything but a
  plain word, is stored under a number, so no name ever becomes a file name. The dtypes of
  `ml_dtypes` (bfloat16 and the float8 kinds), which npy cannot tell from raw bytes, are kept by
  name; the package is imported only to read such an array.
* The zip's closing comment is a SHA-256 of every byte before it. A flipped bit anywhere, a missing
  tail or a byte too many is found before anything else is looked at.
* Nothing is compressed, dates are fixed and the order is the caller's: equal arrays and JSON give
  equal bytes.

Other people's npz files (of `numpy.savez` and `numpy.savez_compressed`) are read too, with what
checks they carry. Bytes are never believed before they are checked: every declared size is held
against the length of the file and against a limit before memory is asked for; members must fill
the file without holes or overlaps; no name may occur twice or look like a path; a header must be
the literal that NumPy writes, for an array of numbers of a size that fits its member; a member may
not inflate more than a hundredfold. Pickles are not read, and nothing in a file is evaluated.

Whatever the bytes, what comes out is the right arrays or a `CheckpointError`, never another error.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import CheckpointError, UsageError, quoted
from fedavg_core.model import Params, dtype_named, number_format

__all__ = ["read_npz", "write_npz"]

_FORMAT = 1
_INDEX = "fedavg.json"
_COMMENT = b"fedavg-core sha256 "
_DIGEST_LENGTH = 64
_BLOCK = 1 << 18
_MOST_MEMBERS = 1 << 16
_MOST_INDEX = 1 << 26
_MOST_HEADER = 10_000
_MOST_INFLATION = 100
_DEFAULT_LIMIT = 1 << 36
_PLAIN_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_PLAIN_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_NUMBERED = re.compile(r"array-[0-9]+")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|])([a-zA-Z][0-9]{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}(?:, |,(?=\))|(?=\))))*)\), \} *\n"
)
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")


def write_npz(file: IO[bytes], arrays: Params, meta: Mapping[str, Any] | None = None) -> None:
    """Write arrays, and JSON that goes with them.

    Args:
        file: An empty file, open for reading and writing in binary.
        arrays: From any name to an array of bool, integers or floats of up to 64 bits, the kinds
            of `ml_dtypes` among them; only read.
        meta: What JSON can hold.

    Raises:
        UsageError: A name is no string, an array is of another dtype, or the meta is not for JSON.
        OSError: As the file raises it.
    """
    entries = []
    for number, (name, array) in enumerate(arrays.items()):
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise UsageError(
                f"expected arrays under names that are strings, got {quoted(name)} with an object "
                f"of type {quoted(type(array).__name__)}"
            )
        if _dtype_name(array.dtype) is None:
            raise UsageError(
                f"key {quoted(name)}: expected an array of bool, integers or floats of up to "
                f"64 bits, got dtype {quoted(str(array.dtype))}"
            )
        plain = len(name) <= 200 and _PLAIN_NAME.fullmatch(name) and not _NUMBERED.match(name)
        member = f"{name if plain else f'array-{number}'}.npy"
        entries.append({"name": name, "member": member, "dtype": _dtype_name(array.dtype)})
    try:
        index = json.dumps({"format": _FORMAT, "meta": dict(meta or {}), "arrays": entries})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"expected meta that JSON can hold: {quoted(str(error))}") from error
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _COMMENT + b"0" * _DIGEST_LENGTH
        archive.writestr(zipfile.ZipInfo(_INDEX), index)
        for entry, array in zip(entries, arrays.values(), strict=True):
            with archive.open(zipfile.ZipInfo(str(entry["member"])), "w", force_zip64=True) as out:
                _write_npy(out, array)
    end = file.seek(0, 2) - _DIGEST_LENGTH
    digest = _hash(file, end)
    file.seek(end)
    file.write(digest)


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
    name = str(getattr(file, "name", "<bytes>"))
    try:
        return _Reader(file, own, limit).read()
    except _Refused as problem:
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


class _Refused(Exception):
    """What is wrong with the bytes, in words."""


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise _Refused(problem)


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
        raise _Refused(f"a dtype's name is {quoted(name)}")
    try:
        return dtype_named(name)
    except UsageError as problem:
        raise _Refused(str(problem)) from None


def _is_extension(dtype: np.dtype[Any]) -> bool:
    return dtype.kind != "b" and dtype.type.__module__ == "ml_dtypes"


def _hash(file: IO[bytes], length: int) -> bytes:
    """The SHA-256, in hexadecimal, of a file's first bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0:
        block = file.read(min(length, _BLOCK))
        if not block:
            raise EOFError("the file became shorter while it was read")
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode("ascii")


def _write_npy(out: IO[bytes], array: npt.NDArray[Any]) -> None:
    flat = np.ascontiguousarray(array).reshape(-1)
    size = array.dtype.itemsize
    if _is_extension(array.dtype):
        flat = flat.view(f"u{size}")
        descr = f"|V{size}"
    else:
        descr = array.dtype.newbyteorder("<").str
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape}, }}"
    length = -(10 + len(header) + 1) % 64 + len(header) + 1
    out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", length))
    out.write(header.ljust(length - 1).encode("ascii") + b"\n")
    view = flat.view(np.uint8).data
    for start in range(0, len(view), _BLOCK):
        out.write(view[start : start + _BLOCK])


_Entry: TypeAlias = tuple[str, str, "np.dtype[Any] | None"]
"""An array's name, the member that holds it, and its dtype where the index tells."""


class _Reader:
    """One reading of one file."""

    def __init__(self, file: IO[bytes], own: bool, limit: int) -> None:
        self._file = file
        self._own = own
        self._limit = limit

    def read(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        size = self._file.seek(0, 2)
        end, signed = self._find_end(size)
        _require(
            signed or not self._own,
            "damaged, or not written by fedavg-core: its closing checksum is missing",
        )
        directory = self._find_directory(end)
        self._file.seek(0)
        with zipfile.ZipFile(self._file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            _require(len(members) == self._count, "two of its members have the same name")
            for member in members.values():
                self._check_member(member, signed)
            self._check_layout(list(members.values()), directory)
            index = members.pop(_INDEX, None)
            _require((index is not None) == signed, "either its index or its checksum is missing")
            entries: list[_Entry] = [(name[: -len(".npy")], name, None) for name in members]
            meta: dict[str, Any] = {}
            if index is not None:
                entries, meta = self._read_index(archive, index, set(members))
            arrays = {
                name: self._read_array(archive, members[member], dtype)
                for name, member, dtype in entries
            }
        return arrays, meta

    def _find_end(self, size: int) -> tuple[int, bool]:
        """Where the zip's end record is, and whether a valid checksum closes the file."""
        comment = len(_COMMENT) + _DIGEST_LENGTH
        for length in (comment, 0):
            end = size - length - _END.size
            if end < 0:
                continue
            self._file.seek(end)
            tail = self._file.read(_END.size + length)
            if tail[:4] != b"PK\x05\x06" or _END.unpack(tail[: _END.size])[-1] != length:
                continue
            if length == 0:
                return end, False
            if tail[_END.size : -_DIGEST_LENGTH] == _COMMENT:
                found = tail[-_DIGEST_LENGTH:]
                _require(
                    found == _hash(self._file, size - _DIGEST_LENGTH),
                    "damaged: its contents do not match their checksum",
                )
                return end, True
        raise _Refused("damaged, or no npz file: no end of a zip archive at its end")

    def _find_directory(self, end: int) -> int:
        """Where the zip's directory begins. It must reach to the end record."""
        self._file.seek(end)
        fields = _END.unpack(self._file.read(_END.size))
        disks, (here, count, size, start) = fields[1:3], fields[3:7]
        if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, start):
            _require(end >= _END64.size + _END64_LOCATOR.size, "its end record is incomplete")
            end -= _END64.size + _END64_LOCATOR.size
            self._file.seek(end)
            record = _END64.unpack(self._file.read(_END64.size))
            locator = _END64_LOCATOR.unpack(self._file.read(_END64_LOCATOR.size))
            _require(
                (record[0], locator[0]) == (b"PK\x06\x06", b"PK\x06\x07")
                and (locator[1], locator[2]) == (0, end),
                "its end record is incomplete",
            )
            disks, (here, count, size, start) = record[4:6], record[6:10]
        _require(disks == (0, 0) and here == count, "it is one of several parts of an archive")
        _require(
            count <= _MOST_MEMBERS, f"it has {count} members; at most {_MOST_MEMBERS} are read"
        )
        _require(start + size == end, "its directory is not where its end record says")
        _require(size <= 512 * (count + 1), "its directory is too long for its members")
        self._count = count
        return int(start)

    def _check_member(self, member: zipfile.ZipInfo, signed: bool) -> None:
        name = member.filename
        shown = f"member {quoted(name)}"
        stem = name[:-4] if name.endswith(".npy") else ""
        parts = re.split(r"[/\\]", stem)
        _require(
            name == member.orig_filename
            and (name == _INDEX or (stem.isprintable() and ":" not in parts[0]))
            and not {"", ".", ".."} & set(parts if name != _INDEX else ()),
            f"{shown}: expected the name of an array that is no path",
        )
        _require(
            member.compress_type == zipfile.ZIP_STORED
            or (member.compress_type == zipfile.ZIP_DEFLATED and not signed),
            f"{shown}: compressed in a way that is not read",
        )
        _require(not member.flag_bits & 0x41, f"{shown}: encrypted")
        if member.compress_type == zipfile.ZIP_STORED:
            _require(
                member.file_size == member.compress_size,
                f"{shown}: stored as it is, but in {member.compress_size} bytes and not in the "
                f"{member.file_size} that it declares",
            )
        else:
            _require(
                member.file_size <= _MOST_INFLATION * max(member.compress_size, 1024),
                f"{shown}: {member.compress_size} bytes declare to inflate to {member.file_size}, "
                f"more than {_MOST_INFLATION}-fold",
            )

    def _check_layout(self, members: list[zipfile.ZipInfo], directory: int) -> None:
        """See that the members fill the file up to its directory, and no two share a byte."""
        total = sum(member.file_size for member in members)
        _require(total <= self._limit, f"it declares {total} bytes; the limit is {self._limit}")
        position, gaps = 0, {0}
        for member in sorted(members, key=lambda member: member.header_offset):
            shown = f"member {quoted(member.filename)}"
            _require(
                member.header_offset - position in gaps,
                f"{shown}: begins at byte {member.header_offset} and not at {position}, where the "
                "member before it ends",
            )
            self._file.seek(member.header_offset)
            header = self._file.read(_LOCAL.size)
            _require(header[:4] == b"PK\x03\x04", f"{shown}: no member is where it should be")
            *_, name_length, extra_length = _LOCAL.unpack(header)
            position = member.header_offset + _LOCAL.size + name_length + extra_length
            position += member.compress_size
            _require(position <= directory, f"{shown}: reaches beyond the last member's end")
            # A member that was written to a stream has its sizes behind it, in one of four forms.
            gaps = {12, 16, 20, 24} if member.flag_bits & 0x08 else {0}
        _require(directory - position in gaps, "it has bytes that belong to no member")

    def _read_index(
        self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, members: set[str]
    ) -> tuple[list[_Entry], dict[str, Any]]:
        _require(member.file_size <= _MOST_INDEX, "its index is too long")
        index = json.loads(archive.read(member))
        _require(isinstance(index, dict), "its index is no JSON object")
        version, meta, listed = (index.get(field) for field in ("format", "meta", "arrays"))
        _require(
            version == _FORMAT, f"its format is {quoted(version)}; this version reads {_FORMAT}"
        )
        _require(isinstance(meta, dict) and isinstance(listed, list), "its index is incomplete")
        entries: list[_Entry] = []
        for entry in listed:
            _require(
                isinstance(entry, dict)
                and isinstance(entry.get("name"), str)
                and isinstance(entry.get("member"), str),
                "its index is incomplete",
            )
            entries.append((entry["name"], entry["member"], _dtype_named(entry.get("dtype"))))
        _require(
            len({name for name, *_ in entries}) == len(entries) == len(members)
            and {member for _, member, _ in entries} == members,
            "its index lists other arrays than it holds",
        )
        return entries, meta

    def _read_array(
        self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: np.dtype[Any] | None
    ) -> npt.NDArray[Any]:
        shown = f"member {quoted(member.filename)}"
        with archive.open(member) as stream:
            head = _exactly(stream, 8)
            _require(
                head[:6] == b"\x93NUMPY" and head[6] in (1, 2, 3) and head[7] == 0,
                f"{shown}: not an npy array of version 1, 2 or 3",
            )
            width = 2 if head[6] == 1 else 4
            length = int.from_bytes(_exactly(stream, width), "little")
            _require(length <= _MOST_HEADER, f"{shown}: a header of {length} bytes")
            match = _NPY_HEADER.fullmatch(_exactly(stream, length))
            if match is None:
                raise _Refused(f"{shown}: expected a header that describes an array of numbers")
            order, code, fortran, dims = (group.decode("ascii") for group in match.groups())
            stored = self._stored_dtype(code, dtype, shown)
            if order == ">":
                stored = stored.newbyteorder(">")
            shape = tuple(int(dim) for dim in re.findall("[0-9]+", dims))
            count = math.prod(shape)
            left = member.file_size - 8 - width - length
            _require(
                len(shape) <= 32 and count * stored.itemsize == left,
                f"{shown}: its header says {quoted(shape)} of {stored}, "
                f"{count * stored.itemsize} bytes, and {left} are there",
            )
            flat = np.empty(count, dtype=stored)
            view = flat.view(np.uint8).data
            for start in range(0, left, _BLOCK):
                view[start : start + _BLOCK] = _exactly(stream, min(_BLOCK, left - start))
            stream.read(1)  # where the checksum of the member is compared
        if not flat.dtype.isnative:
            flat = flat.byteswap(inplace=True).view(flat.dtype.newbyteorder("="))
        if dtype is not None and _is_extension(dtype):
            flat = flat.view(dtype)
        _require(
            flat.dtype.kind != "b" or not (flat.view(np.uint8) > 1).any(),
            f"{shown}: a truth value that is neither 0 nor 1",
        )
        return flat.reshape(shape[::-1]).T if fortran == "True" else flat.reshape(shape)

    def _stored_dtype(self, code: str, dtype: np.dtype[Any] | None, shown: str) -> np.dtype[Any]:
        """The dtype that an array's bytes are read as, given what the header and the index say."""
        if dtype is not None and _is_extension(dtype):
            _require(code == f"V{dtype.itemsize}", f"{shown}: {code} cannot hold {dtype}")
            return np.dtype(f"<u{dtype.itemsize}")
        _require(
            code in _PLAIN_CODES, f"{shown}: expected an array of numbers, got dtype {quoted(code)}"
        )
        found: np.dtype[Any] = np.dtype("<" + code)
        _require(
            dtype is None or dtype.newbyteorder("<") == found,
            f"{shown}: the index says {dtype}, it is {found}",
        )
        return found


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise EOFError("a member is shorter than it declares")
    return data
