"""``fedavg report``: what happened in a run, on one page (see `page`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedavg_core.atomic_file import replacing
from fedavg_core.cli.arguments import Subparsers, check_new
from fedavg_core.cli.console import print_line
from fedavg_core.cli.page import page
from fedavg_core.cli.run_log import SETTINGS, read_log, read_settings
from fedavg_core.errors import UsageError

__all__ = ["add_commands"]


def add_commands(commands: Subparsers) -> None:
    """Tell a parser about this command."""
    parser = commands.add_parser(
        "report",
        help="show how a run went, as one HTML page",
        description="Write one HTML page that shows how a run went: the metrics, who took part and "
        "with what weight, what was refused and why, the size of the updates, time and memory. "
        "The page loads nothing from elsewhere. It may be written while the run goes on.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of a fedavg run")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="where to write it (default: RUN/report.html)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_report)


def _report(read: argparse.Namespace) -> int:
    if not (read.folder / SETTINGS).exists():
        raise UsageError(
            f"{read.folder}: this folder is not from fedavg run; a report needs one"
            if read.folder.is_dir()
            else f"{read.folder}: expected the folder of a fedavg run, "
            f"{'got a file' if read.folder.exists() else 'there is none'}"
        )
    output = read.folder / "report.html" if read.output is None else read.output
    check_new(output, read.force)
    content = page(read_settings(read.folder), read_log(read.folder))
    with replacing(output, old=read.force) as file:
        file.write(content)
    print_line(f"report: {output}")
    return 0
