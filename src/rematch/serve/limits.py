"""What a client may send, and how a picture gets from a request to the model without harm.

A picture comes as a data URL. Its size is read off the header before anything is decoded. URLs of
other machines are fetched only if the server's owner allowed their host, and never from an address
of the private, loopback or link-local kind, whatever name or redirect leads there. Nothing a
client sends is ever opened as a file.
"""

import base64
import binascii
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
from PIL import Image, UnidentifiedImageError

from rematch.data.images import load_image
from rematch.errors import ImageError, RematchError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_REDIRECTS = 3


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
        body: Bytes of a request.
        inputs: Texts and pictures to embed, or documents to rerank.
        images: Pictures.
        pixels: Of one picture.
        text: Characters of one text.
        hosts: Whose pictures may be fetched; none by default. ``.example.org`` means every host
            below it.
        remote_bytes: Of a picture that is fetched.
        remote_seconds: For fetching one, redirects included.
    """

    body: int = 32 << 20
    inputs: int = 256
    images: int = 32
    pixels: int = 40_000_000
    text: int = 20_000
    hosts: tuple[str, ...] = ()
    remote_bytes: int = 16 << 20
    remote_seconds: float = 10.0


class ClientError(RematchError):
    """A request that cannot be served as it is; the message tells the client what to change.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def picture_from(url: str, limits: Limits) -> Image.Image:
    """A decoded picture from what a request holds.

    Args:
        url: ``data:image/…;base64,…``, or http(s) if the limits allow the host.
        limits: Of the server.

    Raises:
        ClientError: If it is neither, is no picture, or is too large.
    """
    if found := _DATA_URL.match(url):
        try:
            content = base64.b64decode(url[found.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ClientError("the picture's data URL is not valid base64.") from None
    elif url.lower().startswith(("http://", "https://")):
        content = fetch(url, limits)
    else:
        raise ClientError("a picture must be a data URL, such as data:image/png;base64,….")
    return decoded(content, limits)


def decoded(content: bytes, limits: Limits) -> Image.Image:
    """A picture's file, decoded if it is not too large.

    Raises:
        ClientError: If it is too large or no picture.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = opened.size
        if width * height > limits.pixels:
            raise ClientError(
                f"a picture of {width}×{height} pixels; this server takes {limits.pixels:,} at "
                "most.",
                413,
            )
        return load_image(opened)
    except ClientError:
        raise
    except Image.DecompressionBombError:
        raise ClientError(
            f"a picture of too many pixels; this server takes {limits.pixels:,} at most.", 413
        ) from None
    except (UnidentifiedImageError, ImageError, OSError, ValueError, SyntaxError, EOFError):
        raise ClientError(
            f"no picture that can be read. Send one of {', '.join(FORMATS)}, whole."
        ) from None


def fetch(url: str, limits: Limits) -> bytes:
    """A picture's file from another machine.

    Raises:
        ClientError: If that is off, the host is not allowed, or it does not answer in time with a
            small enough picture.
    """
    if not limits.hosts:
        raise ClientError("this server does not fetch pictures by URL. Send a data URL.")
    until = time.monotonic() + limits.remote_seconds
    for _ in range(_REDIRECTS + 1):
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or parts.username
            or parts.password
            or not parts.hostname
        ):
            raise ClientError("a picture's URL must be http or https, without a user name.")
        if not _is_allowed(parts.hostname, limits.hosts):
            raise ClientError(f"pictures are not fetched from {parts.hostname}. Send a data URL.")
        try:
            with httpcore.ConnectionPool(
                ssl_context=ssl.create_default_context(), network_backend=_PublicOnly(), retries=0
            ) as pool:
                left = max(0.1, until - time.monotonic())
                timeout = dict.fromkeys(("connect", "read", "write", "pool"), left)
                with pool.stream(
                    "GET", url, headers={"Host": parts.netloc}, extensions={"timeout": timeout}
                ) as answer:
                    if answer.status in (301, 302, 303, 307, 308):
                        places = [
                            value for key, value in answer.headers if key.lower() == b"location"
                        ]
                        url = urljoin(url, places[0].decode("latin-1") if places else "")
                        continue
                    if answer.status != 200:
                        raise ClientError(
                            f"{parts.hostname} answers {answer.status} instead of a picture."
                        )
                    return _bounded(answer.iter_stream(), limits.remote_bytes, until)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError):
            raise ClientError(f"the picture cannot be fetched from {parts.hostname}.") from None
    raise ClientError("the picture's URL redirects too often.")


def _bounded(chunks: Iterable[bytes], most: int, until: float) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > most:
            raise ClientError(f"the fetched picture has more than {most:,} bytes.", 413)
        if time.monotonic() > until:
            raise ClientError("the picture takes too long to fetch.")
    return bytes(content)


def _is_allowed(host: str, hosts: tuple[str, ...]) -> bool:
    host = host.lower().rstrip(".")
    return any(host == one or (one.startswith(".") and host.endswith(one)) for one in hosts)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, also if it hides an IPv4 address that
    does not.

    >>> [is_public(a) for a in ("93.184.216.34", "10.0.0.1", "::ffff:127.0.0.1", "169.254.1.1", "64:ff9b::7f00:1")]
    [True, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96") or int(ip) < 1 << 32:
            hidden.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(inner)) for inner in hidden if inner is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


class _PublicOnly(httpcore.SyncBackend):
    """Connects to the very address that was checked, so that a name cannot mean another one a
    moment later.
    """

    def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.NetworkStream:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        addresses = sorted(map(str, found))
        if not addresses or not all(map(is_public, addresses)):
            raise ClientError(f"{host} is not on the open internet. Send a data URL.")
        return super().connect_tcp(addresses[0], port, *args, **kwargs)
