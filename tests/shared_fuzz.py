"""Requests that no client of good will sends, the same for the same seed."""

import base64
import io
import json
import random
import socket
import struct
import zlib

from PIL import Image

PATHS = ("/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/search", "/v1/attention")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
RERANKS = (
    "raw:²", "raw:4294967296", "raw:-1", "feat:1e3", "raw:٣", "raw:", ":", "raw:0", "1,2",
    "maxsim:3,feat:2,raw:1", "nope:3", "raw:9" * 9, "\0", "raw:2\n", "raw:99999999999999999999",
)  # fmt: skip
URLS = (
    "http://[x", "http://a:99999/", "http://a:-1/", "http://a:b/", "https://", "http://%00/",
    "http://169.254.169.254/", "http://ä.test/", "http://a@b/", "file:///etc/passwd", "",
    "data:", "data:image/png;base64,", "data:image/png;base64,====", "//x", "HTTP://X/\r\n y",
)  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes = b"", extra: bytes = b"", depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG with any header, whose rows may be too few for it, and with any chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def whole_png(width: int = 40, height: int = 30, extra: bytes = b"") -> bytes:
    """A PNG that can be decoded."""
    return png(width, height, (b"\0" + b"\x80" * 3 * width) * height, extra)


def exif(rng: random.Random) -> bytes:
    """A PNG's eXIf chunk that begins like one."""
    starts = (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"Exif\0\0", b"II*\0\xff\xff\xff\x7f")
    return chunk(b"eXIf", rng.choice(starts) + rng.randbytes(rng.randrange(60)))


def file_of(kind: str, width: int = 40, height: int = 30) -> bytes:
    """A small picture in a format."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


_WHOLE = {kind: file_of(kind) for kind in FORMATS}


def picture(rng: random.Random) -> bytes:
    """A picture's file, whole or spoiled."""
    way = rng.randrange(6)
    if way == 0:
        return whole_png(extra=exif(rng))
    if way == 1:  # a header of any size, kind of pixels and compression
        size = rng.choice((0, 1, 27, 28, 1000, 5001, 6000, 65_535, 2**31 - 1, 2**32 - 1))
        other = rng.choice((1, 40, 4999, 2**31))
        return png(size, other, depth=rng.choice((1, 2, 8, 16, 3)), colour=rng.randrange(8))
    if way == 2:
        text = rng.choice((b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"PLTE", b"gAMA", b"acTL"))
        data = rng.choice((b"", b"k\0\0" + zlib.compress(bytes(2_000_000)), rng.randbytes(30)))
        return whole_png(extra=chunk(text, data))
    content = bytearray(_WHOLE[rng.choice(FORMATS)])
    if way == 3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice((1, 3, 30))):
        content[rng.randrange(len(content) if way == 4 else 80)] = rng.randrange(256)
    return bytes(content)


def data_url(content: bytes) -> str:
    """A picture's file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value."""
    numbers = (
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        10**400,
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
    )
    texts = ("", " ", "a dog", "\ud800", "<|end|>", "\0", "ﷺ" * 50, "é" * 20_001, "'--", "null")
    way = rng.randrange(9 if depth < 4 else 5)
    if way < 2:
        return rng.choice(texts)
    if way == 2:
        return rng.choice(numbers)
    if way == 3:
        return rng.choice((None, True, False))
    if way == 4:
        return rng.choice((data_url(picture(rng)), *URLS))
    if way < 7:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))]
    return {rng.choice(_NAMES): value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}


_NAMES = (
    "input", "messages", "content", "type", "text", "image", "image_url", "url", "query",
    "documents", "top_n", "top", "mode", "like", "filter", "rerank", "id", "dimensions",
    "task", "model", "é",
)  # fmt: skip


