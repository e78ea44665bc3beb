"""A table of updates that are not to be averaged, each with the reason it must be refused for.

Every case starts from one good update for one model (`good`) and spoils one thing about it. The
table is read by the tests of the gate and the round; whatever else takes updates can read it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from fedavg_core.errors import Reason, quoted
from fedavg_core.gate import Limits
from fedavg_core.update import TransferType, Update

ROUND = 3
CONTRIBUTOR = "site-2"


def model() -> dict[str, Any]:
    """The model that the updates are for."""
    return {
        "w": np.arange(4, dtype=np.float32).reshape(2, 2),
        "b": np.array([0.5, -1.5, 3.0]),
        "n": np.array([1, 2], dtype=np.int64),
        "h": np.ones(3, dtype=ml_dtypes.bfloat16),
    }


def good(contributor: str = CONTRIBUTOR, **changes: Any) -> Update:
    """A good update for `model`, but for what is changed."""
    fields: dict[str, Any] = {
        "contributor": contributor,
        "round": ROUND,
        "params": {key: value + value.dtype.type(1) for key, value in model().items()},
        "weight": 5,
        "metrics": {"loss": 0.5},
    }
    return Update(**{**fields, **changes})


def spoilt(**arrays: Any) -> dict[str, Any]:
    """The parameters of `good` with some replaced."""
    return {**good().params, **arrays}


@dataclass(frozen=True)
class Bad:
    """One update that must be refused."""

    what: str
    reason: Reason
    changes: dict[str, Any]
    limits: Limits = field(default_factory=Limits)
    transfer: TransferType | None = None

    def update(self) -> Update:
        """The update."""
        return good(**self.changes)


class FailingMapping(Mapping[str, Any]):
    """A mapping that cannot be read to its end."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        yield "w"
        raise RuntimeError("a mapping that fails")

    def __len__(self) -> int:
        return 1


class Liar(int):
    """A whole number that says it is another, and does not let itself be compared."""

    def __int__(self) -> int:
        return 7

    def __gt__(self, other: object) -> bool:
        raise ValueError

    __ge__ = __gt__


class Unprintable:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("an object that cannot be shown")


def _with_value(value: float, dtype: Any = np.float32) -> Any:
    array = np.ones((2, 2), dtype=dtype)
    array[1, 0] = value
    return array


_ROSTER = Limits(roster=frozenset({"site-1", "site-3"}))
_STRICT = Limits(allow_missing=False)
_NEAR = Limits(max_norm=4.0)

