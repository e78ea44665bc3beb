"""Model files that are written piece by piece, in the format that their name tells."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from fedavg_core.codec.npz import NpzWriter
from fedavg_core.codec.safetensors import SafetensorsWriter, aligned
from fedavg_core.errors import UsageError, shown_path
from fedavg_core.model import ModelSpec

__all__ = ["check_suffix", "write_order", "writer"]

_NPZ, _SAFETENSORS = ".npz", ".safetensors"


def check_suffix(path: Path) -> None:
    """See that a name tells a format that is written.

    Args:
        path: The file to be.

    Raises:
        UsageError: It does not.
    """
    if path.suffix.lower() not in (_NPZ, _SAFETENSORS):
        raise UsageError(
            f"expected an output with suffix {_NPZ} or {_SAFETENSORS}, got {shown_path(path)}"
        )


def write_order(path: Path, spec: ModelSpec) -> ModelSpec:
    """The order in which arrays are written.

    Args:
        path: The file to be.
        spec: The arrays.

    Returns:
        The same in that order: their own in an npz; in safetensors those of wide dtypes first.
    """
    if path.suffix.lower() == _NPZ:
        return spec
    return ModelSpec({key: spec[key] for key in aligned(spec)})


def writer(path: Path, file: IO[bytes], spec: ModelSpec) -> NpzWriter | SafetensorsWriter:
    """What writes a model to an empty file.

    Args:
        path: The file to be, whose name tells the format.
        file: Where to write to.
        spec: The arrays, in the order in which they are written.

    Returns:
        A context manager; its ``write`` takes the elements of all arrays, one behind the other.

    Raises:
        UsageError: The format has no dtype of an array, or cannot have its name.
    """
    return (NpzWriter if path.suffix.lower() == _NPZ else SafetensorsWriter)(file, spec)
