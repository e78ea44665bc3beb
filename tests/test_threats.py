"""What spoils a server's model, row by row, each in at least four variants.

The rows on which an update is refused share one check: it is refused for its reason, and the exact
sums have the digest that they had. Bombs and lies in files, kills and power cuts have tests of
their own (`test_codec`, `test_checkpoint_store`, `test_atomic_file`, `test_federation`).
"""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import fedavg_core as fc
from fedavg_core import atomic_file
from fedavg_core.errors import CheckpointError, Reason
from fedavg_core.update import TransferType, Update
from tests.bad_updates import BAD_UPDATES, ROUND, Bad, FailingMapping, good, model, spoilt
from tests.test_codec import npy, zipped

FULL, DIFF = TransferType.FULL, TransferType.DIFF
Case: TypeAlias = "Callable[[Path], None]"


def refused(reason: Reason, update: Callable[[], Update], bad: Bad | None, _: Path) -> None:
    """Where one good update is in the sums, this one is refused and leaves them as they are."""
    kind = bad.transfer if bad else None
    round = fc.Round(model(), ROUND, limits=bad.limits if bad else fc.Limits(), transfer=kind)
    if bad is None:
        assert round.offer(good("site-2")).accepted
    before, accepted = round._mean.digest(), round.accepted
    receipt = round.offer(update())
    assert (receipt.accepted, receipt.reason) == (False, reason)
    assert (round._mean.digest(), round.accepted) == (before, accepted)
    assert (receipt.detail + receipt.contributor).isprintable()
    assert len(receipt.detail) < 500


def table(*reasons: Reason, keep: Callable[[Bad], bool] = lambda bad: True) -> list[Case]:
    """The updates of the table of bad ones that are refused for some reasons."""
    return [
        partial(refused, bad.reason, bad.update, bad)
        for bad in BAD_UPDATES
        if bad.reason in reasons and keep(bad)
    ]


def averages(
    dtype: Any, values: list[Any], weights: list[float], expected: Any, transfer: TransferType
) -> Case:
    """A round in which one element of some dtype has a known mean."""

    def case(_: Path) -> None:
        zero = {"x": np.zeros(2, dtype)}
        round = fc.Round(zero, 0)
        for number, (value, weight) in enumerate(zip(values, weights, strict=True)):
            sent = {"x": np.full(2, value, dtype)}
            assert round.offer(Update(f"{number}", 0, sent, weight, transfer)).accepted
        outcome = round.close()
        assert outcome.problem is None
        assert outcome.model["x"].dtype == np.dtype(dtype)
        assert outcome.model["x"].tolist() == [expected, expected]

    return case


def keeps(least: int, updates: list[Update], base: Any, transfer: TransferType | None) -> Case:
    """A round without enough updates to change its model."""

    def case(_: Path) -> None:
        round = fc.Round(base, ROUND, min_updates=least, transfer=transfer)
        for update in updates:
            round.offer(update)
        outcome = round.close()
        assert not outcome.enough
        assert outcome.problem is not None
        assert "the model keeps its values" in outcome.problem
        assert fc.same_bits(outcome.model, base or {})

    return case


def lacks(*sent: set[str], exclude: str | None = None) -> Case:
    """A round whose updates lack parameters: those that nobody sent keep their value."""

    def case(_: Path) -> None:
        round = fc.Round(model(), ROUND, limits=fc.Limits(exclude=exclude))
        for number, keys in enumerate(sent):
            params = {key: value for key, value in good().params.items() if key in keys}
            assert round.offer(good(f"site-{number}", params=params)).accepted
        result = round.close().model
        assert list(result) == list(model())
        for key, value in model().items():
            came = any(key in keys for keys in sent) and key != exclude
            expected = good().params[key] if came else value
            assert fc.same_bits({key: result[key]}, {key: expected})

    return case


def strange_metric(metrics: Any) -> Case:
    """An update whose metrics cannot be shown as they are is taken, and they are left out."""

    def case(_: Path) -> None:
        round = fc.Round(model(), ROUND)
        receipt = round.offer(good(metrics=metrics))
        assert receipt.accepted
        assert receipt.skipped_metrics
        assert receipt.detail.isprintable()
        assert len(receipt.detail) < 500
        assert round.close().metrics == {}

    return case


