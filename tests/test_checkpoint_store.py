"""A folder of checkpoints: one writer, old or new whatever ends it, the newest and the best."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedavg_core import atomic_file
from fedavg_core.atomic_file import replacing
from fedavg_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.errors import CheckpointError, UsageError
from tests.checkpoints import checkpoint, number_in
from tests.conftest import THOROUGH
from tests.faults import Faults, fault_points

ROOT = Path(__file__).parents[1]
KILLS = 100 if THOROUGH else 3
"""How often a writing child is killed; 100 times in ci."""


class TestAFaultAtEveryOperation:
    """Whatever operation fails, once or from then on: old or new exactly."""

    def test_of_a_store(self, tmp_path: Path) -> None:
        numbers, points = itertools.count(), 0
        folders = (tmp_path / str(number) for number in numbers)

        template = CheckpointStore(tmp_path / "template")
        for number in (1, 2):
            template.save(checkpoint(number))

        def prepared() -> CheckpointStore:
            return CheckpointStore(shutil.copytree(template.folder, next(folders)), keep=2)

        first = prepared()
        for at, keep, partly in fault_points(lambda: first.save(checkpoint(3))):
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


WRITER = """
import itertools, sys
from fedavg_core.checkpoint_store import CheckpointStore
from tests.checkpoints import checkpoint
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
