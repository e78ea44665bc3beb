"""The weighted mean as its callers see it. What its bits are is tested in test_exact_mean*.py."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from pydoc import locate
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import fedavg_core as fc
from fedavg_core.accumulator import Accumulator
from fedavg_core.exact.exact_sum import ExactSum
from fedavg_core.model import ArraySpec
from fedavg_core.sums.exact_sums import ExactSums
from fedavg_core.sums.plain_sums import PlainSum
from fedavg_core.weight import exact_weight
from tests.bad_updates import Liar
from tests.conftest import THOROUGH
from tests.interruption import Interruption

Array = npt.NDArray[Any]
KINDS: tuple[Accumulator, ...] = ("exact", "float64", "float32")
kinds = pytest.mark.parametrize("kind", KINDS)


def model(seed: int = 0, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "w": (rng.standard_normal((3, 4)) * scale).astype(np.float32),
        "b": (rng.standard_normal(5) * scale).astype(np.float64),
        "n": rng.integers(0, 100, (2,), dtype=np.int64),
    }


@kinds
def test_the_mean_is_weighted_by_what_each_update_weighs(kind: Accumulator) -> None:
    mean = fc.weighted_mean(
        [{"w": np.array([1.0, 2.0])}, {"w": np.array([5.0, 10.0])}], [3, 1], accumulator=kind
    )
    assert mean["w"].tolist() == [2.0, 4.0]
    assert mean["w"].dtype == np.float64


@kinds
def test_the_mean_has_the_dtypes_that_came_in(kind: Accumulator) -> None:
    mean = fc.weighted_mean([model(1), model(2)], [1, 2], accumulator=kind)
    assert {k: v.dtype for k, v in mean.items()} == {k: v.dtype for k, v in model().items()}
    assert {k: v.shape for k, v in mean.items()} == {k: v.shape for k, v in model().items()}


@kinds
def test_a_base_gets_the_mean_difference_and_keeps_what_nobody_sent(kind: Accumulator) -> None:
    base: dict[str, Array] = {
        "a": np.array([1.0], np.float32),
        "untouched": np.arange(3),
        "b": np.array([7], np.uint8),
    }
    sent = [
        {"a": np.array([0.5], np.float32), "b": np.array([-2])},
        {"a": np.array([1.5], np.float32)},
    ]
    result = fc.weighted_mean(sent, [1, 1], base=base, accumulator=kind)
    assert list(result) == ["a", "untouched", "b"]
    assert result["a"].tolist() == [2.0]
    assert result["b"].tolist() == [5]
    assert result["b"].dtype == np.uint8
    assert result["untouched"].tolist() == [0, 1, 2]
    assert not np.shares_memory(result["untouched"], base["untouched"])


@kinds
def test_each_parameter_has_the_weights_of_those_that_sent_it(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"a": np.array([1.0]), "b": np.array([10.0])}, 1)
    mean.add({"b": np.array([40.0])}, 2)
    assert mean.mean()["a"].tolist() == [1.0]
    assert mean.mean()["b"].tolist() == [30.0]
    assert (mean.weight_of("a"), mean.weight_of("b"), mean.weight_of("c")) == (1, 3, 0)
    assert (mean.count, mean.total_weight, mean.keys) == (2, 3, ("a", "b"))


@kinds
def test_determinism_is_named(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    assert mean.accumulator == kind
    expected = "order-independent" if kind == "exact" else "order-dependent"
    assert mean.determinism == expected


@kinds
def test_a_reset_accumulator_starts_afresh(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add(model(1, 1e6), 5)
    mean.reset()
    assert (mean.count, mean.total_weight, mean.keys) == (0, 0, ())
    mean.add(model(2), 3)
    assert fc.same_bits(mean.mean(), fc.weighted_mean([model(2)], [3], accumulator=kind))


ARRAYS: dict[str, Array] = {
    "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3],
    "transposed": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "big-endian": np.arange(5, dtype=">f4"),
    "zero-dimensional": np.array(2.5, np.float32),
    "empty": np.empty((0, 3), np.float32),
    "unaligned": np.frombuffer(b"\0" + np.arange(4, dtype=np.float32).tobytes(), np.uint8)[1:].view(
        np.float32
    ),
    "large integers": np.array([2**63 - 1, -(2**63), 2**53 + 1, 0]),
    "large unsigned": np.array([2**64 - 1, 1, 2**53 + 1], np.uint64),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("block", [1, 2, 1000])
def test_arrays_of_any_layout_are_read_right_and_left_alone(name: str, block: int) -> None:
    array = ARRAYS[name]
    array.flags.writeable = False
    before = array.tobytes()
    mean = fc.WeightedMean(block=block)
    mean.add({"x": array, "y": np.ones(3)}, 3)
    mean.add({"x": array}, 4)
    result = mean.mean()["x"]
    assert result.shape == array.shape
    assert result.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(result, array)
    assert array.tobytes() == before


@kinds
def test_a_numpy_scalar_is_a_zero_dimensional_array(kind: Accumulator) -> None:
    scalar: Any = np.array(1.0, np.float32) + np.float32(1)
    mean = fc.weighted_mean([{"x": scalar}], [3], base={"x": scalar}, accumulator=kind)
    assert mean["x"].shape == ()
    assert mean["x"] == 4.0
    assert fc.diff({"x": scalar}, {"x": scalar})["x"] == 0.0


@kinds
def test_a_memory_mapped_array_is_read_block_by_block(kind: Accumulator, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(50, dtype=np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    mean = fc.WeightedMean(accumulator=kind, block=8)
    mean.add({"x": mapped}, 2)
    assert np.array_equal(mean.mean()["x"], mapped)
    assert type(mean.mean()["x"]) is np.ndarray


@kinds
def test_what_was_added_is_not_kept(kind: Accumulator) -> None:
    params = {"w": np.ones(3, np.float32)}
    mean = fc.WeightedMean(accumulator=kind)
    mean.add(params, 1)
    params["w"][:] = 9
    assert mean.mean()["w"].tolist() == [1, 1, 1]
    mean.mean()["w"][:] = 5
    assert mean.mean()["w"].tolist() == [1, 1, 1]


BAD_UPDATES: list[tuple[Any, Any, fc.Reason, str]] = [
    ({"w": np.ones(2)}, 0, fc.Reason.BAD_WEIGHT, "int or float above zero as weight, got 0"),
    ({"w": np.ones(2)}, -1, fc.Reason.BAD_WEIGHT, "got -1"),
    ({"w": np.ones(2)}, float("nan"), fc.Reason.BAD_WEIGHT, "got nan"),
    ({"w": np.ones(2)}, np.inf, fc.Reason.BAD_WEIGHT, "got inf"),
    ({"w": np.ones(2)}, True, fc.Reason.BAD_WEIGHT, "got True"),
    ({"w": np.ones(2)}, "3", fc.Reason.BAD_WEIGHT, "got '3'"),
    ({"w": np.ones(2)}, None, fc.Reason.BAD_WEIGHT, "got None"),
    ({"w": np.ones(2)}, Fraction(1, 3), fc.Reason.BAD_WEIGHT, "got Fraction(1, 3)"),
    ({"w": np.ones(2)}, np.timedelta64(5, "s"), fc.Reason.BAD_WEIGHT, "timedelta64(5,'s')"),
    ({"w": np.ones(3)}, 1, fc.Reason.SHAPE, "(key 'w'): expected shape (2,), got (3,)"),
    ({"w": np.ones((1,))}, 1, fc.Reason.SHAPE, "expected shape (2,), got (1,)"),
    ({"w": np.ones(2, complex)}, 1, fc.Reason.DTYPE, "got dtype 'complex128'"),
    ({"w": np.ones(2, bool)}, 1, fc.Reason.DTYPE, "got dtype 'bool'"),
    ({"w": np.array(["a", "b"])}, 1, fc.Reason.DTYPE, "got dtype '<U1'"),
    ({"w": np.array([1, None])}, 1, fc.Reason.DTYPE, "got dtype 'object'"),
    ({"w": [1.0, 2.0]}, 1, fc.Reason.DTYPE, "expected a NumPy array, got a list"),
    ({"w": np.ma.array([1.0, 2.0])}, 1, fc.Reason.DTYPE, "got a MaskedArray"),
    ({3: np.ones(2)}, 1, fc.Reason.BAD_NAME, "names that are strings, got 3"),
    ([np.ones(2)], 1, fc.Reason.DTYPE, "a mapping from names to arrays, got a list"),
    ({}, 1, fc.Reason.MISSING_KEYS, "expected at least one parameter, got none"),
    (
        {"w": np.array([1, np.nan])},
        1,
        fc.Reason.NON_FINITE,
        "expected finite numbers, got nan at [1]",
    ),
    ({"w": np.array([-np.inf, 1], np.float16)}, 1, fc.Reason.NON_FINITE, "got -inf at [0]"),
    (
        {"w": np.ones(2), "new": np.array([[1, 2], [3, np.inf]], np.float32)},
        1,
        fc.Reason.NON_FINITE,
        "(key 'new'): expected finite numbers, got inf at [1, 1]",
    ),
]


@kinds
@pytest.mark.parametrize(("params", "weight", "reason", "text"), BAD_UPDATES)
def test_a_bad_update_is_refused_with_its_reason_and_leaves_no_trace(
    kind: Accumulator, params: Any, weight: Any, reason: fc.Reason, text: str
) -> None:
    mean = fc.WeightedMean(accumulator=kind, block=3)
    mean.add({"w": np.array([1.5, 2.5])}, 2)
    before = json.dumps(mean.state()[0]), mean.state()[1]
    with pytest.raises(fc.RefusedUpdate) as caught:
        mean.add(params, weight)
    assert caught.value.reason is reason
    assert text in str(caught.value)
    after = json.dumps(mean.state()[0]), mean.state()[1]
    assert before[0] == after[0]
    assert fc.same_bits(before[1], after[1])
    mean.add({"new": np.ones(1)}, 1)  # the refused shape of "new" has not stuck


def test_a_fixed_spec_names_all_there_is() -> None:
    spec = fc.ModelSpec.of({"w": np.ones(2, np.float16)})
    mean = fc.WeightedMean(spec)
    with pytest.raises(fc.RefusedUpdate, match=r"UNEXPECTED_KEYS \(key 'v'\)"):
        mean.add({"w": np.ones(2), "v": np.ones(2)}, 1)
    mean.add({"w": np.ones(2)}, 1)
    assert mean.mean()["w"].dtype == np.float16
    other = fc.WeightedMean()
    other.add({"v": np.ones(2)}, 1)
    with pytest.raises(fc.UsageError, match="key 'v': the spec does not name it"):
        mean.merge(other)


class Fading(Mapping[str, Array]):
    """A model that can be read a number of times, and never after."""

    def __init__(self, reads: int) -> None:
        self.reads = reads

    def __getitem__(self, key: str) -> Array:
        self.reads -= 1
        if self.reads < 0:
            raise OSError("gone")
        return model(5)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(model(5))

    def __len__(self) -> int:
        return 3


@kinds
@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_mapping_that_fails_while_it_is_read_leaves_no_trace(
    kind: Accumulator, reads: int
) -> None:
    mean = fc.WeightedMean(accumulator=kind, block=2)
    mean.add(model(1), 3)
    before = mean.state()
    with pytest.raises(OSError, match="gone"):
        mean.add(Fading(reads), 1)
    assert mean.state()[0] == before[0]
    assert fc.same_bits(mean.state()[1], before[1])
    mean.add(Fading(3), 1)  # three reads are enough: each array is taken out once


INTERRUPTIONS = """
import signal, sys
import numpy as np
import fedavg_core as fc

