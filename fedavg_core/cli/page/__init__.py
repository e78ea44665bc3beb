"""The page that shows how a run went.

It is made of the record of the run alone (see `run_log`). It needs nothing from elsewhere: charts
are drawn in it, and its own policy keeps it from asking for anything. Names that came from
contributors are text, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from fedavg_core.cli.arguments import package_version
from fedavg_core.cli.page import sections
from fedavg_core.cli.page.axes import Places
from fedavg_core.cli.page.markup import Content, document, element, shown
from fedavg_core.cli.run_log import LOG, RoundRecord

__all__ = ["page"]

_MOST_PLACES = 160


def page(settings: dict[str, Any], records: Sequence[RoundRecord]) -> bytes:
    """The page of a run.

    Args:
        settings: What ``run.json`` holds.
        records: The rounds, by their numbers.

    Returns:
        HTML, in UTF-8.
    """
    name = shown(str(settings.get("training_file", "a training file")))
    style, script = (
        (files("fedavg_core.cli.page") / f"page.{suffix}").read_text(encoding="utf-8")
        for suffix in ("css", "js")
    )
    body: Content = element("p", "No round is completed yet.")
    if records:
        places = Places.of([record.round for record in records], _MOST_PLACES)
        body = [
            sections.tiles(settings, records),
            sections.learning(places, records),
            sections.participation(settings, places, records),
            sections.troubles(records),
            sections.sizes(places, records),
            sections.costs(settings, places, records),
            sections.table(records),
        ]
    return document(
        f"{name}, federated",
        style,
        script,
        element(
            "main",
            element(
                "header",
                element("div", "Report of a federated run", class_="eyebrow"),
                element("h1", name),
                element("p", _told_settings(settings)),
            ),
            body,
            element(
                "footer",
                f"Made by fedavg-core {package_version()} from the record of the run, ",
                element("code", LOG),
                "; nothing on this page is loaded from elsewhere.",
            ),
        ),
        element("div", id="tip", hidden="hidden", role="status"),
    )


def _told_settings(settings: dict[str, Any]) -> str:
    share, optimizer = settings.get("fraction"), settings.get("optimizer")
    begun = str(settings.get("started")).replace("T", " ").replace("+00:00", " UTC")
    count = settings.get("clients")
    told = [f"{count} {'client' if count == 1 else 'clients'}"]
    if isinstance(share, float) and 0 < share < 1:
        told = [f"{told[0]}, {share:.0%} of them a round"]
    told += [f"{settings.get('transfer')} updates", _told(settings.get("accumulator"), "mean")]
    if optimizer is not None:
        told.append(_told(optimizer, "as server optimizer"))
    if sections.trained_elsewhere(settings):
        told.append(f"{settings['workers']} workers")
    told += [f"seed {settings.get('seed')}", f"begun {begun}"]
    return shown(" · ".join(told), 400)


def _told(setting: object, what: str) -> str:
    """A setting that is a name, or a name and its own settings."""
    if not isinstance(setting, dict):
        return f"{setting} {what}"
    rest = (f"{name} {value}" for name, value in setting.items() if name != "name")
    return " ".join([str(setting.get("name")), what, *_in_brackets(rest)])


def _in_brackets(parts: Iterable[str]) -> list[str]:
    inside = ", ".join(parts)
    return [f"({inside})"] if inside else []
