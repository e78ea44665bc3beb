"""How a model is cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.model import ArraySpec
from fedavg_core.sums.blocks import Buffers, load, pack

FLOAT32 = np.dtype(np.float32)


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 30))
def test_every_element_is_in_one_block_and_no_block_is_too_large(
    sizes: list[int], capacity: int
) -> None:
    spec = {f"k{i}": ArraySpec((size,), FLOAT32) for i, size in enumerate(sizes)}
    seen = []
    for block in pack(spec, capacity):
        shared = len(block.segments) > 1
        assert 1 <= block.size <= (capacity * 3 // 4 if shared else capacity)
        offset = 0
        for segment in block.segments:
            assert segment.offset == offset
            offset += segment.size
            seen += [
                (segment.key, element)
                for element in range(segment.start, segment.start + segment.size)
            ]
        assert offset == block.size
        located = [block.locate(index) for index in range(block.size)]
        assert located == seen[-block.size :]
    assert sorted(seen) == sorted((f"k{i}", e) for i, size in enumerate(sizes) for e in range(size))


def test_small_arrays_share_a_block_and_a_large_one_has_its_own() -> None:
    shapes = [("a", (2, 2)), ("big", (9,)), ("b", (3,)), ("c", ()), ("d", (4,)), ("e", (1,))]
    spec = {key: ArraySpec(shape, FLOAT32) for key, shape in shapes}

    def packed(capacity: int) -> list[list[str]]:
        return [[part.key for part in block.segments] for block in pack(spec, capacity)]

    assert packed(32) == [["big"], ["a", "b", "c", "d", "e"]]
    assert packed(31) == [["a"], ["big"], ["d"], ["b", "c", "e"]]
    assert packed(8) == [["a"], ["big"], ["big"], ["b"], ["d"], ["c", "e"]]


@pytest.mark.parametrize(
    ("arrays", "sizes"), [(6, [24]), (7, [16, 12]), (12, [24, 24]), (13, [16, 16, 16, 4])]
)
def test_small_arrays_share_one_block_or_an_even_number_of_like_sizes(
    arrays: int, sizes: list[int]
) -> None:
    spec = {str(number): ArraySpec((4,), FLOAT32) for number in range(arrays)}
    assert [block.size for block in pack(spec, 32)] == sizes


@given(st.integers(1, 200), st.integers(1, 30))
def test_a_large_array_is_cut_into_blocks_of_like_sizes(size: int, capacity: int) -> None:
    blocks = [block.size for block in pack({"x": ArraySpec((size,), FLOAT32)}, capacity)]
    assert len(blocks) == -(-size // capacity)
    assert max(blocks) - min(blocks) <= 1
    assert sum(blocks) == size


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("f4",), "f4"),
        (("f8",), "f8"),
        (("f2", "f4", "i2", "u1"), "f4"),
        (("f4", "i4"), "f8"),
        (("f2", "f8"), "f8"),
    ],
)
def test_values_are_read_as_float32_only_where_that_is_exact(
    dtypes: tuple[str, ...], expected: str
) -> None:
    params = {f"k{i}": np.arange(3, dtype=dtype) for i, dtype in enumerate(dtypes)}
    spec = {key: ArraySpec(array.shape, array.dtype) for key, array in params.items()}
    (block,) = pack(spec, 100)
    ((values, exponent),) = load(block, params, params, Buffers(100))
    assert values.dtype == np.dtype(expected)
    assert exponent == 0
    assert values.tolist() == [0, 1, 2] * len(dtypes)


def test_a_contiguous_array_is_read_where_it_lies() -> None:
    params = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for block in pack({"x": ArraySpec((2, 3), FLOAT32)}, 4):
        ((values, _),) = load(block, params, params, Buffers(4))
        assert np.shares_memory(values, params["x"])


def test_missing_arrays_count_as_zero_and_a_block_of_none_is_empty() -> None:
    spec = {"a": ArraySpec((2,), FLOAT32), "b": ArraySpec((1,), FLOAT32)}
    (block,) = pack(spec, 16)
    params = {"b": np.array([5.0])}
    buffers = Buffers(16)
    buffers.wide.fill(9)
    ((values, _),) = load(block, params, params, buffers)
    assert values.tolist() == [0.0, 0.0, 5.0]
    assert load(block, params, {"c"}, buffers) == []


def test_large_integers_are_split_in_two_exact_parts() -> None:
    params = {"n": np.array([2**63 - 1, -(2**63), -1]), "x": np.array([0.5, 2.0])}
    spec = {key: ArraySpec(array.shape, array.dtype) for key, array in params.items()}
    (block,) = pack(spec, 32)
    parts = load(block, params, params, Buffers(32))
    assert [exponent for _, exponent in parts] == [0, 32]
    totals = [
        int(low) + (int(high) << 32) for low, high in zip(parts[0][0], parts[1][0], strict=True)
    ]
    assert totals[:3] == [2**63 - 1, -(2**63), -1]
    assert parts[0][0][3:].tolist() == [0.5, 2.0]
    assert parts[1][0][3:].tolist() == [0.0, 0.0]
