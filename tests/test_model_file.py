"""Model files, read in runs: every format and way to lie, and whatever is wrong with one."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fedavg_core.out_of_core.stored_array as stored_array_module
from fedavg_core.checkpoint import Checkpoint, save_checkpoint
from fedavg_core.codec.npz import write_npz
from fedavg_core.comparison import same_bits
from fedavg_core.errors import CheckpointError, Reason, RefusedUpdate, UsageError
from fedavg_core.model import dtype_named
from fedavg_core.out_of_core.allowance import Allowance
from fedavg_core.out_of_core.model_file import ModelFile, load_model
from tests.model_files import KINDS, Model, safetensors_bytes, tensor, write_model

MODEL: Model = {
    "a": np.arange(1000, dtype=np.float32).reshape(10, 100),
    "b": np.arange(24, dtype=">i4").reshape(2, 3, 4),
    "c": np.array(3.5),
    "e": np.zeros((0, 3), np.float16),
    "d": np.arange(3000, dtype=np.int64),
}


@pytest.fixture
def allowance(tmp_path: Path) -> Iterator[Allowance]:
    with allowed(tmp_path) as result:
        yield result


def allowed(folder: Path, inflaters: int = 5, places: int = 1 << 20) -> Allowance:
    return Allowance(folder, inflaters=inflaters, places=places, header=1 << 20)


def native(model: Model) -> Model:
    return {key: array.astype(array.dtype.newbyteorder("=")) for key, array in model.items()}


def read_in_runs(file: ModelFile, length: int) -> Model:
    """The model, by visits that go over its elements in order, some at a time."""
    parts: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in file.arrays()}
    todo = [
        (key, start, min(length, array.layout.size - start))
        for key, array in file.arrays().items()
        for start in range(0, array.layout.size, length)
    ]
    runs: dict[str, tuple[int, int]] = {}
    left = length
    for key, start, size in [*todo, ("", 0, 0)]:
        if runs and (left < size or key in runs or not key):
            for name, values in file.read(runs).items():
                parts[name].append(values)
            runs, left = {}, length
        runs[key] = start, size
        left -= size
    return {
        key: np.concatenate([np.empty(0, array.layout.dtype), *parts[key]]).reshape(
            array.layout.shape
        )
        for key, array in file.arrays().items()
    }


@pytest.mark.parametrize("length", [1, 7, 256, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_any_length_make_up_the_model(
    tmp_path: Path, allowance: Allowance, kind: str, length: int
) -> None:
    model = MODEL if kind != "safetensors" else native(MODEL)
    file = ModelFile(write_model(tmp_path / "m", kind, model), allowance)
    assert same_bits(read_in_runs(file, length), model)
    assert allowance.inflaters == 5


@pytest.mark.parametrize("places", [0, 2000])
@pytest.mark.parametrize("inflaters", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_allowance_changes_nothing(
    tmp_path: Path, kind: str, inflaters: int, places: int
) -> None:
    model = MODEL if kind != "safetensors" else native(MODEL)
    path = write_model(tmp_path / "m", kind, model)
    with allowed(tmp_path, inflaters, places) as allowance:
        files = [ModelFile(path, allowance) for _ in range(3)]
        for file in files:
            assert same_bits(read_in_runs(file, 300), model)
        before = {file: file.read({"a": (0, 300)})["a"] for file in files}
        after = {file: file.read({"a": (300, 700)})["a"] for file in files}
        for file in files:
            both = np.concatenate([before[file], after[file]])
            assert both.tobytes() == MODEL["a"].tobytes()
    assert [entry for entry in tmp_path.iterdir() if entry != path] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_whole(tmp_path: Path, kind: str) -> None:
    loaded = load_model(str(write_model(tmp_path / "m", kind, native(MODEL))))
    assert same_bits(loaded, native(MODEL))
    assert all(array.flags.writeable for array in loaded.values())


def test_a_checkpoint_an_array_alone_and_what_is_no_model_are_loaded_as_such(
    tmp_path: Path,
) -> None:
    save_checkpoint(tmp_path / "c.npz", Checkpoint({"w": np.ones(2)}, 3, arrays={"m": np.ones(1)}))
    assert same_bits(load_model(tmp_path / "c.npz"), {"w": np.ones(2)})
    np.save(tmp_path / "w.npy", np.arange(3))
    assert same_bits(load_model(tmp_path / "w.npy"), {"arr_0": np.arange(3)})
    np.savez(tmp_path / "b.npz", w=np.array([True]))
    with pytest.raises(UsageError, match=r"b.npz: DTYPE \(key 'w'\): expected an array of real"):
        load_model(tmp_path / "b.npz")
    with pytest.raises(CheckpointError, match="could not be read"):
        load_model(tmp_path / "none.npz")


@pytest.mark.parametrize("kind", ["npz", "deflated"])
@pytest.mark.parametrize("length", [3, 64, 150, 500, 5000])
@pytest.mark.parametrize("tile", [3, 256])
def test_fortran_order_is_read_in_c_order(
    tmp_path: Path, kind: str, length: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_array_module, "_TILE", tile)
    model: Model = {
        "w": np.asfortranarray(np.arange(600, dtype=np.float32).reshape(20, 30)),
        "x": np.asfortranarray(np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)),
        "y": np.asfortranarray(np.arange(200, dtype=np.float64).reshape(100, 1, 2)),
        "z": np.asfortranarray(np.arange(600, dtype=np.float32).reshape(1, 2, 300)),
    }
    with allowed(tmp_path) as allowance:
        file = ModelFile(write_model(tmp_path / "m", kind, model), allowance)
        assert same_bits(read_in_runs(file, length), model)
    np.save(tmp_path / "w.npy", model["w"])
    with allowed(tmp_path) as allowance:
        file = ModelFile(tmp_path / "w.npy", allowance)
        assert same_bits(read_in_runs(file, length), {"arr_0": model["w"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inflaters", [0, 5])
def test_runs_may_come_in_any_order(tmp_path: Path, kind: str, inflaters: int) -> None:
    model = native(MODEL)
    path = write_model(tmp_path / "m", kind, model)
    random = np.random.default_rng(1)
    with allowed(tmp_path, inflaters) as allowance:
        file = ModelFile(path, allowance)
        for _ in range(60):
            runs = {}
            for key in random.permutation(["a", "b", "d", "other"]).tolist():
                size = model[key].size if key in model else 1
                start = int(random.integers(size))
                runs[key] = start, int(random.integers(1, size - start + 1))
            found = file.read(runs)
            assert found.keys() == {"a", "b", "d"}
            for key, values in found.items():
                start, size = runs[key]
                assert values.tobytes() == model[key].reshape(-1)[start : start + size].tobytes()


def test_only_what_is_there_is_read(tmp_path: Path, allowance: Allowance) -> None:
    file = ModelFile(write_model(tmp_path / "m", "npz", MODEL), allowance)
    assert file.read({"z": (0, 1)}) == {}
    assert file.read({}) == {}
    assert list(file.arrays()) == list(MODEL)
    assert len(file.arrays()) == 5


def test_an_npy_file_is_one_array(tmp_path: Path, allowance: Allowance) -> None:
    np.save(tmp_path / "w.npy", MODEL["a"])
    file = ModelFile(tmp_path / "w.npy", allowance)
    assert same_bits(read_in_runs(file, 64), {"arr_0": MODEL["a"]})


@pytest.mark.parametrize("kind", [*KINDS, "npy"])
def test_without_a_telling_suffix_the_first_bytes_tell(
    tmp_path: Path, allowance: Allowance, kind: str
) -> None:
    if kind == "npy":
        np.save(tmp_path / "m.npy", MODEL["d"])
        model, path = {"arr_0": MODEL["d"]}, tmp_path / "m.npy"
    else:
        model = native(MODEL)
        path = write_model(tmp_path / "m", kind, model)
    path.rename(tmp_path / "model.v2")
    assert same_bits(read_in_runs(ModelFile(tmp_path / "model.v2", allowance), 999), model)


@pytest.mark.parametrize("content", [b"", b"P", b"PK\3\4", b"\x93NUMPY", b"some text, no model"])
def test_of_a_file_that_is_no_model_the_suffix_is_told(
    tmp_path: Path, allowance: Allowance, content: bytes
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"or safetensors, got suffix '\.pt'"):
        ModelFile(path, allowance)
    bare = path.rename(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        ModelFile(bare, allowance)
    assert "suffix" not in str(error.value)


def test_extension_dtypes_are_read(tmp_path: Path, allowance: Allowance) -> None:
    names = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
    model = {name: np.arange(9).astype(dtype_named(name)) for name in names}
    for kind in ("sealed", "safetensors"):
        file = ModelFile(write_model(tmp_path / "m", kind, model), allowance)
        assert same_bits(read_in_runs(file, 4), model)


def spoilt(change: Callable[[bytearray], object], kind: str = "npz") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write_model(folder / "m", kind, MODEL)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return path

    return make


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def npz_of(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def folder_of(folder: Path) -> Path:
    (folder / "m.npz").mkdir()
    return folder / "m.npz"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "m.npz", "could not be read (No such file or directory)"),
        (folder_of, "expected a file, got a folder or a device"),
        (raw("m.npz", b""), "damaged, or no npz file: no end of a zip archive at its end"),
        (raw("m.bin", b""), "m.bin: expected npz, npy or safetensors, got suffix '.bin'"),
        (raw("m.npy", b""), "unreadable ('expected 8 more bytes, got 0')"),
        (raw("m", b"PK"), "damaged, or no npz file: no end of a zip archive at its end"),
        (raw("m.txt", b"PK"), "got suffix '.txt' (damaged, or no npz file: no end of a zip "),
        (
            raw("m.safetensors", b"hello, this is no model"),
            "no safetensors file, or damaged: it begins with a header length of",
        ),
        (
            raw("m.safetensors", safetensors_bytes({"w": tensor("F32", [1], 0, 4)}, b"abc")),
            "its tensors end at byte 73, and the file at 72",
        ),
        (spoilt(lambda data: data.__delitem__(slice(-30, None))), "no end of a zip archive"),
        (spoilt(lambda data: data.__setitem__(5000, 1), "sealed"), "do not match their checksum"),
        (spoilt(lambda data: data.__setitem__(0, 0)), "member 'a.npy': no member is where it"),
        (
            raw("m.npz", npz_of(w=np.array([{}], object))),
            "member 'w.npy': expected a header that describes an array of numbers",
        ),
        (raw("m.npz", npz_of(w=np.ones(1, complex))), "member 'w.npy': expected an array of numb"),
        (raw("m.npz", archive_of({"w.txt": b""})), "member 'w.txt': expected an array, a .npy"),
        (raw("m.npz", archive_of({"../w.npy": b""})), "expected the name of an array that is no p"),
        (raw("m.npz", archive_of({"w.npy": b"x" * 80})), "not an npy array of version 1, 2 or 3"),
        (
            raw("w.npy", npy_bytes(np.zeros(4))[:-1]),
            "the file: its header says (4,) of float64, 32 bytes, and 31 are there",
        ),
    ],
)
def test_a_file_that_is_damaged_or_no_model_is_told_at_once(
    tmp_path: Path, allowance: Allowance, make: Callable[[Path], Path], problem: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as error:
        ModelFile(path, allowance)
    assert error.value.path == path
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)


@pytest.mark.parametrize("inflaters", [0, 5])
@pytest.mark.parametrize("kind", ["npz", "deflated"])
@pytest.mark.parametrize("length", [100, 5000])
def test_a_flipped_bit_is_found_when_the_member_has_been_read(
    tmp_path: Path, kind: str, length: int, inflaters: int
) -> None:
    random = np.random.default_rng(3)
    model: Model = {"w": random.standard_normal(1000), "v": random.standard_normal(10)}
    path = write_model(tmp_path / "m", kind, model)
    with zipfile.ZipFile(path) as archive:
        middle = archive.infolist()[0].compress_size // 2
    good = path.read_bytes()
    told = set()
    for at in range(middle, middle + 40):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        with allowed(tmp_path, inflaters) as allowance:
            file = ModelFile(path, allowance)
            with pytest.raises(CheckpointError) as error:
                read_in_runs(file, length)
        told.add(error.value.problem.partition("(")[0])
        assert "key 'w': " in str(error.value)
    assert any("its bytes do not match their checksum" in problem for problem in told)


def deflated(packed: bytes, inflated: bytes, crc: int | None = None) -> bytes:
    """An npz with one deflated member, whose bytes and what is declared of them are given."""
    file = io.BytesIO()
    name = b"w.npy"
    crc = zipfile.crc32(inflated) if crc is None else crc  # type: ignore[attr-defined]
    common = crc.to_bytes(4, "little") + len(packed).to_bytes(4, "little")
    common += len(inflated).to_bytes(4, "little") + len(name).to_bytes(2, "little") + b"\0\0"
    head = b"\x14\0\0\0\x08\0\0\0\x21\0"
    file.write(b"PK\3\4" + head + common + name + packed)
    start = file.tell()
    file.write(b"PK\1\2\x14\0" + head + common + bytes(14) + name)
    size = file.tell() - start
    file.write(b"PK\5\6\0\0\0\0\1\0\1\0" + size.to_bytes(4, "little"))
    file.write(start.to_bytes(4, "little") + b"\0\0")
    return file.getvalue()


def pack(data: bytes) -> bytes:
    compressor = zipfile.zlib.compressobj(9, zipfile.zlib.DEFLATED, -15)  # type: ignore[attr-defined]
    return bytes(compressor.compress(data) + compressor.flush())


NPY = npy_bytes(np.arange(3000.0))


@pytest.mark.parametrize("inflaters", [0, 5])
@pytest.mark.parametrize("length", [700, 3000])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (deflated(pack(NPY), NPY), None),
        (deflated(pack(NPY), NPY, 1), "key 'w': its bytes do not match their checksum"),
        (deflated(pack(NPY) + b"xx", NPY), "key 'w': its deflated bytes go on after its end"),
        (deflated(pack(NPY) + b"x" * 99_999, NPY), "key 'w': its deflated bytes go on after its"),
        (deflated(pack(NPY + b"x"), NPY), "key 'w': its deflated bytes go on after its end"),
        (deflated(pack(NPY[:-1]), NPY), "key 'w': a member is shorter than it declares"),
        (deflated(pack(NPY)[:-20], NPY), "key 'w': a member is shorter than it declares"),
        (deflated(pack(NPY)[:-1], NPY), "key 'w': its deflated bytes go on after its end"),
    ],
)
def test_deflated_bytes_must_be_just_what_is_declared(
    tmp_path: Path, data: bytes, problem: str | None, length: int, inflaters: int
) -> None:
    path = raw("m.npz", data)(tmp_path)
    with allowed(tmp_path, inflaters) as allowance:
        file = ModelFile(path, allowance)
        if problem is None:
            assert same_bits(read_in_runs(file, length), {"w": np.arange(3000.0)})
        else:
            with pytest.raises(CheckpointError) as error:
                read_in_runs(file, length)
            assert str(error.value).startswith(f"{path}: {problem}")


@pytest.mark.parametrize("places", [0, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_between_visits_is_refused(
    tmp_path: Path, kind: str, places: int
) -> None:
    path = write_model(tmp_path / "m", kind, native(MODEL))
    with allowed(tmp_path, places=places) as allowance:
        file = ModelFile(path, allowance)
        file.read({"a": (0, 10)})
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError) as error:
            file.read({"a": (10, 990)})
        assert str(error.value) == f"{path}: it has changed while it was read"
        path.unlink()
        with pytest.raises(CheckpointError, match="could not be read"):
            file.read({"a": (10, 990)})


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_file_that_changes_during_a_visit_is_refused(
    tmp_path: Path, kind: str, allowance: Allowance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "m", kind, {"arr_0": np.zeros(1000)})
    file = ModelFile(path, allowance)
    read = stored_array_module._fill

    def changed_after(source: Any, at: int, view: Any) -> None:
        read(source, at, view)
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # as a writer does

    monkeypatch.setattr(stored_array_module, "_fill", changed_after)
    with pytest.raises(CheckpointError, match="it has changed while it was read"):
        file.read({"arr_0": (0, 1000)})


def test_a_file_that_is_cut_short_while_it_is_open_is_damage(
    tmp_path: Path, allowance: Allowance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "m", "safetensors", native(MODEL))
    file = ModelFile(path, allowance)
    size = path.stat().st_size
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        result = real(descriptor)
        os.truncate(path, size - 100)
        return result

    monkeypatch.setattr("fedavg_core.out_of_core.model_file.os.fstat", fstat)
    with pytest.raises(CheckpointError) as error:
        read_in_runs(file, 5000)
    assert str(error.value) == f"{path}: unreadable ('the file is shorter than it declares')"


def test_arrays_that_hold_no_real_numbers_are_refused(tmp_path: Path, allowance: Allowance) -> None:
    path = write_model(tmp_path / "m", "npz", {"w": np.ones(2), "mask": np.ones(2, bool)})
    with pytest.raises(RefusedUpdate) as refusal:
        ModelFile(path, allowance)
    assert refusal.value.reason is Reason.DTYPE
    assert refusal.value.key == "mask"


def test_a_safetensors_header_longer_than_allowed_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "safetensors", native(MODEL))
    with (
        Allowance(tmp_path, inflaters=0, places=0, header=100) as allowance,
        pytest.raises(CheckpointError, match="bytes; the limit is 100"),
    ):
        ModelFile(path, allowance)


def test_what_is_interrupted_in_tidying_up_leaves_no_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "m", "npz", MODEL)
    (tmp_path / "scratch").mkdir()

    remove, interruptions = shutil.rmtree, iter([KeyboardInterrupt()])

    def interrupted(*arguments: Any, **options: Any) -> None:
        for interruption in interruptions:
            raise interruption
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), allowed(tmp_path / "scratch", places=0) as allowance:
        ModelFile(path, allowance)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_without_room_for_scratch_files_it_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "deflated", MODEL)
    with allowed(tmp_path / "none", inflaters=0) as allowance:
        file = ModelFile(path, allowance)
        with pytest.raises(CheckpointError) as error:
            file.read({"a": (0, 10)})
    assert str(error.value) == (
        f"{tmp_path / 'none'}: a scratch file could not be written (No such file or directory)"
    )


def test_scratch_files_are_gone_as_soon_as_they_have_been_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "deflated", MODEL)
    (tmp_path / "scratch").mkdir()

    def scratch_files() -> int:
        return sum(path.is_file() for path in (tmp_path / "scratch").rglob("*"))

    with allowed(tmp_path / "scratch", inflaters=0) as allowance:
        files = [ModelFile(path, allowance) for _ in range(3)]
        for count, file in enumerate(files):
            file.read({"a": (0, 10)})
            assert scratch_files() == count + 1
        for file in files:
            file.read({"a": (10, 990)})
        assert scratch_files() == 0
        files[0].read({"a": (0, 10)})
        files[0].read({"d": (5, 10)})
        assert scratch_files() == 1
    assert list((tmp_path / "scratch").iterdir()) == []


def test_places_for_which_there_is_no_memory_are_kept_in_a_scratch_file(tmp_path: Path) -> None:
    models: list[Model] = [
        {f"layer{number}": np.full(1, number * shift) for number in range(100)}
        for shift in range(4)  # no two have the same checksums
    ]
    paths = [write_model(tmp_path / str(n), "npz", model) for n, model in enumerate(models)]
    (tmp_path / "scratch").mkdir()
    with allowed(tmp_path / "scratch", places=2 * 100 * 25) as allowance:
        files = [ModelFile(path, allowance) for path in paths[:2]]
        assert not list((tmp_path / "scratch").iterdir())
        files += [ModelFile(path, allowance) for path in paths[2:]]
        (scratch,) = (file for file in (tmp_path / "scratch").rglob("*") if file.is_file())
        assert scratch.stat().st_size == 2 * 100 * 25
        assert all(file.arrays() is file.arrays() for file in files)  # and not listed anew
        for file, model in zip(files, models, strict=True):
            assert same_bits(read_in_runs(file, 4), model)
    assert not list((tmp_path / "scratch").iterdir())


def test_what_files_are_that_are_not_alike_is_looked_up_where_there_is_no_memory(
    tmp_path: Path,
) -> None:
    models = [{f"{name}{number}": np.ones(1) for number in range(9)} for name in "abc"]
    paths = [write_model(tmp_path / str(n), "npz", model) for n, model in enumerate(models)]
    with allowed(tmp_path, places=9 * (512 + 25)) as allowance:
        files = [ModelFile(path, allowance) for path in (*paths, paths[0])]
        kept = [file.arrays() is file.arrays() for file in files]
        assert kept == [True, True, False, True]
        assert all(
            same_bits(read_in_runs(file, 1), model)
            for file, model in zip(files, models, strict=False)
        )


def test_places_for_which_there_is_no_scratch_file_either_are_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "npz", MODEL)
    with (
        allowed(tmp_path / "none", places=0) as allowance,
        pytest.raises(CheckpointError, match="none: a scratch file could not be written"),
    ):
        ModelFile(path, allowance)


def test_a_checkpoint_is_the_model_in_it(tmp_path: Path, allowance: Allowance) -> None:
    model = {"w": np.arange(6.0), "model/w": np.ones(2), "array-0": np.ones(1), "": np.ones(3)}
    state = {"w": np.zeros(2), "used": np.ones(1, bool)}
    path = tmp_path / "m"
    save_checkpoint(path, Checkpoint(model, 3, {"loss": 0.5}, arrays=state, best=True))
    file = ModelFile(path, allowance)
    assert same_bits(read_in_runs(file, 4), model)
    found = file.checkpoint()
    assert found is not None
    assert (found.round, found.metrics, found.best) == (3, {"loss": 0.5}, True)
    for kind in ("npz", "sealed", "safetensors"):
        other = ModelFile(write_model(tmp_path / kind, kind, {"w": np.ones(1)}), allowance)
        assert other.checkpoint() is None
        assert list(other.arrays()) == ["w"]


@pytest.mark.parametrize(
    ("name", "meta", "problem"),
    [
        ("model/w", {"checkpoint": 2}, "no checkpoint of format 1, the one that this version"),
        ("w", {"checkpoint": 1}, "its contents are not those of a checkpoint"),
        ("model/w", {"checkpoint": 1}, "its contents are not those of a checkpoint"),
    ],
)
def test_what_only_says_that_it_is_a_checkpoint_is_refused(
    name: str, meta: dict[str, Any], problem: str, tmp_path: Path, allowance: Allowance
) -> None:
    with open(tmp_path / "m.npz", "x+b") as file:
        write_npz(file, {name: np.ones(2)}, meta)
    with pytest.raises(CheckpointError, match=problem):
        ModelFile(tmp_path / "m.npz", allowance)


def test_a_sealed_file_without_arrays_is_an_empty_model(
    tmp_path: Path, allowance: Allowance
) -> None:
    with open(tmp_path / "m.npz", "x+b") as file:
        write_npz(file, {})
    assert dict(ModelFile(tmp_path / "m.npz", allowance).arrays()) == {}
