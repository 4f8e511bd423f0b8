"""A corpus, document by document.

It is a folder of pictures, PDF files and videos, a JSONL or parquet file, or a Hugging Face data
set. Whatever is wrong with a document makes it :class:`Unreadable`, with the reason; the others
are not affected.

A PDF file is a document for each page, whose picture is encoded and whose text layer is kept for
searches by words. A video is one document, or one for each segment.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from rematch.data import clips, pages
from rematch.data.clips import Clip
from rematch.data.images import EXTENSIONS, EncodedPicture, read_picture
from rematch.data.inputs import check_unicode
from rematch.data.pages import PdfPage, open_pdf
from rematch.data.rows import load_lenient_rows, parse_item
from rematch.data.schema import Item
from rematch.errors import DataError, ImageError, RematchError, first_line
from rematch.files import read_regular
from rematch.prompts import DOCUMENT_INSTRUCTIONS, PAGE_INSTRUCTION, VIDEO_INSTRUCTION

Value = str | float | bool | None
Metadata = dict[str, Value]

LARGEST_SIDECAR = 16 << 20  # bytes
LONGEST_TEXT, LONGEST_ID = 1_000_000, 4_096  # characters
MOST_FIELDS = 256  # of one document's metadata
MOST_PARTS = (1 << 16) - 1  # pages of a file, or segments

StampOf = Callable[[str], int | None]  # the stamp that an index has of the document with an id
Media = Path | EncodedPicture | PdfPage | Clip


@dataclass(frozen=True)
class Document:
    """A document of a corpus, its picture not loaded yet.

    Attributes:
        id: Its name in the index: in a folder the path relative to it, otherwise the row's ``id``
            or number.
        text: Its text; may be empty if there is a picture. That of a page is not encoded.
        image: Path of its picture, the picture's file out of a data set, a page, or a video.
        metadata: Values to filter by.
        file_stamp: The stamp of a page or a segment, from its file.
    """

    id: str
    text: str = ""
    image: Media | None = None
    metadata: Metadata = field(default_factory=dict)
    file_stamp: int | None = None

    def stamp(self) -> int:
        """A number that changes when the document may have changed.

        A picture on disk is not opened for it; its size and time stand for its content.

        Raises:
            ImageError: If the picture's file does not exist.
        """
        if self.file_stamp is not None:
            return self.file_stamp
        parts: list[Any] = [self.text, sorted(self.metadata.items())]
        path = self.image.path if isinstance(self.image, Clip) else self.image
        if isinstance(path, Path):
            parts += _file_state(path)
        if isinstance(self.image, Clip):
            parts.append(self.image.frames)
        digest = xxh3_64(repr(parts).encode())
        if isinstance(self.image, EncodedPicture):
            digest.update(self.image.content)
        return int.from_bytes(digest.digest()[:7], "little")  # fits into int64

    def load_input(self, instruction: bool = True) -> dict[str, Any]:
        """The input that a model encodes, with the bytes of the picture's file or of the frames.

        A file is read once, so that it cannot change between two looks at it.

        Args:
            instruction: Whether the document's instruction goes before its text.

        Raises:
            ImageError: If the picture's file cannot be read.
        """
        value = self.item().as_input(instruction)
        if isinstance(self.image, Path):
            value["image"] = EncodedPicture(str(self.image), read_picture(self.image))
        elif isinstance(self.image, PdfPage):
            value["image"] = EncodedPicture(str(self.image), self.image.read_bytes())
        elif isinstance(self.image, Clip):
            value["image"] = [
                EncodedPicture(str(frame), frame.read_bytes()) for frame in self.image.pictures()
            ]
        return value

    def item(self) -> Item:
        """The document with its instruction, as in training; files are not read yet."""
        image = self.image
        if image is None:
            return Item(self.text, key=self.id)
        if PdfPage.parse(str(image)):  # also one whose picture is stored in an index
            assert not isinstance(image, Clip)
            return Item("", image, PAGE_INSTRUCTION, self.id)
        is_video = isinstance(image, Clip)
        instruction = VIDEO_INSTRUCTION if is_video else DOCUMENT_INSTRUCTIONS["image"]
        pictures = image.pictures() if isinstance(image, Clip) else image
        return Item(self.text, pictures, instruction + " " * bool(self.text), self.id)


@dataclass(frozen=True)
class Unreadable:
    """A document that cannot be used.

    Attributes:
        id: Its name in the corpus.
        error: Why it cannot be used.
    """

    id: str
    error: RematchError


@dataclass(frozen=True)
class Unchanged:
    """A document that the index has as it is in the corpus.

    Attributes:
        id: The document's id.
    """

    id: str


@dataclass(frozen=True)
class Corpus:
    """Documents that can be iterated over as often as needed.

    Attributes:
        name: Its name, for messages and to tell corpora apart.
        size: The number of documents, if it is known in advance.
        documents: Starts an iteration from the first document.
        changes: Starts one that does not open files whose documents an index has already.
    """

    name: str
    size: int | None
    documents: Callable[[], Iterable[Document | Unreadable]]
    changes: Callable[[StampOf], Iterable[Document | Unreadable | Unchanged]] | None = None

    def __iter__(self) -> Iterator[Document | Unreadable]:
        return iter(self.documents())

    def since(self, stamp_of: StampOf) -> Iterable[Document | Unreadable | Unchanged]:
        """The documents, for an index that has these stamps."""
        return self.changes(stamp_of) if self.changes else self.documents()


def open_corpus(source: Path | str, frames: int = clips.FRAMES, segments: float = 0) -> Corpus:
    """Open a corpus; its documents are read only when it is iterated over.

    Args:
        source: A folder: every picture, page of a PDF file and video in it, at any depth, with the
            text of ``NAME.txt`` or ``NAME.json`` beside ``NAME.jpg`` (in JSON ``text`` or
            ``caption``; the rest is metadata, which pages get too). Or a .jsonl or .parquet file
            of rows with ``text`` and/or ``image`` (or ``document``), and optionally ``id``; the
            rest is metadata. Or a Hugging Face data set: a directory made by ``save_to_disk``, or
            ``hf:NAME`` from the hub.
        frames: How many frames stand for a video.
        segments: Seconds of a video that are a document; 0 for the whole video.

    Raises:
        DataError: If the source does not exist, has an unknown format, or is an empty folder.
    """
    if str(source).startswith("hf:"):
        return _data_set(str(source))
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _data_set(str(path))
        size: int | None = 0
        for file in _file_paths(path):
            several = isinstance(file, Path) and _holds_several(file, segments)
            size = None if several or size is None else size + 1
        if size == 0:
            raise DataError(f"{path}: holds no files to index ({', '.join(_EXTENSIONS)}).")

        def changes(stamp_of: StampOf) -> Iterator[Document | Unreadable | Unchanged]:
            for file in _file_paths(path):
                if isinstance(file, Unreadable):
                    yield file
                elif _holds_several(file, segments):
                    yield from _parts(path, file, frames, segments, stamp_of)
                else:
                    yield _from_folder(path, file, frames)

        def documents() -> Iterator[Document | Unreadable]:
            for document in changes(lambda _: None):
                assert not isinstance(document, Unchanged)
                yield document

        return Corpus(str(path.resolve()), size, documents, changes)
    if not path.is_file():
        raise DataError(
            f"{path}: no such folder or file. Give a folder of pictures, PDF files and videos, or "
            "a .jsonl or .parquet file."
        )
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(
            f"{path}: is neither .jsonl nor .parquet. Give one of them, or a folder of pictures."
        )
    return Corpus(str(path.resolve()), None, lambda: _from_rows(path))


def documents_of(source: Path) -> list[Item]:
    """All documents of a corpus as items.

    Raises:
        DataError: If the corpus is empty, or the error of the first document that cannot be used.
    """
    items = []
    for document in open_corpus(source):
        if isinstance(document, Unreadable):
            raise document.error
        items.append(document.item())
    if not items:
        raise DataError(f"{source}: holds no documents.")
    return items


def unreadable(name: str, error: Exception) -> Unreadable:
    """A document that cannot be used because of whatever reading it has raised."""
    if not isinstance(error, RematchError):
        error = DataError(f"{name}: cannot be used ({first_line(error)}). Fix or remove it.")
    return Unreadable(_printable(name), error)


def _printable(name: str) -> str:
    """A name that can be written anywhere, and is not longer than ids may be."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= LONGEST_ID else name[: LONGEST_ID - 1] + "…"


