"""Fully connected networks of rectified linear units, trained by gradient descent.

The outputs are a softmax; what is made small is the mean cross-entropy over a batch. All is
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

import fedavg_core as fc

__all__ = ["accuracy", "initial", "train"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_PART = 4096


def initial(layers: Sequence[int], seed: int) -> dict[str, npt.NDArray[Any]]:
    """A network before training.

    Args:
        layers: How many inputs, units of each hidden layer, and outputs.
        seed: Draws the weights (K. He et al., 2015); biases are zero.

    Returns:
        ``weight-i`` and ``bias-i`` of each layer but the first, float32.
    """
    rng = np.random.default_rng(seed)
    model: dict[str, npt.NDArray[Any]] = {}
    for number, (inputs, outputs) in enumerate(pairwise(layers), start=1):
        scale = np.float32(np.sqrt(2 / inputs))
        model[f"weight-{number}"] = rng.standard_normal((inputs, outputs), np.float32) * scale
        model[f"bias-{number}"] = np.zeros(outputs, np.float32)
    return model


def _forward(params: fc.Params, images: Floats) -> list[Floats]:
    """The activations of each layer; the last are the logarithms of probabilities, up to a sum."""
    layers = len(params) // 2
    found = [images]
    for number in range(1, layers + 1):
        values = found[-1] @ params[f"weight-{number}"] + params[f"bias-{number}"]
        found.append(np.maximum(values, 0, out=values) if number < layers else values)
    return found


def train(
    params: dict[str, npt.NDArray[Any]],
    images: Floats,
    labels: Labels,
    *,
    epochs: int,
    batch: int | None,
    rate: float,
    seed: int,
) -> float:
    """Train a network, in place.

    Args:
        params: The network; changed.
        images: What it is trained on, float32, shape (n, inputs); only read.
        labels: What they show, int64, shape (n,); only read.
        epochs: How often to go over all of them, E.
        batch: How many to take for a step, B; None for all.
        rate: How far to go in a step.
        seed: Draws the order of the examples.

    Returns:
        The mean loss over the last epoch.
    """
    rng = np.random.default_rng(seed)
    layers = len(params) // 2
    size = len(labels) if batch is None else batch
    loss = 0.0
    for _ in range(epochs):
        loss = 0.0
        order = rng.permutation(len(labels))
        for start in range(0, len(labels), size):
            chosen = order[start : start + size]
            values = _forward(params, images[chosen])
            error = values[-1]
            error -= error.max(axis=1, keepdims=True)
            np.exp(error, out=error)
            error /= error.sum(axis=1, keepdims=True)
            here = np.arange(len(chosen)), labels[chosen]
            loss -= float(np.log(np.maximum(error[here], np.float32(1e-30))).sum(dtype=np.float64))
            error[here] -= 1
            error *= np.float32(rate / len(chosen))
            for number in range(layers, 0, -1):
                below = values[number - 1]
                step = below.T @ error
                bias = error.sum(axis=0)
                if number > 1:
                    error = (error @ params[f"weight-{number}"].T) * (below > 0)
                params[f"weight-{number}"] -= step
                params[f"bias-{number}"] -= bias
    return loss / len(labels)


def accuracy(params: fc.Params, images: Floats, labels: Labels) -> float:
    """How many of the images a network tells right.

    Args:
        params: The network; only read.
        images: float32, shape (n, inputs); only read.
        labels: What they show, int64, shape (n,); only read.

    Returns:
        A share, from 0 to 1.
    """
    hits = 0
    for start in range(0, len(labels), _PART):
        found = _forward(params, images[start : start + _PART])[-1].argmax(axis=1)
        hits += int((found == labels[start : start + _PART]).sum())
    return hits / len(labels)
