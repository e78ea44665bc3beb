"""Models in files, walked through piece by piece, so that their size does not matter.

A piece is some consecutive elements of one array, in one dimension. Arrays are read one after the
other, each from its first element to its last, which is how every kind of file is read quickly.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt

from fedavg_core.cli.console import Progress
from fedavg_core.errors import RefusedUpdate, UsageError
from fedavg_core.model import ArraySpec, ModelSpec
from fedavg_core.out_of_core.allowance import Allowance
from fedavg_core.out_of_core.model_file import ModelFile

__all__ = ["opened", "pieces", "spec_of"]

Array: TypeAlias = npt.NDArray[Any]

_PIECE = 1 << 18


@contextlib.contextmanager
def opened(*paths: Path, scratch: Path | None = None) -> Iterator[list[ModelFile]]:
    """Look at model files that are read together.

    Args:
        paths: The files.
        scratch: A folder for scratch files (see `model_file`); None for the system's.

    Yields:
        The files, checked.

    Raises:
        CheckpointError: One is not there, is of another kind, or is damaged.
        UsageError: One holds something else than arrays of real numbers.
    """
    folder = Path(tempfile.gettempdir()) if scratch is None else scratch
    with Allowance(folder, inflaters=len(paths)) as allowance:
        yield [_open(path, allowance) for path in paths]


def _open(path: Path, allowance: Allowance) -> ModelFile:
    try:
        return ModelFile(path, allowance)
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
