"""Server optimizers: from the mean of the updates to the next global model.

A round gives the change Δ = mean − x, by how much the mean of what the contributors sent differs
from the global model x. Plain federated averaging makes the mean the new model. A server optimizer
takes −Δ for a gradient and makes a step of its own, with a learning rate η and with a memory of
earlier rounds (S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar and
H. B. McMahan, "Adaptive Federated Optimization", 2021, algorithm 2):

    FedAvg       x ← x + η Δ
    FedAvgM      m ← β m + Δ;                                       x ← x + η m
    FedAdagrad   m ← β₁ m + (1 − β₁) Δ;   v ← v + Δ²;               x ← x + η m / (√v + τ)
    FedAdam      m as above;   v ← β₂ v + (1 − β₂) Δ²;              x as above
    FedYogi      m as above;   v ← v − (1 − β₂) Δ² sign(v − Δ²);    x as above

FedAvgM is that of T.-M. H. Hsu, H. Qi and M. Brown, "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", 2019. At first m is 0, and v is τ², the least
that algorithm 2 allows. There is no correction of the first rounds' bias, as it has none.

Numbers:

* Δ comes from the exact sums, and is rounded once, to float64. So it does not depend on the order
  of the updates, and with it no bit of the new model or of the state does.
* State and arithmetic are float64, whatever the model's dtype: squares of small changes vanish in
  float16 and soon in float32, and v adds up hundreds of them. So a float16 model takes the steps
  that a float64 one does. It costs 8 bytes a parameter for m, and 8 for v.
* The new x is rounded once more, from float64 to the model's dtype, to nearest, half to even. For
  a float64 model the last addition is that rounding.
* Each operation is one that IEEE 754 rounds correctly, in the order of the formulas above, from
  left to right. So the bits are the same on every machine.
* FedAvg with a learning rate of 1 gives the exact mean itself.
* A step between whole numbers has no meaning: integer parameters become their exact mean, and have
  no state.

A parameter that no update brought keeps its value, and its state. So do all of them in a round that
keeps its model. Where a new value or its state is beyond the largest number, nothing is changed.

The state is a flat mapping of arrays, ``"momentum/w"`` and ``"second_moment/w"`` for a parameter
``w``. It holds all that a run needs to go on with the same bits.

Your own optimizer is a subclass of `ServerOptimizer` that says what a step is for one parameter.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedavg_core.arguments import real_number
from fedavg_core.errors import OutOfRange, UsageError, quoted
from fedavg_core.model import ArraySpec, ModelSpec, Params, copy_params, is_extension
from fedavg_core.settings import kind_named, settings_of
from fedavg_core.transfer import apply

__all__ = [
    "SERVER_OPTIMIZERS",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "ServerOptimizer",
    "optimizer_named",
]

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
_Range: TypeAlias = "tuple[str, Callable[[float], bool]]"

_ABOVE_ZERO: _Range = "a finite number above 0", lambda number: number > 0
_BELOW_ONE: _Range = "a number from 0 to below 1", lambda number: 0 <= number < 1
_RANGES = {
    **dict.fromkeys(("learning_rate", "tau"), _ABOVE_ZERO),
    **dict.fromkeys(("momentum", "beta1", "beta2"), _BELOW_ONE),
}


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """How the global model follows the mean of the updates.

    An optimizer is a value: it has settings and no state. The state is given to each step, and a
    new one comes back.

    Attributes:
        learning_rate: How far to go, η.

    Raises:
        UsageError: A setting has no meaning.
    """

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in _RANGES:
                number = real_number(field.name, getattr(self, field.name), *_RANGES[field.name])
                object.__setattr__(self, field.name, number)

    @property
    def is_plain(self) -> bool:
        """Whether the next model is the exact mean."""
        return False

    @property
    @abstractmethod
    def start(self) -> Mapping[str, float]:
        """What is remembered of a parameter: a name, and what each element of it is at first."""

    @abstractmethod
    def step(self, change: Floats, state: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """One step of one parameter.

        Args:
            change: Δ, by how much the mean differs from the parameter; only read.
            state: What is remembered of it, by the names of `start`, in the shape of ``change``;
                only read.

        Returns:
            What to add to the parameter, and what to remember; new memory, or the arguments'.
        """

    def settings(self) -> dict[str, Any]:
        """What JSON can hold of it; `optimizer_named` makes it again, if it is one of this module.

        Returns:
            Its name and its fields.

        Raises:
            UsageError: JSON cannot hold a field.
        """
        return settings_of(type(self).__name__.lower(), dataclasses.asdict(self))

    def check_state(self, spec: ModelSpec, state: object) -> None:
        """See that a state can be one of this optimizer's, for a model.

        Args:
            spec: What the model looks like.
            state: What is given for a state; only read.

        Raises:
            UsageError: It is no mapping, or an entry has an unknown name, another shape than its
                parameter, or is not made of finite float64 numbers.
        """
        if not isinstance(state, Mapping):
            raise UsageError(
                f"expected a server optimizer's state as a mapping, got {quoted(state)}"
            )
        for name, value in state.items():
            moment, _, key = str(name).partition("/")
            if moment not in self.start or key not in spec:
                raise UsageError(
                    f"{quoted(name)}: expected the state of a parameter under one of the names "
                    f"{sorted(self.start)}"
                )
            if (
                not isinstance(value, np.ndarray)
                or value.dtype != np.float64
                or value.shape != spec[key].shape
                or not np.isfinite(value).all()
            ):
                raise UsageError(
                    f"{quoted(name)}: expected finite float64 numbers of shape {spec[key].shape}"
                )

    def update(
        self, model: Params, mean: Params, change: Params, state: Params
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The next global model.

        Args:
            model: The global model; only read.
            mean: The mean of the updates, for those parameters that are to change, in the dtypes
                of the model; only read.
            change: Mean less model, for those of them that are no integers, in float64; only read.
            state: What an earlier step gave; empty at first; only read.

        Returns:
            The parameters that ``mean`` has, as new arrays in the dtypes of the model; and the
            whole new state, of arrays that cannot be written to, so that it may be shared.
            Deterministic.

        Raises:
            OutOfRange: A value of the new model, or of the state, is beyond the largest number.
        """
        spec, kept, result = ModelSpec.of(model), dict(state), copy_params(mean)
        for key, delta in {} if self.is_plain else change.items():
            shape = spec[key].shape
            before = {
                name: kept[f"{name}/{key}"]
                if f"{name}/{key}" in kept
                else np.full(shape, value, np.float64)
                for name, value in self.start.items()
            }
            with np.errstate(all="ignore"):
                step, after = self.step(delta, before)
                moved = np.asarray(model[key].astype(np.float64) + step)
            result[key] = _rounded(key, moved, spec[key])
            for name, value in after.items():
                kept[f"{name}/{key}"] = _remembered(f"{name}/{key}", value)
        return result, kept


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """Plain federated averaging, with a server learning rate.

    Attributes:
        learning_rate: How far to go towards the mean; 1 gives the exact mean.

    Raises:
        UsageError: A setting has no meaning.
    """

    @property
    def is_plain(self) -> bool:
        """See `ServerOptimizer.is_plain`."""
        return self.learning_rate == 1

    @property
    def start(self) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def step(self, change: Floats, state: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """See `ServerOptimizer.step`."""
        return self.learning_rate * change, {}


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """Federated averaging with server momentum (Hsu et al. 2019).

    Attributes:
        learning_rate: How far to go.
        momentum: How much of the last step is in the next, β.

    Raises:
        UsageError: A setting has no meaning.
    """

    momentum: float = 0.9

    @property
    def start(self) -> Mapping[str, float]:
        """The momentum, 0."""
        return {"momentum": 0.0}

    def step(self, change: Floats, state: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """See `ServerOptimizer.step`."""
        momentum = self.momentum * state["momentum"] + change
        return self.learning_rate * momentum, {"momentum": momentum}


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    """What the three of algorithm 2 have in common: all but the second moment."""

    learning_rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    @property
    def start(self) -> Mapping[str, float]:
        """The momentum, 0, and the second moment, τ²."""
        return {"momentum": 0.0, "second_moment": self.tau * self.tau}

    def step(self, change: Floats, state: Mapping[str, Floats]) -> tuple[Floats, dict[str, Floats]]:
        """See `ServerOptimizer.step`."""
        momentum = self.beta1 * state["momentum"] + (1 - self.beta1) * change
        second = self._second_moment(state["second_moment"], change * change)
        step = self.learning_rate * momentum / (np.sqrt(second) + self.tau)
        return step, {"momentum": momentum, "second_moment": second}

    @abstractmethod
    def _second_moment(self, second: Floats, square: Floats) -> Floats:
        """The new v, given the old one and Δ²."""


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """FedAdagrad (Reddi et al. 2021), by default without momentum, as there.

    Attributes:
        learning_rate: How far to go, η.
        beta1: How much of the last step's direction is in the next, β₁.
        tau: How adaptive it is, τ; the smaller, the more.

    Raises:
        UsageError: A setting has no meaning.
    """

    beta1: float = 0.0

    def _second_moment(self, second: Floats, square: Floats) -> Floats:
        return second + square


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """FedAdam (Reddi et al. 2021).

    Attributes:
        learning_rate: How far to go, η.
        beta1: How much of the last step's direction is in the next, β₁.
        tau: How adaptive it is, τ; the smaller, the more.
        beta2: How much of the second moment is kept, β₂.

    Raises:
        UsageError: A setting has no meaning.
    """

    beta2: float = 0.99

    def _second_moment(self, second: Floats, square: Floats) -> Floats:
        return self.beta2 * second + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """FedYogi (Reddi et al. 2021).

    Attributes:
        learning_rate: How far to go, η.
        beta1: How much of the last step's direction is in the next, β₁.
        tau: How adaptive it is, τ; the smaller, the more.
        beta2: How slowly the second moment follows the squares of the changes, β₂.

    Raises:
        UsageError: A setting has no meaning.
    """

    beta2: float = 0.99

    def _second_moment(self, second: Floats, square: Floats) -> Floats:
        return second - (1 - self.beta2) * square * np.sign(second - square)


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    kind.__name__.lower(): kind for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)
}
"""From the name of each server optimizer to its class."""


