"""The HTTP API: what other clients speak, what is refused, what happens under load."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from rematch import ReMatch, cli
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.search.build import build
from rematch.search.index import Index
from rematch.serve import limits as guarding
from rematch.serve.app import create_app
from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError, Limits, fetch, is_public, picture_from

ROOT = Path(__file__).parents[1]


def file_of(picture: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


COLOURS = ("red", "green", "blue", "white", "black", "orange")
NOISE = Image.effect_noise((60, 40), 80).convert("RGB")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (48, 40), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.json").write_text(
            json.dumps({"text": f"a {colour} card", "year": 2000 + i})
        )
    return folder


@pytest.fixture(scope="module")
def engine(saved_model, corpus, tmp_path_factory) -> Engine:
    model = ReMatch(str(saved_model))
    path = tmp_path_factory.mktemp("served") / "cards.idx"
    index = Index.create(path, model, name=str(saved_model), tokens=True)
    build(index, open_corpus(corpus), Encoder(model, workers=0))
    return Engine(str(path))


@pytest.fixture(scope="module")
def client(engine) -> TestClient:
    with TestClient(create_app(engine), raise_server_exceptions=False) as found:
        yield found


@contextmanager
def running(engine: Engine, **settings):
    """The address of a real server in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(engine, **settings), port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.time() + 30
    while not server.started and time.time() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


# ---- what is computed ---------------------------------------------------------------------------


def test_embeddings_are_those_of_encode(client, engine):
    texts = ["a dog", "a longer text about a dog", "x"]
    for task, encode in (
        ("query", engine.model.encode_query),
        ("document", engine.model.encode_document),
    ):
        expected = encode([{"text": t} for t in texts], show_progress_bar=False)
        for settings in ({"task": task}, {"input_type": task}, {"input_type": f"search_{task}"}):
            found = client.post("/v1/embeddings", json={"input": texts} | settings).json()
            assert np.allclose([d["embedding"] for d in found["data"]], expected, atol=1e-5)
        assert [d["index"] for d in found["data"]] == [0, 1, 2]
        assert found["usage"]["prompt_tokens"] > 3
    packed = client.post(
        "/v1/embeddings", json={"input": texts, "encoding_format": "base64"}
    ).json()
    vectors = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in packed["data"]]
    assert np.allclose(vectors, expected, atol=1e-5)
    short = client.post("/v1/embeddings", json={"input": "a dog", "dimensions": 8}).json()["data"][
        0
    ]["embedding"]
    assert np.allclose(short, expected[0][:8] / np.linalg.norm(expected[0][:8]), atol=1e-5)


def test_messages_with_pictures_are_embedded(client, engine):
    content = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}},
    ]
    body = {"messages": [{"role": "user", "content": content}], "task": "query"}
    found = client.post("/v1/embeddings", json=body).json()
    assert "data" in found, found
    expected = engine.model.encode_query(
        [{"text": "what is this?", "image": NOISE}], show_progress_bar=False
    )[0]
    assert np.allclose(found["data"][0]["embedding"], expected, atol=1e-5)


def test_a_text_that_looks_like_a_path_is_text(client, corpus, engine):
    path = str(corpus / "red.png")
    found = client.post("/v1/embeddings", json={"input": path}).json()["data"][0]["embedding"]
    assert np.allclose(
        found,
        engine.model.encode_document([{"text": path}], show_progress_bar=False)[0],
        atol=1e-5,
    )
    answer = client.post("/v1/search", json={"image": path})
    assert answer.status_code == 400
    assert "data URL" in answer.json()["error"]["message"]


def test_a_control_token_in_a_text_is_a_client_error(client):
    said = "its text holds <|end|>, which the model reads as a control token"
    for path, body in {
        "/v1/embeddings": {"input": ["a dog", "a <|end|> dog"]},
        "/v1/search": {"text": "a <|end|> dog"},
        "/v1/rerank": {"query": "a card", "documents": ["a red card", "a <|end|> card"]},
    }.items():
        answer = client.post(path, json=body)
        assert answer.status_code == 400, path
        assert said in answer.json()["error"]["message"], path


def test_rerank_is_match(client, engine):
    documents = ["a red card", {"text": "a blue card"}, {"image": data_url(file_of(NOISE))}]
    given = [{"text": "a red card"}, {"text": "a blue card"}, {"image": NOISE}]
    query = {"text": "a card"}
    expected = engine.model.match([query] * 3, given)
    body = {"query": "a card", "documents": documents, "return_documents": True}
    for path in ("/v1/rerank", "/v2/rerank"):
        results = client.post(path, json=body).json()["results"]
        assert [r["index"] for r in results] == np.argsort(-expected, kind="stable").tolist()
        assert [r["relevance_score"] for r in results] == pytest.approx(
            sorted(expected.tolist(), reverse=True), abs=1e-5
        )
    assert {r["document"]["text"] for r in results} == {"a red card", "a blue card", ""}
    assert len(client.post("/v1/rerank", json=body | {"top_n": 1}).json()["results"]) == 1


