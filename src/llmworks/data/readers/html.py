"""A page's main content as text, without navigation and boilerplate (trafilatura), or all its text."""

from __future__ import annotations

from typing import Literal

from llmworks.core.errors import MissingDependency
from llmworks.data.readers.text import NotText, decode

Part = Literal["main", "all"]


def page_text(data: bytes, part: Part) -> tuple[str, str]:
    """(text, title) of an HTML page; the text is empty where there is no content.

    NotText for bytes that are no page.
    """
    try:
        import trafilatura
        from lxml import etree
    except ImportError:
        raise MissingDependency("reading HTML needs the extra: pip install 'llmworks[documents]'") from None

    tree = trafilatura.load_html(data)
    if tree is None:
        text, _ = decode(data)
        tree = trafilatura.load_html(text)
        if tree is None:
            raise NotText("no HTML page")
    title = " ".join(
        "".join(node.itertext()) for node in tree.iter("title") if isinstance(node, etree._Element)
    ).strip()
    if part == "all":
        return trafilatura.html2txt(tree).strip(), title
    # dates and authors are left to others: finding them depends on today's date
    found = trafilatura.extract(tree, include_comments=False, include_tables=True, with_metadata=False)
    return (found or "").strip(), title