def _checked(name: str, text: Any, picture: Media | None, metadata: dict[str, Any]) -> Document:
    """A document that can be stored and encoded, as far as can be told before it is read.

    Raises:
        DataError: If it cannot.
    """
    if not isinstance(text, str):
        raise DataError(f"{name[:80]}: its text is a {type(text).__name__}. Make it a string.")
    for part, limit in ((name, LONGEST_ID), (text, LONGEST_TEXT)):
        if len(part) > limit:
            what = "id" if part is name else "text"
            raise DataError(
                f"{name[:80]}: its {what} has {len(part):,} characters; at most {limit:,} are "
                "taken. Shorten it."
            )
        check_unicode(part)
    if len(metadata) > MOST_FIELDS:
        raise DataError(
            f"{name}: has {len(metadata):,} fields of metadata; at most {MOST_FIELDS} are taken. "
            "Leave some out."
        )
    return Document(name, text, picture, {k: _metadata_value(k, v) for k, v in metadata.items()})


# ---- folders ------------------------------------------------------------------------------------

_EXTENSIONS = (*EXTENSIONS, pages.EXTENSION, *clips.EXTENSIONS)


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
        return _checked(name, text, Clip(file, frames=frames) if is_video else file, metadata)
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
        state = repr([text, metadata, 0 if is_pdf else (frames, segments), *_file_state(file)])
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
                document = _checked(part_name, text, part, metadata)
                yield replace(document, file_stamp=stamp + _checked_count(len(parts)))
    except Exception as error:
        yield unreadable(name, error)


