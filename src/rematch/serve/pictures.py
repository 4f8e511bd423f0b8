"""How the pictures of a request get to the model safely.

A picture comes as a data URL, or by URL if the server allows its host
(:mod:`rematch.serve.remote`); no string of a client is ever opened as a file. What decoding costs
is read off the headers of all pictures before any of them is decoded.
"""

import base64
import binascii
import io
import re
import time
import weakref
from collections.abc import Sequence
from threading import RLock

from PIL import Image

from rematch.data.images import FORMATS, load_image
from rematch.errors import ImageError
from rematch.serve.limits import ClientError, Limits
from rematch.serve.remote import fetch

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_SCAN = b"\xff\xda"  # the marker at the start of each pass over a JPEG


class HeldPixels:
    """Pixels of all pictures in memory that came with requests.

    They are taken before a picture is decoded, and given back when the last reference to it goes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = RLock()  # the garbage collector may give back while pixels are taken

    def take(self, pixels: int, limit: int) -> None:
        """Take pixels; all of them are given for a request that comes alone.

        Raises:
            ClientError: 429 if there would be more than ``limit``.
        """
        with self._lock:
            if self.count and self.count + pixels > limit:
                raise ClientError("too many pictures are being read. Try again in a second.", 429)
            self.count += pixels

    def give_back(self, pixels: int) -> None:
        """Give pixels back."""
        with self._lock:
            self.count -= pixels


HELD = HeldPixels()


def pictures_from(urls: Sequence[str], limits: Limits) -> list[Image.Image]:
    """Decode the pictures of a request.

    Args:
        urls: ``data:image/…;base64,…``, or http and https URLs if the limits allow their hosts.
        limits: Limits of the server.

    Raises:
        ClientError: If there are too many, or one of them has another form or is not a picture
            within the limits.
    """
    if len(urls) > limits.images:
        raise ClientError(
            f"{len(urls)} pictures; this server takes {limits.images} in a request.", 413
        )
    deadline = time.monotonic() + limits.remote_seconds
    pictures = [open_picture(_content(url, limits, deadline), limits) for url in urls]
    pixels = [picture.width * picture.height for picture in pictures]
    if (total := sum(pixels)) > limits.request_pixels:
        raise ClientError(
            f"pictures of {total:,} pixels together; this server takes {limits.request_pixels:,} "
            "in a request. Scale them down.",
            413,
        )
    HELD.take(total, limits.held_pixels)
    decoded = []
    try:
        for picture in pictures:
            decoded.append(load_image(picture))
            weakref.finalize(decoded[-1], HELD.give_back, pixels.pop(0)).atexit = False
    except ImageError:
        raise _unreadable() from None
    finally:
        HELD.give_back(sum(pixels))
    return decoded


def _content(url: str, limits: Limits, deadline: float) -> bytes:
    """A picture's file."""
    if match := _DATA_URL.match(url):
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ClientError("the picture's data URL is not valid base64.") from None
    if url[:8].lower().startswith(("http://", "https://")):
        return fetch(url, limits, deadline)
    raise ClientError("a picture must be a data URL, such as data:image/png;base64,….")


def open_picture(content: bytes, limits: Limits) -> Image.Image:
    """Read the header of a picture's file; nothing is decoded.

    Raises:
        ClientError: If decoding would cost too much, or the file is not a picture.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ClientError(
            f"a picture with too many pixels; this server takes at most {limits.pixels:,}.", 413
        ) from None
    except Exception:  # Pillow's plugins raise whatever parsing hits on
        raise _unreadable() from None
    if picture.width * picture.height > limits.pixels:
        raise ClientError(
            f"a picture of {picture.width}×{picture.height} pixels; this server takes at most "
            f"{limits.pixels:,}. Scale it down.",
            413,
        )
    if picture.format in ("JPEG", "MPO") and content.count(_SCAN) > limits.scans:
        raise ClientError(
            f"a JPEG of more than {limits.scans} scans. Save it as a baseline JPEG.", 413
        )
    return picture


def _unreadable() -> ClientError:
    return ClientError(
        "not a readable picture. Send a complete file in one of these formats: "
        f"{', '.join(FORMATS)}."
    )
