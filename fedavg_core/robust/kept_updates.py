"""Robust means that need all updates at hand, and the exact mean of what they choose.

`KeptUpdates` keeps a copy of every update until it is reset: its memory grows with their number.
Beside that, a mean takes that of the result and some tens of megabytes: the updates are compared
some elements at a time.

Why the order of the updates cannot show: rules choose by comparing values, which is exact; what
they compute on the way is computed in an order that does not depend on who came first; and the mean
of what was chosen is the exact one, rounded once (see `rounding`).

A rule of your own is a subclass of `CoordinateWise`, which says which of the sorted values of a
coordinate are averaged, or of `WholeVector`, which says what each update counts.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedavg_core.admission import check_base, check_finite, check_update, pairs
from fedavg_core.bad_element import base_not_finite, out_of_range
from fedavg_core.digest import digest, fingerprints
from fedavg_core.errors import Reason, RefusedUpdate, UsageError
from fedavg_core.exact.exact_sum import ExactSum, NonFiniteError
from fedavg_core.exact.rounding import quotient
from fedavg_core.model import ArraySpec, ModelSpec, Params, copy_params, flat, joined, new_in
from fedavg_core.robust.robust_mean import RobustMean, State
from fedavg_core.sums.blocks import Block, Buffers, Segment, fits_float32, load
from fedavg_core.weight import Weight, exact_weight, weight_from_text, weight_text

__all__ = ["CoordinateWise", "Kept", "KeptUpdates", "WholeVector", "of_the_sorted"]

Array: TypeAlias = npt.NDArray[Any]
Terms: TypeAlias = "tuple[Sequence[Array], Sequence[Weight], Weight]"
"""Arrays of one dimension, the weight of each, and the weight that their sum is divided by."""
Plan: TypeAlias = "Callable[[Sequence[Array]], Terms]"
"""Says what to average, given some elements of one parameter: an array of each update."""

_Kept = TypeVar("_Kept", bound="KeptUpdates")

_CELLS = 1 << 20  # numbers that are compared in one go: 8 MB of float64
_FEW = 256  # up to here a sorting network is faster than NumPy's selection


@dataclass(frozen=True, eq=False)
class Kept:
    """One update that is kept.

    Attributes:
        params: Copies of its arrays.
        weight: Its weight, exactly.
    """

    params: dict[str, Array]
    weight: Weight


@dataclass(frozen=True, eq=False)
class _Held:
    """All that changes: made longer, or replaced as a whole, in one step."""

    spec: dict[str, ArraySpec]
    updates: list[Kept] = field(default_factory=list)


class KeptUpdates(RobustMean):
    """A robust mean that needs all updates at hand: it keeps a copy of each until it is reset."""

    whole: ClassVar[bool] = False
    """Whether every update must have all parameters: those of the spec, else of the first one."""

    def __init__(self, spec: ModelSpec | None = None) -> None:
        super().__init__(spec)
        self._held = _Held(dict(spec or {}))

    @property
    def updates(self) -> Sequence[Kept]:
        """What is kept, in the order of arrival; to be read only."""
        return self._held.updates

    @property
    def count(self) -> int:
        """See `RobustMean.count`."""
        return len(self.updates)

    @property
    def keys(self) -> tuple[str, ...]:
        """See `RobustMean.keys`."""
        return tuple(key for key in self._held.spec if any(key in u.params for u in self.updates))

    @property
    def total_weight(self) -> Fraction:
        """See `RobustMean.total_weight`."""
        return sum((Fraction(update.weight) for update in self.updates), Fraction(0))

    @property
    def nbytes(self) -> int:
        """See `RobustMean.nbytes`."""
        return sum(array.nbytes for update in self.updates for array in update.params.values())

    def add_many(self, updates: Iterable[tuple[Params, float]]) -> None:
        """See `RobustMean.add_many`."""
        spec: dict[str, ArraySpec] = self._held.spec
        added: list[Kept] = []
        updates = pairs(updates)
        for number, (given, weight) in enumerate(updates):
            with RefusedUpdate.numbered(number, updates):
                exact = exact_weight(weight)
                params = check_update(given, spec, self._fixed)
                if self.whole and spec:
                    self._check_whole(params, spec)
                check_finite(params)
            new = new_in(params, spec)
            if new:
                spec = {**spec, **ModelSpec.of(new)}
            added.append(Kept(copy_params(params), exact))
        if spec is self._held.spec:
            self._held.updates.extend(added)
        else:
            self._held = _Held(spec, [*self._held.updates, *added])

    def _check_whole(self, params: Params, spec: Mapping[str, ArraySpec]) -> None:
        for key in spec:
            if key not in params:
                raise RefusedUpdate(
                    Reason.MISSING_KEYS,
                    key=key,
                    expected=f"all {len(spec)} parameters, for a {self.name}",
                    got=f"{len(params)}",
                )
        for key in params:
            if key not in spec:
                raise RefusedUpdate(
                    Reason.UNEXPECTED_KEYS,
                    key=key,
                    expected="parameters that the other updates have",
                    got="another",
                )

    def merge(self: _Kept, other: _Kept) -> None:
        """See `RobustMean.merge`."""
        self._check_alike(other)
        mine, brought = self._held, {key: other._held.spec[key] for key in other.keys}
        spec = joined(mine.spec, brought, self._fixed)
        if self.whole and mine.updates and brought and brought.keys() != mine.spec.keys():
            raise UsageError(f"expected updates of the same parameters to merge, for a {self.name}")
        self._held = _Held(spec, [*mine.updates, *other._held.updates])

    def mean(self, base: Params | None = None) -> dict[str, Array]:
        """See `RobustMean.mean`."""
        spec = self._held.spec
        if base is None:
            if not self.updates:
                raise UsageError("expected at least one update before the mean, got none")
            targets = {key: spec[key] for key in self.keys}
        else:
            targets = check_base(base, self.keys, spec)
        if self.updates and self.count < self.least:
            raise UsageError(
                f"expected at least {self.least} updates for a {self.name} of these settings, "
                f"got {self.count}"
            )
        brought = {key: targets[key] for key in self.keys}
        means = self._means(self._plan(), brought, base) if brought else {}
        left = {} if base is None else {key: base[key] for key in targets if key not in means}
        kept = copy_params(left)
        return {key: means[key] if key in means else kept[key] for key in targets}

    def digest(self) -> str:
        """See `RobustMean.digest`."""
        each = [f"{digest(fingerprints(u.params))} {weight_text(u.weight)}" for u in self.updates]
        return hashlib.sha256("\n".join(sorted(each)).encode("ascii")).hexdigest()

    def state(self) -> State:
        """See `RobustMean.state`."""
        entries = [
            {"weight": weight_text(update.weight), "keys": list(update.params)}
            for update in self.updates
        ]
        arrays = {
            f"{number}.{index}": array
            for number, update in enumerate(self.updates)
            for index, array in enumerate(update.params.values())
        }
        return {"accumulator": self.settings(), "updates": entries}, arrays

    def take_up(self, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """See `RobustMean.take_up`."""
        updates: list[tuple[Params, Any]] = []
        for number, entry in enumerate(meta["updates"]):
            params = {key: arrays[f"{number}.{i}"] for i, key in enumerate(entry["keys"])}
            updates.append((params, weight_from_text(entry["weight"])))
        self.add_many(updates)

    def reset(self) -> None:
        """See `RobustMean.reset`."""
        self._held = _Held(dict(self._given or {}))

    @abstractmethod
    def _plan(self) -> Plan:
        """What to average. Not to be kept here: the updates would refer to themselves."""

    def _means(
        self, plan: Plan, targets: Mapping[str, ArraySpec], base: Params | None = None
    ) -> dict[str, Array]:
        """The exact means of what a plan chooses, rounded once."""
        result = {}
        for key, target in targets.items():
            arrays = [update.params[key] for update in self.updates if key in update.params]
            mean = np.empty(target.shape, target.dtype)
            out = mean.reshape(-1)
            step = max(1, _CELLS // len(arrays))
            buffers = Buffers(min(step, out.size))
            for start in range(0, out.size, step):
                size = min(step, out.size - start)
                terms = plan([flat(array, start, size) for array in arrays])
                bottom = None if base is None else flat(base[key], start, size)
                part = out[start : start + size]
                try:
                    beyond = _write_mean(terms, bottom, target, buffers, part)
                except NonFiniteError:
                    assert base is not None  # what is kept is finite
                    raise base_not_finite(base, {key}) from None
                if beyond >= 0:
                    raise out_of_range(key, target, start + beyond)
            result[key] = mean
        return result


class CoordinateWise(KeptUpdates):
    """A mean, coordinate by coordinate, of those values that a rule takes from the sorted ones.

    Weights do not count. A coordinate's values are those of the updates that brought it.
    """

    ignores_weights = True

    @abstractmethod
    def rows(self, count: int) -> slice:
        """Which values are averaged.

        Args:
            count: How many there are.

        Returns:
            A slice of the sorted values, with at least one, without a step.
        """

    def _plan(self) -> Plan:
        return of_the_sorted(self.rows)


class WholeVector(KeptUpdates):
    """A mean of whole updates, each with a weight that a rule gives it.

    Every update must have all parameters: those of the spec or, without one, of the first update.
    """

    whole = True
    _weighed: tuple[_Held, int, Sequence[Weight]] | None = None

    def reset(self) -> None:
        """See `RobustMean.reset`."""
        super().reset()
        self._weighed = None

    @abstractmethod
    def weights(self) -> Sequence[Weight]:
        """What each of `updates` counts; at least one update more than 0.

        Returns:
            For each update, in their order, 0 or a positive number whose denominator is a power of
            two. What an update gets must not depend on where it stands.
        """

    def _plan(self) -> Plan:
        # A second mean of the same updates, as after an error, weighs them no second time.
        if self._weighed is None or self._weighed[:2] != (self._held, self.count):
            self._weighed = self._held, self.count, self.weights()
        return _of_all(self._weighed[2])


def of_the_sorted(rows: Callable[[int], slice]) -> Plan:
    """A plan: of each coordinate some of the sorted values.

    Args:
        rows: Which, see `CoordinateWise.rows`.

    Returns:
        The plan.
    """

    def plan(chunks: Sequence[Array]) -> Terms:
        chosen = rows(len(chunks))
        stack = _sortable(chunks)
        if stack.dtype.kind == "f" and len(stack) <= _FEW:
            values = _sorted(stack)[chosen]
            return values, [1] * len(values), len(values)
        stack.partition([chosen.start, chosen.stop - 1], axis=0)
        stack = stack[chosen]
        parts = [*stack.real, *stack.imag] if stack.dtype.kind == "c" else list(stack)
        return parts, [1] * len(parts), len(stack)

    return plan


def _of_all(weights: Sequence[Weight]) -> Plan:
    """A plan: all updates, with these weights instead of those that they came with."""
    chosen = [index for index, weight in enumerate(weights) if weight]
    counted = [weights[index] for index in chosen]
    total = sum(counted)
    return lambda chunks: ([chunks[index] for index in chosen], counted, total)


def _sortable(chunks: Sequence[Array]) -> Array:
    """Arrays as the rows of one, whose dtype holds each value exactly and in order.

    Integers of 64 bits are complex numbers there, which sort by real part and then by imaginary
    part: the nearest float64, and what is left.
    """
    if any(_is_long(chunk) for chunk in chunks):
        pairs = np.zeros((len(chunks), chunks[0].size), np.complex128)
        for row, chunk in zip(pairs, chunks, strict=True):
            if _is_long(chunk):
                low = chunk & 0xFFF
                high = (chunk - low).astype(np.float64)
                row.real = high + low
                row.imag = low - (row.real - high)
            else:
                row.real = chunk
        return pairs
    narrow = all(fits_float32(chunk.dtype) for chunk in chunks)
    stack: Array = np.empty((len(chunks), chunks[0].size), np.float32 if narrow else np.float64)
    for row, chunk in zip(stack, chunks, strict=True):
        row[:] = chunk
    return stack


def _sorted(stack: Array) -> list[Array]:
    """The values of each column in order, by a sorting network whose wires are the rows.

    Args:
        stack: The rows; overwritten.

    Returns:
        One array for each place in the order.
    """
    rows, spare = list(stack), np.empty_like(stack[0])
    for i, j in _network(len(rows)):
        np.minimum(rows[i], rows[j], out=spare)
        np.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


@functools.cache
def _network(size: int) -> list[tuple[int, int]]:
    """The comparisons of merge exchange (Batcher, 1968; Knuth, 1998, algorithm 5.2.2M)."""
    largest = 1 << max(0, (size - 1).bit_length() - 1)
    comparisons = []
    p = largest
    while p:
        q, r, distance = largest, 0, p
        while distance:
            comparisons += [(i, i + distance) for i in range(size - distance) if i & p == r]
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    return comparisons


def _is_long(chunk: Array) -> bool:
    return chunk.dtype.kind in "iu" and chunk.dtype.itemsize == 8


def _write_mean(
    terms: Terms, base: Array | None, target: ArraySpec, buffers: Buffers, out: Array
) -> int:
    """Write a base plus an exact mean, rounded once; the first beyond the dtype, or -1."""
    rows, weights, total = terms
    block = Block((Segment("", 0, out.size, 0),), out.size)
    exact = ExactSum(out.size)
    bottom = [] if base is None else [(base, total)]
    for row, weight in [*zip(rows, weights, strict=True), *bottom]:
        for values, exponent in load(block, {"": row}, ("",), buffers):
            exact.add(values, weight * (1 << exponent), buffers.scratch)
    return quotient(exact, total, target.number, buffers.scratch, out)
