"""An interruption (Ctrl-C) at a moment of one's choice."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
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
        self._modules = modules

    def _count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    # From Python 3.13 on, `sys.settrace` does not see a function's instructions when it runs for
    # the first time; before 3.12 there is nothing else.
    if sys.version_info >= (3, 12):

        def __enter__(self) -> Interruption:
            self._watch(sys.monitoring.events.INSTRUCTION)
            return self

        def __exit__(self, *_: object) -> None:
            self._watch(0)

        def _watch(self, events: int) -> None:
            monitoring = sys.monitoring
            if events:
                monitoring.use_tool_id(_TOOL, "interruption")
                monitoring.register_callback(_TOOL, events, self._count)
            for module in self._modules:
                for code in _codes_of(module):
                    monitoring.set_local_events(_TOOL, code, events)
            if not events:
                monitoring.register_callback(_TOOL, monitoring.events.INSTRUCTION, None)
                monitoring.free_tool_id(_TOOL)

    else:

        def __enter__(self) -> Interruption:
            self._files = {_file_of(module) for module in self._modules}
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
                self._count()
            return self._step


_TOOL = 4  # none of the numbers that are meant for debuggers, coverage and profilers


def _file_of(module: str) -> str:
    path = Path(fedavg_core.__file__).parent / f"{module.replace('.', '/')}.py"
    assert path.is_file(), path
    return str(path)


@cache
def _codes_of(module: str) -> list[CodeType]:
    """The code of all functions of a module of the core, and of those inside of them."""
    left = [each.__code__ for each in _functions(import_module(f"fedavg_core.{module}"))]
    codes = []
    while left:
        codes.append(left.pop())
        left += [each for each in codes[-1].co_consts if isinstance(each, CodeType)]
    return [code for code in codes if code.co_filename == _file_of(module)]


def _functions(owner: ModuleType | type) -> Iterator[FunctionType]:
    """The functions of a module or a class, and of the classes in it."""
    for one in list(vars(owner).values()):
        if isinstance(one, type) and one.__module__ == getattr(owner, "__module__", owner.__name__):
            yield from _functions(one)
        one = getattr(one, "fget", one)  # a property
        one = unwrap(getattr(one, "__func__", one))  # a static method; a decorated one
        if isinstance(one, FunctionType):
            yield one


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
