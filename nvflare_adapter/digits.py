"""The training file of the main job: a small network learns handwritten digits, federated.

The data are 1,797 real images of 8 × 8 pixels (E. Alpaydin and C. Kaynak, 1998; see
`data/README.md`). One fifth is held out to test the global model. The rest is dealt out to the
contributors unevenly: the shares of each digit are drawn from a Dirichlet distribution with
concentration alpha (T.-M. H. Hsu, H. Qi and M. Brown, "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", 2019). The smaller alpha, the fewer kinds of
digits a contributor sees. The split depends on alpha and on the number of contributors only, so
that each finds its own share without being sent it, and the same one in every round.

The network has one hidden layer of rectified linear units and a softmax output, and is trained by
mini-batch gradient descent on the mean cross-entropy.

This file is also the pattern for others: `train`, `initial_model` and `evaluate` are all that a
training file has, and the last lines hand `train` over. Run by NVFlare it serves a client; read by
``--backend in-process`` it runs without NVFlare.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fedavg_core as fc
import nvflare_adapter

__all__ = ["evaluate", "initial_model", "load_digits", "partition", "train"]

HIDDEN_UNITS = 32
LEARNING_RATE = 0.2
LOCAL_EPOCHS = 5
BATCH_SIZE = 32
ALPHA = 0.5
_SPLIT_SEED = 1998

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Digits(NamedTuple):
    """The data, split into what is trained on and what is held out.

    Attributes:
        train_images: float32, shape (1438, 64), from 0 to 1.
        train_labels: int64, shape (1438,), from 0 to 9.
        test_images: float32, shape (359, 64).
        test_labels: int64, shape (359,).
    """

    train_images: Floats
    train_labels: Indices
    test_images: Floats
    test_labels: Indices


@cache
def load_digits() -> Digits:
    """Read the images that come with the package.

    Returns:
        The data, read once and shared: do not write to the arrays.
    """
    with (files("nvflare_adapter") / "data" / "digits.npz").open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        images, labels = content["images"], content["labels"]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    pixels = (images.reshape(len(labels), -1)[order] / 16).astype(np.float32)
    digits = labels[order].astype(np.int64)
    held_out = len(digits) // 5
    return Digits(pixels[held_out:], digits[held_out:], pixels[:held_out], digits[:held_out])


def partition(labels: Indices, num_contributors: int, alpha: float) -> list[Indices]:
    """Deal the examples out to the contributors, each kind of digit in shares drawn at random.

    Args:
        labels: The label of each example, int64, shape (n,).
        num_contributors: How many shares to make, from 1 to n.
        alpha: The concentration of the Dirichlet distribution, above 0; large values make even
            shares.

    Returns:
        For each contributor the indices of its examples, ascending and at least one; together they
        are 0 .. n-1. The same arguments give the same shares.

    Raises:
        UsageError: There are more contributors than examples, or alpha is not above 0.
    """
    if not 1 <= num_contributors <= len(labels):
        raise fc.UsageError(
            f"digits: expected from 1 to {len(labels)} contributors, got {num_contributors}"
        )
    if not 0 < alpha < float("inf"):
        raise fc.UsageError(f"digits: expected an alpha that is finite and above 0, got {alpha}")
    rng = np.random.default_rng([_SPLIT_SEED, num_contributors])
    order = rng.permutation(len(labels))
    owner = np.empty(len(labels), dtype=np.int64)
    owner[order[:num_contributors]] = np.arange(num_contributors)
    rest = order[num_contributors:]
    for digit in np.unique(labels):
        members = rest[labels[rest] == digit]
        shares = rng.dirichlet(np.full(num_contributors, alpha))
        bounds = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for contributor, part in enumerate(np.split(members, bounds)):
            owner[part] = contributor
    return [np.flatnonzero(owner == contributor) for contributor in range(num_contributors)]


def initial_model(seed: int) -> dict[str, npt.NDArray[Any]]:
    """The network before training.

    Args:
        seed: Draws the hidden layer's weights (K. He et al., 2015); everything else starts at zero.

    Returns:
        A new model of four float32 arrays.
    """
    rng = np.random.default_rng(seed)
    inputs, outputs = 64, 10
    scale = np.sqrt(2 / inputs)
    return {
        "hidden.weight": (rng.standard_normal((inputs, HIDDEN_UNITS)) * scale).astype(np.float32),
        "hidden.bias": np.zeros(HIDDEN_UNITS, dtype=np.float32),
        "output.weight": np.zeros((HIDDEN_UNITS, outputs), dtype=np.float32),
        "output.bias": np.zeros(outputs, dtype=np.float32),
    }


def _forward(params: fc.Params, images: Floats) -> tuple[Floats, Floats]:
    """The hidden layer's activations, and the probability of each digit."""
    hidden = np.maximum(images @ params["hidden.weight"] + params["hidden.bias"], 0)
    scores = hidden @ params["output.weight"] + params["output.bias"]
    scores -= scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores)
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)


def _cross_entropy(probabilities: Floats, labels: Indices) -> float:
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_label, 1e-30)).mean())


def train(
    params: dict[str, npt.NDArray[Any]], context: fc.Context, alpha: float = ALPHA
) -> fc.TrainResult:
    """Train the model on one contributor's share of the digits.

    Args:
        params: The global model; this copy is ours to change.
        context: Whose share, which round, and the seed of the order of the examples.
        alpha: How uneven the shares are (see `partition`).

    Returns:
        The trained model, the number of examples as its weight, and the mean loss over the last
        pass.
    """
    digits = load_digits()
    share = partition(digits.train_labels, context.num_contributors, alpha)[context.index]
    images, labels = digits.train_images[share], digits.train_labels[share]
    targets = np.eye(10, dtype=np.float32)
    rng = np.random.default_rng(context.seed)
    loss = 0.0
    for _ in range(LOCAL_EPOCHS):
        loss = 0.0
        order = rng.permutation(len(labels))
        for start in range(0, len(labels), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            hidden, probabilities = _forward(params, images[batch])
            loss += _cross_entropy(probabilities, labels[batch]) * len(batch)
            error = (probabilities - targets[labels[batch]]) / np.float32(len(batch))
            hidden_error = (error @ params["output.weight"].T) * (hidden > 0)
            step = np.float32(LEARNING_RATE)
            params["output.weight"] -= step * (hidden.T @ error)
            params["output.bias"] -= step * error.sum(axis=0)
            params["hidden.weight"] -= step * (images[batch].T @ hidden_error)
            params["hidden.bias"] -= step * hidden_error.sum(axis=0)
    return fc.TrainResult(params, weight=len(labels), metrics={"loss": loss / len(labels)})


def evaluate(params: fc.Params) -> dict[str, float]:
    """Test a model on the digits that no contributor has.

    Args:
        params: The model; only read.

    Returns:
        Its ``accuracy``, from 0 to 1, and its mean ``loss``.
    """
    digits = load_digits()
    _, probabilities = _forward(params, digits.test_images)
    hits = probabilities.argmax(axis=1) == digits.test_labels
    return {
        "accuracy": float(hits.mean()),
        "loss": _cross_entropy(probabilities, digits.test_labels),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn handwritten digits, federated.")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="how even the shares are")
    arguments = parser.parse_args()
    nvflare_adapter.serve(partial(train, alpha=arguments.alpha))
