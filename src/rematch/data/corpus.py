"""A corpus, document by document: a folder of pictures, a JSONL or parquet file, or a Hugging Face
data set.
"""

import json
import os
from collections.abc import Iterator
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
    """One document, its picture not read yet.

    Attributes:
        id: What it is called in the index: in a folder the path below it, else the row's ``id`` or
            its number.
        text: May be empty if there is a picture.
        image: A path, or a picture's file out of a data set.
        metadata: To filter by.
    """

    id: str
    text: str = ""
    image: Path | EncodedPicture | None = None
    metadata: Metadata = field(default_factory=dict)

    def stamp(self) -> int:
        """Changes when the document may have changed; a picture on disk is not opened for it.

        Raises:
            ImageError: If the picture is not there.
        """
        parts: list[Any] = [self.text, sorted(self.metadata.items())]
        if isinstance(self.image, Path):
            try:
                found = self.image.stat()
            except OSError as error:
                raise ImageError(f"{self.image}: cannot be read ({error.strerror}).") from None
            parts += [str(self.image), found.st_mtime_ns, found.st_size]
        digest = xxh3_64(repr(parts).encode())
        if isinstance(self.image, EncodedPicture):
            digest.update(self.image.content)
        return int.from_bytes(digest.digest()[:7], "little")  # fits into int64

    def read(self, instruction: bool = True) -> dict[str, Any]:
        """What a model encodes, the picture's file read once, so that nothing changes between a
        look and the next.

        Raises:
            ImageError: If the picture cannot be read.
        """
        image = self.image
        if isinstance(image, Path):
            try:
                image = EncodedPicture(str(image), image.read_bytes())
            except OSError as error:
                raise ImageError(f"{image}: cannot be read ({error.strerror}).") from None
        return self.item(image).as_input(instruction)

    def item(self, image: Any = None) -> Item:
        """The document with its instruction, as in training."""
        image = image or self.image
        instruction = DOCUMENT_INSTRUCTIONS["image"] if image else ""
        return Item(
            self.text,
            image,
            instruction + " " if instruction and self.text else instruction,
            self.id,
        )


Found = (
    Document | tuple[str, RematchError]
)  # a document, or the id of one that cannot be used and why


@dataclass(frozen=True)
class Corpus:
    """Documents to be read one after the other, as often as wanted.

    Attributes:
        name: What it is, for messages and to tell corpora apart.
        size: How many documents there are, if that is known.
        documents: Starts from the beginning.
    """

    name: str
    size: int | None
    documents: Any

    def __iter__(self) -> Iterator[Found]:
        return iter(self.documents())


def open_corpus(source: Path | str) -> Corpus:
    """A corpus.

    Args:
        source: A folder: every picture in it, at any depth, with the text of ``NAME.txt`` or
            ``NAME.json`` beside ``NAME.jpg`` (in JSON ``text`` or ``caption``; the rest is
            metadata). Or a .jsonl/.parquet file of rows with ``text`` and/or ``image`` (or
            ``document``), perhaps ``id``; the rest is metadata. Or a Hugging Face data set: a
            directory made by ``save_to_disk``, or ``hf:NAME`` from the hub.

    Raises:
        DataError: If there is nothing there.
    """
    if str(source).startswith("hf:"):
        return _data_set(str(source))
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _data_set(str(path))
        count = sum(1 for _ in _pictures(path))
        if not count:
            raise DataError(f"{path}: holds no pictures ({', '.join(EXTENSIONS)}).")

        def documents() -> Iterator[Found]:
            return (_from_folder(path, picture) for picture in _pictures(path))

        return Corpus(str(path.resolve()), count, documents)
    if not path.is_file():
        raise DataError(
            f"{path}: no such folder or file. Give a folder of pictures, or a .jsonl or .parquet "
            "file."
        )
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(
            f"{path}: is neither .jsonl nor .parquet. Give one of them, or a folder of pictures."
        )
    return Corpus(str(path.resolve()), None, lambda: _from_rows(path))


def documents_of(source: Path) -> list[Item]:
    """All documents of a corpus of files, none of which may fail.

    Raises:
        DataError: Or another RematchError, if one cannot be used.
    """
    found = []
    for one in open_corpus(source):
        if isinstance(one, tuple):
            raise one[1]
        found.append(one.item())
    if not found:
        raise DataError(f"{source}: holds no documents.")
    return found


