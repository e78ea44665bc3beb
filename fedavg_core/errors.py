"""What can go wrong, in three families.

* `UsageError`: the program that calls us made a mistake, and should be changed.
* `RefusedUpdate`: a contribution is not fit to be averaged. It carries a `Reason` and the place
  (contributor, round, key), what was expected and what came. Refusing one is ordinary: a round
  records the refusal and goes on.
* `CheckpointError`: a file is damaged, or is not what it claims to be.

`OutOfRange` stands apart: every input was fine, but the exact result is larger than the largest
number of the model's dtype, so that no model can be given back.

Every message is one line. Names that came from outside are passed through `quoted`, and foreign
errors through `one_line`, so that a name made of control characters, or ten megabytes long, cannot
break a log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from fedavg_core.plain import plain_text

__all__ = [
    "CheckpointError",
    "FedAvgError",
    "OutOfRange",
    "Reason",
    "RefusedUpdate",
    "UsageError",
    "a_type",
    "counted",
    "not_installed",
    "one_line",
    "quoted",
    "shown_path",
    "type_name",
]

_NAME_LIMIT = 80
_PATH_LIMIT = 4096
_ERROR_LIMIT = 200


class Reason(str, Enum):
    """Why an update was refused."""

    BAD_NAME = "BAD_NAME"
    """A contributor's or a parameter's name is not a string of 1 to 256 printable characters."""

    BAD_WEIGHT = "BAD_WEIGHT"
    """The weight is not a finite number above zero, or is above the limit."""

    DTYPE = "DTYPE"
    """A value is not an array of real numbers, or the parameters are no mapping of such."""

    DUPLICATE = "DUPLICATE"
    """Of this contributor an update was already accepted."""

    FUTURE_ROUND = "FUTURE_ROUND"
    """The update is for a round that is still to come."""

    MISSING_KEYS = "MISSING_KEYS"
    """The update lacks parameters that it must have, or has none at all."""

    NON_FINITE = "NON_FINITE"
    """A value is a NaN or an infinity."""

    NORM = "NORM"
    """The update is farther from the model than the limit."""

    ROUND_CLOSED = "ROUND_CLOSED"
    """The round has given its outcome already."""

    SHAPE = "SHAPE"
    """An array has another shape than that parameter."""

    STALE_ROUND = "STALE_ROUND"
    """The update is for a round that is past, or for no round."""

    TRANSFER = "TRANSFER"
    """The arrays are whole models where differences are wanted, or the other way round."""

    UNEXPECTED_KEYS = "UNEXPECTED_KEYS"
    """The update has a parameter that the model lacks."""

    UNKNOWN_CONTRIBUTOR = "UNKNOWN_CONTRIBUTOR"
    """The contributor is not on the roster."""

    def __str__(self) -> str:
        """The bare name, the same on every Python version."""
        return self.value


def quoted(value: object, limit: int = _NAME_LIMIT) -> str:
    """Make a value that came from outside fit to stand in one line of text.

    Args:
        value: Anything; a string is shown in quotes, with control characters escaped.
        limit: The most characters of it to show.

    Returns:
        Printable ASCII of bounded length, with ``...`` where it was cut.
    """
    string = plain_text(value)
    if string is not None:
        shown = ascii(string[: limit + 1])
    else:
        try:
            shown = str.__str__(ascii(value))
        except KeyboardInterrupt:
            raise
        except BaseException:  # a foreign object's __repr__ may do anything
            shown = f"<{type_name(value)}>"
        if not shown.isprintable():  # an array's repr has several lines
            shown = ascii(shown)[1:-1]
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def shown_path(path: Path | str) -> str:
    """A path fit to stand in one line of text.

    Args:
        path: A path.

    Returns:
        It as it is, to be found and to be typed; with escapes if that is not printable, and cut
        if it is longer than paths are.
    """
    text = str(path)
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= _PATH_LIMIT else shown[: _PATH_LIMIT - 3] + "..."


def type_name(value: object) -> str:
    """The name of a foreign object's type, fit to stand in one line of text.

    Args:
        value: Anything.

    Returns:
        Printable ASCII of bounded length, with ``...`` where it was cut.
    """
    return quoted(type.__dict__["__name__"].__get__(type(value)))[1:-1]


def a_type(value: object) -> str:
    """The name of a foreign object's type with its article, such as ``an int``.

    Args:
        value: Anything.

    Returns:
        As of `type_name`.
    """
    name = type_name(value)
    return f"an {name}" if name[:1].lower() in set("aeiou") else f"a {name}"


def one_line(error: BaseException, limit: int = _ERROR_LIMIT) -> str:
    """Tell of an error that came from outside, fit to stand in one line of text.

    Args:
        error: Any error.
        limit: The most characters of it to show.

    Returns:
        Its type and its text, as printable ASCII of bounded length, with ``...`` where it was cut.
    """
    try:
        text = str.__str__(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException:  # an error whose own text fails
        text = ""
    kind = type_name(error)
    told = f"{kind}: {text}" if text else kind
    shown = told[: limit + 1].encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class FedAvgError(Exception):
    """The base of every error that this package raises on purpose."""


class UsageError(FedAvgError, ValueError):
    """The calling program asked for something that has no meaning."""


class OutOfRange(FedAvgError, OverflowError):
    """The exact result lies beyond the largest finite number of the model's dtype."""


