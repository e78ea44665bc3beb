"""Checkpoints: old or new whatever fails, damage found, one writer, never a silent default."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fedavg_core import atomic_file, checkpoint_store
from fedavg_core.atomic_file import replacing
from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.codec import write_npz
from fedavg_core.errors import CheckpointError, UsageError
from fedavg_core.model import same_bits
from tests.conftest import THOROUGH

GOLDEN = Path(__file__).parent / "golden" / "checkpoint-format-1.npz"
ROOT = Path(__file__).parents[1]
KILLS = 100 if THOROUGH else 3
"""How often a writing child is killed; 100 times in ci."""


def checkpoint(number: int, **more: Any) -> Checkpoint:
    model = {"w": np.full((3, 4), number, np.float32), "h": np.full(5, number, ml_dtypes.bfloat16)}
    return Checkpoint(**{"model": model, "round": number, "extra": {"number": number}, **more})


def number_in(found: Checkpoint) -> int:
    """Which of `checkpoint`'s this is; fails unless it is one of them, whole."""
    assert same_bits(found.model, checkpoint(found.round).model)
    assert found.extra == {"number": found.round}
    return found.round


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
            "from tests.test_checkpoint import checkpoint, save_checkpoint, CheckpointError\n"
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


class TestANewFile:
    """`replacing` where nothing may be replaced."""

    @pytest.fixture(params=["hard links", "no hard links"])
    def _links(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        if request.param == "no hard links":
            monkeypatch.setattr(os, "link", fail)

    @pytest.mark.usefixtures("_links")
    def test_comes_to_be_with_its_contents_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        with replacing(tmp_path / "new", old=False) as file:
            file.write(b"whole")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
            ("new", b"whole")
        ]

    @pytest.mark.usefixtures("_links")
    @pytest.mark.parametrize(
        "make",
        [
            lambda path: path.write_bytes(b"precious"),
            lambda path: path.mkdir(),
            lambda path: path.symlink_to("nowhere"),
        ],
        ids=["file", "folder", "link to nowhere"],
    )
    def test_never_takes_the_place_of_what_came_before_its_commit(
        self, make: Callable[[Path], object], tmp_path: Path
    ) -> None:
        path = tmp_path / "new"
        with (
            pytest.raises(CheckpointError, match="it came to be while this was written, and is"),
            replacing(path, old=False),
        ):
            make(path)
        assert os.listdir(tmp_path) == ["new"]
        assert path.is_dir() or path.is_symlink() or path.read_bytes() == b"precious"

    def test_that_cannot_be_put_in_place_leaves_no_empty_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(os, "replace", fail)
        with (
            pytest.raises(CheckpointError, match=r"could not be written \(Input/output error\)"),
            replacing(tmp_path / "new", old=False) as file,
        ):
            file.write(b"whole")
        assert os.listdir(tmp_path) == []


