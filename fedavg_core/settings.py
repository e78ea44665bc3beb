"""What tells one server optimizer, or one robust mean, from another: its name and its options.

They are stored with rounds and runs, and compared with what was stored. So they are what JSON gives
back of them: a tuple is a list there, and a key is a string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fedavg_core.errors import UsageError, one_line, quoted
from fedavg_core.plain import plain_text

__all__ = ["kind_named", "settings_of"]

Kind = TypeVar("Kind")


def kind_named(
    what: str,
    kinds: Mapping[str, Kind],
    name: object,
    options: Iterable[str],
    options_of: Callable[[Kind], Iterable[str]],
) -> Kind:
    """The kind of some name, if it has the options.

    Args:
        what: What there are kinds of.
        kinds: The kinds, by their names.
        name: The name that was given.
        options: The names of the options that were given.
        options_of: Gives the names of a kind's options.

    Returns:
        The kind.

    Raises:
        UsageError: There is none of this name, or it has no such option.
    """
    plain = plain_text(name)
    if plain is None or plain not in kinds:
        raise UsageError(f"{what}: expected one of {', '.join(kinds)}, got {quoted(name)}")
    kind = kinds[plain]
    known = list(options_of(kind))
    for option in options:
        if option not in known:
            raise UsageError(
                f"{what} {plain}: expected options out of {', '.join(known) or 'none'}, "
                f"got {quoted(option)}"
            )
    return kind


def settings_of(name: str, options: Mapping[str, object]) -> dict[str, Any]:
    """A name and options, as JSON holds them.

    Args:
        name: The name.
        options: The options, by their names.

    Returns:
        One dictionary, with the name under ``"name"``.

    Raises:
        UsageError: JSON cannot hold the options.
    """
    try:
        settings: dict[str, Any] = json.loads(json.dumps({"name": name, **options}))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{name}: expected options that JSON can hold, got {one_line(error)}"
        ) from None
    return settings
