"""Digests of models: what shows in them, and what does not."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.digest import Fingerprint, digest, fingerprints, is_digest
from fedavg_core.errors import RefusedUpdate
from tests.bad_updates import model


def of(params: Any) -> str:
    return digest(fingerprints(params))


def test_it_is_what_the_docstring_says() -> None:
    params = {"w": np.array([[1, 2, 3], [4, 5, 6]], ">f4").T, "b": np.array(7, np.int16)}
    inner = {
        "w": hashlib.sha256(np.array([1, 4, 2, 5, 3, 6], "<f4").tobytes()).hexdigest(),
        "b": hashlib.sha256(b"\x07\x00").hexdigest(),
    }
    assert fingerprints(params) == {
        "w": Fingerprint("float32", (3, 2), inner["w"]),
        "b": Fingerprint("int16", (), inner["b"]),
    }
    rows = [["b", "int16", [], inner["b"]], ["w", "float32", [3, 2], inner["w"]]]
    text = b"fedavg_core model, format 1\n" + json.dumps(rows).encode()
    assert of(params) == hashlib.sha256(text).hexdigest()


def test_it_is_the_same_today_as_in_later_versions() -> None:
    assert of(model()) == "af8ae707c0077abcaf10f892ae5cdffdc3c331ac6733ad826926de0844b8351f"


class Plain(np.ndarray[Any, Any]):
    """A subclass, which means nothing."""


@pytest.mark.parametrize(
    "other",
    [
        dict(reversed(model().items())),
        {key: np.asfortranarray(value) for key, value in model().items()},
        {key: value.astype(value.dtype.newbyteorder(">")) for key, value in model().items()},
        {key: np.repeat(value, 2, axis=-1)[..., ::2] for key, value in model().items()},
        {key: value[::-1].copy()[::-1] for key, value in model().items()},
        {key: value.view(Plain) for key, value in model().items()},
        {np.str_(key): value for key, value in model().items()},
    ],
)
def test_what_does_not_tell_models_apart_does_not_show(other: Any) -> None:
    assert of(other) == of(model())
    assert all(type(key) is str for key in fingerprints(other))


def test_the_way_through_a_file_does_not_show(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.npz", Checkpoint(model(), 0))
    assert of(load_checkpoint(tmp_path / "model.npz").model) == of(model())
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(model(), tmp_path / "model.safetensors")
    assert of(safetensors.load_file(tmp_path / "model.safetensors")) == of(model())


def test_a_scalar_of_numpy_is_an_array_without_dimensions() -> None:
    assert of({"x": np.float32(3)}) == of({"x": np.array(3, np.float32)})


def flipped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    data = bytearray(array.tobytes())
    data[-1] ^= 1
    return np.frombuffer(bytes(data), array.dtype).reshape(array.shape)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"w": model()["w"]},
        {**model(), "x": np.empty(0)},
        {**model(), "w": model()["w"].reshape(4)},
        {**model(), "w": model()["w"].T},
        {**model(), "w": model()["w"].astype(np.float64)},
        {**model(), "w": model()["w"].view(np.int32)},
        {("v" if key == "w" else key): value for key, value in model().items()},
        *({**model(), key: flipped(value)} for key, value in model().items()),
        *({**model(), key: -value} for key, value in model().items()),
    ],
)
def test_what_tells_models_apart_shows(other: Any) -> None:
    assert of(other) != of(model())


def test_a_zero_and_a_negative_zero_are_two_and_so_are_two_nans() -> None:
    assert of({"x": np.array([0.0])}) != of({"x": np.array([-0.0])})
    nans = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(np.float64)
    assert of({"x": nans[:1]}) != of({"x": nans[1:]})


@given(
    hnp.arrays(
        st.sampled_from(["<f4", ">f4", "<f2", ">i8", "u1"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.integers(0, 100),
    ),
    st.booleans(),
)
def test_it_is_that_of_the_bytes_in_c_order(array: npt.NDArray[Any], turned: bool) -> None:
    array = array.T if turned else array
    little = array.astype(array.dtype.newbyteorder("<"), order="C")
    expected = hashlib.sha256(little.tobytes()).hexdigest()
    assert fingerprints({"x": array})["x"].sha256 == expected


@pytest.mark.parametrize("rows", [1 << 9, (1 << 9) + 1])
def test_an_array_of_many_runs_is_hashed_whole(rows: int) -> None:
    array = np.arange(rows * 1025, dtype=np.int32).reshape(rows, 1025)
    for turned in (array, array.T, array.astype(">i4")):
        expected = hashlib.sha256(turned.astype("<i4").tobytes()).hexdigest()
        assert fingerprints({"x": turned})["x"].sha256 == expected


@pytest.mark.parametrize(
    ("array", "most"),
    [
        (np.zeros((1 << 11, 1 << 10)), 50_000),
        (np.zeros((1 << 11, 1 << 10)).T, 5_000_000),
        (np.zeros((1 << 11, 1 << 10), ">f8"), 5_000_000),
        (np.zeros((1 << 11, 1 << 10), ml_dtypes.bfloat16), 50_000),
    ],
)
def test_the_model_is_not_copied(array: npt.NDArray[Any], most: int) -> None:
    of({"x": array[:1]})
    tracemalloc.start()
    of({"x": array})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most < array.nbytes


@pytest.mark.parametrize(
    "params", [{"x": np.ones(2, complex)}, {"x": np.array([None])}, {"x": [1.0]}, {1: np.ones(2)}]
)
def test_what_is_no_model_has_no_digest(params: Any) -> None:
    with pytest.raises(RefusedUpdate):
        fingerprints(params)


def test_a_fingerprint_comes_back_from_json() -> None:
    for one in fingerprints(model()).values():
        assert Fingerprint.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_fingerprint_is_shown_by_its_first_digits() -> None:
    one = fingerprints(model())["w"]
    assert str(one) == f"float32[2, 2] {one.sha256[:12]}"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        [],
        "float32",
        ["float32", [2]],
        ["float32", [2], "0" * 64, 0],
        ["float32", 2, "0" * 64],
        ["float32", (2,), "0" * 64],
        ["float32", [2.0], "0" * 64],
        ["float32", [True], "0" * 64],
        ["float32", [-1], "0" * 64],
        ["float32", ["2"], "0" * 64],
        ["float32", [math.nan], "0" * 64],
        [32, [2], "0" * 64],
        ["float32\n", [2], "0" * 64],
        ["", [2], "0" * 64],
        ["f" * 33, [2], "0" * 64],
        ["float32", [2**63], "0" * 64],
        ["float32", [1] * 65, "0" * 64],
        ["float32", [2], "0" * 63],
        ["float32", [2], "0" * 65],
        ["float32", [2], "A" * 64],
        ["float32", [2], "0" * 64 + "\n"],
        ["float32", [2], "\u0660" * 64],
        ["float32", [2], 0],
    ],
)
def test_what_is_no_fingerprint_is_told_from_one(entry: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Fingerprint.from_json(entry)


def test_a_digest_is_told_from_other_text() -> None:
    assert is_digest(of({}))
    assert not any(map(is_digest, ["", "0" * 63, "g" * 64, None, b"0" * 64, 0]))
