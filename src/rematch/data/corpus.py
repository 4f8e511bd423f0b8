"""A corpus, document by document.

It is a folder of pictures, PDF files and videos, a JSONL or parquet file, or a Hugging Face data
set. Whatever is wrong with a document makes it :class:`~rematch.data.document.Unreadable`, with
the reason; the others are not affected.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rematch.data import clips
from rematch.data.document import (
    Document,
    StampOf,
    Unchanged,
    Unreadable,
    checked_document,
    unreadable,
)
from rematch.data.folder import folder_documents, folder_size
from rematch.data.images import EncodedPicture
from rematch.data.rows import load_lenient_rows, parse_item
from rematch.data.schema import Item
from rematch.errors import DataError, RematchError, first_line


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
        size = folder_size(path, segments)

        def changes(stamp_of: StampOf) -> Iterator[Document | Unreadable | Unchanged]:
            return folder_documents(path, frames, segments, stamp_of)

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
    return checked_document(
        name, content.text, content.image and content.image.resolve(), metadata
    )


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
    return checked_document(name, text, picture, metadata)
