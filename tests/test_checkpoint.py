"""Checkpoints in a file: all comes back, damage is found, never a silent default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.codec.npz import write_npz
from fedavg_core.comparison import same_bits
from fedavg_core.errors import CheckpointError, UsageError
from tests.checkpoints import checkpoint, number_in

GOLDEN = Path(__file__).parent / "golden" / "checkpoint-format-1.npz"
ROOT = Path(__file__).parents[1]


class TestASingleFile:
    """`save_checkpoint` and `load_checkpoint`."""

    def test_everything_comes_back(self, tmp_path: Path) -> None:
        path = tmp_path / "one.npz"
        model = {
            "w": np.array([[0.1, -0.0], [np.inf, 1e-45]], np.float32),
            "f8": np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
            "../x\n": np.array([2**63 - 1]),
            "": np.zeros((0, 3)),
        }
        arrays = {"w": np.array([True]), "model/w": np.array(5, np.uint8)}
        saved = Checkpoint(
            model, 3, {"loss": np.float32(0.5), "n": 2}, {"a": [1, None, {"b": "ü"}]}, arrays, True
        )
        save_checkpoint(path, saved)
        found = load_checkpoint(path)
        assert list(found.model) == list(model)
        assert same_bits(found.model, model)
        assert found.arrays["w"].tolist() == [True]
        assert same_bits({"x": found.arrays["model/w"]}, {"x": arrays["model/w"]})
        assert (found.round, found.metrics, found.best) == (3, {"loss": 0.5, "n": 2.0}, True)
        assert found.extra == {"a": [1, None, {"b": "ü"}]}
        assert [entry.name for entry in tmp_path.iterdir()] == ["one.npz"]

    def test_plain_numpy_reads_it(self, tmp_path: Path) -> None:
        save_checkpoint(str(tmp_path / "one.npz"), checkpoint(5))
        with np.load(tmp_path / "one.npz") as loaded:
            assert loaded["model/w"].tolist() == checkpoint(5).model["w"].tolist()

    def test_one_of_format_1_is_read_by_every_later_version(self) -> None:
        found = load_checkpoint(GOLDEN)
        model = {
            "layer/w": np.array([[0.1, -0.0, 1e-45], [3e38, 2, 3]], np.float32),
            "b": np.array([0.1, 5e-324]),
            "h": np.array([1.5, -2.5, 3e38], ml_dtypes.bfloat16),
            "f8": np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
            "half": np.array(65504, np.float16),
            "n": np.array([-(2**63), 2**63 - 1]),
            "u8": np.arange(3, dtype=np.uint8),
            "empty": np.zeros((0, 4), np.float32),
            "../odd name\n": np.ones(1),
        }
        assert same_bits(found.model, model)
        assert list(found.model) == list(model)
        assert found.round == 12
        assert found.metrics == {"loss": 0.1, "accuracy": 0.9375}
        assert found.extra == {"seed": 7, "names": ["site-1", "süd"], "none": None}
        assert list(found.arrays) == ["momentum/b", "mask"]
        assert found.arrays["momentum/b"].tolist() == [1.0, -1.0]
        assert found.arrays["mask"].tolist() == [True, False]
        assert found.best

    def test_one_of_format_1_is_the_same_after_it_is_written_again(self, tmp_path: Path) -> None:
        golden = load_checkpoint(GOLDEN)
        for name in ("once.npz", "twice.npz"):
            save_checkpoint(tmp_path / name, golden)
        found = load_checkpoint(tmp_path / "once.npz")
        assert same_bits(found.model, golden.model)
        assert (found.round, found.metrics, found.extra) == (12, golden.metrics, golden.extra)
        assert found.arrays.keys() == golden.arrays.keys()
        assert (tmp_path / "once.npz").read_bytes() == (tmp_path / "twice.npz").read_bytes()

    def test_byte_flips_and_prefixes_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "one.npz"
        save_checkpoint(path, checkpoint(1))
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
            path.write_bytes(data[:at])
            with pytest.raises(CheckpointError):
                load_checkpoint(path)

    def test_a_file_that_is_not_there_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"could not be read .*No such file") as error:
            load_checkpoint(tmp_path / "none.npz")
        assert error.value.path == tmp_path / "none.npz"

    @pytest.mark.parametrize(
        ("name", "meta", "problem"),
        [
            ("model/w", {}, "no checkpoint, but a model alone, which load_model"),
            ("model/w", {"checkpoint": 2}, "no checkpoint of format 1, .* but 2"),
            ("model/w", {"checkpoint": 1}, "not those of a checkpoint"),
            ("w", {"checkpoint": 1}, "not those of a checkpoint"),
            ("other/w", {"checkpoint": 1}, "not those of a checkpoint"),
            ("model/w", {"round": -1}, "not those of a checkpoint .*round: expected a whole"),
            ("model/w", {"round": 10**18}, "not those of a checkpoint .*round: expected no more"),
            ("model/w", {"round": "1"}, "not those of a checkpoint"),
            ("model/w", {"metrics": [1]}, "not those of a checkpoint"),
            ("model/w", {"metrics": {"a": "b"}}, "not those of a checkpoint"),
            ("model/w", {"metrics": {"a": 10**400}}, "not those of a checkpoint .*float64"),
            ("model/w", {"metrics": {"a": True}}, "not those of a checkpoint .*expected numbers"),
            ("model/w", {"extra": 5}, "not those of a checkpoint"),
        ],
    )
    def test_a_file_of_arrays_that_is_no_checkpoint_is_refused(
        self, tmp_path: Path, name: str, meta: dict[str, Any], problem: str
    ) -> None:
        if len(meta) == 1 and "checkpoint" not in meta:
            fields = {"checkpoint": 1, "round": 1, "metrics": {}, "extra": {}, "best": False}
            meta = {**fields, **meta}
        with open(tmp_path / "one.npz", "w+b") as file:
            write_npz(file, {name: np.ones(2)}, meta)
        with pytest.raises(CheckpointError, match=problem):
            load_checkpoint(tmp_path / "one.npz")

    @pytest.mark.parametrize(
        "fields",
        [
            {"model": {"w": np.ones(1, complex)}},
            {"model": {1: np.ones(1)}},
            {"arrays": {"w": [1.0]}},
            {"round": -1},
            {"round": 1.0},
            {"round": True},
            {"metrics": {"loss": "low"}},
            {"metrics": {"loss": True}},
            {"metrics": {1: 1.0}},
            {"metrics": {"loss": 10**400}},
            {"metrics": {"loss": 10**5000}},
            {"extra": {"x": object()}},
            {"extra": {"x": "x" * (1 << 26)}},
            {"extra": None},
            {"metrics": None},
            {"model": None},
            {"model": [("w", np.ones(1))]},
            {"arrays": None},
            {"arrays": {str(number): np.ones(0) for number in range(1 << 16)}},
            {"model": {"w": np.broadcast_to(np.ones(1), 1 << 34)}},
        ],
    )
    def test_what_a_checkpoint_cannot_hold_is_a_usage_error_and_writes_nothing(
        self, tmp_path: Path, fields: dict[str, Any]
    ) -> None:
        path = tmp_path / "one.npz"
        save_checkpoint(path, checkpoint(1))
        with pytest.raises(UsageError):
            save_checkpoint(path, checkpoint(2, **fields))
        assert number_in(load_checkpoint(path)) == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["one.npz"]

    @pytest.mark.parametrize("extra", [{1: 2, "1": 3}, {"a": [{"b": {None: 1}}]}])
    def test_names_that_would_become_strings_are_a_usage_error(
        self, tmp_path: Path, extra: Any
    ) -> None:
        given = Checkpoint({"w": np.ones(2)}, 1, extra=extra)
        with pytest.raises(UsageError, match=r"JSON can hold: 'the name (1|None) is no string'"):
            save_checkpoint(tmp_path / "x.npz", given)
        assert not list(tmp_path.iterdir())

    def test_a_mask_is_not_lost(self, tmp_path: Path) -> None:
        masked: Any = np.ma.masked_array([1.0, 2.0], mask=[False, True])
        with pytest.raises(UsageError, match="'model/w' with a MaskedArray"):
            save_checkpoint(tmp_path / "x.npz", Checkpoint({"w": masked}, 1))
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(sys.platform == "win32", reason="no named pipes among files")
    def test_a_pipe_in_the_place_of_one_is_an_error_and_is_not_waited_for(
        self, tmp_path: Path
    ) -> None:
        save_checkpoint(tmp_path / "round-00000001.npz", checkpoint(1))
        pipe = tmp_path / "round-00000002.npz"
        os.mkfifo(pipe)
        with pytest.raises(CheckpointError, match=r"round-00000002\.npz: not a regular file"):
            load_checkpoint(pipe)
        with pytest.raises(CheckpointError, match="not a regular file") as error:
            CheckpointStore(tmp_path).load()
        assert error.value.path == pipe
        assert error.value.newest_good == tmp_path / "round-00000001.npz"
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path)

    def test_a_folder_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"could not be written .*what was there before"):
            save_checkpoint(tmp_path / "none" / "one.npz", checkpoint(1))

    def test_a_full_disk_is_an_error_in_plain_words(self, tmp_path: Path) -> None:
        path = tmp_path / "one.npz"
        save_checkpoint(path, checkpoint(1))
        code = (
            "import resource, signal, sys\n"
            "from fedavg_core import CheckpointError, save_checkpoint\n"
            "from tests.checkpoints import checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
            "try: save_checkpoint(sys.argv[1], checkpoint(2))\n"
            "except CheckpointError as error: print(error)\n"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        assert shown.stdout == (
            f"{path}: could not be written (File too large); what was there before is as it was\n"
        )
        assert number_in(load_checkpoint(path)) == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["one.npz"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (10**30, r"round: expected no more than \d+, got 10{30}$"),
        (10**5000, r"round: expected a whole number below 2\*\*1024, got one beyond$"),
    ],
    ids=["many digits", "thousands of digits"],
)
def test_a_round_of_many_digits_is_refused_in_one_line(
    tmp_path: Path, number: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save_checkpoint(tmp_path / "one.npz", Checkpoint(model={}, round=number))
