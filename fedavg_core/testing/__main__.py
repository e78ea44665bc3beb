"""Print where aggregators stand: ``python -m fedavg_core.testing exact nvflare flower``.

Each name is a column: ``exact``, ``float64`` and ``float32`` are this package's accumulators,
the names of other systems need these installed, and ``some.module:function`` is an aggregator of
your own, by the function that makes one. Exit codes: 0, the table was printed; 1, it was, and with
``--strict`` some property does not hold; 2, a name is unknown or makes no aggregator, or its system
is not installed, or nobody read the table.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

from fedavg_core.accumulator import Accumulator, WeightedMean
from fedavg_core.cli.console import drop_output
from fedavg_core.errors import UsageError, one_line
from fedavg_core.testing.conformance import check_aggregator, compare_tables
from fedavg_core.testing.peers import PEERS

__all__ = ["main"]

_OWN: dict[str, Accumulator] = {kind: kind for kind in get_args(Accumulator)}


def _maker(name: str) -> Callable[[], Any]:
    if name in _OWN:
        return partial(WeightedMean, accumulator=_OWN[name])
    if name in PEERS:
        return PEERS[name]()
    module, _, function = name.partition(":")
    if not function:
        known = ", ".join([*_OWN, *PEERS])
        raise UsageError(f"expected one of {known}, or module:function, got {name!r}")
    try:
        maker: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except AttributeError as error:
        raise UsageError(str(error)) from None
    return maker


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the aggregators named on the command line and print one table.

    Args:
        arguments: The command line without the program's name; the process's own if None.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fedavg_core.testing",
        description="Check which properties aggregators have, and print a table.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join([*_OWN, *PEERS])}, or module:function (default: {' '.join(_OWN)})",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a property does not hold"
    )
    options = parser.parse_args(arguments)
    names = options.names or list(_OWN)
    tables = []
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # other systems log each update that they refuse
    try:
        for name in names:
            try:
                tables.append(check_aggregator(_maker(name), name))
            except ModuleNotFoundError as error:
                return _failed(name, f"not installed ({error})")
            except UsageError as error:
                return _failed(name, str(error))
            except Exception as error:  # whatever comes of foreign code
                return _failed(name, f"expected what makes an aggregator, got {one_line(error)}")
    finally:
        logging.disable(before)
    try:
        print(compare_tables(tables), flush=True)
    except BrokenPipeError:
        drop_output()
        return 2
    return 1 if options.strict and not all(table.conforms for table in tables) else 0


def _failed(name: str, problem: str) -> int:
    print(f"{name}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
