"""Images of digits: those that come with the package, and MNIST's, from its files.

The format of the files, IDX, is that of Y. LeCun, C. Cortes and C. J. C. Burges, who made MNIST:
four bytes of which the third tells the type (8: bytes) and the last the number of dimensions; each
dimension as a big-endian integer of four bytes; then the elements.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import fedavg_core as fc
from nvflare_adapter.digits import load_digits

__all__ = ["Data", "digits", "mnist", "read_idx"]

_MOST_BYTES = 1 << 30
_UNSIGNED_BYTE = 8


class Data(NamedTuple):
    """Images and what they show.

    Attributes:
        train_images: float32, shape (n, pixels), from 0 to 1.
        train_labels: int64, shape (n,), from 0 to 9.
        test_images: float32, shape (m, pixels).
        test_labels: int64, shape (m,).
    """

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def digits() -> Data:
    """The 1,797 digits that come with the package, a fifth of them for the test."""
    return Data(*load_digits())


def mnist(folder: Path) -> Data:
    """Read MNIST.

    Args:
        folder: Where its four files are, as they are distributed or unpacked.

    Returns:
        The data.

    Raises:
        UsageError: A file is not there, or is not what it should be.
    """
    parts = []
    for name in ("train", "t10k"):
        images = read_idx(_find(folder, f"{name}-images", "idx3-ubyte"), 3)
        labels = read_idx(_find(folder, f"{name}-labels", "idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise fc.UsageError(
                f"{folder}: expected a label for each image, got {len(images)} images and "
                f"{len(labels)} labels in {name}"
            )
        if not len(labels) or labels.max() > 9:
            raise fc.UsageError(f"{folder}: expected labels from 0 to 9 in {name}, got others")
        pixels = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
        parts += [pixels, labels.astype(np.int64)]
    if parts[0].shape[1] != parts[2].shape[1]:
        raise fc.UsageError(f"{folder}: expected images of one size, got two")
    return Data(*parts)


def _find(folder: Path, name: str, kind: str) -> Path:
    names = [f"{name}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz")]
    found = next((folder / one for one in names if (folder / one).is_file()), None)
    if found is None:
        raise fc.UsageError(f"{folder}: expected a file {' or '.join(names)}, there is none")
    return found


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes.

    Args:
        path: The file; unpacked here if its name ends in ``.gz``.
        dimensions: How many it should have.

    Returns:
        New memory.

    Raises:
        UsageError: It is another file, or is damaged.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4 + 4 * dimensions)
            expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
            if len(start) < 4 + 4 * dimensions or start[:4] != expected:
                raise ValueError(f"expected an IDX file of bytes in {dimensions} dimensions")
            shape = [int.from_bytes(start[at : at + 4], "big") for at in range(4, len(start), 4)]
            size = math.prod(shape)
            if size > _MOST_BYTES:
                raise ValueError(f"expected at most {_MOST_BYTES} elements, got {size}")
            data = file.read(size + 1)
            if len(data) != size:
                raise ValueError(f"expected {size} elements for the shape {shape}, got others")
            return np.frombuffer(data, np.uint8).reshape(shape)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise fc.UsageError(f"{path}: {error}") from None
