"""The README's examples do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_examples_run_one_after_the_other_and_print_what_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    examples = blocks("python")
    assert len(examples) == 4
    exec(examples[0], names)
    assert capsys.readouterr().out == blocks("text")[0]
    for example in examples[1:]:
        exec(example, names)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[0-9.]+ ms a client, order-independent", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "3", "4"]


@pytest.mark.nvflare
def test_the_recipe_is_made_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(blocks("python")[2])
    names: dict[str, Any] = {}
    example = blocks("python notest")[0]
    exec(
        "import numpy as np\n" + example.replace("recipe.execute(SimEnv(num_clients=2))", ""), names
    )
    assert names["recipe"].num_rounds == 5


def test_there_is_one_command_for_the_main_job_and_one_for_the_tests() -> None:
    for purpose in ("main job", "tests"):
        assert re.search(rf"^<!-- command: {purpose} -->\n```sh\n.+\n```$", README, re.MULTILINE)
