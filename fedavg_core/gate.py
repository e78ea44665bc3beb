"""The gate: the one place that judges an update.

An update is taken whole or refused whole, and a refusal names one `Reason`. The gate looks at
everything about an update that can be known without its values being added up: who sent it, for
which round, of which transfer type, with what weight, under which keys, in which shapes and dtypes,
and, where a limit is set, how far it is from the model. Whether the values are finite is found
while they are added, since that pass reads them anyway; the accumulator then undoes what it had
added and refuses in the same words.

The checks run from the cheapest to the dearest, in this order, and the first that fails decides:
contributor, round, duplicate, transfer type, weight; then of one parameter after the other, as they
come, its name, its dtype and its shape; then whether any are missing; and the norm.

Nothing that a contributor sends makes the gate raise anything but `RefusedUpdate`. Keys, names and
objects of any kind are taken as they come: a mapping that fails while it is read is refused like
one that is no mapping. A string, number or array of a subclass counts as the plain one that it is,
whatever its own methods say: that is what is judged, and what is kept. What the sender wrote stands
in a message only in quotes, escaped and cut (`fedavg_core.errors.quoted`); it is never used as a
path.

Metrics do not decide about an update, so a metric that is no finite number is left out and named,
and the update is taken without it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fedavg_core.arguments import is_whole_number, truth
from fedavg_core.codec.archive import MOST_MEMBERS
from fedavg_core.codec.npy import fits
from fedavg_core.errors import Reason, RefusedUpdate, UsageError, quoted, type_name
from fedavg_core.model import ArraySpec, ModelSpec, Params, check_array
from fedavg_core.norm import norm_above
from fedavg_core.plain import plain_list, plain_number, plain_text
from fedavg_core.update import TransferType, Update, transfer_named

__all__ = ["Contribution", "Gate", "Limits", "is_name", "shown_name"]

_NAME_LENGTH = 256
_MOST_METRICS = 1_000
_MOST_PARAMETERS = MOST_MEMBERS // 3 - 1  # so that a checkpoint holds an optimizer's state as well
_LARGEST_WEIGHT = float(np.finfo(np.float64).max)


def is_name(value: object) -> bool:
    """Whether something can be the name of a contributor or of a metric.

    Args:
        value: Anything.

    Returns:
        True for a string of 1 to 256 printable characters (letters and signs of any script, and
        the space; no control characters, line ends or lone surrogates).
    """
    text = plain_text(value)
    return text is not None and 0 < len(text) <= _NAME_LENGTH and text.isprintable()


@dataclass(frozen=True)
class Limits:
    """What a round asks of an update, beyond its making sense.

    Attributes:
        roster: Who may contribute; None for anyone.
        allow_missing: Take an update that lacks some of the model's parameters.
        allow_unexpected: Take an update that has parameters which the model lacks; they are left
            out of the mean, for a model never gains or loses a parameter.
        max_norm: The largest global L2 norm of the difference from the model, over all averaged
            parameters together. Without a model yet, the difference from zero.
        max_weight: The largest weight.
        exclude: A regular expression (`re.search`) of the names of parameters that are not
            averaged: what an update says about them is not looked at.

    Raises:
        UsageError: A limit has no meaning.
    """

    roster: frozenset[str] | None = None
    allow_missing: bool = True
    allow_unexpected: bool = False
    max_norm: float | None = None
    max_weight: float | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if self.roster is not None:
            given: object = self.roster
            listed = None if isinstance(given, str) else plain_list(given)
            names = [None] if listed is None else [plain_text(name) for name in listed]
            if not all(map(is_name, names)):
                raise UsageError(
                    f"roster: expected a collection of contributors' names, got {quoted(given)}"
                )
            object.__setattr__(self, "roster", frozenset(names))
        for choice in ("allow_missing", "allow_unexpected"):
            object.__setattr__(self, choice, truth(choice, getattr(self, choice)))
        for limit in ("max_norm", "max_weight"):
            value: object = getattr(self, limit)
            if value is None:
                continue
            number = _finite(value)
            if number is None or not number > 0:
                raise UsageError(f"{limit}: expected a finite number above 0, got {quoted(value)}")
            object.__setattr__(self, limit, int(value) if is_whole_number(value) else number)
        if self.exclude is not None:
            try:
                re.compile(self.exclude)
                if not isinstance(self.exclude, str):
                    raise TypeError("it is no string")
                if not self.exclude:
                    raise TypeError("it is empty, and would exclude every parameter")
            except (re.error, TypeError) as error:
                raise UsageError(
                    f"exclude: expected a regular expression, got {quoted(self.exclude)} ({error})"
                ) from error

    def excludes(self, key: str) -> bool:
        """Whether a parameter of this name is kept out of the mean.

        Args:
            key: The parameter's name.

        Returns:
            True if it keeps the model's value whatever arrives.
        """
        return self.exclude is not None and re.search(self.exclude, key) is not None

    def averaged(self, spec: ModelSpec) -> ModelSpec:
        """The part of a model that is averaged.

        Args:
            spec: What the model looks like.

        Returns:
            The same without the excluded parameters.
        """
        return ModelSpec({key: one for key, one in spec.items() if not self.excludes(key)})

    def to_json(self) -> dict[str, Any]:
        """The limits as JSON can hold them; ``Limits(**...)`` makes them again.

        Returns:
            A dictionary of the fields, the roster sorted.
        """
        fields = dataclasses.asdict(self)
        fields["roster"] = None if self.roster is None else sorted(self.roster)
        return fields


@dataclass(frozen=True)
class Contribution:
    """An update that passed the gate, reduced to what counts.

    Attributes:
        contributor: Who sent it.
        transfer: What its arrays are.
        params: The arrays that are averaged; borrowed from the update.
        weight: Its weight as a Python number, exactly.
        metrics: Its metrics that are finite numbers.
        skipped_metrics: The names of its other metrics, escaped and cut, in order.
    """

    contributor: str
    transfer: TransferType
    params: dict[str, npt.NDArray[Any]]
    weight: int | float
    metrics: dict[str, float] = field(default_factory=dict)
    skipped_metrics: tuple[str, ...] = ()


class Gate:
    """Judges the updates of one round.

    Args:
        model: The model that the contributors were sent; borrowed. Empty if they bring the first.
        number: The round's number.
        limits: What is asked of an update.

    Attributes:
        spec: What the parameters of the model that are averaged look like.

    Raises:
        UsageError: The model is not a mapping of names to arrays of numbers.
    """

    def __init__(self, model: Params, number: int, limits: Limits) -> None:
        try:
            whole = ModelSpec.of(model)
        except RefusedUpdate as problem:
            raise UsageError(f"the model of round {number}: {problem}") from problem
        self._model = model
        self._number = number
        self._limits = limits
        self._whole = whole
        self._has_model = len(whole) > 0
        self.spec = limits.averaged(whole)

    def judge(
        self,
        update: Update,
        *,
        accepted: Container[str] = (),
        transfer: TransferType | None = None,
        keys: frozenset[str] | None = None,
    ) -> Contribution:
        """Say whether an update may be added.

        Args:
            update: What a contributor sent. Nothing about it is taken for granted.
            accepted: The contributors of whom this round has an update.
            transfer: The transfer type of the round; None if it is still open.
            keys: The parameters that an update must be made of while there is no model to say so;
                None for any.

        Returns:
            What is to be added. Its arrays are borrowed from the update, and may hold values that
            are not finite.

        Raises:
            RefusedUpdate: It may not, with contributor and round filled in.
        """
        try:
            contributor = self._contributor(update.contributor)
            self._check_round(update.round)
            if contributor in accepted:
                raise RefusedUpdate(
                    Reason.DUPLICATE, expected="one update per contributor", got="a second one"
                )
            kind = self._transfer(update.transfer, transfer)
            weight = self._weight(update.weight)
            params = self._params(update.params, keys)
            if self._limits.max_norm is not None:
                self._check_norm(params, kind, self._limits.max_norm)
        except RefusedUpdate as refusal:
            name = plain_text(update.contributor)
            raise refusal.placed(
                contributor=quoted(update.contributor) if name is None else name,
                round=self._number,
            ) from None
        metrics, skipped = _read_metrics(update.metrics)
        return Contribution(contributor, kind, params, weight, metrics, skipped)

    def _contributor(self, sent: object) -> str:
        name = plain_text(sent)
        if name is None or not is_name(name):
            raise RefusedUpdate(
                Reason.BAD_NAME,
                expected=f"a contributor's name of 1 to {_NAME_LENGTH} printable characters",
                got=_kind(sent) if name is None else f"a string of {len(name)}",
            )
        roster = self._limits.roster
        if roster is not None and name not in roster:
            raise RefusedUpdate(
                Reason.UNKNOWN_CONTRIBUTOR,
                expected=f"one of the {len(roster)} on the roster",
                got="another name",
            )
        return name

    def _check_round(self, sent: object) -> None:
        reason = Reason.STALE_ROUND
        number = plain_number(sent)
        if isinstance(number, int):
            if number == self._number:
                return
            if number > self._number:
                reason = Reason.FUTURE_ROUND
        raise RefusedUpdate(
            reason, expected=f"an update for round {self._number}", got=f"one for {quoted(sent)}"
        )

    def _transfer(self, sent: object, wanted: TransferType | None) -> TransferType:
        kind = transfer_named(sent)
        if kind is TransferType.DIFF and not self._has_model:
            expected = "FULL, for there is no model yet to differ from"
        elif kind is not None and wanted in (None, kind):
            return kind
        else:
            expected = "FULL or DIFF" if wanted is None else str(wanted)
        raise RefusedUpdate(
            Reason.TRANSFER, expected=expected, got=str(kind) if kind else quoted(sent)
        )

    def _weight(self, weight: object) -> int | float:
        most = self._limits.max_weight
        exact = plain_number(weight)
        if exact is None or not 0 < exact <= (_LARGEST_WEIGHT if most is None else most):
            expected = "a finite number above 0" + ("" if most is None else f", at most {most!r}")
            raise RefusedUpdate(Reason.BAD_WEIGHT, expected=expected, got=quoted(weight))
        return exact

    def _params(self, params: object, keys: frozenset[str] | None) -> dict[str, npt.NDArray[Any]]:
        items = _items(params)
        if items is None:
            raise RefusedUpdate(
                Reason.DTYPE, expected="a mapping from names to arrays", got=_kind(params)
            )
        taken: dict[str, npt.NDArray[Any]] = {}
        for key, value in items:
            name = plain_text(key)
            if name is not None and not self._averages(name, keys):
                continue
            array = check_array(key, value)
            name = cast("str", name)  # else it is refused by now
            if self._has_model and self.spec[name].shape != array.shape:
                raise RefusedUpdate(
                    Reason.SHAPE, key=name, expected=_shape(self.spec[name]), got=_shape(array)
                )
            if not (self._has_model or fits(array.shape)):
                raise RefusedUpdate(
                    Reason.SHAPE, key=name, expected="a shape that files hold", got=_shape(array)
                )
            taken[name] = array
        if len(taken) > _MOST_PARAMETERS and not self._has_model:
            raise RefusedUpdate(
                Reason.UNEXPECTED_KEYS,
                expected=f"a first model of at most {_MOST_PARAMETERS} parameters",
                got=f"{len(taken)}",
            )
        if not self._limits.allow_missing:
            wanted = tuple(self.spec) if self._has_model else sorted(keys or ())
            missing = [key for key in wanted if key not in taken]
            if missing:
                raise RefusedUpdate(
                    Reason.MISSING_KEYS,
                    key=missing[0],
                    expected=f"all {len(wanted)} parameters that are averaged",
                    got=f"{len(taken)} of them",
                )
        if not taken:
            raise RefusedUpdate(
                Reason.MISSING_KEYS, expected="at least one parameter to average", got="none"
            )
        return taken

    def _averages(self, key: str, keys: frozenset[str] | None) -> bool:
        """Whether a key that was sent belongs to the mean; a key that may not be sent raises."""
        if self._has_model:
            if key in self._whole:
                return key in self.spec
        elif not is_name(key):
            raise RefusedUpdate(
                Reason.BAD_NAME,
                key=key,
                expected=f"parameter names of 1 to {_NAME_LENGTH} printable characters",
                got=f"a string of {len(key)}",
            )
        elif self._limits.excludes(key):
            return False
        elif keys is None or key in keys:
            return True
        if self._limits.allow_unexpected:
            return False
        raise RefusedUpdate(
            Reason.UNEXPECTED_KEYS,
            key=key,
            expected=f"no parameter but the {len(keys or self._whole)} of the model",
            got="another",
        )

    def _check_norm(
        self, params: dict[str, npt.NDArray[Any]], kind: TransferType, limit: float
    ) -> None:
        base = self._model if kind is TransferType.FULL and self._has_model else {}
        norm = norm_above(params, base, limit)
        if norm is None:
            return
        if not all(bool(np.isfinite(array).all()) for array in params.values()):
            return  # the accumulator refuses it, and names the key and the index
        raise RefusedUpdate(
            Reason.NORM,
            expected=f"a difference of L2 norm at most {limit!r}",
            got=f"one of {norm!r}",
        )


def shown_name(name: object) -> str:
    """A contributor's name, or what can be shown of it where it is none.

    Args:
        name: Anything.

    Returns:
        The name itself if it is one, else something printable of at most 80 characters.
    """
    text = plain_text(name)
    return text if text is not None and is_name(text) else quoted(name)


def _kind(value: object) -> str:
    return f"an object of type '{type_name(value)}'"


def _shape(array: ArraySpec | npt.NDArray[Any]) -> str:
    return f"the shape {quoted(array.shape)}"


def _items(mapping: object) -> list[tuple[object, object]] | None:
    """The entries of a foreign mapping; None if it is none, or fails while it is read."""
    try:
        if isinstance(mapping, Mapping):
            return [(key, value) for key, value in mapping.items()]
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever a foreign mapping raises
        pass
    return None


def _finite(value: object) -> float | None:
    """A number as a float; None for anything that is no number, or none that float64 can hold."""
    plain = plain_number(value)
    try:
        if plain is None:
            if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, numbers.Real):
                return None
            plain = float(value)
        number = float(plain)
    except Exception:  # too large, or a foreign kind of number that fails
        return None
    return number if math.isfinite(number) else None


def _read_metrics(metrics: object) -> tuple[dict[str, float], tuple[str, ...]]:
    items = _items(metrics)
    if items is None:
        return {}, (f"<{_kind(metrics)} where a mapping was expected>",)
    if len(items) > _MOST_METRICS:
        return {}, (f"<{len(items)} metrics where at most {_MOST_METRICS} were expected>",)
    read: dict[str, float] = {}
    skipped = []
    for name, value in items:
        number, text = _finite(value), plain_text(name)
        if number is not None and text is not None and is_name(text):
            read[text] = number
        else:
            skipped.append(shown_name(name))
    return read, tuple(skipped)
