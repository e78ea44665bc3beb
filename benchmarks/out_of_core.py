"""``python -m benchmarks.out_of_core``: the mean of more files than memory holds.

Model files of the sizes asked for are made in a folder that is taken away afterwards: npz and
safetensors by turns, of layers of 2²² float32 elements and a small one. The command ``fedavg
aggregate`` averages them in a process of its own, whose peak of memory the operating system tells;
it is set beside that of a process which only starts and prints its version. Then the same mean is
computed in memory, one file after the other, and compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fedavg_core as fc
from fedavg_core.cli.arguments import byte_count
from fedavg_core.out_of_core.model_file import load_model
from fedavg_core.out_of_core.model_writer import write_order, writer

__all__ = ["main"]

_LAYER = 1 << 22
_PIECE = 1 << 18
_MIB = 2**20
_PROGRAM = """
import sys
from fedavg_core.cli import main
from fedavg_core.cli.watch import peak_bytes
try:
    code = main()
except SystemExit as leaving:
    code = leaving.code
print(peak_bytes())
sys.exit(code)
"""


def _make(path: Path, size: int, seed: int) -> None:
    """A model file of about so many bytes, written piece by piece."""
    layers, rest = divmod(size // 4, _LAYER)
    sizes = [_LAYER] * layers + [rest] * bool(rest)
    spec = write_order(
        path,
        fc.ModelSpec(
            {
                f"layer-{number}": fc.ArraySpec((elements,), np.dtype(np.float32))
                for number, elements in enumerate(sizes)
            }
        ),
    )
    rng = np.random.default_rng(seed)
    with open(path, "x+b") as file, writer(path, file, spec) as out:
        for elements in sizes:
            for start in range(0, elements, _PIECE):
                count = min(_PIECE, elements - start)
                out.write(rng.standard_normal(count, np.float32) * np.float32(0.02))


def _peak(*arguments: str) -> tuple[int, float]:
    """Run ``fedavg``: the most bytes of memory that it had, and the seconds that it took."""
    started = time.perf_counter()
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} of: fedavg {' '.join(arguments)}")
    return int(done.stdout.splitlines()[-1]), time.perf_counter() - started


def _in_memory(paths: Sequence[Path], weights: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    mean = fc.WeightedMean()
    for path, weight in zip(paths, weights, strict=True):
        mean.add(load_model(path), weight)
    return mean.mean()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the files, average them, compare, and print what was measured as JSON.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        0 if the bits are the same and the peak is within the limit, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.out_of_core")
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--size", type=byte_count, default="400MB", help="of each (400MB)")
    parser.add_argument("--memory-limit", default="256MiB")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: /tmp)")
    read = parser.parse_args(arguments)
    weights = [100 + 37 * number % 500 for number in range(read.files)]
    with tempfile.TemporaryDirectory(dir=read.folder) as name:
        folder = Path(name)
        suffixes = ("npz", "safetensors")
        paths = [folder / f"site-{i}.{suffixes[i % 2]}" for i in range(read.files)]
        for seed, path in enumerate(paths):
            _make(path, read.size, seed)
        floor, _ = _peak("--version")
        out = folder / "mean.npz"
        peak, seconds = _peak(
            *("aggregate", *map(str, paths), "-o", str(out)),
            *("--weights", ",".join(map(str, weights))),
            *("--memory-limit", read.memory_limit),
        )
        total = sum(path.stat().st_size for path in paths)
        same = fc.same_bits(load_model(out), _in_memory(paths, weights))
    within = peak <= byte_count(read.memory_limit)
    measured = {
        "files": read.files,
        "bytes_of_a_file": read.size,
        "memory_limit_mib": byte_count(read.memory_limit) / _MIB,
        "peak_mib": round(peak / _MIB, 1),
        "peak_of_an_idle_process_mib": round(floor / _MIB, 1),
        "within_the_limit": within,
        "seconds": round(seconds, 1),
        "megabytes_a_second": round(total / seconds / 1e6),
        "same_bits_as_in_memory": same,
    }
    print(json.dumps(measured, indent=1))
    return 0 if same and within else 1


if __name__ == "__main__":
    sys.exit(main())
