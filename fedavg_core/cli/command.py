"""The command as a whole: which commands there are, and what becomes of an error.

Whatever goes wrong is one line on standard error. Exit codes: 0, done; 1, `compare` or `verify`
found a difference; 2, an error; 130, interrupted, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fedavg_core.cli import look, make, report, run, verify
from fedavg_core.cli.arguments import Parser, package_version
from fedavg_core.cli.console import drop_output, open_missing, say
from fedavg_core.errors import FedAvgError, not_installed, one_line

__all__ = ["main"]

_OPTIONS = {
    "accumulator": "--accumulator",
    "memory_limit": "--memory-limit",
    "transfer": "--transfer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code.

    Raises:
        SystemExit: The arguments make no sense (code 2), or ask for help only (code 0).
    """
    open_missing()
    if arguments is None:  # pragma: no cover  (in a process of its own)
        signal.signal(signal.SIGTERM, _end)
    try:
        read = _parser().parse_args(arguments)
        if find_spec("rich") is None:
            return _failed(not_installed({"rich": "cli"}))
        with contextlib.suppress(AttributeError):  # standard output may be no text of a file
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        code = int(read.run(read))
        sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        if arguments is None:  # pragma: no cover  (in a process of its own)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        say(_told(interruption))
        if arguments is None:  # pragma: no cover  (likewise)
            # A second one ends the process, if it does not end by itself.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return 130
    except BrokenPipeError:
        drop_output()
        return 2
    except FedAvgError as error:
        return _failed(_in_options(str(error)))
    except (OSError, MemoryError) as error:
        return _failed(one_line(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return _failed(f"a fault in this program: {one_line(error)} ({where})")
    return code


def _end(number: int, frame: object) -> None:  # pragma: no cover  (in a process of its own)
    """End as by Ctrl-C, so that nothing is left behind; a second signal does not hurry it."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _in_options(problem: str) -> str:
    """What is wrong with an argument of Python's, told of the option that it was given as."""
    name, _, rest = problem.partition(":")
    return f"argument {_OPTIONS[name]}:{rest}" if name in _OPTIONS else problem


def _told(interruption: BaseException | None) -> str:
    """What the interruption says; if a second came on its way here, what the first one says."""
    while isinstance(interruption, KeyboardInterrupt):
        if str(interruption):
            return str(interruption)
        interruption = interruption.__context__
    return "interrupted"


def _parser() -> Parser:
    parser = Parser(
        prog="fedavg",
        description="Federated averaging with an exact, order-independent mean: run a federation "
        "on this machine, average and compare model files of any size, check a round afterwards.",
        epilog="fedavg COMMAND --help tells more of each. A model file is an .npz, .npy or "
        ".safetensors, or a checkpoint, which counts as the model in it. Exit codes: 0, done; 1, "
        "compare or verify found a difference; 2, an error, told in one line; 130, interrupted.",
    )
    parser.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"fedavg-core {package_version()}",
        help="show the version and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, report, make, look, verify):
        module.add_commands(commands)
    return parser


def _failed(problem: str) -> int:
    say(problem)
    return 2
