"""One setting of an experiment, played from the first round to the goal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt

import fedavg_core as fc
from benchmarks.experiments import network
from benchmarks.experiments.data import Data
from benchmarks.experiments.split import SPLITS

__all__ = ["Experiment", "Found", "Setting", "crossing", "play"]


@dataclass(frozen=True)
class Experiment:
    """What all settings of an experiment have in common.

    Attributes:
        name: What it is called.
        data: What is learned.
        hidden: How many units each hidden layer has.
        clients: How many clients there are.
        goal: The test accuracy to reach.
        rounds: After how many rounds to give up.
    """

    name: str
    data: Data
    hidden: tuple[int, ...]
    clients: int
    goal: float
    rounds: int


@dataclass(frozen=True)
class Setting:
    """What differs.

    Attributes:
        split: ``"iid"`` or ``"non-iid"``.
        fraction: C; 0 for one client a round.
        batch: B; None for all of a client's examples.
        epochs: E.
    """

    split: str
    fraction: float
    batch: int | None
    epochs: int


@dataclass(frozen=True)
class Found:
    """How it went.

    Attributes:
        setting: What was played.
        rate: The learning rate.
        rounds: How many rounds it took to reach the goal, interpolated; None if it did not.
        accuracies: The test accuracy before the first round and after each.
        seconds: How long it took.
    """

    setting: Setting
    rate: float
    rounds: float | None
    accuracies: tuple[float, ...]
    seconds: float


def play(
    experiment: Experiment,
    setting: Setting,
    rate: float,
    seed: int = 0,
    told: Callable[[int, float], None] = lambda round, accuracy: None,
) -> Found:
    """Play a setting.

    Args:
        experiment: What it is part of.
        setting: The setting.
        rate: The learning rate.
        seed: Of the split, the first network, the selection, and the order of examples.
        told: Called after each round with its number and the accuracy.

    Returns:
        How it went. The same arguments give the same accuracies on the same machine.

    Raises:
        UsageError: There are too few examples for so many clients.
    """
    started = time.perf_counter()
    data = experiment.data
    shares = SPLITS[setting.split](data.train_labels, experiment.clients, seed)

    def train(params: dict[str, npt.NDArray[Any]], context: fc.Context) -> fc.TrainResult:
        share = shares[context.index]
        loss = network.train(
            params,
            data.train_images[share],
            data.train_labels[share],
            epochs=setting.epochs,
            batch=setting.batch,
            rate=rate,
            seed=context.seed,
        )
        return fc.TrainResult(params, weight=len(share), metrics={"loss": loss})

    test = partial(network.accuracy, images=data.test_images, labels=data.test_labels)
    layers = (data.train_images.shape[1], *experiment.hidden, 10)
    model = network.initial(layers, seed)
    accuracies = [test(model)]
    federation = fc.Federation(
        model,
        {f"client-{number}": train for number in range(experiment.clients)},
        experiment.rounds,
        seed=seed,
        participation=max(1, round(setting.fraction * experiment.clients)),
        evaluate=lambda params: {"accuracy": test(params)},
        stop_when=lambda outcome: outcome.evaluation["accuracy"] >= experiment.goal,
    )
    for outcome in federation:
        accuracies.append(outcome.evaluation["accuracy"])
        told(outcome.round, accuracies[-1])
    rounds = crossing(accuracies, experiment.goal)
    return Found(setting, rate, rounds, tuple(accuracies), time.perf_counter() - started)


def crossing(accuracies: Sequence[float], goal: float) -> float | None:
    """Where a curve reaches a goal, interpolated linearly between the best so far.

    Args:
        accuracies: After 0, 1, 2 ... rounds.
        goal: The goal.

    Returns:
        A number of rounds; None if it is not reached.
    """
    best = 0.0
    for rounds, accuracy in enumerate(accuracies):
        if accuracy >= goal:
            return float(rounds) if not rounds else rounds - (accuracy - goal) / (accuracy - best)
        best = max(best, accuracy)
    return None