class Canary:
    """Unpickling one is an error that no test expects."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a file was unpickled')",)


def pickled(write: Callable[[Path], object]) -> Case:
    """A file with a pickle in it is refused as a checkpoint, and as a model to aggregate."""

    def case(folder: Path) -> None:
        path = folder / "round-00000001.npz"
        write(path)
        for read in (
            lambda: fc.load_checkpoint(path),
            lambda: fc.CheckpointStore(folder).load(),
            lambda: fc.aggregate_files([path], [1], folder / "out.npz"),
        ):
            with pytest.raises(CheckpointError) as error:
                read()
            assert str(error.value).isprintable()
        assert not (folder / "out.npz").exists()

    return case


def pickles() -> Iterator[Case]:
    objects: npt.NDArray[Any] = np.array([Canary(), None], dtype=object)
    yield pickled(lambda path: np.savez(path, w=objects))
    yield pickled(lambda path: np.savez_compressed(path, w=objects))
    yield pickled(lambda path: path.write_bytes(pickle.dumps(Canary())))
    yield pickled(lambda path: path.write_bytes(zipped(("w.pkl", pickle.dumps(Canary())))))
    lie = npy(np.zeros(1), descr="|O")[:-8] + pickle.dumps(Canary())
    yield pickled(lambda path: path.write_bytes(zipped(("w.npy", lie))))
    yield pickled(
        lambda path: path.write_bytes(zipped(("w.npy", lie), method=zipfile.ZIP_DEFLATED))
    )


def adding(params: dict[str, Any], context: fc.Context) -> fc.TrainResult:
    return fc.TrainResult({key: value + 1 for key, value in params.items()}, 1)


def federation(folder: Path, rounds: int, **settings: Any) -> fc.Federation:
    base = {"w": np.zeros(3)}
    return fc.Federation(base, {"a": adding}, rounds, checkpoint=folder, **settings)


def damages(spoil: Callable[[bytes], bytes]) -> Case:
    """A run whose newest checkpoint is damaged does not begin again: it says what is still good."""

    def case(folder: Path) -> None:
        federation(folder, 3).run()
        *_, good_one, newest = sorted(folder.glob("round-*.npz"))
        newest.write_bytes(spoil(newest.read_bytes()))
        with pytest.raises(CheckpointError) as error:
            federation(folder, 5, resume=True)
        assert (error.value.path, error.value.newest_good) == (newest, good_one)
        newest.unlink()
        again = federation(folder, 5, resume=True)
        assert again.model["w"].tolist() == [2.0] * 3

    return case


def flips(at: float, bit: int) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        place = int(at * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]

    return spoil


def cannot_write(code: int, operation: str) -> Case:
    """A run that cannot store its round says so in plain words, and what was stored is intact."""

    def case(folder: Path) -> None:
        federation(folder, 1).run()
        before = {path.name: path.read_bytes() for path in folder.glob("round-*")}

        def failing(*_: Any, **__: Any) -> Any:
            raise OSError(code, os.strerror(code))

        run = federation(folder, 2, resume=True)
        with pytest.MonkeyPatch.context() as patch:
            if operation == "open":
                patch.setattr(atomic_file, "open", failing, raising=False)
            else:
                patch.setattr(os, operation, failing)
            with pytest.raises(CheckpointError) as error:
                run.run()
        assert os.strerror(code) in str(error.value)
        assert "what was there before is as it was" in str(error.value)
        assert {path.name: path.read_bytes() for path in folder.glob("round-*")} == before
        assert federation(folder, 2, resume=True).run()[-1].model["w"].tolist() == [2.0] * 3

    return case


def in_reverse(dtype: Any, transfer: TransferType) -> Case:
    """Eight contributors one way and the other: no element differs."""

    def case(_: Path) -> None:
        rng = np.random.default_rng(8)
        base = {"x": rng.standard_normal(1_000).astype(dtype)}
        updates = [
            Update(
                f"{number}", 0, {"x": rng.standard_normal(1_000).astype(dtype)}, 0.1 + number,
                transfer,
            )
            for number in range(8)
        ]  # fmt: skip
        results = []
        for order in (updates, updates[::-1]):
            round = fc.Round(base, 0)
            for update in order:
                assert round.offer(update).accepted
            results.append(round.close().model)
        assert fc.same_bits(*results)

    return case


def too_late(update: Callable[[], Update]) -> Case:
    """An update that comes after the round is refused, and its outcome is what it was."""

    def case(_: Path) -> None:
        round = fc.Round(model(), ROUND)
        round.offer(good("site-2"))
        outcome = round.close()
        before = {key: value.copy() for key, value in outcome.model.items()}
        digest = round._mean.digest()
        assert round.offer(update()).reason is Reason.ROUND_CLOSED
        assert round._mean.digest() == digest
        assert len(outcome.accepted) == 1
        assert fc.same_bits(outcome.model, before)

    return case


W, BF16, F8 = good().params["w"], ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SECOND_KEYS: list[tuple[Reason, Any]] = [
    (Reason.NON_FINITE, {"w": W, "b": np.array([1.0, 2.0, np.nan])}),
    (Reason.NON_FINITE, {"w": W, "h": np.array([np.inf, 2, 3], BF16)}),
    (Reason.SHAPE, {"w": W, "b": np.ones(4)}),
    (Reason.DTYPE, {"w": W, "b": np.ones(3, object)}),
    (Reason.UNEXPECTED_KEYS, {"w": W, "x": np.ones(3)}),
    (Reason.BAD_NAME, {"w": W, None: np.ones(3)}),
    (Reason.DTYPE, FailingMapping()),
]
AGAIN: list[dict[str, Any]] = [
    {},
    {"weight": 1},
    {"weight": -1},
    {"params": {}},
    {"params": spoilt(b=np.full(3, np.nan))},
    {"transfer": DIFF},
]
THREATS: dict[str, list[Case]] = {
    "NaN or infinity in one element": table(Reason.NON_FINITE),
    "float16 values times a sample count": [
        averages(np.float16, [60, 60, 60], [1200, 1200, 1200], 60.0, FULL),
        averages(np.float16, [65504, 65504], [1e6, 10**9], 65504.0, FULL),
        averages(np.float16, [60, 0], [1200, 1200], 30.0, DIFF),
        averages(BF16, [3e38, 3e38], [1200, 2**70], float(BF16(3e38)), FULL),
        averages(F8, [448, 448], [1200, 1], 448.0, FULL),
        averages(ml_dtypes.float8_e5m2, [57344, -57344], [10**9, 10**9], 0.0, FULL),
    ],
    "integer parameters": [
        averages(np.uint8, [200, 250], [1, 1], 225, FULL),
        averages(np.uint8, [254, 255], [1, 1], 254, FULL),
        averages(np.int8, [-128, -127], [1, 1], -128, FULL),
        averages(np.int64, [2**62 + 1, 2**62 + 1], [600, 0.1], 2**62 + 1, FULL),
        averages(np.int32, [1, 0], [0.5, 0.5], 0, FULL),
        averages(np.int16, [3, 0], [0.5, 0.5], 2, DIFF),
        averages(np.uint64, [2**64 - 1, 1], [1, 1], 2**63, FULL),
    ],
    "a shape that would be broadcast": table(Reason.SHAPE),
    "an update that fails on its second key": [
        partial(refused, reason, partial(good, "site-3", params=params), None)
        for reason, params in SECOND_KEYS
    ],
    "complex, object and string arrays": table(Reason.DTYPE),
    "FULL and DIFF in the same round": table(Reason.TRANSFER),
    "the same contributor twice": [
        partial(refused, Reason.DUPLICATE, partial(good, "site-2", **changes), None)
        for changes in AGAIN
    ],
    "an update of an earlier or later round": table(Reason.STALE_ROUND, Reason.FUTURE_ROUND),
    "a weight of zero, negative, NaN or infinite": table(Reason.BAD_WEIGHT),
    "no update at all": [
        keeps(1, [], model(), None),
        keeps(1, [], model(), DIFF),
        keeps(1, [], None, None),
        keeps(1, [good(weight=0), good(params={}), good(round=2)], model(), None),
        keeps(3, [good("a"), good("b"), good("b")], model(), FULL),
    ],
    "parameters missing from a full model": [
        lacks({"w"}),
        lacks({"w", "n"}, {"n"}),
        lacks({"w", "b", "n", "h"}, exclude="b"),
        lacks({"b", "h"}, {"w", "h"}, exclude="h"),
        lacks({"b"}, {"w"}, {"n"}, {"h"}),
    ],
    "an update of enormous norm": table(Reason.NORM),
    "a contributor's name that is a path, control characters or too long": table(
        Reason.BAD_NAME, Reason.UNKNOWN_CONTRIBUTOR, keep=lambda bad: "contributor" in bad.changes
    ),
    "a parameter's name that is one": table(Reason.BAD_NAME, Reason.UNEXPECTED_KEYS),
    "a metric's name that is one": [
        strange_metric({name: 1.0})
        for name in ("\n", "\x1b[2J", "m" * 10_000_000, "", "\ud800", "\u202emetric")
    ],
    "an update after the round": [
        too_late(partial(good, *arguments, **changes))
        for arguments, changes in (
            (("site-3",), {}),
            (("site-2",), {}),
            (("\n",), {"weight": np.nan}),
            (("site-3",), {"round": ROUND + 1}),
            (("site-3",), {"params": None}),
        )
    ],
    "a pickled object in a file": list(pickles()),
    "a truncated or bit-flipped checkpoint": [
        damages(spoil)
        for spoil in (
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            *(flips(at, bit) for at in (0, 0.3, 0.6, 0.9, 1) for bit in (0, 7)),
        )
    ],
    "a full disk, a read-only folder": [
        cannot_write(code, operation)
        for code, operation in (
            (errno.ENOSPC, "fsync"),
            (errno.EDQUOT, "fsync"),
            (errno.EROFS, "open"),
            (errno.EACCES, "open"),
            (errno.EIO, "replace"),
        )
    ],
    "the order of arrival": [
        in_reverse(dtype, transfer)
        for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
        for transfer in (FULL, DIFF)
    ],
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{row} {number}")
        for row, cases in THREATS.items()
        for number, case in enumerate(cases, 1)
    ],
)
def test_it_does_no_harm(case: Case, tmp_path: Path) -> None:
    case(tmp_path)


@pytest.mark.parametrize("row", THREATS)
def test_each_has_four_variants(row: str) -> None:
    assert len(THREATS[row]) >= 4
