"""Pages of PDF files as pictures and text."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from shared_documents import encrypt, save_pdf

from rematch.data.images import EncodedPicture, load_image
from rematch.data.pages import MAX_PIXELS, PdfPage, open_pdf
from rematch.errors import DataError, ImageError


def pixels(page):
    return np.asarray(load_image(EncodedPicture(str(page), page.read_bytes())))


def test_a_file_gives_texts_title_and_pictures(tmp_path):
    path = save_pdf(tmp_path / "report.pdf", ["A red fox", "", "Two owls"], "Animals")
    file = open_pdf(path)
    assert (file.pages, file.title) == (3, "Animals")
    assert list(file.texts()) == ["A red fox", "", "Two owls"]
    first, empty = pixels(PdfPage(path, 1)), pixels(PdfPage(path, 2))
    assert 0.98 * MAX_PIXELS < first.shape[0] * first.shape[1] <= 1.01 * MAX_PIXELS
    assert (first < 128).any(), "the text is drawn"
    assert (empty == 255).all()


def test_a_name_tells_the_page(tmp_path):
    page = PdfPage(tmp_path / "a#page=2.PDF", 7)
    assert PdfPage.parse(str(page)) == page
    for name in ("a.pdf", "a.png#page=2", "a.pdf#page=", "a.pdf#page=-1", "a.pdf#page=x"):
        assert PdfPage.parse(name) is None


def test_threads_render_the_same_pictures(tmp_path):
    path = save_pdf(tmp_path / "many.pdf", [f"page {i}" for i in range(8)])
    pages = [PdfPage(path, number) for number in range(1, 9)]
    alone = [page.read_bytes() for page in pages]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(PdfPage.read_bytes, pages)) == alone


def test_a_changed_file_is_opened_again(tmp_path):
    path = save_pdf(tmp_path / "a.pdf", ["one"])
    assert open_pdf(path).pages == 1
    save_pdf(path, ["one", "two"])
    assert open_pdf(path).pages == 2


def test_errors_name_the_file_and_the_reason(tmp_path):
    path = save_pdf(tmp_path / "a.pdf", ["one"])
    with pytest.raises(ImageError, match=r"a\.pdf#page=2: the file has only 1 pages"):
        PdfPage(path, 2).read_bytes()
    with pytest.raises(DataError, match="encrypted"):
        open_pdf(encrypt(path, tmp_path / "locked.pdf"))
    with pytest.raises(DataError, match="No such file"):
        open_pdf(tmp_path / "no.pdf")
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(DataError, match="broken, or not a PDF file"):
        open_pdf(tmp_path / "cut.pdf")
    with pytest.raises(ImageError, match="broken, or not a PDF file"):
        PdfPage(tmp_path / "cut.pdf", 1).read_bytes()
