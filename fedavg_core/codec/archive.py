"""A zip file that is checked before it is believed.

Two things are done here. One is the seal: a closing comment that holds the SHA-256 of every byte
before it, so that a flipped bit, a missing tail or a byte too many is found before anything else is
looked at. The other is a check of the container itself, sealed or not, for a checksum says nothing
about the good will of whoever made it. What the end record and the directory declare is held
against the length of the file, against limits, and against the members' own headers:

* the directory ends where the end record begins, and is no longer than its members account for;
* the members fill the file from its first byte to the directory, without holes or overlaps;
* no two have the same name, and no name would be a path outside of the archive;
* each is stored as it is, or deflated to no less than a hundredth, and none is encrypted;
* all together declare no more bytes than the limit.

Nothing is inflated and no member is read for that. The formats are those of PKWARE's APPNOTE,
with its 64-bit records.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import IO

from fedavg_core.errors import quoted

__all__ = [
    "BLOCK",
    "MOST_MEMBERS",
    "UNSEALED",
    "Damaged",
    "Seal",
    "check_archive",
    "require",
]

BLOCK = 1 << 18
"""How many bytes are read or written at a time."""

MOST_MEMBERS = 1 << 16
"""How many members an archive may have to be read."""

_SEAL = b"fedavg-core sha256 "
_DIGEST_LENGTH = 64

UNSEALED = _SEAL + b"0" * _DIGEST_LENGTH
"""The comment to close a zip file with that is to be sealed: a seal with zeros for the checksum."""

_SHARE = 1 << 24  # bytes that make it worth to wake the thread of a seal
_MOST_INFLATION = 100
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")


class Damaged(Exception):
    """What is wrong with the bytes, in words."""


def require(fine: bool, problem: str) -> None:
    """Raise unless something is as it should be.

    Args:
        fine: Whether it is.
        problem: What is wrong otherwise.

    Raises:
        Damaged: It is not.
    """
    if not fine:
        raise Damaged(problem)


class Seal:
    """The checksum of a zip file that is being written, and will be closed with `UNSEALED`.

    It is taken of the bytes as they stand in the file: behind the writer, by a thread, where the
    file is large, the operating system knows it and a thread is to be had; else in the end.

    Args:
        file: The file, empty, open for reading and writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._reached = 0
        self._thread = ThreadPoolExecutor(1, "fedavg-seal")
        self._shares: list[Future[None]] = []
        self._apart: Callable[[int, int], bytes] | None = None
        if hasattr(os, "pread"):  # pragma: no branch
            with suppress(AttributeError, OSError):  # memory has no number
                self._apart = partial(os.pread, file.fileno())

    def reach(self, position: int) -> None:
        """Tell how far the file is as it will stay.

        Args:
            position: Where the first byte is that may still change.

        Raises:
            OSError: As the file raises it.
        """
        if self._apart is not None and position - self._reached >= _SHARE:
            self._file.flush()
            share = self._digest, self._apart, self._reached, position
            try:
                self._shares.append(self._thread.submit(_update, *share))
            except RuntimeError:  # there are no more threads to be had, or Python is about to end
                self._apart = None
            else:
                self._reached = position

    def write(self) -> None:
        """Put the checksum into the file, which is closed as a zip file by now.

        Raises:
            OSError: As the file raises it.
        """
        for share in self._shares:
            share.result()
        end = self._file.seek(0, 2) - _DIGEST_LENGTH
        _update(self._digest, _from(self._file), self._reached, end)
        self._file.seek(end)
        self._file.write(_hexadecimal(self._digest))

    def close(self) -> None:
        """End the thread, whether or not the checksum was written."""
        self._thread.shutdown(cancel_futures=True)


def check_archive(file: IO[bytes], limit: int, members: int | None = None) -> bool:
    """Check a zip file as a container.

    Args:
        file: A seekable file, open for reading. Its position is changed.
        limit: The most bytes that its members may declare together.
        members: The most that it may have, if that is less than MOST_MEMBERS.

    Returns:
        Whether it is sealed; the seal is then right.

    Raises:
        Damaged: It is not fit to be read.
        zipfile.BadZipFile, struct.error, ValueError, NotImplementedError: The same, by `zipfile`.
    """
    end, sealed = _find_end(file, file.seek(0, 2))
    most = MOST_MEMBERS if members is None else min(MOST_MEMBERS, members)
    start, count = _find_directory(file, end, most)
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
    require(len(found) == count, "its directory has another length than its end record says")
    require(len({member.filename for member in found}) == count, "two of its members have one name")
    for member in found:
        _check_member(member, sealed)
    total = sum(member.file_size for member in found)
    require(total <= limit, f"it declares {total} bytes; the limit is {limit}")
    _check_layout(file, found, start)
    return sealed