class RefusedUpdate(FedAvgError):
    """A contribution that is not fit to be averaged.

    Args:
        reason: Why.
        expected: What would have been accepted, in words.
        got: What came, in words.
        contributor: Who sent it, where that is known.
        round: The round it was offered to, where that is known.
        key: The parameter at fault, if it is one.
    """

    def __init__(
        self,
        reason: Reason,
        *,
        expected: str,
        got: str,
        contributor: str | None = None,
        round: int | None = None,
        key: str | None = None,
    ) -> None:
        self.reason = reason
        self.expected = expected
        self.got = got
        self.contributor = contributor
        self.round = round
        self.key = key
        place = []
        if contributor is not None:
            place.append(f"contributor {quoted(contributor)}")
        if round is not None:
            place.append(f"round {round}")
        if key is not None:
            place.append(f"key {quoted(key)}")
        where = f" ({', '.join(place)})" if place else ""
        super().__init__(f"{reason}{where}: expected {expected}, got {got}")

    def placed(self, *, contributor: str, round: int | None = None) -> RefusedUpdate:
        """The same refusal, with who and when filled in.

        Args:
            contributor: Who sent the update.
            round: The round it was offered to, if to one.

        Returns:
            A new error; this one is unchanged.
        """
        return RefusedUpdate(
            self.reason,
            expected=self.expected,
            got=self.got,
            contributor=contributor,
            round=round,
            key=self.key,
        )

    @staticmethod
    @contextmanager
    def numbered(number: int, several: Sized) -> Iterator[None]:
        """Let a refusal say which of several updates it is about.

        Args:
            number: Which of them is looked at meanwhile.
            several: All of them.

        Raises:
            RefusedUpdate: One that was raised meanwhile, the contributor being ``updates[number]``;
                as it was if there is but one update.
        """
        try:
            yield
        except RefusedUpdate as refusal:
            if len(several) == 1:
                raise
            raise refusal.placed(contributor=f"updates[{number}]") from None

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.reason, self.expected, self.got, self.contributor, self.round, self.key)
        return _rebuild_refusal, fields


def _rebuild_refusal(
    reason: Reason,
    expected: str,
    got: str,
    contributor: str | None,
    round: int | None,
    key: str | None,
) -> RefusedUpdate:
    return RefusedUpdate(
        reason, expected=expected, got=got, contributor=contributor, round=round, key=key
    )


class CheckpointError(FedAvgError):
    """A file cannot be trusted, or cannot be written.

    Args:
        path: The file.
        problem: What is wrong with it, in words.
        newest_good: The newest checkpoint beside it that is whole, if there is one.
    """

    def __init__(self, path: Path | str, problem: str, newest_good: Path | None = None) -> None:
        self.path = Path(path)
        self.problem = problem
        self.newest_good = newest_good
        hint = ""
        if newest_good is not None:
            hint = f"; the newest good checkpoint is {shown_path(newest_good)}"
        super().__init__(f"{shown_path(path)}: {problem}{hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointError, (self.path, self.problem, self.newest_good)


def counted(number: int, noun: str) -> str:
    """A number of things, in words that fit it.

    Args:
        number: How many.
        noun: What one of them is called; more have an s.

    Returns:
        As in ``1 file`` and ``2,000 files``.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def not_installed(missing: Mapping[str, str]) -> str:
    """Say which packages are missing, and how to get them.

    Args:
        missing: From each of the packages to the extra that brings it.

    Returns:
        One line.
    """
    extras = list(dict.fromkeys(missing.values()))
    named = " and ".join(f"the extra {extra!r}" for extra in extras)
    clone = f"in a clone: pip install -e '.[{','.join(extras)}]'"
    return f"expected {' and '.join(missing)} to be installed: get {named} ({clone})"
