"""Whatever a client sends, it gets an answer that says what is wrong, and the server goes on."""

import ipaddress
import json
import logging
import os
import random
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import shared_fuzz as fuzz
from fastapi.testclient import TestClient
from shared_server import card_engine, post, running

from rematch.data.images import EncodedPicture, load_image
from rematch.errors import ImageError, RematchError
from rematch.serve import connections, remote
from rematch.serve.app import create_app
from rematch.serve.command import ServeOptions, run_server
from rematch.serve.connections import BoundedProtocol
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError, Limits
from rematch.serve.middleware import count_values
from rematch.serve.pictures import HELD, open_picture, pictures_from
from rematch.serve.remote import fetch, is_public

HALF = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def engine(saved_model, folder) -> Engine:
    return card_engine(saved_model, folder)


@pytest.fixture(scope="module")
def client(engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


# ---- bodies ------------------------------------------------------------------------------------


def outcome(status: int) -> str:
    return "answered" if status < 300 else f"refused with {status}"


def test_bodies(client, folder, tally):
    for seed in range(200):
        rng = random.Random(seed)
        path = rng.choice(fuzz.PATHS)
        body = fuzz.body(rng, path)
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code < 500, (seed, path, body[:200])
        assert str(folder) not in response.text, seed
        if response.status_code >= 400:
            assert len(response.json()["error"]["message"]) < 600
        assert response.headers["x-content-type-options"] == "nosniff"
        tally("HTTP bodies")[outcome(response.status_code)] += 1


def test_stages_and_urls(client, tally):
    bodies = [{"text": "a", "rerank": stages} for stages in fuzz.RERANKS]
    bodies += [{"image": url} for url in fuzz.URLS]
    for body in bodies:
        response = client.post("/v1/search", json=body)
        valid = body.get("rerank") in ("raw:0", "maxsim:3,feat:2,raw:1", "raw:2\n")
        expected = 200 if valid else 400
        assert response.status_code == expected, body
        tally("HTTP bodies")[outcome(response.status_code)] += 1


@pytest.mark.parametrize("piece", [b"1,", b'"",', b"[],", b"{},", b'{"a":[', b'"\\"",'])
def test_values_are_counted_before_they_are_built(client, tally, piece):
    """Each of these would become millions of objects, and as many errors."""
    start = time.monotonic()
    for field in (b"input", b"messages", b"documents", b"text"):
        body = b'{"%s":[' % field + piece * (2_000_000 // len(piece)) + b"1]}"
        response = client.post("/v1/embeddings", content=body, headers=JSON)
        assert response.status_code == 413
        assert "more than 20,000 values" in response.json()["error"]["message"]
        tally("HTTP bodies")["refused with 413"] += 1
    assert time.monotonic() - start < 20


def test_values_of_json(tally):
    def values(node: object) -> int:
        if isinstance(node, dict):
            return 1 + len(node) + sum(map(values, node.values()))
        return 1 + sum(map(values, node)) if isinstance(node, list) else 1

    for seed in range(500):
        node = fuzz.value(random.Random(seed))
        for escaped in (True, False):
            body = json.dumps(node, ensure_ascii=escaped).encode(errors="replace")
            assert count_values(body, 10**6) >= values(node) / 3, body  # never far too few
            assert count_values(body, 10**6) <= 2 * values(node)  # texts do not count
        tally("HTTP bodies")["counted"] += 1
    assert count_values(json.dumps(["a,[" * 10_000, "\\", '"'] * 4).encode(), 100) < 20


def test_an_unforeseen_exception_is_answered_and_counted(engine, monkeypatch, caplog):
    def fail(*args):
        raise KeyError("/a/secret/path")

    monkeypatch.setattr(engine, "measure", fail)
    with TestClient(create_app(engine)) as client:
        response = client.post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "default-src 'self'" in response.headers["content-security-policy"]
        counts = client.get("/metrics").text
    assert 'rematch_requests_total{path="/v1/embeddings",status="500"} 1.0' in counts
    assert "KeyError" in caplog.text


# ---- pictures ----------------------------------------------------------------------------------


def test_pictures(tally):
    for seed in range(400):
        content = fuzz.picture(random.Random(seed))
        try:
            (picture,) = pictures_from([fuzz.data_url(content)], Limits())
            assert picture.mode == "RGB"
            tally("Pictures")["decoded"] += 1
        except ClientError as error:
            tally("Pictures")[f"refused with {error.status}"] += 1
        with suppress(ImageError):  # and nothing else
            load_image(EncodedPicture("a.png", content))
    picture = None
    assert HELD.count == 0, "pixels are given back"


def test_the_pixels_of_a_request_are_added_up_before_any_is_decoded(tally, monkeypatch):
    monkeypatch.setattr("rematch.serve.pictures.load_image", pytest.fail)
    rng = random.Random(0)
    for _ in range(60):
        side = rng.randrange(1_300, 4_900)
        urls = [fuzz.data_url(fuzz.png(side, side))] * (50_000_000 // side**2 + 1)
        if len(urls) > 32:
            continue
        with pytest.raises(ClientError, match="pixels together") as refusal:
            pictures_from(urls, Limits())
        assert refusal.value.status == 413
        tally("Pictures")["refused with 413"] += 1
    with pytest.raises(ClientError, match="takes at most 25,000,000"):
        open_picture(fuzz.png(6_320, 6_320), Limits())


def test_a_jpeg_that_is_read_over_and_over():
    progressive = fuzz.file_of("JPEG")
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    with pytest.raises(ClientError, match="more than 100 scans"):
        open_picture(progressive[:-2] + scan * 100 + progressive[-2:], Limits())


def test_pixels_are_held_as_long_as_their_picture():
    limits = Limits(held_pixels=3_000)
    url = fuzz.data_url(fuzz.whole_png())
    held = [pictures_from([url], limits), pictures_from([url], limits)]
    with pytest.raises(ClientError, match="too many pictures") as refusal:
        pictures_from([url], limits)
    assert refusal.value.status == 429
    held.clear()
    assert pictures_from([url, url], limits)
    assert pictures_from([url] * 3, limits), "a request that comes alone is served"


def test_a_picture_of_the_index_that_is_gone(saved_model, tmp_path):
    engine = card_engine(saved_model, tmp_path)
    with TestClient(create_app(engine)) as client:
        query = {"text": "a red card", "rerank": "feat:6,raw:4", "top": 6}
        before = client.post("/v1/search", json=query).json()
        assert before["warnings"] == []
        gone, broken = [hit["id"] for hit in before["hits"][:2]]
        (tmp_path / "cards" / gone).unlink()
        (tmp_path / "cards" / broken).write_bytes(b"not a picture")
        response = client.post("/v1/search", json=query)
        after = response.json()
        ids = [hit["id"] for hit in after["hits"]]
        assert [i for i in ids if i not in (gone, broken)] == [
            hit["id"] for hit in before["hits"][2:]
        ]
        assert set(ids[2:4]) == {gone, broken}, "behind the others of its stage"
        assert {hit["by"] for hit in after["hits"][2:4]} == {"feat-feat"}
        for name in (gone, broken):
            assert any(warning.startswith(f"{name}: ") for warning in after["warnings"])
        missing = client.post("/v1/attention", json={"id": gone})
        assert missing.status_code == 404
        for answer in (response, missing, client.get(f"/v1/documents/{gone}/picture")):
            assert str(tmp_path) not in answer.text
        for path in (tmp_path / "cards").iterdir():
            path.unlink()
        assert len(client.post("/v1/search", json=query).json()["warnings"]) == 4


# ---- addresses ---------------------------------------------------------------------------------

SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12
192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24
203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 ::/96 ::ffff:0:0:0/96 ::ffff:7f00:0/104 ::ffff:a00:0/104
64:ff9b::/96 64:ff9b:1::/48 100::/64 2001::/32 2001::/23 2001:db8::/32 2002::/16 3fff::/20
5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8
"""


def test_addresses(tally):
    rng = random.Random(0)
    for network in map(ipaddress.ip_network, SPECIAL.split()):
        for _ in range(40):
            address = network[rng.randrange(network.num_addresses)]
            assert not is_public(str(address)), address
            assert not is_public(f"{address}%1")
            tally("Addresses")["refused"] += 1
    for _ in range(2000):
        address = ipaddress.IPv4Address(rng.getrandbits(32))
        if rng.random() < 0.5:
            address = ipaddress.IPv6Address((1 << 125) + rng.getrandbits(125))
        if is_public(str(address)):
            assert address.is_global, address
            tally("Addresses")["public"] += 1
        else:
            tally("Addresses")["refused"] += 1
    assert tally("Addresses")["public"] > 1500


def test_urls(tally):
    limits = Limits(hosts=("good.test", ".test", "127.0.0.1", "[::1]"), remote_seconds=2)
    rng = random.Random(0)
    pieces = ["http://", "https://", "good.test", "[", "]", "::1", ":", "99999", "@", "/", "\\",
              "%00", "\0", "é", "ä.test", " ", "#", "?", "127.0.0.1", "..test", "a" * 64 + ".test",
              "0x7f.1", "\r\nX: y", "%", "fe80::1%25eth0", "http:"]  # fmt: skip
    for _ in range(400):
        url = "http://" + "".join(rng.choices(pieces, k=rng.randrange(1, 6)))
        with pytest.raises(ClientError):
            fetch(url, limits, time.monotonic() + 2)
        tally("Addresses")["refused"] += 1


@pytest.fixture
def other_machine(monkeypatch):
    """A server whose raw answers a test decides on; good.test is its name."""
    answers: dict[bytes, list[bytes]] = {}

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                path = connection.recv(65_536).split()[1]
                pieces = answers.get(path, [])
                for piece in pieces:
                    connection.sendall(piece)
                    if len(pieces) > 1:
                        time.sleep(0.05)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: real("127.0.0.1" if host == "good.test" else host, *a, **k),
    )
    monkeypatch.setattr(remote, "is_public", bool)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://good.test:{listener.getsockname()[1]}", answers
        listener.shutdown(socket.SHUT_RDWR)


def test_answers_of_other_machines(other_machine, tally):
    address, answers = other_machine
    limits = Limits(hosts=("good.test",), remote_seconds=0.4, remote_bytes=10_000)
    drip = [b"x"] * 400
    slow = {
        b"/status": [b"H", *drip],
        b"/headers": [b"HTTP/1.1 200 OK\r\n", *[b"A: b\r\n"] * 400],
        b"/continue": [b"HTTP/1.1 100 Continue\r\n\r\n"] * 400,
        b"/body": [b"HTTP/1.1 200 OK\r\n\r\n", *drip],
        b"/redirect": [
            b"HTTP/1.1 302 OK\r\n",
            *[b"A: b\r\n"] * 10,
            b"Location: /redirect\r\n\r\n",
        ],
    }
    answers |= slow
    start = time.monotonic()
    for path in slow:
        with pytest.raises(ClientError, match="takes too long"):
            fetch(address + path.decode(), limits, time.monotonic() + limits.remote_seconds)
        tally("Addresses")["refused"] += 1
    assert time.monotonic() - start < 15
    with pytest.raises(ClientError, match="takes too long"):  # one deadline for all of a request
        pictures_from([address + "/body"] * 30, limits)
    rng = random.Random(0)
    locations = (
        b"http://[x",
        b"http://good.test:99999/",
        b"//",
        b"\xff\xfe",
        b"http://good.test:x/",
        b"",
        b"file:///etc/passwd",
        b"http://\xe4.test",
        b"/\xe4 \x7f",
        b"?" * 9_000,
    )
    for i in range(60):
        lines = [b"HTTP/1.1 %s X" % rng.choice((b"302", b"301", b"200", b"999", b"-1", b"404"))]
        lines += [b"Location: " + rng.choice(locations), b"Content-Length: 5"]
        if i % 2:
            lines.insert(rng.randrange(3), rng.randbytes(8))
        answers[b"/a"] = [b"\r\n".join(lines) + b"\r\n\r\nnopic"]
        with pytest.raises(ClientError):
            pictures_from([f"{address}/a"], limits)
        tally("Addresses")["refused"] += 1


# ---- raw HTTP ----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 0.2)
    monkeypatch.setattr(BoundedProtocol, "unread_seconds", 0.4)


def place(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("http://").split(":")
    return host, int(port)


def test_raw_http(engine, impatient, tally, folder, caplog):
    caplog.set_level(logging.ERROR)
    with running(engine, Limits(body_seconds=0.1)) as address:
        for seed in range(250):
            message = fuzz.raw_request(random.Random(seed))
            answer = fuzz.converse(place(address), message, 20)
            status = re.match(rb"HTTP/1.1 (\d+)", answer)
            assert status or not answer
            assert int(status[1]) < 500 if status else True, message
            assert str(folder).encode() not in answer
            result = outcome(int(status[1])) if status else "closed"
            tally("Raw HTTP")["continued" if result == "refused with 100" else result] += 1
        assert post(f"{address}/v1/embeddings", {"input": "a"})[0] == 200
    assert not caplog.records, caplog.text


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while piece := connection.recv(65_536):
            answer += piece
    except ConnectionError:
        pass
    return answer


def test_what_is_half_sent_is_given_up(engine, impatient, tally):
    post_head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(engine, Limits(body_seconds=0.3), keys=["key"]) as address:
        key = b"Authorization: Bearer key\r\n"
        for message, expected in (
            (b"", b""),
            (b"GET /hea", b""),
            (post_head, b""),
            (whole + b"GET /", b"HTTP/1.1 200"),
            (post_head + key + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408"),
            (post_head + key + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 408"),
            # the key is checked before the body is there, and the rest of it not waited for
            (post_head + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 401"),
            (post_head + key + b"Content-Length: 99999999999\r\n\r\n{", b"HTTP/1.1 413"),
            (
                post_head + key + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"HTTP/1.1 400",
            ),
        ):
            with socket.create_connection(place(address), timeout=20) as connection:
                connection.sendall(message)
                assert read_all(connection)[:12] == expected, message
            tally("Raw HTTP")["given up"] += 1
        connection = socket.create_connection(place(address), timeout=20)
        with connection, pytest.raises(ConnectionError):  # a byte now and then buys no time
            drip(connection, b"GET /" + b"a" * 400)


def drip(connection: socket.socket, message: bytes) -> None:
    for byte in message:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def test_tiny_chunks(engine):
    with running(engine) as address:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with socket.create_connection(place(address), timeout=20) as connection:
            connection.sendall(head + b"1\r\n \r\n" * 20_000)
            assert read_all(connection).startswith(b"HTTP/1.1 400")


def test_a_client_that_does_not_read(engine, impatient):
    request = b"GET /page/page.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(engine) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(place(address))
        connection.sendall(request * 2_000)
        with pytest.raises(ConnectionError):
            drip(connection, b"a" * 400)


def test_a_client_that_sends_far_ahead(engine):
    request = b"GET /page/page.js HTTP/1.1\r\nHost: x\r\n\r\n"
    connection: socket.socket
    with running(engine) as address:
        connection = socket.create_connection(place(address), timeout=20)
        with connection, pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall(request * 2_000_000)


def test_idle_connections_shut_nobody_out(engine, monkeypatch, tally):
    monkeypatch.setattr(connections, "most_connections", lambda: 60)
    with running(engine) as address:
        idle = []
        for i in range(100):
            connection = socket.create_connection(place(address), timeout=20)
            idle.append(connection)
            connection.sendall((b"", b"GET /", HALF)[i % 3])
            time.sleep(0.005)  # or the queue of those that are not accepted overflows
            tally("Raw HTTP")["idle"] += 1
        for _ in range(20):
            assert post(f"{address}/v1/embeddings", {"input": "a"}, seconds=20)[0] == 200
        assert sum(map(is_open, idle)) <= 60
        for connection in idle:
            connection.close()


def test_more_idle_connections_than_files_may_be_open(saved_model, tally):
    """1,100 of them, and a server that may open 1,024 files."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard_limit != resource.RLIM_INFINITY and hard_limit < 2048:
        pytest.skip("this process may open too few files")
    code = (
        "import resource, sys; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {hard_limit})); "
        "from rematch.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", str(saved_model), "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    idle = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft_limit, 2048), hard_limit))
    try:
        address = server.stdout.readline().split(" on ")[1].split(";")[0]
        post(f"{address}/v1/embeddings", {"input": "a"})
        for i in range(1100):
            connection = socket.create_connection(place(address), timeout=20)
            idle.append(connection)
            connection.sendall((b"", b"GET /", HALF)[i % 3])
            tally("Raw HTTP")["idle"] += 1
            if i % 100 == 99:
                assert post(f"{address}/v1/embeddings", {"input": "a"}, seconds=20)[0] == 200
        assert sum(map(is_open, idle)) <= 1024 // 3
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


# ---- keys and addresses of the server ----------------------------------------------------------


@pytest.mark.parametrize("keys", [",", "", " , ,", "ключ"])
def test_keys_that_are_none(monkeypatch, saved_model, keys):
    monkeypatch.setenv("REMATCH_API_KEYS", keys)
    with pytest.raises(RematchError, match="REMATCH_API_KEYS"):
        run_server(ServeOptions(str(saved_model), port=0))


def test_files_of_keys(saved_model, tmp_path):
    rng = random.Random(0)
    for content in (b"", b"\n \n", b"\xff\xfe", b"\0", *(rng.randbytes(40) for _ in range(20))):
        (tmp_path / "keys").write_bytes(content)
        with pytest.raises(RematchError, match="--api-keys"):
            run_server(ServeOptions(str(saved_model), port=0, api_keys=tmp_path / "keys"))


@pytest.mark.parametrize("host", ["", "a" * 300, "no such host", "\0", "999.1.1.1"])
def test_hosts_that_are_none(saved_model, host):
    with pytest.raises(RematchError, match=r"--host|cannot listen"):
        run_server(ServeOptions(str(saved_model), port=0, host=host))