class Faults:
    """Stands in for `os` and `open`, and fails at the n-th operation, once or from there on."""

    def __init__(self, at: int = -1, keep: bool = False, partly: bool = False) -> None:
        self.at, self.keep, self.partly = at, keep, partly
        self.steps: list[str] = []
        self.trace: list[tuple[Any, ...]] = []
        self._inodes = itertools.count()

    def fails(self, step: str) -> bool:
        self.steps.append(step)
        now = len(self.steps) - 1
        return now == self.at or (self.keep and 0 <= self.at < now)

    def step(self, step: str) -> None:
        if self.fails(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_file(self, path: Any, mode: str) -> IO[bytes]:
        self.step("create")
        file: Any = _FaultyFile(self, open(path, mode), next(self._inodes))  # noqa: SIM115
        self.trace.append(("create", os.fspath(path), file.inode))
        return file  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("replace", "unlink", "fsync", "open", "close", "listdir"):
            return real

        def faulty(*arguments: Any, **more: Any) -> Any:
            if name == "close":  # which gives the descriptor up even where it fails
                real(*arguments)
                self.step(name)
                return None
            self.step(name)
            result = real(*arguments, **more)
            if name == "fsync":
                is_folder = stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                self.trace.append(("fsync folder",) if is_folder else ("fsync", self.last_inode))
            elif name in ("replace", "unlink"):
                self.trace.append((name, *map(os.fspath, arguments)))
            return result

        return faulty

    def __enter__(self) -> Faults:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(atomic_file, "os", self)
        self._patch.setattr(checkpoint_store, "os", self)
        self._patch.setattr(atomic_file, "open", self.open_file, raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class _FaultyFile:
    def __init__(self, faults: Faults, file: IO[bytes], inode: int) -> None:
        self._faults, self._file, self.inode = faults, file, inode
        faults.last_inode = inode  # type: ignore[attr-defined]

    def write(self, data: Any) -> int:
        position = self._file.tell()
        if self._faults.fails("write"):
            if self._faults.partly:
                self._file.write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._faults.trace.append(("write", self.inode, position, bytes(data)))
        return self._file.write(data)

    def flush(self) -> None:
        self._faults.step("flush")
        self._faults.trace.append(("flush", self.inode))
        self._file.flush()

    def seek(self, *arguments: int) -> int:
        self._faults.step("seek")
        return self._file.seek(*arguments)

    def read(self, *arguments: int) -> bytes:
        self._faults.step("read")
        return self._file.read(*arguments)

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._faults.step("close file")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def operations(act: Callable[[], object]) -> list[str]:
    with Faults() as faults:
        act()
    return faults.steps


class TestAFaultAtEveryOperation:
    """Whatever operation fails, once or from then on: old or new exactly."""

    def points(self, save: Callable[[], object]) -> Iterator[tuple[int, bool, bool]]:
        steps = operations(save)
        assert {"create", "write", "flush", "fsync", "replace", "open", "close"} <= set(steps)
        yield from itertools.product(range(len(steps)), (False, True), (False, True))

    @pytest.mark.parametrize("old", [None, 1])
    def test_of_a_file(self, tmp_path: Path, old: int | None) -> None:
        path, points = tmp_path / "one.npz", 0
        for at, keep, partly in self.points(lambda: save_checkpoint(path, checkpoint(9))):
            for entry in tmp_path.iterdir():
                entry.unlink()
            if old is not None:
                save_checkpoint(path, checkpoint(old))
            failed: CheckpointError | None = None
            with Faults(at, keep, partly) as faults:
                try:
                    save_checkpoint(path, checkpoint(2))
                except CheckpointError as error:
                    failed = error
            points += 1
            found = number_in(load_checkpoint(path)) if path.exists() else None
            if failed is None:
                assert found == 2
            elif "it is in place" in failed.problem:
                assert found == 2
                assert "replace" in faults.steps[:at]
            else:
                assert found == old
                assert "No space left on device" in failed.problem
                assert "what was there before is as it was" in failed.problem
            if not keep:
                assert len(list(tmp_path.iterdir())) == (found is not None)
        assert points >= 100

    def test_of_a_store(self, tmp_path: Path) -> None:
        numbers, points = itertools.count(), 0
        folders = (tmp_path / str(number) for number in numbers)

        template = CheckpointStore(tmp_path / "template")
        for number in (1, 2):
            template.save(checkpoint(number))

        def prepared() -> CheckpointStore:
            return CheckpointStore(shutil.copytree(template.folder, next(folders)), keep=2)

        first = prepared()
        for at, keep, partly in self.points(lambda: first.save(checkpoint(3))):
            store = prepared()
            failed = False
            with Faults(at, keep, partly):
                try:
                    store.save(checkpoint(3))
                except CheckpointError:
                    failed = True
            points += 1
            again = CheckpointStore(store.folder, keep=2)
            found = number_in(again.load())
            assert found in ((2, 3) if failed else (3,))
            for path in again.paths():
                number_in(load_checkpoint(path))
            again.save(checkpoint(4))  # neither a lock nor a left-over is in the way
            assert number_in(again.load()) == 4
            names = {entry.name for entry in store.folder.iterdir()}
            assert not any(name.endswith(".tmp") for name in names)
        assert points >= 100


class TestAPowerCut:
    """What was not synced may be lost, in any part and order: old or new exactly."""

    def after_the_cut(
        self, trace: list[tuple[Any, ...]], old: bytes, path: Path, choice: random.Random
    ) -> dict[str, bytes]:
        """The folder as it may be found, given the operations that were under way."""
        buffered: dict[int, list[tuple[int, bytes]]] = {}
        unsynced: dict[int, list[tuple[int, bytes]]] = {}
        synced: dict[int, list[tuple[int, bytes]]] = {-1: [(0, old)]}
        entries, pending = {str(path): -1}, list[tuple[Any, ...]]()
        for operation, *rest in trace:
            if operation == "write":
                buffered.setdefault(rest[0], []).append((rest[1], rest[2]))
            elif operation == "flush":
                unsynced.setdefault(rest[0], []).extend(buffered.pop(rest[0], []))
            elif operation == "fsync":
                synced.setdefault(rest[0], []).extend(unsynced.pop(rest[0], []))
            elif operation == "fsync folder":
                for change in pending:
                    self.change(entries, change)
                pending = []
            else:
                pending.append((operation, *rest))
        inodes = {rest[1]: rest[0] for operation, *rest in trace if operation == "create"}
        for change in pending:
            if choice.random() < 0.5:
                # A rename may reach the disk though the making of its source has not.
                source = {name: inode for inode, name in inodes.items()}
                self.change(entries, change, source)
        contents = {}
        for name, inode in entries.items():
            data = bytearray()
            lost = unsynced.get(inode, []) + buffered.get(inode, [])
            choice.shuffle(lost)
            kept = [w for w in lost if choice.random() < 0.5]
            for position, piece in synced.get(inode, []) + kept:
                data.extend(bytes(max(0, position + len(piece) - len(data))))
                data[position : position + len(piece)] = piece
            contents[name] = bytes(data)
        return contents

    def change(
        self,
        entries: dict[str, int],
        change: tuple[Any, ...],
        source: dict[str, int] | None = None,
    ) -> None:
        operation, *rest = change
        if operation == "create":
            entries[rest[0]] = rest[1]
        elif operation == "replace":
            inode = entries.pop(rest[0], (source or {}).get(rest[0]))
            assert inode is not None
            entries[rest[1]] = inode
        else:
            entries.pop(rest[0], None)

    def test_leaves_old_or_new(self, tmp_path: Path) -> None:
        path = tmp_path / "one.npz"
        save_checkpoint(path, checkpoint(1))
        old = path.read_bytes()
        with Faults() as faults:
            save_checkpoint(path, checkpoint(2))
        trace, choice, found, cuts = faults.trace, random.Random(5), set(), 0
        for length in range(len(trace) + 1):
            for _ in range(20):
                contents = self.after_the_cut(trace[:length], old, path, choice)
                path.write_bytes(contents[str(path)])
                number = number_in(load_checkpoint(path))
                found.add(number)
                cuts += 1
                if length == len(trace):
                    assert number == 2
        assert cuts >= 200
        assert found == {1, 2}

    @pytest.mark.parametrize("omitted", ["flush", "fsync", "fsync folder"])
    def test_the_simulation_would_notice_an_omitted_sync(
        self, tmp_path: Path, omitted: str
    ) -> None:
        path = tmp_path / "one.npz"
        save_checkpoint(path, checkpoint(1))
        old = path.read_bytes()
        with Faults() as faults:
            save_checkpoint(path, checkpoint(2))
        trace = [step for step in faults.trace if step[0] != omitted]
        choice, outcomes = random.Random(5), set()
        for _ in range(100):
            path.write_bytes(self.after_the_cut(trace, old, path, choice)[str(path)])
            try:
                outcomes.add(number_in(load_checkpoint(path)))
            except CheckpointError:
                outcomes.add(-1)
        assert outcomes != {2}


WRITER = """
import itertools, sys
from tests.test_checkpoint import CheckpointStore, checkpoint
with CheckpointStore(sys.argv[1], keep=2) as store:
    first = store.load().round + 1 if store.paths() else 0
    for number in itertools.count(first):
        store.save(checkpoint(number, best=number % 3 == 0))
        print(number, flush=True)
"""


def start_writer(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_round_of_thousands_of_digits_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"round: expected no more than \d+, got <int>"):
        save_checkpoint(tmp_path / "one.npz", Checkpoint(model={}, round=10**5000))


def test_new_folders_are_entered_where_they_are_in_before_anything_is_stored_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("fedavg_core.atomic_file._flush_folder", flushed.append)
    folder = tmp_path / "runs" / "first"
    CheckpointStore(folder).save(checkpoint(1))
    assert flushed == [tmp_path / "runs", tmp_path, folder]


def test_a_store_leaves_alone_what_another_writer_is_writing_beside_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "mean.npz") as file, CheckpointStore(tmp_path) as store:
        file.write(b"all")
        store.save(checkpoint(1))
    assert (tmp_path / "mean.npz").read_bytes() == b"all"


class TestAWriterThatIsKilled:
    """SIGKILL at any moment."""

    def test_leaves_a_whole_checkpoint_and_no_lock(self, tmp_path: Path) -> None:
        choice, last = random.Random(7), -1
        for _ in range(KILLS):
            child = start_writer(tmp_path)
            assert child.stdout is not None
            acknowledged = int(child.stdout.readline())
            time.sleep(choice.random() * 0.03)
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split("\n")[:-1]
            child.wait()
            child.stdout.close()
            acknowledged = int(rest[-1]) if rest else acknowledged
            store = CheckpointStore(tmp_path, keep=2)
            found = number_in(store.load())
            assert acknowledged <= found <= acknowledged + 1
            assert found > last
            last = found
            for path in store.paths():
                number_in(load_checkpoint(path))
        store.save(checkpoint(last + 1))
        assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]

    def test_keeps_others_out_until_then(self, tmp_path: Path) -> None:
        child = start_writer(tmp_path)
        assert child.stdout is not None
        child.stdout.readline()
        store = CheckpointStore(tmp_path)
        with pytest.raises(CheckpointError, match="another writer is at work in this folder"):
            store.save(checkpoint(10**6))
        number_in(store.load())  # to read takes no lock
        child.kill()
        child.wait()
        child.stdout.close()
        assert number_in(load_checkpoint(store.save(checkpoint(10**6)))) == 10**6


