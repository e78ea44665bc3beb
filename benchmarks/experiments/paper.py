"""The paper's figures: table 1 of McMahan et al. 2017, its part on the 2NN, with E = 1.

Rounds to a test accuracy of 97% on MNIST, by split, C and B (None: all of a client's examples).
C = 0 is one client a round. None: it was not reached in the time that was allowed.
"""

from __future__ import annotations

__all__ = ["TABLE_1", "figure"]

TABLE_1: dict[tuple[str, float, int | None], int | None] = {
    ("iid", 0.0, None): 1455,
    ("iid", 0.0, 10): 316,
    ("iid", 0.1, None): 1474,
    ("iid", 0.1, 10): 87,
    ("iid", 0.2, None): 1658,
    ("iid", 0.2, 10): 77,
    ("iid", 0.5, None): None,
    ("iid", 0.5, 10): 75,
    ("iid", 1.0, None): None,
    ("iid", 1.0, 10): 70,
    ("non-iid", 0.0, None): 4278,
    ("non-iid", 0.0, 10): 3275,
    ("non-iid", 0.1, None): 1796,
    ("non-iid", 0.1, 10): 664,
    ("non-iid", 0.2, None): 1528,
    ("non-iid", 0.2, 10): 619,
    ("non-iid", 0.5, None): None,
    ("non-iid", 0.5, 10): 443,
    ("non-iid", 1.0, None): None,
    ("non-iid", 1.0, 10): 380,
}


def figure(split: str, fraction: float, batch: int | None, epochs: int) -> str:
    """What the table says of a setting.

    Args:
        split: ``"iid"`` or ``"non-iid"``.
        fraction: C.
        batch: B; None for all of a client's examples.
        epochs: E.

    Returns:
        A number of rounds, ``"not reached"``, or ``""`` for a setting that it does not have.
    """
    setting = split, fraction, batch
    if epochs != 1 or setting not in TABLE_1:
        return ""
    rounds = TABLE_1[setting]
    return "not reached" if rounds is None else f"{rounds:,}"
