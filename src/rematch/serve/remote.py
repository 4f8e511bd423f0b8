"""Fetching pictures from other machines, for a client and safely.

A picture is fetched only if whoever runs the server allowed its host, and never from an address
that is not on the public internet, whatever name or redirect leads there. The address that was
checked is the one that is connected to. A single deadline covers looking up the name, connecting,
TLS, headers, body and redirects, however slowly the other side drips.
"""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LookUpTimeout
from functools import cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from rematch.serve.limits import ClientError, Limits

_MAX_REDIRECTS = 3
_HOST = re.compile(r"[0-9a-z._-]{1,253}|[0-9a-f:.]{2,45}")
# What the other side or the libraries between can raise: HTTP, sockets and TLS, malformed values
_FETCH_ERRORS = (
    httpcore.ConnectionNotAvailable,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,
    ValueError,
    OverflowError,
)
# getaddrinfo has no time limit, so a fetch waits for it in another thread, but not for long
_LOOKUPS = ThreadPoolExecutor(8, "lookup")

# IANA's special-purpose registries, multicast and reserved space, and Azure's host agent. Python's
# is_global is not consulted: it differs between patch releases.
_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 "
        "172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 "
        "192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 "
        "240.0.0.0/4"
    ).split()
]
# All of IPv6 but this block is special: loopback, link- and site-local (fe80::/10, fec0::/10),
# private (fc00::/7), multicast, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), translated IPv4
# (::ffff:0:0:0/96), segment routing (5f00::/16), discard (100::/64)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
# and in it: protocol assignments with Teredo and ORCHID, documentation, 6to4, AS112
_SPECIAL_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20".split()
]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; one with a zone does not.

    >>> [is_public(a) for a in ("93.184.216.34", "10.0.0.1", "::ffff:127.0.0.1", "169.254.1.1")]
    [True, False, False, False]
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return ip in _GLOBAL_IPV6 and not any(ip in network for network in _SPECIAL_IPV6)
        ip = ip.ipv4_mapped
    return not any(ip in network for network in _SPECIAL_IPV4)


def fetch(url: str, limits: Limits, deadline: float) -> bytes:
    """Fetch a picture's file from another machine.

    Args:
        url: An http or https URL.
        limits: Limits of the server.
        deadline: When to give up, in the time of :func:`time.monotonic`.

    Raises:
        ClientError: If fetching is switched off, the host is not allowed, or it does not answer
            in time with a file within the limits.
    """
    if not limits.hosts:
        raise ClientError("this server does not fetch pictures by URL. Send a data URL.")
    for _ in range(_MAX_REDIRECTS + 1):
        target = _checked(url, limits.hosts)
        host = target.host.decode()
        try:
            with httpcore.ConnectionPool(
                ssl_context=_tls(), network_backend=_PublicOnly(deadline), retries=0
            ) as pool:
                headers = [("Host", urlsplit(url).netloc)]
                with pool.stream("GET", target, headers=headers) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, _location(response))
                        continue
                    if response.status != 200:
                        raise ClientError(f"{host} answers {response.status}, not a picture.")
                    return _read(response.iter_stream(), limits.remote_bytes)
        except ClientError:
            raise
        except httpcore.TimeoutException:
            raise ClientError(
                f"the picture takes too long to fetch from {host}; this server waits "
                f"{limits.remote_seconds:g} seconds for all pictures of a request. Send a data "
                "URL."
            ) from None
        except _FETCH_ERRORS:
            raise ClientError(f"the picture cannot be fetched from {host}.") from None
    raise ClientError("the picture's URL redirects too often.")


def _checked(url: str, hosts: tuple[str, ...]) -> httpcore.URL:
    """A URL that may be fetched, in parts, so that no second parser reads it differently.

    Raises:
        ClientError: If it may not.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:  # brackets without an IPv6 address, a port that is no port
        host, port = "", None
    if (
        not _HOST.fullmatch(host)
        or parts.scheme not in ("http", "https")
        or parts.username is not None
        or port == 0
    ):
        raise ClientError("a picture's URL must be http or https, without a user name.")
    if not _is_allowed(host, hosts):
        raise ClientError(f"pictures are not fetched from {host}. Send a data URL.")
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    return httpcore.URL(
        scheme=parts.scheme,
        host=host,
        port=port,
        target=quote(path or "/", safe="/?%:@!$&'()*+,;=~", errors="replace"),
    )


def _is_allowed(host: str, hosts: tuple[str, ...]) -> bool:
    return any(
        host == allowed.strip("[]") or (allowed.startswith(".") and host.endswith(allowed))
        for allowed in hosts
    )


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _location(response: httpcore.Response) -> str:
    """Where a redirect leads; empty if it does not say."""
    for name, value in response.headers:
        if name.lower() == b"location":
            return value.decode("latin-1")
    return ""


def _read(chunks: Iterable[bytes], max_bytes: int) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > max_bytes:
            raise ClientError(f"the fetched picture has more than {max_bytes:,} bytes.", 413)
    return bytes(content)


class _PublicOnly(httpcore.SyncBackend):
    """Connects to the address that was checked; a second look-up could give another one."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        look_up = _LOOKUPS.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            infos = look_up.result(_remaining(self.deadline))
        except LookUpTimeout:
            raise httpcore.ConnectTimeout from None
        finally:
            look_up.cancel()
        addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        if not addresses or not all(map(is_public, addresses)):
            raise ClientError(f"{host} is not on the public internet. Send a data URL.")
        for address in addresses:
            try:
                stream = super().connect_tcp(address, port, _remaining(self.deadline))
            except httpcore.ConnectError:  # this machine may have no route to IPv6, for one
                continue
            return _DeadlineStream(stream, self.deadline)
        raise httpcore.ConnectError


class _DeadlineStream(httpcore.NetworkStream):
    """A connection all of whose operations share a deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream = stream
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, _remaining(self.deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, _remaining(self.deadline))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        secure = self.stream.start_tls(ssl_context, server_hostname, _remaining(self.deadline))
        return _DeadlineStream(secure, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


def _remaining(deadline: float) -> float:
    """Seconds until the deadline.

    Raises:
        httpcore.ReadTimeout: If it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout
    return seconds