class TestTheStore:
    """A folder of checkpoints."""

    def test_it_keeps_the_newest_and_the_last_best(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "a" / "b", keep=2)
        assert store.paths() == ()
        assert store.load_best() is None
        for number in range(7):
            path = store.save(checkpoint(number, best=number in (1, 3)))
            assert path.parent == store.folder
            assert number_in(store.load()) == number
        assert [path.name for path in store.paths()] == [
            "round-00000003-best.npz",
            "round-00000005.npz",
            "round-00000006.npz",
        ]
        best = store.load_best()
        assert best is not None
        assert number_in(best) == 3

    def test_rounds_are_in_order_beyond_their_width(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        for number in (99_999_999, 100_000_000):
            store.save(checkpoint(number))
        assert number_in(store.load()) == 100_000_000

    @pytest.mark.parametrize("stuck", [False, True])
    @pytest.mark.parametrize("bests", list(itertools.product((False, True), repeat=4)))
    def test_a_round_that_is_saved_again_is_what_was_saved_last(
        self, tmp_path: Path, bests: tuple[bool, ...], stuck: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, last_best = CheckpointStore(tmp_path, keep=2), None
        store.save(checkpoint(0))
        if stuck:  # nothing can be taken away, or each writer dies before it is

            def refuse(*_: Any) -> None:
                raise PermissionError

            monkeypatch.setattr(os, "unlink", refuse)
        for save, best in enumerate(bests):
            store.save(checkpoint(1, best=best, metrics={"save": save}))
            last_best = save if best else last_best
            found, found_best = store.load(), store.load_best()
            assert (found.metrics, found.best) == ({"save": float(save)}, best)
            assert (found_best and found_best.metrics["save"]) == last_best
        if not stuck:
            assert store.paths()[0].name == "round-00000000.npz"
            assert len(store.paths()) == (3 if last_best not in (None, len(bests) - 1) else 2)
        monkeypatch.undo()
        store.save(checkpoint(2))
        store.save(checkpoint(3, best=True))
        names = [path.name for path in store.paths()]
        assert names == ["round-00000002.npz", "round-00000003-best.npz"]

    def test_an_earlier_round_than_the_newest_is_a_usage_error(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        store.save(checkpoint(5))
        with pytest.raises(UsageError, match="expected a checkpoint of round 5, the newest"):
            store.save(checkpoint(4))
        assert number_in(store.load()) == 5

    def test_nothing_but_checkpoints_counts(self, tmp_path: Path) -> None:
        for name in ("round-1.npz", "round-00000001.npz.bak", "x-round-00000001.npz", "notes.txt"):
            (tmp_path / name).write_bytes(b"x")
        store = CheckpointStore(tmp_path)
        assert store.paths() == ()
        with pytest.raises(CheckpointError, match="there is no checkpoint in this folder"):
            store.load()
        store.save(checkpoint(1))
        assert (tmp_path / "notes.txt").exists()

    @pytest.mark.parametrize(
        "spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[::-1]]
    )
    def test_a_damaged_one_is_an_error_that_names_the_newest_good_one(
        self, tmp_path: Path, spoil: Callable[[bytes], bytes]
    ) -> None:
        store = CheckpointStore(tmp_path, keep=4)
        paths = [store.save(checkpoint(number)) for number in range(4)]
        for path, good in ((paths[3], paths[2]), (paths[2], paths[1]), (paths[1], paths[0])):
            path.write_bytes(spoil(path.read_bytes()))
            with pytest.raises(CheckpointError) as error:
                store.load()
            assert error.value.path == paths[3]
            assert error.value.newest_good == good
            assert str(error.value).endswith(f"; the newest good checkpoint is {good}")
        paths[0].write_bytes(b"")
        with pytest.raises(CheckpointError) as error:
            store.load()
        assert error.value.newest_good is None

    def test_a_damaged_best_is_an_error(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        store.save(checkpoint(1, best=True)).write_bytes(b"PK")
        with pytest.raises(CheckpointError):
            store.load_best()

    def test_two_writers_at_once_are_one_too_many(self, tmp_path: Path) -> None:
        first, second = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
        with first:
            first.save(checkpoint(1))
            for enter in (lambda: second.save(checkpoint(2)), second.__enter__):
                with pytest.raises(CheckpointError, match="another writer is at work"):
                    enter()
            first.save(checkpoint(2))
        second.save(checkpoint(3))
        with second:
            assert number_in(second.load()) == 3

    @pytest.mark.parametrize("moment", ["flock", "listdir"])
    def test_an_interruption_while_it_is_entered_leaves_no_lock(
        self, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fcntl: Any = pytest.importorskip("fcntl")
        store, flock = CheckpointStore(tmp_path), fcntl.flock

        def interrupted(*given: Any) -> None:
            if moment == "flock":
                flock(*given)
            raise KeyboardInterrupt

        module: Any = fcntl if moment == "flock" else os
        monkeypatch.setattr(module, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.__enter__()
        monkeypatch.undo()
        with CheckpointStore(tmp_path):
            pass
        with store:
            store.save(checkpoint(1))

    def test_it_is_entered_once_at_a_time(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        for _ in range(2):
            with store:
                with pytest.raises(UsageError, match="has been entered already"):
                    store.__enter__()
                store.save(checkpoint(1))
        store.__exit__(None, None, None)

    def test_to_save_what_is_no_checkpoint_is_a_usage_error(self, tmp_path: Path) -> None:
        model: Any = {"w": np.ones(2)}
        for save in (
            lambda: save_checkpoint(tmp_path / "x.npz", model),
            lambda: CheckpointStore(tmp_path).save(model),
        ):
            with pytest.raises(UsageError, match="expected a Checkpoint to save, got a dict"):
                save()
        assert not list(tmp_path.iterdir())

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
        with pytest.raises(UsageError, match="'model/w' with an object of type 'MaskedArray'"):
            save_checkpoint(tmp_path / "x.npz", Checkpoint({"w": masked}, 1))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("keep", [0, -1, 1.5, True, "3"])
    def test_to_keep_none_is_a_usage_error(self, tmp_path: Path, keep: Any) -> None:
        with pytest.raises(UsageError, match="keep: expected a whole number of at least 1"):
            CheckpointStore(tmp_path, keep=keep)

    def test_a_folder_that_cannot_be_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        store = CheckpointStore(tmp_path / "file" / "folder")
        for act in (store.paths, store.load):
            with pytest.raises(CheckpointError, match="could not be read"):
                act()
        with pytest.raises(CheckpointError, match="the folder could not be made"):
            store.save(checkpoint(1))

    def test_a_folder_is_made_by_the_first_who_writes(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "a" / "b")
        assert store.paths() == ()
        assert store.load_best() is None
        with pytest.raises(CheckpointError, match="b: there is no such folder"):
            store.load()
        assert not list(tmp_path.iterdir())
        store.save(checkpoint(1))
        assert store.load().round == 1

    def test_a_folder_that_goes_away_under_a_writer_is_an_error(self, tmp_path: Path) -> None:
        with CheckpointStore(tmp_path / "a") as store:
            shutil.rmtree(store.folder)
            with pytest.raises(CheckpointError, match=r"round-00000001\.npz"):
                store.save(checkpoint(1))

    def test_a_read_only_folder_is_an_error_and_the_old_checkpoint_is_intact(
        self, tmp_path: Path
    ) -> None:
        # The tests may run as root, whom no permission stops: the system call says no instead.
        store = CheckpointStore(tmp_path)
        store.save(checkpoint(1))

        def refuse(*_: Any) -> Any:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic_file, "open", refuse, raising=False)
            with pytest.raises(CheckpointError, match="Read-only file system"):
                store.save(checkpoint(2))
        assert number_in(store.load()) == 1

    def test_the_arrays_that_are_loaded_are_the_callers(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        store.save(checkpoint(1))
        found: npt.NDArray[Any] = store.load().model["w"]
        found[:] = 7
        assert number_in(store.load()) == 1


def test_a_folder_in_the_place_of_a_checkpoint_keeps_no_other_one(tmp_path: Path) -> None:
    (tmp_path / "round-00000001.npz").mkdir()
    store = CheckpointStore(tmp_path, keep=3)
    for number in range(2, 12):
        store.save(Checkpoint({"w": np.ones(2)}, round=number))
    assert [path.name for path in store.paths()] == [
        f"round-{number:08d}.npz" for number in (1, 9, 10, 11)
    ]


FORKING = """
import os, sys
from fedavg_core.checkpoint_store import CheckpointStore
begun, ended = os.pipe(), os.pipe()
with CheckpointStore(sys.argv[1]):
    child = os.fork()
    if not child:
        os.close(ended[1])
        os.write(begun[1], b".")
        os.read(ended[0], 1)  # until the parent closes the other end
        os._exit(0)
    os.read(begun[0], 1)
with CheckpointStore(sys.argv[1]):
    print("free")
os.close(ended[1])
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_was_forked_does_not_hold_the_lock(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKING, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.returncode) == ("free\n", 0), ended.stderr


def test_a_folder_that_cannot_be_locked_is_not_said_to_be_another_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(CheckpointError, match=r"cannot be locked \(No locks available\)"),
        CheckpointStore(tmp_path),
    ):
        pass
