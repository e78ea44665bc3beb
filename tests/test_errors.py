"""Errors: one line, whatever is in them, and whole again after a pickle."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

import fedavg_core as fc
from fedavg_core.errors import one_line, quoted


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("site-1", "'site-1'"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ("näme", r"'n\xe4me'"),
        ("x" * 10_000_000, "'" + "x" * 76 + "..."),
        (3, "3"),
        (b"\xff", r"b'\xff'"),
        (Rude(), "<Rude>"),
    ],
)
def test_whatever_comes_from_outside_fits_in_one_line(value: object, shown: str) -> None:
    assert quoted(value) == shown
    assert len(quoted(value)) <= 80


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("disk\non f\xefre, 'again'"), r"ValueError: disk\non f\xefre, 'again'"),
        (KeyError("w"), "KeyError: 'w'"),
        (RuntimeError(), "RuntimeError"),
        (SystemExit(3), "SystemExit: 3"),
        (Mute(), "Mute"),
        (OSError("\udc80" * 10_000_000), "OSError: " + r"\udc80" * 31 + r"\u" + "..."),
    ],
)
def test_an_error_from_outside_fits_in_one_line(error: BaseException, shown: str) -> None:
    assert one_line(error) == shown
    assert len(one_line(error)) <= 200


def test_a_refusal_says_why_where_what_was_expected_and_what_came() -> None:
    refusal = fc.RefusedUpdate(fc.Reason.SHAPE, key="w", expected="(2,)", got="(3,)")
    assert str(refusal) == "SHAPE (key 'w'): expected (2,), got (3,)"
    placed = refusal.placed(contributor="site\n1", round=3)
    assert (
        str(placed) == r"SHAPE (contributor 'site\n1', round 3, key 'w'): expected (2,), got (3,)"
    )
    assert (placed.reason, placed.contributor, placed.round) == (fc.Reason.SHAPE, "site\n1", 3)
    assert refusal.contributor is None
    bare = fc.RefusedUpdate(fc.Reason.BAD_WEIGHT, expected="a", got="b")
    assert str(bare) == "BAD_WEIGHT: expected a, got b"


@pytest.mark.parametrize(
    "error",
    [
        fc.RefusedUpdate(
            fc.Reason.NORM, key="w", contributor="c", round=1, expected="less", got="more"
        ),
        fc.CheckpointError("a/b", "torn", Path("a/c")),
        fc.CheckpointError("a/b", "torn"),
    ],
)
def test_errors_survive_a_process_boundary(error: fc.FedAvgError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_a_bad_file_names_the_newest_good_one() -> None:
    assert str(fc.CheckpointError("a", "torn")) == "a: torn"
    assert str(fc.CheckpointError("a", "torn", Path("b"))) == (
        "a: torn; the newest good checkpoint is b"
    )


def test_families_are_apart() -> None:
    assert issubclass(fc.UsageError, ValueError)
    assert issubclass(fc.OutOfRange, OverflowError)
    families = (fc.UsageError, fc.RefusedUpdate, fc.CheckpointError, fc.OutOfRange)
    assert all(issubclass(family, fc.FedAvgError) for family in families)
    assert f"{fc.Reason.NORM}" == str(fc.Reason.NORM) == "NORM"
    assert str(fc.TransferType.DIFF) == "DIFF"


class Pressed(Exception):
    """What happens to be looked at while Ctrl-C is pressed."""

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


@pytest.mark.parametrize("look", [quoted, one_line])
def test_an_interruption_is_not_taken_for_a_fault_of_what_is_looked_at(look: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        look(Pressed())
