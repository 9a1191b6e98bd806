"""Extract the main content of an HTML page without navigation and boilerplate (trafilatura), or all its text."""

from __future__ import annotations

from typing import Literal

from llmworks.core.errors import MissingDependency
from llmworks.data.readers.text import NotTextError, decode_document

HtmlContent = Literal["main", "all"]


def extract_page_text(data: bytes, content: HtmlContent) -> tuple[str, str]:
    """Extract (text, title) from an HTML page; the text is empty when there is no content.

    NotText for bytes that are not HTML.
    """
    try:
        import trafilatura
        from lxml import etree
    except ImportError:
        raise MissingDependency("reading HTML needs the extra: pip install 'llmworks[documents]'") from None

    tree = trafilatura.load_html(data)
    if tree is None:
        text, _ = decode_document(data)
        tree = trafilatura.load_html(text)
        if tree is None:
            raise NotTextError("not an HTML page")
    title = " ".join(
        "".join(node.itertext()) for node in tree.iter("title") if isinstance(node, etree._Element)
    ).strip()
    if content == "all":
        return trafilatura.html2txt(tree).strip(), title
        # no metadata: trafilatura's date extraction depends on today's date
    extracted = trafilatura.extract(tree, include_comments=False, include_tables=True, with_metadata=False)
    return (extracted or "").strip(), title