def _pictures(folder: Path) -> Iterator[Path]:
    """Every picture below, in the order of the names; links to folders are followed, but not in
    circles.
    """

    def walk(place: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(place), key=lambda e: e.name)
        except OSError as error:
            raise DataError(
                f"{place}: cannot be listed ({error.strerror}). Check its permissions."
            ) from None
        for entry in entries:
            if entry.is_dir():
                about = entry.stat()
                here = (about.st_dev, about.st_ino)
                if here not in above:
                    yield from walk(place / entry.name, above | {here})
            elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("._"):
                yield place / entry.name

    top = folder.stat()
    return walk(folder, frozenset({(top.st_dev, top.st_ino)}))


def _from_folder(folder: Path, picture: Path) -> Found:
    name = os.fsencode(picture.relative_to(folder)).decode("utf-8", "backslashreplace")
    try:
        str(picture).encode()
    except UnicodeEncodeError:
        return name, ImageError(f"{name}: its name is not UTF-8. Rename it.")
    try:
        text, metadata = _sidecar(picture)
    except DataError as error:
        return name, error
    return Document(name, text, picture, metadata)


def _sidecar(picture: Path) -> tuple[str, Metadata]:
    table, note = picture.with_suffix(".json"), picture.with_suffix(".txt")
    for path in (table, note):
        try:
            content = path.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}).") from None
        if path == note:
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


def _from_rows(path: Path) -> Iterator[Found]:
    for number, record in load_rows(path):
        rest: dict[str, Any] = {}
        value = record
        if isinstance(record, dict):
            rest = {
                k: v for k, v in record.items() if k not in ("id", "document", "text", "image")
            }
            value = record.get("document") or {
                k: record[k] for k in ("text", "image") if record.get(k)
            }
        name = (
            str(record["id"])
            if isinstance(record, dict) and record.get("id") is not None
            else str(number)
        )
        try:
            if isinstance(value, dict) and isinstance(value.get("image"), dict | bytes):
                yield _with_encoded(name, value, rest)
                continue
            found = parse_item(value, path, number, "document")
        except DataError as error:
            yield name, error
            continue
        if isinstance(found.image, list):
            yield name, DataError(f"{path}:{number}: several pictures. A document has one.")
            continue
        assert found.image is None or isinstance(found.image, Path)
        yield Document(name, found.text, found.image and found.image.resolve(), _metadata(rest))


def _data_set(name: str) -> Corpus:
    import datasets

    try:
        if name.startswith("hf:"):
            found: Any = datasets.load_dataset(name.removeprefix("hf:"), streaming=True)
        else:
            found = datasets.load_from_disk(name)
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded as a data set ({str(error).splitlines()[0]})."
        ) from error
    parts = found if isinstance(found, dict) else {"": found}
    columns = {n: c for part in parts.values() for n, c in (part.features or {}).items()}
    if not {"image", "text", "caption"} & columns.keys():
        raise DataError(
            f"{name}: has the columns {', '.join(columns)}; it needs image, text or caption."
        )
    sizes = [len(part) if hasattr(part, "__len__") else None for part in parts.values()]
    size = None if None in sizes else sum(s for s in sizes if s is not None)

    def documents() -> Iterator[Found]:
        for split, part in parts.items():
            if isinstance(columns.get("image"), datasets.Image):
                part = part.cast_column("image", datasets.Image(decode=False))
            for number, record in enumerate(part):
                key = record.pop("id", None)
                value = {
                    "image": record.pop("image", None),
                    "text": record.pop("text", None) or record.get("caption"),
                }
                own = str(key) if key is not None else f"{split}{'/' if split else ''}{number}"
                yield _with_encoded(own, value, record)

    return Corpus(name if name.startswith("hf:") else str(Path(name).resolve()), size, documents)


def _with_encoded(name: str, value: dict[str, Any], rest: dict[str, Any]) -> Found:
    image, text = value.get("image"), value.get("text") or ""
    content = image if isinstance(image, bytes) else (image or {}).get("bytes")
    if content is None and image and image.get("path"):
        return Document(name, text, Path(image["path"]), _metadata(rest))
    if content is None and not text:
        return name, DataError(f"document {name}: neither text nor a picture.")
    return Document(
        name, text, EncodedPicture(name, content) if content else None, _metadata(rest)
    )


def _metadata(record: dict[str, Any]) -> Metadata:
    """Numbers as floats, truth values and strings as they are, whatever else as JSON."""
    found: Metadata = {}
    for name, value in record.items():
        if value is None or isinstance(value, str | bool):
            found[name] = value
        else:
            found[name] = (
                float(value) if isinstance(value, int | float) else json.dumps(value, default=str)
            )
    return found
