"""The conformance kit on the aggregators of NVFlare, and of Flower where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedavg_core.testing.__main__ import main
from fedavg_core.testing.peers import PEERS

pytestmark = pytest.mark.nvflare

NAMES = [
    pytest.param("nvflare", "nvflare"),
    pytest.param("nvflare-helper", "nvflare"),
    pytest.param("flower", "flwr"),
]


@pytest.mark.parametrize(("name", "package"), NAMES)
def test_a_peer_averages_two_plain_models(name: str, package: str) -> None:
    pytest.importorskip(package)
    aggregator = PEERS[name]()()
    aggregator.add({"a": np.array([1.0, 2.0]), "b": np.array(8.0)}, 1)
    aggregator.add({"a": np.array([5.0, 6.0]), "b": np.array(4.0)}, 3)
    mean: dict[str, Any] = aggregator.mean()
    assert {key: np.asarray(value).tolist() for key, value in mean.items()} == {
        "a": [4.0, 5.0],
        "b": 5.0,
    }


@pytest.mark.parametrize(("name", "package"), NAMES)
def test_the_command_shows_where_a_peer_stands(
    name: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    assert main(["exact", name]) == 0
    out = capsys.readouterr().out
    head, _, *rows = out.splitlines()
    assert head.split() == ["property", "exact", name]
    cells = {row[:28].strip(): row[28:].split() for row in rows[:18]}
    for missing in ("order invariance", "correctly rounded", "no float16 overflow"):
        assert cells[missing] == ["yes", "no"]
    assert cells["inputs unchanged"] == ["yes", "yes"]
    assert cells["merge invariance"] == ["yes", "n/a"]


def test_a_late_update_that_nvflare_does_not_accept_counts_as_refused() -> None:
    pytest.importorskip("nvflare")
    aggregator = PEERS["nvflare"]()()
    aggregator.context.set_prop("current_round", 5, private=True, sticky=False)
    with pytest.raises(ValueError, match="not accepted"):
        aggregator.add({"a": np.ones(1)}, 1)
