"""The examples of the project's pages, taken out of the Markdown that they stand in, and run.

A page is read as a reader would go through it: its blocks follow one another, as in one session.

    ```python      is run, in the names of the page's earlier blocks
    ```text        is what the block before it prints
    ```console     lines that begin with ``$ `` are run; the others are what they print
    ```mermaid     is a drawing

A comment in the line above a block says what else is to be done with it:

    <!-- file: train.py -->      save it under this name, and do not run it
    <!-- needs: nvflare -->      run it where NVFlare is
    <!-- needs: simulator -->    run it alone where NVFlare's simulator may be started, which
                                 prints more, and that before
    <!-- exit code: 1 -->        what the last command of a console gives back
    <!-- not run: the reason --> nothing

Every block must be one of these: what is neither run nor excused is an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "Page", "read_blocks", "run_alone"]

_BLOCK = re.compile(
    r"^(?P<margin> *)(?:<!-- (?P<note>.+?) -->\n(?P=margin))?```(?P<kind>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=margin)```$",
    re.MULTILINE | re.DOTALL,
)
_COMMANDS = {"fedavg": [sys.executable, "-m", "fedavg_core.cli"], "python": [sys.executable]}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        kind: What stands behind its fence.
        text: What is in it.
        line: The number of the line that its text begins with, from 1 on.
        note: The comment in the line above, or nothing.
    """

    kind: str
    text: str
    line: int
    note: str

    def noted(self, word: str) -> str:
        """What a note of one kind says; nothing if there is none."""
        return self.note.removeprefix(f"{word}: ") if self.note.startswith(f"{word}: ") else ""


def read_blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(
            found["kind"],
            textwrap.dedent(found["text"]),
            1 + markdown.count("\n", 0, found.start("text")),
            found["note"] or "",
        )
        for found in _BLOCK.finditer(markdown)
    ]


def run_alone(example: str, folder: Path) -> str:
    """What an example prints that was pasted into a file of its own."""
    (folder / "example.py").write_text(example, encoding="utf-8")
    return _printed([sys.executable, "example.py"], folder)


class Page:
    """A page, and what it takes to play it.

    Args:
        path: Its file.
        needs: Which of the blocks that need something are run as well.
    """

    def __init__(self, path: Path, needs: frozenset[str] = frozenset()) -> None:
        self.path = path
        self.blocks = read_blocks(path.read_text(encoding="utf-8"))
        self._needs = needs
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def play(self, folder: Path) -> list[tuple[Block, str, str]]:
        """Run the blocks in order, in a folder.

        Args:
            folder: Where; must be the current one, and one that modules are imported from.

        Returns:
            Each block that was run, what the page says that it prints, and what it printed.
        """
        played = []
        for block, shown in self._with_output():
            need = block.noted("needs")
            if block.noted("not run") or (need and need not in self._needs):
                continue
            if name := block.noted("file"):
                (folder / name).write_text(block.text, encoding="utf-8")
            elif block.kind == "python" and need == "simulator":
                printed = run_alone(block.text, folder)
                played.append((block, shown, printed[-len(shown) :]))
            elif block.kind == "python":
                played.append((block, shown, self._run(block)))
            elif block.kind == "console":
                played += [(block, *pair) for pair in self._run_console(block, folder)]
            else:
                raise ValueError(f"{self.path.name}, line {block.line}: neither run nor excused")
        return played

    def _with_output(self) -> list[tuple[Block, str]]:
        """The blocks, each with the text that stands behind it as its output."""
        pairs: list[tuple[Block, str]] = []
        for block in self.blocks:
            if block.kind == "text" and not block.note and pairs and pairs[-1][0].kind == "python":
                pairs[-1] = pairs[-1][0], block.text
            else:
                pairs.append((block, ""))
        return pairs

    def _run(self, block: Block) -> str:
        # Empty lines in front, so that an error names the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(self.path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self._names)
        return printed.getvalue()

    def _run_console(self, block: Block, folder: Path) -> Iterator[tuple[str, str]]:
        commands = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)
        for number, (line, shown) in enumerate(commands, start=1):
            first, *rest = line.split()
            last = number == len(commands)
            code = int(block.noted("exit code") or 0) if last else 0
            yield shown, _printed([*_COMMANDS[first], *rest], folder, code)


def _printed(command: list[str], folder: Path, code: int = 0) -> str:
    """What a command prints."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")
