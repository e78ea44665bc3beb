"""Models: flat mappings from a name to a NumPy array, and what may be in them.

A model is a `Mapping[str, numpy.ndarray]`. This module knows which dtypes hold numbers that can be
averaged, and how precise each is (`number_format`), and what a model looks like without its values
(`ModelSpec`).

Averaged are the signed and unsigned integers, float16, float32 and float64, and from the package
`ml_dtypes` bfloat16 and the signed float8 kinds. The latter are recognised by name, so that the
package need not be there. Not averaged: bool, complex, object, strings, dates, records, and the
platform's extended float (its format differs from machine to machine).

A floating-point format is described as IEEE 754 (2019) does: precision p (bits of the significand,
the hidden one included), the exponent of the smallest normal number, and the largest finite number.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedavg_core.errors import Reason, RefusedUpdate, UsageError, a_type, quoted
from fedavg_core.plain import plain_text

__all__ = [
    "ArraySpec",
    "ModelSpec",
    "NumberFormat",
    "Params",
    "check_array",
    "copy_params",
    "dtype_named",
    "flat",
    "is_extension",
    "joined",
    "new_in",
    "number_format",
]

Array: TypeAlias = npt.NDArray[Any]
Params: TypeAlias = Mapping[str, npt.NDArray[Any]]
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class NumberFormat:
    """How a dtype holds numbers.

    Attributes:
        kind: ``"float"`` or ``"integer"``.
        precision: Significant bits: p for a float, the width without the sign for an integer.
        least_exponent: For a float, e such that 2**e is the smallest normal number; 0 for integers.
        largest: The largest finite number, exactly.
    """

    kind: str
    precision: int
    least_exponent: int
    largest: int | float


def _ieee(precision: int, least_exponent: int) -> NumberFormat:
    greatest_exponent = 1 - least_exponent
    largest = float((2**precision - 1) << (greatest_exponent - precision + 1))
    return NumberFormat("float", precision, least_exponent, largest)


_ARRAYS = (np.ndarray, np.generic)
_FLOATS = {
    "float16": _ieee(11, -14),
    "float32": _ieee(24, -126),
    "float64": _ieee(53, -1022),
}
# Formats of ml_dtypes, by dtype name. The float8 kinds spend their codes differently from IEEE 754
# ("fn": no infinity, "uz": no negative zero), which shows in the largest number only.
_EXTENSION_FLOATS = {
    "bfloat16": _ieee(8, -126),
    "float8_e3m4": NumberFormat("float", 5, -2, 15.5),
    "float8_e4m3": NumberFormat("float", 4, -6, 240.0),
    "float8_e4m3b11fnuz": NumberFormat("float", 4, -10, 30.0),
    "float8_e4m3fn": NumberFormat("float", 4, -6, 448.0),
    "float8_e4m3fnuz": NumberFormat("float", 4, -7, 240.0),
    "float8_e5m2": NumberFormat("float", 3, -14, 57344.0),
    "float8_e5m2fnuz": NumberFormat("float", 3, -15, 57344.0),
}


@functools.cache
def number_format(dtype: np.dtype[Any]) -> NumberFormat | None:
    """How a dtype holds numbers, or None if its values cannot be averaged.

    Args:
        dtype: Any NumPy dtype, in any byte order.

    Returns:
        Its format; None for bool, complex, object, strings, dates, records and extended floats.
    """
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return NumberFormat("integer", int(info.max).bit_length(), 0, int(info.max))
    if is_extension(dtype):
        return _EXTENSION_FLOATS.get(dtype.name)
    return _FLOATS.get(dtype.name) if dtype.kind == "f" else None


def is_extension(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of the package `ml_dtypes`, which need not be imported to tell.

    Args:
        dtype: Any NumPy dtype.

    Returns:
        True for bfloat16, say; False for raw bytes, whatever they call themselves.
    """
    return dtype.type.__module__ == "ml_dtypes" and not issubclass(dtype.type, np.void)


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype that has a given name; the inverse of ``dtype.name`` for dtypes of models.

    Args:
        name: Such as ``"float32"`` or ``"bfloat16"``.

    Returns:
        The dtype, in native byte order.

    Raises:
        UsageError: No dtype of that name can be averaged, or it needs the package `ml_dtypes`,
            which is not installed.
    """
    if name in _EXTENSION_FLOATS:
        try:
            extension: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        except (ImportError, AttributeError):
            raise UsageError(
                f"an array of {name} needs the package ml_dtypes, in a version that has it"
            ) from None
        return extension
    integers = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
    if name in _FLOATS or name in integers:
        return np.dtype(name)
    raise UsageError(f"expected the name of a dtype of real numbers, got {quoted(name)}")


def check_array(key: object, value: object) -> npt.NDArray[Any]:
    """See that one entry of a model is a named array of numbers.

    Args:
        key: The entry's name.
        value: The entry's value.

    Returns:
        The value as a plain array, borrowed: a subclass may have another arithmetic, or bring its
        own code.

    Raises:
        RefusedUpdate: The name is no string (BAD_NAME), or the value is no NumPy array of a dtype
            that can be averaged (DTYPE).
    """
    name = plain_text(key)
    if name is None:
        raise RefusedUpdate(
            Reason.BAD_NAME, expected="parameter names that are strings", got=quoted(key)
        )
    # The arithmetic of zero-dimensional arrays gives NumPy's scalars, so those are arrays here.
    kind = type(value)
    if not issubclass(kind, _ARRAYS) or issubclass(kind, np.ma.MaskedArray):
        raise RefusedUpdate(Reason.DTYPE, key=name, expected="a NumPy array", got=a_type(value))
    array = np.asarray(value)
    dtype = array.dtype
    # Records and NumPy's strings refer to objects, which are asked where such dtypes are compared.
    foreign = dtype.names is not None or dtype.kind == "T"
    if foreign or number_format(dtype) is None:
        raise RefusedUpdate(
            Reason.DTYPE,
            key=name,
            expected="an array of real numbers (float16, bfloat16, float8, float32, float64, ints)",
            got=quoted(dtype) if foreign else f"dtype {quoted(str(dtype))}",
        )
    return array


@dataclass(frozen=True)
class ArraySpec:
    """What one parameter looks like.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, in the machine's own byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def number(self) -> NumberFormat:
        """How the dtype holds numbers; UsageError if its values cannot be averaged."""
        number = number_format(self.dtype)
        if number is None:
            raise UsageError(f"expected a dtype of real numbers, got {quoted(str(self.dtype))}")
        return number

    def __str__(self) -> str:
        """As messages show it, such as ``float32[3, 2]``."""
        return f"{self.dtype}{list(self.shape)}"