def test_search_is_the_indexs(client, engine):
    body = {
        "text": "a red card",
        "image": data_url(file_of(NOISE)),
        "top": 4,
        "rerank": "feat:4,raw:2",
    }
    found = client.post("/v1/search", json=body).json()["hits"]
    expected = engine.index.search(
        {"text": "a red card", "image": NOISE}, 4, rerank="feat:4,raw:2"
    )
    assert [(h["id"], h["by"], h["nearest"]) for h in found] == [
        (h.id, h.by, h.nearest) for h in expected
    ]
    assert found[0]["has_picture"]
    only = client.post("/v1/search", json={"text": "a card", "filter": "year = 2003"}).json()[
        "hits"
    ]
    assert [(h["id"], h["metadata"]) for h in only] == [("white.png", {"year": 2003.0})]
    for wrong, said in (
        ({"text": "a", "filter": "yeer = 3"}, "condition in SQL on id, text, path, year"),
        ({"text": "a", "rerank": "raw:x"}, "write STAGE:COUNT"),
        ({"text": " "}, "no query"),
    ):
        answer = client.post("/v1/search", json=wrong)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_pictures_and_where_tokens_look(client):
    answer = client.get("/v1/documents/red.png/picture?edge=16")
    picture = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/jpeg"
    assert max(picture.size) == 16
    assert client.get("/v1/documents/..%2f..%2fetc%2fpasswd/picture").status_code == 404
    maps = client.post("/v1/attention", json={"id": "red.png"}).json()
    assert maps["together"].startswith("data:image/png;base64,")
    assert len(maps["tokens"]) == 4
    assert (
        client.post("/v1/attention", json={"image": data_url(file_of(NOISE))}).status_code == 200
    )
    assert client.post("/v1/attention", json={"text": "no picture"}).status_code == 400
    assert set(client.get("/v1/examples").json()) <= {
        f"a {c} card" for c in ("red", "green", "blue", "white", "black", "orange")
    }


def test_what_is_served_is_told(client, engine, saved_model):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["dimensions"], card["documents"]) == (32, 6)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    said = client.get("/metrics").text
    assert 'rematch_requests_total{path="/v1/models",status="200"}' in said
    assert "passwd" not in said
    with TestClient(create_app(Engine(str(saved_model)))) as alone:  # a model without an index
        assert alone.post("/v1/search", json={"text": "a"}).status_code == 404
        assert alone.get("/").status_code == 404
        assert alone.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_the_committed_openapi_is_this_one(client):
    path = ROOT / "docs/openapi.json"
    assert json.loads(path.read_text()) == client.get("/openapi.json").json(), (
        "scripts/openapi.py writes it anew"
    )


# ---- other people's clients ---------------------------------------------------------------------


def test_the_openai_client(engine):
    openai = pytest.importorskip("openai")
    with running(engine, keys=["secret"]) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        found = client.embeddings.create(model="any", input=["a dog", "a cat"])
        expected = engine.model.encode_document(
            [{"text": "a dog"}, {"text": "a cat"}], show_progress_bar=False
        )
        assert np.allclose([d.embedding for d in found.data], expected, atol=1e-5)
        query = client.embeddings.create(
            model="any", input="a dog", dimensions=8, extra_body={"task": "query"}
        )
        assert len(query.data[0].embedding) == 8
        assert [m.id for m in client.models.list().data] == [engine.name]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        with pytest.raises(openai.BadRequestError, match="empty list"):
            client.embeddings.create(model="any", input=[])


def test_the_cohere_client(engine):
    cohere = pytest.importorskip("cohere")
    documents = ["a red card", "a blue card", "nothing"]
    expected = engine.model.match([{"text": "a card"}] * 3, [{"text": d} for d in documents])
    with running(engine, keys=["secret"]) as address:
        for client in (
            cohere.Client("secret", base_url=address),
            cohere.ClientV2("secret", base_url=address),
        ):
            found = client.rerank(model="any", query="a card", documents=documents, top_n=2)
            assert [r.index for r in found.results] == np.argsort(-expected, kind="stable")[
                :2
            ].tolist()
            assert found.results[0].relevance_score == pytest.approx(expected.max(), abs=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


def test_keys_and_headers(engine):
    with TestClient(create_app(engine, keys=["one", "two"])) as guarded:
        for path in ("/v1/models", "/metrics", "/v1/examples", "/v1/documents/red.png/picture"):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}):
                answer = guarded.get(path, headers=given)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
            assert guarded.get(path, headers={"Authorization": "Bearer two"}).status_code == 200
        answer = guarded.get("/health")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert guarded.get("/").status_code == 200


