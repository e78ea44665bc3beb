"""What a client is told, and the draws that are the same everywhere."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedavg_core.client import contributor_order, contributor_seed, draw_contributors

NAMES = [f"site-{number}" for number in range(1, 13)]


def test_contributors_are_in_natural_order() -> None:
    expected = ["10", "a", "a1", "a1b", "a2", "a2b1", "a2b10", "a10", "b", "site-2", "site-10"]
    assert contributor_order(reversed(expected)) == expected
    assert contributor_order(reversed(NAMES)) == NAMES


def test_names_that_differ_in_zeros_only_are_in_a_fixed_order() -> None:
    assert contributor_order(["a1", "a01", "a001", "a0", "a"]) == ["a", "a0", "a001", "a01", "a1"]


def test_a_number_of_any_length_is_in_order() -> None:
    long = ["1" * 5_000, "2" * 5_000, "1" * 5_001]
    assert contributor_order(reversed(long)) == long


@given(st.lists(st.text(max_size=6), unique=True), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_where_it_starts(names: list[str], random: object) -> None:
    ordered = contributor_order(names)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert contributor_order(names) == ordered
    assert sorted(ordered) == sorted(names)


@pytest.mark.parametrize(
    ("seed", "round", "name", "expected"),
    [
        (0, 0, "site-1", 425_798_280_606_214_561),
        (7, 3, "site-1", 6_996_095_003_442_797_890),
        (-1, 10**9, "süd", 8_091_816_149_009_484_998),
    ],
)
def test_a_seed_is_these_63_bits_on_every_platform(
    seed: int, round: int, name: str, expected: int
) -> None:
    text = f"fedavg-core train {seed} {round} {name}"
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert contributor_seed(seed, round, name) == int(digest[:16], 16) // 2 == expected


def test_seeds_differ_by_run_round_and_contributor() -> None:
    seeds = {
        contributor_seed(seed, round, name)
        for seed in range(5)
        for round in range(5)
        for name in NAMES
    }
    assert len(seeds) == 5 * 5 * len(NAMES)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_draw_is_this_one_on_every_platform() -> None:
    draws = [draw_contributors(NAMES, 4, 0, round) for round in range(3)]
    numbers = [[int(name[5:]) for name in names] for names in draws]
    assert numbers == [[2, 6, 9, 10], [4, 7, 8, 9], [5, 7, 8, 12]]


@given(st.integers(0, 12), st.integers(), st.integers(0), st.permutations(NAMES))
def test_a_draw_is_of_so_many_whatever_the_order(
    count: int, seed: int, round: int, names: list[str]
) -> None:
    drawn = draw_contributors(names, count, seed, round)
    assert drawn == draw_contributors(NAMES, count, seed, round)
    assert drawn == contributor_order(set(drawn))
    assert len(drawn) == count
    assert set(drawn) <= set(NAMES)


def test_every_contributor_is_drawn_about_equally_often() -> None:
    rounds = 3_000
    counts = Counter(
        name for round in range(rounds) for name in draw_contributors(NAMES, 3, 1, round)
    )
    # 3,000 · 3/12 = 750 each, with a standard deviation of about 24.
    assert all(abs(counts[name] - 750) < 120 for name in NAMES)
