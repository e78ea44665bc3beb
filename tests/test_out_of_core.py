"""Aggregation of files: the bits of the mean in memory, or else the output untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedavg_core.accumulator import weighted_mean
from fedavg_core.codec.npz import read_npz, write_npz
from fedavg_core.comparison import same_bits
from fedavg_core.errors import (
    CheckpointError,
    FedAvgError,
    OutOfRange,
    Reason,
    RefusedUpdate,
    UsageError,
)
from fedavg_core.model import ArraySpec, ModelSpec, Params, dtype_named
from fedavg_core.out_of_core import aggregation, passes
from fedavg_core.out_of_core.aggregation import aggregate_files
from fedavg_core.testing import models, specs, weighted_models
from tests.conftest import THOROUGH
from tests.model_files import KINDS, Model, plain, write_model

safetensors: Any = pytest.importorskip("safetensors")

MIB = 2**20
IN_SAFETENSORS = {
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


def read_model(path: Path) -> Model:
    if path.suffix == ".npz":
        with open(path, "rb") as file:
            return read_npz(file, own=True)[0]
    result: Model = {}
    names = {"F": "float", "I": "int", "U": "uint"}
    for key, entry in safetensors.deserialize(path.read_bytes()):
        code = str(entry["dtype"])
        name = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}.get(code)
        if code.startswith("F8") and code.endswith("FNUZ"):
            name = code.replace("F8", "float8").lower()
        dtype = dtype_named(name or names[code[0]] + code[1:])
        result[key] = np.frombuffer(bytes(entry["data"]), dtype).reshape(entry["shape"])
    return result


def kinds_for(model: Params) -> list[str]:
    kinds = ["sealed"]
    if plain(model):
        kinds += ["npz", "deflated"]
    if all(array.dtype.name in IN_SAFETENSORS for array in model.values()):
        kinds += ["safetensors"]
    return kinds


@pytest.fixture(params=["few passes", "many passes", "many passes, no zlib states"])
def cut(request: pytest.FixtureRequest) -> Iterator[None]:
    """Passes of one small block or two, so that small models have many."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "few passes":
            patch.setattr(aggregation, "_LARGEST_BLOCK", 3)
            patch.setattr(aggregation, "_PASS_SHARE", 1 << 14)
        if request.param.endswith("states"):
            patch.setattr(aggregation, "_INFLATER_SHARE", 1 << 30)
            patch.setattr(aggregation, "_PLACES_SHARE", 1 << 30)
        yield


def attempt(function: Any) -> Any:
    try:
        return function()
    except FedAvgError as error:
        return error


@pytest.mark.usefixtures("cut")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_the_bits_are_those_of_the_mean_in_memory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    spec = data.draw(specs(max_keys=4))
    drawn, weights = data.draw(weighted_models(spec, partial=True))
    base = data.draw(st.none() | models(spec))
    paths = [
        write_model(folder / f"site-{i}", data.draw(st.sampled_from(kinds_for(model))), model)
        for i, model in enumerate(drawn)
    ]
    base_path = None
    if base is not None:
        base_path = write_model(folder / "base", data.draw(st.sampled_from(kinds_for(base))), base)
    suffix = data.draw(st.sampled_from(["npz", "safetensors"]))
    output = folder / f"out.{suffix}"
    expected = attempt(lambda: weighted_mean(drawn, weights, base=base))
    got = attempt(
        lambda: aggregate_files(paths, weights, output, base=base_path, memory_limit=64 * MIB)
    )
    brought = {key: array for model in drawn for key, array in model.items()}
    if suffix == "safetensors" and "safetensors" not in kinds_for(base or brought):
        assert isinstance(got, UsageError)
    elif isinstance(expected, FedAvgError):
        assert type(got) is type(expected)
        assert not output.exists()
    else:
        assert got == ModelSpec.of(expected)
        assert same_bits(read_model(output), expected)