def body(rng: random.Random, path: str) -> bytes:
    """A body for a path: nearly valid, or any JSON, or spoiled JSON, or far too many values."""
    image = {"image": data_url(picture(rng)) if rng.random() < 0.7 else rng.choice(URLS)}
    part = {"type": "image_url", "image_url": {"url": image["image"]}}
    usual: dict[str, dict[str, object]] = {
        "/v1/embeddings": {"messages": [{"content": [part, {"type": "text", "text": "a"}]}]},
        "/v1/rerank": {"query": "a", "documents": ["b", image]},
        "/v2/rerank": {"query": image, "documents": ["b"]},
        "/v1/search": {"text": "a", "rerank": rng.choice(("", "raw:2", *RERANKS))} | image,
        "/v1/attention": {"id": rng.choice(("red.png", "\0", "../../etc/passwd", "'"))},
    }
    content = dict(usual[path])
    if path == "/v1/search":
        if rng.random() < 0.5:
            del content["image"]
        if rng.random() < 0.5:
            content["mode"] = rng.choice(("text", "hybrid", "vector", "auto", "x"))
        if rng.random() < 0.3:
            content = {"like": rng.choice(("red.png", "\0", "'", "x" * 5000))}
    way = rng.randrange(5)
    if way == 1:
        content[rng.choice((*content, *_NAMES))] = value(rng)
    elif way == 2:
        return json.dumps(value(rng)).encode()
    elif way == 3:
        text = bytearray(json.dumps(content).encode())
        for _ in range(rng.choice((1, 4))):
            text[rng.randrange(len(text))] = rng.choice(b'{}[]",:\\\xff\0 01')
        return bytes(text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text)
    elif way == 4:
        name = rng.choice(list(content)).encode()
        piece = rng.choice((b"1,", b'"",', b"[],", b'{"a":1},', b"[", b'"\\"",', b'{"a":'))
        return b'{"%s":[' % name + piece * rng.choice((3, 300, 30_000)) + b"1]}"
    return json.dumps(content).encode()


_TARGETS = (
    "/", "*", "//", "/health", "/%00", "/v1/documents/%2e%2e/picture", "x:80", "/page/%2e%2e",
    "/v1/documents/red.png/file", "/v1/documents/%23page=1/file", "/v1/facets",
    "/v1/documents/%00/picture?edge=1e9", "/v1/documents/red.png/picture?edge=16", "/\x80",
)  # fmt: skip


def raw_request(rng: random.Random) -> bytes:
    """What a client writes on its socket: half of a request, or a spoiled or an ambiguous one."""
    content = body(rng, path := rng.choice(PATHS))[:5_000]
    method = rng.choice(
        ("POST", "POST", "GET", "GET", "PUT", "OPTIONS", "CONNECT", "\0", "x" * 300)
    )
    target = rng.choice((path, path, path, *_TARGETS))
    kind = rng.choice(("application/json", "application/json", "text/html", "a/xml+json;", ""))
    head = [f"{method} {target} HTTP/1.{rng.choice('01119')}", "Host: x", f"Content-Type: {kind}"]
    lengths = (
        [f"Content-Length: {len(content)}"],
        [f"Content-Length: {len(content)}", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Content-Length: -1"],
        ["Content-Length: " + "9" * rng.choice((15, 300))],
        [f"Content-Length: {len(content)}", "Content-Length: 1"],
        [f"Content-Length: {len(content) + 10}"],
        ["Content-Length: +1", "Upgrade: websocket", "Connection: upgrade"],
        ["Expect: 100-continue", f"Content-Length: {len(content)}"],
        [f"X: {'y' * 20_000}"],
        ["no colon"],
    )
    head += lengths[0] if rng.random() < 0.3 else rng.choice(lengths)
    if any("chunked" in line for line in head) and rng.random() < 0.8:
        content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    message = "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + content
    if rng.random() < 0.3:
        message = bytearray(message)
        for _ in range(3):
            message[rng.randrange(min(200, len(message)))] = rng.randrange(256)
    return bytes(message)


def converse(address: tuple[str, int], message: bytes, seconds: float) -> bytes:
    """What a server answers first; nothing if it waits for more or hangs up."""
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            connection.sendall(message)
            return connection.recv(65_536)
        except (ConnectionError, TimeoutError):
            return b""
