"""The safetensors format, beside the format's own library, and headers that lie."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.codec.archive import Damaged
from fedavg_core.codec.npy import Layout
from fedavg_core.codec.safetensors import SafetensorsWriter, aligned, list_safetensors
from fedavg_core.comparison import same_bits
from fedavg_core.errors import Reason, RefusedUpdate, UsageError
from fedavg_core.model import ArraySpec, dtype_named
from fedavg_core.testing import specs
from tests.model_files import Model, safetensors_bytes, tensor

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
WRITEABLE = [dtype_named(name) for name in DTYPES.values()]


def listed(data: bytes, limit: int = 1 << 20) -> dict[str, Layout]:
    return list_safetensors(io.BytesIO(data), len(data), limit)


def arrays_of(data: bytes) -> Model:
    return {
        key: np.frombuffer(data, layout.stored, layout.size, layout.start)
        .view(layout.dtype)
        .reshape(layout.shape)
        for key, layout in listed(data).items()
    }


def written(model: Model) -> bytes:
    file = io.BytesIO()
    spec = {key: ArraySpec(array.shape, array.dtype) for key, array in model.items()}
    with SafetensorsWriter(file, spec) as writer:
        for key in aligned(spec):
            writer.write(model[key])
    return file.getvalue()


def model_of(names: list[str]) -> Model:
    return {
        f"{name}.weight": np.arange(6, dtype=np.int8).astype(dtype_named(name)).reshape(2, 3)
        for name in names
    }


def test_what_the_formats_own_library_writes_is_read() -> None:
    model = model_of(list(DTYPES.values()))
    assert same_bits(arrays_of(safetensors_numpy.save(model)), model)
    with_metadata = safetensors_numpy.save(model, {"format": "np"})
    assert same_bits(arrays_of(with_metadata), model)


def test_what_is_written_the_formats_own_library_reads() -> None:
    model = model_of(list(DTYPES.values()))
    data = written(model)
    there = dict(safetensors.deserialize(data))
    assert there.keys() == model.keys()
    for key, entry in there.items():
        assert DTYPES[entry["dtype"]] == model[key].dtype.name
        assert entry["shape"] == [2, 3]
        assert bytes(entry["data"]) == model[key].tobytes()


@given(specs(dtypes=WRITEABLE, max_keys=4), st.randoms(use_true_random=False))
def test_reading_gives_back_what_was_written(spec: Any, random: Any) -> None:
    model = {
        key: np.frombuffer(
            random.randbytes(int(np.prod(array.shape)) * array.dtype.itemsize), array.dtype
        ).reshape(array.shape)
        for key, array in spec.items()
    }
    assert same_bits(arrays_of(written(model)), model)


def test_tensors_are_aligned_in_the_file() -> None:
    model: Model = {
        "a": np.zeros(3, np.uint8),
        "b": np.zeros(1, np.float64),
        "c": np.zeros((), np.float32),
        "d": np.zeros(1, np.float16),
    }
    for layout in listed(written(model)).values():
        assert layout.start % layout.stored.itemsize == 0


def test_names_are_kept_whatever_they_are() -> None:
    model: Model = {name: np.ones(1) for name in ("", "../x", "näme", 'quo"te', "\n", "__meta__")}
    assert same_bits(arrays_of(written(model)), model)
    assert {name for name, _ in safetensors.deserialize(written(model))} == model.keys()


def test_a_big_endian_array_is_written_with_its_lowest_byte_first() -> None:
    values = np.array([1.5, -2.0], ">f4")
    assert arrays_of(written({"w": values}))["w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            {"w": np.zeros(1, dtype_named("float8_e3m4"))},
            "key 'w': a safetensors file cannot hold dtype float8_e3m4",
        ),
        ({"w": np.zeros(1, bool)}, "key 'w': a safetensors file cannot hold dtype bool"),
        (
            {"__metadata__": np.zeros(1)},
            "a safetensors file cannot hold a key '__metadata__'",
        ),
        ({"\ud800": np.zeros(1)}, "a safetensors file cannot hold a key '\\ud800'"),
    ],
)
def test_what_the_format_cannot_hold_is_misuse(model: Model, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        written(model)
    assert str(error.value) == problem


ONE = tensor("U8", [2], 0, 2)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "expected 8 more bytes, got 0"),
        (b"1234567", "expected 8 more bytes, got 7"),
        (
            safetensors_bytes({"w": tensor("U8", [2**61, 0, 2], 0, 0)}),
            f"tensor 'w': no array can have the shape ({2**61}, 0, 2)",
        ),
        (
            safetensors_bytes({}, length=100),
            "no safetensors file, or damaged: it begins with a header length of 100 bytes, and the "
            "file has 10",
        ),
        (
            safetensors_bytes({}, length=2**64 - 1),
            f"no safetensors file, or damaged: it begins with a header length of {2**64 - 1} "
            "bytes, and the file has 10",
        ),
        (
            safetensors_bytes({"w": ONE}, b"ab", padding=b" " * 200_000),
            "its header has 200060 bytes; the limit is 100000",
        ),
        (safetensors_bytes(b"[]"), "no safetensors file, or damaged: its header is no JSON object"),
        (
            safetensors_bytes(b" {}"),
            "no safetensors file, or damaged: its header is no JSON object",
        ),
        (safetensors_bytes(b'{"a": \xff}'), "can't decode byte 0xff"),
        (safetensors_bytes(b"{"), "Expecting property name"),
        (safetensors_bytes(b"{} {}"), "Extra data"),
        (safetensors_bytes(b'{"a":' + b"[" * 50_000), "recursion"),
        (
            safetensors_bytes(
                b'{"w":{"dtype":"U8","shape":[9' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"a"
            ),
            "",  # of the interpreter, where it limits the digits of a number; else of the shape
        ),
        (
            safetensors_bytes(f'{{"w":{json.dumps(ONE)},"w":{json.dumps(ONE)}}}'.encode(), b"ab"),
            "two entries of its header have one name",
        ),
        (
            safetensors_bytes({"\ud800": ONE}, b"ab"),
            "surrogates not allowed",
        ),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "its metadata is not made of strings"),
        (safetensors_bytes({"__metadata__": []}), "its metadata is not made of strings"),
        (
            safetensors_bytes({"w": 3}),
            "tensor 'w': expected dtype, shape and data_offsets, got 3",
        ),
        (
            safetensors_bytes({"w": tensor("U8", [1], 0, 1, more=1)}, b"a"),
            "tensor 'w': expected dtype, shape and data_offsets, got {",
        ),
        (
            safetensors_bytes({"w": {"dtype": "U8", "shape": []}}),
            "tensor 'w': expected dtype, shape and data_offsets, got {",
        ),
        (safetensors_bytes({"w": tensor("U8", 2, 0, 2)}, b"ab"), "tensor 'w': its shape is 2"),
        (safetensors_bytes({"w": tensor("U8", [True], 0, 1)}, b"a"), "its shape is [True]"),
        (safetensors_bytes({"w": tensor("U8", [-1], 0, 1)}, b"a"), "its shape is [-1]"),
        (safetensors_bytes({"w": tensor("U8", [1.0], 0, 1)}, b"a"), "its shape is [1.0]"),
        (safetensors_bytes({"w": tensor("U8", [2**63], 0, 1)}, b"a"), "its shape is [9223372036"),
        (safetensors_bytes({"w": tensor("U8", [1] * 33, 0, 1)}, b"a"), "its shape is [1, 1"),
        (safetensors_bytes({"w": tensor("U8", [1], 0)}, b"a"), "tensor 'w': its offsets are [0]"),
        (safetensors_bytes({"w": tensor("U8", [1], -1, 0)}, b"a"), "its offsets are [-1, 0]"),
        (
            safetensors_bytes({"w": {"dtype": "U8", "shape": [], "data_offsets": 1}}, b"a"),
            "tensor 'w': its offsets are 1",
        ),
        (
            safetensors_bytes({"w": tensor("Q8", [1], 0, 1)}, b"a"),
            "tensor 'w': its dtype is 'Q8', which is not one of the format",
        ),
        (safetensors_bytes({"w": tensor(["U8"], [1], 0, 1)}, b"a"), "its dtype is ['U8'], which"),  # type: ignore[arg-type]
        (
            safetensors_bytes({"w": tensor("F32", [2], 0, 4)}, b"abcd"),
            "tensor 'w': [2] of F32 takes 8 bytes, and its offsets give it 4",
        ),
        (
            safetensors_bytes({"w": tensor("U8", [2**40, 2**40], 0, 4)}, b"abcd"),
            f"of U8 takes {2**80} bytes, and its offsets give it 4",
        ),
        (
            safetensors_bytes({"w": tensor("U8", [1], 1, 2)}, b"ab"),
            "tensor 'w': takes the bytes from 1 to 2, and the one before it ends at 0",
        ),
        (
            safetensors_bytes({"v": ONE, "w": tensor("U8", [2], 1, 3)}, b"abc"),
            "tensor 'w': takes the bytes from 1 to 3, and the one before it ends at 2",
        ),
        (
            safetensors_bytes({"v": ONE, "w": tensor("U8", [2], 0, 2)}, b"ab"),
            "tensor 'w': takes the bytes from 0 to 2, and the one before it ends at 2",
        ),
        (
            safetensors_bytes({"w": tensor("BOOL", [0], 0, 0), "v": tensor("C64", [], 9, 0)}),
            "tensor 'v': takes the bytes from 9 to 0, and the one before it ends at 0",
        ),
        (
            safetensors_bytes({"w": ONE}, b"abc"),
            "its tensors end at byte 70, and the file at 71",
        ),
        (
            safetensors_bytes({"w": ONE}, b"a"),
            "its tensors end at byte 70, and the file at 69",
        ),
    ],
)
def test_a_header_that_lies_is_damage(data: bytes, problem: str) -> None:
    with pytest.raises((Damaged, ValueError, RecursionError, EOFError)) as error:
        listed(data, limit=100_000)
    assert problem in str(error.value)


@pytest.mark.parametrize("code", ["BOOL", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"])
def test_tensors_that_hold_no_real_numbers_are_refused(code: str) -> None:
    bits = {"BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}[code]
    data = safetensors_bytes({"w": tensor(code, [8], 0, bits)}, b"\0" * bits)
    safetensors.deserialize(data)  # it is a right file
    with pytest.raises(RefusedUpdate) as refusal:
        listed(data)
    assert refusal.value.reason is Reason.DTYPE
    assert refusal.value.key == "w"
    assert str(refusal.value) == (
        f"DTYPE (key 'w'): expected an array of real numbers, got dtype {code}"
    )


def test_a_tensor_of_an_extension_dtype_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(Damaged, match="tensor 'w': an array of bfloat16 needs the package ml_dty"):
        listed(safetensors_bytes({"w": tensor("BF16", [1], 0, 2)}, b"ab"))


def test_offsets_need_not_be_in_the_order_of_the_header(tmp_path: Path) -> None:
    data = safetensors_bytes(
        {"b": tensor("U8", [2], 1, 3), "e": tensor("F32", [0], 3, 3), "a": tensor("U8", [1], 0, 1)},
        b"xyz",
        padding=b"   ",
    )
    found: dict[str, npt.NDArray[Any]] = arrays_of(data)
    assert {key: array.tobytes() for key, array in found.items()} == {
        "b": b"yz",
        "e": b"",
        "a": b"x",
    }


def test_whatever_is_made_of_a_file_is_read_or_is_damage() -> None:
    good = written(model_of(["float32", "bfloat16", "int64"]))
    random = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(good[: random.integers(len(good)) if random.random() < 0.2 else None])
        for _ in range(random.integers(1, 4)):
            if data:
                data[random.integers(len(data))] = random.integers(256)
        with contextlib.suppress(Damaged, ValueError, EOFError, RefusedUpdate):
            listed(bytes(data))


def test_every_prefix_is_damage_and_every_flip_is_damage_or_leaves_as_many_bytes() -> None:
    model = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([-1, 2**62])}
    data = written(model)
    begin = len(data) - sum(array.nbytes for array in model.values())
    for length in range(len(data)):
        with pytest.raises((Damaged, ValueError, EOFError)):
            arrays_of(data[:length])
    for place in range(len(data)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[place] ^= mask
            try:
                found = arrays_of(bytes(flipped))
            except (Damaged, ValueError, EOFError):
                assert place < begin
                continue
            # The format has no checksum: a name, a dtype of the same width or a value may differ.
            assert sum(array.nbytes for array in found.values()) == len(data) - begin
            if place >= begin:
                assert {key: (a.dtype, a.shape) for key, a in found.items()} == {
                    key: (a.dtype, a.shape) for key, a in model.items()
                }


@pytest.mark.parametrize("sizes", [[3], [2, 2], [2, 3, 1], [1]])
def test_elements_that_are_not_those_announced_are_refused(
    tmp_path: Path, sizes: list[int]
) -> None:
    spec = {
        "a": ArraySpec((2,), np.dtype(np.float32)),
        "none": ArraySpec((0,), np.dtype(np.float32)),
        "b": ArraySpec((3,), np.dtype(np.float32)),
    }

    def write() -> None:
        with open(tmp_path / "file", "xb") as file, SafetensorsWriter(file, spec) as writer:
            for size in sizes:
                writer.write(np.zeros(size, np.float32))

    with pytest.raises(UsageError, match=r"expected (the|all) elements of the tensors"):
        write()
