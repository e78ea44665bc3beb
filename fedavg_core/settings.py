"""What tells one server optimizer, or one robust mean, from another: its name and its options.

They are stored with rounds and runs, and compared with what was stored. So they are what JSON gives
back of them: a tuple is a list there, and a key is a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedavg_core.errors import UsageError, one_line

__all__ = ["settings_of"]


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