def training_run(clients: int, rows: int = 60, **dtypes: str) -> list[Model]:
    """Models of some size, in the given dtypes, with small and large parameters in turn."""
    random = np.random.default_rng(7)
    dtypes = dtypes or {"w": "float32", "h": "bfloat16", "n": "int64", "q": "float8_e4m3fn"}
    return [
        {
            f"{name}{layer}.{part}": np.asarray(10 * random.standard_normal(shape)).astype(
                dtype_named(dtype)
            )
            for layer in range(3)
            for name, dtype in dtypes.items()
            for part, shape in {"bias": (7,), "weight": (rows, 70), "scale": ()}.items()
        }
        for _ in range(clients)
    ]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_any_mix_of_formats_gives_the_same_bits(tmp_path: Path, suffix: str) -> None:
    run = training_run(6, rows=2, w="float32", n="int16", d="float64")
    paths = [
        write_model(tmp_path / f"site-{i}", KINDS[i % len(KINDS)], model)
        for i, model in enumerate(run)
    ]
    output = tmp_path / f"out.{suffix}"
    aggregate_files(paths, [3, 1, 4, 1, 5, 0.3], output, memory_limit=32 * MIB)
    assert same_bits(read_model(output), weighted_mean(run, [3, 1, 4, 1, 5, 0.3]))
    assert {entry.name for entry in tmp_path.iterdir()} == {
        output.name,
        *(path.name for path in paths),
    }


@pytest.mark.parametrize("memory_limit", [2 * MIB, 3 * MIB, 64 * MIB])
def test_the_npz_is_byte_for_byte_that_of_the_mean_in_memory(
    tmp_path: Path, memory_limit: int
) -> None:
    run = training_run(3)
    paths = [write_model(tmp_path / f"site-{i}", "sealed", model) for i, model in enumerate(run)]
    aggregate_files(paths, [1, 2, 3], tmp_path / "out.npz", memory_limit=memory_limit)
    with open(tmp_path / "in memory.npz", "x+b") as file:
        write_npz(file, weighted_mean(run, [1, 2, 3]))
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "in memory.npz").read_bytes()


@pytest.mark.usefixtures("cut")
def test_with_a_base_differences_are_added_to_it(tmp_path: Path) -> None:
    base, *differences = training_run(4, rows=2)
    for difference in differences[1:]:
        del difference["w1.weight"], difference["n0.weight"]
    for difference in differences:
        del difference["h2.weight"], difference["q0.scale"]
    base["h2.weight"][0, 0] = -0.0
    paths = [
        write_model(tmp_path / f"site-{i}", "safetensors", model)
        for i, model in enumerate(differences)
    ]
    base_path = write_model(tmp_path / "base", "sealed", base)
    output = tmp_path / "out.npz"
    aggregate_files(paths, [1, 2, 3], output, base=base_path, memory_limit=32 * MIB)
    result = read_model(output)
    assert same_bits(result, weighted_mean(differences, [1, 2, 3], base=base))
    assert list(result) == list(base)


