"""What is known of an input before it is encoded: its content key, and how large it is.

Pictures are inspected without being decoded: their files are hashed, and their size is read from
the header.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from xxhash import xxh3_128

from rematch.data.images import (
    EXTENSIONS,
    FORMATS,
    CheckedPicture,
    PictureFile,
    PictureSource,
    picture_error,
    read_picture,
)
from rematch.data.inputs import check_unicode
from rematch.errors import ImageError

_MAX_INPUTS = 256  # in a batch, however short they are


class PictureInfo(NamedTuple):
    """What a picture's file tells without being decoded.

    Attributes:
        digest: Digest of the file's bytes; of the pixels, if the picture is already decoded.
        pixels: Its width times its height.
    """

    digest: bytes
    pixels: int


@dataclass(frozen=True)
class InputContent:
    """Text and pictures of an input.

    Attributes:
        text: Its text; empty if there is none.
        pictures: Its pictures, in order.
    """

    text: str
    pictures: list[PictureInfo]

    def key(self, task: str = "") -> bytes:
        """The input's content key, 16 bytes.

        Args:
            task: If set, the key also tells apart what the input is encoded as.
        """
        parts = [self.text.encode(), *(picture.digest for picture in self.pictures)]
        if task:
            parts.insert(0, task.encode())
        return xxh3_128(
            b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        ).digest()


@dataclass(frozen=True)
class MeasuredInput:
    """An input's key and length, which decide what batch it goes to.

    Attributes:
        key: Its content key, with the task.
        tokens: Its length in tokens, estimated if it has pictures.
        is_text: Whether it has no pictures.
    """

    key: bytes
    tokens: int
    is_text: bool = False


def content_key(value: Any) -> bytes:
    """A digest that inputs share if they have the same text and the same pictures.

    Pictures in files count by their bytes, wherever the files are.

    Args:
        value: An input, as for ``encode``.

    Raises:
        ImageError: If a picture cannot be read.

    >>> content_key("a dog") == content_key({"text": "a dog"})
    True
    >>> content_key("a dog").hex()
    'dae947d1be2f1b7bfe37f9c26abcc1ec'
    """
    return inspect_input(value).key()


def inspect_input(value: Any) -> InputContent:
    """Text and pictures of an input; picture files are read but not decoded.

    Raises:
        ImageError: If a picture cannot be read.
        DataError: If the text is not Unicode.
    """
    if isinstance(value, dict):
        text, pictures = value.get("text") or "", value.get("image")
    elif isinstance(value, str) and not value.lower().endswith(EXTENSIONS):
        text, pictures = value, None
    else:
        text, pictures = "", value
    check_unicode(text)
    if pictures is None:
        pictures = []
    elif not isinstance(pictures, list | tuple):
        pictures = [pictures]
    return InputContent(text, [inspect_picture(picture) for picture in pictures])


def inspect_picture(source: PictureSource | str) -> PictureInfo:
    """Digest and number of pixels of a picture; its file is read but not decoded.

    Raises:
        ImageError: If it cannot be read.
    """
    if isinstance(source, CheckedPicture):
        return PictureInfo(source.digest, source.pixels)
    if isinstance(source, Image.Image):
        header = f"{source.mode}{source.size}".encode()
        digest = xxh3_128(header + source.tobytes()).digest()
        return PictureInfo(digest, source.width * source.height)
    file = source if isinstance(source, PictureFile) else Path(source)
    try:
        content = read_picture(file) if isinstance(file, Path) else file.read_bytes()
        width, height = Image.open(io.BytesIO(content), formats=FORMATS).size
        if not width or not height:
            raise ImageError(f"{file}: has no pixels. Replace the file.")
    except Exception as error:
        raise picture_error(str(file), error) from None
    return PictureInfo(xxh3_128(content).digest(), width * height)


def batches_by_length(inputs: Iterable[MeasuredInput], batch_tokens: int) -> list[list[bytes]]:
    """Put inputs of similar length into the same batch, longest first.

    Args:
        inputs: The inputs.
        batch_tokens: Tokens of a batch after padding; only a single longer input exceeds them.

    Returns:
        The keys of each batch.

    >>> inputs = [MeasuredInput(bytes([n]), n) for n in (1, 8, 5, 4, 3)]
    >>> [[key[0] for key in batch] for batch in batches_by_length(inputs, 10)]
    [[8], [5, 4], [3, 1]]
    """
    batches: list[list[bytes]] = []
    longest = 0
    for measured in sorted(inputs, key=lambda m: (-m.tokens, m.key)):
        size = len(batches[-1]) + 1 if batches else 0
        if batches and size * longest <= batch_tokens and size <= _MAX_INPUTS:
            batches[-1].append(measured.key)
        else:
            batches.append([measured.key])
            longest = measured.tokens
    return batches
