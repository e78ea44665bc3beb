"""How the values on the command line are read: one line says what is wrong with one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar, get_args

from fedavg_core.accumulator import Accumulator
from fedavg_core.cli.console import say
from fedavg_core.errors import UsageError, quoted
from fedavg_core.robust.robust_mean import RobustMean
from fedavg_core.robust.rules import ROBUST_MEANS, robust_mean
from fedavg_core.server_optimizer import ServerOptimizer, optimizer_named

T = TypeVar("T")
Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"

__all__ = [
    "MODEL_HELP",
    "Parser",
    "Subparsers",
    "accumulator",
    "byte_count",
    "check_new",
    "fraction",
    "one_of",
    "optimizer",
    "package_version",
    "weights",
    "whole",
]

MODEL_HELP = "a model: npz, npy or safetensors, or a checkpoint"
"""What is said of an argument that is the file of a model."""

_NO_SETTINGS = ("name", "spec")
_PATH_LENGTH = 300
_SIZE = re.compile(r"([0-9]{1,18})(?:([KMGT]?)(i?)B)?", re.IGNORECASE | re.ASCII)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says what is wrong in one line.

    Attributes:
        speaker: What the line begins with.
    """

    speaker = "fedavg"

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings, allow_abbrev=False)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        say(message, self.speaker)
        self.exit(2)


def whole(least: int) -> Callable[[str], int]:
    """A whole number.

    Args:
        least: The smallest that has a meaning.

    Returns:
        What reads it.
    """

    def parse(text: str) -> int:
        short = text.isascii() and text.isdecimal() and len(text) <= 18
        if not short or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {quoted(text)}"
            )
        return int(text)

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """One of some names.

    Args:
        names: The names, two at least.

    Returns:
        What reads it.
    """

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"expected {', '.join(names[:-1])} or {names[-1]}, got {quoted(text)}"
            )
        return text

    return parse


def fraction(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a fraction above 0 and up to 1, got {quoted(text)}"
        )
    return value


def byte_count(text: str) -> int:
    """A number of bytes, such as ``65536``, ``64KiB``, ``256MiB`` or ``2GB``."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 65536, 256MiB or 2GB (K, M, G or T), got {quoted(text)}"
        )
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    unit_bytes: int = (1024 if binary else 1000) ** power
    return int(number) * unit_bytes


def weights(text: str) -> list[float]:
    """Numbers with commas between them; whole ones stay exact, whatever their size."""
    found: list[float] = []
    for part in text.split(","):
        try:
            digits = part.strip()
            found.append(int(digits) if re.fullmatch("[0-9]{1,4000}", digits) else float(digits))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected numbers with commas between them, got {quoted(text)}"
            ) from None
    return found


def accumulator(text: str) -> str | RobustMean:
    """The arithmetic of a mean, or a robust mean such as ``trimmed-mean:trim=0.2``."""
    plain = get_args(Accumulator)
    if text in plain:
        return text
    if text.partition(":")[0] not in ROBUST_MEANS:
        known = ", ".join((*plain, *ROBUST_MEANS))
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {quoted(text)}")
    return _named(robust_mean, text)


def optimizer(text: str) -> ServerOptimizer:
    """A server optimizer, such as ``fedadam`` or ``fedadam:learning_rate=0.03,tau=0.01``."""
    return _named(optimizer_named, text)


def _named(make: Callable[..., T], text: str) -> T:
    """What a name and settings stand for."""
    name, _, rest = text.partition(":")
    settings: dict[str, float] = {}
    for part in rest.split(",") if rest else ():
        setting, _, value = map(str.strip, part.partition("="))
        try:
            if setting in _NO_SETTINGS:
                raise ValueError(setting)
            settings[setting] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected settings as name=number with commas between them, got {quoted(part)}"
            ) from None
    try:
        return make(name, **settings)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def package_version() -> str:
    """The version of this package."""
    try:
        return version("fedavg-core")
    except PackageNotFoundError:
        return "(not installed)"


def check_new(path: Path, force: bool) -> None:
    """See that an output may be written.

    Args:
        path: Where it would go.
        force: Whether what is there may be replaced.

    Raises:
        UsageError: Something is there that may not be replaced, or is no file.
    """
    shown = quoted(str(path), _PATH_LENGTH)
    if path.exists() and not path.is_file():
        raise UsageError(f"{shown}: expected a file to write, got a folder or a device")
    if not force and (path.exists() or path.is_symlink()):
        raise UsageError(f"{shown} is there already; --force would replace it")
