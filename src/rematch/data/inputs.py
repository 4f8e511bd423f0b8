"""The kinds of input that a model takes: text, a picture, a path, or a dictionary of both."""

from pathlib import Path
from typing import Any

from PIL import Image

from rematch.data.images import EXTENSIONS, PictureFile, load_image
from rematch.errors import DataError, RematchError


def pictures_and_text(value: Any, row: int) -> tuple[list[Image.Image], str]:
    """Split an input into RGB pictures and text.

    Args:
        value: Text; a picture; a path (``Path``, or a string with the extension of a picture); or
            ``{"text": …, "image": …}`` with one or several pictures.
        row: Its row in the batch, for the error.

    Raises:
        RematchError: If the input is empty or of another kind.
        ImageError: If a picture cannot be read.

    >>> pictures_and_text("a dog", 0)
    ([], 'a dog')
    """
    if isinstance(value, Path | Image.Image | PictureFile):
        return [load_image(value)], ""
    text: Any = ""
    images: Any = []
    if isinstance(value, str):
        if value.lower().endswith(EXTENSIONS):
            return [load_image(value)], ""
        text = value
    elif isinstance(value, dict) and value.keys() <= {"text", "image"}:
        text, images = value.get("text") or "", value.get("image")
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
    else:
        kind = repr(value)
        if isinstance(value, dict):
            kind = f"a dictionary with the keys {sorted(map(str, value))}"
        raise RematchError(
            f"input {row}: {kind} is not a query or document. Give text, a picture, a path, or a "
            "dictionary with 'text' and/or 'image'."
        )
    if not isinstance(text, str) or not all(
        isinstance(image, str | Path | Image.Image | PictureFile) for image in images
    ):
        raise RematchError(
            f"input {row}: 'text' must be text, and 'image' a picture, a path, or a list of them."
        )
    check_unicode(text)
    if not text.strip() and not images:
        raise RematchError(
            f"input {row}: empty, so there is nothing to embed. Give it text or a picture."
        )
    return [load_image(image) for image in images], text


def check_unicode(text: str) -> None:
    """Refuse text with lone surrogates, which no tokenizer takes and no file can hold.

    Raises:
        DataError: If it has any.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate at character {error.start}, so it is not Unicode. "
            "Remove it."
        ) from None
