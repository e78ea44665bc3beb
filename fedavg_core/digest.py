"""Digests of models: short texts that are equal where two models are the same to the bit.

A parameter's fingerprint is its dtype, its shape, and the SHA-256 of its elements' bytes, in C
order and each little-endian. A model's digest is the SHA-256 of its fingerprints in the order of
their names, written as JSON. So neither shows the order of the keys, the byte order and the layout
in memory, nor the kind of file that a model was read from; and both show every bit.

SHA-256 is that of FIPS 180-4 (2015), for which processors have instructions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedavg_core.model import Params, check_array, flat

__all__ = ["Fingerprint", "digest", "fingerprints", "is_digest"]

_RUN = 1 << 18
_PREFIX = b"fedavg_core model, format 1\n"
_DIGEST = re.compile("[0-9a-f]{64}")
_DTYPE = re.compile("[a-z][a-z0-9_]{0,31}")
_MOST_DIMENSIONS = 64
_LONGEST = 2**63


@dataclass(frozen=True)
class Fingerprint:
    """What tells one parameter from another.

    Attributes:
        dtype: The name of its dtype.
        shape: Its shape.
        sha256: The SHA-256 of its elements, 64 hexadecimal digits.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        """One line, with the first digits."""
        return f"{self.dtype}{list(self.shape)} {self.sha256[:12]}"

    def to_json(self) -> list[Any]:
        """The fingerprint as JSON can hold it.

        Returns:
            A list of its fields.
        """
        return [self.dtype, list(self.shape), self.sha256]

    @classmethod
    def from_json(cls, entry: object) -> Fingerprint:
        """The fingerprint that `to_json` was asked of.

        Args:
            entry: What it gave.

        Returns:
            An equal fingerprint.

        Raises:
            TypeError, ValueError: The entry is no fingerprint.
        """
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], list):
            raise TypeError("a fingerprint that is no list of a dtype, a shape and a digest")
        dtype, shape, sha256 = entry
        if len(shape) > _MOST_DIMENSIONS or not all(
            type(length) is int and 0 <= length < _LONGEST for length in shape
        ):
            raise ValueError("a fingerprint whose shape is none")
        if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or not is_digest(sha256):
            raise ValueError("a fingerprint whose dtype or digest is none")
        return cls(dtype, tuple(shape), sha256)


def fingerprints(params: Params) -> dict[str, Fingerprint]:
    """The fingerprint of each parameter of a model.

    Args:
        params: The model, of any layout and byte order; only read. What is not contiguous or not
            little-endian is copied, a small run at a time.

    Returns:
        From each name to its fingerprint, in the model's order.

    Raises:
        RefusedUpdate: An entry is not an array of numbers (see `check_array`).
    """
    found = {}
    for key, value in params.items():
        array = check_array(key, value)
        little = array.dtype.newbyteorder("<")
        sha256 = hashlib.sha256()
        for start in range(0, array.size, _RUN):
            run = np.ascontiguousarray(flat(array, start, _RUN), little)
            sha256.update(run.view(np.uint8).data)
        found[str(key)] = Fingerprint(array.dtype.name, array.shape, sha256.hexdigest())
    return found


def digest(found: Mapping[str, Fingerprint]) -> str:
    """The digest of a model.

    Args:
        found: Its `fingerprints`.

    Returns:
        64 hexadecimal digits.
    """
    rows = [[key, *found[key].to_json()] for key in sorted(found)]
    return hashlib.sha256(_PREFIX + json.dumps(rows).encode("ascii")).hexdigest()


def is_digest(value: object) -> bool:
    """Whether something is a SHA-256 as it is written here.

    Args:
        value: Anything.

    Returns:
        True for a string of 64 hexadecimal digits.
    """
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
