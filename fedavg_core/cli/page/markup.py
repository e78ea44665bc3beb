"""HTML and SVG as trees, so that text from outside can only ever be text.

Nothing is put together from strings: every name is a text or an attribute of an element, and is
escaped when the tree is written.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

from fedavg_core.cli.console import printable

__all__ = ["Content", "document", "element", "shown"]

Content: TypeAlias = "Element | str | Iterable[Content] | None"

_LENGTH = 80


def shown(text: str, limit: int = _LENGTH) -> str:
    """A text from outside: one line of bounded length, without characters that cannot be seen."""
    line = printable(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def element(tag: str, *content: Content, **attributes: object) -> Element:
    """An element.

    Args:
        tag: What it is.
        content: Texts and elements, and collections of them; None is nothing.
        attributes: Its attributes; ``class_`` stands for ``class``, ``data_tip`` for ``data-tip``.

    Returns:
        The element.
    """
    made = Element(
        tag,
        {
            name.rstrip("_").replace("_", "-"): _attribute(value)
            for name, value in attributes.items()
            if value is not None
        },
    )
    for part in content:
        _append(made, part)
    return made


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _append(parent: Element, part: Content) -> None:
    if part is None:
        return
    if isinstance(part, Element):
        parent.append(part)
    elif not isinstance(part, str):
        for one in part:
            _append(parent, one)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + part
    else:
        parent.text = (parent.text or "") + part


def document(title: str, style: str, script: str, *content: Content) -> bytes:
    """A page that needs nothing from elsewhere, and can ask for nothing.

    Args:
        title: The page's.
        style: Its style sheet.
        script: Its program. By the page's own policy no other can run.
        content: Its body.

    Returns:
        HTML, in UTF-8.
    """
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("link", rel="icon", href="data:,"),
            element("title", title),
            element("style", style),
        ),
        element("body", *content, element("script", script)),
        lang="en",
    )
    html: bytes = tostring(page, encoding="utf-8", method="html")
    return b"<!doctype html>\n" + html + b"\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
