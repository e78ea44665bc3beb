"""What a model is made of."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fedavg_core as fc
from fedavg_core.model import ArraySpec, copy_params, dtype_named, new_in, number_format

EXTENSIONS = [
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]


@pytest.mark.parametrize("name", ["float16", "float32", "float64", *EXTENSIONS])
def test_a_float_format_is_what_its_library_says(name: str) -> None:
    dtype = dtype_named(name)
    assert dtype.name == name
    number = number_format(dtype)
    info: Any = ml_dtypes.finfo(dtype)
    assert number is not None
    assert number.kind == "float"
    assert number.precision == info.nmant + 1
    assert number.least_exponent == info.minexp
    assert number.largest == float(info.max)


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
def test_an_integer_format_is_what_numpy_says(name: str) -> None:
    number = number_format(dtype_named(name))
    assert number is not None
    assert (number.kind, number.largest) == ("integer", int(np.iinfo(name).max))


@pytest.mark.parametrize(
    "dtype", ["bool", "complex64", "object", "S3", "U3", "M8[s]", "m8[s]", "V4", "g", "i4,f4"]
)
def test_other_dtypes_have_no_format(dtype: str) -> None:
    assert number_format(np.dtype(dtype)) is None
    with pytest.raises(fc.UsageError, match="expected a dtype of real numbers"):
        fc.ModelSpec({"x": ArraySpec((), np.dtype(dtype))})


def test_an_unsigned_scale_is_no_number_to_average() -> None:
    assert number_format(np.dtype(ml_dtypes.float8_e8m0fnu)) is None
    named = type("bfloat", (np.void,), {"__module__": "ml_dtypes"})
    assert np.dtype((named, 2)).name == "bfloat16"
    assert number_format(np.dtype((named, 2))) is None


@pytest.mark.parametrize("name", ["float128", "bool", "object", "../x", "float8_e8m0fnu"])
def test_only_names_of_numbers_name_a_dtype(name: str) -> None:
    with pytest.raises(fc.UsageError, match="expected the name of a dtype of real numbers"):
        dtype_named(name)


def test_a_missing_package_is_named() -> None:
    program = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "import fedavg_core as fc\n"
        "from fedavg_core.model import dtype_named\n"
        "try: dtype_named('bfloat16')\n"
        "except fc.UsageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout
        == "an array of bfloat16 needs the package ml_dtypes, in a version that has it\n"
    )


def test_a_dtype_that_its_package_does_not_have_yet_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(ml_dtypes, "float8_e3m4")
    with pytest.raises(fc.UsageError, match="float8_e3m4 needs the package ml_dtypes"):
        dtype_named("float8_e3m4")


def test_a_spec_is_a_mapping_in_native_byte_order() -> None:
    spec = fc.ModelSpec.of({"b": np.ones((2, 3), ">f4"), "a": np.array(1)})
    assert list(spec) == ["b", "a"]
    assert len(spec) == 2
    assert spec["b"] == ArraySpec((2, 3), np.dtype("f4"))
    assert repr(spec) == "ModelSpec(b: float32[2, 3], a: int64[])"


def test_a_spec_that_is_given_is_in_native_byte_order_as_well() -> None:
    given = {"w": ArraySpec((3,), np.dtype(">f4"))}
    assert fc.ModelSpec(given) == {"w": ArraySpec((3,), np.dtype("f4"))}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (5, "expected a mapping from names to ArraySpec, got "),
        ({1: ArraySpec((3,), np.dtype("f4"))}, "key 1: expected a name, and an ArraySpec"),
        ({"w": np.ones(2)}, "key 'w': expected a name, and an ArraySpec"),
        ({"w": ArraySpec((3,), "f4")}, "key 'w': expected"),  # type: ignore[arg-type]
        ({"w": ArraySpec((-3,), np.dtype("f4"))}, "key 'w': expected"),
        ({"w": ArraySpec((1.5,), np.dtype("f4"))}, "key 'w': expected"),  # type: ignore[arg-type]
        ({"w": ArraySpec(5, np.dtype("f4"))}, "key 'w': expected"),  # type: ignore[arg-type]
        ({"w": ArraySpec((3,), np.dtype("O"))}, "expected a dtype of real numbers"),
    ],
)
def test_what_is_no_spec_is_told(arrays: Any, message: str) -> None:
    with pytest.raises(fc.UsageError, match=message):
        fc.ModelSpec(arrays)


def test_a_copy_shares_no_memory_and_can_be_written() -> None:
    original = np.arange(6, dtype=">f8").reshape(2, 3).T
    original.flags.writeable = False
    copy = copy_params({"x": original})["x"]
    assert copy.flags.writeable
    assert copy.flags.c_contiguous
    assert copy.dtype == np.float64
    assert np.array_equal(copy, original)


def test_what_is_new_are_the_entries_under_unknown_names_in_their_order() -> None:
    entries = {"c": 1, "a": 2, "b": 3}
    assert list(new_in(entries, {"a": None}).items()) == [("c", 1), ("b", 3)]
    assert new_in(entries, dict.fromkeys("abcd")) == {}
    new = new_in(entries, {})
    assert list(new.items()) == list(entries.items())
    assert new is not entries
