"""The settings of a run: those of the command line, and those of the run that it goes on with.

What the command line leaves out is taken from ``run.json`` where a run is resumed, and has its
default value where one begins. What it gives must be what the run has; only that there shall be
more rounds, and how they are worked through, may be told anew. Nothing in ``run.json`` is believed:
its settings are read as if they had been written on the command line.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fedavg_core.cli.arguments import accumulator, fraction, optimizer, package_version, whole
from fedavg_core.cli.run_log import SETTINGS, read_settings
from fedavg_core.errors import CheckpointError, UsageError, quoted
from fedavg_core.robust_mean import RobustMean
from fedavg_core.selection import Selection

__all__ = ["add_settings", "settings_of", "settle", "training_has_changed"]

_HASH = "training_sha256"


@dataclass(frozen=True)
class _Setting:
    """A setting.

    Attributes:
        parse: What reads it.
        default: What it is where nobody says anything.
        metavar: What stands for it in the help.
        help: What it is.
        free: Whether a run may go on with another.
    """

    parse: Callable[[str], Any]
    default: Any
    metavar: str
    help: str
    free: bool = False


def _transfer(text: str) -> str:
    """``full`` or ``diff``."""
    if text not in ("full", "diff"):
        raise argparse.ArgumentTypeError(f"expected full or diff, got {quoted(text)}")
    return text


_KNOWN = {
    "clients": _Setting(whole(1), 10, "N", "how many clients there are (default: 10)"),
    "rounds": _Setting(
        whole(1),
        10,
        "N",
        "how many rounds the run has in all, with those before a --resume (default: 10)",
        free=True,
    ),
    "fraction": _Setting(
        fraction,
        1.0,
        "F",
        "the part of the clients that each round draws at random, above 0 and up to 1 (default: 1, "
        "all)",
    ),
    "workers": _Setting(
        whole(1),
        1,
        "N",
        "how many clients train at a time, each in a process of its own; the model is the same to "
        "the bit (default: 1, one after the other in this process)",
        free=True,
    ),
    "transfer": _Setting(
        _transfer,
        "full",
        "{full,diff}",
        "what clients send: whole models, or the differences from the model they were given "
        "(default: full)",
    ),
    "accumulator": _Setting(
        accumulator,
        "exact",
        "NAME[:SETTING=NUMBER,...]",
        "the arithmetic of the mean: exact, float64 or float32; or a robust mean: median, "
        "trimmed-mean, krum, multi-krum, geometric-median or clipped-mean, such as "
        "trimmed-mean:trim=0.2 (default: exact)",
    ),
    "optimizer": _Setting(
        optimizer,
        None,
        "NAME[:SETTING=NUMBER,...]",
        "how the server makes the next model of the mean: fedavg, fedavgm, fedadagrad, fedadam or "
        "fedyogi, such as fedadam:learning_rate=0.03 (default: the mean is the next model)",
    ),
    "seed": _Setting(
        whole(0),
        0,
        "N",
        "the seed of the draws, of initial_model and of context.seed (default: 0)",
    ),
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Tell a parser about the settings; what is not given is None until `settle`."""
    for name, setting in _KNOWN.items():
        parser.add_argument(
            f"--{name}", type=setting.parse, metavar=setting.metavar, help=setting.help
        )


def settle(read: argparse.Namespace, folder: Path) -> None:
    """Put the settings in place that the command line does not give.

    Args:
        read: The command line's.
        folder: The run's.

    Raises:
        UsageError: A setting is given, and the run that is resumed has another; or a round has too
            few clients for the mean.
        CheckpointError: What that run's ``run.json`` holds is not settings.
    """
    kept: Mapping[str, Any] = {}
    if read.resume and (folder / SETTINGS).exists():
        kept = read_settings(folder)
    for name, setting in _KNOWN.items():
        value = setting.default
        if kept.get(name) is not None:
            try:
                value = setting.parse(_written(kept[name]))
            except argparse.ArgumentTypeError as error:
                raise CheckpointError(folder / SETTINGS, f"{name}: {error}") from None
        given = getattr(read, name)
        if given is None:
            setattr(read, name, value)
        elif name in kept and not setting.free and _plain(given) != _plain(value):
            raise UsageError(f"--{name}: this run has {_written(value)}, got {_written(given)}")
    names = [str(number) for number in range(read.clients)]
    wanted = Selection(names, read.fraction, 1.0, read.seed).wanted
    if isinstance(read.accumulator, RobustMean) and read.accumulator.least > wanted:
        raise UsageError(
            f"{read.accumulator.name} needs at least {read.accumulator.least} clients in a round, "
            f"got {wanted}"
        )
    read.keep_updates = read.keep_updates or kept.get("keep_updates") is True
    read.audit = read.audit or read.keep_updates or kept.get("audit") is True


def settings_of(read: argparse.Namespace) -> dict[str, Any]:
    """What ``run.json`` shall hold.

    Args:
        read: The command line's, settled.

    Returns:
        What JSON can hold.
    """
    return {
        "training_file": read.train.name,
        _HASH: _hash(read.train),
        **{name: _plain(getattr(read, name)) for name in _KNOWN},
        "audit": read.audit,
        "keep_updates": read.keep_updates,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "fedavg-core": package_version(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def training_has_changed(path: Path, folder: Path) -> bool:
    """Whether a training file is another than the one that a run was last played with.

    Args:
        path: The file.
        folder: The run's.

    Returns:
        That; False where the run does not say.
    """
    kept = read_settings(folder).get(_HASH) if (folder / SETTINGS).exists() else None
    return kept is not None and kept != _hash(path)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    return value.settings() if hasattr(value, "settings") else value


def _written(value: Any) -> str:
    """A setting as the command line has it."""
    value = _plain(value)
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    rest = ",".join(f"{name}={number}" for name, number in value.items() if name != "name")
    return f"{value.get('name')}:{rest}" if rest else str(value.get("name"))