def test_limits(engine):
    few = Limits(body=20_000, inputs=3, images=1, pixels=10_000, text=50)
    with TestClient(create_app(engine, few)) as tight:
        big = data_url(file_of(Image.new("RGB", (200, 100))))
        parts = [{"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}}] * 2
        for path, body, status, said in (
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
            ("search", {"text": "a" * 30_000}, 413, "this server takes 20,000 in a request"),
        ):
            answer = tight.post(f"/v1/{path}", json=body)
            assert answer.status_code == status, answer.text
            assert said in answer.json()["error"]["message"]
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


def test_pictures_that_are_none_are_refused_and_the_server_lives(client):
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
        for at in rng.integers(0, len(spoiled), 8):
            spoiled[at] = rng.integers(256)
        bad[f"spoiled {i}"] = bytes(spoiled)
    for name, content in bad.items():
        answer = client.post("/v1/search", json={"image": data_url(content)})
        assert answer.status_code in (
            (200, 400, 413) if name.startswith("spoiled") else (400, 413)
        ), name
        if answer.status_code != 200:
            assert "Traceback" not in answer.text
            assert str(ROOT) not in answer.text
    polyglot = (
        whole + b"PK\x03\x04" + b"<script>"
    )  # a whole picture with something behind it is a picture
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
        picture_from("http://example.test/a.png", Limits())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            routes = {
                "/loop": "/loop",
                "/inside": "http://inside.test/a.png",
                "/file": "file:///etc/passwd",
            }
            routes |= {
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
    with pytest.raises(ClientError, match="not on the open internet"):
        fetch(f"{base}/a.png", bounds)  # the name leads to loopback
    monkeypatch.setattr(
        guarding, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )
    assert picture_from(f"{base}/a.png", bounds).size == NOISE.size
    for url, said in (
        (f"{base}/inside", "inside.test is not on the open internet"),
        (f"{base}/metadata", "169.254.169.254 is not on the open internet"),
        (f"{base}/file", "must be http or https"),
        (f"{base}/other", "not fetched from other.test"),
        (f"{base}/loop", "redirects too often"),
        (f"{base}/missing", "answers 404"),
        (f"{base}/slow", "takes too long"),
        ("http://private.test/a.png", "not on the open internet"),
        (f"http://user:word@good.test:{port}/a.png", "without a user name"),
        (f"http://[::1]:{port}/a.png", "not on the open internet"),
    ):
        with pytest.raises(ClientError, match=said.replace("[", r"\[")):
            fetch(url, bounds)
    with pytest.raises(ClientError, match="has more than 100 bytes"):
        fetch(f"{base}/a.png", Limits(hosts=("good.test",), remote_bytes=100))
    server.shutdown()


# ---- under load ---------------------------------------------------------------------------------


def batcher_of(seen: list, seconds: float = 0.0, **settings) -> Batcher:
    def run(kind, values):
        seen.append((kind, list(values)))
        time.sleep(seconds)
        if "bad" in values:
            raise ValueError("bad")
        return [f"{kind}:{value}" for value in values]

    return Batcher(run, **({"budget": 100, "most_waiting": 10} | settings))


def test_calls_that_wait_are_computed_together():
    async def scene():
        seen = []
        batcher = batcher_of(seen, 0.05)
        calls = [("a", str(i), 10) for i in range(6)]
        first = asyncio.create_task(batcher([("a", "first", 10)]))
        await asyncio.sleep(0.01)  # it is being computed; the others wait
        rest = [
            asyncio.create_task(batcher([call]))
            for call in [*calls, ("b", "other", 10), ("a", "long", 60)]
        ]
        assert await first == ["a:first"]
        assert [await task for task in rest] == [[f"a:{i}"] for i in range(6)] + [
            ["b:other"],
            ["a:long"],
        ]
        assert seen == [
            ("a", ["first"]),
            ("a", [str(i) for i in range(6)]),  # seven times 60 tokens would be too many
            ("b", ["other"]),
            ("a", ["long"]),
        ]
        await batcher.close()

    asyncio.run(scene())


def test_a_full_queue_refuses_and_what_was_cancelled_leaves_it():
    async def scene():
        seen = []
        batcher = batcher_of(seen, 0.1, most_waiting=3)
        running_ = asyncio.create_task(batcher([("a", "0", 1)]))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(batcher([("a", str(i), 1)])) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ClientError) as refused:
            await batcher([("a", "4", 1)])
        assert refused.value.status == 429
        waiting[1].cancel()
        assert await running_ == ["a:0"]
        assert await waiting[0] == ["a:1"]
        assert await waiting[2] == ["a:3"]
        assert seen[1] == ("a", ["1", "3"])
        busy = asyncio.create_task(batcher([("a", "4", 1)]))
        await asyncio.sleep(0.02)
        failing = asyncio.create_task(batcher([("a", "bad", 1)]))
        beside = asyncio.create_task(batcher([("a", "5", 1)]))
        with pytest.raises(ValueError, match="bad"):
            await failing
        assert await beside == ["a:5"], "an error is its call's, not its batch's"
        assert await busy == ["a:4"]
        last = asyncio.create_task(batcher([("a", "6", 1)]))
        await asyncio.sleep(0.02)
        await batcher.close()
        assert await last == ["a:6"], "what was taken is finished"
        with pytest.raises(ClientError) as closed:
            await batcher([("a", "7", 1)])
        assert closed.value.status == 503

    asyncio.run(scene())


def test_many_at_once_get_their_own_vectors(engine):
    """Texts, pictures and a text that is refused, all at the same time."""
    texts = [f"text number {i} " * (1 + i % 5) for i in range(60)]
    expected = engine.model.encode_document([{"text": t} for t in texts], show_progress_bar=False)
    picture_ = {
        "messages": [
            {"content": [{"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}}]}
        ]
    }
    seen = engine.model.encode_document([{"image": NOISE}], show_progress_bar=False)[0]
    answers: dict[int, object] = {}
    with running(engine) as address:

        def ask(i):
            body = picture_ if i % 10 == 9 else {"input": "<image>" if i % 10 == 4 else texts[i]}
            request = urllib.request.Request(
                f"{address}/v1/embeddings",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    answers[i] = json.load(answer)["data"][0]["embedding"]
            except urllib.error.HTTPError as error:
                answers[i] = error.code

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, answer in answers.items():
        if i % 10 == 4:
            assert answer == 400
        else:
            assert np.allclose(answer, seen if i % 10 == 9 else expected[i], atol=1e-5)


def test_busy_and_late_answers(engine, monkeypatch):
    slow = engine.run
    monkeypatch.setattr(
        engine, "run", lambda kind, values: (time.sleep(1.5), slow(kind, values))[1]
    )
    with TestClient(create_app(engine, timeout=0.3)) as impatient:
        answer = impatient.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 504
        assert "not done within 0.3 seconds" in answer.json()["error"]["message"]
    with running(engine, most_waiting=1) as address:
        statuses = []

        def ask():
            body = json.dumps({"input": "a"}).encode()
            request = urllib.request.Request(
                f"{address}/v1/embeddings", body, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    statuses.append((answer.status, None))
            except urllib.error.HTTPError as error:
                statuses.append((error.code, error.headers["Retry-After"]))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            assert answer.status == 200
        assert (200, None) not in statuses, (
            "the event loop answers while the model's thread computes"
        )
        for thread in threads:
            thread.join()
        assert (429, "1") in statuses
        assert (200, None) in statuses


def test_killed_and_started_again(engine, saved_model, tmp_path):
    command = [sys.executable, "-m", "rematch.cli", "serve", engine.index.uri, "--port", "0"]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    answers = []
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            command, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = process.stdout.readline()
        address = line.split(" on ")[1].split(";")[0]
        body = json.dumps({"text": "a red card", "rerank": "feat:3"}).encode()
        for _ in range(100):
            try:
                request = urllib.request.Request(
                    f"{address}/v1/search", body, {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=30) as answer:
                    answers.append([hit["id"] for hit in json.load(answer)["hits"]])
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        process.send_signal(end)
        process.wait(30)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


def test_the_command_says_what_is_wrong(monkeypatch, capfd, tmp_path, saved_model):
    def serve(*arguments):
        monkeypatch.setattr(sys, "argv", ["rematch", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capfd.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = serve(saved_model, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot be listened on" in said
    (tmp_path / "keys").write_text("\n")
    for arguments, expected in (
        ((saved_model, "--api-keys", tmp_path / "none"), "cannot be read"),
        ((saved_model, "--api-keys", tmp_path / "keys"), "holds no key"),
        ((tmp_path, "--port", 0), "no ReMatch checkpoint"),
    ):
        code, said = serve(*arguments)
        assert code == 2
        assert expected in said
        assert "Traceback" not in said
