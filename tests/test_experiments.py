"""The experiments: MNIST's files, who gets what, the network, and rounds to a goal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedavg_core as fc
from benchmarks.experiments import network
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.data import digits, mnist, read_idx
from benchmarks.experiments.paper import TABLE_1, figure
from benchmarks.experiments.play import Experiment, Setting, crossing, play
from benchmarks.experiments.split import SPLITS, iid, two_shards


def idx(array: Any, kind: int = 8) -> bytes:
    values = np.asarray(array, np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + values.tobytes()


def written(folder: Path, images: int = 400) -> Path:
    """MNIST's four files, two of them packed, of blots whose place tells the digit."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", images), ("t10k", 100)):
        labels = np.arange(count) % 10
        pixels = rng.integers(0, 40, (count, 28, 28))
        for at, label in enumerate(labels):
            pixels[at, 2 * label : 2 * label + 8, 2 * label : 2 * label + 8] += 200
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{name}-labels.idx1-ubyte").write_bytes(idx(labels))
    return folder


def test_idx_files_are_read_packed_or_not(tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(values))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(values)))
    assert np.array_equal(read_idx(tmp_path / "plain", 3), values)
    assert np.array_equal(read_idx(tmp_path / "packed.gz", 3), values)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "expected an IDX file of bytes in 3 dimensions"),
        (idx(np.zeros((2, 3))), "expected an IDX file of bytes in 3 dimensions"),
        (idx(np.zeros((2, 3, 4)), kind=9), "expected an IDX file of bytes in 3 dimensions"),
        (idx(np.zeros((2, 3, 4)))[:-1], "expected 24 elements for the shape [2, 3, 4]"),
        (idx(np.zeros((2, 3, 4))) + b"x", "expected 24 elements for the shape [2, 3, 4]"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "expected at most 1073741824 elements, got 79228"),
    ],
)
def test_damaged_idx_files_are_told(content: bytes, problem: str, tmp_path: Path) -> None:
    for name, data in (("file", content), ("file.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(fc.UsageError) as caught:
            read_idx(tmp_path / name, 3)
        assert str(caught.value).startswith(f"{tmp_path / name}: {problem}")


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    packed = gzip.compress(idx(np.zeros((2, 30, 4))))
    for content in (b"junk", packed[:-9], packed[:20] + b"\xff\xff\xff" + packed[23:]):
        (tmp_path / "file.gz").write_bytes(content)
        with pytest.raises(fc.UsageError, match=r"file\.gz: "):
            read_idx(tmp_path / "file.gz", 3)


def test_mnist_is_four_files_that_belong_together(tmp_path: Path) -> None:
    folder = written(tmp_path / "mnist")
    data = mnist(folder)
    assert data.train_images.shape == (400, 784)
    assert data.train_images.dtype == np.float32
    assert 0.9 < data.train_images.max() <= 1
    assert data.train_labels.tolist()[:12] == [*range(10), 0, 1]
    assert data.test_images.shape == (100, 784)

    def damage(name: str, content: bytes, problem: str) -> None:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(fc.UsageError, match=problem):
            mnist(folder)
        (folder / name).write_bytes(before)

    damage("t10k-labels.idx1-ubyte", idx(np.arange(99) % 10), "100 images and 99 labels in t10k")
    damage("t10k-labels.idx1-ubyte", idx(np.arange(100) % 11), "expected labels from 0 to 9")
    damage(
        "t10k-images-idx3-ubyte.gz",
        gzip.compress(idx(np.zeros((100, 14, 14)))),
        "expected images of one size",
    )
    (folder / "train-labels.idx1-ubyte").unlink()
    with pytest.raises(fc.UsageError, match="expected a file train-labels-idx1-ubyte or "):
        mnist(folder)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_deals_out_everything_once(split: str) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    shares = SPLITS[split](labels, 30, 5)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(1000))
    assert {len(share) for share in shares} <= {32, 33, 34}
    assert all(np.array_equal(share, np.sort(share)) for share in shares)
    again = SPLITS[split](labels, 30, 5)
    assert all(map(np.array_equal, shares, again))
    other = SPLITS[split](labels, 30, 6)
    assert not all(map(np.array_equal, shares, other))
    for clients in (0, 1001):
        with pytest.raises(fc.UsageError, match=r"clients for 1000 examples, got"):
            SPLITS[split](labels, clients, 0)


def test_with_two_shards_most_clients_have_two_digits_as_in_the_paper() -> None:
    labels = np.repeat(np.arange(10), 6000)
    np.random.default_rng(0).shuffle(labels)
    shares = two_shards(labels, 100, 0)
    assert [len(share) for share in shares] == [600] * 100
    assert {len(set(labels[share])) for share in shares} == {1, 2}
    kinds = [len(set(labels[share])) for share in iid(labels, 100, 0)]
    assert kinds == [10] * 100


def test_the_network_of_the_paper_has_its_number_of_parameters() -> None:
    model = network.initial((784, 200, 200, 10), 0)
    assert sum(array.size for array in model.values()) == 199_210
    assert {array.dtype.name for array in model.values()} == {"float32"}
    assert fc.same_bits(model, network.initial((784, 200, 200, 10), 0))


def test_a_step_goes_down_the_gradient() -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((30, 6)).astype(np.float32)
    labels = rng.integers(0, 10, 30)
    model = network.initial((6, 5, 4, 10), 1)

    def loss(params: fc.Params) -> float:
        copy = {key: array.copy() for key, array in params.items()}
        settings: dict[str, Any] = {"epochs": 1, "batch": None, "rate": 1e-12, "seed": 0}
        return network.train(copy, images, labels, **settings)

    trained = {key: array.copy() for key, array in model.items()}
    network.train(trained, images, labels, epochs=1, batch=None, rate=1e-2, seed=0)
    for key, array in model.items():
        gradient = (array - trained[key]) / 1e-2
        place = np.unravel_index(np.abs(gradient).argmax(), array.shape)
        moved = {name: one.copy() for name, one in model.items()}
        moved[key][place] += 1e-3
        there = loss(moved)
        moved[key][place] -= 2e-3
        assert (there - loss(moved)) / 2e-3 == pytest.approx(gradient[place], rel=1e-2)


def test_accuracy_counts_what_is_right_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"weight-1": np.eye(10, dtype=np.float32), "bias-1": np.zeros(10, np.float32)}
    images = np.eye(10, dtype=np.float32)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    monkeypatch.setattr(network, "_PART", 3)
    assert network.accuracy(model, images, labels) == 0.7


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.1, 0.5, 0.9], None),
        ([0.1, 0.5, 0.9, 1.0], 2.7),
        ([0.1, 0.9, 0.3, 0.99], 2 + 7 / 9),
        ([0.98], 0.0),
        ([0.1, 0.97], 1.0),
        ([], None),
    ],
)
def test_a_goal_is_reached_between_rounds(accuracies: list[float], expected: float | None) -> None:
    found = crossing(accuracies, 0.97)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_setting_is_played_to_its_goal() -> None:
    experiment = Experiment("digits", digits(), (16,), clients=10, goal=0.8, rounds=60)
    told = []
    setting = Setting("iid", 0.2, 10, 1)
    found = play(experiment, setting, 0.1, told=lambda number, accuracy: told.append(number))
    assert found.rounds is not None
    assert found.accuracies[-1] >= 0.8 > max(found.accuracies[:-1])
    assert told == list(range(len(found.accuracies) - 1))
    assert play(experiment, setting, 0.1).accuracies == found.accuracies
    alone = play(experiment, Setting("iid", 0.0, 10, 1), 0.1, seed=1)
    assert alone.accuracies != found.accuracies


