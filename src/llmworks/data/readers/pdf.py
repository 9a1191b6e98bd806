"""Read the text layer of PDF files (pdfium). Does not do OCR: a scanned PDF without a text layer is rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmworks.core.documents import RejectedInput
from llmworks.core.errors import MissingDependency
from llmworks.core.types import Document
from llmworks.data.readers.input_files import InputFile
from llmworks.data.readers.text import read_limited, size_limit_reason


def read_pdf(source: InputFile, limit: int) -> Iterator[Document | RejectedInput]:
    """Read one document: the text of all pages, separated by empty lines."""
    try:
        import pypdfium2
        import pypdfium2.raw
    except ImportError:
        raise MissingDependency("reading PDF needs the extra: pip install 'llmworks[documents]'") from None

    with source.open() as stream:
        data = read_limited(stream, limit)
    if data is None:
        yield RejectedInput(source.name, 0, size_limit_reason(limit))
        return
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        locked = getattr(error, "err_code", None) == pypdfium2.raw.FPDF_ERR_PASSWORD
        yield RejectedInput(source.name, 0, "an encrypted PDF" if locked else f"a broken PDF ({error})")
        return
    try:
        pages = [_page_text(pdf, index) for index in range(len(pdf))]
    except pypdfium2.PdfiumError as error:
        yield RejectedInput(source.name, 0, f"a broken PDF ({error})")
        return
    finally:
        pdf.close()
    text = "\n\n".join(page for page in pages if page)
    if not text:
        yield RejectedInput(source.name, 0, "a PDF without a text layer")
        return
    yield Document(source.name, text, source.name, {"pages": len(pages)})


def _page_text(pdf: Any, index: int) -> str:
    page = pdf[index]
    view = page.get_textpage()
    try:
        return str(view.get_text_range()).replace("\r\n", "\n").replace("\r", "\n").strip()
    finally:
        view.close()
        page.close()
