"""Files written in one commit: old or new whatever fails, and folders that outlast a power cut."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedavg_core.atomic_file import replacing
from fedavg_core.checkpoint import load_checkpoint, save_checkpoint
from fedavg_core.checkpoint_store import CheckpointStore
from fedavg_core.errors import CheckpointError
from tests.checkpoints import checkpoint, number_in
from tests.faults import Faults, fault_points


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

    def test_is_refused_before_anything_is_written_where_something_is(self, tmp_path: Path) -> None:
        path = tmp_path / "new"
        path.symlink_to("nowhere")
        with (
            pytest.raises(CheckpointError, match="it is there already, and is not replaced"),
            replacing(path, old=False),
        ):
            raise AssertionError
        assert os.listdir(tmp_path) == ["new"]

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


class TestAFaultAtEveryOperation:
    """Whatever operation fails, once or from then on: old or new exactly."""

    @pytest.mark.parametrize("old", [None, 1])
    def test_of_a_file(self, tmp_path: Path, old: int | None) -> None:
        path, points = tmp_path / "one.npz", 0
        for at, keep, partly in fault_points(lambda: save_checkpoint(path, checkpoint(9))):
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


def test_new_folders_are_entered_where_they_are_in_before_anything_is_stored_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("fedavg_core.atomic_file._flush_folder", flushed.append)
    folder = tmp_path / "runs" / "first"
    CheckpointStore(folder).save(checkpoint(1))
    assert flushed == [tmp_path / "runs", tmp_path, folder]
