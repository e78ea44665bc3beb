"""The benchmark of files larger than memory, with small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import out_of_core


def test_the_command_keeps_the_limit_and_the_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_core, "_LAYER", 1 << 12)
    given = ["--files", "3", "--size", "50kB", "--memory-limit", "200MiB"]
    assert out_of_core.main([*given, "--folder", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same_bits_as_in_memory"] is told["within_the_limit"] is True
    assert told["peak_of_an_idle_process_mib"] <= told["peak_mib"] + 10
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit code 2 of: "):
        out_of_core.main(
            ["--files", "1", "--size", "5kB", "--memory-limit", "1", "--folder", str(tmp_path)]
        )
    assert list(tmp_path.iterdir()) == []