BAD_UPDATES: list[Bad] = [
    *(
        Bad(f"{value} in {np.dtype(dtype).name}", Reason.NON_FINITE, {"params": params})
        for value in (math.nan, math.inf, -math.inf)
        for dtype, params in (
            (np.float32, spoilt(w=_with_value(value))),
            (np.float64, spoilt(b=np.array([1.0, 2.0, value]))),
            (np.float16, spoilt(w=_with_value(value, np.float16))),
            (ml_dtypes.bfloat16, spoilt(h=np.array([1, value, 3], ml_dtypes.bfloat16))),
        )
    ),
    Bad(
        "a difference with a NaN",
        Reason.NON_FINITE,
        {"params": {"w": _with_value(math.nan)}, "transfer": TransferType.DIFF},
    ),
    Bad(
        "a NaN where a norm is asked for",
        Reason.NON_FINITE,
        {"params": {"w": _with_value(math.nan)}},
        limits=_NEAR,
    ),
    *(
        Bad(f"shape {np.shape(array)}", Reason.SHAPE, {"params": spoilt(w=np.asarray(array))})
        for array in (
            np.ones(1, np.float32),
            np.ones((), np.float32),
            np.ones(4, np.float32),
            np.ones((1, 2), np.float32),
            np.ones((2, 1), np.float32),
            np.ones((2, 2, 1), np.float32),
            np.ones((0, 2), np.float32),
        )
    ),
    *(
        Bad(what, Reason.DTYPE, {"params": spoilt(b=value)})
        for what, value in (
            ("complex numbers", np.ones(3, np.complex128)),
            ("objects", np.array([1, 2, 3], dtype=object)),
            ("strings", np.array(["1", "2", "3"])),
            ("bytes", np.array([b"1", b"2", b"3"])),
            ("dates", np.zeros(3, "M8[s]")),
            ("truth values", np.ones(3, bool)),
            ("records", np.zeros(3, [("a", "f8")])),
            ("raw bytes", np.zeros(3, "V8")),
            ("a masked array", np.ma.ones(3)),
            ("a list", [1.0, 2.0, 3.0]),
            ("a number", 1.0),
            ("nothing", None),
            ("an object that cannot be shown", Unprintable()),
        )
    ),
    *(
        Bad(f"params that are {what}", Reason.DTYPE, {"params": params})
        for what, params in (
            ("a list", [np.ones(3)]),
            ("an array", np.ones(3)),
            ("nothing", None),
            ("text", "w"),
            ("a mapping that fails", FailingMapping()),
        )
    ),
    *(
        Bad(f"a key that is {key!r}", Reason.BAD_NAME, {"params": {key: np.ones(3)}})
        for key in (1, None, b"w", ("w",), math.nan)
    ),
    *(
        Bad(
            f"the key {key[:12]!r}",
            Reason.UNEXPECTED_KEYS,
            {"params": spoilt(**{key: np.ones(3)})},
        )
        for key in (
            "x",
            "../w",
            "/etc/passwd",
            "w\n",
            "\x1b[2J",
            "",
            "k" * 10_000_000,
            "W",
            "\ud800",
        )
    ),
    Bad("no parameters", Reason.MISSING_KEYS, {"params": {}}),
    Bad("one missing", Reason.MISSING_KEYS, {"params": {"w": model()["w"]}}, limits=_STRICT),
    Bad(
        "all but one missing", Reason.MISSING_KEYS, {"params": {"n": model()["n"]}}, limits=_STRICT
    ),
    Bad(
        "only excluded parameters",
        Reason.MISSING_KEYS,
        {"params": {"w": model()["w"]}},
        limits=Limits(exclude="^w$"),
    ),
    Bad(
        "only unexpected parameters, where they are let be",
        Reason.MISSING_KEYS,
        {"params": {"x": np.ones(3)}},
        limits=Limits(allow_unexpected=True),
    ),
    *(
        Bad(f"weight {what}", Reason.BAD_WEIGHT, {"weight": weight})
        for what, weight in (
            ("0", 0),
            ("0.0", 0.0),
            ("-0.0", -0.0),
            ("-1", -1),
            ("-1.5", -1.5),
            ("NaN", math.nan),
            ("infinity", math.inf),
            ("minus infinity", -math.inf),
            ("NumPy's NaN", np.float32("nan")),
            ("10 to the 400", 10**400),
            ("text", "5"),
            ("nothing", None),
            ("True", True),
            ("complex", 5 + 0j),
            ("an array", np.ones(2)),
            ("a fraction", Fraction(1, 3)),
            ("a decimal", Decimal(5)),
            ("an object that cannot be shown", Unprintable()),
        )
    ),
    Bad("weight above the limit", Reason.BAD_WEIGHT, {"weight": 11}, limits=Limits(max_weight=10)),
    *(
        Bad(f"an update for round {number!r}"[:60], reason, {"round": number})
        for number, reason in (
            (2, Reason.STALE_ROUND),
            (0, Reason.STALE_ROUND),
            (-1, Reason.STALE_ROUND),
            (np.int64(2), Reason.STALE_ROUND),
            (None, Reason.STALE_ROUND),
            ("3", Reason.STALE_ROUND),
            (3.0, Reason.STALE_ROUND),
            (True, Reason.STALE_ROUND),
            (np.ones((2, 2)), Reason.STALE_ROUND),
            (4, Reason.FUTURE_ROUND),
            (1 << 64, Reason.FUTURE_ROUND),
            (np.uint64((1 << 64) - 1), Reason.FUTURE_ROUND),
            (1000, Reason.FUTURE_ROUND),
        )
    ),
    *(
        Bad(f"contributor {quoted(name)}"[:60], Reason.BAD_NAME, {"contributor": name})
        for name in (
            "",
            "site\n2",
            "site-2\x00",
            "\x1b[31msite-2",
            "\u202esite-2",
            "\ud800",
            "s" * 257,
            "s" * 10_000_000,
            None,
            2,
            b"site-2",
            ["site-2"],
            Unprintable(),
        )
    ),
    *(
        Bad(
            f"contributor {name!r}, who is not on the roster",
            Reason.UNKNOWN_CONTRIBUTOR,
            {"contributor": name},
            limits=_ROSTER,
        )
        for name in ("site-2", "Site-1", "site-1 ", "../site-1", "site-\u0661")
    ),
    *(
        Bad(
            f"{what}, where full models are wanted",
            Reason.TRANSFER,
            {"transfer": sent},
            transfer=full,
        )
        for full in (TransferType.FULL,)
        for what, sent in (
            ("a difference", TransferType.DIFF),
            ("the text DIFF", "DIFF"),
            ("nothing", None),
            ("another text", "WEIGHTS"),
            ("a number", 1),
        )
    ),
    Bad(
        "a full model, where differences are wanted",
        Reason.TRANSFER,
        {"transfer": TransferType.FULL},
        transfer=TransferType.DIFF,
    ),
    Bad("no transfer type, where any will do", Reason.TRANSFER, {"transfer": None}),
    *(
        Bad(
            f"a norm above the limit: {what}", Reason.NORM, {"params": params, **more}, limits=_NEAR
        )
        for what, params, more in (
            ("one element", {"b": np.array([0.5, -1.5, 7.1])}, {}),
            ("many together", spoilt(w=model()["w"] + np.float32(2)), {}),
            ("integers", {"n": np.array([1, 7])}, {}),
            ("a difference", {"b": np.array([0.0, 4.1, 0.0])}, {"transfer": TransferType.DIFF}),
            ("beyond float64 when squared", {"b": np.array([1e300, 0.0, 0.0])}, {}),
            ("the largest float64", {"b": np.full(3, np.finfo(np.float64).max)}, {}),
        )
    ),
]
"""Every row but DUPLICATE and ROUND_CLOSED, which take a second update, and are tested apart."""
