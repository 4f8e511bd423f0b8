"""A folder of pictures, PDF files and videos as a corpus.

A PDF file is a document for each page, whose picture is encoded and whose text layer is kept for
searches by words. A video is one document, or one for each segment.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from rematch.data import clips, pages
from rematch.data.clips import Clip
from rematch.data.document import (
    LONGEST_TEXT,
    Document,
    StampOf,
    Unchanged,
    Unreadable,
    checked_document,
    file_state,
    unreadable,
)
from rematch.data.images import EXTENSIONS
from rematch.data.pages import PdfPage, open_pdf
from rematch.errors import DataError, ImageError, first_line
from rematch.files import read_regular

LARGEST_SIDECAR = 16 << 20  # bytes
MOST_PARTS = (1 << 16) - 1  # pages of a file, or segments
_EXTENSIONS = (*EXTENSIONS, pages.EXTENSION, *clips.EXTENSIONS)


def folder_size(folder: Path, segments: float) -> int | None:
    """The number of documents in a folder; ``None`` if files must be opened to tell.

    Raises:
        DataError: If it holds none.
    """
    size: int | None = 0
    for file in _file_paths(folder):
        several = isinstance(file, Path) and _holds_several(file, segments)
        size = None if several or size is None else size + 1
    if size == 0:
        raise DataError(f"{folder}: holds no files to index ({', '.join(_EXTENSIONS)}).")
    return size


def folder_documents(
    folder: Path, frames: int, segments: float, stamp_of: StampOf
) -> Iterator[Document | Unreadable | Unchanged]:
    """The documents of a folder, ordered by name.

    Args:
        folder: The folder.
        frames: How many frames stand for a video.
        segments: Seconds of a video that are a document; 0 for the whole video.
        stamp_of: The stamp that an index has of the document with an id; files with several
            documents that it has already are not opened.
    """
    for file in _file_paths(folder):
        if isinstance(file, Unreadable):
            yield file
        elif _holds_several(file, segments):
            yield from _parts(folder, file, frames, segments, stamp_of)
        else:
            yield _from_folder(folder, file, frames)


def _file_paths(folder: Path) -> Iterator[Path | Unreadable]:
    """Every picture, PDF file and video in a folder, folder by folder, ordered by name.

    Links to folders are followed last. A folder that can be reached in several ways counts once,
    and none that holds ``folder`` itself is followed.
    """
    above = [_inode(path.stat()) for path in folder.resolve().parents]
    visited = {*above, _inode(folder.stat())}
    waiting, links = [folder], list[Path]()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)
        try:
            if directory is not folder and _is_visited(directory, visited):
                continue
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                yield unreadable(_id_in(folder, directory), error)
                continue
            raise DataError(
                f"{directory}: cannot be listed ({error.strerror}). Check its permissions."
            ) from None
        folders = []
        for entry in entries:
            path = directory / entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and _leads_to_folder(path):
                links.append(path)
            elif entry.name.lower().endswith(_EXTENSIONS) and not entry.name.startswith("._"):
                yield path
        waiting += reversed(folders)


def _leads_to_folder(link: Path) -> bool:
    try:
        return link.is_dir()
    except OSError:
        return False


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_visited(directory: Path, visited: set[tuple[int, int]]) -> bool:
    """Whether a folder was visited; it is from now on."""
    inode = _inode(directory.stat())
    is_visited = inode in visited
    visited.add(inode)
    return is_visited


def _id_in(folder: Path, path: Path) -> str:
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")


def _from_folder(folder: Path, file: Path, frames: int) -> Document | Unreadable:
    name = _id_in(folder, file)
    try:
        _check_name(name, file)
        text, metadata = _sidecar(file)
        is_video = file.name.lower().endswith(clips.EXTENSIONS)
        return checked_document(
            name, text, Clip(file, frames=frames) if is_video else file, metadata
        )
    except Exception as error:
        return unreadable(name, error)


def _check_name(name: str, file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise ImageError(f"{name}: its name is not UTF-8. Rename it.") from None


def _holds_several(file: Path, segments: float) -> bool:
    """Whether a file is a document for each of its parts."""
    name = file.name.lower()
    return name.endswith(pages.EXTENSION) or (segments > 0 and name.endswith(clips.EXTENSIONS))


def _parts(
    folder: Path, file: Path, frames: int, segments: float, stamp_of: StampOf
) -> Iterator[Document | Unreadable | Unchanged]:
    """The pages of a PDF file or the segments of a video.

    Their stamps are those of the file, with the number of parts in the lowest 16 bits, so that an
    unchanged file need not be opened to tell its parts.
    """
    name = _id_in(folder, file)
    is_pdf = file.name.lower().endswith(pages.EXTENSION)
    try:
        _check_name(name, file)
        text, metadata = _sidecar(file)
        state = repr([text, metadata, 0 if is_pdf else (frames, segments), *file_state(file)])
        stamp = xxh3_64(state.encode()).intdigest() >> 24 << 16  # 40 bits
        whole = Clip(Path(name), 0.0, segments, frames)

        def names(count: int) -> list[str]:
            if is_pdf:
                return [str(PdfPage(Path(name), number + 1)) for number in range(count)]
            starts = [segments * number for number in range(count)]
            return [str(replace(whole, start=s, end=s + segments)) for s in starts]

        indexed = stamp_of(names(1)[0]) or 0
        indexed_names = names(indexed - stamp) if 0 < indexed - stamp <= MOST_PARTS else []
        if indexed_names and all(stamp_of(part) == indexed for part in indexed_names):
            yield from map(Unchanged, indexed_names)
            return
        if is_pdf:
            yield from _pages(file, name, metadata, stamp)
        else:
            parts = Clip(file, frames=frames).segments(segments)
            for part, part_name in zip(parts, names(len(parts)), strict=True):
                document = checked_document(part_name, text, part, metadata)
                yield replace(document, file_stamp=stamp + _checked_count(len(parts)))
    except Exception as error:
        yield unreadable(name, error)


def _pages(file: Path, name: str, metadata: dict[str, Any], stamp: int) -> Iterator[Document]:
    pdf = open_pdf(file)
    stamp += _checked_count(pdf.pages)
    metadata = {"pages": pdf.pages, **({"title": pdf.title} if pdf.title else {})} | metadata
    for number, text in enumerate(pdf.texts(), 1):
        page_name = str(PdfPage(Path(name), number))
        document = checked_document(
            page_name, text[:LONGEST_TEXT], PdfPage(file, number), {"page": number} | metadata
        )
        yield replace(document, file_stamp=stamp)


def _checked_count(count: int) -> int:
    if count > MOST_PARTS:
        raise DataError(f"has {count:,} parts; at most {MOST_PARTS:,} are taken. Split the file.")
    return count


def _sidecar(file: Path) -> tuple[str, dict[str, Any]]:
    """Text and metadata from the .json or .txt file beside a file, if there is one."""
    json_path, text_path = file.with_suffix(".json"), file.with_suffix(".txt")
    for path in (json_path, text_path):
        try:
            content = read_regular(path, LARGEST_SIDECAR).decode("utf-8-sig")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                continue  # so there is no such file
            raise DataError(f"{path}: cannot be read ({first_line(error)}).") from None
        if path == text_path:
            return content.strip(), {}
        try:
            record = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: not valid JSON ({error.msg}, line {error.lineno})."
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}: holds a {type(record).__name__}; it should hold an object with 'text'."
            )
        text = record.pop("text", None) or record.pop("caption", None) or ""
        if isinstance(text, int | float):
            text = str(text)
        return text.strip() if isinstance(text, str) else text, record
    return "", {}