def _find_end(file: IO[bytes], size: int) -> tuple[int, bool]:
    """Where the zip's end record is, and whether it has a seal, which is then right."""
    comment = len(_SEAL) + _DIGEST_LENGTH
    for length in (comment, 0):
        end = size - length - _END.size
        if end < 0:
            continue
        file.seek(end)
        tail = file.read(_END.size + length)
        if tail[:4] != b"PK\x05\x06" or _END.unpack(tail[: _END.size])[-1] != length:
            continue
        if length == 0:
            return end, False
        if tail[_END.size : -_DIGEST_LENGTH] == _SEAL:
            found = tail[-_DIGEST_LENGTH:]
            digest = hashlib.sha256()
            _update(digest, _from(file), 0, size - _DIGEST_LENGTH)
            require(
                found == _hexadecimal(digest), "damaged: its contents do not match their checksum"
            )
            return end, True
    raise Damaged("damaged, or no npz file: no end of a zip archive at its end")


def _find_directory(file: IO[bytes], end: int, most: int) -> tuple[int, int]:
    """Where the directory begins, and how many members it is to have, no more than the most."""
    file.seek(end)
    fields = _END.unpack(file.read(_END.size))
    disks, (here, count, size, start) = fields[1:3], fields[3:7]
    if end >= _END64.size + _END64_LOCATOR.size:
        file.seek(end - _END64_LOCATOR.size)
        locator = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            # Not only where a field is too small: zipfile adds these records from 2 GiB on.
            end -= _END64.size + _END64_LOCATOR.size
            file.seek(end)
            record = _END64.unpack(file.read(_END64.size))
            require(
                record[0] == b"PK\x06\x06" and (locator[1], locator[2]) == (0, end),
                "its 64-bit end record is not where it should be",
            )
            disks, (here, count, size, start) = record[4:6], record[6:10]
    require(disks == (0, 0) and here == count, "it is one of several parts of an archive")
    require(count <= most, f"it has {count} members; the limit is {most}")
    require(start + size == end, "its directory is not where its end record says")
    require(size <= 512 * (count + 1), "its directory is too long for its members")
    return int(start), int(count)


def _check_member(member: zipfile.ZipInfo, sealed: bool) -> None:
    name = member.filename
    shown = f"member {quoted(name)}"
    parts = name.removesuffix(".npy").split("/")
    require(
        name == member.orig_filename
        and name.isprintable()
        and "\\" not in name
        and ":" not in parts[0]
        and not {"", ".", ".."} & set(parts),
        f"{shown}: expected the name of an array that is no path",
    )
    require(
        member.compress_type == zipfile.ZIP_STORED
        or (member.compress_type == zipfile.ZIP_DEFLATED and not sealed),
        f"{shown}: compressed in a way that is not read",
    )
    require(not member.flag_bits & 0x41, f"{shown}: encrypted")
    if member.compress_type == zipfile.ZIP_STORED:
        require(
            member.file_size == member.compress_size,
            f"{shown}: stored as it is, but in {member.compress_size} bytes and not in the "
            f"{member.file_size} that it declares",
        )
    else:
        require(
            member.file_size <= _MOST_INFLATION * max(member.compress_size, 1024),
            f"{shown}: {member.compress_size} bytes declare to inflate to {member.file_size}, "
            f"more than {_MOST_INFLATION}-fold; numpy.savez stores such arrays as they are",
        )


def _check_layout(file: IO[bytes], members: list[zipfile.ZipInfo], directory: int) -> None:
    """See that the members fill the file up to its directory, and no two share a byte."""
    position, gaps = 0, {0}
    for member in sorted(members, key=lambda member: member.header_offset):
        shown = f"member {quoted(member.filename)}"
        require(
            member.header_offset - position in gaps,
            f"{shown}: begins at byte {member.header_offset} and not at {position}, where the "
            "member before it ends",
        )
        file.seek(member.header_offset)
        header = file.read(_LOCAL.size)
        require(header[:4] == b"PK\x03\x04", f"{shown}: no member is where it should be")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        position = member.header_offset + _LOCAL.size + name_length + extra_length
        position += member.compress_size
        require(position <= directory, f"{shown}: reaches beyond the last member's end")
        # A member that was written to a stream has its sizes behind it, in one of four forms.
        gaps = {12, 16, 20, 24} if member.flag_bits & 0x08 else {0}
    require(directory - position in gaps, "it has bytes that belong to no member")


def _from(file: IO[bytes]) -> Callable[[int, int], bytes]:
    """A way to read a number of bytes at a position of a file."""

    def read(size: int, position: int) -> bytes:
        file.seek(position)
        return file.read(size)

    return read


def _update(
    digest: hashlib._Hash, read: Callable[[int, int], bytes], start: int, stop: int
) -> None:
    """Take a checksum further, by the bytes from one position to another."""
    while start < stop:
        block = read(min(stop - start, BLOCK), start)
        if not block:
            raise OSError("the file became shorter while it was read")
        digest.update(block)
        start += len(block)


def _hexadecimal(digest: hashlib._Hash) -> bytes:
    return digest.hexdigest().encode("ascii")
