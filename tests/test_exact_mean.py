"""The exact mean on many cases at once: whole formats, orders, merge trees, platforms."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fedavg_core import OutOfRange
from fedavg_core.accumulator import WeightedMean, weighted_mean
from fedavg_core.comparison import same_bits
from fedavg_core.exact.exact_sum import ExactSum
from fedavg_core.exact.products import Scratch
from fedavg_core.model import ArraySpec, ModelSpec, dtype_named, number_format
from fedavg_core.testing import (
    averaged_dtypes,
    exact_weighted_mean,
    exact_weighted_mean_by_mantissas,
)
from tests.conftest import THOROUGH

ROOT = Path(__file__).parent.parent
FLOATS = [dtype for dtype in averaged_dtypes() if dtype.kind not in "iu"]
NARROW = [dtype for dtype in FLOATS if dtype.itemsize <= 2]

Array = npt.NDArray[Any]


def accumulated(
    models: Sequence[dict[str, Array]], weights: Sequence[float], block: int = 1 << 17
) -> WeightedMean:
    result = WeightedMean(block=block)
    for model, weight in zip(models, weights, strict=True):
        result.add(model, weight)
    return result


def finite_numbers(dtype: np.dtype[Any]) -> Array:
    """Every finite number of a format, from the format's own conversion to float64."""
    codes = np.arange(1 << (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    numbers: Array = codes.view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(numbers.astype(np.float64))
    return numbers[finite]


def without_negative_zero(numbers: Array) -> Array:
    cleared: Array = numbers.copy()
    cleared[numbers.astype(np.float64) == 0] = 0
    return cleared


def test_there_are_63_488_finite_float16_numbers() -> None:
    assert finite_numbers(np.dtype(np.float16)).size == 63_488


@pytest.mark.parametrize(
    "weights", [[1], [3, 7], [0.1, 0.2, 0.7], [2**60, 1], [1e300, 1e-300, 5e-324]], ids=str
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_of_a_narrow_float_goes_in_and_comes_back(
    dtype: np.dtype[Any], weights: list[float]
) -> None:
    numbers = finite_numbers(dtype)
    got = accumulated([{"w": numbers}] * len(weights), weights).mean()["w"]
    assert same_bits({"w": got}, {"w": without_negative_zero(numbers)})


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_between_neighbours_the_mean_is_the_even_one_unless_tipped(dtype: np.dtype[Any]) -> None:
    unsigned = f"u{dtype.itemsize}"
    numbers = finite_numbers(dtype)
    sizes = numbers.view(unsigned)
    for side in (numbers[sizes < sizes.max() // 2 + 1], numbers[sizes > sizes.max() // 2 + 1]):
        codes = np.sort(side.view(unsigned))
        codes = codes[codes.view(dtype).astype(np.float64) != 0]
        lower, upper = codes[:-1].view(dtype), codes[1:].view(dtype)
        even = np.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
        for weights, expected in (
            ([1, 1], even),
            ([0.1, 0.1], even),
            ([2**70, 2**70 + 1], codes[1:]),
            ([2**70 + 1, 2**70], codes[:-1]),
            ([1 + 2.0**-52, 1.0], codes[:-1]),
        ):
            got = accumulated([{"w": lower}, {"w": upper}], weights).mean()["w"]
            assert np.array_equal(got.view(unsigned), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_across_the_seam_of_normal_and_subnormal_numbers_no_bit_is_wrong(
    dtype: np.dtype[Any],
) -> None:
    format_ = number_format(dtype)
    assert format_ is not None
    source = random.Random(f"seam {dtype}")
    for exponent in range(format_.least_exponent - 3, format_.least_exponent + 5):
        models = []
        for _ in range(3):
            numbers = [source.choice((-1, 1)) * (1 + source.random()) for _ in range(40)]
            models.append({"w": np.ldexp(numbers, exponent).astype(dtype)})
        for weights in (
            [source.randint(1, 1000) for _ in models],
            [source.getrandbits(60) | 1 for _ in models],
            [source.random() for _ in models],
        ):
            expected = exact_weighted_mean_by_mantissas(models, weights)
            assert same_bits(accumulated(models, weights).mean(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_range_ends_half_a_step_beyond_the_largest_number(dtype: np.dtype[Any]) -> None:
    format_ = number_format(dtype)
    assert format_ is not None
    code = np.array([format_.largest]).astype(dtype).view(f"u{dtype.itemsize}")
    before = (code - code.dtype.type(1)).view(dtype).astype(np.float64)
    step = format_.largest - float(before[0])
    for sign, at in ((1.0, 0), (-1.0, 2)):
        base = np.ones(3)
        base[at] = sign * format_.largest
        difference = np.zeros(3)
        difference[at] = sign * step / 2
        acc = accumulated([{"w": difference}, {"w": difference * 0}], [10**9, 1])
        assert same_bits(acc.mean({"w": base.astype(dtype)}), {"w": base.astype(dtype)})
        for beyond, weight in ((1.0, 1), (1.0 + 2.0**-40, 3), (2.0, 0.1), (1.9, 2**70)):
            acc = accumulated([{"w": difference * beyond}], [weight])
            if beyond == 1.0 and int(code[0]) % 2 == 0:  # the largest number is the even one
                assert same_bits(acc.mean({"w": base.astype(dtype)}), {"w": base.astype(dtype)})
                continue
            with pytest.raises(OutOfRange, match=rf"key 'w': the result at \[{at}\] is beyond"):
                acc.mean({"w": base.astype(dtype)})


# Order. Six updates; for each dtype a model with an array for each fill, in many orders, each split
# over accumulators, whose blocks hold all arrays together or each by itself.

ORDER_DTYPES = [np.dtype(d) for d in ("f2", "f4", "f8", "i8", "u1", ml_dtypes.bfloat16)]
FILLS = ("plain", "wide", "cancelling", "tiny", "near the largest", "ties", "equal", "sparse")
SPLITS = ((6,), (1, 5), (3, 3), (2, 2, 2), (1, 1, 4), (1, 1, 1, 1, 1, 1))
BLOCKS = (1 << 17, 24)
ORDERS = 16 if THOROUGH else 2


def filled(fill: str, dtype: np.dtype[Any], seed: int) -> list[dict[str, Array]]:
    """Six arrays of 24 numbers."""
    source = random.Random(f"{fill} {dtype} {seed}")

    def number(i: int) -> float:
        plain = source.uniform(-1, 1)
        if fill == "wide":
            return plain * 2.0 ** source.randint(-20, 14)
        if fill == "tiny":
            return plain * 2.0 ** (-1070 if dtype.itemsize == 8 else -20)
        if fill == "near the largest":
            return 65504 * (1 - abs(plain) / 1024) * source.choice((-1, 1))
        if fill == "ties":
            return 1.0 + source.choice((0, 1, 2)) * 2.0**-10
        if fill == "sparse":
            return plain if source.random() < 0.1 else 0.0
        return plain

    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        rows = [[source.randint(info.min, info.max) for _ in range(24)] for _ in range(6)]
        if fill in ("plain", "ties", "sparse", "tiny"):
            rows = [[n % 4 for n in row] for row in rows]
        arrays = [np.array(row, dtype) for row in rows]
    else:
        arrays = [np.array([number(i) for i in range(24)]).astype(dtype) for _ in range(6)]
    if fill == "cancelling" and dtype.kind != "u":
        arrays[3:] = [-array for array in arrays[:3]]
        arrays[5] = arrays[5] + arrays[5].dtype.type(1)
    if fill == "equal":
        arrays = arrays[:1] * 6
    return [{"w": array} for array in arrays]


def test_no_order_split_or_block_size_changes_a_bit() -> None:
    cases = 0
    for dtype in ORDER_DTYPES:
        arrays = {fill: filled(fill, dtype, 1) for fill in FILLS}
        models = [{fill: arrays[fill][i]["w"] for fill in FILLS} for i in range(6)]
        source = random.Random(f"weights {dtype}")
        weights: list[float] = [source.randint(1, 10**6) for _ in models]
        weights[1] = source.random()
        weights[3] = weights[0]
        expected = exact_weighted_mean_by_mantissas(models, weights)
        digest = accumulated(models, weights).digest()
        order = list(range(6))
        for turn in range(ORDERS):
            source.shuffle(order)
            for split in SPLITS:
                ends = list(itertools.accumulate(split))
                parts = [order[end - size : end] for size, end in zip(split, ends, strict=True)]
                accs = [
                    accumulated(
                        [models[i] for i in part],
                        [weights[i] for i in part],
                        block=BLOCKS[(turn + k) % len(BLOCKS)],
                    )
                    for k, part in enumerate(parts)
                ]
                for other in accs[1:]:
                    accs[0].merge(other)
                assert same_bits(accs[0].mean(), expected), (dtype, order, split)
                cases += len(FILLS)
            assert accs[0].digest() == digest
    assert cases >= (4_500 if THOROUGH else 500)


def test_random_merge_trees_end_in_the_same_bits() -> None:
    source = random.Random(7)
    models = [
        {
            "a": filled(fill, np.dtype("f4"), seed)[0]["w"],
            "b": filled(fill, np.dtype("f8"), seed)[0]["w"].reshape(4, 6),
        }
        for seed, fill in enumerate(("plain", "wide", "cancelling", "near the largest", "sparse"))
    ]
    models.append({"b": -models[1]["b"]})
    weights = [3, 0.1, 2**60, 1e-3, 1e200, 7]
    whole = accumulated(models, weights)
    expected = exact_weighted_mean_by_mantissas(models, weights)
    digest = whole.digest()
    assert same_bits(whole.mean(), expected)
    states = [accumulated([m], [w]).state() for m, w in zip(models, weights, strict=True)]
    for tree in range(1_000 if THOROUGH else 100):
        parts = [WeightedMean.from_state(*state) for state in states]
        while len(parts) > 1:
            taken = parts.pop(source.randrange(len(parts)))
            parts[source.randrange(len(parts))].merge(taken)
        assert same_bits(parts[0].mean(), expected), tree
        if tree % 20 == 0:
            assert parts[0].digest() == digest


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("weight_bits", [1, 29, 53])
def test_hundreds_of_full_significands_add_up_without_losing_a_bit(
    dtype: str, weight_bits: int
) -> None:
    # All of one sign and size, so that the sums grow by ten bits; told by a float64, whose last
    # bits would show what a sum loses.
    source = random.Random(f"{dtype} {weight_bits}")
    spec = ModelSpec({"w": ArraySpec((6,), np.dtype(np.float64))})
    models = []
    for _ in range(1_000):
        numbers = [1 + source.random() for _ in range(6)]
        scale = 2.0**61 if dtype == "int64" else 1.0
        models.append({"w": (np.array(numbers) * scale).astype(dtype)})
    weights = [source.getrandbits(weight_bits) | 1 << (weight_bits - 1) | 1 for _ in models]
    kinds = {"w": np.float64}
    expected = exact_weighted_mean(models, weights, dtypes=kinds)
    acc = WeightedMean(spec)
    merged = WeightedMean(spec)
    few = WeightedMean(spec)
    for model, weight in zip(models, weights, strict=True):
        acc.add(model, weight)
        few.add(model, weight)
        if few.count == 5:
            merged.merge(few)
            few.reset()
    assert same_bits(acc.mean(), expected)
    assert same_bits(merged.mean(), expected)
    assert acc.digest() == merged.digest()
    source.shuffle(order := list(range(1, 1_000)))
    for i in order:
        acc.remove(models[i], weights[i])
    alone = WeightedMean(spec)
    alone.add(models[0], weights[0])
    assert acc.digest() == alone.digest()


def test_many_updates_of_one_weight_do_not_use_up_the_headroom() -> None:
    ones = {"w": np.array([2.0 - 2.0**-23, -1.0, 2.0**-149, 3e38], np.float32)}
    acc = WeightedMean()
    for _ in range(3_000):
        acc.add(ones, (1 << 29) - 1)
    for _ in range(12):  # each time twice as many, to more than ten million updates
        other = WeightedMean.from_state(*acc.state())
        acc.merge(other)
    assert acc.count == 3_000 << 12
    assert same_bits(acc.mean(), ones)
    for _ in range(70):
        acc.merge(WeightedMean.from_state(*acc.state()))
    assert acc.weight_of("w") == ((1 << 29) - 1) * (3_000 << 82)
    assert same_bits(acc.mean(), ones)


# The same bits everywhere. The inputs come from SHA-256 alone, so that they are the same on every
# platform and with every version of NumPy. The results are written down here: whatever Python and
# NumPy the tests run with, they have to arrive at these.

GOLDEN_MEAN = "e4854e7233b668c77fa84ded5f2fed5a0633d4daf859f5aad081c8f73ce99fa9"
GOLDEN_DIGEST = "54e025dbf4ea5f932f7987b12f1892acd1091f38400b1970ea1c38cd78375c48"

INPUTS = '''
import hashlib
import numpy as np

def numbers(name, dtype, count):
    """Finite numbers of one dtype from the name's hash."""
    raw = b"".join(hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count))
    size = np.dtype(dtype).itemsize
    bits = np.frombuffer(raw[: count * size], f"<u{size}").astype(f"=u{size}")
    array = bits.view(np.dtype(dtype))
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            array = np.where(np.isfinite(array), array, np.ones_like(array))
        ordinary = ((bits % 2001).astype(np.float64) - 1000) / 64
        array = np.where(bits % 5 > 1, ordinary.astype(dtype), array)
    return array

def fingerprint(mean):
    sha = hashlib.sha256()
    for name in sorted(mean):
        array = mean[name]
        sha.update(f"{name} {array.dtype.name} {array.shape}".encode())
        sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()

kinds = ["float16", "float32", "float64", "int8", "uint16", "int32", "int64", "uint64"]
names = {f"layer{i}.{kind}" for i, kind in enumerate(kinds)}  # a set: its order varies
weights = {f"site-{i}": 3 * i + 1 if i % 2 else 1 / (i + 3) for i in range(7)}
sites = {*weights}  # so does the order of arrival
models = {site: {n: numbers(site + n, n.split(".")[1], 50) for n in names} for site in sites}
'''

SCRIPT = f"""{INPUTS}
import sys
from fedavg_core.accumulator import WeightedMean

for block in map(int, sys.argv[1:]):
    acc = WeightedMean(block=block)
    for site, model in models.items():
        acc.add(model, weights[site])
    print(fingerprint(acc.mean()), acc.digest(), next(iter(names)), next(iter(sites)))
"""


def run_script(hash_seed: int) -> list[list[str]]:
    """For each of four block sizes: the mean's and the sum's fingerprints, first name and site."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(1 << 17), "64", "50", "7"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_the_bits_written_down_are_the_oracle_s() -> None:
    inputs: dict[str, Any] = {}
    exec(INPUTS, inputs)
    models, weights = inputs["models"], inputs["weights"]
    oracle = exact_weighted_mean_by_mantissas(
        [models[site] for site in weights], list(weights.values())
    )
    assert inputs["fingerprint"](oracle) == GOLDEN_MEAN


def test_hash_seeds_and_block_sizes_give_the_bits_written_down() -> None:
    rows = [row for hash_seed in range(5 if THOROUGH else 2) for row in run_script(hash_seed)]
    assert len(rows) == (20 if THOROUGH else 8)
    assert {(mean, digest) for mean, digest, *_ in rows} == {(GOLDEN_MEAN, GOLDEN_DIGEST)}
    assert len({tuple(first) for _, _, *first in rows}) > 1  # or the seeds changed nothing


@pytest.mark.parametrize("seed", range(20 if THOROUGH else 3))
def test_a_quotient_next_to_a_midpoint_is_rounded_to_its_own_side(seed: int) -> None:
    # The sum is weight · m + d, with m odd and of 25 bits: the mean lies beside the midpoint of two
    # float32 by a share of 2**-64 of itself, far less than a division in float64 can tell.
    rng = np.random.default_rng(seed)
    weight = 2 * int(rng.integers(1 << 38, 1 << 39)) + 1
    middle = 2 * rng.integers(1 << 23, 1 << 24, 3_000) + 1
    beside = rng.integers(-1, 2, middle.size)
    sums = middle.astype(object) * weight + beside
    upper, lower = sums >> 40, sums & ((1 << 40) - 1)
    mean = WeightedMean(ModelSpec.of({"x": np.empty(middle.size, np.float32)}))
    mean.add({"x": upper.astype(np.float64) * 2.0**40}, 1)
    mean.add({"x": lower.astype(np.float64)}, 1)
    mean.add({"x": np.zeros(middle.size)}, weight - 2)
    even = middle - 1 + 2 * ((middle >> 1) & 1)
    expected = np.where(beside == 0, even, middle + beside)
    assert mean.mean()["x"].tolist() == expected.tolist()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype"), [(11, "float16"), (8, "bfloat16"), (24, "float32")]
)
def test_what_is_far_below_a_midpoint_tips_the_mean_to_its_side(
    precision: int, dtype: str, negative: bool
) -> None:
    # Of m (weight 601), 2m and d (weight 77 each) the mean is m + d·77/755: beside a midpoint m by
    # a share of about 2**-50 of itself, and on it where d is zero.
    rng = np.random.default_rng(precision)
    middle = 2 * rng.integers(1 << (precision - 1), 1 << precision, 3_000) + 1
    beside = np.where(rng.random(middle.size) < 0.05, rng.integers(-1, 2, middle.size), 0)
    sent = np.dtype(np.float32 if precision < 24 else np.float64)
    values = middle.astype(sent) * 2.0**-precision * (-1 if negative else 1)
    mean = WeightedMean(ModelSpec.of({"x": np.empty(middle.size, dtype_named(dtype))}))
    mean.add({"x": values}, 601)
    mean.add({"x": 2 * values}, 77)
    mean.add({"x": (np.sign(values) * beside * 2.0**-48).astype(sent)}, 77)
    even = middle - 1 + 2 * ((middle >> 1) & 1)
    expected = np.where(beside == 0, even, middle + beside) * 2.0**-precision
    assert (np.abs(mean.mean()["x"].astype(np.float64)) == expected).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e5m2"])
@pytest.mark.parametrize("base", [False, True])
def test_midpoints_at_the_end_of_float64_are_out_of_a_narrow_range(dtype: str, base: bool) -> None:
    # Rounded up to so few bits, this is 2**1024.
    narrow = dtype_named(dtype)
    number = number_format(narrow)
    assert number is not None
    value = np.ldexp(2.0 ** (number.precision + 1) - 1, 1023 - number.precision)
    model = {"x": np.ones(2, narrow)}
    mean = WeightedMean(ModelSpec.of(model))
    mean.add({"x": np.array([0.0, value])}, 2.0**1000)
    with pytest.raises(OutOfRange, match=r"key 'x': the result at \[1\]"):
        mean.mean(model if base else None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
@pytest.mark.parametrize(
    "weight",
    [2**1023, 2**1030, 3 << 1500, 2**2000, 2.0**1023],
    ids=["2**1023", "2**1030", "3 << 1500", "2**2000", "2.0**1023"],
)
def test_weights_together_may_be_beyond_float64(dtype: str, weight: float) -> None:
    few, more = (
        {"x": np.array(values).astype(dtype_named(dtype))} for values in ([1, 2, 3], [2, 3, 6])
    )
    mean = weighted_mean([few, more], [weight, weight])
    assert same_bits(mean, weighted_mean([few, more], [1, 1]))


@pytest.mark.parametrize("share", [0.01, 0.9])  # of zeros: looked at one by one, and too many
@pytest.mark.parametrize("largest", [1.0, 1e-44])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_zero_is_positive_however_many_negative_ones_there_are(
    dtype: type[np.floating[Any]], largest: float, share: float
) -> None:
    values = np.full(1000, largest).astype(dtype)
    values[: int(1000 * share)] = -0.0
    for weights in ([3], [3, 5]):
        mean = weighted_mean([{"w": values}] * len(weights), weights)["w"]
        assert np.array_equal(mean, values)
        assert not np.signbit(mean).any()


def test_a_model_with_many_zeros_needs_no_limb_for_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1600).astype(np.float32)
    values[::20] = 0
    total = ExactSum(values.size)
    for _ in range(20):
        total.add(values, 3, Scratch(values.size))
    assert total.used() == [0]
    assert not any(np.intersect1d(at, np.arange(0, values.size, 20)).size for at, _ in total.loose)


@pytest.mark.parametrize("elsewhere", [1.25, 2.0**-60])
def test_a_bit_far_below_decides_on_which_side_of_a_midpoint_a_mean_lies(elsewhere: float) -> None:
    """255 numbers whose sum over 256 is a midpoint, and one more that is far smaller.

    Its bits are in no float64 that stands for the sum, whether only one of the sums has such bits
    or, the others having them too, there is a limb of them.
    """
    low = np.float32(1.5)
    high = np.nextafter(low, np.float32(2))
    values = [low] * 128 + [high] * 126 + [2 * high, np.float32(2.0**-60)]
    models = []
    for value in values:
        array = np.full(64, 1.25 if value > 1 else elsewhere, np.float32)
        array[3] = value
        models.append({"w": array})
    mean = accumulated(models, [1] * 256).mean()
    assert mean["w"][3] == high
    assert same_bits(mean, exact_weighted_mean(models, [1] * 256))
