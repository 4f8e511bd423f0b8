"""What a client may send, and how a picture gets from a request to the model safely.

A picture comes as a data URL. Its size is read off its header before anything is decoded. A
picture is fetched from another machine only if whoever runs the server allowed that host, and
never from a private, loopback or link-local address, whatever name or redirect leads there. No
string of a client is ever opened as a file.
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
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore
from PIL import Image, UnidentifiedImageError

from rematch.data.images import load_image
from rematch.errors import ImageError, RematchError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_MAX_REDIRECTS = 3


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body: Bytes of the body.
        inputs: Number of inputs to embed, or of documents to rerank.
        images: Number of pictures.
        pixels: Pixels of a picture.
        text: Characters of a text.
        hosts: Hosts from which pictures may be fetched; none by default. ``.example.org`` stands
            for every host below it.
        remote_bytes: Bytes of a fetched picture.
        remote_seconds: Seconds for fetching a picture, redirects included.
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
        status: HTTP status of the response.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def picture_from(url: str, limits: Limits) -> Image.Image:
    """Decode the picture that a request gives.

    Args:
        url: ``data:image/…;base64,…``, or an http or https URL if the limits allow its host.
        limits: Limits of the server.

    Raises:
        ClientError: If the URL has another form, or does not hold a picture within the limits.
    """
    if match := _DATA_URL.match(url):
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise ClientError("the picture's data URL is not valid base64.") from None
    elif url.lower().startswith(("http://", "https://")):
        content = fetch(url, limits)
    else:
        raise ClientError("a picture must be a data URL, such as data:image/png;base64,….")
    return decode(content, limits)


def decode(content: bytes, limits: Limits) -> Image.Image:
    """Decode a picture's file.

    Raises:
        ClientError: If the picture has too many pixels, or the file is not a readable picture.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = picture.size
        if width * height > limits.pixels:
            raise ClientError(
                f"a picture of {width}×{height} pixels; this server takes at most "
                f"{limits.pixels:,}.",
                413,
            )
        return load_image(picture)
    except ClientError:
        raise
    except Image.DecompressionBombError:
        raise ClientError(
            f"a picture with too many pixels; this server takes at most {limits.pixels:,}.", 413
        ) from None
    except (UnidentifiedImageError, ImageError, OSError, ValueError, SyntaxError, EOFError):
        raise ClientError(
            f"not a readable picture. Send a complete file in one of these formats: "
            f"{', '.join(FORMATS)}."
        ) from None


def fetch(url: str, limits: Limits) -> bytes:
    """Fetch a picture's file from another machine.

    Raises:
        ClientError: If fetching is switched off, the host is not allowed, or it does not answer
            in time with a file within the limits.
    """
    if not limits.hosts:
        raise ClientError("this server does not fetch pictures by URL. Send a data URL.")
    deadline = time.monotonic() + limits.remote_seconds
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _checked(url, limits.hosts)
        try:
            with httpcore.ConnectionPool(
                ssl_context=ssl.create_default_context(), network_backend=_PublicOnly(), retries=0
            ) as pool:
                seconds = max(0.1, deadline - time.monotonic())
                timeout = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
                with pool.stream(
                    "GET", url, headers={"Host": parts.netloc}, extensions={"timeout": timeout}
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, _location(response))
                        continue
                    if response.status != 200:
                        raise ClientError(
                            f"{parts.hostname} answers {response.status} instead of a picture."
                        )
                    return _read(response.iter_stream(), limits.remote_bytes, deadline)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError):
            raise ClientError(f"the picture cannot be fetched from {parts.hostname}.") from None
    raise ClientError("the picture's URL redirects too often.")


def _checked(url: str, hosts: tuple[str, ...]) -> SplitResult:
    """The parts of a URL that may be fetched.

    Raises:
        ClientError: If it may not.
    """
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or parts.username
        or parts.password
        or not parts.hostname
    ):
        raise ClientError("a picture's URL must be http or https, without a user name.")
    if not _is_allowed(parts.hostname, hosts):
        raise ClientError(f"pictures are not fetched from {parts.hostname}. Send a data URL.")
    return parts


def _location(response: httpcore.Response) -> str:
    """Where a redirect leads; empty if it does not say."""
    for name, value in response.headers:
        if name.lower() == b"location":
            return value.decode("latin-1")
    return ""


def _read(chunks: Iterable[bytes], max_bytes: int, deadline: float) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > max_bytes:
            raise ClientError(f"the fetched picture has more than {max_bytes:,} bytes.", 413)
        if time.monotonic() > deadline:
            raise ClientError("the picture takes too long to fetch.")
    return bytes(content)


def _is_allowed(host: str, hosts: tuple[str, ...]) -> bool:
    host = host.lower().rstrip(".")
    return any(
        host == allowed or (allowed.startswith(".") and host.endswith(allowed))
        for allowed in hosts
    )


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address embedded in it, belongs to the public internet.

    >>> [is_public(a) for a in ("93.184.216.34", "10.0.0.1", "::ffff:127.0.0.1", "169.254.1.1")]
    [True, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96") or int(ip) < 1 << 32:
            embedded.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(inner)) for inner in embedded if inner is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


class _PublicOnly(httpcore.SyncBackend):
    """Connects to the address that was checked; a second look-up could give another one."""

    def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.NetworkStream:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = sorted({str(info[4][0]) for info in infos})
        if not addresses or not all(map(is_public, addresses)):
            raise ClientError(f"{host} is not on the public internet. Send a data URL.")
        return super().connect_tcp(addresses[0], port, *args, **kwargs)
