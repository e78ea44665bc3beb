"""What every robust mean can do.

A robust mean stands where a `WeightedMean` may stand, and is used in the same way: `add`, `merge`,
`mean`, `reset`. What it promises is the same too:

* The result depends on the set of updates and on nothing else, to the bit: not on their order, nor
  on how they were spread over several objects that were merged.
* An update is added whole or not at all. What is handed in is only read.

What it costs is not: see `nbytes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy.typing as npt

from fedavg_core.errors import UsageError, quoted
from fedavg_core.model import ModelSpec, Params
from fedavg_core.settings import settings_of

__all__ = ["RobustMean", "State"]

Array: TypeAlias = npt.NDArray[Any]

State: TypeAlias = "tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]"

_Self = TypeVar("_Self", bound="RobustMean")


class RobustMean(ABC):
    """A mean that some bad updates cannot carry off.

    Not safe for use from several threads at once: the caller has the lock.

    Args:
        spec: The parameters, their shapes and the dtypes that the mean shall have. If None, the
            first update that brings a parameter decides.
    """

    name: ClassVar[str]
    """What the rule is called."""

    options: ClassVar[tuple[str, ...]] = ()
    """The names of the constructor's other arguments, which are kept as attributes."""

    ignores_weights: ClassVar[bool] = False
    """Whether an update counts the same whatever its weight."""

    def __init__(self, spec: ModelSpec | None = None) -> None:
        self._fixed = spec is not None
        self._given = spec

    @property
    def determinism(self) -> str:
        """``"order-independent"``: the result depends on the set of updates alone."""
        return "order-independent"

    @property
    def least(self) -> int:
        """How many updates the rule needs."""
        return 1

    @property
    def needs_differences(self) -> bool:
        """Whether what is added must be differences from a model, and not models."""
        return False

    def settings(self) -> dict[str, Any]:
        """What tells one robust mean from another, as JSON can hold it.

        Returns:
            The name of the rule and its options.

        Raises:
            UsageError: JSON cannot hold an option.
        """
        return settings_of(self.name, {option: getattr(self, option) for option in self.options})

    def empty(self: _Self, spec: ModelSpec | None) -> _Self:
        """A new one with the same rule and options, to which nothing was added.

        Args:
            spec: As for the constructor.

        Returns:
            It.
        """
        options = {option: getattr(self, option) for option in self.options}
        return type(self)(spec=spec, **options)

    @property
    @abstractmethod
    def count(self) -> int:
        """How many updates were added."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The parameters that some update has brought."""

    @property
    @abstractmethod
    def total_weight(self) -> Fraction:
        """The exact sum of the weights of all updates."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """How many bytes the updates that are kept take."""

    def add(self, params: Params, weight: float) -> None:
        """Add one update, whole or not at all.

        Args:
            params: The parameters, or some of them; only read.
            weight: How much it counts, where the rule asks for that: a finite number above zero.

        Raises:
            RefusedUpdate: The update is not fit to be added; the state is unchanged.
        """
        self.add_many([(params, weight)])

    @abstractmethod
    def add_many(self, updates: Iterable[tuple[Params, float]]) -> None:
        """Add several updates, all of them or none; the result is as if one came after the other.

        Args:
            updates: Pairs of params and weight, as for `add`.

        Raises:
            RefusedUpdate: One of them is not fit to be added; the state is unchanged. Of several,
                the contributor is ``updates[number]``.
            UsageError: They are no pairs.
        """

    @abstractmethod
    def merge(self: _Self, other: _Self) -> None:
        """Add all that another one of the same rule holds.

        Args:
            other: The other; only read.

        Raises:
            UsageError: It has another rule, other options or parameters of other shapes or dtypes;
                the state is unchanged.
        """

    @abstractmethod
    def mean(self, base: Params | None = None) -> dict[str, Array]:
        """The robust mean; the state is unchanged.

        Args:
            base: If given, what was added were differences from it, and the result is ``base`` plus
                their robust mean, rounded once. Only read.

        Returns:
            New arrays: with a base its keys, in its order and dtypes, those that no update brought
            copied; without one the keys that some update brought. An exact zero is +0.0.

        Raises:
            OutOfRange: A result is beyond the largest number of its dtype.
            UsageError: There are fewer updates than the rule needs; or there is no update and no
                base; or the base lacks a parameter, has it in another shape, or is not finite.
        """

    @abstractmethod
    def digest(self) -> str:
        """A fingerprint of what was added.

        Returns:
            64 hexadecimal digits. Equal for equal updates with equal weights, however they came.
        """

    @abstractmethod
    def state(self) -> State:
        """All that this holds, fit to be stored.

        Returns:
            A dictionary that JSON can hold, and arrays; they may be those that are kept, and are to
            be read only.
        """

    @abstractmethod
    def take_up(self, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Take up what another one of the same rule held; to be asked of an empty one.

        Args:
            meta: The dictionary that `state` gave.
            arrays: The arrays that it gave; copied.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: This is no such state.
            RefusedUpdate: It holds what could not have been added.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget every update, and give back the memory that they took."""

    def _check_alike(self, other: object) -> None:
        got = f"a {other.settings()}" if isinstance(other, RobustMean) else quoted(other)
        if type(self) is not type(other) or self.settings() != other.settings():
            raise UsageError(f"expected a {self.settings()} to merge, got {got}")
