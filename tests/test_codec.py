"""The codec: what it writes it reads, and whatever else it is fed is one kind of error."""

from __future__ import annotations

import errno
import gc
import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedavg_core.codec.archive as archive_module
import fedavg_core.codec.npz as codec_module
from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.codec.archive import BLOCK, UNSEALED, Seal
from fedavg_core.codec.npz import NpzWriter, read_npz, write_npz
from fedavg_core.comparison import same_bits
from fedavg_core.errors import CheckpointError, UsageError
from fedavg_core.model import ArraySpec, ModelSpec, dtype_named
from fedavg_core.testing.strategies import averaged_dtypes

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array([-1, 2**62], dtype=np.int64),
}


def written(arrays: Any = None, meta: Any = None) -> bytes:
    file = io.BytesIO()
    write_npz(file, ARRAYS if arrays is None else arrays, meta)
    return file.getvalue()


def read(data: bytes, **options: Any) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    return read_npz(io.BytesIO(data), **options)


def npy(value: Any, **fields: Any) -> bytes:
    """An npy file whose header may lie."""
    array: npt.NDArray[Any] = np.asarray(value)
    shown = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **fields}
    header = "{" + "".join(f"'{key}': {value!r}, " for key, value in shown.items()) + "}"
    length = -(10 + len(header) + 1) % 64 + len(header) + 1
    text = header.ljust(length - 1).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text + array.tobytes()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(file, "w", method) as archive:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # zipfile's, of equal names
        for name, data in members:
            info = zipfile.ZipInfo("?")
            info.filename, info.compress_type = name, method
            archive.writestr(info, data)
    return file.getvalue()


def sealed(*members: tuple[str, bytes], index: Any = None, method: int = 0) -> bytes:
    """A file like one of ours, with a seal that is right and an index that may lie."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = UNSEALED
        if index is not None:
            text = index if isinstance(index, (str, bytes)) else json.dumps(index)
            archive.writestr("fedavg.json", text)
        for name, data in members:
            archive.writestr(name, data)
    Seal(file).write()
    return file.getvalue()


def index_of(*entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"format": 1, "meta": {}, "arrays": list(entries), **fields}


W_ENTRY = {"name": "w", "member": "w.npy", "dtype": "float32"}
W = ("w.npy", npy(ARRAYS["w"]))


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    """Some bytes replaced."""
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def central(data: bytes, member: int = 0) -> int:
    """Where a member's entry in the directory is."""
    at = -1
    for _ in range(member + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


class TestWhatIsWrittenIsRead:
    """Arrays, names, dtypes and JSON come back as they were."""

    @pytest.mark.parametrize("dtype", averaged_dtypes(), ids=str)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1,) * 32])
    def test_every_dtype_and_shape(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        bits = np.arange(math.prod(shape)).reshape(shape) + 1
        array = np.asarray(bits.astype(dtype))
        arrays, _ = read(written({"x": array}), own=True)
        assert same_bits(arrays, {"x": array})
        assert arrays["x"].flags.writeable
        assert arrays["x"].flags.c_contiguous

    def test_truth_values(self) -> None:
        arrays, _ = read(written({"t": np.array([True, False])}))
        assert arrays["t"].dtype == np.bool_
        assert arrays["t"].tolist() == [True, False]

    def test_memory_layout_and_byte_order_are_made_plain(self) -> None:
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        for other in (
            np.asfortranarray(array),
            array.astype(">f4"),
            np.repeat(array, 2, 1)[:, ::2],
        ):
            arrays, _ = read(written({"x": other}))
            assert same_bits(arrays, {"x": array})

    @pytest.mark.parametrize(
        "name",
        [
            "w", "layer.0/kernel", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\\b", "", ".",
            "..", "a//b", "a/../b", "ü", "a\nb", "\x00", "\x1b[2J", "\ud800", "array-1",
            "fedavg.json", "x" * 10_000, "w.npy", "a b", "con",
        ],
    )  # fmt: skip
    def test_any_name_is_kept_and_none_becomes_a_path(self, name: str) -> None:
        arrays = {"first": ARRAYS["n"], name: ARRAYS["w"], "array-9": ARRAYS["n"]}
        data = written(arrays)
        assert list(read(data, own=True)[0]) == list(arrays)
        for member in zipfile.ZipFile(io.BytesIO(data)).namelist():
            assert not member.startswith("/")
            assert ".." not in member.split("/")
            assert member.isascii()
            assert member.isprintable()
            assert "\\" not in member
            assert len(member) <= 204

    @given(
        st.dictionaries(
            st.text(max_size=8),
            hnp.arrays(
                st.sampled_from(["<f4", ">f8", "<f2", "|u1", ">i2", "<i8", "|b1"]),
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
            ),
            max_size=5,
        ),
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.one_of(
                    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()
                ),
                lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
                max_leaves=5,
            ),
            max_size=3,
        ),
    )
    def test_anything_comes_back_as_it_was(
        self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]
    ) -> None:
        found, found_meta = read(written(arrays, meta), own=True)
        assert found_meta == meta
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype.newbyteorder("=")
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.astype(found[name].dtype).tobytes()

    def test_plain_numpy_reads_it(self, tmp_path: Path) -> None:
        path = tmp_path / "model.npz"
        path.write_bytes(written({**ARRAYS, "../x": np.ones(2)}))
        with np.load(path) as loaded:
            assert same_bits({"w": loaded["w"], "n": loaded["n"]}, ARRAYS)
            assert loaded["array-2"].tolist() == [1.0, 1.0]

    def test_equal_contents_give_equal_bytes(self) -> None:
        copies = {key: np.asfortranarray(value) for key, value in ARRAYS.items()}
        assert written(meta={"a": 1}) == written(copies, {"a": 1})

    def test_a_large_array_goes_through_in_blocks(self, tmp_path: Path) -> None:
        big = np.arange(1_000_003, dtype=np.float64)
        with open(tmp_path / "big", "w+b") as file:
            tracemalloc.start()
            write_npz(file, {"big": big})
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 3 << 20
            assert same_bits(read_npz(file)[0], {"big": big})

    @pytest.mark.parametrize("dtype", ["c8", "O", "U3", "S3", "M8[s]", "V4", "f4,f4"])
    def test_other_dtypes_are_a_usage_error(self, dtype: str) -> None:
        with pytest.raises(UsageError, match="key 'x': expected an array of bool, integers or"):
            written({"x": np.zeros(2, dtype)})

    @pytest.mark.parametrize("arrays", [{1: np.ones(1)}, {"x": [1.0]}, {"x": None}])
    def test_what_is_no_named_array_is_a_usage_error(self, arrays: Any) -> None:
        with pytest.raises(UsageError, match="expected arrays under names that are strings"):
            written(arrays)

    def test_meta_that_json_cannot_hold_is_a_usage_error(self) -> None:
        loop: dict[str, Any] = {}
        loop["loop"] = loop
        for meta in ({"x": object()}, {"x": {1j: 2}}, loop):
            with pytest.raises(UsageError, match="expected meta that JSON can hold"):
                written(meta=meta)