def optimizer_named(name: str, **settings: Any) -> ServerOptimizer:
    """A server optimizer by its name.

    Args:
        name: ``"fedavg"``, ``"fedavgm"``, ``"fedadagrad"``, ``"fedadam"`` or ``"fedyogi"``.
        settings: Those of its attributes that shall not have the default value.

    Returns:
        The optimizer; ``optimizer_named(**optimizer.settings())`` is equal to it.

    Raises:
        UsageError: There is none of this name, or it has no such setting, or the value has no
            meaning.
    """
    kind = kind_named("server optimizer", SERVER_OPTIMIZERS, name, settings, _options)
    return kind(**settings)


def _options(kind: type[ServerOptimizer]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _rounded(key: str, values: Floats, spec: ArraySpec) -> Array:
    """Values in the dtype of a parameter, rounded once."""
    if np.isfinite(values).all():
        if is_extension(spec.dtype):  # their conversions round twice, by way of float32
            return apply({key: np.zeros(spec.shape, spec.dtype)}, {key: values})[key]
        with np.errstate(all="ignore"):
            result: Array = values.astype(spec.dtype)
        if np.isfinite(result).all():
            return result
    raise OutOfRange(
        f"key {quoted(key)}: the server optimizer's step leads beyond the largest number of "
        f"{spec.dtype}"
    )


def _remembered(name: str, values: Floats) -> Floats:
    """Values as an array of a state."""
    if not np.isfinite(values).all():
        raise OutOfRange(f"{quoted(name)}: the server optimizer's state is beyond float64")
    result: Floats = np.asarray(values).view()
    result.flags.writeable = False
    return result
