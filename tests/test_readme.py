"""The README's examples do what they say, each pasted into a file of its own."""

from __future__ import annotations

import ast
import re
import shlex
from glob import glob
from pathlib import Path

import pytest

from fedavg_core.cli.command import main as fedavg
from tests.examples import read_blocks
from tests.examples import run_alone as run

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return [block.text for block in read_blocks(README) if block.kind == kind]


def test_there_are_five_examples() -> None:
    assert (len(blocks("python")), len(blocks("python simulator"))) == (4, 1)


def test_the_arithmetic_prints_what_is_shown(tmp_path: Path) -> None:
    assert run(blocks("python")[0], tmp_path) == blocks("text")[0]


def test_the_measurement_measures(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"[0-9.]+ ms a client, order-independent\n", run(blocks("python")[1], tmp_path)
    )


def test_the_federation_plays_its_rounds(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(blocks("python")[2], encoding="utf-8")
    printed = run(blocks("python")[3], tmp_path)
    assert [line.split()[0] for line in printed.splitlines()] == ["0", "1", "2", "3", "4"]


@pytest.mark.simulator
@pytest.mark.xdist_group("simulator")
def test_the_recipe_ends_in_the_model_of_the_federation(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(blocks("python")[2], encoding="utf-8")
    in_process = run(blocks("python")[3], tmp_path).splitlines()[-1]
    on_nvflare = run(blocks("python simulator")[0], tmp_path).splitlines()[-1]
    assert on_nvflare == in_process[in_process.index("[") :]


def test_the_examples_parse_on_every_python() -> None:
    for example in (*blocks("python"), *blocks("python simulator")):
        ast.parse(example, feature_version=(3, 10))


def test_there_is_one_command_for_the_main_job_and_one_for_the_tests() -> None:
    for purpose in ("main job", "tests"):
        assert re.search(rf"^<!-- command: {purpose} -->\n```sh\n.+\n```$", README, re.MULTILINE)


def test_the_command_line_does_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(blocks("python")[2], encoding="utf-8")
    found = re.search(
        r"^<!-- command line -->\n```sh\n(.+?)\n```$", README, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    commands = [shlex.split(line, comments=True) for line in found.group(1).splitlines()]
    assert {command[0] for command in commands} == {".venv/bin/fedavg"}
    assert len(commands) == 6
    for command in commands:
        # As a shell has it: a pattern stands for the files of that name.
        words = [sorted(glob(word)) if "*" in word else [word] for word in command[1:]]
        assert fedavg([word for several in words for word in several]) == 0, command
    assert Path("report.html").stat().st_size > 10_000
    assert "same" in capsys.readouterr().out.splitlines()[-1]
