"""The weighted mean of models in files, in memory that is bounded.

No accumulator of the size of a model is kept, in memory or on disk. The model is worked through in
passes. A pass takes as many blocks of elements as there is memory for exact sums of them, visits
each file in turn, reads those elements of it and adds them, and then divides, rounds, and writes
that part of the result. So the elements of each file are read once, in long runs (and before that
where a file has a checksum of its own, which is compared first); one file is open at a time,
however many there are; and memory depends on neither their size nor their number. Since the sums
are exact, how the passes are cut leaves no trace in the result: it has the bits of `weighted_mean`
over the same models in memory.

How much memory an exact sum takes depends on the values: a limb for each 24 bits between the
largest and the smallest. A pass is cut for the most that the dtypes and the weights could ask for
(some 110 bytes an element for float32 with whole weights), so the bound holds whatever the files
hold. What is planned for, out of the limit:

* half: the exact sums of a pass, and the elements of one file that are read for it;
* a quarter: the buffers of one block, and what dividing and rounding it takes;
* an eighth: the state of zlib for deflated members that continue in the next pass (where it ends,
  they are unpacked to a scratch file, see `model_file`);
* a sixteenth: where in the files the arrays lie (where it ends, a scratch file holds it);
* the rest: what the interpreter takes for itself.

The names and shapes of the parameters come off before that. Of a file that has more of them than
the limit has room for, no more is read than how long that part is.

The result is written as it comes, into a temporary file that replaces the output at the end. Until
then an error of any kind leaves the output as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.arguments import PathLike, file_path, listed, one_for_each, truth, whole_number
from fedavg_core.atomic_file import replacing
from fedavg_core.bad_element import out_of_range, shown_place
from fedavg_core.errors import Reason, RefusedUpdate, UsageError, counted, quoted, shown_path
from fedavg_core.model import ArraySpec, ModelSpec
from fedavg_core.out_of_core.allowance import Allowance
from fedavg_core.out_of_core.model_file import ModelFile
from fedavg_core.out_of_core.model_writer import check_suffix, write_order, writer
from fedavg_core.out_of_core.passes import BeyondRange, Kind, NotFinite, Pass, cut, sum_bytes
from fedavg_core.out_of_core.stored_array import INFLATER_BYTES
from fedavg_core.sums.blocks import Buffers
from fedavg_core.weight import Weight, dyadic, exact_weight

__all__ = ["aggregate_files"]

Array: TypeAlias = npt.NDArray[Any]
_Progress: TypeAlias = "Callable[[int, int], None]"

_PASS_SHARE = 2
_BLOCK_SHARE = 4
_INFLATER_SHARE = 8
_PLACES_SHARE = 16
_HEADER_SHARE = 64  # parsed JSON takes less than this many times its length: `{"":` takes 45
_MEMBER_BYTES = 2048  # what `zipfile` takes for one with a long name
_SHORT_HEADER, _FEW_MEMBERS = 1 << 17, 1 << 12  # which are read whatever the limit, to tell of it
_LARGEST_BLOCK = 1 << 16
_SMALLEST_BLOCK = 1 << 8
_PARAMETER_BYTES = 4096
_FILE_BYTES = 1024


@dataclass
class _Parameter:
    """What is known about one parameter when all files have been looked at.

    Attributes:
        spec: Its shape, and the dtype of the result.
        weight: The sum of the weights of the files that have it.
        files: How many files have it, the base not counted.
        dtypes: The dtypes that it has in files, the base among them.
    """

    spec: ArraySpec
    weight: Weight = 0
    files: int = 0
    dtypes: set[np.dtype[Any]] = field(default_factory=set)


def aggregate_files(
    paths: Sequence[PathLike],
    weights: Sequence[float],
    output: PathLike,
    *,
    base: PathLike | None = None,
    allow_missing: bool = True,
    replace: bool = True,
    memory_limit: int = 256 * 2**20,
    scratch: PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelSpec:
    """The weighted mean of models in files, exactly as `weighted_mean` gives it.

    The files may be larger than memory, many, and of several formats: npz (compressed or not),
    safetensors, and npy (one array, which is called ``arr_0``). A checkpoint counts as the model in
    it. A parameter that some files lack has its own denominator. A file that is given twice counts
    twice.

    Args:
        paths: The files; only read. They must not change meanwhile.
        weights: As many weights: finite numbers above zero, taken at their exact values.
        output: The file for the result: npz or safetensors, as its suffix says. It comes to be at
            the end, in one commit. A symbolic link of that name is replaced, not followed.
        base: The file of a model that the others are differences from. The result is then the base
            plus their mean, rounded once, with the base's parameters and dtypes; those that no file
            has are copied. Without it a parameter has the dtype of the first file that has it.
        allow_missing: Whether a file may lack a parameter that another one has.
        replace: Whether the output may replace a file, which may be one of the inputs. If not, a
            file that is there, or comes to be meanwhile, stays as it is, and there is an error.
        memory_limit: The most bytes of memory to take, beyond those that the process has already.
            To find that less than 8 MiB are too few for the names in a file may take as much.
        scratch: A folder for files that serve as scratch, which some compressed inputs need (see
            `model_file`); by default that of the output. Nothing is left in it.
        progress: Called after each read with the bytes of arrays read so far and those in all.

    Returns:
        What was written: names, shapes and dtypes.

    Raises:
        UsageError: An argument is nothing of its kind; there are no files, or not as many weights;
            the output's suffix is another, or its format has no such dtype; the memory limit is no
            whole number of at least 1, or too small for the names and shapes; the base is not
            finite.
        RefusedUpdate: A model is not fit to be averaged, for the reasons of `WeightedMean.add`, or
            lacks a parameter that it may not lack (MISSING_KEYS). The contributor is the name of
            the file (its whole path where two have the same name).
        CheckpointError: A file is damaged, not there, or has changed, or the output could not be
            written, or may not be replaced.
        OutOfRange: A result is beyond the largest number of its dtype.
    """
    given = listed("paths", paths, "a list of files")
    if not given:
        raise UsageError("paths: expected a list of files, got an empty one")
    inputs = [file_path(f"paths[{number}]", path) for number, path in enumerate(given)]
    weights = one_for_each("weights", weights, len(inputs), "file")
    target = file_path("output", output)
    allow_missing, replace = truth("allow_missing", allow_missing), truth("replace", replace)
    if progress is not None and not callable(progress):
        raise UsageError(f"progress: expected a function or None, got {quoted(progress)}")
    check_suffix(target)
    memory_limit = whole_number("memory_limit", memory_limit, 1)
    allowance = Allowance(
        target.parent if scratch is None else file_path("scratch", scratch),
        inflaters=memory_limit // _INFLATER_SHARE // INFLATER_BYTES,
        places=memory_limit // _PLACES_SHARE,
        header=max(_SHORT_HEADER, memory_limit // _HEADER_SHARE),
        members=max(_FEW_MEMBERS, memory_limit // _MEMBER_BYTES),
    )
    with allowance:
        start = None if base is None else file_path("base", base)
        aggregation = _Aggregation(inputs, weights, start, allowance)
        if not allow_missing:
            aggregation.check_none_missing()
        return aggregation.write(target, replace, memory_limit, progress)


class _Aggregation:
    """The files, looked at, and what is to be made of them."""

    def __init__(
        self,
        paths: Sequence[Path],
        weights: Sequence[float],
        base: Path | None,
        allowance: Allowance,
    ) -> None:
        self._parameters: dict[str, _Parameter] = {}
        self._files: list[tuple[str, ModelFile, Weight]] = []
        self._bytes = self._done = 0
        self._base = None if base is None else self._open_base(base, allowance)
        names = Counter(path.name for path in paths)
        for path, given in zip(paths, weights, strict=True):
            name = path.name if names[path.name] == 1 else str(path)
            try:
                weight = exact_weight(given)
                file = ModelFile(path, allowance)
                self._take_in(file, weight)
            except RefusedUpdate as refusal:
                raise refusal.placed(contributor=name) from None
            self._files.append((name, file, weight))
        self._least = min(dyadic(weight)[1] for _, _, weight in self._files)

    def _open_base(self, path: Path, allowance: Allowance) -> ModelFile:
        try:
            file = ModelFile(path, allowance)
        except RefusedUpdate as refusal:
            raise UsageError(f"the base, {shown_path(path)}: {refusal}") from None
        for key, array in file.arrays().items():
            layout = array.layout
            self._parameters[key] = _Parameter(
                ArraySpec(layout.shape, layout.dtype), dtypes={layout.dtype}
            )
            self._bytes += layout.nbytes
        return file

    def _take_in(self, file: ModelFile, weight: Weight) -> None:
        """Refuse what can be refused without reading the values."""
        arrays = file.arrays()
        if not arrays:
            raise RefusedUpdate(Reason.MISSING_KEYS, expected="at least one parameter", got="none")
        for key, array in arrays.items():
            layout = array.layout
            if key not in self._parameters and self._base is not None:
                raise RefusedUpdate(
                    Reason.UNEXPECTED_KEYS,
                    key=key,
                    expected="parameters of the base",
                    got="another",
                )
            parameter = self._parameters.setdefault(
                key, _Parameter(ArraySpec(layout.shape, layout.dtype))
            )
            if layout.shape != parameter.spec.shape:
                raise RefusedUpdate(
                    Reason.SHAPE,
                    key=key,
                    expected=f"shape {parameter.spec.shape}",
                    got=f"{layout.shape}",
                )
            parameter.weight += weight
            parameter.files += 1
            parameter.dtypes.add(layout.dtype)
            self._bytes += layout.nbytes

    def check_none_missing(self) -> None:
        """Refuse a file that lacks what another one has."""
        count = len(self._files)
        for key, parameter in self._parameters.items():
            if 0 < parameter.files < count:
                lacking = (name for name, file, _ in self._files if key not in file.arrays())
                raise RefusedUpdate(
                    Reason.MISSING_KEYS,
                    contributor=next(lacking),
                    key=key,
                    expected=f"a parameter that is in {parameter.files} of {count} files",
                    got="none",
                )

    def write(
        self, target: Path, replace: bool, memory_limit: int, progress: _Progress | None
    ) -> ModelSpec:
        """Work through the model, and write the result."""
        found = {key: parameter.spec for key, parameter in self._parameters.items()}
        spec = write_order(target, ModelSpec(found))
        kinds = {key: self._kind(self._parameters[key]) for key in spec}
        per_element = max((kind.block_bytes for kind in kinds.values()), default=1)
        free = memory_limit - _PARAMETER_BYTES * len(spec) - _FILE_BYTES * len(self._files)
        lacking = _BLOCK_SHARE * _SMALLEST_BLOCK * per_element - free
        if lacking > 0:
            raise UsageError(
                f"memory_limit: expected at least {memory_limit + lacking} bytes for "
                f"{counted(len(spec), 'parameter')} in {counted(len(self._files), 'file')}, "
                f"got {memory_limit}"
            )
        capacity = min(_LARGEST_BLOCK, free // _BLOCK_SHARE // per_element)
        buffers = Buffers(capacity)
        with replacing(target, old=replace) as file, writer(target, file, spec) as out:
            for part in cut(spec, kinds, capacity, free // _PASS_SHARE):
                for values in self._results(part, buffers, progress):
                    out.write(values)
        return spec

    def _kind(self, parameter: _Parameter) -> Kind:
        weight, dtypes = parameter.weight, parameter.dtypes
        return Kind(
            weight,
            ArraySpec((), parameter.spec.dtype),
            sum_bytes(dtypes, weight, self._least) if weight else 0,
            max(dtype.itemsize for dtype in dtypes),
        )

    def _results(self, part: Pass, buffers: Buffers, progress: _Progress | None) -> Iterator[Array]:
        """Work through one pass."""
        for name, file, weight in self._files:
            values = self._read(file, part, progress)
            try:
                part.add(values, weight, buffers)
            except NotFinite as place:
                raise RefusedUpdate(
                    Reason.NON_FINITE,
                    contributor=name,
                    key=place.key,
                    expected="finite numbers",
                    got=self._shown(place, part, values),
                ) from None
        values = {} if self._base is None else self._read(self._base, part, progress)
        try:
            yield from part.means(values, buffers)
        except NotFinite as place:
            raise UsageError(
                f"key {quoted(place.key)}: expected a base of finite numbers, got "
                f"{self._shown(place, part, values)}"
            ) from None
        except BeyondRange as place:
            spec = self._parameters[place.key].spec
            raise out_of_range(place.key, spec, place.index) from None

    def _shown(self, place: NotFinite, part: Pass, values: Mapping[str, Array]) -> str:
        value = values[place.key][place.index - part.runs[place.key][0]]
        shape = self._parameters[place.key].spec.shape
        return f"{float(value)} at {shown_place(shape, place.index)}"

    def _read(self, file: ModelFile, part: Pass, progress: _Progress | None) -> dict[str, Array]:
        values = file.read(part.runs)
        self._done += sum(array.nbytes for array in values.values())
        if progress is not None:
            progress(self._done, self._bytes)
        return values
