"""What to say where a package is not installed that an extra brings."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["not_installed"]


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
