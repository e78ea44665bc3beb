"""The commands that make a model file out of others: ``aggregate``, ``diff`` and ``apply``.

None of them holds a model in memory. The output is written beside its final name and put in place
when it is whole, so that an error or an interruption leaves what was there. Without ``--force`` a
file that another program has put there meanwhile is left as it is as well (see
`atomic_file.replacing`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedavg_core.atomic_file import replacing
from fedavg_core.bad_element import shown_place
from fedavg_core.cli.arguments import MODEL_HELP, Subparsers, byte_count, check_new, weights
from fedavg_core.cli.console import byte_progress, print_line
from fedavg_core.cli.model_stream import opened, pieces, spec_of
from fedavg_core.errors import Reason, RefusedUpdate, UsageError, counted, quoted
from fedavg_core.model import ModelSpec
from fedavg_core.out_of_core.aggregation import aggregate_files
from fedavg_core.out_of_core.model_writer import check_suffix, write_order, writer
from fedavg_core.transfer import diff, diff_spec

__all__ = ["add_commands"]

_LIMIT = "256MiB"


def add_commands(commands: Subparsers) -> None:
    """Tell a parser about these commands."""
    parser = commands.add_parser(
        "aggregate",
        help="average model files: their exact weighted mean",
        description="Write the weighted mean of model files: the exact mean, rounded once, so that "
        "their order does not matter; only where they differ in dtype, the mean has that of the "
        "base, or else of the first. They may be of different formats, and together or each larger "
        "than memory. All must have the same arrays, unless --partial is given; those that only "
        "the base has are copied from it.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=MODEL_HELP)
    parser.add_argument(
        "--weights",
        type=weights,
        metavar="W,W,...",
        help="how much each file counts, such as its number of samples: numbers above 0, in the "
        "order of the files (default: all alike)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="take the files as differences from this model, and write it plus their mean",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="average each array over the files that have it, though others lack it",
    )
    _add_limit(parser)
    _add_output(parser)
    parser.set_defaults(run=_aggregate)

    parser = commands.add_parser(
        "diff",
        help="subtract a model from another",
        description="Write MODEL minus BASE, each element rounded once to its dtype (integers: "
        "exact, as int64). fedavg apply BASE OUT adds it again; since the difference is rounded, "
        "what comes out may differ from MODEL in the last places. Both must be finite.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help=f"such as the model after training: {MODEL_HELP}"
    )
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="what to subtract, such as the model before it"
    )
    _add_output(parser)
    parser.set_defaults(run=_diff)

    parser = commands.add_parser(
        "apply",
        help="add a difference to a model",
        description="Write BASE plus DIFF in the dtypes of BASE, each element rounded once. Arrays "
        "that DIFF lacks are copied.",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help=MODEL_HELP)
    parser.add_argument(
        "diff", type=Path, metavar="DIFF", help="what to add to it, such as what fedavg diff wrote"
    )
    _add_limit(parser)
    _add_output(parser)
    parser.set_defaults(run=_apply)


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        default=_LIMIT,
        metavar="SIZE",
        help="the most memory to work with, such as 512MiB or 2GB, beside what Python takes "
        "anyway (default: %(default)s)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="where to write it, as its suffix says: .npz or .safetensors",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if it exists (without this, not even one that comes to be meanwhile)",
    )


def _aggregate(read: argparse.Namespace) -> int:
    count = len(read.files)
    given = [1] * count if read.weights is None else read.weights
    if len(given) != count:
        raise UsageError(f"--weights: expected {count}, one for each file, got {len(given)}")
    check_suffix(read.output)
    check_new(read.output, read.force)
    try:
        with byte_progress("averaging") as progress:
            spec = aggregate_files(
                read.files,
                given,
                read.output,
                base=read.base,
                allow_missing=read.partial,
                replace=read.force,
                memory_limit=read.memory_limit,
                progress=progress,
            )
    except RefusedUpdate as refusal:
        # Without a key it is a file that has none at all, which --partial does not help.
        if refusal.reason is not Reason.MISSING_KEYS or refusal.key is None:
            raise
        raise UsageError(
            f"{refusal}; --partial averages each array over the files that have it"
        ) from None
    _written(read.output, spec, f"the mean of {counted(count, 'file')}")
    return 0


def _apply(read: argparse.Namespace) -> int:
    check_new(read.output, read.force)
    with byte_progress("adding") as progress:
        spec = aggregate_files(
            [read.diff],
            [1],
            read.output,
            base=read.base,
            replace=read.force,
            memory_limit=read.memory_limit,
            progress=progress,
        )
    _written(read.output, spec, "the base and its difference")
    return 0


def _diff(read: argparse.Namespace) -> int:
    check_suffix(read.output)
    check_new(read.output, read.force)
    with opened(read.model, read.base, scratch=read.output.parent) as files:
        try:
            difference = diff_spec(*map(spec_of, files))
        except UsageError as error:
            raise UsageError(f"{read.model} less {read.base}: {error}") from None
        spec = write_order(read.output, difference)
        if not spec:
            raise UsageError(f"{read.model}: expected at least one parameter, got none")
        sizes = {key: math.prod(array.shape) for key, array in spec.items()}
        with (
            byte_progress("subtracting") as progress,
            replacing(read.output, old=read.force) as file,
            writer(read.output, file, spec) as out,
        ):
            before = dict.fromkeys(spec, 0)
            for key, (model, base) in pieces(files, sizes, progress):
                for path, values in ((read.model, model), (read.base, base)):
                    _check_finite(path, key, values, spec[key].shape, before[key])
                out.write(diff({key: model}, {key: base})[key])
                before[key] += model.size
    _written(read.output, spec, "the difference")
    return 0


def _check_finite(
    path: Path, key: str, values: npt.NDArray[Any], shape: tuple[int, ...], before: int
) -> None:
    """See that a piece of an array is finite; before it are so many elements of the array."""
    finite = np.isfinite(values)
    if not finite.all():
        index = int(np.argmin(finite))
        raise UsageError(
            f"{path}: key {quoted(key)}: expected finite numbers, "
            f"got {float(values[index])} at {shown_place(shape, before + index)}"
        )


def _written(path: Path, spec: ModelSpec, what: str) -> None:
    elements = sum(math.prod(array.shape) for array in spec.values())
    arrays = counted(len(spec), "array")
    print_line(f"{path}: {what}, {arrays} of {elements:,} elements")
