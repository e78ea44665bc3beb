"""The weighted mean of models, one update at a time.

A `WeightedMean` takes any number of updates and keeps, for each parameter, the weighted sum of what
was sent and the sum of the weights of those that sent it. The mean is their quotient (McMahan,
Moore, Ramage, Hampson and Agüera y Arcas, 2017, algorithm 1). Memory is that of a few models,
however many updates there are.

Two kinds of arithmetic:

* ``"exact"``, the default. The sum is exact (see `exact`), and the quotient is rounded once (see
  `rounding`). So the bits of the mean depend on nothing but the set of updates: not on their order,
  nor on how they were spread over accumulators that were merged, nor on the size of the blocks.
* ``"float64"`` and ``"float32"``. The sum is rounded at each addition, as other systems do it; the
  last bits depend on the order.

An update is added whole or not at all, whatever goes wrong on the way. The exact sums find a NaN in
the pass that adds, and undo what they had added before it by adding the same with the opposite
weight; that is exact, so nothing remains. The plain sums look for NaNs first, and finish what is
interrupted (`count` tells). Only if the undoing or finishing is itself interrupted are the sums
unusable until they are reset, and say so.

Parameters may be missing from an update; each has its own denominator.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from fedavg_core.admission import base_spec, check_base, check_update, pairs
from fedavg_core.arguments import listed, one_for_each, whole_number
from fedavg_core.errors import RefusedUpdate, UsageError, a_type, quoted
from fedavg_core.model import ModelSpec, Params, copy_params, new_in
from fedavg_core.plain import plain_text
from fedavg_core.sums.books import Books, Term
from fedavg_core.sums.exact_sums import ExactSums
from fedavg_core.sums.plain_sums import PlainSums
from fedavg_core.sums.sums import Sums
from fedavg_core.weight import exact_weight, weight_text

__all__ = ["Accumulator", "WeightedMean", "weighted_mean"]

Array: TypeAlias = npt.NDArray[Any]
Accumulator: TypeAlias = Literal["exact", "float64", "float32"]
State: TypeAlias = "tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]"

_BLOCK = 1 << 20  # larger ones leave the cache, with smaller ones threads wait for each other
_STATE_FORMAT = 1


class WeightedMean:
    """Accumulates weighted updates; see the module's text for what it guarantees.

    Not safe for use from several threads at once: the caller has the lock. Where the sums have
    become unusable, as told there, every method that needs them raises a UsageError until `reset`.

    Args:
        spec: The parameters, their shapes and the dtypes that the mean shall have. If None, the
            first update that brings a parameter decides.
        accumulator: ``"exact"``, ``"float64"`` or ``"float32"``.
        block: The number of elements handled in one go. It never changes the mean's bits.
        threads: The most threads to use, for large models. They never change the mean's bits.
            None: as many as there are processors, up to 4.

    Raises:
        UsageError: There is no such accumulator, the spec is none, or the block or the threads are
            no whole number of at least 1.
    """

    def __init__(
        self,
        spec: ModelSpec | None = None,
        *,
        accumulator: Accumulator = "exact",
        block: int = _BLOCK,
        threads: int | None = None,
    ) -> None:
        kind = plain_text(accumulator)
        if kind not in get_args(Accumulator):
            raise UsageError(
                "expected accumulator 'exact', 'float64' or 'float32' (or, in a round, a robust "
                f"mean, such as TrimmedMean()), got {quoted(accumulator)}"
            )
        block = whole_number("block", block, 1)
        if spec is not None and not isinstance(spec, ModelSpec):
            raise UsageError(
                f"expected a ModelSpec (ModelSpec.of(model) makes one), got {a_type(spec)}"
            )
        threads = min(4, _processors()) if threads is None else whole_number("threads", threads, 1)
        self._accumulator = cast(Accumulator, kind)
        self._fixed = spec is not None
        self._books = Books(dict(spec or {}), {})
        self._broken = False
        self._sums: Sums[Any] = (
            ExactSums(block, threads)
            if kind == "exact"
            else PlainSums(np.dtype(kind), block, threads)
        )
        if spec is not None:
            self._sums.grow(spec)

    @property
    def accumulator(self) -> Accumulator:
        """The kind of arithmetic."""
        return self._accumulator

    @property
    def determinism(self) -> str:
        """``"order-independent"`` or ``"order-dependent"``: what the mean's last bits depend on."""
        return "order-independent" if self._accumulator == "exact" else "order-dependent"

    @property
    def count(self) -> int:
        """How many updates are in the sum."""
        return self._books.count

    @property
    def total_weight(self) -> Fraction:
        """The exact sum of the weights of all updates."""
        return Fraction(self._books.total)

    @property
    def keys(self) -> tuple[str, ...]:
        """The parameters that some update has brought."""
        return self._books.keys

    def weight_of(self, key: str) -> Fraction:
        """The exact sum of the weights of those updates that brought a parameter.

        Args:
            key: The parameter.

        Returns:
            Its denominator; 0 if no update brought it.
        """
        return Fraction(self._books.weights.get(key, 0))

    def __copy__(self) -> WeightedMean:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def add(self, params: Params, weight: float) -> None:
        """Add one update, whole or not at all; after an interruption `count` tells which.

        Args:
            params: The parameters, or some of them; only read, and not kept. Nobody may change
                them until this returns. Any dtype of real numbers will do: the mean has the dtype
                of the spec.
            weight: How much it counts: a finite number above zero, taken at its exact value.

        Raises:
            RefusedUpdate: The update is not fit to be added (BAD_NAME, BAD_WEIGHT, DTYPE,
                MISSING_KEYS, NON_FINITE, SHAPE, UNEXPECTED_KEYS); the state is unchanged.
        """
        self.add_many([(params, weight)])

    def add_many(self, updates: Iterable[tuple[Params, float]]) -> None:
        """Add several updates that are at hand together, all of them or none.

        Faster than adding one after the other, as the sums are read and written once for all. The
        result is the same, to the bit. Rounded sums take memory for a second sum then, and keep it.

        Args:
            updates: Pairs of params and weight, as for `add`.

        Raises:
            RefusedUpdate: One of them is not fit to be added, see `add`; the state is unchanged.
                Of several, the contributor is ``updates[number]``.
            UsageError: They are no pairs.
        """
        self._apply(self._admitted(updates), 1)

    def _admitted(self, updates: Iterable[tuple[Params, float]]) -> Sequence[Term]:
        """Updates as plain arrays and exact weights; refuses what can be refused unread."""
        updates = pairs(updates)
        terms = []
        known = dict(self._books.spec)
        for number, (given, weight) in enumerate(updates):
            with RefusedUpdate.numbered(number, updates):
                exact = exact_weight(weight)
                params = check_update(given, known, self._fixed)
                known.update(ModelSpec.of(new_in(params, known)))
            terms.append((params, exact))
        return terms

    def remove(self, params: Params, weight: float) -> None:
        """Undo one `add` exactly: sums, weights and count are then as if it had never been.

        Names, shapes and dtypes that it was the first to bring stay known, as after a `reset`.

        Args:
            params: What was added; only read.
            weight: The weight it was added with.

        Raises:
            RefusedUpdate: This cannot have been added; the state is unchanged.
            UsageError: The sums are not exact, or their weights tell that they do not contain this
                update, or its values do so where no other has brought a parameter; the state is
                unchanged. Another update that was not added is not noticed.
        """
        sums = self._exact_sums("remove")
        exact = exact_weight(weight)
        params = check_update(params, self._books.spec, self._fixed)
        emptied = self._books.emptied_by(params, exact, weight)

        def check() -> None:
            for key in emptied:
                if not sums.is_zero(key):
                    raise UsageError(f"key {quoted(key)}: cannot remove values that were not added")

        self._apply([(params, exact)], -1, check)

    def merge(self, other: WeightedMean) -> None:
        """Add all that another accumulator holds. For exact sums, in any order and grouping.

        Args:
            other: An accumulator of the same kind; only read.

        Raises:
            UsageError: It is of another kind, or holds a parameter of another shape or dtype, or
                one that this one's spec does not name; the state is unchanged.
        """
        if not isinstance(other, WeightedMean):
            raise UsageError(f"expected an accumulator to merge, got {quoted(other)}")
        if self._accumulator != other._accumulator:
            raise UsageError(
                f"expected an accumulator of kind {self._accumulator!r} to merge, "
                f"got one of kind {other._accumulator!r}"
            )
        other._check_whole()
        books = self._books.merged_with(other._books, self._fixed)
        if other is self:
            other = copy.deepcopy(self)
        keys = frozenset(other.keys)
        self._change(
            books,
            partial(self._sums.merge, other._sums, keys),
            partial(self._sums.recover_merge, other._sums, keys),
        )

    def mean(self, base: Params | None = None) -> dict[str, Array]:
        """The weighted mean; the state is unchanged.

        Args:
            base: If given, what was added were differences from it, and the result is
                ``base + mean``, rounded once. Only read.

        Returns:
            Arrays that nobody else has; those below 4 MiB lie side by side in one piece of memory.
            Their memory is new, or that of one of the last two means in which nobody has an array
            any more (a bare address does not count). With a base its keys, in its order and dtypes,
            those that no update brought copied; without one the keys that some update brought.
            Correctly rounded, to nearest even, from exact sums. An exact zero is +0.0.

        Raises:
            OutOfRange: A result is beyond the largest number of its dtype.
            UsageError: Nothing was added and there is no base; or the base is no model, lacks a
                parameter, has it in another shape, or is not finite.
        """
        self._check_whole()
        if base is None:
            if not self.keys:
                raise UsageError("expected at least one update before the mean, got none")
            targets = {key: self._books.spec[key] for key in self.keys}
            return self._sums.means(targets, self._books.weights, None)
        targets = check_base(base, self.keys, self._books.spec)
        base = {key: np.asarray(base[key]) for key in targets}
        brought = {key: targets[key] for key in targets if self._books.weights.get(key)}
        means = self._sums.means(brought, self._books.weights, base)
        kept = copy_params({key: base[key] for key in targets if key not in means})
        return {key: means[key] if key in means else kept[key] for key in targets}

    def reset(self) -> None:
        """Forget every update; the memory is kept, and with it the parameters' names and shapes."""
        self._broken = True
        self._sums.shrink(self._books.spec)  # what a change that was interrupted has left
        self._sums.reset()
        self._books = Books(self._books.spec, {})
        self._broken = False

    def digest(self) -> str:
        """A fingerprint of the exact value: the sums and their weights.

        Returns:
            64 hexadecimal digits. Equal for equal values, however they came about: order, merges,
            removals, block size and platform do not show.

        Raises:
            UsageError: The sums are not exact.
        """
        sums = self._exact_sums("digest")
        self._check_whole()
        sha = hashlib.sha256(b"fedavg_core sums, format 1")
        for key in sorted(self.keys):
            spec = self._books.spec[key]
            head = [key, list(spec.shape), spec.dtype.name, weight_text(self._books.weights[key])]
            sha.update(ascii(head).encode("ascii"))
            for k, digits in sums.parts(key):
                sha.update(f"[{k}]".encode())
                sha.update(digits.tobytes())
        return sha.hexdigest()

    def state(self) -> State:
        """All that this holds, fit to be stored or sent to another accumulator.

        Returns:
            A dictionary that JSON can hold, and arrays of float32, float64, int8 or int32; new
            memory. For exact sums equal values give equal states.
        """
        self._check_whole()
        meta = {
            "format": _STATE_FORMAT,
            "accumulator": self._accumulator,
            **self._books.to_json(),
        }
        arrays: dict[str, Array] = {}
        for number, entry in enumerate(meta["keys"]):
            parts = dict(self._sums.parts(entry["name"]))
            entry["arrays"] = list(parts)
            arrays.update({f"{number}.{k}": part for k, part in parts.items()})
        return meta, arrays

    @classmethod
    def from_state(
        cls, meta: Mapping[str, Any], arrays: Mapping[str, Array], spec: ModelSpec | None = None
    ) -> WeightedMean:
        """An accumulator that goes on from a state.

        Args:
            meta: The dictionary that `state` gave.
            arrays: The arrays that it gave; copied.
            spec: As for a new accumulator.

        Returns:
            A new accumulator, which holds the same value.

        Raises:
            UsageError: This is no such state, or one of a format that is not known.
        """
        try:
            if meta["format"] != _STATE_FORMAT:
                raise UsageError(
                    f"expected a state of format {_STATE_FORMAT}, got {quoted(meta['format'])}"
                )
            result = cls(spec, accumulator=meta["accumulator"])
            entries = list(meta["keys"])
            found = Books.from_json({**meta, "keys": entries})
            books = result._books.merged_with(found, result._fixed)
            stored = {}
            for number, entry in enumerate(entries):
                key = entry["name"]
                parts = {k: np.asarray(arrays[f"{number}.{k}"]) for k in entry["arrays"]}
                size = math.prod(books.spec[key].shape)
                if not parts or any(part.size != size for part in parts.values()):
                    raise ValueError(f"sums that are not of an array of shape {entry['shape']}")
                stored[key] = parts
            if spec is None:
                result._sums.grow(books.spec)
            for key, parts in stored.items():
                result._sums.restore(key, parts, books.weights[key])
            result._books = books
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"expected the state of an accumulator, got {quoted(error)}") from None
        return result

    def _exact_sums(self, what: str) -> ExactSums:
        if not isinstance(self._sums, ExactSums):
            raise UsageError(
                f"{what} needs exact sums, and this accumulator has {self._accumulator}"
            )
        return self._sums

    def _apply(
        self,
        terms: Sequence[Term],
        sign: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Add checked terms, or take them away; unless it raises, a check of the sums ends it."""
        signed = [(params, sign * weight) for params, weight in terms]

        def do() -> None:
            self._sums.add(signed)
            check()

        self._change(self._books.after(terms, sign), do, partial(self._sums.recover, signed))

    def _change(
        self, books: Books, do: Callable[[], None], recover: Callable[[list[int]], bool]
    ) -> None:
        """Change the sums and the books together, or neither, whatever error comes between."""
        self._check_whole()
        mark = self._sums.mark()
        with np.errstate(all="ignore"):
            try:
                self._sums.grow(new_in(books.spec, self._books.spec))
                do()
                self._books = books
            except BaseException:
                if self._books is not books:  # pragma: no branch  (else it came after the change)
                    self._broken = True
                    if recover(mark):
                        self._books = books
                    else:
                        self._sums.shrink(self._books.spec)
                    self._broken = not self._sums.are_whole
                raise

    def _check_whole(self) -> None:
        if self._broken:
            raise UsageError(
                "expected a whole sum, got one that was interrupted while it was changed, "
                "and could not be had back: reset the accumulator"
            )


def weighted_mean(
    models: Iterable[Params],
    weights: Sequence[float],
    *,
    base: Params | None = None,
    accumulator: Accumulator = "exact",
) -> dict[str, Array]:
    """The weighted mean of models that are at hand.

    Args:
        models: The models (or differences, with a base); only read.
        weights: As many weights.
        base: See `WeightedMean.mean`.
        accumulator: See `WeightedMean`.

    Returns:
        The mean, as new arrays; see `WeightedMean.mean`.

    Raises:
        UsageError: They are no lists, there are not as many weights as models, or none of either;
            or the base, see `WeightedMean.mean`.
        RefusedUpdate: A model is not fit to be averaged; the contributor is ``models[number]``.
        OutOfRange: See `WeightedMean.mean`.
    """
    given = listed("models", models, "a list of them")
    weights = one_for_each("weights", weights, len(given), "model")
    result = WeightedMean(None if base is None else base_spec(base), accumulator=accumulator)
    try:
        result.add_many(zip(given, weights, strict=True))
    except RefusedUpdate as refusal:
        name = refusal.contributor or "updates[0]"
        raise refusal.placed(contributor=name.replace("updates", "models")) from None
    return result.mean(base)


def _processors() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
