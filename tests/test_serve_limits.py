"""What the server refuses: missing keys, large requests, broken pictures, private addresses."""

import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from shared_server import NOISE, card_engine, data_url, file_of

from rematch.serve import remote
from rematch.serve.app import create_app
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError, Limits
from rematch.serve.pictures import pictures_from
from rematch.serve.remote import fetch, is_public

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def test_keys_and_headers(engine):
    with TestClient(create_app(engine, keys=["first", "second"])) as guarded:
        for path in ("/v1/models", "/metrics", "/v1/examples", "/v1/documents/red.png/picture"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic first"},
            ):
                response = guarded.get(path, headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
            assert guarded.get(path, headers={"Authorization": "Bearer second"}).status_code == 200
        response = guarded.get("/health")
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "access-control-allow-origin" not in response.headers
        assert guarded.get("/").status_code == 200


def test_limits(engine):
    limits = Limits(body=20_000, inputs=3, images=1, pixels=10_000, text=50)
    with TestClient(create_app(engine, limits)) as tight:
        big = data_url(file_of(Image.new("RGB", (200, 100))))
        parts = [{"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}}] * 2
        for path, body, status, message in (
            ("embeddings", {"input": ["a"] * 4}, 413, "4 inputs; this server takes 3"),
            ("embeddings", {"input": "a" * 51}, 413, "a text of 51 characters"),
            ("embeddings", {"input": "a", "dimensions": 64}, 400, "the vectors have 32"),
            ("embeddings", {"input": ""}, 400, "an empty text"),
            ("embeddings", {}, 400, "send either input or messages"),
            (
                "embeddings",
                {"input": "a", "input_type": "image"},
                400,
                "input_type 'image' is unknown",
            ),
            ("embeddings", {"messages": [{"content": parts}]}, 413, "2 pictures"),
            ("rerank", {"query": "a", "documents": ["b"] * 4}, 413, "4 documents"),
            ("rerank", {"query": "a", "documents": []}, 422, "documents"),
            ("rerank", {"query": {}, "documents": ["a"]}, 400, "an empty query or document"),
            ("search", {"image": big}, 413, "a picture of 200×100 pixels"),
            ("search", {"text": "a", "top": 1000}, 422, "top"),
            ("search", {"text": "a" * 30_000}, 413, "a body of more than 20,000 bytes"),
        ):
            response = tight.post(f"/v1/{path}", json=body)
            assert response.status_code == status, response.text
            assert message in response.json()["error"]["message"]
        chunks = (b'{"text": "' + b"a" * 5_000 for _ in range(10))
        assert tight.post("/v1/search", content=chunks).status_code == 413, (
            "without a content-length"
        )
        assert tight.post("/v1/search", content=b"{").status_code == 422
        assert tight.get("/nowhere").json()["error"]["code"] == 404


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_broken_pictures_are_refused_and_the_server_lives(client):
    whole = file_of(NOISE)
    jpeg = file_of(NOISE, "JPEG")
    rng = np.random.default_rng(0)
    bad = {
        "empty": b"",
        "text": b"GIF89a is how it begins",
        "truncated png": whole[: len(whole) // 2],
        "truncated jpeg": jpeg[:200],
        "bomb": png_of(60_000, 60_000),
        "bomb within Pillow's bounds": png_of(9_000, 9_000),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "html in a picture's clothes": b"\x89PNG\r\n\x1a\n<script>alert(1)</script>",
    }
    for i in range(60):
        spoiled = bytearray(whole if i % 2 else jpeg)
        for position in rng.integers(0, len(spoiled), 8):
            spoiled[position] = rng.integers(256)
        bad[f"spoiled {i}"] = bytes(spoiled)
    for name, content in bad.items():
        response = client.post("/v1/search", json={"image": data_url(content)})
        assert response.status_code in (
            (200, 400, 413) if name.startswith("spoiled") else (400, 413)
        ), name
        if response.status_code != 200:
            assert "Traceback" not in response.text
            assert str(ROOT) not in response.text
    # a complete picture with something behind it is a picture
    polyglot = whole + b"PK\x03\x04" + b"<script>"
    assert client.post("/v1/search", json={"image": data_url(polyglot)}).status_code == 200
    for url in (
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,***",
        "ftp://x/y",
    ):
        assert client.post("/v1/search", json={"image": url}).status_code == 400
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 "
    "255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 "
    "::127.0.0.1 64:ff9b::a00:1 2002:7f00:1:: 2001:0:53aa:64c:0:fbff:80ff:fffe".split(),
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_public_addresses():
    assert all(
        is_public(a)
        for a in (
            "8.8.8.8",
            "93.184.216.34",
            "2606:2800:220:1:248:1893:25c8:1946",
            "::ffff:8.8.8.8",
        )
    )


def test_pictures_by_url(monkeypatch):
    """Off by default; when on, only allowed hosts at public addresses, redirects included, bounded
    in size and time.
    """
    with pytest.raises(ClientError, match="does not fetch pictures by URL"):
        pictures_from(["http://example.test/a.png"], Limits())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            routes = {
                "/loop": "/loop",
                "/inside": "http://inside.test/a.png",
                "/file": "file:///etc/passwd",
                "/other": "http://other.test/",
                "/metadata": "http://169.254.169.254/latest",
            }
            if self.path in routes:
                self.send_response(302)
                self.send_header("Location", routes[self.path])
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    time.sleep(0.05)
                    try:
                        self.wfile.write(b"x")
                    except OSError:
                        return
            else:
                self.send_response(200 if self.path == "/a.png" else 404)
                self.end_headers()
                self.wfile.write(file_of(NOISE))

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    names = {"good.test": "127.0.0.1", "inside.test": "10.0.0.5", "private.test": "192.168.0.1"}
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        return real(names.get(host, host), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    bounds = Limits(
        hosts=(
            "good.test",
            "inside.test",
            "private.test",
            "169.254.169.254",
            "127.0.0.1",
            "[::1]",
            "::1",
        ),
        remote_seconds=2.0,
    )
    base = f"http://good.test:{port}"
    with pytest.raises(ClientError, match="not on the public internet"):
        fetch(f"{base}/a.png", bounds, time.monotonic() + 2)  # the name leads to loopback
    monkeypatch.setattr(
        remote, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )
    assert pictures_from([f"{base}/a.png"], bounds)[0].size == NOISE.size
    for url, message in (
        (f"{base}/inside", "inside.test is not on the public internet"),
        (f"{base}/metadata", "169.254.169.254 is not on the public internet"),
        (f"{base}/file", "must be http or https"),
        (f"{base}/other", "not fetched from other.test"),
        (f"{base}/loop", "redirects too often"),
        (f"{base}/missing", "answers 404"),
        (f"{base}/slow", "takes too long"),
        ("http://private.test/a.png", "not on the public internet"),
        (f"http://user:word@good.test:{port}/a.png", "without a user name"),
        (f"http://[::1]:{port}/a.png", "not on the public internet"),
    ):
        with pytest.raises(ClientError, match=message.replace("[", r"\[")):
            fetch(url, bounds, time.monotonic() + 2)
    with pytest.raises(ClientError, match="has more than 100 bytes"):
        fetch(
            f"{base}/a.png",
            Limits(hosts=("good.test",), remote_bytes=100),
            time.monotonic() + 2,
        )
    server.shutdown()
    server.server_close()