def test_npy_files_are_models_of_one_array(tmp_path: Path) -> None:
    arrays = [np.asfortranarray(np.random.default_rng(i).random((30, 40))) for i in range(3)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    aggregate_files(paths, [1, 2, 3], tmp_path / "out.npz")
    expected = weighted_mean([{"arr_0": array} for array in arrays], [1, 2, 3])
    assert same_bits(read_model(tmp_path / "out.npz"), expected)


def test_parameters_in_fortran_order_and_big_endian_are_read(tmp_path: Path) -> None:
    run: list[Model] = [
        {
            "w": np.asfortranarray(np.random.default_rng(i).random((300, 200))),
            "v": np.arange(i, i + 50, dtype=">f4"),
        }
        for i in range(3)
    ]
    paths = [write_model(tmp_path / f"{i}", KINDS[i % 2], model) for i, model in enumerate(run)]
    aggregate_files(paths, [1, 2, 3], tmp_path / "out.npz", memory_limit=8 * MIB)
    assert same_bits(read_model(tmp_path / "out.npz"), weighted_mean(run, [1, 2, 3]))


def test_the_output_may_be_one_of_the_inputs_and_a_file_may_count_twice(tmp_path: Path) -> None:
    run = training_run(2)
    paths = [write_model(tmp_path / f"site-{i}", "sealed", model) for i, model in enumerate(run)]
    aggregate_files([paths[0], paths[1], paths[0]], [1, 1, 2.5], paths[0])
    assert same_bits(read_model(paths[0]), weighted_mean(run, [3.5, 1]))


def test_paths_may_be_strings_and_suffixes_in_capitals(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    aggregate_files([f"{tmp_path}/a.npz"], [1], f"{tmp_path}/OUT.NPZ")
    (tmp_path / "OUT.NPZ").rename(tmp_path / "out.npz")
    assert same_bits(read_model(tmp_path / "out.npz"), {"w": np.ones(3)})


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    base, *run = training_run(4)
    paths = [write_model(tmp_path / f"site-{i}", "sealed", model) for i, model in enumerate(run)]
    base_path = write_model(tmp_path / "base", "sealed", base)
    told: list[tuple[int, int]] = []
    aggregate_files(
        paths,
        [1, 2, 3],
        tmp_path / "out.npz",
        base=base_path,
        memory_limit=4 * MIB,
        progress=lambda done, total: told.append((done, total)),
    )
    total = 4 * sum(array.nbytes for array in base.values())
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert len(told) > 8


class Good:
    """Two good files, and an output that has something in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: list[Model] = [
            {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)} for _ in range(2)
        ]
        self.paths = [
            write_model(folder / f"site-{i}", "npz", model) for i, model in enumerate(self.models)
        ]
        self.output = folder / "out.npz"
        self.output.write_bytes(b"before")

    def fails(self, model: Model, weight: Any = 1, **options: Any) -> Exception:
        """The error with a further file; nothing else may have changed."""
        bad = write_model(self.folder / "bad", "npz", model)
        return self.fails_with([*self.paths, bad], [1, 1, weight], **options)

    def fails_with(self, paths: Any, weights: Any, **options: Any) -> Exception:
        there = set(self.folder.iterdir())
        with pytest.raises(Exception) as error:  # noqa: PT011
            aggregate_files(paths, weights, self.output, **options)
        assert self.output.read_bytes() == b"before"
        assert set(self.folder.iterdir()) == there
        return error.value


@pytest.fixture
def good(tmp_path: Path) -> Good:
    return Good(tmp_path)


@pytest.mark.parametrize(
    ("model", "weight", "reason", "message"),
    [
        (
            {"w": np.zeros((3, 2), np.float32)},
            1,
            Reason.SHAPE,
            "SHAPE (contributor 'bad.npz', key 'w'): expected shape (2, 3), got (3, 2)",
        ),
        (
            {"w": np.array([[0, 0, 0], [0, np.nan, np.inf]], np.float32)},
            1,
            Reason.NON_FINITE,
            "NON_FINITE (contributor 'bad.npz', key 'w'): expected finite numbers, "
            "got nan at [1, 1]",
        ),
        (
            {"b": np.array([0, -np.inf])},
            1,
            Reason.NON_FINITE,
            "NON_FINITE (contributor 'bad.npz', key 'b'): expected finite numbers, got -inf at [1]",
        ),
        (
            {"b": np.array([True, False])},
            1,
            Reason.DTYPE,
            "DTYPE (contributor 'bad.npz', key 'b'): expected an array of real numbers (float16, "
            "bfloat16, float8, float32, float64, ints), got dtype 'bool'",
        ),
        (
            {},
            1,
            Reason.MISSING_KEYS,
            "MISSING_KEYS (contributor 'bad.npz'): expected at least one parameter, got none",
        ),
        *(
            (
                {"w": np.zeros((2, 3))},
                weight,
                Reason.BAD_WEIGHT,
                "BAD_WEIGHT (contributor 'bad.npz'): expected a finite int or float above zero as "
                f"weight, got {weight!r}",
            )
            for weight in (0, -1, float("nan"), float("inf"), None, True, "3")
        ),
    ],
)
def test_an_update_that_is_not_fit_is_refused_by_its_files_name(
    good: Good, model: Model, weight: Any, reason: Reason, message: str
) -> None:
    error = good.fails(model, weight)
    assert isinstance(error, RefusedUpdate)
    assert str(error) == message
    assert error.reason is reason
    assert error.contributor == "bad.npz"
    assert error.round is None


@pytest.mark.usefixtures("cut")
def test_a_nan_is_found_wherever_it_is(tmp_path: Path) -> None:
    for at in (0, 20, 63, 64):
        values = np.ones((5, 13))
        values.reshape(-1)[at] = np.nan
        for kind in ("npz", "safetensors"):
            path = write_model(tmp_path / f"{at}", kind, {"a": np.ones(3), "w": values})
            with pytest.raises(RefusedUpdate) as refusal:
                aggregate_files([path], [1], tmp_path / "out.npz", memory_limit=32 * MIB)
            assert refusal.value.got == f"nan at [{at // 13}, {at % 13}]"


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        (tmp_path / f"site-{number}").mkdir()
        paths.append(write_model(tmp_path / f"site-{number}" / "m", "npz", {"w": np.ones(number)}))
    with pytest.raises(RefusedUpdate) as refusal:
        aggregate_files(paths, [1, 1], tmp_path / "out.npz")
    assert refusal.value.contributor == str(paths[1])


def test_a_parameter_that_the_base_lacks_is_refused(good: Good) -> None:
    base = write_model(good.folder / "base", "npz", {"w": np.zeros((2, 3))})
    error = good.fails_with(good.paths, [1, 1], base=base)
    assert str(error) == (
        "UNEXPECTED_KEYS (contributor 'site-0.npz', key 'b'): expected parameters of the base, "
        "got another"
    )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"w": np.full((2, 3), np.nan), "b": np.zeros(2)}, "got nan at [0, 0]"),
        ({"w": np.zeros((2, 3)), "b": np.array([0, np.inf])}, "got inf at [1]"),
        ({"w": np.zeros((2, 3), bool), "b": np.zeros(2)}, "base.npz: DTYPE (key 'w'): expected"),
    ],
)
def test_a_base_that_is_no_model_is_misuse(good: Good, base: Model, message: str) -> None:
    path = write_model(good.folder / "base", "npz", base)
    error = good.fails_with(good.paths, [1, 1], base=path)
    assert isinstance(error, UsageError)
    assert message in str(error)


def test_what_no_file_brings_is_copied_even_if_it_is_not_finite(good: Good) -> None:
    values = np.array([np.nan, -0.0, np.inf])
    base = write_model(good.folder / "base", "npz", {**good.models[0], "kept": values})
    aggregate_files(good.paths, [1, 1], good.output, base=base)
    assert read_model(good.output)["kept"].tobytes() == values.tobytes()


def test_a_result_out_of_range_is_told_with_its_place(good: Good) -> None:
    base = write_model(
        good.folder / "base", "npz", {"w": np.zeros((2, 3)), "b": np.array([0, 255], np.uint8)}
    )
    error = good.fails_with(good.paths, [1, 1], base=base)
    assert isinstance(error, OutOfRange)
    assert str(error) == ("key 'b': the result at [1] is beyond the largest number of uint8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": []}, "paths: expected a list of files, got an empty one"),
        ({"paths": "a.npz"}, "paths: expected a list of files, got 'a.npz'"),
        ({"paths": 5}, "paths: expected a list of files, got 5"),
        ({"paths": np.array(5)}, "paths: expected a list of files, got array(5)"),
        ({"paths": ["a.npz", None]}, "paths[1]: expected a path, got None"),
        ({"weights": None}, "weights: expected a list of 2, one for each file, got None"),
        (
            {"weights": np.array(1.0)},
            "weights: expected a list of 2, one for each file, got array(1.)",
        ),
        ({"progress": 3}, "progress: expected a function or None, got 3"),
        ({"replace": "no"}, "replace: expected True or False, got 'no'"),
        (
            {"allow_missing": np.ones(2)},
            "allow_missing: expected True or False, got array([1., 1.])",
        ),
        ({"weights": [1]}, "weights: expected a list of 2, one for each file, got 1"),
        ({"memory_limit": 1.5}, "memory_limit: expected a whole number of at least 1, got 1.5"),
        ({"memory_limit": True}, "memory_limit: expected a whole number of at least 1, got True"),
    ],
)
def test_misuse_is_told(good: Good, options: dict[str, Any], message: str) -> None:
    paths = options.pop("paths", good.paths)
    error = good.fails_with(paths, options.pop("weights", [1, 1]), **options)
    assert isinstance(error, UsageError)
    assert str(error) == message


def test_names_that_can_be_had_only_once_will_do(good: Good) -> None:
    aggregate_files(iter(good.paths), [1, 1], good.folder / "out.npz")  # type: ignore[arg-type]
    assert (good.folder / "out.npz").exists()


def test_a_memory_limit_that_is_too_small_is_told_with_one_that_is_not(good: Good) -> None:
    error = good.fails_with(good.paths, [1, 1], memory_limit=1)
    assert isinstance(error, UsageError)
    least = int(str(error).split("expected at least ")[1].split()[0])
    assert str(error) == (
        f"memory_limit: expected at least {least} bytes for 2 parameters in 2 files, got 1"
    )
    good.fails_with(good.paths, [1, 1], memory_limit=least - 1)
    aggregate_files(good.paths, [1, 1], good.output, memory_limit=least)
    assert same_bits(read_model(good.output), good.models[0])


def test_an_output_of_another_suffix_is_misuse(good: Good) -> None:
    with pytest.raises(UsageError, match=r"expected an output with suffix .npz or .safetensors, g"):
        aggregate_files(good.paths, [1, 1], good.folder / "out.npy")


def test_a_dtype_that_the_output_cannot_hold_is_misuse(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "sealed", {"w": np.ones(1, dtype_named("float8_e3m4"))})
    with pytest.raises(UsageError, match="a safetensors file cannot hold dtype float8_e3m4"):
        aggregate_files([path], [1], tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_leaves_the_output_as_it_was(good: Good) -> None:
    path = write_model(good.folder / "large", "npz", {"w": np.zeros(9999)})
    data = bytearray(path.read_bytes())
    data[40_000] ^= 1
    path.write_bytes(data)
    error = good.fails_with([path], [1])
    assert isinstance(error, CheckpointError)
    assert str(error) == f"{path}: key 'w': its bytes do not match their checksum"


def test_a_missing_file_and_a_missing_folder_are_told(good: Good) -> None:
    error = good.fails_with([*good.paths, good.folder / "none.npz"], [1, 1, 1])
    assert str(error) == (
        f"{good.folder / 'none.npz'}: could not be read (No such file or directory)"
    )
    output = good.folder / "none" / "out.npz"
    with pytest.raises(CheckpointError) as told:
        aggregate_files(good.paths, [1, 1], output)
    assert str(told.value).startswith(
        f"{output}: could not be written (there is no folder {output.parent})"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), MemoryError()])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_an_interruption_leaves_the_output_as_it_was(
    tmp_path: Path, error: BaseException, suffix: str
) -> None:
    run = training_run(3, w="float32")
    paths = [write_model(tmp_path / f"site-{i}", "deflated", model) for i, model in enumerate(run)]
    output = tmp_path / f"out.{suffix}"
    output.write_bytes(b"before")
    there = set(tmp_path.iterdir())

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(type(error)):
        aggregate_files(paths, [1, 1, 1], output, memory_limit=2 * MIB, progress=stop)
    assert output.read_bytes() == b"before"
    assert set(tmp_path.iterdir()) == there


def test_a_full_disk_leaves_the_output_as_it_was(
    good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    error = good.fails_with(good.paths, [1, 1])
    assert isinstance(error, CheckpointError)
    assert str(error) == (
        f"{good.output}: could not be written (No space left on device); what was there before is "
        "as it was"
    )


def test_scratch_files_are_made_where_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "_INFLATER_SHARE", 1 << 30)
    run = training_run(3, w="float32")
    paths = [write_model(tmp_path / f"site-{i}", "deflated", model) for i, model in enumerate(run)]
    (tmp_path / "scratch").mkdir()
    seen: set[str] = set()

    def look(done: int, total: int) -> None:
        seen.update(path.parent.parent.name for path in (tmp_path / "scratch").rglob("tmp*"))
        assert not list(tmp_path.glob(".fedavg-*"))

    output = tmp_path / "out.npz"
    aggregate_files(
        paths, [1] * 3, output, memory_limit=2 * MIB, scratch=tmp_path / "scratch", progress=look
    )
    assert seen == {"scratch"}
    assert list((tmp_path / "scratch").iterdir()) == []
    assert same_bits(read_model(output), weighted_mean(run, [1] * 3))


MEASURE = """
import ctypes
import sys
from pathlib import Path
from fedavg_core.codec.npz import read_npz
from fedavg_core.out_of_core.aggregation import aggregate_files
import ml_dtypes, numpy

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

folder, limit, files = Path(sys.argv[1]), int(sys.argv[2]), sorted(Path(sys.argv[1]).glob("site*"))
aggregate_files(files[:1], [1], folder / "warm.npz")  # what is imported on first use is no memory
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)  # and what is free counts again once it is used
Path("/proc/self/clear_refs").write_text("5")  # of the aggregation: begin to measure here
before = peak()
aggregate_files(files, range(1, len(files) + 1), folder / "out.npz", memory_limit=limit)
print(peak() - before)
"""


def peak_beyond(folder: Path, memory_limit: int) -> int:
    """The peak resident memory of an aggregation in a process of its own, beyond what it had."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(memory_limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def large_models(folder: Path, kinds: tuple[str, ...], clients: int, size: int) -> list[Model]:
    run = []
    for client in range(clients):
        random = np.random.default_rng(client)
        values = random.standard_normal(size // 4, np.float32)
        model: Model = {
            "a": values[: size // 8].reshape(-1, 128),
            **{f"b{i}": random.standard_normal(10) for i in range(20)},
            "w": values[size // 8 :].reshape(-1, 64),
        }
        write_model(folder / f"site-{client:03}", kinds[client % len(kinds)], model)
        run.append(model)
    return run


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is measured on Linux"
)


MIXED = ("npz", "sealed", "deflated", "safetensors")


@needs_proc
@pytest.mark.parametrize("kinds", [("deflated",), MIXED] if THOROUGH else [MIXED])
def test_files_twice_the_limit_each_take_no_more_than_the_limit(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    clients = 20 if THOROUGH else 6
    run = large_models(tmp_path, kinds, clients=clients, size=8 * MIB)
    assert 0 < peak_beyond(tmp_path, 4 * MIB) < 4 * MIB
    assert same_bits(read_model(tmp_path / "out.npz"), weighted_mean(run, range(1, clients + 1)))


@needs_proc
def test_values_of_every_size_take_no_more_than_the_limit(tmp_path: Path) -> None:
    for client in range(4 if THOROUGH else 2):
        random = np.random.default_rng(client)
        bits = random.integers(0, 2**64, MIB // 2, np.uint64)
        values = bits.view(np.float64)
        values[~np.isfinite(values)] = 1.0
        write_model(tmp_path / f"site-{client}", "npz", {"w": values * 0.25})
    assert 0 < peak_beyond(tmp_path, 16 * MIB) < 16 * MIB


@pytest.mark.parametrize("kind", KINDS if THOROUGH else ["deflated"])
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, kind: str) -> None:
    run = training_run(1, w="float32", v="float16")
    path = write_model(tmp_path / "m", kind, run[0])

    def peak(clients: int) -> int:
        tracemalloc.start()
        aggregate_files([path] * clients, [1] * clients, tmp_path / "out.npz", memory_limit=4 * MIB)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(1)
    clients = 200 if THOROUGH else 50
    # Threads that another test has left behind may allocate meanwhile: the least of two tells.
    few, many = (min(peak(n), peak(n)) for n in (10, clients))
    assert many < 4 * MIB
    assert many - few < clients * 4096


@pytest.mark.parametrize("kind", KINDS if THOROUGH else ["deflated"])
def test_memory_for_many_parameters_is_planned_for(tmp_path: Path, kind: str) -> None:
    model = {f"some.layer.{i}.weight": np.ones(3, np.float32) for i in range(500)}
    path = write_model(tmp_path / "m", kind, model)
    with pytest.raises(UsageError, match="500 parameters in 5 files") as error:
        aggregate_files([path] * 5, [1] * 5, tmp_path / "out.npz", memory_limit=3 * MIB // 2)
    least = int(str(error.value).split("expected at least ")[1].split()[0])
    tracemalloc.start()
    aggregate_files([path] * 5, [1] * 5, tmp_path / "out.npz", memory_limit=least)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < least


def nested(length: int) -> bytes:
    """JSON that takes far more memory than bytes; one letter makes each of its letters four."""
    one = '{"":' * 900 + "0" + "}" * 900
    return ("[" + ",".join([one] * (length // len(one))) + ',"\U0001f600"]').encode()


def hostile_npz(path: Path, members: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(members):
            archive.writestr(f"{'x' * 290}{number}.npy", b"")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("index", r"its index has \d+ bytes; the limit is 131072"),
        ("header", r"its header has \d+ bytes; the limit is 131072"),
        ("members", "it has 9000 members; the limit is 4096"),
    ],
)
def test_what_a_file_says_of_itself_takes_no_more_memory_than_allowed(
    tmp_path: Path, kind: str, problem: str
) -> None:
    limit = 8 * MIB
    path = tmp_path / ("m.safetensors" if kind == "header" else "m.npz")
    if kind == "index":
        with open(path, "wb+") as file:
            write_npz(file, {"w": np.ones(1)}, {"x": json.loads(nested(1 << 18))})
    elif kind == "header":
        text = b'{"__metadata__":' + nested(1 << 18) + b"}"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    else:
        hostile_npz(path, 9000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=problem):
        aggregate_files([path], [1], tmp_path / "out.npz", memory_limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


FEW_OPEN = """
import resource, sys
from pathlib import Path
from fedavg_core.out_of_core.aggregation import aggregate_files

resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
folder = Path(sys.argv[1])
files = sorted(folder.glob("site*"))
assert len(files) == 90
aggregate_files(files, range(1, 91), folder / "out.npz", memory_limit=2 * 2**20)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit of open files is set by POSIX means")
def test_more_files_than_may_be_open_are_aggregated(tmp_path: Path) -> None:
    run = training_run(90, w="float32")
    for i, model in enumerate(run):
        write_model(tmp_path / f"site-{i:02}", KINDS[i % len(KINDS)], model)
    subprocess.run([sys.executable, "-c", FEW_OPEN, str(tmp_path)], check=True)
    assert same_bits(read_model(tmp_path / "out.npz"), weighted_mean(run, range(1, 91)))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_small_arrays_before_large_ones_stay_in_their_places(tmp_path: Path, suffix: str) -> None:
    model = {
        f"{name}{size}": np.arange(size, dtype=np.float32) + size
        for size in (20_000, 33_000, 16_384, 65_536, 70_000)
        for name in ("weight", "bias")
    }
    shuffled = {}
    for number, (key, array) in enumerate(model.items()):
        shuffled[f"small{number}"] = np.full(10, number, np.float32)
        shuffled[key] = array
    np.savez(tmp_path / "in.npz", **shuffled)  # type: ignore[arg-type]
    output = tmp_path / f"out{suffix}"
    aggregate_files([tmp_path / "in.npz"] * 2, [1, 2], output)
    assert same_bits(read_model(output), shuffled)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    capacity=st.integers(1, 40),
    most=st.integers(1, 5_000),
)
def test_passes_have_the_elements_in_the_order_of_the_model(
    sizes: list[int], capacity: int, most: int
) -> None:
    spec = {str(n): ArraySpec((size,), np.dtype(np.float32)) for n, size in enumerate(sizes)}
    kinds = dict.fromkeys(spec, passes.Kind(1, ArraySpec((), np.dtype(np.float32)), 10, 4))
    order = [
        (int(segment.key), segment.start + offset)
        for part in passes.cut(spec, kinds, capacity, most)
        for block, _, _ in part._works
        for segment in sorted(block.segments, key=lambda segment: segment.offset)
        for offset in range(segment.size)
    ]
    keys = [key for key, _ in order]
    assert keys == [n for n, size in enumerate(sizes) for _ in range(size)]