kind, operation, threads, moments = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
params = {"w": np.linspace(1, 2, 3 << 20, dtype=np.float32), "new": np.ones(7)}
other = fc.WeightedMean(accumulator=kind)
other.add(params, 0.3)

def begin():
    mean = fc.WeightedMean(accumulator=kind, threads=threads)
    mean.add({"w": params["w"]}, 1)
    return mean

def holds(mean, what):
    return mean.state()[0] == what[0] and fc.same_bits(mean.state()[1], what[1])

mean = begin()
mean.merge(other)
empty, full = begin().state(), mean.state()
mean = begin()

class Interrupted(BaseException):
    pass

def interrupt(*_):
    raise Interrupted

signal.signal(signal.SIGALRM, interrupt)
interruptions = 0
for delay in np.linspace(1e-5, 2e-2, moments):
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        mean.add(params, 0.3) if operation == "add" else mean.merge(other)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        interruptions += 1
    assert holds(mean, full if mean.count == 2 else empty), delay
    if mean.count == 2:
        if kind != "exact":
            mean = begin()
            continue
        mean.remove(params, 0.3)
    assert mean.count == 1 and holds(mean, empty), delay
print(interruptions)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX's interval timer")
@kinds
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("operation", ["add", "merge"])
def test_an_interruption_at_any_moment_leaves_all_or_nothing(
    kind: Accumulator, operation: str, threads: int
) -> None:
    # In a process of its own: an interruption may hit whatever else watches this one at work.
    moments = 40 if THOROUGH else 8
    command = [sys.executable, "-c", INTERRUPTIONS, kind, operation, str(threads), str(moments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("kind", ["exact", "float64", "float32"])
def test_sums_whose_undoing_was_interrupted_say_so_until_they_are_reset(
    kind: Accumulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add(model(1), 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for operation in ("add", "recover"):
        monkeypatch.setattr(type(mean._sums), operation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.add(model(2), 1)
    monkeypatch.undo()
    other = fc.WeightedMean(accumulator=kind)
    for use in (
        mean.mean,
        mean.state,
        lambda: mean.add(model(2), 1),
        lambda: mean.merge(other),
        lambda: other.merge(mean),
    ):
        with pytest.raises(fc.UsageError, match="could not be had back: reset the accumulator"):
            use()
    mean.reset()
    mean.add(model(2), 3)
    assert fc.same_bits(mean.mean(), fc.weighted_mean([model(2)], [3], accumulator=kind))


@pytest.mark.parametrize("to_be_had", range(2))
@kinds
def test_where_no_more_threads_are_to_be_had_fewer_will_do(
    kind: Accumulator, to_be_had: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"w": np.random.default_rng(0).standard_normal(3 << 20, np.float32)}
    mean, expected = (fc.WeightedMean(accumulator=kind, threads=n) for n in (3, 1))
    for one in (mean, expected):
        one.add(large, 600)
    starts = []

    def start(run: Any, arguments: Any) -> None:
        starts.append(run)
        if len(starts) > to_be_had:
            raise RuntimeError("can't start new thread")
        start_new_thread(run, arguments)

    monkeypatch.setattr("fedavg_core.sums.threads.start_new_thread", start)
    mean.add(large, 0.3)
    expected.add(large, 0.3)
    assert len(starts) > to_be_had
    assert mean.count == 2
    assert fc.same_bits(mean.mean(), expected.mean())


@kinds
def test_sums_of_nothing_are_of_nothing_after_an_interrupted_merge(
    kind: Accumulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = fc.WeightedMean(fc.ModelSpec.of(model(1)), accumulator=kind)
    other = fc.WeightedMean(accumulator=kind)
    other.add(model(2), 5)
    whole = type(mean._sums).merge

    def interrupted(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(mean._sums), "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.merge(other)
    monkeypatch.undo()
    assert mean.count == 0
    mean.add(model(3), 7)
    assert fc.same_bits(mean.mean(), fc.weighted_mean([model(3)], [7], accumulator=kind))


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("block", [2, 8, 1 << 10])
def test_rounded_sums_are_those_of_one_addition_after_the_other(
    kind: Accumulator, block: int
) -> None:
    rng = np.random.default_rng(0)
    mean = fc.WeightedMean(accumulator=kind, block=block)
    for last in "i2", "f4":  # after the reset the memory holds what was there before
        mean.reset()
        expected = {key: np.zeros(size, kind) for key, size in (("w", 12), ("b", 1), ("c", 2))}
        for number, dtype in enumerate(("f4", "f2", "f4", "f4", "f2", "f2", "f4", last)):
            params = {
                key: rng.normal(9, 3, one.size).astype(dtype) for key, one in expected.items()
            }
            if number % 3 == 1:
                del params["w" if number == 1 else "b"]
            mean.add(params, 0.3 + number)
            for key, array in params.items():
                expected[key] += array.astype(kind) * np.dtype(kind).type(0.3 + number)
        meta, arrays = mean.state()
        for number, entry in enumerate(meta["keys"]):
            assert np.array_equal(arrays[f"{number}.sum"], expected[entry["name"]])


LARGE_INTEGERS = np.array([(1 << 53) + 1, -(1 << 62) - 5, 3], np.int64)
"""Which float64 cannot hold, so that they are added in two parts."""


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("moment", range(1, 5))
def test_a_rounded_addition_that_is_interrupted_between_two_blocks_is_finished(
    kind: Accumulator, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sent = ({"w": np.linspace(n, 7, 17, dtype=np.float32)} for n in range(2))
    mean, expected = (fc.WeightedMean(accumulator=kind, block=5) for _ in range(2))
    for one in (mean, expected):
        one.add(held, 3)
    add, left = PlainSum.add, [moment]

    def interrupted(total: PlainSum, product: Array) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        add(total, product)

    monkeypatch.setattr(PlainSum, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.add(sent, 0.3)
    assert left[0] == moment - 1 - 4  # each of the four blocks was added to once
    expected.add(sent, 0.3)
    assert mean.count == 2
    assert fc.same_bits(mean.state()[1], expected.state()[1])


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_several_updates_at_once_are_added_to_rounded_sums_in_their_order(
    kind: Accumulator,
) -> None:
    rng = np.random.default_rng(7)
    updates: list[Any] = [
        ({"w": rng.normal(9, 3, 12).astype("f4"), "n": LARGE_INTEGERS + n}, 0.3 + n)
        for n in range(6)
    ]
    del updates[4][0]["w"]
    one_by_one, at_once = (fc.WeightedMean(accumulator=kind, block=5) for _ in range(2))
    for update in updates:
        one_by_one.add(*update)
    at_once.add_many(updates[:1])
    at_once.add_many(updates[1:5])
    at_once.add_many([])
    at_once.add_many(updates[5:])
    assert fc.same_bits(at_once.state()[1], one_by_one.state()[1])


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize(("held", "together"), [(0, 2), (1, 1), (1, 2)])
def test_rounded_sums_are_interrupted_at_any_instruction_before_an_addition_or_after(
    kind: Accumulator, held: int, together: int
) -> None:
    begun = [({"w": model(1)["w"], "n": LARGE_INTEGERS}, 3)][:held]
    sent = [
        ({"w": model(2)["w"], "n": LARGE_INTEGERS}, 0.3),
        ({"new": np.ones(5), "w": model(3)["w"]}, 7),
    ][:together]

    def filled(updates: Any) -> fc.WeightedMean:
        mean = fc.WeightedMean(accumulator=kind, block=2)
        mean.add_many(updates)
        return mean

    before, after = filled(begun).state(), filled([*begun, *sent]).state()
    seen, moment, stop = set(), 0, False
    while not stop:
        moment += 1 if THOROUGH else 7
        mean = filled(begun)
        try:
            with Interruption(moment, "sums.plain_sums", "accumulator") as interruption:
                mean.add_many(sent)
            stop = interruption.left > 0
        except KeyboardInterrupt:
            pass
        seen.add(mean.count)
        meta, arrays = after if mean.count > held else before
        assert mean.state()[0] == meta, moment
        assert fc.same_bits(mean.state()[1], arrays), moment
        if mean.count == held:
            mean.add_many(sent)
            assert fc.same_bits(mean.state()[1], after[1]), moment
    assert seen == {held, held + together}
    assert moment > 500


@pytest.mark.parametrize("kind", ["exact", "float64", "float32"])
@pytest.mark.parametrize("operation", ["add", "merge"])
@pytest.mark.parametrize("block", [2, 1 << 10])
def test_an_interrupted_change_leaves_any_sums_as_they_were_or_as_they_were_to_be(
    kind: Accumulator, operation: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, other = (fc.WeightedMean(accumulator=kind, block=block) for _ in range(2))
    mean.add(model(1), 1)
    other.add(model(2), 5)
    before = mean.state()
    whole = getattr(type(mean._sums), operation)

    def interrupted(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(mean._sums), operation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.add(model(2), 5) if operation == "add" else mean.merge(other)
    monkeypatch.undo()
    if kind != "exact" and operation == "add":  # a rounded addition cannot be taken back
        assert mean.count == 2
    else:
        assert mean.state()[0] == before[0]
        assert fc.same_bits(mean.state()[1], before[1])
        mean.add(model(2), 5)
    expected = fc.WeightedMean(accumulator=kind)
    expected.add(model(1), 1)
    expected.add(model(2), 5)
    assert fc.same_bits(mean.mean(), expected.mean())


@kinds
def test_a_large_model_is_the_same_on_several_threads(kind: Accumulator) -> None:
    large = {"w": np.random.default_rng(0).standard_normal(3 << 20, np.float32)}
    on_one = fc.WeightedMean(accumulator=kind, threads=1)
    on_many = fc.WeightedMean(accumulator=kind, threads=3)
    for mean in (on_one, on_many):
        mean.add(large, 600)
    broken = {"w": large["w"].copy()}
    broken["w"][[3, 1 << 18, -1]] = np.nan
    for mean in (on_one, on_many):
        with pytest.raises(fc.RefusedUpdate, match=r"got nan at \[3\]"):
            mean.add(broken, 7)
        mean.add(large, 0.3)
    assert fc.same_bits(on_one.mean(), on_many.mean())
    assert kind != "exact" or np.array_equal(on_one.mean()["w"], large["w"])


@kinds
def test_of_several_numbers_that_are_not_finite_the_first_is_named(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind, block=8)
    broken = {"w": np.zeros(17, np.float32)}  # in blocks of 6, 6 and 5
    broken["w"][[3, 9, 16]] = np.nan, np.inf, np.nan
    for place in (3, 9, 16):
        with pytest.raises(fc.RefusedUpdate, match=rf"got {broken['w'][place]} at \[{place}\]"):
            mean.add(broken, 1)
        broken["w"][place] = 0.0
    mean.add(broken, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@kinds
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(
    kind: Accumulator, dtype: str
) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    for size in (1, 2, 5, 6):
        for place, bad in itertools.product(range(size), (np.nan, np.inf, -np.inf)):
            values = np.zeros(size, dtype)
            values[place] = bad
            with pytest.raises(fc.RefusedUpdate, match=rf"got {bad} at \[{place}\]"):
                mean.add({str(size): values}, 1)
    large = np.full(5, 1e30 if dtype == "float32" else 1e200, dtype)  # whose squares are infinite
    if (kind, dtype) != ("float32", "float64"):
        mean.add({"w": large}, 1)
        assert np.array_equal(mean.mean()["w"], large)


def test_an_interruption_is_not_hidden_by_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w": np.ones(3 << 20, np.float32)}
    mean = fc.WeightedMean(threads=2)
    mean.add(values, 3)
    before, real, both = mean.digest(), ExactSum.add, threading.Barrier(2)

    def interrupted(total: ExactSum, part: Any, *rest: Any) -> None:
        first = bool(np.isnan(part[0]))
        both.wait(20)
        if not first:
            raise KeyboardInterrupt
        real(total, part, *rest)

    values["w"][0] = np.nan  # refused in the first block, while the second is interrupted
    monkeypatch.setattr(ExactSum, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean.add(values, 3)
    monkeypatch.undo()
    assert mean.digest() == before


@kinds
def test_threads_take_memory_only_where_they_have_work(kind: Accumulator) -> None:
    def taken(threads: int, size: int) -> int:
        values = {"w": np.ones(size, np.float32)}
        mean = fc.WeightedMean(accumulator=kind, threads=threads)
        tracemalloc.start()
        mean.add(values, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert taken(8, 200_000) < 1.1 * taken(1, 200_000)
    assert taken(2, 3 << 20) > 1.1 * taken(1, 3 << 20)


@kinds
def test_a_small_model_may_grow_to_one_for_several_threads(kind: Accumulator) -> None:
    small = {"w": np.arange(9, dtype=np.float32)}
    large = {"w": small["w"], "v": np.arange(3 << 20, dtype=np.float32)}
    mean = fc.WeightedMean(accumulator=kind, threads=3)
    mean.add(small, 5)
    mean.add(large, 5)
    assert fc.same_bits(mean.mean(), large)


def test_removing_an_update_leaves_what_would_be_without_it() -> None:
    mean, without = fc.WeightedMean(), fc.WeightedMean(block=2)
    for seed, weight in ((1, 600), (2, 0.1), (3, 1 << 60)):
        mean.add(model(seed), weight)
        if seed != 2:
            without.add(model(seed), weight)
    mean.remove(model(2), 0.1)
    assert mean.digest() == without.digest()
    assert (mean.count, mean.total_weight) == (without.count, without.total_weight)
    mean.remove(model(1), 600)
    mean.remove(model(3), 1 << 60)
    assert mean.digest() == fc.WeightedMean().digest()


def test_a_digest_does_not_follow_the_interpreters_tables_of_characters() -> None:
    mean = fc.WeightedMean()
    mean.add({"\u00e9\U0001fae8": np.ones(1)}, 2)  # in a literal, one of them depends on Python
    sha = hashlib.sha256(b"fedavg_core sums, format 1")
    sha.update(rb"['\xe9\U0001fae8', [1], 'float64', '2/1']")
    for key, digits in mean._sums.parts("\u00e9\U0001fae8"):
        sha.update(f"[{key}]".encode() + digits.tobytes())
    assert mean.digest() == sha.hexdigest()


def test_what_was_not_added_cannot_be_removed() -> None:
    mean = fc.WeightedMean()
    with pytest.raises(fc.UsageError, match="cannot remove weight 1, which is more than the 0"):
        mean.remove(model(1), 1)
    mean.add(model(1), 2)
    before = mean.digest()
    with pytest.raises(fc.UsageError, match="cannot remove weight 3, which is more than the 2"):
        mean.remove(model(1), 3)
    with pytest.raises(fc.UsageError, match=r"cannot remove weight 2\.1, which is more than the 2"):
        mean.remove(model(1), 2.1)
    with pytest.raises(fc.UsageError, match="cannot remove values that were not added"):
        mean.remove(model(2), 2)
    assert mean.digest() == before


@pytest.mark.parametrize(
    ("added", "removed"),
    [
        ([({"w": 1.0}, 2), ({"w": 3.0}, 3)], [({"w": 9.0}, 4), ({"w": 9.0}, 0.5)]),
        ([({"w": 1.0}, 5)], [({"w": 1.0}, 3)]),
        ([({"w": 1.0, "b": 2.0}, 2)], [({"w": 1.0}, 2)]),
        ([({"w": 1.0, "b": 2.0}, 2), ({"w": 1.0}, 2)], [({"w": 1.0}, 3)]),
    ],
)
def test_what_leaves_more_weight_than_updates_cannot_be_removed(
    added: list[Any], removed: list[Any]
) -> None:
    mean = fc.WeightedMean()
    *some, (last, weight) = [({k: np.ones(1) * v for k, v in p.items()}, w) for p, w in removed]
    for params, by in added:
        mean.add({key: np.ones(1) * value for key, value in params.items()}, by)
    for params, by in some:
        mean.remove(params, by)
    before = mean.digest(), mean.count, mean.total_weight
    with pytest.raises(fc.UsageError, match="cannot remove what was not added: "):
        mean.remove(last, weight)
    assert (mean.digest(), mean.count, mean.total_weight) == before


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("size", [2, 3 << 18])
def test_sums_at_the_end_of_the_range_are_right_or_out_of_range_without_a_warning(
    kind: Accumulator, size: int
) -> None:
    def mean(value: float, *weights: float, dtype: Any = np.float32) -> Any:
        total = fc.WeightedMean(accumulator=kind, threads=2)
        for weight in weights:
            one = fc.WeightedMean(accumulator=kind, threads=2)
            one.add({"x": np.full(size, value, dtype)}, weight)
            total.merge(one)
        return total.mean()["x"]

    assert mean(1e30, 1).max() == np.float32(1e30)
    assert mean(-3e38, 0.5).min() == np.float32(-3e38)
    most = float(np.finfo(kind).max)
    for value, weights in ((0.1, [most, most]), (1e-30, [most, most]), (3e38, [most, 1])):
        with pytest.raises(fc.OutOfRange, match="key 'x': "):
            mean(value, *weights)
    with pytest.raises(fc.OutOfRange, match="the sum of the weights is beyond the largest number"):
        mean(0.1, most, most)
    with pytest.raises(fc.RefusedUpdate, match="NON_FINITE"):
        mean(np.inf, 1)


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_plain_sums_cannot_undo_and_have_no_digest(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    with pytest.raises(fc.UsageError, match=f"remove needs exact sums.*{kind}"):
        mean.remove(model(), 1)
    with pytest.raises(fc.UsageError, match="digest needs exact sums"):
        mean.digest()
    for weight in (10**400, 1e-320, 1e300 if kind == "float32" else 2**1024):
        with pytest.raises(fc.RefusedUpdate, match=f"BAD_WEIGHT.* a sum in {kind} can hold"):
            mean.add(model(), weight)


@kinds
@pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (1000, 4)])
def test_merged_parts_are_the_whole(kind: Accumulator, blocks: tuple[int, int]) -> None:
    left = fc.WeightedMean(accumulator=kind, block=blocks[0])
    right = fc.WeightedMean(accumulator=kind, block=blocks[1])
    left.add({"w": np.ones((3, 4), np.float32)}, 2)
    right.add({**model(3), "w": np.full((3, 4), 4, np.float32)}, 1)
    right.add({"late": np.zeros(9)}, 5)
    left.merge(right)
    assert left.mean()["w"].tolist() == [[2.0] * 4] * 3
    assert np.array_equal(left.mean()["b"], right.mean()["b"])
    assert (left.count, left.total_weight, left.weight_of("w")) == (3, 8, 3)


def test_only_what_another_has_is_merged() -> None:
    left, right = fc.WeightedMean(block=4), fc.WeightedMean(block=64)
    left.add({"a": np.ones(3), "b": np.ones(9)}, 1)
    right.add({"b": np.ones(9)}, 1)
    right.add({"c": np.ones(2)}, 1)
    right.remove({"c": np.ones(2)}, 1)
    left.merge(right)
    assert left.keys == ("a", "b")
    assert (left.weight_of("a"), left.weight_of("b")) == (1, 2)


def test_an_accumulator_can_be_merged_with_itself() -> None:
    mean = fc.WeightedMean()
    mean.add(model(1), 600)
    mean.merge(mean)
    twice = fc.WeightedMean()
    twice.add(model(1), 1200)
    assert mean.digest() == twice.digest()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            fc.WeightedMean(accumulator="float64"),
            "of kind 'exact' to merge, got one of kind 'float64'",
        ),
        ({"w": np.ones(3)}, r"key 'w': expected float64\[2\], got float64\[3\]"),
        ({"w": np.ones(2, np.float32)}, r"expected float64\[2\], got float32\[2\]"),
    ],
)
def test_what_does_not_fit_is_not_merged(other: Any, text: str) -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.ones(2)}, 1)
    before = mean.digest()
    if isinstance(other, dict):
        params, other = other, fc.WeightedMean()
        other.add({"v": np.ones(1), **params}, 1)
    with pytest.raises(fc.UsageError, match=text):
        mean.merge(other)
    assert mean.digest() == before


def test_a_merge_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = fc.WeightedMean(block=2), fc.WeightedMean(block=3)
    left.add(model(1), 600)
    right.add({**model(2), "new": np.ones(4)}, 7)
    before = left.digest()
    from fedavg_core.exact.exact_sum import ExactSum

    real, calls = ExactSum.add_sum, [0]

    def failing(self: ExactSum, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError
        real(self, *args, **kwargs)

    monkeypatch.setattr(ExactSum, "add_sum", failing)
    with pytest.raises(MemoryError):
        left.merge(right)
    monkeypatch.undo()
    assert left.digest() == before
    left.merge(right)
    assert fc.same_bits(
        left.mean(), fc.weighted_mean([{**model(2), "new": np.ones(4)}, model(1)], [7, 600])
    )


@kinds
def test_a_state_goes_through_json_and_comes_back(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    for seed, weight in ((1, 600), (2, 0.1), (3, 1 << 70)):
        mean.add({**model(seed), "odd/../name": np.array([-1e-300 * seed])}, weight)
    meta, arrays = mean.state()
    again = fc.WeightedMean.from_state(json.loads(json.dumps(meta)), arrays)
    assert again.state()[0] == meta
    assert fc.same_bits(again.state()[1], arrays)
    assert fc.same_bits(again.mean(), mean.mean())
    mean.add(model(4), 3)
    again.add(model(4), 3)
    assert fc.same_bits(again.mean(), mean.mean())
    assert (again.count, again.total_weight) == (mean.count, mean.total_weight)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 99}, "expected a state of format 1, got 99"),
        ({"accumulator": "float16"}, "expected accumulator 'exact', 'float64' or 'float32'"),
        ({"accumulator": np.array("float32")}, "expected accumulator 'exact', .* got array"),
        ({"accumulator": np.array(["exact", "x"])}, "expected accumulator 'exact', .* got array"),
        ({"keys": 3}, "expected the state of an accumulator, got TypeError"),
        ({"count": None}, "count: expected a whole number of at least 0, got None"),
        ({"count": -1}, "count: expected a whole number of at least 0, got -1"),
        ({"count": np.inf}, "count: expected a whole number of at least 0, got inf"),
        ({"total_weight": "x/y"}, "expected the state of an accumulator, got ValueError"),
        ({"total_weight": "1/0"}, "expected the state of an accumulator, got ZeroDivisionError"),
        ({"total_weight": "-1/1"}, "weights that 1 updates come to, got a total of -1"),
    ],
)
def test_what_is_no_state_is_refused_in_words(change: dict[str, Any], text: str) -> None:
    mean = fc.WeightedMean()
    mean.add(model(), 1)
    meta, arrays = mean.state()
    with pytest.raises(fc.UsageError, match=text):
        fc.WeightedMean.from_state({**meta, **change}, arrays)
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got KeyError"):
        fc.WeightedMean.from_state({}, arrays)
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator"):
        fc.WeightedMean.from_state(meta, {})


@pytest.mark.parametrize("name", ["junk", "999999", "sign"])
def test_a_rounded_sum_is_one_array(name: str) -> None:
    mean = fc.WeightedMean(accumulator="float64")
    mean.add({"w": np.arange(3.0)}, 2)
    meta, arrays = mean.state()
    meta["keys"][0]["arrays"].append(name)
    with pytest.raises(fc.UsageError, match="expected the array 'sum' alone"):
        fc.WeightedMean.from_state(meta, {**arrays, f"0.{name}": np.ones(3)})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("exact", number) for number in (np.nan, 1e300, -1, 7.5)),
        *itertools.product(("exact", "float64", "float32"), ("scalar", "short", "float16")),
    ],
)
def test_arrays_that_are_no_sums_are_refused(kind: Accumulator, change: Any) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    name = sorted(arrays)[0]
    good = arrays[name]
    bad = {"scalar": good[0], "short": good[:2], "float16": good.astype(np.float16)}.get(
        change, np.full(3, change)
    )
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got ValueError"):
        fc.WeightedMean.from_state(meta, {**arrays, name: bad})
    if kind == "exact":
        signs = {**arrays, "0.sign": np.full(3, 2, np.int8)}
        with pytest.raises(fc.UsageError, match="integers from -1 to 1"):
            fc.WeightedMean.from_state(meta, signs)


@kinds
@pytest.mark.parametrize(
    "shape",
    [[2**45], [10**30], [-3, -1], [3] + [1] * 70, [3.7], ["3"], "3", 3, [], [3, 0], [0, 2**60]],
)
def test_a_shape_that_the_sums_are_not_of_is_refused_before_there_is_room_for_it(
    kind: Accumulator, shape: Any
) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    (entry,) = meta["keys"]
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got"):
        fc.WeightedMean.from_state({**meta, "keys": [{**entry, "shape": shape}]}, arrays)
    bare = {**entry, "shape": shape, "arrays": []}
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got"):
        fc.WeightedMean.from_state({**meta, "keys": [bare]}, arrays)


@pytest.mark.parametrize(
    "weight", ["6/5", "6/-5", "0/1", "-1/1", "-1/2", "1/0", "1", "", "x/1", 1, None]
)
def test_a_weight_that_none_can_be_is_refused_in_a_state(weight: Any) -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    (entry,) = meta["keys"]
    told = "expected the state of an accumulator, got|key 'w': expected a weight above zero, got"
    with pytest.raises(fc.UsageError, match=told):
        fc.WeightedMean.from_state({**meta, "keys": [{**entry, "weight": weight}]}, arrays)


@pytest.mark.parametrize(
    "name", ["30000", "1000000000", "-1000000000", "43", "-684", "00", "+0", " 0", "0_0", "x", 0]
)
def test_digits_that_no_sum_has_are_refused(name: Any) -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    (entry,) = meta["keys"]
    named = {**entry, "arrays": [*entry["arrays"], name]}
    more = {**arrays, f"0.{name}": np.ones(3, np.int32)}
    with pytest.raises(fc.UsageError, match="expected the state of an accumulator, got ValueError"):
        fc.WeightedMean.from_state({**meta, "keys": [named]}, more)


@pytest.mark.parametrize("value", [5e-324, np.finfo(np.float64).max])
@pytest.mark.parametrize(
    "weights",
    [
        [1],
        [5e-324],
        [np.finfo(np.float64).max] * 3,
        [0.1, 1 - 0.1],
        [Fraction(2**2000 - 1, 2**2000), Fraction(1, 2**2000)],
        [Fraction(1, 2**9000)],
        [2**9000] * 9,
    ],
)
def test_a_state_of_the_largest_and_the_smallest_sums_comes_back(
    weights: Any, value: float
) -> None:
    mean = fc.WeightedMean()
    for weight in weights:
        mean.add({"w": np.array([value, -value])}, weight)
    again = fc.WeightedMean.from_state(*mean.state())
    assert again.digest() == mean.digest()
    assert fc.same_bits(again.mean(), mean.mean())


def test_the_outermost_digits_that_a_state_may_have_are_taken() -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    (entry,) = meta["keys"]
    names = [*entry["arrays"], "42", "-682"]
    more = {**arrays, **{f"0.{k}": np.ones(3, np.int32) for k in names[-2:]}}
    again = fc.WeightedMean.from_state({**meta, "keys": [{**entry, "arrays": names}]}, more)
    told = again.state()[0]["keys"][0]["arrays"]
    assert {"42", "-682"} < set(told)
    assert again.mean()["w"][0] == 0
    assert again.mean()["w"][1] == 2.0**1008


def test_a_state_s_names_are_new_strings() -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.arange(3.0)}, 1)
    meta, arrays = mean.state()
    (entry,) = meta["keys"]
    for keys in ([{**entry, "name": 7}], [entry, entry]):
        with pytest.raises(fc.UsageError, match="expected a new name of a parameter, got"):
            fc.WeightedMean.from_state({**meta, "keys": keys}, arrays)
    with pytest.raises(fc.UsageError, match="key 'w': the spec does not name it"):
        fc.WeightedMean.from_state(meta, arrays, fc.ModelSpec.of({"v": np.ones(1)}))


def test_a_state_must_fit_the_spec_that_is_asked_for() -> None:
    mean = fc.WeightedMean()
    mean.add({"w": np.ones(2, np.float32)}, 1)
    spec = fc.ModelSpec({"w": ArraySpec((2,), np.dtype(np.float64))})
    with pytest.raises(fc.UsageError, match=r"key 'w': expected float64\[2\], got float32\[2\]"):
        fc.WeightedMean.from_state(*mean.state(), spec)
    fits = fc.ModelSpec.of({"w": np.ones(2, np.float32), "v": np.ones(1)})
    assert fc.WeightedMean.from_state(*mean.state(), fits).digest() == mean.digest()


@kinds
def test_a_result_beyond_its_dtype_is_an_error_and_not_an_infinity(kind: Accumulator) -> None:
    for dtype in (np.float16, np.float32, np.float64) if kind == "exact" else (np.float16,):
        largest = np.finfo(dtype).max
        base = {"x": np.array([[0, largest]], dtype)}
        mean = fc.WeightedMean(accumulator=kind)
        mean.add({"x": np.array([[0, largest]], dtype)}, 1)
        with pytest.raises(fc.OutOfRange, match=rf"key 'x': .* \[0, 1\] .* {np.dtype(dtype)}"):
            mean.mean(base)
        assert mean.mean()["x"].tolist() == base["x"].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight", [0.5, 1, 2, 3, 600, 1024])
def test_the_largest_number_comes_out_and_half_a_step_more_does_not(
    dtype: Any, weight: Any
) -> None:
    number = fc.ModelSpec.of({"x": np.ones(1, dtype)})["x"].number
    largest = np.array([number.largest], dtype)
    half = np.array([number.largest * 2.0**-number.precision])  # rounds down: less than half a step
    mean = fc.WeightedMean()
    mean.add({"x": half / 2}, weight)
    assert mean.mean({"x": largest})["x"] == largest
    mean.reset()
    mean.add({"x": half * 2}, weight)
    with pytest.raises(fc.OutOfRange):
        mean.mean({"x": largest})


@kinds
@pytest.mark.parametrize(("start", "step"), [(100, 28), (-100, -29)])
def test_an_integer_beyond_its_dtype_is_an_error(kind: Accumulator, start: int, step: int) -> None:
    base = {"x": np.array([start], np.int8)}
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"x": np.array([step])}, 1)
    with pytest.raises(fc.OutOfRange, match="beyond the largest number of int8"):
        mean.mean(base)
    mean.add({"x": np.array([step - step // abs(step) * 2])}, 1)
    assert mean.mean(base)["x"].tolist() == [start + step - step // abs(step)]


def test_a_mean_of_nothing_needs_a_base() -> None:
    with pytest.raises(fc.UsageError, match="expected at least one update before the mean"):
        fc.WeightedMean().mean()
    base = {"x": np.arange(3)}
    assert fc.same_bits(fc.WeightedMean().mean(base), base)
    with pytest.raises(fc.UsageError, match="one for each model, got 2"):
        fc.weighted_mean([base], [1, 2])
    with pytest.raises(
        fc.UsageError, match="weights: expected a list of 1, one for each model, got 3"
    ):
        fc.weighted_mean([base], 3)  # type: ignore[arg-type]
    with pytest.raises(
        fc.RefusedUpdate, match=r"NON_FINITE \(contributor 'models\[1\]', key 'x'\)"
    ):
        fc.weighted_mean([base, {"x": np.array([1, np.nan, 2])}], [1, 2])
    with pytest.raises(fc.UsageError, match="expected at least one update"):
        fc.weighted_mean([], [])


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ({}, "key 'w': the base does not have it"),
        ({"w": ["a"]}, "key 'w': expected a NumPy array in the base, got a list"),
        ([1.0], "expected a model as a mapping from names to arrays, got a list"),
        ({"w": np.ones(3)}, r"key 'w': expected a base of shape \(2,\), got \(3,\)"),
        ({"w": np.array([1, np.nan])}, "expected a base of finite numbers"),
        ([1], "expected a model as a mapping"),
    ],
)
@kinds
def test_a_base_that_does_not_fit_is_named(kind: Accumulator, base: Any, text: str) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"w": np.ones(2)}, 1)
    before = mean.state()[1]
    with pytest.raises(fc.UsageError, match=text):
        mean.mean(base)
    assert fc.same_bits(mean.state()[1], before)


def test_small_arrays_of_two_weights_take_no_more_memory_than_of_one() -> None:
    names = [f"w{number}" for number in range(1000)]
    mean, single = fc.WeightedMean(), fc.WeightedMean()
    for one in (mean, single):
        one.add({name: np.ones(100, np.float32) for name in names}, 1)
    mean.add({name: np.full(100, 3, np.float32) for name in names[1:]}, 3)
    peaks = []
    for one in (single, mean):
        tracemalloc.start()
        found = one.mean()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (found["w0"] == 1).all()
    assert all((found[name] == 2.5).all() for name in names[1:])
    assert peaks[1] < 20 * 4 * 100 * len(names)


@kinds
def test_sums_that_no_memory_holds_are_refused_at_once(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add(model(1), 1)
    before = mean.mean()
    for size in (2**59, 2**62):
        with pytest.raises(MemoryError):
            mean.add({"x": np.broadcast_to(np.uint8(1), (size,))}, 1)
    assert fc.same_bits(mean.mean(), before)


def test_bad_settings_are_named() -> None:
    bad: Any = "float16"
    with pytest.raises(fc.UsageError, match="got 'float16'"):
        fc.WeightedMean(accumulator=bad)
    with pytest.raises(fc.UsageError, match=r"block: .* of at least 1, got 0"):
        fc.WeightedMean(block=0)
    with pytest.raises(fc.UsageError, match=r"threads: .* of at least 1, got 0"):
        fc.WeightedMean(threads=0)
    with pytest.raises(fc.UsageError, match=r"threads: .* of at least 1, got True"):
        fc.WeightedMean(threads=True)
    narrow: Any = np.uint8(200)
    small = fc.WeightedMean(block=narrow, threads=narrow)
    small.add({"w": np.ones(1000)}, 3)
    assert fc.same_bits(small.mean(), {"w": np.ones(1000)})
    with pytest.raises(fc.UsageError, match=r"expected a ModelSpec .*, got a dict"):
        fc.WeightedMean({"w": np.ones(2)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "exact"),
    [
        (3, 3),
        (np.int8(3), 3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (2.0, 2),
        (0.1, Fraction(0.1)),
        (np.float32(0.1), Fraction(float(np.float32(0.1)))),
        (np.float16(0.5), Fraction(1, 2)),
        (10**400, 10**400),
        (np.longdouble(0.5), Fraction(1, 2)),
        (Fraction(3, 8), Fraction(3, 8)),
        (Fraction(6, 2), 3),
    ],
)
def test_a_weight_is_taken_at_its_exact_value(weight: Any, exact: Fraction) -> None:
    assert exact_weight(weight) == exact


def test_what_a_weight_of_a_subclass_says_of_itself_is_not_believed() -> None:
    class Real(float):
        def as_integer_ratio(self) -> tuple[int, int]:
            return 1, 3

    assert exact_weight(Liar(3)) == 3
    assert exact_weight(Real(0.5)) == Fraction(1, 2)


OPERATIONS = {
    "add": "fedavg_core.exact.exact_sum.ExactSum.add",
    "merge": "fedavg_core.exact.exact_sum.ExactSum.add_sum",
    "mean": "fedavg_core.sums.exact_sums.quotient",
}


@pytest.mark.parametrize("key", range(20))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_any_key_of_an_operation_leaves_the_state_as_it_was(
    operation: str, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twenty(seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {f"k{i}": rng.standard_normal(4).astype(np.float32) for i in range(20)}

    mean, other = fc.WeightedMean(block=4), fc.WeightedMean(block=4)  # a block for each key
    mean.add(twenty(1), 600)
    other.add(twenty(2), 7)
    before, result = mean.digest(), mean.mean()
    module, _, name = OPERATIONS[operation].rpartition(".")
    owner: Any = locate(module)
    real, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == key + 1:
            raise MemoryError
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(MemoryError):
        {"add": lambda: mean.add(twenty(3), 5), "merge": lambda: mean.merge(other)}.get(
            operation, mean.mean
        )()
    monkeypatch.undo()
    assert mean.digest() == before
    assert fc.same_bits(mean.mean(), result)


@kinds
def test_an_update_may_bring_some_of_many_blocks(kind: Accumulator) -> None:
    whole, part = model(1), {"w": model(2)["w"]}
    cut = fc.WeightedMean(fc.ModelSpec.of(whole), accumulator=kind, block=4)
    cut.add_many([(part, 3), (whole, 2), (part, 5)])
    cut.add(part, 7)
    uncut = fc.WeightedMean(fc.ModelSpec.of(whole), accumulator=kind)
    for params, weight in ((part, 3), (whole, 2), (part, 5), (part, 7)):
        uncut.add(params, weight)
    assert fc.same_bits(cut.mean(), uncut.mean())
    assert cut.weight_of("b") == 2
    assert cut.weight_of("w") == 17


def test_a_weight_of_any_size_that_was_not_added_cannot_be_removed() -> None:
    mean = fc.WeightedMean()
    mean.add(model(1), 10**400)
    with pytest.raises(fc.UsageError, match="which is more than the 1000"):
        mean.remove(model(1), 10**401)


def test_a_copy_shares_nothing() -> None:
    mean = fc.WeightedMean()
    mean.add(model(1), 1)
    before = mean.digest()
    copy.copy(mean).add(model(2), 3)
    assert (mean.count, mean.digest()) == (1, before)


def test_a_merge_that_fails_is_undone_where_the_other_holds_zeros_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mean, other = fc.WeightedMean(), fc.WeightedMean()
    for key, value in (("a", 0.0), ("b", 1.0), ("c", 1.0)):
        other.add({key: np.full(3, value, np.float32)}, 1)
    mean.add({key: np.ones(3, np.float32) for key in "abc"}, 1)
    before = mean.digest()
    real, calls = ExactSum.add_sum, [0]

    def failing(self: ExactSum, *args: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        real(self, *args, **named)

    monkeypatch.setattr(ExactSum, "add_sum", failing)
    with pytest.raises(MemoryError):
        mean.merge(other)
    monkeypatch.undo()
    assert (mean.count, mean.digest()) == (1, before)
    assert mean.mean()["b"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_rounded_sums_of_large_integers_do_not_show_the_blocks(kind: Accumulator) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(2**33, 2**53, 64, dtype=np.int64) * rng.choice([-1, 1], 64)
    values[[5, 40]] = 2**62 + 1, -(2**53)
    states = []
    for block in (1, 3, 64):
        mean = fc.WeightedMean(accumulator=kind, block=block)
        for weight in (3, 7, 11):
            mean.add({"n": values // weight}, weight)
        states.append(mean.state()[1])
    assert fc.same_bits(states[0], states[2])
    assert fc.same_bits(states[1], states[2])


def test_a_refused_update_is_let_go_at_once() -> None:
    mean = fc.WeightedMean()
    mean.add({"x": np.ones(8, np.float32)}, 1)
    array = np.full(8, np.nan, np.float32)
    alive = weakref.ref(array)
    gc.disable()
    try:
        with contextlib.suppress(fc.RefusedUpdate):
            mean.add({"x": array}, 1)
        del array
        assert alive() is None
    finally:
        gc.enable()


def test_a_reset_lets_go_of_what_one_odd_update_asked_for() -> None:
    mean = fc.WeightedMean()
    values = np.ones(1 << 12, np.float32)
    mean.add({"x": values}, 3**640)
    wide = len(mean.state()[1])
    assert wide > 30
    mean.reset()
    assert all(len(total.limbs) <= 3 for _, total in mean._sums._blocks)


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_rounded_sums_that_have_overflowed_can_be_stored(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"w": np.array([3e38, 1e308 if kind == "float64" else 1.0])}, 1000)
    again = fc.WeightedMean.from_state(*mean.state())
    for one in (mean, again):
        with pytest.raises(fc.OutOfRange, match="key 'w': the result at"):
            one.mean()


@kinds
def test_a_matrix_is_an_array_of_two_dimensions(kind: Accumulator) -> None:
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"w": matrix}, 1)
    mean.add({"w": matrix}, 2)
    for base in (None, {"w": matrix}):
        found = mean.mean(base)["w"]
        assert type(found) is np.ndarray
        assert found.tolist() == (np.asarray(matrix) * (1 if base is None else 2)).tolist()


class TestTwoErrors:
    """What is interrupted, and then again while that is made good."""

    def broken(self, monkeypatch: pytest.MonkeyPatch) -> fc.WeightedMean:
        """A mean of one update, in which another one is half."""
        mean = fc.WeightedMean(threads=1)
        mean.add({"w": np.array([1.0, 2.0])}, 1)
        deposit = ExactSum._deposit

        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:

            def deposit_once(total: ExactSum, *given: Any) -> None:
                deposit(total, *given)
                patch.setattr(ExactSum, "_room", interrupt)
                raise KeyboardInterrupt

            patch.setattr(ExactSum, "_deposit", deposit_once)
            with pytest.raises(KeyboardInterrupt):
                mean.add({"w": np.array([1.1, 2.3]), "v": np.ones(2)}, 3)
        return mean

    def test_the_sums_say_that_they_are_unusable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mean = self.broken(monkeypatch)
        assert mean.count == 1
        for use in (mean.mean, mean.digest, mean.state, lambda: mean.add({"w": np.ones(2)}, 1)):
            with pytest.raises(fc.UsageError, match="expected a whole sum"):
                use()

    def test_after_a_reset_they_are_like_new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mean, other = self.broken(monkeypatch), fc.WeightedMean()
        mean.reset()
        for one in (mean, other):
            one.add({"v": np.arange(3.0), "w": np.ones(2)}, 2)
        assert mean.digest() == other.digest()
        assert fc.same_bits(mean.mean(), other.mean())
        again = fc.WeightedMean.from_state(*mean.state())
        assert again.digest() == other.digest()

    def test_a_new_array_that_was_never_added_leaves_no_room_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        mean = fc.WeightedMean(threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(ExactSums, "add", interrupt)
            patch.setattr(ExactSums, "recover", interrupt)
            with pytest.raises(KeyboardInterrupt):
                mean.add({"w": np.ones(3)}, 1)
        mean.reset()
        mean.add({"w": np.ones(2)}, 1)  # of another shape, as nothing is known of it
        assert fc.WeightedMean.from_state(*mean.state()).mean()["w"].tolist() == [1.0, 1.0]

    def test_a_removal_of_what_was_not_added_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mean = fc.WeightedMean(threads=1)
        mean.add({"w": np.array([1.0])}, 1)
        before = mean.digest()

        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ExactSums, "is_zero", interrupt)
            with pytest.raises(KeyboardInterrupt):
                mean.remove({"w": np.array([5.0])}, 1)
        assert mean.digest() == before
        with pytest.raises(fc.UsageError, match="cannot remove values that were not added"):
            mean.remove({"w": np.array([5.0])}, 1)
        assert mean.digest() == before
        mean.remove({"w": np.array([1.0])}, 1)
        assert mean.count == 0


@kinds
def test_nothing_but_an_accumulator_is_merged(kind: Accumulator) -> None:
    with pytest.raises(fc.UsageError, match="expected an accumulator to merge, got None"):
        fc.WeightedMean(accumulator=kind).merge(None)  # type: ignore[arg-type]


GOOD = {"w": np.ones(9, np.float32)}


@pytest.mark.parametrize(
    "make",
    [
        fc.WeightedMean,
        lambda: fc.WeightedMean(accumulator="float64", block=2),
        lambda: fc.WeightedMean(accumulator="float32", block=2),
        fc.CoordinateMedian,
        lambda: fc.ClippedMean(9.0),
    ],
)
@pytest.mark.parametrize(
    ("params", "weight"),
    [
        ({"w": np.array([1, 2, 3, 4, 5, 6, 7, np.nan, 9], np.float32)}, 1),
        ({"w": np.ones(8, np.float32)}, 1),
        (GOOD, -1),
        ({"w": np.full(9, "x")}, 1),
    ],
)
def test_of_several_updates_the_refusal_says_which_is_unfit(
    make: Callable[[], Any], params: Any, weight: float
) -> None:
    mean = make()
    mean.add(GOOD, 2)
    before = mean.digest() if mean.determinism == "order-independent" else None
    with pytest.raises(fc.RefusedUpdate) as alone:
        mean.add(params, weight)
    assert alone.value.contributor is None
    with pytest.raises(fc.RefusedUpdate) as among:
        mean.add_many([(GOOD, 1), (GOOD, 3), (params, weight), (GOOD, 1)])
    assert among.value.contributor == "updates[2]"
    assert str(among.value.placed(contributor="a")) == str(alone.value.placed(contributor="a"))
    assert mean.count == 1
    assert before is None or mean.digest() == before


@pytest.mark.parametrize("limit", [1.0, 1e9])
def test_updates_that_do_not_match_each_other_are_counted_as_they_came(limit: float) -> None:
    clipped = fc.ClippedMean(limit)
    other = {"w": np.ones(3)}
    with pytest.raises(fc.RefusedUpdate, match=r"SHAPE \(contributor 'updates\[1\]', key 'w'\)"):
        clipped.add_many([(GOOD, 1), (other, 1)])
    clipped.add(GOOD, 1)
    with pytest.raises(fc.RefusedUpdate, match=r"SHAPE \(key 'w'\)"):
        clipped.add(other, 1)
    assert clipped.count == 1


@pytest.mark.parametrize(("kind", "weight"), [("float64", 1e300), ("float32", 1e29)])
@pytest.mark.parametrize("block", [2, 1 << 10])
def test_an_element_beyond_a_rounded_sum_says_nothing_of_the_others_in_its_block(
    kind: Accumulator, weight: float, block: int
) -> None:
    mean = fc.WeightedMean(accumulator=kind, block=block)
    mean.add({"a": np.array([1 << 60, 1]), "b": np.ones(2, np.float32)}, weight)
    state = mean.state()[1]
    assert state["0.sum"].tolist() == [np.inf, np.dtype(kind).type(weight)]
    assert state["1.sum"].tolist() == [np.dtype(kind).type(weight)] * 2


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_of_several_updates_the_refusal_says_whose_weight_a_rounded_sum_cannot_hold(
    kind: Accumulator,
) -> None:
    with pytest.raises(fc.RefusedUpdate, match=r"contributor 'updates\[1\]'.*a sum in float"):
        fc.WeightedMean(accumulator=kind).add_many([(GOOD, 1), (GOOD, 5e-324)])


@pytest.mark.parametrize("number", [0, 1])
def test_of_several_models_the_refusal_says_which_is_unfit(number: int) -> None:
    models = [GOOD, GOOD]
    models[number] = {"w": np.full(9, np.inf)}
    for some in models, models[number:][:1]:
        place = rf"contributor 'models\[{len(some) - 1 and number}\]'"
        with pytest.raises(fc.RefusedUpdate, match=place):
            fc.weighted_mean(some, [1] * len(some))


@pytest.mark.parametrize("make", [fc.WeightedMean, fc.CoordinateMedian, lambda: fc.ClippedMean(9)])
@pytest.mark.parametrize(
    ("updates", "told"),
    [
        ([GOOD], r"updates\[0\]: expected a pair of params and weight, got a dict"),
        ((GOOD, 1), r"updates\[0\]: expected a pair of params and weight, got a dict"),
        (
            [(GOOD, 1), (GOOD, 1, 1)],
            r"updates\[1\]: .*, got a tuple of .* and an int and an int",
        ),
        ([(GOOD, 1), [1, GOOD]], r"updates\[1\]: .*, got a list of an int and a dict"),
        ([()], r"updates\[0\]: .*, got a tuple of nothing"),
        ([(GOOD, 1), 3], r"updates\[1\]: .*, got an int"),
        (3, "updates: expected pairs of params and weight, got an int"),
        (None, "updates: expected pairs of params and weight, got a NoneType"),
        (np.array(3), "updates: expected pairs of params and weight, got a ndarray"),
    ],
)
def test_updates_that_come_without_their_weights_are_a_mistake(
    make: Callable[[], Any], updates: Any, told: str
) -> None:
    mean = make()
    with pytest.raises(fc.UsageError, match=told):
        mean.add_many(updates)
    assert mean.count == 0


@pytest.mark.parametrize(
    ("models", "weights", "told"),
    [
        ([GOOD, GOOD], [1], "weights: expected a list of 2, one for each model, got 1"),
        ([GOOD, GOOD], 3, "weights: expected a list of 2, one for each model, got 3"),
        (GOOD, [1], "models: expected a list of them, got {'w'"),
        (None, [1], "models: expected a list of them, got None"),
        (np.array(3), [1], "models: expected a list of them, got array"),
        ([GOOD], np.array(1), r"weights: expected a list of 1, one for each model, got array\(1\)"),
    ],
)
def test_models_that_are_no_list_or_have_not_a_weight_each_are_a_mistake(
    models: Any, weights: Any, told: str
) -> None:
    with pytest.raises(fc.UsageError, match=told):
        fc.weighted_mean(models, weights)


@kinds
def test_a_base_that_is_not_finite_is_named_with_its_place(kind: Accumulator) -> None:
    mean = fc.WeightedMean(accumulator=kind)
    mean.add({"a": np.ones(2), "b": np.ones((2, 2))}, 1)
    base = {"a": np.ones(2), "b": np.array([[1, 2], [np.inf, np.nan]])}
    told = r"key 'b': expected a base of finite numbers, got inf at \[1, 0\]"
    with pytest.raises(fc.UsageError, match=told):
        mean.mean(base)
