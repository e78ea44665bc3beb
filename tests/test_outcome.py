"""What a round answers: the numbers that an evaluation gave."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from fedavg_core.errors import UsageError, type_name
from fedavg_core.outcome import evaluation_of


class Fails:
    """A number that has none."""

    def __float__(self) -> float:
        raise RuntimeError("it is on another device")


class FailsToo(dict[str, float]):
    """A mapping that cannot be read."""

    def items(self) -> Any:
        raise AttributeError("closed")


@pytest.mark.parametrize(
    "found",
    [
        {"loss": 0.5, "n": 3},
        OrderedDict(loss=np.float32(0.5), n=np.int64(3)),
        MappingProxyType({np.str_("loss"): np.array(0.5), np.str_("n"): np.uint8(3)}),
    ],
    ids=type_name,
)
def test_an_evaluation_comes_back_as_pythons_own_names_and_numbers(
    found: Mapping[str, Any],
) -> None:
    numbers = evaluation_of(found)
    assert type(numbers) is dict
    assert list(numbers.items()) == [("loss", 0.5), ("n", 3.0)]
    assert {type(name) for name in numbers} == {str}
    assert {type(number) for number in numbers.values()} == {float}


def test_an_evaluation_is_a_copy() -> None:
    found = {"loss": 0.5}
    numbers = evaluation_of(found)
    found["loss"] = 1.0
    assert numbers == {"loss": 0.5}


def test_an_evaluation_may_be_empty_or_not_finite() -> None:
    assert evaluation_of({}) == {}
    assert math.isnan(evaluation_of({"loss": math.nan})["loss"])
    assert evaluation_of({"loss": -math.inf}) == {"loss": -math.inf}


@pytest.mark.parametrize(
    "found",
    [
        *(None, 0.5, "loss", [0.5], object()),
        *({"loss": None}, {"loss": "low"}, {"loss": 1j}, {"loss": [0.5]}),
        *({"loss": np.ones(2)}, {"loss": 10**400}, {"n": 1, "loss": {}}),
        *({"loss": "3.5"}, {"loss": np.str_("3.5")}, {"loss": np.array("3.5")}, {"loss": b"3"}),
        *({"loss": True}, {"loss": np.True_}, {"loss": np.array(True)}, {"loss": np.complex64(1)}),
        *({"loss": np.timedelta64(1, "s")}, {"loss": Fails()}, FailsToo()),
        *({1: 2.0, "1": 3.0}, {None: 1}, [("loss", 1)], ["a1"], ""),
    ],
)
def test_what_is_no_mapping_to_numbers_is_a_usage_error_that_names_the_function(
    found: object,
) -> None:
    for given, name in (((), "evaluate"), (("train.py: evaluate",), r"train\.py: evaluate")):
        wanted = f"^{name}: expected a mapping from names to numbers, got "
        with pytest.raises(UsageError, match=wanted) as error:
            evaluation_of(found, *given)
        assert "\n" not in str(error.value)


def test_a_complex_number_is_none_where_warnings_are_off_as_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (np.complex64(1), np.array(1 + 0j)):
            with pytest.raises(UsageError, match="expected a mapping from names to numbers"):
                evaluation_of({"loss": value})
