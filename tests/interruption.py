"""An interruption (Ctrl-C) at a moment of one's choice."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import fedavg_core

__all__ = ["InterruptedOutput", "Interruption"]


class Interruption:
    """Raises KeyboardInterrupt before the n-th instruction of some modules of the core.

    Args:
        moment: n; none comes if that is negative, and -1 - `left` is their number in the end.
        modules: The names of the modules.
    """

    def __init__(self, moment: int, *modules: str) -> None:
        self.left = moment
        self._files = {str(Path(fedavg_core.__file__).with_name(f"{name}.py")) for name in modules}

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._step


class InterruptedOutput(io.StringIO):
    """Text output at which a Ctrl-C arrives just after a line with some word at its head is out."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word: str | None = word

    def rows(self) -> list[str]:
        """The heads of its lines that are numbers."""
        heads = [line.split()[0] for line in self.getvalue().splitlines() if line.split()]
        return [head for head in heads if head.isdigit()]

    def flush(self) -> None:
        super().flush()
        if self._word in self.rows():
            self._word = None
            signal.raise_signal(signal.SIGINT)
