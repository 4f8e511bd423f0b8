"""What may be embedded: text, a picture, a path, or a dictionary of both."""

from pathlib import Path
from typing import Any

from PIL import Image

from rematch.data.images import EXTENSIONS, File, load_image
from rematch.errors import RematchError


def as_parts(value: Any, row: int) -> tuple[list[Image.Image], str]:
    """An input as (RGB pictures, text).

    Args:
        value: Text; a picture; a path (``Path``, or a string that ends like a picture's name); or
            ``{"text": …, "image": …}`` with one or several pictures.
        row: Where it stands in the batch, for the error.

    Raises:
        RematchError: If it is none of these, or empty.

    >>> as_parts("a dog", 0)
    ([], 'a dog')
    """
    if isinstance(value, Path | Image.Image | File):
        return [load_image(value)], ""
    if isinstance(value, str):
        if value.lower().endswith(EXTENSIONS):
            return [load_image(value)], ""
        text, images = value, []
    elif isinstance(value, dict) and value.keys() <= {"text", "image"}:
        text, found = value.get("text") or "", value.get("image")
        images = (
            list(found)
            if isinstance(found, list | tuple)
            else [found]
            if found is not None
            else []
        )
    else:
        seen = (
            f"a dictionary with the keys {sorted(map(str, value))}"
            if isinstance(value, dict)
            else repr(value)
        )
        raise RematchError(
            f"input {row}: {seen} is no query or document. Give text, a picture, a path, or a "
            "dictionary with 'text' and/or 'image'."
        )
    if not isinstance(text, str) or not all(
        isinstance(image, str | Path | Image.Image | File) for image in images
    ):
        raise RematchError(
            f"input {row}: 'text' must be text, and 'image' a picture, a path, or a list of them."
        )
    if not text.strip() and not images:
        raise RematchError(
            f"input {row}: empty, so there is nothing to embed. Give it text or a picture."
        )
    return [load_image(image) for image in images], text
