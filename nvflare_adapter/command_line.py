"""The arguments of ``python -m nvflare_adapter``."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from fedavg_core.cli.arguments import Parser, one_of, whole
from fedavg_core.errors import not_installed, quoted

__all__ = ["BACKENDS", "SPEAKER", "read_arguments"]

SPEAKER = "nvflare_adapter"
"""What each line of the command on standard error begins with."""

BACKENDS = {
    "in-process": "in this process",
    "simulator": "on NVFlare's simulator",
    "poc": "on NVFlare, in processes of its own",
    "deployment": "on a deployment of NVFlare",
}
"""Where a job can run, and what to call it."""

_KIT = Path("startup", "fed_admin.json")
_DIGITS = Path(__file__).with_name("digits.py")


class _Parser(Parser):
    speaker = SPEAKER


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {quoted(text)}")
    return alpha


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is wrong with it is told in one line, and ends the process.

    Args:
        arguments: What follows the program's name; None for the process's own.

    Returns:
        The arguments, by name. ``path`` is the training file, and ``own_output`` tells whether
        ``output`` was given.
    """
    parser = _Parser(
        prog="python -m nvflare_adapter",
        description="Train a file with a train(params, context) function, federated.",
        epilog="TRAIN.py ends in nvflare_adapter.serve(train). It may have an initial_model(seed), "
        "which makes the first model, and an evaluate(params), which gives its accuracy.",
    )
    add = parser.add_argument
    add("train_script", nargs="?", metavar="TRAIN.py", help="default: learn handwritten digits")
    add(
        "--backend",
        default="simulator",
        type=one_of(*BACKENDS),
        help="simulator (NVFlare's; the default), in-process (without NVFlare), poc (NVFlare's "
        "server and clients as processes of this machine) or deployment (one that is there)",
    )
    add(
        "--startup-kit",
        type=Path,
        metavar="DIR",
        help="of a deployment: the startup kit of an administrator",
    )
    add(
        "--external",
        action="store_true",
        help="NVFlare starts TRAIN.py in processes of its own, which may crash by themselves",
    )
    add("--clients", type=whole(1), default=4, help="how many clients (default: 4)")
    add("--rounds", type=whole(1), default=10, help="how many rounds (default: 10)")
    add(
        "--transfer",
        type=one_of("full", "diff"),
        default="full",
        help="clients send their whole model, or what has changed (default: full)",
    )
    add(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="on NVFlare: go on with the job of this folder, or whose models are in it, up to "
        "--rounds",
    )
    add(
        "--deadline",
        type=whole(1),
        metavar="SECONDS",
        help="on NVFlare: how long a round waits for its clients; some seconds of it NVFlare takes "
        "for itself (default: for ever)",
    )
    add("--seed", type=whole(0), default=0, help="draws all that is random (default: 0)")
    add(
        "--alpha",
        type=_alpha,
        help="of the digits: how even the clients' shares are (default: 0.5)",
    )
    add("--train-args", metavar="ARGS", default="", help="arguments of TRAIN.py, in one string")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new or empty folder for all that is written (default: one in fedavg-runs/)",
    )
    read = parser.parse_args(arguments)
    if read.train_script is None:
        if read.train_args:
            parser.error("argument --train-args: expected TRAIN.py as well, got none")
        read.train_args = "" if read.alpha is None else f"--alpha {read.alpha}"
    elif read.alpha is not None:
        parser.error("argument --alpha: expected only without TRAIN.py, got both")
    read.path = _DIGITS if read.train_script is None else Path(read.train_script)
    if not read.path.is_file() or read.path.suffix != ".py":
        absent = "" if read.path.exists() else ", which is not there"
        parser.error(f"TRAIN.py: expected a Python file, got {quoted(str(read.path))}{absent}")
    for name in ("start_from", "deadline", "external") if read.backend == "in-process" else ():
        if getattr(read, name):
            parser.error(f"argument --{name.replace('_', '-')}: expected none in this process")
    if read.start_from is not None and not read.start_from.is_dir():
        parser.error(f"argument --start-from: expected a folder, got {read.start_from}")
    kit, remote = read.startup_kit, read.backend == "deployment"
    if (kit is not None and not remote) or (remote and not (kit and (kit / _KIT).is_file())):
        expected = f"a folder that has {_KIT}" if remote else "none, without a deployment"
        parser.error(f"argument --startup-kit: expected {expected}, got {kit or 'none'}")
    read.own_output = read.output is not None
    if read.output is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-4]
        read.output = Path("fedavg-runs") / f"{stamp}-{read.path.stem}-{read.backend}"
    if read.output.exists() and (not read.output.is_dir() or any(read.output.iterdir())):
        parser.error(f"argument --output: expected a new or empty folder, got {read.output}")
    paths = {
        "simulator": [str(read.output.resolve()), sys.executable],
        "poc": [tempfile.gettempdir(), sys.executable],
    }
    for path in paths.get(read.backend, []):
        if shlex.split(path) != [path]:
            expected = "a path without spaces and quotes, as NVFlare needs to start its processes"
            parser.error(f"expected {expected}, got {quoted(path, 300)}")
    needed = {"rich": "cli"} | ({} if read.backend == "in-process" else {"nvflare": "nvflare"})
    missing = {package: needed[package] for package in needed if find_spec(package) is None}
    if missing:
        parser.error(not_installed(missing))
    return read