class ModelSpec(Mapping[str, ArraySpec]):
    """What a model looks like: for each parameter a shape and a dtype, and no values.

    Args:
        arrays: From name to `ArraySpec`; copied. What a dtype's byte order is does not matter.

    Raises:
        UsageError: It is no such mapping, or a dtype's values cannot be averaged.
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Mapping[str, ArraySpec]) -> None:
        if not isinstance(arrays, Mapping):
            raise UsageError(f"expected a mapping from names to ArraySpec, got {a_type(arrays)}")
        self._arrays = {key: _checked_spec(key, array) for key, array in arrays.items()}

    @classmethod
    def of(cls, params: Params) -> ModelSpec:
        """The spec of a model that is at hand.

        Args:
            params: The model; only looked at.

        Returns:
            Its spec, keys in the same order.

        Raises:
            RefusedUpdate: An entry is not an array of numbers (see `check_array`).
            UsageError: It is no mapping.
        """
        if not isinstance(params, Mapping):
            raise UsageError(
                f"expected a model as a mapping from names to arrays, got {a_type(params)}"
            )
        arrays = {key: check_array(key, value) for key, value in params.items()}
        return cls({key: ArraySpec(array.shape, array.dtype) for key, array in arrays.items()})

    def __getitem__(self, key: str) -> ArraySpec:
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}: {array}" for key, array in self._arrays.items())
        return f"ModelSpec({inside})"


def _checked_spec(key: object, spec: object) -> ArraySpec:
    """What was given under a name, if it is a name and tells what a parameter looks like."""
    if not (
        isinstance(key, str)
        and isinstance(spec, ArraySpec)
        and isinstance(spec.dtype, np.dtype)
        and isinstance(spec.shape, tuple)
        and all(isinstance(length, int) and length >= 0 for length in spec.shape)
    ):
        raise UsageError(
            f"key {quoted(key)}: expected a name, and an ArraySpec of whole numbers and a dtype, "
            f"got {quoted(spec)}"
        )
    _ = spec.number  # raises where there is none
    return spec if spec.dtype.isnative else ArraySpec(spec.shape, spec.dtype.newbyteorder("="))


def joined(
    known: Mapping[str, ArraySpec], brought: Mapping[str, ArraySpec], is_fixed: bool
) -> dict[str, ArraySpec]:
    """The parameters of two models that are to be averaged.

    Args:
        known: What is known of the parameters.
        brought: What the others look like.
        is_fixed: Whether there may be none but the known ones.

    Returns:
        Both, the known ones first.

    Raises:
        UsageError: A parameter has another shape or dtype, or may not be there.
    """
    for key, spec in brought.items():
        if key not in known:
            if is_fixed:
                raise UsageError(f"key {quoted(key)}: the spec does not name it")
        elif known[key] != spec:
            raise UsageError(f"key {quoted(key)}: expected {known[key]}, got {spec}")
    return {**known, **brought}


def new_in(entries: Mapping[str, Entry], known: Mapping[str, object]) -> dict[str, Entry]:
    """The entries under names that another mapping lacks; fast where, as nearly always, none is.

    Args:
        entries: Anything by name.
        known: Anything else by name.

    Returns:
        A new dict, in the order of the entries.
    """
    if entries.keys() <= known.keys():
        return {}
    return {key: entry for key, entry in entries.items() if key not in known}


def copy_params(params: Params) -> dict[str, npt.NDArray[Any]]:
    """A model that shares no memory with the given one.

    Args:
        params: The model; only read.

    Returns:
        The same keys in the same order; C-contiguous, writeable arrays in native byte order.
    """
    return {
        key: np.array(value, dtype=value.dtype.newbyteorder("="), order="C", subok=False)
        for key, value in params.items()
    }


def flat(array: npt.NDArray[Any], start: int, size: int) -> npt.NDArray[Any]:
    """Some consecutive elements of an array in C order.

    Args:
        array: Any array.
        start: The first element.
        size: How many.

    Returns:
        One dimension; a view if the array is C-contiguous, else a copy.
    """
    if array.flags.c_contiguous:
        whole = array.reshape(-1)
        return whole if size == whole.size else whole[start : start + size]
    elements: npt.NDArray[Any] = np.asarray(array).flat[start : start + size]
    return elements
