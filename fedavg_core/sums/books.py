"""What an accumulator knows beside its sums: parameters, their weights, how many updates.

Books are never changed. When the sums change, the books are replaced as a whole, in one step, so
that whoever is interrupted in between finds either the old ones or the new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedavg_core.arguments import whole_number
from fedavg_core.errors import UsageError, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, dtype_named, joined, new_in
from fedavg_core.weight import Weight, weight_from_text, weight_text

__all__ = ["Books", "Term"]

Term: TypeAlias = "tuple[Params, Weight]"
"""An update that has been checked, and its weight."""


@dataclass(frozen=True)
class Books:
    """What is known beside the sums.

    Attributes:
        spec: The parameters that are known, whether or not an update has brought them.
        weights: Of those that some update has brought: the sum of the weights of these updates; 0
            once all of them are removed.
        count: How many updates are in the sums.
        total: The sum of their weights.
    """

    spec: dict[str, ArraySpec]
    weights: dict[str, Weight]
    count: int = 0
    total: Weight = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The parameters that some update has brought."""
        return tuple(key for key in self.spec if self.weights.get(key))

    def after(self, terms: Iterable[Term], sign: int) -> Books:
        """The books after a change.

        Args:
            terms: Updates that have been checked, and their weights.
            sign: 1 if they are added, -1 if they are taken away.

        Returns:
            New books.
        """
        spec, weights = dict(self.spec), dict(self.weights)
        count, total = self.count, self.total
        for params, weight in terms:
            spec.update(ModelSpec.of(new_in(params, spec)))
            for key in params:
                weights[key] = weights.get(key, 0) + sign * weight
            count += sign
            total += sign * weight
        return Books(spec, weights, count, total)

    def merged_with(self, other: Books, is_fixed: bool) -> Books:
        """The books of both.

        Args:
            other: The others.
            is_fixed: Whether they may bring no parameter that these do not know.

        Returns:
            New books.

        Raises:
            UsageError: They have a parameter of another shape or dtype, or one they may not bring.
        """
        spec = joined(self.spec, {key: other.spec[key] for key in other.keys}, is_fixed)
        weights = dict(self.weights)
        for key in other.keys:
            weights[key] = weights.get(key, 0) + other.weights[key]
        return Books(spec, weights, self.count + other.count, self.total + other.total)

    def emptied_by(self, keys: Iterable[str], weight: Weight, given: object) -> Sequence[str]:
        """The parameters that nobody has brought any more once an update is removed.

        Args:
            keys: What it brought.
            weight: Its weight.
            given: The same as a message is to show it.

        Returns:
            Those of its own that no other update has brought.

        Raises:
            UsageError: Weights tell that it is not in the sums.
        """
        keys = tuple(keys)
        for key in keys:
            held = self.weights.get(key, 0)
            if held < weight:
                shown = f"{float(held):g}" if held < 1 << 53 else quoted(int(held))
                raise UsageError(
                    f"key {quoted(key)}: cannot remove weight {quoted(given)}, which is more than "
                    f"the {shown} that was added"
                )
        left = self.total - weight
        taken = dict.fromkeys(keys, weight)
        remaining = [held - taken.get(key, 0) for key, held in self.weights.items()]
        if not _come_about(self.count - 1, left, filter(None, remaining)):
            raise UsageError(
                "cannot remove what was not added: "
                f"{self.count - 1} updates do not come to the weights that would be left"
            )
        return [key for key in keys if self.weights[key] == weight]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs, fit for JSON; of the parameters those that were brought."""
        return {
            "count": self.count,
            "total_weight": weight_text(self.total),
            "keys": [
                {
                    "name": key,
                    "shape": list(self.spec[key].shape),
                    "dtype": self.spec[key].dtype.name,
                    "weight": weight_text(self.weights[key]),
                }
                for key in self.keys
            ],
        }

    @classmethod
    def from_json(cls, meta: Mapping[str, Any]) -> Books:
        """The books that `to_json` told of.

        Args:
            meta: What that gave; other entries are passed over.

        Returns:
            The books.

        Raises:
            UsageError, AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError: These
                are no such books.
        """
        spec: dict[str, ArraySpec] = {}
        weights: dict[str, Weight] = {}
        for entry in meta["keys"]:
            key, weight = entry["name"], weight_from_text(entry["weight"])
            if not isinstance(key, str) or key in weights:
                raise UsageError(f"expected a new name of a parameter, got {quoted(key)}")
            shape = entry["shape"]
            if not isinstance(shape, list):
                raise TypeError(f"a shape that is no list: {quoted(shape)}")
            like = np.broadcast_to(np.zeros((), dtype_named(entry["dtype"])), shape)
            spec[key], weights[key] = ArraySpec(like.shape, like.dtype), weight
            if weight <= 0:
                raise UsageError(
                    f"key {quoted(key)}: expected a weight above zero, got {quoted(weight)}"
                )
        total = weight_from_text(meta["total_weight"])
        count = whole_number("count", meta["count"], 0)
        if not _come_about(count, total, weights.values()):
            raise UsageError(
                f"expected weights that {count} updates come to, got a total of {quoted(total)} "
                f"and up to {quoted(max(weights.values(), default=0))} for a parameter"
            )
        return cls(spec, weights, count, total)


def _come_about(count: int, total: Weight, weights: Iterable[Weight]) -> bool:
    """Whether so many updates, each of which has brought something, can have these weights.

    Args:
        count: How many updates.
        total: The sum of their weights.
        weights: The same for each parameter, over those that have brought it: above zero.
    """
    weights = list(weights)
    most = max(weights, default=0)
    if count < 2:
        return most == min(weights, default=0) == total and (total > 0) == (count == 1)
    return most <= total <= sum(weights)
