"""Where means are written to."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.accumulator import WeightedMean
from fedavg_core.blocks import pack
from fedavg_core.model import ArraySpec, same_bits
from fedavg_core.results import Results

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
    results = Results(wanted, blocks)
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
                pieces = [results.flat[s.key][s.start : s.start + s.size] for s in mine[:count]]
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
