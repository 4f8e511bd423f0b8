"""Pages of PDF files: rendered as pictures, with the text that the file holds.

PDFium reads a file piece by piece, so that a file of 5,000 pages is never in memory as a whole.
It is not thread-safe; all calls share one lock.
"""

import atexit
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from rematch.errors import DataError, ImageError
from rematch.files import regular_status

EXTENSION = ".pdf"
MAX_PIXELS = 1280 * 28 * 28  # MMEB's limit for a picture
MAX_EDGE = 4096
_MARK = "#page="
_LARGEST = 1 << 40  # bytes; it is not read as a whole
_LOCK = Lock()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file.

    Attributes:
        path: Path of the file.
        number: The page's number, from 1.
    """

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}{_MARK}{self.number}"

    @classmethod
    def parse(cls, name: str) -> "PdfPage | None":
        """The page that is written as ``FILE.pdf#page=N``; ``None`` for other text.

        >>> PdfPage.parse("report.pdf#page=3").number
        3
        """
        path, mark, number = name.rpartition(_MARK)
        if mark and path.lower().endswith(EXTENSION) and number.isdecimal():
            return cls(Path(path), int(number))
        return None

    def read_bytes(self) -> bytes:
        """Render the page, as PNG.

        Raises:
            ImageError: If the file cannot be opened or the page cannot be rendered.
        """
        try:
            with _opened(self.path) as pdf:
                if not 1 <= self.number <= len(pdf):
                    raise ImageError(f"{self}: the file has only {len(pdf)} pages.")
                picture = _render(pdf, self.number - 1)
        except DataError as error:
            raise ImageError(str(error)) from None
        if picture is None:
            raise ImageError(f"{self}: the page is broken. Replace the file.")
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


@dataclass(frozen=True)
class PdfFile:
    """What a PDF file says of itself.

    Attributes:
        path: Its path.
        pages: Its number of pages.
        title: Its title; empty if it has none.
    """

    path: Path
    pages: int
    title: str

    def texts(self) -> Iterator[str]:
        """The text layer of each page; empty where there is none, as in a scan.

        Raises:
            DataError: If the file cannot be opened.
        """
        for number in range(self.pages):
            with _opened(self.path) as pdf:
                text = _text(pdf, number)
            yield text  # without the lock


def open_pdf(path: Path) -> PdfFile:
    """Read the number of pages and the title of a PDF file.

    Raises:
        DataError: If it cannot be read, is encrypted or broken.
    """
    with _opened(path) as pdf:
        if not len(pdf):
            raise DataError(f"{path}: has no pages.")
        title = pdf.get_metadata_value("Title")
        return PdfFile(path, len(pdf), _clean(title))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as a ``PdfDocument``, for one thread at a time."""
    try:
        status = regular_status(path, _LARGEST)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    with _LOCK:
        yield _document(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _document(path: Path, modified: int, size: int) -> Any:
    """Open a file, or take it from the cache if it has not changed."""
    pypdfium2 = _pdfium()
    try:
        return pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == pypdfium2.raw.FPDF_ERR_PASSWORD:
            reason = "encrypted. Save it without a password."
        else:
            reason = "broken, or not a PDF file. Replace the file."
        raise DataError(f"{path}: {reason}") from None


@cache
def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise DataError("PDF files need pypdfium2: pip install 'rematch-mm[documents]'.") from None
    atexit.register(_document.cache_clear)  # before PDFium ends
    return pypdfium2


def _render(pdf: Any, number: int) -> Image.Image | None:
    """The picture of a page; ``None`` if the page is broken."""
    try:
        page = pdf[number]
        width, height = page.get_size()  # points
        if not (width > 0 and height > 0):
            return None
        # a strip of a page must not become a line of a million pixels
        scale = min((MAX_PIXELS / (width * height)) ** 0.5, MAX_EDGE / max(width, height))
        picture: Image.Image = page.render(scale=scale).to_pil()
        page.close()
    except _pdfium().PdfiumError:
        return None
    return picture


def _text(pdf: Any, number: int) -> str:
    try:
        page = pdf[number]
        text_page = page.get_textpage()
        text = text_page.get_text_range()
        text_page.close()
        page.close()
    except _pdfium().PdfiumError:  # rendering it will say why
        return ""
    return _clean(text)


def _clean(text: str) -> str:
    """Text with plain spaces, without what no database can store."""
    valid = text.encode("utf-8", "ignore").decode().replace("\0", " ")
    return " ".join(valid.split())
