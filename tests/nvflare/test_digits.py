"""The training file of the main job."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

import fedavg_core as fc
from nvflare_adapter import digits


def context(index: int = 0, round: int = 0) -> Any:
    return fc.Context(
        contributor=f"site-{index + 1}",
        index=index,
        num_contributors=4,
        round=round,
        num_rounds=3,
        seed=round * 10 + index,
    )


def test_the_data_are_the_1797_images_and_none_is_in_both_parts() -> None:
    data = digits.load_digits()
    assert data.train_images.shape == (1438, 64)
    assert data.test_images.shape == (359, 64)
    assert data.train_images.dtype == np.float32
    assert float(data.train_images.min()) == 0
    assert float(data.train_images.max()) == 1
    assert set(np.unique(data.train_labels)) == set(range(10)) == set(np.unique(data.test_labels))
    train = {hashlib.sha256(image.tobytes()).digest() for image in data.train_images}
    test = {hashlib.sha256(image.tobytes()).digest() for image in data.test_images}
    assert not train & test


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100])
@pytest.mark.parametrize("num_contributors", [1, 4, 300])
def test_every_example_goes_to_one_contributor_and_none_gets_nothing(
    alpha: float, num_contributors: int
) -> None:
    labels = digits.load_digits().train_labels
    shares = digits.partition(labels, num_contributors, alpha)
    assert len(shares) == num_contributors
    assert min(map(len, shares)) >= 1
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(labels)))


def test_the_shares_are_the_same_every_time() -> None:
    labels = digits.load_digits().train_labels
    first, second = digits.partition(labels, 4, 0.5), digits.partition(labels, 4, 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_small_alpha_makes_the_shares_uneven_and_a_large_one_even() -> None:
    labels = digits.load_digits().train_labels

    def unevenness(alpha: float) -> Any:
        counts = np.array(
            [
                np.bincount(labels[share], minlength=10)
                for share in digits.partition(labels, 4, alpha)
            ]
        )
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert unevenness(0.05) > 0.8
    assert unevenness(1000) < 0.35


@pytest.mark.parametrize(("num_contributors", "alpha"), [(0, 1), (1439, 1), (4, 0), (4, np.inf)])
def test_shares_that_cannot_be_made_are_an_error(num_contributors: int, alpha: float) -> None:
    with pytest.raises(fc.UsageError, match="digits: expected"):
        digits.partition(digits.load_digits().train_labels, num_contributors, alpha)


def test_training_lowers_the_loss_on_the_contributors_own_share() -> None:
    params = digits.initial_model(0)
    losses = [digits.train(params, context(round=number)).metrics["loss"] for number in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


def test_training_is_the_same_every_time_and_differs_between_contributors() -> None:
    one, again = (digits.train(digits.initial_model(0), context()) for _ in range(2))
    other = digits.train(digits.initial_model(0), context(index=1))
    assert fc.same_bits(one.params, again.params)
    assert one.weight == again.weight != other.weight
    assert not fc.same_bits(one.params, other.params)


def test_the_first_model_depends_on_the_seed_and_guesses() -> None:
    assert fc.same_bits(digits.initial_model(1), digits.initial_model(1))
    assert not fc.same_bits(digits.initial_model(1), digits.initial_model(2))
    found = digits.evaluate(digits.initial_model(1))
    assert found["accuracy"] < 0.2
    assert found["loss"] == pytest.approx(np.log(10), rel=1e-5)
