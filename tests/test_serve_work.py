"""A request costs what the model reads for it, and nothing is computed that nobody waits for."""

import http.client
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import uvicorn
from fastapi.testclient import TestClient
from shared_server import card_engine, post, running

from rematch.serve.app import create_app
from rematch.serve.engine import Engine

STAGES = ("raw", "feat", "maxsim", "raw-raw", "feat-raw", "raw-feat", "", "rAw", "nope", "raw:raw")
COUNTS = ("0", "1", "3", "5", "6", "200", "4294967296", "9" * 40, "²", "٣", "-1", "1e2", "0x5", "")


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


@contextmanager
def hooked(engine, hook):
    """Calls a function before each forward pass, with the number of its tokens."""

    def before(module, arguments, keywords):
        hook(keywords["input_ids"].numel())

    handle = engine.model.backbone.base.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def long_rerank(engine) -> tuple[dict, int]:
    """The body of a request, and how many forward passes it takes."""
    documents = ["a red card " * 100 + str(i) for i in range(60)]
    passes: list[int] = []
    with hooked(engine, passes.append):
        engine.match([({"text": "a card"}, [{"text": text} for text in documents])])
    assert len(passes) > 5
    return {"query": "a card", "documents": documents}, len(passes)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_any_stages_are_served_or_refused(engine, tally):
    rng = random.Random(0)
    specs = [f"{stage}:{count}" for stage in STAGES for count in COUNTS]
    specs += [",".join(rng.choices(specs, k=rng.randint(2, 4))) for _ in range(40)]
    outcomes = tally("Rerank requests")
    app = create_app(engine, most_rerank=5)
    with TestClient(app, raise_server_exceptions=False) as client:
        for spec in specs:
            if len(spec) > 100:
                continue
            response = client.post("/v1/search", json={"text": "a red card", "rerank": spec})
            assert response.status_code in (200, 400), (spec, response.text)
            outcomes["answered" if response.status_code == 200 else "refused"] += 1
        response = client.post("/v1/search", json={"text": "a red card", "rerank": "raw:6"})
        assert response.status_code == 400
        assert "at most 5 (--most-rerank)" in response.json()["error"]["message"]


@pytest.mark.parametrize("rerank", ["", "raw:6", "feat:6", "maxsim:6,feat:5,raw:3"])
def test_a_search_costs_the_tokens_that_are_read(engine, rerank):
    query = {"text": "a red card on a wooden table"}
    stages = engine.stages(rerank, 200)
    estimate = engine.search_tokens(engine.measure([query])[0], stages)
    read: list[int] = []
    with hooked(engine, read.append):
        engine.search([query], top=6, filter="", rerank=stages, instruction="")
    assert sum(read) / 2 <= estimate <= 2 * sum(read)


def test_a_burst_of_expensive_searches_is_answered_or_refused_at_once(engine, tally, monkeypatch):
    """40 at once, of which the server can answer a few within its timeout."""
    outcomes = tally("Rerank requests")
    with hooked(engine, lambda _: time.sleep(0.05)):
        monkeypatch.setattr(engine, "seconds_per_token", engine._time_a_pass())
        with running(engine, timeout=6.0) as address, ThreadPoolExecutor(40) as clients:

            def send(number: int) -> int:
                body = {"text": f"card {number}", "rerank": "raw:6"}
                status, headers, _ = post(f"{address}/v1/search", body)
                assert status != 429 or int(headers["retry-after"]) >= 1
                return status

            statuses = list(clients.map(send, range(40)))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 2
    outcomes["answered"] += statuses.count(200)
    outcomes["refused"] += statuses.count(429)


def test_a_request_that_is_given_up_is_not_computed_to_its_end(engine):
    passes: list[int] = []
    body, total = long_rerank(engine)

    def slow_pass(tokens: int) -> None:
        passes.append(tokens)
        time.sleep(0.2)

    with hooked(engine, slow_pass), running(engine, timeout=0.5) as address:
        status, _, _ = post(f"{address}/v1/rerank", body)
        assert status == 504
        status, _, _ = post(
            f"{address}/v1/embeddings", {"input": "waits until the thread is free"}
        )
        assert status in (200, 429, 504)
    assert len(passes) < total


def test_a_busy_server_ends_within_its_grace_period(engine):
    passes: list[int] = []
    first_pass = threading.Event()
    body, total = long_rerank(engine)

    def slow_pass(tokens: int) -> None:
        passes.append(tokens)
        first_pass.set()
        time.sleep(0.3)

    config = uvicorn.Config(
        create_app(engine), port=0, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    with hooked(engine, slow_pass):
        thread.start()
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]

        def send() -> None:
            with suppress(OSError, ValueError, http.client.HTTPException):  # it is cut off
                post(f"http://127.0.0.1:{port}/v1/rerank", body)

        senders = [threading.Thread(target=send) for _ in range(3)]
        for sender in senders:
            sender.start()
        first_pass.wait(30)
        server.should_exit = True  # as SIGTERM does
        thread.join(60)
    assert not thread.is_alive()
    assert len(passes) < total
    for sender in senders:
        sender.join()


def test_ready_tells_of_the_thread_and_of_the_index(engine, monkeypatch):
    release = threading.Event()
    embed = engine.embed_documents

    def hang(documents):
        release.wait(30)
        return embed(documents)

    monkeypatch.setattr(engine, "embed_documents", hang)
    with TestClient(create_app(engine, timeout=1.0)) as client:
        assert client.get("/ready").status_code == 200
        sender = threading.Thread(
            target=client.post, args=("/v1/embeddings",), kwargs={"json": {"input": "a"}}
        )
        sender.start()
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert "thread" in client.get("/ready").json()["error"]["message"]
        assert client.get("/health").status_code == 200
        release.set()
        sender.join()
        wait_until(lambda: client.get("/ready").status_code == 200)
