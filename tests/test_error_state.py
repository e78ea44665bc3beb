"""NumPy's floating-point error state (`numpy.seterr`) is the caller's: it changes nothing here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedavg_core as fc
from fedavg_core.robust.rules import ROBUST_MEANS
from fedavg_core.testing.strategies import arrays, weighted_models
from tests.model_files import write_model

Weighted: TypeAlias = "tuple[list[fc.Params], list[float]]"
FEW = settings(max_examples=30)


def outcome(compute: Callable[[], Any]) -> Any:
    """What a computation gives, to the bit, or the package's error."""
    try:
        result = compute()
    except fc.FedAvgError as error:
        return repr(error)
    return [(key, np.asarray(array).tobytes()) for key, array in result.items()]


def same_under_raise(compute: Callable[[], Any]) -> bool:
    """Whether a computation gives the same where each irregularity is to raise."""
    expected = outcome(compute)
    with np.errstate(all="raise"):
        return bool(outcome(compute) == expected)


@pytest.mark.parametrize("accumulator", ["exact", "float64", "float32"])
@FEW
@given(weighted=weighted_models(min_models=2))
def test_a_weighted_mean_and_all_that_it_can_be_made_of(
    accumulator: Any, weighted: Weighted
) -> None:
    models, weights = weighted

    def added() -> fc.WeightedMean:
        mean = fc.WeightedMean(accumulator=accumulator)
        for params, weight in zip(models, weights, strict=True):
            mean.add(params, weight)
        return mean

    def merged() -> fc.WeightedMean:
        mean = fc.WeightedMean(accumulator=accumulator)
        mean.merge(added())
        mean.merge(added())
        return mean

    assert same_under_raise(lambda: added().mean())
    assert same_under_raise(lambda: added().mean(models[0]))
    assert same_under_raise(lambda: added().state()[1])
    assert same_under_raise(lambda: fc.WeightedMean.from_state(*added().state()).mean())
    assert same_under_raise(lambda: merged().mean())


@pytest.mark.parametrize("rule", ROBUST_MEANS)
@FEW
@given(weighted=weighted_models(min_models=5, max_models=6))
def test_a_robust_mean(rule: str, weighted: Weighted) -> None:
    def compute() -> fc.Params:
        mean = ROBUST_MEANS[rule]()
        mean.add_many(zip(*weighted, strict=True))
        return mean.mean()

    assert same_under_raise(compute)


@pytest.mark.parametrize(
    "optimizer", [fc.FedAvg, fc.FedAvgM, fc.FedAdam, fc.FedYogi, fc.FedAdagrad]
)
@pytest.mark.parametrize("transfer", list(fc.TransferType))
@FEW
@given(weighted=weighted_models(min_models=2))
def test_a_round(
    transfer: fc.TransferType, optimizer: Callable[[], fc.ServerOptimizer], weighted: Weighted
) -> None:
    models, weights = weighted

    def compute() -> fc.Params:
        limits = fc.Limits(max_norm=1e300)
        current = fc.Round(
            models[0], 0, transfer=transfer, server_optimizer=optimizer(), limits=limits
        )
        for i, (params, weight) in enumerate(zip(models, weights, strict=True)):
            update = fc.Update(f"client-{i}", 0, params, weight, transfer=transfer)
            assert current.offer(update).reason in (None, fc.Reason.NORM)
        return current.close().model

    assert same_under_raise(compute)


@FEW
@given(weighted=weighted_models(min_models=2))
def test_files(weighted: Weighted) -> None:
    models, weights = weighted
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = [write_model(folder / f"{i}", "sealed", params) for i, params in enumerate(models)]

        def compute() -> fc.Params:
            fc.aggregate_files(paths, weights, folder / "mean.npz")
            return {"file": np.frombuffer((folder / "mean.npz").read_bytes(), np.uint8)}

        assert same_under_raise(compute)


@FEW
@given(data=st.data(), dtype=st.sampled_from(["f2", "f4", "f8"]))
def test_differences(data: st.DataObject, dtype: str) -> None:
    model, base = ({"x": data.draw(arrays(dtype))} for _ in range(2))
    assert same_under_raise(lambda: fc.diff(model, base))
    assert same_under_raise(lambda: fc.apply(base, model))
