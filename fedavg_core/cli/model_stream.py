"""Models in files, walked through piece by piece, so that their size does not matter.

A piece is some consecutive elements of one array, in one dimension. Arrays are read one after the
other, each from its first element to its last, which is how every kind of file is read quickly.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy.typing as npt

from fedavg_core.cli.console import Progress
from fedavg_core.codec import NpzWriter
from fedavg_core.errors import CheckpointError, RefusedUpdate, UsageError
from fedavg_core.model import ArraySpec, ModelSpec
from fedavg_core.model_file import HEADER, Allowance, ModelFile
from fedavg_core.safetensors import SafetensorsWriter, aligned

__all__ = ["check_suffix", "opened", "pieces", "spec_of", "write_order", "writer"]

Array: TypeAlias = npt.NDArray[Any]

_PIECE = 1 << 18


@contextlib.contextmanager
def opened(
    *paths: Path, scratch: Path | None = None, header: int = HEADER
) -> Iterator[list[ModelFile]]:
    """Look at model files that are read together.

    Args:
        paths: The files.
        scratch: A folder for scratch files (see `model_file`); None for the system's.
        header: The longest safetensors header to read, in bytes.

    Yields:
        The files, checked.

    Raises:
        CheckpointError: One is not there, or is damaged.
        UsageError: One holds something else than arrays of real numbers.
    """
    folder = Path(tempfile.gettempdir()) if scratch is None else scratch
    with Allowance(folder, inflaters=len(paths), header=header) as allowance:
        yield [_open(path, allowance) for path in paths]


def _open(path: Path, allowance: Allowance) -> ModelFile:
    try:
        return ModelFile(path, allowance)
    except CheckpointError as error:
        # A file of another suffix is one of ours if it looks like it; else its suffix tells more.
        suffix = path.suffix.lower()
        if path.is_file() and suffix not in ("", ".npz", ".npy", ".safetensors"):
            raise UsageError(
                f"{path}: suffix {suffix}: expected npz, npy or safetensors ({error.problem})"
            ) from None
        raise
    except RefusedUpdate as refusal:
        raise UsageError(f"{path}: {refusal}") from None


def spec_of(file: ModelFile) -> ModelSpec:
    """What a file holds: names, shapes and dtypes, in its order."""
    layouts = {key: array.layout for key, array in file.arrays().items()}
    return ModelSpec(
        {key: ArraySpec(layout.shape, layout.dtype) for key, layout in layouts.items()}
    )


def pieces(
    files: list[ModelFile], keys: Mapping[str, int], progress: Progress
) -> Iterator[tuple[str, list[Array]]]:
    """Walk through files at the same pace.

    Args:
        files: The files.
        keys: The arrays to read, in this order, and their sizes, the same in each file.
        progress: Told how far it is, in bytes of all files.

    Yields:
        The name of an array, and a piece of it out of each file, as new memory.

    Raises:
        CheckpointError: A file is damaged or has changed.
    """
    specs = [spec_of(file) for file in files]
    total = sum(size * spec[key].dtype.itemsize for key, size in keys.items() for spec in specs)
    done = 0
    for key, size in keys.items():
        for start in range(0, size, _PIECE):
            run = {key: (start, min(_PIECE, size - start))}
            values = [file.read(run)[key] for file in files]
            yield key, values
            done += sum(array.nbytes for array in values)
            progress(done, total)


def check_suffix(path: Path) -> None:
    """See that an output's name tells a format that is written.

    Raises:
        UsageError: It does not.
    """
    if path.suffix.lower() not in (".npz", ".safetensors"):
        raise UsageError(f"expected an output with suffix .npz or .safetensors, got {path}")


def write_order(path: Path, spec: ModelSpec) -> ModelSpec:
    """The same arrays in the order in which a file is written."""
    if path.suffix.lower() == ".npz":
        return spec
    return ModelSpec({key: spec[key] for key in aligned(spec)})


def writer(path: Path, file: IO[bytes], spec: ModelSpec) -> NpzWriter | SafetensorsWriter:
    """What writes the format that a name tells, to an empty file."""
    return (NpzWriter if path.suffix.lower() == ".npz" else SafetensorsWriter)(file, spec)