class TestOtherProgramsFiles:
    """npz as NumPy writes it."""

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_those_of_numpy_are_read(self, save: Any) -> None:
        arrays = {
            "c": np.random.default_rng(0).normal(size=(50, 60)),
            "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "b": np.arange(3, dtype=">i4"),
            "s": np.array(3.0),
            "e": np.zeros((0, 2), np.float16),
            "long.name/with-all": np.ones((1, 2, 3), np.uint8),
        }
        file = io.BytesIO()
        save(file, **arrays)
        found, meta = read_npz(file)
        assert meta == {}
        assert same_bits(found, arrays)
        assert found["f"].flags.f_contiguous

    def test_one_written_to_a_stream_is_read(self) -> None:
        class Stream(io.RawIOBase):
            data = b""

            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                self.data += bytes(data)
                return len(data)

        stream = Stream()
        np.savez(stream, **ARRAYS)  # type: ignore[arg-type]
        assert same_bits(read(stream.data)[0], ARRAYS)

    def test_npy_versions_2_and_3_are_read(self) -> None:
        for version in ((2, 0), (3, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, ARRAYS["w"], version)
            assert same_bits(read(zipped(("w.npy", file.getvalue())))[0], {"w": ARRAYS["w"]})

    def test_they_are_refused_where_only_our_own_will_do(self) -> None:
        file = io.BytesIO()
        np.savez(file, **ARRAYS)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="no checkpoint of fedavg-core"):
            read_npz(file, own=True)

    def test_a_file_of_no_arrays_is_read(self) -> None:
        assert read(zipped()) == ({}, {})
        assert read(written({}, {"a": 1}), own=True) == ({}, {"a": 1})

    def test_the_64_bit_records_of_zip_are_read(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
            data = written()
        assert b"PK\x06\x06" in data
        assert same_bits(read(data, own=True)[0], ARRAYS)


class TestDamage:
    """Every damage is found."""

    def small(self) -> bytes:
        data = written(
            {**ARRAYS, "h": np.ones(3, dtype_named("bfloat16")), "../x": np.ones(1)},
            {"a": [1, "b"]},
        )
        assert len(data) <= 4096
        return data

    def test_every_prefix_is_refused(self) -> None:
        data = self.small()
        for length in range(len(data)):
            for own in (True, False):
                with pytest.raises(CheckpointError):
                    read(data[:length], own=own)

    def test_every_single_byte_flip_is_found(self) -> None:
        data = self.small()
        for at in range(len(data)):
            for mask in (0x01, 0x80, 0xFF):
                flipped = bytearray(data)
                flipped[at] ^= mask
                for own in (True, False):
                    with pytest.raises(CheckpointError):
                        read(bytes(flipped), own=own)

    @pytest.mark.parametrize("junk", [b"\x00", b"PK\x05\x06", b"x" * 70_000])
    def test_junk_before_or_after_is_refused(self, junk: bytes) -> None:
        for data in (self.small(), zipped(W)):
            for spoilt in (junk + data, data + junk, data + data):
                with pytest.raises(CheckpointError):
                    read(spoilt)

    def test_a_flip_in_another_programs_file_gives_the_right_data_or_the_error(self) -> None:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            data = zipped(W, ("n.npy", npy(ARRAYS["n"])), method=method)
            for at in range(len(data)):
                for mask in (0x01, 0x20, 0x80, 0xFF):
                    flipped = bytearray(data)
                    flipped[at] ^= mask
                    assert_right_or_refused(bytes(flipped), ARRAYS)
                with pytest.raises(CheckpointError):
                    read(data[:at])

    def test_a_file_that_shrinks_while_it_is_read_is_refused(self) -> None:
        class Shrinking(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                return b"" if size == BLOCK or self.tell() == 0 else super().read(size)

        with pytest.raises(CheckpointError, match="the file became shorter"):
            read_npz(Shrinking(self.small()))

    def test_a_read_that_fails_is_the_same_error(self) -> None:
        class Failing(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                raise OSError(5, "Input/output error")

        with pytest.raises(CheckpointError, match=r"unreadable .*Input/output error"):
            read_npz(Failing(self.small()))

    def test_the_error_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.npz"
        path.write_bytes(b"not a zip file")
        with open(path, "rb") as file, pytest.raises(CheckpointError) as error:
            read_npz(file)
        assert error.value.path == path
        assert "no npz file" in error.value.problem


def assert_right_or_refused(data: bytes, arrays: dict[str, Any]) -> None:
    """Names may differ, for a foreign file has no checksum of them; values may not."""
    try:
        found, _ = read(data)
    except CheckpointError:
        return
    expected = sorted(array.tobytes() for array in arrays.values())
    assert sorted(array.tobytes() for array in found.values()) == expected


MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 4000), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 4000), st.integers(1, 64)),
        st.tuples(st.just("add"), st.integers(0, 4000), st.integers(0, 255)),
        st.tuples(st.just("word"), st.integers(0, 4000), st.sampled_from([0, 1, 0xFFFF, 2**31])),
        st.tuples(st.just("swap"), st.integers(0, 4000), st.integers(0, 4000)),
    ),
    min_size=1,
    max_size=4,
)
SOURCES = [
    written(meta={"a": [1, 2]}),
    written({"h": np.ones(3, dtype_named("bfloat16")), "t": np.array([True])}),
    zipped(W, ("n.npy", npy(ARRAYS["n"]))),
    zipped(W, ("n.npy", npy(ARRAYS["n"])), method=zipfile.ZIP_DEFLATED),
]


