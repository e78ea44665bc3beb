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

from fedavg_core.cli.arguments import (
    accumulator,
    fraction,
    one_of,
    optimizer,
    package_version,
    whole,
)
from fedavg_core.cli.run_log import SETTINGS, read_settings
from fedavg_core.errors import CheckpointError, UsageError

__all__ = ["add_settings", "settings_of", "settle", "training_before"]

_FILE = "training_file"
_HASH = "training_sha256"
_STARTED = "started"


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
        one_of("full", "diff"),
        "full",
        "{full,diff}",
        "what clients send: whole models, or the differences from the model they were given; "
        "train returns its whole model in both cases, the difference is taken for it, and is what "
        "--keep-updates keeps (default: full)",
    ),
    "accumulator": _Setting(
        accumulator,
        "exact",
        "NAME[:SETTING=NUMBER,...]",
        "the arithmetic of the mean: exact, float64 or float32; or a robust mean: median, "
        "trimmed-mean, krum, multi-krum, geometric-median or clipped-mean, such as "
        "trimmed-mean:trim=0.2, which leaves out a fifth at either end, rounded down, and so "
        "nothing of fewer than 5 updates; median, trimmed-mean, krum and multi-krum ignore weights "
        "(default: exact)",
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
        UsageError: A setting is given, and the run that is resumed has another.
        CheckpointError: What that run's ``run.json`` holds is not settings.
    """
    kept = _kept(folder) if read.resume else {}
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
    read.keep_updates = read.keep_updates or kept.get("keep_updates") is True
    read.audit = read.audit or read.keep_updates or kept.get("audit") is True


def settings_of(read: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ``run.json`` shall hold.

    Args:
        read: The command line's, settled.
        folder: The run's; one that is resumed began when its ``run.json`` says.

    Returns:
        What JSON can hold.
    """
    started = _kept(folder).get(_STARTED) if read.resume else None
    if not isinstance(started, str):
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        _FILE: read.train.name,
        _HASH: _hash(read.train),
        **{name: _plain(getattr(read, name)) for name in _KNOWN},
        "audit": read.audit,
        "keep_updates": read.keep_updates,
        _STARTED: started,
        "versions": {
            "fedavg-core": package_version(),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def training_before(path: Path, folder: Path) -> str | None:
    """The training file that a run was last played with, if it is another.

    Args:
        path: The file that it shall go on with.
        folder: The run's.

    Returns:
        The name of the one before, which may be the same; None if it is the same file, or where the
        run does not say.
    """
    kept = _kept(folder)
    if kept.get(_HASH) in (None, _hash(path)):
        return None
    return str(kept.get(_FILE, path.name))


def _kept(folder: Path) -> Mapping[str, Any]:
    """What ``run.json`` holds; nothing if it is not there."""
    return read_settings(folder) if (folder / SETTINGS).exists() else {}


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
