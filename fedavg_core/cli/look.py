"""The commands that look at model files: ``inspect`` and ``compare``.

Files are read piece by piece, whatever their size. Norms, least and largest values are those of the
finite elements; how many others there are is counted beside them. Differences are those of elements
that are no NaN, likewise.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.checkpoint import Checkpoint
from fedavg_core.cli.arguments import MODEL_HELP, Subparsers
from fedavg_core.cli.console import (
    byte_progress,
    name_shown,
    print_json,
    print_line,
    print_table,
)
from fedavg_core.cli.model_stream import opened, pieces, spec_of
from fedavg_core.comparison import KeyDifference, compare
from fedavg_core.errors import counted
from fedavg_core.model import ArraySpec

__all__ = ["add_commands"]

_MOST_METRICS = 8


def add_commands(commands: Subparsers) -> None:
    """Tell a parser about these commands."""
    parser = commands.add_parser(
        "inspect",
        help="show what a model file holds",
        description="Show the arrays of a model file: names, dtypes, shapes, L2 norms, least and "
        "largest values, and how many elements are NaN or infinite (norm, least and largest value "
        "are those of the others); and of a checkpoint after how many rounds it was made, with its "
        "metrics.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_inspect)

    parser = commands.add_parser(
        "compare",
        help="tell whether two model files are the same to the bit",
        description="Compare two models array by array: how many elements differ in their bits; "
        "how far the farthest two are apart, as a number (computed in float64, for integers "
        "exactly; elements that are NaN are left out) and in steps from one number of the dtype to "
        "the next (ulps; for integers their difference; NaN is the number beyond infinity); and "
        "how many elements are NaN in one model only. Exit code 0: the same to the bit; 1: they "
        "differ; 2: an error.",
    )
    parser.add_argument("a", type=Path, metavar="A", help=MODEL_HELP)
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_compare)


@dataclass
class _Summary:
    """What an array's elements are like.

    Attributes:
        norm: The L2 norm of those that are finite.
        least: The smallest of them; None if there is none.
        largest: The largest of them; None if there is none.
        nan: How many are NaN.
        infinite: How many are infinite.
    """

    norm: float = 0.0
    least: float | None = None
    largest: float | None = None
    nan: int = 0
    infinite: int = 0

    @property
    def has_norm(self) -> bool:
        """Whether any element is finite, or there are none."""
        return self.least is not None or not self.nan + self.infinite

    def add(self, values: npt.NDArray[Any]) -> None:
        """Take in a piece; at least one element."""
        if values.dtype.kind not in "iu":
            values = values.astype(np.float64)
            self.nan += int(np.count_nonzero(np.isnan(values)))
            self.infinite += int(np.count_nonzero(np.isinf(values)))
            values = values[np.isfinite(values)]
            if not values.size:
                return
        low, high = values.min().item(), values.max().item()
        self.least = low if self.least is None else min(low, self.least)
        self.largest = high if self.largest is None else max(high, self.largest)
        # Scaled by a power of two, so that no square overflows, and none that counts vanishes.
        exponent = math.frexp(max(abs(low), abs(high)))[1]
        scaled = np.ldexp(values.astype(np.float64), -exponent)
        norm = math.sqrt(float(np.square(scaled).sum()))
        self.norm = math.hypot(self.norm, _times_power(norm, exponent))

    def to_json(self, spec: ArraySpec) -> dict[str, Any]:
        """With what the array looks like, as JSON can hold it."""
        return {
            "shape": list(spec.shape),
            "dtype": str(spec.dtype),
            "norm": self.norm if self.has_norm and self.norm < math.inf else None,
            "min": self.least,
            "max": self.largest,
            "nan": self.nan,
            "infinite": self.infinite,
        }


def _times_power(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def _inspect(read: argparse.Namespace) -> int:
    with opened(read.file) as files, byte_progress("reading") as progress:
        spec = spec_of(files[0])
        checkpoint = files[0].checkpoint()
        found = {key: _Summary() for key in spec}
        sizes = {key: math.prod(array.shape) for key, array in spec.items()}
        for key, (values,) in pieces(files, sizes, progress):
            found[key].add(values)
    elements = sum(sizes.values())
    held = sum(sizes[key] * array.dtype.itemsize for key, array in spec.items())
    nan = sum(summary.nan for summary in found.values())
    infinite = sum(summary.infinite for summary in found.values())
    norm = math.hypot(*(summary.norm for summary in found.values()))
    has_norm = elements > nan + infinite or not elements
    if read.json:
        arrays = {key: summary.to_json(spec[key]) for key, summary in found.items()}
        print_json(
            {
                "file": str(read.file),
                "checkpoint": None if checkpoint is None else _checkpoint_json(checkpoint),
                "elements": elements,
                "bytes": held,
                "norm": norm if has_norm and norm < math.inf else None,
                "nan": nan,
                "infinite": infinite,
                "arrays": arrays,
            }
        )
        return 0
    print_table(
        ("key", "dtype", "shape", "norm", "min", "max", "NaN", "infinite"),
        [
            (
                name_shown(key),
                str(spec[key].dtype),
                _shape(spec[key]),
                f"{summary.norm:.6g}" if summary.has_norm else "-",
                _number(summary.least),
                _number(summary.largest),
                f"{summary.nan:,}",
                f"{summary.infinite:,}",
            )
            for key, summary in found.items()
        ],
        words=3,
    )
    count = counted(len(spec), "array")
    others = f"{nan + infinite:,} of them not finite" if nan + infinite else "all finite"
    length = f"norm {norm:.6g}" if has_norm else "no norm"
    left_out = " without what is not finite" if has_norm and nan + infinite else ""
    print_line(f"{count}, {elements:,} elements, {others}; {held:,} bytes; {length}{left_out}")
    if checkpoint is not None:
        print_line(_checkpoint_told(checkpoint))
    return 0


def _checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "round": checkpoint.round,
        "best": checkpoint.best,
        "metrics": {
            name: value if math.isfinite(value) else None
            for name, value in checkpoint.metrics.items()
        },
    }


def _checkpoint_told(checkpoint: Checkpoint) -> str:
    rounds = counted(checkpoint.round, "round")
    best = ", the best until then" if checkpoint.best else ""
    metrics = [
        f"{name_shown(name)} {value:.6g}"
        for name, value in islice(checkpoint.metrics.items(), _MOST_METRICS)
    ]
    if len(checkpoint.metrics) > _MOST_METRICS:
        metrics.append(f"and {len(checkpoint.metrics) - _MOST_METRICS:,} more")
    return f"the model of a checkpoint after {rounds}{best}; {', '.join(metrics) or 'no metrics'}"


def _shape(spec: ArraySpec) -> str:
    return " x ".join(map(str, spec.shape)) or "scalar"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _compare(read: argparse.Namespace) -> int:
    with opened(read.a, read.b) as files, byte_progress("comparing") as progress:
        a, b = map(spec_of, files)
        odd = {
            key: f"only in {'A' if key in a else 'B'}"
            if (key in a) != (key in b)
            else f"{a[key]} in A, {b[key]} in B"
            for key in [*a, *(key for key in b if key not in a)]
            if a.get(key) != b.get(key)
        }
        sizes = {key: math.prod(a[key].shape) for key in a if key not in odd}
        found = {key: KeyDifference(0, 0) for key in sizes}
        for key, (of_a, of_b) in pieces(files, sizes, progress):
            here, before = compare({key: of_a}, {key: of_b})[key], found[key]
            found[key] = KeyDifference(
                before.differing + here.differing,
                max(before.largest_ulps, here.largest_ulps),
                max(before.largest_difference, here.largest_difference),
                before.nan_in_one + here.nan_in_one,
            )
    same = not odd and not any(one.differing for one in found.values())
    if read.json:
        print_json(
            {
                "same": same,
                "arrays": {
                    key: {
                        "elements": sizes[key],
                        "differing": one.differing,
                        "largest_difference": one.largest_difference
                        if one.largest_difference < math.inf
                        else None,
                        "largest_ulps": one.largest_ulps,
                        "nan_in_one": one.nan_in_one,
                    }
                    for key, one in found.items()
                },
                "not_comparable": odd,
            }
        )
        return 0 if same else 1
    if found:
        print_table(
            ("key", "elements", "differing", "largest difference", "largest ulps", "NaN in one"),
            [
                (
                    name_shown(key),
                    f"{sizes[key]:,}",
                    f"{one.differing:,}",
                    _number(one.largest_difference),
                    f"{one.largest_ulps:,}",
                    f"{one.nan_in_one:,}",
                )
                for key, one in found.items()
            ],
        )
    for key, problem in odd.items():
        print_line(f"{name_shown(key)}: {problem}")
    nan = sum(one.nan_in_one for one in found.values())
    if nan:
        print_line(
            f"{nan:,} {'element is' if nan == 1 else 'elements are'} NaN in one model only, left "
            "out of the largest differences"
        )
    differing = len(odd) + sum(bool(one.differing) for one in found.values())
    print_line(
        "the same to the bit"
        if same
        else f"{differing:,} of {len(odd) + len(found):,} arrays differ"
    )
    return 0 if same else 1
