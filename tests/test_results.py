"""Where means are written to."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.accumulator import WeightedMean
from fedavg_core.comparison import same_bits
from fedavg_core.model import ArraySpec
from fedavg_core.sums.blocks import pack
from fedavg_core.sums.results import Memory, Results

DTYPES = [np.dtype(np.float32), np.dtype(np.float16)]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES), st.booleans()), max_size=8),
    st.integers(1, 60),
)
def test_every_element_has_its_own_place_and_a_run_is_of_its_segments(
    arrays: list[tuple[int, np.dtype[np.generic], bool]], capacity: int
) -> None:
    spec = {f"k{i}": ArraySpec((size,), dtype) for i, (size, dtype, _) in enumerate(arrays)}
    wanted = {f"k{i}": spec[f"k{i}"] for i, (_, _, want) in enumerate(arrays) if want}
    blocks = list(pack(spec, capacity))
    results = Results(wanted, blocks, Memory())
    assert {key: ArraySpec(a.shape, a.dtype) for key, a in results.arrays.items()} == wanted
    for one, other in itertools.combinations(results.arrays.values(), 2):
        assert not np.shares_memory(one, other)
    for number, block in enumerate(blocks):
        for dtype in DTYPES:
            mine = [s for s in block.segments if s.key in wanted and spec[s.key].dtype == dtype]
            for count in range(1, len(mine) + 1):
                run = results.run(mine[:count])
                assert run is not None  # what is written together lies side by side
                run[:] = np.arange(run.size) + number
                pieces = [results.part(s) for s in mine[:count]]
                assert np.array_equal(np.concatenate(pieces), run)
            if len(mine) > 2:
                assert results.run([mine[0], mine[2]]) is None


def test_large_arrays_in_one_block_with_small_ones_have_memory_of_their_own() -> None:
    rng = np.random.default_rng(0)
    sizes = {"first": 1 << 20, "small": 10, "large": 1 << 20, "last": 10}
    updates = [{k: rng.random(n, np.float32) for k, n in sizes.items()} for _ in range(2)]
    means = []
    for block in (1 << 24, 1 << 19):
        mean = WeightedMean(block=block)
        for update in updates:
            mean.add(update, 3)
        means.append(mean.mean())
        assert means[-1]["small"].base is means[-1]["last"].base
        assert means[-1]["small"].base is not means[-1]["large"].base
    assert same_bits(*means)


def test_means_of_other_weights_may_lie_between() -> None:
    values = {key: np.full(5, number, np.float32) for number, key in enumerate("abcd", 1)}
    mean = WeightedMean()
    mean.add(values, 3)
    mean.add({"b": 9 * values["b"]}, 1)
    expected = {**values, "b": 3 * values["b"]}
    assert same_bits(mean.mean(), expected)


LARGE = 1 << 20
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda array: array,
    "a part of it": lambda array: array[3:9],
    "another shape": lambda array: array.reshape(2, -1).T,
    "another dtype": lambda array: array.view(np.uint8),
    "a buffer of it": lambda array: memoryview(array),
    "an array over a buffer of it": lambda array: np.frombuffer(array, np.float32),
    "an iterator over it": lambda array: array.flat,
    "its base": lambda array: array.base,
    "what DLPack makes of it": lambda array: np.from_dlpack(array),
}


def averaged(mean: WeightedMean, value: float) -> dict[str, Any]:
    """The mean of one model, of a large array and two small ones."""
    mean.reset()
    sizes = {"large": LARGE, "small": 10, "other": 300}
    mean.add({key: np.full(size, value, np.float32) for key, size in sizes.items()}, 3)
    return mean.mean()


def addresses(arrays: dict[str, Any]) -> set[int]:
    return {array.ctypes.data for array in arrays.values()}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("key", ["large", "small"])
def test_memory_that_somebody_has_is_left_alone(holder: str, key: str) -> None:
    mean = WeightedMean()
    array = averaged(mean, 1)[key]
    held = HOLDERS[holder](array)
    del array
    before = np.array(held)
    kept = [averaged(mean, value) for value in (2, 3, 4)]
    kept[1:] = [averaged(mean, 5)]
    assert np.array_equal(np.array(held), before)
    assert all(np.all(array == 2) for array in kept[0].values())


UNDER_A_TRACER = """
import sys

