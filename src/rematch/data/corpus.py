"""A corpus, document by document.

It is a folder of pictures, a JSONL or parquet file, or a Hugging Face data set.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from rematch.data.images import EXTENSIONS, EncodedPicture
from rematch.data.rows import load_rows, parse_item
from rematch.data.schema import Item
from rematch.errors import DataError, ImageError, RematchError
from rematch.prompts import DOCUMENT_INSTRUCTIONS

Value = str | float | bool | None
Metadata = dict[str, Value]


@dataclass(frozen=True)
class Document:
    """A document of a corpus, its picture not loaded yet.

    Attributes:
        id: Its name in the index: in a folder the path relative to it, otherwise the row's ``id``
            or number.
        text: Its text; may be empty if there is a picture.
        image: Path of its picture, or the picture's file out of a data set.
        metadata: Values to filter by.
    """

    id: str
    text: str = ""
    image: Path | EncodedPicture | None = None
    metadata: Metadata = field(default_factory=dict)

    def stamp(self) -> int:
        """A number that changes when the document may have changed.

        A picture on disk is not opened for it; its size and time stand for its content.

        Raises:
            ImageError: If the picture's file does not exist.
        """
        parts: list[Any] = [self.text, sorted(self.metadata.items())]
        if isinstance(self.image, Path):
            try:
                status = self.image.stat()
            except OSError as error:
                raise _unreadable_picture(self.image, error) from None
            parts += [str(self.image), status.st_mtime_ns, status.st_size]
        digest = xxh3_64(repr(parts).encode())
        if isinstance(self.image, EncodedPicture):
            digest.update(self.image.content)
        return int.from_bytes(digest.digest()[:7], "little")  # fits into int64

    def load_input(self, instruction: bool = True) -> dict[str, Any]:
        """The input that a model encodes, with the bytes of the picture's file.

        The file is read once, so that it cannot change between two looks at it.

        Args:
            instruction: Whether the document's instruction goes before its text.

        Raises:
            ImageError: If the picture's file cannot be read.
        """
        if not isinstance(self.image, Path):
            return self.item().as_input(instruction)
        try:
            content = self.image.read_bytes()
        except OSError as error:
            raise _unreadable_picture(self.image, error) from None
        return self.item(EncodedPicture(str(self.image), content)).as_input(instruction)

    def item(self, image: EncodedPicture | None = None) -> Item:
        """The document with its instruction, as in training.

        Args:
            image: The picture to put in the place of the document's own.
        """
        picture = image or self.image
        instruction = DOCUMENT_INSTRUCTIONS["image"] if picture else ""
        if instruction and self.text:
            instruction += " "
        return Item(self.text, picture, instruction, self.id)


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
class Corpus:
    """Documents that can be iterated over as often as needed.

    Attributes:
        name: Its name, for messages and to tell corpora apart.
        size: The number of documents, if it is known in advance.
        documents: Starts an iteration from the first document.
    """

    name: str
    size: int | None
    documents: Callable[[], Iterable[Document | Unreadable]]

    def __iter__(self) -> Iterator[Document | Unreadable]:
        return iter(self.documents())


def open_corpus(source: Path | str) -> Corpus:
    """Open a corpus; its documents are read only when it is iterated over.

    Args:
        source: A folder: every picture in it, at any depth, with the text of ``NAME.txt`` or
            ``NAME.json`` beside ``NAME.jpg`` (in JSON ``text`` or ``caption``; the rest is
            metadata). Or a .jsonl or .parquet file of rows with ``text`` and/or ``image`` (or
            ``document``), and optionally ``id``; the rest is metadata. Or a Hugging Face data
            set: a directory made by ``save_to_disk``, or ``hf:NAME`` from the hub.

    Raises:
        DataError: If the source does not exist, has an unknown format, or is an empty folder.
    """
    if str(source).startswith("hf:"):
        return _data_set(str(source))
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _data_set(str(path))
        count = sum(1 for _ in _picture_paths(path))
        if not count:
            raise DataError(f"{path}: holds no pictures ({', '.join(EXTENSIONS)}).")

        def documents() -> Iterator[Document | Unreadable]:
            return (_from_folder(path, picture) for picture in _picture_paths(path))

        return Corpus(str(path.resolve()), count, documents)
    if not path.is_file():
        raise DataError(
            f"{path}: no such folder or file. Give a folder of pictures, or a .jsonl or "
            ".parquet file."
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


def _unreadable_picture(path: Path, error: OSError) -> ImageError:
    return ImageError(f"{path}: cannot be read ({error.strerror}).")


def _picture_paths(folder: Path) -> Iterator[Path]:
    """Every picture in a folder, at any depth, ordered by name.

    Links to folders are followed, unless they lead back to a folder above.
    """

    def walk(directory: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(directory), key=lambda e: e.name)
        except OSError as error:
            raise DataError(
                f"{directory}: cannot be listed ({error.strerror}). Check its permissions."
            ) from None
        for entry in entries:
            if entry.is_dir():
                status = entry.stat()
                inode = (status.st_dev, status.st_ino)
                if inode not in above:
                    yield from walk(directory / entry.name, above | {inode})
            elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("._"):
                yield directory / entry.name

    top = folder.stat()
    return walk(folder, frozenset({(top.st_dev, top.st_ino)}))


def _from_folder(folder: Path, picture: Path) -> Document | Unreadable:
    name = os.fsencode(picture.relative_to(folder)).decode("utf-8", "backslashreplace")
    try:
        str(picture).encode()
    except UnicodeEncodeError:
        return Unreadable(name, ImageError(f"{name}: its name is not UTF-8. Rename it."))
    try:
        text, metadata = _sidecar(picture)
    except DataError as error:
        return Unreadable(name, error)
    return Document(name, text, picture, metadata)


def _sidecar(picture: Path) -> tuple[str, Metadata]:
    """Text and metadata from the .json or .txt file beside a picture, if there is one."""
    json_path, text_path = picture.with_suffix(".json"), picture.with_suffix(".txt")
    for path in (json_path, text_path):
        try:
            content = path.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}).") from None
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
        return str(text).strip(), _metadata(record)
    return "", {}


def _from_rows(path: Path) -> Iterator[Document | Unreadable]:
    for number, record in load_rows(path):
        yield _from_row(path, number, record)


def _from_row(path: Path, number: int, record: Any) -> Document | Unreadable:
    name, value, metadata = str(number), record, {}
    if isinstance(record, dict):
        if record.get("id") is not None:
            name = str(record["id"])
        value = record.get("document") or {
            k: record[k] for k in ("text", "image") if record.get(k)
        }
        metadata = {
            k: v for k, v in record.items() if k not in ("id", "document", "text", "image")
        }
    try:
        if isinstance(value, dict) and isinstance(value.get("image"), dict | bytes):
            return _with_encoded(name, value, metadata)
        content = parse_item(value, path, number, "document")
    except DataError as error:
        return Unreadable(name, error)
    if isinstance(content.image, list):
        return Unreadable(
            name, DataError(f"{path}:{number}: several pictures. A document has one.")
        )
    assert content.image is None or isinstance(content.image, Path)
    picture = content.image and content.image.resolve()
    return Document(name, content.text, picture, _metadata(metadata))


def _data_set(name: str) -> Corpus:
    import datasets

    try:
        if name.startswith("hf:"):
            loaded: Any = datasets.load_dataset(name.removeprefix("hf:"), streaming=True)
        else:
            loaded = datasets.load_from_disk(name)
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded as a data set ({str(error).splitlines()[0]})."
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
            for number, record in enumerate(split):
                key = record.pop("id", None)
                value = {
                    "image": record.pop("image", None),
                    "text": record.pop("text", None) or record.get("caption"),
                }
                position = f"{split_name}/{number}" if split_name else str(number)
                yield _with_encoded(str(key) if key is not None else position, value, record)

    return Corpus(name if name.startswith("hf:") else str(Path(name).resolve()), size, documents)


def _with_encoded(
    name: str, value: dict[str, Any], metadata: dict[str, Any]
) -> Document | Unreadable:
    """A document from a row whose picture is a file's content, or a path, as data sets have it."""
    image, text = value.get("image"), value.get("text") or ""
    content = image if isinstance(image, bytes) else (image or {}).get("bytes")
    if content is None and image and image.get("path"):
        return Document(name, text, Path(image["path"]), _metadata(metadata))
    if content is None and not text:
        return Unreadable(name, DataError(f"document {name}: neither text nor a picture."))
    picture = EncodedPicture(name, content) if content else None
    return Document(name, text, picture, _metadata(metadata))


def _metadata(record: dict[str, Any]) -> Metadata:
    """Numbers become floats; strings and booleans stay; everything else becomes JSON."""
    return {name: _metadata_value(value) for name, value in record.items()}


def _metadata_value(value: Any) -> Value:
    if value is None or isinstance(value, str | bool):
        return value
    return float(value) if isinstance(value, int | float) else json.dumps(value, default=str)