def test_the_papers_figures_are_those_of_one_epoch() -> None:
    assert len(TABLE_1) == 20
    assert figure("iid", 0.1, 10, 1) == "87"
    assert figure("non-iid", 0.0, None, 1) == "4,278"
    assert figure("iid", 1.0, None, 1) == "not reached"
    assert figure("iid", 0.1, 10, 5) == figure("iid", 0.3, 10, 1) == ""


def test_the_command_plays_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--splits", "iid", "--fractions", "0.5", "--batches", "10,all", "--epochs", "2"]
    given += ["--rounds", "8", "--goal", "0.6", "--rates", "0.05,0.2", "--clients", "5"]
    saved = tmp_path / "curves.json"
    assert main([*given, "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "rounds to 60%" in out
    assert "table 1" not in out
    curves = json.loads(saved.read_text())
    assert [one["setting"]["batch"] for one in curves] == [10, None]
    assert {one["rate"] for one in curves} <= {0.05, 0.2}


def test_the_command_sets_the_papers_figures_beside_those_of_mnist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "mnist")
    given = ["--mnist", str(folder), "--fractions", "0.1", "--batches", "10", "--clients", "20"]
    assert main([*given, "--rounds", "40", "--goal", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "MNIST, 2NN" in out
    assert "table 1" in out
    lines = [line.split() for line in out.splitlines() if "iid" in line]
    assert [line[0] for line in lines] == ["iid", "non-iid"]
    assert [line[6] for line in lines] == ["87", "664"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--mnist", "nowhere"], "experiments: nowhere: expected a file train-images-idx3-ubyte"),
        (["--splits", "even"], "argument --splits: expected iid or non-iid, with commas"),
        (["--fractions", "0.1,2"], "argument --fractions: expected numbers from 0 to 1"),
        (["--batches", "0"], "argument --batches: expected whole numbers or all"),
        (["--rates", "nan"], "argument --rates: expected numbers above 0"),
        (["--clients", "9999"], "expected from 1 to 1438 clients for 1438 examples, got 9999"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert problem in captured.err
    assert captured.err.count("\n") == 1


def test_what_was_played_is_shown_when_it_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([1, 2])

    def playing(*given: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return play(*given)

    monkeypatch.setattr("benchmarks.experiments.__main__.play", playing)
    given = ["--fractions", "0.5", "--batches", "10", "--rounds", "1", "--clients", "3"]
    assert main(given) == 130
    assert "not reached" in capsys.readouterr().out