def look(frame, *_):
    frame.f_locals
    return look

sys.settrace(look)
import fedavg_core
sys.settrace(None)
import numpy as np

mean, first = fedavg_core.WeightedMean(), None
for value in range(1, 5):
    mean.reset()
    mean.add({"w": np.full(3, value, np.float32)}, 1)
    means = mean.mean()
    first = means["w"] if first is None else first
print(first)
"""


def test_so_it_is_where_a_debugger_looked_on_while_the_package_was_imported() -> None:
    """Before Python 3.13 a look at a frame's variables adds references to them."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_TRACER], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[1. 1. 1.]\n"


def test_memory_that_nobody_has_serves_the_next_mean() -> None:
    mean = WeightedMean()
    first = averaged(mean, 1)
    places = addresses(first)
    del first
    assert addresses(averaged(mean, 2)) == places


def test_where_each_mean_takes_the_place_of_the_last_two_memories_serve_in_turn() -> None:
    mean = WeightedMean()
    model, memories = averaged(mean, 1), []
    for value in range(2, 8):
        model = averaged(mean, value)
        memories.append([weakref.ref(model[key].base) for key in ("large", "small")])
        assert all(np.all(array == value) for array in model.values())
    for memory, later in zip(memories, memories[2:], strict=False):
        assert all(one() is other() is not None for one, other in zip(memory, later, strict=True))
    assert all(one() is not other() for one, other in zip(*memories[:2], strict=True))


def test_no_more_than_two_means_are_kept() -> None:
    mean = WeightedMean()
    tracemalloc.start()
    try:
        history = [averaged(mean, value) for value in range(6)]
        one = 4 * (LARGE + 310)
        assert tracemalloc.get_traced_memory()[0] > 6 * one
        sums = tracemalloc.get_traced_memory()[0] - 6 * one
        del history
        assert tracemalloc.get_traced_memory()[0] < sums + 2.1 * one
        averaged(mean, 7)
        assert tracemalloc.get_traced_memory()[0] < sums + 2.1 * one
    finally:
        tracemalloc.stop()


def test_memory_of_another_size_or_dtype_does_not_serve() -> None:
    mean = WeightedMean()
    mean.add({"a": np.ones(LARGE, np.float32), "b": np.ones(LARGE, np.float64)}, 1)
    bases: list[dict[str, Any]] = [
        {"a": np.zeros(LARGE, np.float64), "b": np.zeros(LARGE, np.float16)},
        {"a": np.zeros(LARGE, np.int32), "b": np.zeros(LARGE, np.float32)},
    ]
    for base in bases:
        model = mean.mean(base)
        assert {key: array.dtype for key, array in model.items()} == {
            key: array.dtype for key, array in base.items()
        }
        assert all(np.all(array == 1) for array in model.values())
        del model


@pytest.mark.parametrize("attribute", ["writeable", "shape", "strides", "dtype"])
def test_memory_that_was_made_another_array_does_not_serve(attribute: str) -> None:
    mean = WeightedMean()
    base = averaged(mean, 1)["large"].base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if attribute == "writeable":
            base.setflags(write=False)
        elif attribute == "shape":
            base.shape = (2, -1)
        elif attribute == "strides":
            base.strides = (0,)
        else:
            base.dtype = np.uint32
    del base
    assert all(np.all(array == 2) for array in averaged(mean, 2).values())


def test_a_copy_of_a_mean_keeps_no_memory_of_the_other() -> None:
    mean = WeightedMean()
    places = addresses(averaged(mean, 1))
    other = copy.copy(mean)
    assert not addresses(other.mean()) & places
    assert addresses(mean.mean()) == places
