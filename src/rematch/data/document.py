"""A document of a corpus, and what can be wrong with it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from rematch.data.clips import Clip
from rematch.data.images import EncodedPicture, read_picture
from rematch.data.inputs import check_unicode
from rematch.data.pages import PdfPage
from rematch.data.schema import Item
from rematch.errors import DataError, ImageError, RematchError, first_line
from rematch.prompts import DOCUMENT_INSTRUCTIONS, PAGE_INSTRUCTION, VIDEO_INSTRUCTION

Value = str | float | bool | None
Metadata = dict[str, Value]

LONGEST_TEXT, LONGEST_ID = 1_000_000, 4_096  # characters
MOST_FIELDS = 256  # of one document's metadata

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
            parts += file_state(path)
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


def file_state(path: Path) -> list[Any]:
    """What changes when a file does; it is not opened.

    Raises:
        ImageError: If it does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}). Check the file.") from None
    return [str(path), status.st_mtime_ns, status.st_size]


def unreadable(name: str, error: Exception) -> Unreadable:
    """A document that cannot be used because of whatever reading it has raised."""
    if not isinstance(error, RematchError):
        error = DataError(f"{name}: cannot be used ({first_line(error)}). Fix or remove it.")
    return Unreadable(_printable(name), error)


def _printable(name: str) -> str:
    """A name that can be written anywhere, and is not longer than ids may be."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= LONGEST_ID else name[: LONGEST_ID - 1] + "…"


def checked_document(
    name: str, text: Any, picture: Media | None, metadata: dict[str, Any]
) -> Document:
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
