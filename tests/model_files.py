"""Model files of every kind that is read, for the tests of what reads them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.codec.npz import write_npz

Model = dict[str, npt.NDArray[Any]]

KINDS = ("npz", "deflated", "sealed", "safetensors")


def plain(model: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether NumPy's own npz files keep the dtypes and the names."""
    return all(
        array.dtype.type.__module__ == "numpy" and "/" not in key for key, array in model.items()
    )


def write_model(path: Path, kind: str, model: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Write a model as other programs do (and, sealed, as this one does); the path, with suffix."""
    path = path.with_name(f"{path.name}.{'safetensors' if kind == 'safetensors' else 'npz'}")
    if kind == "safetensors":
        contiguous = {key: np.ascontiguousarray(a).reshape(a.shape) for key, a in model.items()}
        importlib.import_module("safetensors.numpy").save_file(contiguous, path)
    elif kind == "sealed":
        with open(path, "x+b") as file:
            write_npz(file, model)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, **model)  # type: ignore[arg-type]
    return path


def safetensors_bytes(
    header: Any, data: bytes = b"", *, length: int | None = None, padding: bytes = b""
) -> bytes:
    """A safetensors file whose header may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += padding
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: Any, *offsets: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets), **more}
