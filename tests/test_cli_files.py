"""The commands that work on model files: results, exit codes, one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")

import fedavg_core as fc
from fedavg_core.cli import look, main, make, model_stream
from fedavg_core.cli.arguments import byte_count
from fedavg_core.cli.command import _told
from fedavg_core.cli.console import name_shown, open_console, printable, uninterrupted
from fedavg_core.codec.npz import read_npz
from tests.conftest import THOROUGH
from tests.model_files import Model, safetensors_bytes, tensor, write_model

Capture = pytest.CaptureFixture[str]


def read_model(path: Path) -> Model:
    with open(path, "rb") as file:
        return read_npz(file)[0]


def run(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    """Runs the command in this process: exit code, standard output, standard error."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys: Capture, *arguments: Any) -> str:
    """Runs what should end in exit code 2; the one line that it says, without its beginning."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fedavg: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err.removeprefix("fedavg: ")[:-1]


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(3)
    kinds = ["npz", "deflated", "safetensors", "sealed"]
    return [
        write_model(
            tmp_path / f"site-{index}",
            kind,
            {
                "w": rng.standard_normal((70, 9)).astype(np.float32),
                "b": rng.standard_normal(5),
                "n": np.array(int(rng.integers(100))),
                "none": np.ones((0, 3), np.float32),
            },
        )
        for index, kind in enumerate(kinds)
    ]


@pytest.fixture
def models(sites: list[Path]) -> list[Model]:
    from safetensors.numpy import load_file

    return [
        load_file(path) if path.suffix == ".safetensors" else read_model(path) for path in sites
    ]


def test_aggregate_writes_the_exact_mean(
    tmp_path: Path, sites: list[Path], models: list[Model], capsys: Capture
) -> None:
    out = tmp_path / "mean.npz"
    given = ["--weights", f"1,2.5, {2**70} ,0.125", "-o", out, "--memory-limit", "4MB"]
    code, told, err = run(capsys, "aggregate", *sites, *given)
    assert (code, err) == (0, "")
    assert told == f"{out}: the mean of 4 files, 4 arrays of 636 elements\n"
    expected = fc.weighted_mean(models, [1, 2.5, 2**70, 0.125])
    assert fc.same_bits(read_model(out), expected)


def test_without_weights_all_files_count_alike(
    tmp_path: Path, sites: list[Path], models: list[Model], capsys: Capture
) -> None:
    assert run(capsys, "aggregate", sites[0], "-o", tmp_path / "one.npz")[1].count("1 file,") == 1
    assert run(capsys, "aggregate", *sites, "-o", tmp_path / "mean.npz")[0] == 0
    assert fc.same_bits(read_model(tmp_path / "one.npz"), models[0])
    assert fc.same_bits(read_model(tmp_path / "mean.npz"), fc.weighted_mean(models, [1] * 4))


def test_an_array_alone_is_a_model_too(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "a.npy", np.array([1.0, 2.0]))
    np.savez(tmp_path / "b.npz", np.array([3.0, 2.0]))
    done = run(
        capsys, "aggregate", tmp_path / "a.npy", tmp_path / "b.npz", "-o", tmp_path / "o.npz"
    )
    assert done == (0, f"{tmp_path / 'o.npz'}: the mean of 2 files, 1 array of 2 elements\n", "")
    assert read_model(tmp_path / "o.npz")["arr_0"].tolist() == [2.0, 2.0]


def test_files_that_lack_a_parameter_are_averaged_only_if_that_is_asked_for(
    tmp_path: Path, capsys: Capture
) -> None:
    one = write_model(tmp_path / "one", "npz", {"a": np.ones(2), "w": np.array([1.0, 3.0])})
    two = write_model(tmp_path / "two", "safetensors", {"a": np.zeros(2)})
    base = write_model(tmp_path / "base", "npz", {"a": np.ones(2), "w": np.ones(2)})
    out = tmp_path / "o.npz"
    for files in ([one, two], [two, one], [one, two, "--base", base]):
        assert fails(capsys, "aggregate", *files, "-o", out) == (
            f"MISSING_KEYS (contributor {two.name!r}, key 'w'): expected a parameter that is in "
            "1 of 2 files, got none; "
            "--partial averages each array over the files that have it"
        )
        assert not out.exists()
    assert run(capsys, "aggregate", one, two, "--partial", "-o", out)[0] == 0
    assert {key: array.tolist() for key, array in read_model(out).items()} == {
        "a": [0.5, 0.5],
        "w": [1, 3],
    }
    assert run(capsys, "aggregate", two, two, "--base", base, "-o", out, "--force")[0] == 0
    assert read_model(out)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_diff_and_apply_are_those_of_models_in_memory(
    tmp_path: Path,
    sites: list[Path],
    models: list[Model],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    monkeypatch.setattr(model_stream, "_PIECE", 8)
    change, result = tmp_path / f"change.{suffix}", tmp_path / f"result.{suffix}"
    code, told, err = run(capsys, "diff", sites[1], sites[0], "-o", change)
    assert (code, err) == (0, "")
    assert told == f"{change}: the difference, 4 arrays of 636 elements\n"
    expected = fc.diff(models[1], models[0])
    assert expected["n"].dtype == np.int64
    write_model(tmp_path / "expected", "sealed", expected)
    assert run(capsys, "compare", change, tmp_path / "expected.npz")[0] == 0
    code, told, err = run(capsys, "apply", sites[0], change, "-o", result)
    assert (code, err) == (0, "")
    assert told == f"{result}: the base and its difference, 4 arrays of 636 elements\n"
    write_model(tmp_path / "applied", "sealed", fc.apply(models[0], expected))
    assert run(capsys, "compare", result, tmp_path / "applied.npz")[0] == 0


def test_differences_are_averaged_onto_their_base(
    tmp_path: Path, sites: list[Path], models: list[Model], capsys: Capture
) -> None:
    for index in (1, 2):
        run(capsys, "diff", sites[index], sites[0], "-o", tmp_path / f"d{index}.npz")
    changes = [tmp_path / "d1.npz", tmp_path / "d2.npz"]
    out = tmp_path / "new.npz"
    given = ["--base", sites[0], "--weights", "3,1", "-o", out]
    assert run(capsys, "aggregate", *changes, *given)[0] == 0
    differences = [fc.diff(models[index], models[0]) for index in (1, 2)]
    assert fc.same_bits(read_model(out), fc.weighted_mean(differences, [3, 1], base=models[0]))


def test_inspect_tells_of_each_array(tmp_path: Path, capsys: Capture) -> None:
    model = {
        "w": np.array([[3, -4, np.nan], [np.inf, -np.inf, np.nan]], np.float16),
        "big": np.array([3e300, -4e300]),
        "small": np.array([3e-320, 4e-320]),
        "n": np.array([2**63 + 1, 5], np.uint64),
        "lost": np.array(np.nan),
        "none": np.zeros((2, 0), np.float32),
        "\x1b[31m\nred": np.array([-7], np.int8),
    }
    path = write_model(tmp_path / "model", "sealed", model)
    code, out, err = run(capsys, "inspect", path, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["arrays"]["w"] == {
        "shape": [2, 3],
        "dtype": "float16",
        "norm": 5.0,
        "min": -4.0,
        "max": 3.0,
        "nan": 2,
        "infinite": 2,
    }
    assert told["arrays"]["big"]["norm"] == pytest.approx(5e300)
    assert told["arrays"]["small"]["norm"] == pytest.approx(5e-320, rel=1e-3)
    assert told["arrays"]["n"]["max"] == 2**63 + 1
    nothing = {"min": None, "max": None}
    assert {**told["arrays"]["lost"], "norm": None, **nothing} == told["arrays"]["lost"]
    assert {**told["arrays"]["none"], "norm": 0.0, **nothing} == told["arrays"]["none"]
    totals = {name: told[name] for name in ("elements", "bytes", "nan", "infinite")}
    assert totals == {"elements": 14, "bytes": 12 + 16 + 16 + 16 + 8 + 1, "nan": 3, "infinite": 2}

    code, out, err = run(capsys, "inspect", path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["key", "dtype", "shape", "norm", "min", "max", "NaN", "infinite"]
    assert lines[1].split() == ["w", "float16", "2", "x", "3", "5", "-4", "3", "2", "2"]
    assert lines[5].split() == ["lost", "float64", "scalar", "-", "-", "-", "1", "0"]
    assert lines[7].startswith(r"\x1b[31m\nred")
    assert lines[8] == (
        "7 arrays, 14 elements, 5 of them not finite; 69 bytes; norm 5e+300 without what is not "
        "finite"
    )


def test_inspect_has_no_norm_of_nothing_that_is_finite(tmp_path: Path, capsys: Capture) -> None:
    path = write_model(tmp_path / "model", "npz", {"w": np.full(3, np.nan), "b": np.array(np.inf)})
    lines = run(capsys, "inspect", path)[1].splitlines()
    assert lines[1].split() == ["w", "float64", "3", "-", "-", "-", "3", "0"]
    assert lines[3] == "2 arrays, 4 elements, 4 of them not finite; 32 bytes; no norm"
    assert json.loads(run(capsys, "inspect", path, "--json")[1])["norm"] is None
    empty = write_model(tmp_path / "empty", "npz", {"w": np.zeros((0, 2))})
    assert run(capsys, "inspect", empty)[1].splitlines()[2:] == [
        "1 array, 0 elements, all finite; 0 bytes; norm 0"
    ]


def test_inspect_says_when_all_is_finite_and_does_not_fail_at_an_infinite_norm(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write_model(tmp_path / "model", "npz", {"w": np.full(4, 1.7e308)})
    assert run(capsys, "inspect", path)[1].splitlines()[-1] == (
        "1 array, 4 elements, all finite; 32 bytes; norm inf"
    )
    told = json.loads(run(capsys, "inspect", path, "--json")[1])
    assert told["norm"] is None
    assert told["arrays"]["w"]["norm"] is None


def test_the_pieces_of_an_array_make_one_summary(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    values[[5, 70, 6, 500]] = np.nan, np.inf, np.nan, np.nan
    path = write_model(tmp_path / "model", "deflated", {"w": values})
    monkeypatch.setattr(model_stream, "_PIECE", 7)
    told = json.loads(run(capsys, "inspect", path, "--json")[1])["arrays"]["w"]
    finite = values[np.isfinite(values)]
    assert (told["nan"], told["infinite"]) == (3, 1)
    assert (told["min"], told["max"]) == (finite.min(), finite.max())
    assert told["norm"] == pytest.approx(float(np.linalg.norm(finite)), rel=1e-12)


class TestACheckpoint:
    """A checkpoint in the place of a model is the model in it."""

    @pytest.fixture
    def path(self, tmp_path: Path, models: list[Model]) -> Path:
        path = tmp_path / "round-00000003-best.npz"
        metrics = {"loss": 0.25, "lost": float("nan")}
        state = {"momentum/w": np.ones(4)}
        fc.save_checkpoint(path, fc.Checkpoint(models[0], 3, metrics, arrays=state, best=True))
        return path

    def test_is_compared_and_averaged_as_its_model(
        self, path: Path, tmp_path: Path, sites: list[Path], models: list[Model], capsys: Capture
    ) -> None:
        assert run(capsys, "compare", path, sites[0])[0] == 0
        assert run(capsys, "compare", sites[1], path)[0] == 1
        for command, expected in (
            (["aggregate", path, sites[1]], fc.weighted_mean(models[:2], [1, 1])),
            (["diff", sites[1], path], fc.diff(models[1], models[0])),
            (["apply", path, sites[2]], fc.apply(models[0], models[2])),
            (["aggregate", sites[2], "--base", path], fc.apply(models[0], models[2])),
        ):
            out = tmp_path / "out.npz"
            assert run(capsys, *command, "-o", out, "--force")[0] == 0
            assert fc.same_bits(read_model(out), expected)

    def test_is_inspected_with_its_round_and_metrics(
        self, path: Path, tmp_path: Path, sites: list[Path], models: list[Model], capsys: Capture
    ) -> None:
        lines = run(capsys, "inspect", path)[1].splitlines()
        assert lines[:-1] == run(capsys, "inspect", sites[0])[1].splitlines()
        assert lines[-1] == (
            "the model of a checkpoint after 3 rounds, the best until then; loss 0.25, lost nan"
        )
        fc.save_checkpoint(path, fc.Checkpoint(models[0], 1))
        assert run(capsys, "inspect", path)[1].splitlines()[-1] == (
            "the model of a checkpoint after 1 round; no metrics"
        )
        many = {f"metric-{number}": number for number in range(1010)}
        fc.save_checkpoint(path, fc.Checkpoint(models[0], 2, many))
        assert run(capsys, "inspect", path)[1].endswith(", metric-7 7, and 1,002 more\n")
        fc.save_checkpoint(path, fc.Checkpoint(models[0], 3, {"a": 1, "b": float("inf")}))
        told = json.loads(run(capsys, "inspect", path, "--json")[1])
        assert told["checkpoint"] == {"round": 3, "best": False, "metrics": {"a": 1, "b": None}}
        assert json.loads(run(capsys, "inspect", sites[0], "--json")[1])["checkpoint"] is None

    def test_that_is_damaged_is_one_line(
        self, path: Path, tmp_path: Path, sites: list[Path], capsys: Capture
    ) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        for command in commands_on(path, sites[0], tmp_path / "out.npz"):
            told = fails(capsys, *command)
            assert path.name in told
            assert "damaged: its contents do not match their checksum" in told


def test_compare_tells_ulps_and_ends_with_1_where_models_differ(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_stream, "_PIECE", 2)
    a: Model = {"w": np.ones(5, np.float32), "n": np.arange(3), "b": np.zeros(2, np.float16)}
    b = {key: value.copy() for key, value in a.items()}
    first = write_model(tmp_path / "a", "npz", a)
    second = write_model(tmp_path / "b", "safetensors", b)
    code, out, err = run(capsys, "compare", first, second)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "the same to the bit"
    assert json.loads(run(capsys, "compare", first, second, "--json")[1])["same"] is True

    b["w"][1] = np.nextafter(np.float32(1), np.float32(2))
    b["w"][4] = np.nextafter(np.nextafter(np.float32(1), np.float32(0)), np.float32(0))
    b["n"][0] = 40
    third = write_model(tmp_path / "c", "npz", b)
    code, out, err = run(capsys, "compare", first, third)
    assert (code, err) == (1, "")
    assert out.splitlines()[0] == (
        "key  elements  differing  largest difference  largest ulps  NaN in one"
    )
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["w", "5", "2", "1.19209e-07", "2", "0"],
        ["n", "3", "1", "40", "40", "0"],
        ["b", "2", "0", "0", "0", "0"],
    ]
    assert out.splitlines()[4] == "2 of 3 arrays differ"
    code, out, _ = run(capsys, "compare", first, third, "--json")
    assert code == 1
    assert json.loads(out)["arrays"]["w"] == {
        "elements": 5,
        "differing": 2,
        "largest_difference": 2.0**-23,
        "largest_ulps": 2,
        "nan_in_one": 0,
    }


def test_compare_counts_nan_and_leaves_it_out_of_the_difference(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_stream, "_PIECE", 2)
    models = {
        "a": {"w": np.array([1, np.nan, 3, np.nan, 5]), "v": np.array([1, np.inf])},
        "b": {"w": np.array([1, np.nan, np.nan, 4, 5.5]), "v": np.array([np.nan, 2])},
    }
    paths = [write_model(tmp_path / name, "npz", model) for name, model in models.items()]
    code, out, _ = run(capsys, "compare", *paths)
    assert code == 1
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert [[row[3], row[5]] for row in rows] == [["0.5", "2"], ["inf", "1"]]
    assert out.splitlines()[3] == (
        "3 elements are NaN in one model only, left out of the largest differences"
    )
    arrays = json.loads(run(capsys, "compare", *paths, "--json")[1])["arrays"]
    told = [(one["largest_difference"], one["nan_in_one"]) for one in arrays.values()]
    assert told == [(0.5, 2), (None, 1)]


def test_arrays_that_cannot_be_compared_are_named(tmp_path: Path, capsys: Capture) -> None:
    first = write_model(tmp_path / "a", "npz", {"w": np.ones(5), "a": np.ones(1)})
    second = write_model(tmp_path / "b", "npz", {"w": np.ones(5, np.float32), "b": np.ones(1)})
    code, out, err = run(capsys, "compare", first, second)
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "w: float64[5] in A, float32[5] in B",
        "a: only in A",
        "b: only in B",
        "3 of 3 arrays differ",
    ]


def commands_on(path: Path, good: Path, out: Path) -> list[list[Any]]:
    return [
        ["aggregate", good, path, "-o", out],
        ["aggregate", good, "--base", path, "-o", out],
        ["diff", path, good, "-o", out],
        ["diff", good, path, "-o", out],
        ["apply", path, good, "-o", out],
        ["apply", good, path, "-o", out],
        ["inspect", path],
        ["compare", good, path],
    ]


BAD_FILES: dict[str, bytes] = {
    "empty.npz": b"",
    "text.npz": b"hello\n" * 100,
    "zip.npz": b"PK\x03\x04" + b"\0" * 60,
    "header.npy": b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f8'",
    "object.npy": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(117)
    + b"\n\x80\x04.",
    "huge.npy": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(117)
    + b"\n",
    "length.safetensors": b"\xff" * 8 + b"{}",
    "offsets.safetensors": safetensors_bytes({"w": tensor("F32", [4], 0, 999)}, b"\0" * 16),
    "deep.safetensors": safetensors_bytes(b"[" * 100_000),
    "bool.safetensors": safetensors_bytes({"w": tensor("BOOL", [4], 0, 4)}, b"\0" * 4),
    "nameless": os.urandom(300),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_leaves_nothing_behind(
    name: str, tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    bad = tmp_path / name
    bad.write_bytes(BAD_FILES[name])
    before = sorted(os.listdir(tmp_path))
    for command in commands_on(bad, sites[0], tmp_path / "out.npz"):
        assert name in fails(capsys, *command)
    assert sorted(os.listdir(tmp_path)) == before


def test_files_damaged_at_random_never_end_in_a_traceback(
    tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    rng = random.Random(1)
    out = tmp_path / "out.npz"
    for turn in range(400 if THOROUGH else 40):
        source = sites[turn % len(sites)]
        data = bytearray(source.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(len(data)) if turn % 3 == 0 else len(data) :]
        bad = tmp_path / f"bad{source.suffix}"
        bad.write_bytes(data)
        for command in commands_on(bad, sites[0], out):
            code, told, err = run(capsys, *command)
            assert code in (0, 1) or (code, told) == (2, "")
            assert "fault in this program" not in err
            assert (err == "") == (code < 2)
            assert err.count("\n") == (code == 2)
            out.unlink(missing_ok=True)


def test_an_output_is_replaced_only_by_force_and_only_when_all_went_well(
    tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    for command in (
        ["aggregate", sites[0]],
        ["diff", sites[1], sites[0]],
        ["apply", sites[0], sites[1]],
    ):
        assert fails(capsys, *command, "-o", out) == (
            f"{str(out)!r} is there already; --force would replace it"
        )
        assert out.read_bytes() == b"precious"
        bad = write_model(tmp_path / "bad", "npz", {"w": np.ones(3), "b": np.ones(9)})
        fails(capsys, *command[:-1], bad, sites[0], "-o", out, "--force")
        assert out.read_bytes() == b"precious"
        bad.unlink()
    for command in (["aggregate", out], ["diff", out, out], ["apply", out, out]):
        write_model(tmp_path / "new", "npz", {"w": np.ones(3)}).rename(out)
        assert run(capsys, *command, "-o", out, "--force")[0] == 0
    assert sorted(read_model(out)) == ["w"]


def test_an_output_that_came_to_be_meanwhile_is_not_replaced(
    tmp_path: Path, sites: list[Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.npz"
    monkeypatch.setattr(make, "check_new", lambda *_: out.write_bytes(b"precious"))
    before = sorted([*os.listdir(tmp_path), out.name])
    for command in (
        ["aggregate", sites[0]],
        ["diff", sites[1], sites[0]],
        ["apply", sites[0], sites[1]],
    ):
        assert fails(capsys, *command, "-o", out) == (
            f"{out}: it is there already, and is not replaced"
        )
        assert out.read_bytes() == b"precious"
        assert sorted(os.listdir(tmp_path)) == before
        assert run(capsys, *command, "-o", out, "--force")[0] == 0


def test_what_is_no_file_is_never_replaced(
    tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder.npz", "pipe.npz"):
        for command in (["aggregate", sites[0]], ["diff", sites[1], sites[0]]):
            told = fails(capsys, *command, "-o", tmp_path / name, "--force")
            assert told.endswith(": expected a file to write, got a folder or a device")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_what_was_there(
    number: signal.Signals, tmp_path: Path, sites: list[Path]
) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    big = write_model(tmp_path / "big", "npz", {"w": np.ones(1 << 20, np.float32)})
    before = sorted(os.listdir(tmp_path))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "fedavg_core.cli", "aggregate"),
            *[str(big)] * 400,
            *("-o", str(out), "--force"),
        ],
        stderr=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + 60
        while len(os.listdir(tmp_path)) == len(before) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.read() == b"fedavg: interrupted\n"
    assert process.returncode == 130
    assert sorted(os.listdir(tmp_path)) == before
    assert out.read_bytes() == b"precious"


def test_a_link_that_leads_nowhere_is_an_output_that_is_there(
    tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    out = tmp_path / "out.npz"
    out.symlink_to(tmp_path / "nowhere")
    assert "is there already" in fails(capsys, "aggregate", sites[0], "-o", out)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspekt"], "argument COMMAND: invalid choice: 'inspekt' (choose from "),
        (["inspect"], "the following arguments are required: FILE"),
        (["inspect", "a", "b\n\x1b[2J"], r"unrecognized arguments: b\n\x1b[2J"),
        (["inspect", "a", "--js"], "unrecognized arguments: --js"),
        (["inspect", "nowhere.npz"], "nowhere.npz: could not be read (No such file or directory)"),
        (["inspect", "no\nwhere\udcff\u20ac"], r"no\nwhere\udcff\u20ac: could not be read ("),
        (
            ["inspect", __file__],
            f"{__file__}: expected npz, npy or safetensors, got suffix '.py'",
        ),
        (
            ["aggregate", __file__, "-o", "b.npz"],
            f"{__file__}: expected npz, npy or safetensors, got suffix '.py'",
        ),
        (["inspect", "."], ".: expected a file, got a folder or a device"),
        (["inspect", "/dev/null"], "/dev/null: expected a file, got a folder or a device"),
        (["aggregate", "a"], "the following arguments are required: -o/--output"),
        (["aggregate", "a", "-o", "b"], "expected an output with suffix .npz or .safetensors, "),
        (["diff", "a", "b", "-o", "c"], "expected an output with suffix .npz or .safetensors, "),
        (["aggregate", "a", "-o", "b.npz", "--weights", "1,x"], "argument --weights: expected num"),
        (["aggregate", "a", "-o", "b.npz", "--weights", "1,2"], "--weights: expected 1, one for"),
        (
            ["aggregate", "a", "-o", "b.npz", "--memory-limit", "much"],
            "argument --memory-limit: expected a size such as 65536, 256MiB or 2GB (K, M, G or T), "
            "got 'much'",
        ),
        (["aggregate", "a", "-o", "b.npz", "--memory-limit", "1"], "a: could not be read ("),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, *arguments).startswith(problem)


def test_refusals_and_results_out_of_range_are_told(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = write_model(tmp_path / "nan", "npz", {"w": np.array([1, np.nan])})
    assert fails(capsys, "aggregate", nan, "-o", tmp_path / "o.npz") == (
        "NON_FINITE (contributor 'nan.npz', key 'w'): expected finite numbers, got nan at [1]"
    )
    out = tmp_path / "o.npz"
    fine = write_model(tmp_path / "fine", "npz", {"w": np.ones(2)})
    assert fails(capsys, "diff", nan, fine, "-o", out) == (
        f"{nan}: key 'w': expected finite numbers, got nan at [1]"
    )
    monkeypatch.setattr(model_stream, "_PIECE", 2)
    grid = write_model(tmp_path / "grid", "npz", {"a": np.ones(3), "w": np.ones((2, 3))})
    infinite = np.ones((2, 3))
    infinite[1, 1] = -np.inf
    other = write_model(tmp_path / "inf", "safetensors", {"a": np.ones(3), "w": infinite})
    assert fails(capsys, "diff", grid, other, "-o", out) == (
        f"{other}: key 'w': expected finite numbers, got -inf at [1, 1]"
    )
    none = write_model(tmp_path / "none", "npz", {})
    assert "at least one parameter" in fails(capsys, "diff", none, nan, "-o", tmp_path / "o.npz")
    high = write_model(tmp_path / "high", "npz", {"w": np.full(2, 1.7e308)})
    low = write_model(tmp_path / "low", "npz", {"w": np.full(2, -1.7e308)})
    assert "beyond the largest number" in fails(capsys, "diff", high, low, "-o", tmp_path / "o.npz")
    assert "beyond the largest number" in fails(
        capsys, "apply", high, high, "-o", tmp_path / "o.npz"
    )
    other = write_model(tmp_path / "other", "npz", {"v": np.ones(2)})
    assert fails(capsys, "diff", other, low, "-o", tmp_path / "o.npz") == (
        f"{other} less {low}: key 'v': the base does not have it"
    )
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("command", ["aggregate", "apply"])
def test_the_memory_limit_is_kept_to(
    command: str, tmp_path: Path, sites: list[Path], capsys: Capture
) -> None:
    given = [command, sites[0], sites[1], "-o", tmp_path / "o.npz", "--memory-limit"]
    assert fails(capsys, *given, "64KiB").startswith("argument --memory-limit: expected at least ")
    assert run(capsys, *given, "4MB")[0] == 0


def test_sizes_are_read_in_their_units() -> None:
    sizes = {"65536": 65536, "12B": 12, "2kB": 2000, "64KiB": 65536, "3GiB": 3 * 2**30}
    assert {text: byte_count(text) for text in sizes} == sizes


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable("a\nb\x1b\u2028ü") == "a\\nb\\x1b\\u2028ü"
    assert name_shown("") == "''"
    assert name_shown("a\nb") == "a\\nb"
    assert len(name_shown("w\n" * 500)) < 120


class TestWhatEndsACommand:
    """What stands between an error of any kind and the shell."""

    def ending_in(
        self, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> tuple[int, str, str]:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(look, "spec_of", fail)
        return run(capsys, "inspect", __file__)

    @pytest.fixture(autouse=True)
    def _no_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(look, "opened", lambda *_: contextlib.nullcontext([None]))

    def test_an_interruption(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        assert self.ending_in(KeyboardInterrupt(), monkeypatch, capsys) == (
            130,
            "",
            "fedavg: interrupted\n",
        )

    def test_an_interruption_while_the_arguments_are_read(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules[main.__module__], "_parser", interrupted)
        assert run(capsys, "inspect", __file__) == (130, "", "fedavg: interrupted\n")

    def test_no_memory_left(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        assert self.ending_in(MemoryError("no\nmore"), monkeypatch, capsys) == (
            2,
            "",
            "fedavg: MemoryError: no\\nmore\n",
        )

    def test_a_fault_of_the_program(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        code, out, err = self.ending_in(TypeError("oh"), monkeypatch, capsys)
        assert (code, out) == (2, "")
        assert err.startswith("fedavg: a fault in this program: TypeError: oh (test_cli_files.py,")


def test_without_rich_one_line_says_what_to_install(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["fedavg_core.cli.command"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert fails(capsys, "inspect", "a") == (
        "expected rich to be installed: get the extra 'cli' (in a clone: pip install -e '.[cli]')"
    )


def test_help_and_version_are_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for name in ("run", "report", "aggregate", "diff", "apply", "inspect", "compare", "verify"):
        assert f"\n    {name} " in out  # and what it does on the same line
        code, told, err = run(capsys, name, "--help")
        assert (code, err) == (0, "")
        assert told.startswith(f"usage: fedavg {name} ")
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "")
    assert out.startswith("fedavg-core ")


def test_a_console_that_is_no_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert open_console().width > 1000
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert open_console().width == 50


def test_it_runs_as_a_module(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedavg", "inspect"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("fedavg_core.cli", run_name="__main__")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "fedavg: the following arguments are required: FILE\n"


def test_a_pipe_that_was_closed_ends_the_command(
    sites: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["inspect", str(sites[0])]) == 2


def command(*arguments: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedavg_core.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def test_output_that_nobody_reads_any_more_is_no_traceback(sites: list[Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fedavg_core.cli", "inspect", str(sites[0])],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


def closed(streams: str, *arguments: Any) -> tuple[int, str, str]:
    """Runs the command without some of its streams: exit code, output, errors."""
    words = shlex.join([sys.executable, "-m", "fedavg_core.cli", *map(str, arguments)])
    done = subprocess.run(
        ["sh", "-c", f"{words} {streams}"], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_change_nothing_else(
    streams: str, tmp_path: Path, sites: list[Path]
) -> None:
    mean, plain = tmp_path / "mean.npz", tmp_path / "plain.npz"
    code, _, err = closed(streams, "aggregate", *sites, "-o", mean)
    assert (code, err) == (0, "")
    assert closed("", "aggregate", *sites, "-o", plain)[0] == 0
    assert mean.read_bytes() == plain.read_bytes()
    assert closed(streams, "inspect", mean)[0] == 0
    assert closed(streams, "compare", mean, plain)[0] == 0
    assert closed(streams, "compare", mean, sites[0])[0] == 1
    code, _, err = closed(streams, "compare", mean, tmp_path / "missing.npz")
    assert code == 2
    assert ("missing.npz" in err) == ("2>" not in streams)
    assert closed(streams, "--help")[0] == 0
    assert closed(streams, "nothing")[0] == 2


def test_a_name_that_standard_output_cannot_encode_is_escaped(tmp_path: Path) -> None:
    np.savez(tmp_path / "\u00fc.npz", w=np.ones(2))
    done = command(
        "aggregate",
        tmp_path / "\u00fc.npz",
        "-o",
        tmp_path / "m\u00fc.npz",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "m\\xfc.npz: the mean of 1 file" in done.stdout


def test_on_a_terminal_there_is_a_bar_by_bytes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "npz", {"w": np.ones(3 << 18, np.float32)})
    ours, theirs = pty.openpty()
    program = "import sys; from fedavg_core.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "inspect", str(path)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.stdout is not None
        assert b"all finite" in process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"reading" in shown
    assert b"MiB" in shown


@pytest.mark.parametrize("installed", [True, False])
def test_the_version_is_that_of_the_installed_package(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if not installed:
            raise PackageNotFoundError(name)
        return f"1.2 of {name}"

    monkeypatch.setattr("fedavg_core.cli.arguments.version", version)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    shown = "1.2 of fedavg-core" if installed else "(not installed)"
    assert capsys.readouterr().out == f"fedavg-core {shown}\n"


def test_a_second_interruption_on_the_way_out_leaves_the_first_ones_words() -> None:
    first, second = KeyboardInterrupt("2 of 4 rounds are done"), KeyboardInterrupt()
    second.__context__ = first
    assert _told(first) == _told(second) == "2 of 4 rounds are done"
    assert _told(KeyboardInterrupt()) == "interrupted"


class TestUninterrupted:
    """An interruption waits for the end of a block."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_comes_when_the_block_has_ended(
        self, number: signal.Signals, handlers: dict[signal.Signals, Any]
    ) -> None:
        done: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            self.block([number], done)
        assert done == [number]
        assert {one: signal.getsignal(one) for one in handlers} == handlers

    def test_a_second_one_does_not_wait(self, handlers: dict[signal.Signals, Any]) -> None:
        done: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            self.block([signal.SIGINT, signal.SIGINT], done)
        assert done == [signal.SIGINT]
        assert {one: signal.getsignal(one) for one in handlers} == handlers

    def test_it_comes_after_an_error_too(self, handlers: dict[signal.Signals, Any]) -> None:
        done: list[int] = []
        with pytest.raises(KeyboardInterrupt) as caught:
            self.block([signal.SIGINT], done, BrokenPipeError())
        assert isinstance(caught.value.__context__, BrokenPipeError)
        assert {one: signal.getsignal(one) for one in handlers} == handlers

    @staticmethod
    def block(sent: list[signal.Signals], done: list[int], error: Exception | None = None) -> None:
        with uninterrupted():
            for number in sent:
                signal.raise_signal(number)
                done.append(number)
            if error is not None:
                raise error

    def test_what_python_does_not_handle_and_other_threads_are_left_alone(
        self, handlers: dict[signal.Signals, Any]
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        seen = []

        def look() -> None:
            with uninterrupted():
                seen.append([signal.getsignal(one) for one in handlers])

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        assert seen[0] == [signal.default_int_handler, signal.SIG_IGN]
        assert seen[1][0] != signal.default_int_handler
        assert seen[1][1] == signal.SIG_IGN

    @pytest.fixture
    def handlers(self) -> Iterator[dict[signal.Signals, Any]]:
        before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
        for one in before:
            signal.signal(one, signal.default_int_handler)
        yield dict.fromkeys(before, signal.default_int_handler)
        for one, handler in before.items():
            signal.signal(one, handler)