# Ten times the examples of the profile: 10,000 in ci, 100,000 at night.
@settings(max_examples=10 * settings().max_examples)
@given(st.sampled_from(SOURCES), MUTATIONS, st.booleans())
def test_a_mutated_file_is_read_or_refused_and_nothing_else(
    source: bytes, mutations: list[tuple[str, int, int]], reseal: bool
) -> None:
    data = bytearray(source)
    for kind, at, value in mutations:
        at %= max(1, len(data))
        if kind == "set":
            data[at : at + 1] = bytes([value])
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "add":
            data[at:at] = bytes([value])
        elif kind == "word":
            data[at : at + 4] = struct.pack("<L", value)
        else:
            data[at : at + 8] = data[value % len(data) :][:8]
    mutated = bytes(data)
    if reseal and len(mutated) > 64 and b"fedavg-core sha256" in mutated[-90:]:
        file = io.BytesIO(mutated)
        Seal(file).write()  # so that the mutation is not caught by the checksum alone
        mutated = file.getvalue()
    try:
        arrays, meta = read(mutated)
    except CheckpointError:
        return
    assert isinstance(meta, dict)
    for array in arrays.values():
        assert isinstance(array, np.ndarray)
        assert array.nbytes <= len(mutated) * 100


def _many_equal_members() -> bytes:
    """Two hundred entries of the directory that all point to one member."""
    data = zipped(("a.npy", npy(np.zeros(10_000))))
    at = central(data)
    entry, end = data[at : data.rindex(b"PK\x05\x06")], data[data.rindex(b"PK\x05\x06") :]
    entries = b"".join(
        entry.replace(b"a.npy", bytes([97 + n % 26, 97 + n // 26]) + b"npy") for n in range(200)
    )
    end = patched(end, 8, "<HHL", 200, 200, len(entries))
    return data[:at] + entries + end


BOMBS: list[tuple[str, Callable[[], bytes], str]] = [
    (
        "a member that inflates a thousandfold",
        lambda: zipped(("w.npy", npy(np.zeros(6_000_000))), method=zipfile.ZIP_DEFLATED),
        "declare to inflate to 48000128, more than 100-fold",
    ),
    (
        "a header that says a billion elements",
        lambda: zipped(("w.npy", npy(np.zeros(3), shape=(10**9,)))),
        "8000000000 bytes, and 24 are there",
    ),
    (
        "a header that says more than there are atoms",
        lambda: zipped(("w.npy", npy(np.zeros(3), shape=(10**18,) * 5))),
        "bytes, and 24 are there",
    ),
    (
        "a header of 32 dimensions and one more",
        lambda: zipped(("w.npy", npy(np.zeros(1), shape=(1,) * 33))),
        "its header says",
    ),
    (
        "an empty array with a huge axis",
        lambda: zipped(("w.npy", npy(np.zeros(0), shape=(0, 10**18, 10**18)))),
        "no array can have the shape",
    ),
    (
        "a header that says it is 4 GiB long",
        lambda: zipped(("w.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100)),
        "a header of 4294967295 bytes",
    ),
    (
        "a header of 2 MB that is there",
        lambda: zipped(
            ("w.npy", b"\x93NUMPY\x02\x00" + struct.pack("<L", 2_000_000) + b" " * 2_000_000)
        ),
        "a header of 2000000 bytes",
    ),
    (
        "a header of a thousand brackets",
        lambda: zipped(
            ("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9_000) + b"(" * 8_999 + b"\n")
        ),
        "expected a header that describes an array of numbers",
    ),
    (
        "a member that declares 2 GB and has none of it",
        lambda: patched(zipped(W), central(zipped(W)) + 24, "<L", 2_000_000_000),
        "stored as it is, but in",
    ),
    (
        "a member whose compressed size reaches beyond the file",
        lambda: patched(zipped(W), central(zipped(W)) + 20, "<LL", 2 * 10**9, 2 * 10**9),
        "reaches beyond",
    ),
    (
        "two hundred members in the same bytes",
        _many_equal_members,
        "begins at byte 0 and not at",
    ),
    (
        "an end record that says 60,000 members",
        lambda: patched(zipped(W), zipped(W).rindex(b"PK\x05\x06") + 8, "<HH", 60_000, 60_000),
        "its directory has another length than its end record says",
    ),
    (
        "an end record whose directory is 4 GB",
        lambda: patched(zipped(W), zipped(W).rindex(b"PK\x05\x06") + 12, "<L", 0xFFFFFFFE),
        "its directory is not where its end record says",
    ),
    (
        "arrays of more bytes than the limit",
        lambda: zipped(("w.npy", npy(np.zeros(200_000)))),
        "it declares 1600128 bytes; the limit is 1000000",
    ),
    (
        "an index of a hundred thousand brackets",
        lambda: sealed(index="[" * 100_000),
        "unreadable",
    ),
]


@pytest.mark.parametrize(
    ("make", "problem"), [bomb[1:] for bomb in BOMBS], ids=[b[0] for b in BOMBS]
)
def test_a_bomb_is_refused_within_a_mebibyte(make: Callable[[], bytes], problem: str) -> None:
    file = io.BytesIO(make())
    read(written())  # what is imported or cached on first use is not this file's memory
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=problem.replace("(", r"\(")):
            read_npz(file, limit=1_000_000 if "limit" in problem else 1 << 36)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 1 << 20


def _local_name_differs() -> bytes:
    data = zipped(W)
    return data.replace(b"w.npy", b"v.npy", 1)


def _with_hole() -> bytes:
    """A byte between the member and the directory."""
    data = zipped(W)
    at = central(data)
    start = struct.unpack_from("<L", data, data.rindex(b"PK\x05\x06") + 16)[0]
    data = data[:at] + b"\x00" + data[at:]
    return patched(data, data.rindex(b"PK\x05\x06") + 16, "<L", start + 1)


def _with_hole_between() -> bytes:
    first, second = zipped(W), zipped(("n.npy", npy(ARRAYS["n"])))
    parts = [first[: central(first)] + b"\x00", second[: central(second)]]
    entries = [
        first[central(first) : first.rindex(b"PK\x05\x06")],
        patched(second[central(second) : second.rindex(b"PK\x05\x06")], 42, "<L", len(parts[0])),
    ]
    start, size = sum(map(len, parts)), sum(map(len, entries))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, size, start, 0)
    return b"".join(parts + entries) + end


def _zip64(change: Callable[[list[int]], None]) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
        data = zipped(W)
    at = data.index(b"PK\x06\x06")
    fields = list(struct.unpack_from("<4sQ2H2L4Q4sLQL", data, at))
    change(fields)
    return data[:at] + struct.pack("<4sQ2H2L4Q4sLQL", *fields) + data[at + 76 :]


def _set(field: int, value: Any) -> Callable[[list[int]], None]:
    return lambda fields: fields.__setitem__(field, value)


_END_OF_W = zipped(W).rindex(b"PK\x05\x06")

LIES: list[tuple[str, Callable[[], bytes], str]] = [
    *(
        (f"the member {name[:12]!r}", lambda name=name: zipped((name, W[1])), "that is no path")
        for name in (
            "../w.npy",
            "/w.npy",
            "a/../w.npy",
            "a//w.npy",
            "./w.npy",
            "C:/w.npy",
            "C:w.npy",
            "a\\w.npy",
            "\\w.npy",
            "w\n.npy",
            "w\x1b.npy",
            ".npy",
            "..npy",
            "a/.npy",
        )
    ),
    ("a name with a zero byte", lambda: zipped(W).replace(b"w.npy", b"w\x00npy"), "no path"),
    ("two members of one name", lambda: zipped(W, W), "two of its members have one name"),
    ("a member that is no array", lambda: zipped(("w.txt", W[1])), "expected an array, a .npy"),
    ("an index without a seal", lambda: zipped(("fedavg.json", b"{}")), "checksum is missing"),
    ("a pickled object", lambda: zipped(("o.npy", npy([None], descr="|O"))), "expected a header"),
    (
        "a record dtype",
        lambda: zipped(("o.npy", npy(1, descr=[("a", "<f8")]))),
        "expected a header",
    ),
    ("complex numbers", lambda: zipped(("o.npy", npy(1j))), "got dtype 'c16'"),
    ("text", lambda: zipped(("o.npy", npy("abc"))), "got dtype 'U3'"),
    ("raw bytes", lambda: zipped(("o.npy", npy(np.zeros(1, "V4")))), "got dtype 'V4'"),
    ("dates", lambda: zipped(("o.npy", npy(1, descr="<M8[s]"))), "expected a header"),
    ("extended floats", lambda: zipped(("o.npy", npy(1, descr="<f16"))), "got dtype 'f16'"),
    ("a shape of less", lambda: zipped(("w.npy", npy(np.ones(3), shape=(2,)))), "24 are there"),
    (
        "a shape that none has",
        lambda: zipped(("w.npy", npy(np.ones(0), shape=(0, 2**63 - 1, 2)))),
        f"no array can have the shape (0, {2**63 - 1}, 2)",
    ),
    ("a shape below zero", lambda: zipped(("w.npy", npy(np.ones(3), shape=(-3,)))), "a header"),
    ("a truth value of 2", lambda: zipped(("w.npy", npy(np.uint8(2), descr="|b1"))), "0 nor 1"),
    ("npy version 4", lambda: zipped(("w.npy", b"\x93NUMPY\x04\x00")), "of version 1, 2 or 3"),
    ("npy version 1.1", lambda: zipped(("w.npy", b"\x93NUMPY\x01\x01")), "of version 1, 2 or 3"),
    ("no npy at all", lambda: zipped(("w.npy", b"12345678")), "of version 1, 2 or 3"),
    ("an empty member", lambda: zipped(("w.npy", b"")), "more bytes, got 0"),
    ("a header cut short", lambda: zipped(("w.npy", W[1][:40])), "more bytes, got 30"),
    ("code in the header", lambda: zipped(("w.npy", W[1].replace(b"False", b"f()  "))), "a header"),
    ("bzip2", lambda: zipped(W, method=zipfile.ZIP_BZIP2), "in a way that is not read"),
    ("lzma", lambda: zipped(W, method=zipfile.ZIP_LZMA), "in a way that is not read"),
    (
        "an encrypted member",
        lambda: patched(zipped(W), central(zipped(W)) + 8, "<H", 1),
        "encrypted",
    ),
    ("another name in the member's own header", _local_name_differs, "unreadable"),
    ("a hole before the directory", _with_hole, "belong to no member"),
    ("a hole between two members", _with_hole_between, "begins at byte"),
    (
        "a member that is not where the directory says",
        lambda: patched(zipped(W), 0, "<L", 0),
        "no member is where it should be",
    ),
    ("the wrong values", lambda: zipped(W).replace(npy(ARRAYS["w"])[-4:], b"abcd"), "Bad CRC-32"),
    ("a second disk", lambda: patched(zipped(W), _END_OF_W + 4, "<H", 1), "several parts"),
    (
        "members on a second disk",
        lambda: patched(zipped(W), _END_OF_W + 8, "<H", 0),
        "several parts",
    ),
    (
        "a directory too long for its members",
        lambda: _with_members_declared(2),
        "too long for its members",
    ),
    ("64-bit records that are something else", lambda: _zip64(_set(0, b"XXXX")), "64-bit"),
    ("64-bit records elsewhere", lambda: _zip64(_set(12, 1)), "64-bit"),
    ("a 64-bit count of members that is huge", lambda: _zip64(_huge_count), "the limit is 65536"),
]


def _huge_count(fields: list[int]) -> None:
    fields[6] = fields[7] = 2**40


def _with_members_declared(count: int) -> bytes:
    data = zipped(*((f"{'n' * 60}{number}.npy", W[1]) for number in range(30)))
    return patched(data, data.rindex(b"PK\x05\x06") + 8, "<HH", count, count)


@pytest.mark.parametrize(
    ("make", "problem"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES]
)
def test_a_lie_about_the_contents_is_refused(make: Callable[[], bytes], problem: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(make())
    assert problem in error.value.problem
    assert str(error.value).isprintable()


INDEX_LIES: list[tuple[str, Any, str]] = [
    ("no index", None, "either its index or its checksum is missing"),
    ("no JSON", "{", "unreadable"),
    ("not UTF-8", b"\xff\xfe\xfd", "unreadable"),
    ("a list", [], "its index is no JSON object"),
    ("no format", {"meta": {}, "arrays": [W_ENTRY]}, "its format is None; this version reads 1"),
    ("a later format", index_of(W_ENTRY, format=2), "its format is 2; this version reads 1"),
    ("no meta", index_of(W_ENTRY, meta=None), "its index is incomplete"),
    ("no arrays", index_of(arrays=None), "its index is incomplete"),
    ("an entry that is text", index_of("w"), "its index is incomplete"),  # type: ignore[arg-type]
    ("an entry without a name", index_of({**W_ENTRY, "name": None}), "its index is incomplete"),
    ("an entry without a member", index_of({**W_ENTRY, "member": 1}), "its index is incomplete"),
    ("an array that is not there", index_of(W_ENTRY, {**W_ENTRY, "name": "v"}), "other arrays"),
    ("an array that is not listed", index_of(), "other arrays than it holds"),
    ("another member", index_of({**W_ENTRY, "member": "v.npy"}), "other arrays than it holds"),
    ("another dtype", index_of({**W_ENTRY, "dtype": "float64"}), "the index says float64, it is"),
    ("a dtype too wide", index_of({**W_ENTRY, "dtype": "bfloat16"}), "f4 cannot hold bfloat16"),
    ("a dtype of objects", index_of({**W_ENTRY, "dtype": "object"}), "dtype of real numbers"),
    ("a dtype that is none", index_of({**W_ENTRY, "dtype": "ones"}), "dtype of real numbers"),
    ("a dtype that is a number", index_of({**W_ENTRY, "dtype": 4}), "a dtype's name is 4"),
]


@pytest.mark.parametrize(
    ("index", "problem"), [x[1:] for x in INDEX_LIES], ids=[x[0] for x in INDEX_LIES]
)
def test_an_index_that_lies_is_refused_though_the_seal_is_right(index: Any, problem: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(sealed(W, index=index))
    assert problem in error.value.problem


def test_a_sealed_file_is_not_compressed() -> None:
    with pytest.raises(CheckpointError, match="compressed in a way that is not read"):
        read(sealed(W, index=index_of(W_ENTRY), method=zipfile.ZIP_DEFLATED))


def test_an_index_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written()
    monkeypatch.setattr(codec_module, "_MOST_INDEX", 10)
    with pytest.raises(CheckpointError, match=r"its index has \d+ bytes; the limit is 10"):
        read(data)


class TestWhatTheReaderWouldRefuse:
    """It is refused before a byte is written; what is just within the limit is read."""

    def refused(self, arrays: Any, meta: Any, message: str) -> None:
        file = io.BytesIO()
        with pytest.raises(UsageError, match=message):
            write_npz(file, arrays, meta)
        assert file.getvalue() == b""

    def test_too_many_arrays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (archive_module, codec_module):
            monkeypatch.setattr(module, "MOST_MEMBERS", 4)
        arrays = {name: np.ones(1) for name in "abcd"}
        self.refused(arrays, None, "expected at most 3 arrays, got 4")
        del arrays["d"]
        assert same_bits(read(written(arrays))[0], arrays)

    def test_too_long_an_index(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codec_module, "_MOST_INDEX", 200)
        spare = 200 - len(json.dumps({"format": 1, "meta": {"x": ""}, "arrays": []}))
        self.refused({}, {"x": "x" * (spare + 1)}, "at most 200 bytes as JSON, got 201")
        assert read(written({}, {"x": "x" * spare}))[1] == {"x": "x" * spare}

    def test_too_many_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = written()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(member.file_size for member in archive.infolist())
        monkeypatch.setattr(codec_module, "_DEFAULT_LIMIT", total - 1)
        self.refused(ARRAYS, None, f"at most {total - 1} bytes together .* got {total}")
        monkeypatch.setattr(codec_module, "_DEFAULT_LIMIT", total)
        assert written() == data

    def test_a_shape_that_no_reader_takes(self) -> None:
        with pytest.raises(UsageError, match=r"key 'w': no file can hold the shape \(4611"):
            write_npz(io.BytesIO(), {"w": np.empty((2**62, 0), np.uint8)})

    def test_too_many_dimensions(self) -> None:
        spec = {"w": ArraySpec((1,) * 33, np.dtype(np.float32))}
        file = io.BytesIO()
        with pytest.raises(UsageError, match=r"key 'w': .* at most 32 dimensions, got 33"):
            NpzWriter(file, spec)
        assert file.getvalue() == b""
        most = {"w": np.ones((1,) * 32)}
        assert same_bits(read(written(most))[0], most)


def test_without_ml_dtypes_its_arrays_are_refused_in_plain_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = written({"h": np.ones(3, dtype_named("bfloat16"))})
    plain = written()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CheckpointError, match="an array of bfloat16 needs the package ml_dtypes"):
        read(data)
    assert same_bits(read(plain)[0], ARRAYS)


def test_arrays_that_come_in_pieces_make_the_same_file() -> None:
    arrays = {"e": np.zeros((0, 2)), **ARRAYS, "f": np.zeros(0)}
    file = io.BytesIO()
    with NpzWriter(file, ModelSpec.of(arrays), {"round": 3}) as writer:
        for array in arrays.values():
            for start in range(0, array.size, 4):
                writer.write(array.reshape(-1)[start : start + 4])
    assert file.getvalue() == written(arrays, {"round": 3})


class TestTheSealBehindTheWriter:
    """The checksum of a large file is taken by a thread while the file is written."""

    ARRAYS: ClassVar = {
        f"a{size}": np.arange(size, dtype=np.float32)
        for size in (0, 1, 300, 5 * BLOCK // 4, 17, 900, 2500)
    }

    def pretend_large(
        self, monkeypatch: pytest.MonkeyPatch, pread: Callable[..., bytes] = os.pread
    ) -> list[tuple[int, int]]:
        """What is read is noted: how much, and where."""
        noted = []

        def read(descriptor: int, size: int, position: int) -> bytes:
            assert threading.current_thread().name.startswith("fedavg-seal")
            noted.append((size, position))
            return pread(descriptor, size, position)

        monkeypatch.setattr(archive_module, "_SHARE", 1000)
        monkeypatch.setattr(os, "pread", read)
        return noted

    def check_nothing_runs(self) -> None:
        assert not any(t.name.startswith("fedavg-seal") for t in threading.enumerate())

    def test_the_bytes_are_those_of_a_small_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noted = self.pretend_large(monkeypatch)
        with open(tmp_path / "x.npz", "w+b") as file:
            write_npz(file, self.ARRAYS, {"round": 3})
        assert (tmp_path / "x.npz").read_bytes() == written(self.ARRAYS, {"round": 3})
        sizes, positions = zip(*noted, strict=True)
        assert list(positions) == [sum(sizes[:n]) for n in range(len(sizes))]
        assert sum(sizes) > 5 * BLOCK
        assert max(sizes) == BLOCK
        self.check_nothing_runs()

    def test_of_less_than_a_share_no_thread_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noted = self.pretend_large(monkeypatch)
        small = {"a": np.zeros(100, np.float32)}
        with open(tmp_path / "x.npz", "w+b") as file:
            write_npz(file, small)
        assert (tmp_path / "x.npz").read_bytes() == written(small)
        assert noted == []

    @pytest.mark.parametrize("cause", ["it fails", "the file is shorter"])
    def test_a_read_that_fails_is_an_error_and_leaves_nothing(
        self, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pread(descriptor: int, size: int, position: int) -> bytes:
            if cause == "it fails":
                raise OSError(errno.EIO, "Input/output error")
            return b""

        self.pretend_large(monkeypatch, pread)
        path = tmp_path / "x.npz"
        told = "Input/output error" if cause == "it fails" else "the file became shorter"
        with pytest.raises(CheckpointError, match=told):
            save_checkpoint(path, Checkpoint(self.ARRAYS, 1))
        assert list(tmp_path.iterdir()) == []
        self.check_nothing_runs()

    def test_a_short_read_is_gone_on_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.pread
        self.pretend_large(monkeypatch, lambda fd, size, at: real(fd, min(size, 999), at))
        with open(tmp_path / "x.npz", "w+b") as file:
            write_npz(file, self.ARRAYS)
        assert (tmp_path / "x.npz").read_bytes() == written(self.ARRAYS)

    @pytest.mark.parametrize("after", [0, 2])
    def test_without_a_thread_it_is_taken_in_the_end(
        self, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noted, real, calls = self.pretend_large(monkeypatch), ThreadPoolExecutor.submit, [0]

        def submit(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise RuntimeError("can't start new thread")
            return real(*arguments)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
        with open(tmp_path / "x.npz", "w+b") as file:
            write_npz(file, self.ARRAYS)
        assert (tmp_path / "x.npz").read_bytes() == written(self.ARRAYS)
        assert bool(noted) is bool(after)
        self.check_nothing_runs()

    def test_a_large_model_is_saved_while_python_ends(self, tmp_path: Path) -> None:
        program = f"""
import atexit, threading, time
import numpy as np
from fedavg_core import Checkpoint, load_checkpoint, save_checkpoint

model = {{str(number): np.ones(1 << 22, np.float32) for number in range(3)}}

def save(name):
    time.sleep(0.3)
    save_checkpoint({str(tmp_path)!r} + "/" + name, Checkpoint(model, 1))

atexit.register(save, "atexit.npz")
threading.Thread(target=save, args=("thread.npz",)).start()
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("atexit.npz", "thread.npz"):
            assert load_checkpoint(tmp_path / name).model["2"].sum() == 1 << 22

    def test_a_file_need_have_no_number(self) -> None:
        class Plain:
            """No more than what is asked of a file."""

            def __init__(self) -> None:
                self.held = io.BytesIO()
                for name in ("read", "write", "seek", "tell", "flush"):
                    setattr(self, name, getattr(self.held, name))

        file: Any = Plain()
        write_npz(file, ARRAYS)
        assert file.held.getvalue() == written(ARRAYS)

    def test_an_error_of_the_writers_ends_the_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.pretend_large(monkeypatch)
        with open(tmp_path / "x.npz", "w+b") as file:
            writer = NpzWriter(file, ModelSpec.of(self.ARRAYS)).__enter__()
            for name in list(self.ARRAYS)[1:4]:
                writer.write(self.ARRAYS[name])
            assert any(t.name.startswith("fedavg-seal") for t in threading.enumerate())
            writer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        self.check_nothing_runs()


@pytest.mark.parametrize("before", [0, 6])
def test_more_elements_than_an_array_has_are_not_taken(before: int) -> None:
    file = io.BytesIO()
    with NpzWriter(file, ModelSpec.of(ARRAYS)) as writer:
        writer.write(ARRAYS["w"].reshape(-1)[:before])
        with pytest.raises(UsageError, match="expected the elements of the arrays in their order"):
            writer.write(np.zeros(7, np.float32))
        writer.write(ARRAYS["w"].reshape(-1)[before:])
        writer.write(ARRAYS["n"])
        with pytest.raises(UsageError, match="expected the elements of the arrays in their order"):
            writer.write(np.zeros(1, np.int64))
    assert file.getvalue() == written()


@pytest.mark.parametrize("count", [0, 5, 6])
def test_a_file_that_lacks_elements_is_not_finished(count: int) -> None:
    writer = NpzWriter(io.BytesIO(), ModelSpec.of(ARRAYS))
    with writer:
        writer.write(ARRAYS["w"].reshape(-1))
        writer.write(ARRAYS["n"])
    writer = NpzWriter(io.BytesIO(), ModelSpec.of(ARRAYS))
    with pytest.raises(UsageError, match="some did not come"), writer:
        writer.write(ARRAYS["w"].reshape(-1)[:count])


@pytest.mark.parametrize("moment", ["zipfile.ZipFile.writestr", "NpzWriter._abandon"])
def test_what_an_interruption_leaves_of_a_writer_never_writes_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def interrupted(*_: object) -> None:
        reached.append(moment)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fedavg_core.codec.npz.{moment}", interrupted)
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    path = tmp_path / "x.npz"
    try:
        with open(path, "w+b", buffering=0) as file, NpzWriter(file, ModelSpec.of(ARRAYS)):
            raise ZeroDivisionError
    except KeyboardInterrupt:
        size = path.stat().st_size
    gc.collect()
    assert reached
    assert not unraisable
    assert path.stat().st_size == size
