"""A training file that forgets to call serve."""

from typing import Any


def train(params: dict[str, Any], context: Any) -> Any:
    return None
