"""What an accumulator knows beside its sums: parameters, their weights, how many updates.

Books are never changed. With the sums change the books as a whole, in one step, so that whoever is
interrupted in between finds either the old ones or the new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedavg_core.errors import UsageError, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, dtype_named
from fedavg_core.weight import Weight, weight_from_text, weight_text
from fedavg_core.whole import is_whole

__all__ = ["Books"]


@dataclass(frozen=True)
class Books:
    """What is known beside the sums.

    Attributes:
        spec: The parameters that are known, whether or not an update has brought them.
        weights: Of those that some update has brought: the sum of the weights of these updates.
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

    def after(self, terms: Iterable[tuple[Params, Weight]], sign: int) -> Books:
        """The books once checked terms are added (sign 1) or taken away (-1)."""
        spec, weights = dict(self.spec), dict(self.weights)
        count, total = self.count, self.total
        for params, weight in terms:
            spec.update(ModelSpec.of({k: v for k, v in params.items() if k not in spec}))
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

        Raises:
            UsageError: They have a parameter of another shape or dtype, or one they may not bring.
        """
        spec, weights = dict(self.spec), dict(self.weights)
        for key in other.keys:
            known, brought = self.spec.get(key), other.spec[key]
            if known is None and is_fixed:
                raise UsageError(f"key {quoted(key)}: the spec does not name it")
            if known is not None and known != brought:
                raise UsageError(f"key {quoted(key)}: expected {known}, got {brought}")
            spec[key] = brought
            weights[key] = weights.get(key, 0) + other.weights[key]
        return Books(spec, weights, self.count + other.count, self.total + other.total)

    def check_removal(self, keys: Iterable[str], weight: Weight) -> Sequence[str]:
        """See that an update may be in the sums, as far as weights tell.

        Args:
            keys: What it brought.
            weight: Its weight.

        Returns:
            Those that no other update has brought.

        Raises:
            UsageError: It cannot be.
        """
        keys = tuple(keys)
        for key in keys:
            held = self.weights.get(key, 0)
            if held < weight or self.count == 0:
                shown = f"{float(held):g}" if held < 1 << 53 else quoted(int(held))
                raise UsageError(
                    f"key {quoted(key)}: cannot remove weight {quoted(weight)}, which is more than "
                    f"the {shown} that was added"
                )
        left = self.total - weight
        taken = dict.fromkeys(keys, weight)
        most = max((held - taken.get(key, 0) for key, held in self.weights.items()), default=0)
        if most > left or (self.count == 1 and left):
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
            like = np.broadcast_to(np.zeros((), dtype_named(entry["dtype"])), tuple(entry["shape"]))
            spec[key], weights[key] = ArraySpec(like.shape, like.dtype), weight
        count, total = meta["count"], weight_from_text(meta["total_weight"])
        if not is_whole(count) or min(count, total, *weights.values()) < 0 or 0 in weights.values():
            raise ValueError("a count or a weight that cannot be")
        return cls(spec, weights, count, total)