def _pages(file: Path, name: str, metadata: dict[str, Any], stamp: int) -> Iterator[Document]:
    pdf = open_pdf(file)
    stamp += _checked_count(pdf.pages)
    metadata = {"pages": pdf.pages, **({"title": pdf.title} if pdf.title else {})} | metadata
    for number, text in enumerate(pdf.texts(), 1):
        page_name = str(PdfPage(Path(name), number))
        document = _checked(
            page_name, text[:LONGEST_TEXT], PdfPage(file, number), {"page": number} | metadata
        )
        yield replace(document, file_stamp=stamp)


def _checked_count(count: int) -> int:
    if count > MOST_PARTS:
        raise DataError(f"has {count:,} parts; at most {MOST_PARTS:,} are taken. Split the file.")
    return count


def _file_state(path: Path) -> list[Any]:
    """What changes when a file does; it is not opened.

    Raises:
        ImageError: If it does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}). Check the file.") from None
    return [str(path), status.st_mtime_ns, status.st_size]


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


# ---- files of rows ------------------------------------------------------------------------------


def _from_rows(path: Path) -> Iterator[Document | Unreadable]:
    for number, record in load_lenient_rows(path):
        if isinstance(record, RematchError):
            yield Unreadable(str(number), record)
        else:
            yield _from_row(path, number, record)


def _from_row(path: Path, number: int, record: Any) -> Document | Unreadable:
    name = str(number)
    try:
        if isinstance(record, dict) and record.get("id") is not None:
            name = _id_of(record["id"], path, number)
        return _parsed_row(path, number, name, record)
    except Exception as error:
        return unreadable(name, error)


def _id_of(value: Any, path: Path, number: int) -> str:
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{path}:{number}: its id is a {type(value).__name__}. Make it a string or a number."
        )
    return str(value)


def _parsed_row(path: Path, number: int, name: str, record: Any) -> Document:
    value, metadata = record, {}
    if isinstance(record, dict):
        value = record.get("document") or {
            k: record[k] for k in ("text", "image") if record.get(k)
        }
        metadata = {
            k: v for k, v in record.items() if k not in ("id", "document", "text", "image")
        }
    if isinstance(value, dict) and isinstance(value.get("image"), dict | bytes):
        return _with_encoded(name, value, metadata)
    content = parse_item(value, path, number, "document")
    if isinstance(content.image, list):
        raise DataError(f"{path}:{number}: several pictures. A document has one.")
    assert content.image is None or isinstance(content.image, Path)
    return _checked(name, content.text, content.image and content.image.resolve(), metadata)


# ---- data sets ----------------------------------------------------------------------------------


def _data_set(name: str) -> Corpus:
    import datasets

    try:
        if name.startswith("hf:"):
            loaded: Any = datasets.load_dataset(name.removeprefix("hf:"), streaming=True)
        else:
            loaded = datasets.load_from_disk(name)
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded as a data set ({first_line(error)})."
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    columns = {n: c for split in splits.values() for n, c in (split.features or {}).items()}
    if not {"image", "text", "caption"} & columns.keys():
        raise DataError(
            f"{name}: has the columns {', '.join(columns)}; it needs image, text or caption."
        )
    sizes = [len(split) if hasattr(split, "__len__") else None for split in splits.values()]
    size = None if None in sizes else sum(s for s in sizes if s is not None)

    def documents() -> Iterator[Document | Unreadable]:
        for split_name, split in splits.items():
            if isinstance(columns.get("image"), datasets.Image):
                split = split.cast_column("image", datasets.Image(decode=False))
            for number, record in enumerate(_records(name, split)):
                position = f"{split_name}/{number}" if split_name else str(number)
                try:
                    key = record.pop("id", None)
                    value = {
                        "image": record.pop("image", None),
                        "text": record.pop("text", None) or record.get("caption"),
                    }
                    yield _with_encoded(position if key is None else str(key), value, record)
                except Exception as error:
                    yield unreadable(position, error)

    return Corpus(name if name.startswith("hf:") else str(Path(name).resolve()), size, documents)


def _records(name: str, split: Iterable[Any]) -> Iterator[Any]:
    """The rows of a split.

    Raises:
        DataError: If the data set is broken, so that no further row can be read.
    """
    rows = iter(split)
    while True:
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"{name}: the data set is broken ({first_line(error)}). Download or write it "
                "again."
            ) from error
        yield record


def _with_encoded(name: str, value: dict[str, Any], metadata: dict[str, Any]) -> Document:
    """A document from a row whose picture is a file's content, or a path, as data sets have it.

    Raises:
        DataError: If it has neither text nor a picture, or they are of another kind.
    """
    image, text = value.get("image"), value.get("text") or ""
    if isinstance(image, bytes):
        image = {"bytes": image}
    if image is not None and not isinstance(image, dict):
        raise DataError(
            f"document {name}: its image is a {type(image).__name__}; it should be the content "
            "of a file, or {'bytes': …, 'path': …}."
        )
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):
        raise DataError(
            f"document {name}: the bytes of its image are a {type(content).__name__}, and its "
            f"path a {type(path).__name__}."
        )
    picture: Path | EncodedPicture | None = EncodedPicture(name, content) if content else None
    if content is None and path:
        picture = Path(path)
    if picture is None and not text:
        raise DataError(f"document {name}: neither text nor a picture.")
    return _checked(name, text, picture, metadata)


def _metadata_value(name: str, value: Any) -> Value:
    """Numbers become floats; strings and booleans stay; everything else becomes JSON.

    Raises:
        DataError: If a number is too large, or a string is not Unicode.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isinf(number):
            raise DataError(f"metadata {name!r} is a number beyond ±1.8e308. Make it a string.")
        return None if math.isnan(number) else number  # how tables write a missing number
    if value is None or isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    try:
        check_unicode(text)
    except DataError as error:
        raise DataError(f"metadata {name!r}: {error}") from None
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"metadata {name!r} has {len(text):,} characters; at most {LONGEST_TEXT:,} are "
            "taken. Shorten it."
        )
    return text
