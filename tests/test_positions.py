from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedavg_core.exact.positions as module
from fedavg_core.exact.positions import positions


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 40))
def test_positions_are_where_the_mask_is_true(mask: list[bool], most: int) -> None:
    expected = [i for i, chosen in enumerate(mask) if chosen]
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 8, 1 << 14):
            patch.setattr(module, "_FEW", few)
            found = positions(np.array(mask), most)
            assert (None if found is None else found.tolist()) == (
                expected if len(expected) <= most else None
            )


def test_positions_in_a_large_mask_are_found_or_told_to_be_too_many() -> None:
    rng = np.random.default_rng(0)
    for size, share in ((1 << 18, 1e-3), ((1 << 18) + 5, 1e-2), ((1 << 17) - 1, 0.3)):
        mask = rng.random(size) < share
        expected = np.flatnonzero(mask)
        found = positions(mask, expected.size)
        assert found is not None
        assert np.array_equal(found, expected)
        assert positions(mask, expected.size - 1) is None
        assert positions(mask, 50) is None
