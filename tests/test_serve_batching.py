"""The queue in front of the model: batches, limits, cancellation, requests at the same time."""

import asyncio
import random
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from shared_server import NOISE, card_engine, data_url, file_of, post, running

from rematch.encoding.encoder import Encoder
from rematch.serve import batching
from rematch.serve.app import create_app
from rematch.serve.batching import Batcher
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


class Recorder:
    """Computes upper-case letters, and records the batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[str]] = []

    def compute(self, values: list[str]) -> list[str]:
        self.batches.append(list(values))
        time.sleep(self.seconds)
        if "bad" in values:
            raise ValueError("bad")
        return [value.upper() for value in values]


async def run(batcher: Batcher, recorder: Recorder, value: str, key="k", tokens=1) -> str:
    (result,) = await batcher.run(key, recorder.compute, [value], [tokens])
    return result


def test_waiting_calls_with_the_same_key_are_computed_together():
    async def scene():
        recorder = Recorder(0.05)
        batcher = Batcher(batch_tokens=100, waiting=10)
        first = asyncio.create_task(run(batcher, recorder, "first", tokens=10))
        await asyncio.sleep(0.01)  # it is being computed; the others wait
        values = [("a", "k", 10), ("b", "k", 10), ("c", "k", 10), ("d", "k", 10), ("e", "k", 10)]
        values += [("f", "k", 10), ("other", "other key", 10), ("long", "k", 60)]
        tasks = [
            asyncio.create_task(run(batcher, recorder, value, key, tokens))
            for value, key, tokens in values
        ]
        assert await first == "FIRST"
        assert [await task for task in tasks] == [value.upper() for value, _, _ in values]
        assert recorder.batches == [
            ["first"],
            ["a", "b", "c", "d", "e", "f"],  # with the long one, seven times 60 tokens
            ["other"],
            ["long"],
        ]
        assert batcher.batches == 4
        await batcher.close()

    asyncio.run(scene())


def test_without_batching_calls_are_computed_one_at_a_time():
    async def scene():
        recorder = Recorder(0.02)
        batcher = Batcher(batch_tokens=100, waiting=10, batching=False)
        assert await batcher.run("k", recorder.compute, ["a", "b"], [1, 1]) == ["A", "B"]
        assert recorder.batches == [["a"], ["b"]]
        await batcher.close()

    asyncio.run(scene())


def test_a_full_queue_refuses_and_cancelled_calls_leave_it():
    async def scene():
        recorder = Recorder(0.1)
        batcher = Batcher(batch_tokens=100, waiting=3)
        first = asyncio.create_task(run(batcher, recorder, "a"))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(run(batcher, recorder, value)) for value in "bcd"]
        await asyncio.sleep(0)
        with pytest.raises(ClientError) as refused:
            await run(batcher, recorder, "e")
        assert refused.value.status == 429
        waiting[1].cancel()
        assert await first == "A"
        assert await waiting[0] == "B"
        assert await waiting[2] == "D"
        assert recorder.batches[1] == ["b", "d"]
        await batcher.close()

    asyncio.run(scene())


def test_an_error_is_its_calls_not_its_batchs():
    async def scene():
        recorder = Recorder(0.1)
        batcher = Batcher(batch_tokens=100, waiting=3)
        first = asyncio.create_task(run(batcher, recorder, "a"))
        await asyncio.sleep(0.02)
        failing = asyncio.create_task(run(batcher, recorder, "bad"))
        beside = asyncio.create_task(run(batcher, recorder, "b"))
        with pytest.raises(ValueError, match="bad"):
            await failing
        assert await beside == "B"
        assert await first == "A"
        await batcher.close()

    asyncio.run(scene())


def test_closing_finishes_the_queue_and_refuses_new_calls():
    async def scene():
        recorder = Recorder(0.1)
        batcher = Batcher(batch_tokens=100, waiting=3)
        last = asyncio.create_task(run(batcher, recorder, "a"))
        await asyncio.sleep(0.02)
        await batcher.close()
        assert await last == "A"
        with pytest.raises(ClientError) as closed:
            await run(batcher, recorder, "b")
        assert closed.value.status == 503

    asyncio.run(scene())


class Clock:
    """Stands for the module time; it advances only when something is computed."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("slowdown", [1, 8])
def test_what_is_accepted_comes_in_time(monkeypatch, tally, slowdown):
    """Bursts of calls of different kinds and lengths, some of whose callers give up.

    From the middle of a burst on, the machine is ``slowdown`` times as slow.
    """
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    timeout, pace = 10.0, 0.01
    rng = random.Random(0)
    outcomes = tally("Rerank requests")
    work = {"answered": 0.0, "computed": 0.0}
    late: list[int] = []

    async def scene():
        batcher = Batcher(batch_tokens=200, waiting=500, timeout=timeout, seconds_per_token=pace)
        batcher.pace.measured = dict.fromkeys(range(3), pace)
        for _ in range(15):
            finished: dict[int, float] = {}
            slow_from = clock.now + 3.0

            def compute(values):
                for _ in range(4):  # passes
                    batching.check_wanted()
                    slow = slowdown if clock.now > slow_from else 1  # noqa: B023
                    seconds = slow * pace * sum(tokens for _, tokens in values) / 4
                    clock.now += seconds
                    work["computed"] += seconds / slow
                finished.update({number: clock.now for number, _ in values})  # noqa: B023
                return values

            started = clock.now
            lengths = [rng.choice((5, 20, 100, 400)) for _ in range(60)]
            tasks = []
            for number, tokens in enumerate(lengths):
                kind = rng.randrange(3)
                arguments = (kind, compute, [(number, tokens)], [tokens], kind)
                tasks.append(asyncio.create_task(batcher.run(*arguments)))
            await asyncio.sleep(0)
            for task in rng.sample(tasks, 5):
                task.cancel()
            for number, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                if isinstance(result, asyncio.CancelledError):
                    outcomes["given up"] += 1
                elif isinstance(result, ClientError):
                    assert result.status == 429
                    assert 1 <= result.retry_after < slowdown * pace * sum(lengths)
                    outcomes["refused"] += 1
                elif finished[number] - started <= timeout:
                    work["answered"] += pace * lengths[number]
                    outcomes["answered"] += 1
                else:
                    late.append(number)
        await batcher.close()

    asyncio.run(scene())
    if slowdown == 1:
        assert not late
        assert work["answered"] >= 0.8 * work["computed"]
    else:  # only what was computed when the pace dropped
        assert len(late) <= 15 * 2
    assert work["computed"] > 15 * 2.0, "the thread had work"


def test_a_pause_of_the_machine_does_not_shut_the_server():
    """After it, calls are refused for a while at most."""
    pace = batching.Pace(0.0)
    clock = Clock()
    for seconds in (1.0, 3600.0, *[1.0] * 20):
        batch = batching._Batch([SimpleNamespace(tokens=100, kind="k")], started=0.0)
        clock.now = seconds
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batching, "time", clock)
            pace.learn(batch, complete=True)
        assert pace.measured["k"] < 0.02
    assert pace.measured["k"] < 0.0101


def test_a_batch_that_nobody_waits_for_is_not_computed_to_its_end():
    passes = []
    first_pass = threading.Event()

    def compute(values):
        for number in range(500):
            passes.append(number)
            first_pass.set()
            time.sleep(0.02)
            batching.check_wanted()
        return values

    async def scene():
        batcher = Batcher(batch_tokens=100, waiting=3)
        task = asyncio.create_task(batcher.run("k", compute, ["a"], [1]))
        await asyncio.to_thread(first_pass.wait, 10)
        task.cancel()
        await batcher.close()

    asyncio.run(scene())
    assert len(passes) < 250
    batching.check_wanted()  # outside of a batch it does nothing


PICTURE_MESSAGE = {
    "messages": [
        {"content": [{"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}}]}
    ]
}


def test_concurrent_requests_get_their_own_vectors(engine):
    """Texts, pictures and a text that is refused, all at the same time."""
    texts = [f"text number {i} " * (1 + i % 5) for i in range(60)]
    expected = engine.model.encode_document([{"text": t} for t in texts], show_progress_bar=False)
    expected_picture = engine.model.encode_document([{"image": NOISE}], show_progress_bar=False)[0]
    responses: dict[int, tuple[int, dict, dict]] = {}
    with running(engine) as address:

        def send(i: int) -> None:
            body = {"input": "<image>" if i % 10 == 4 else texts[i]}
            if i % 10 == 9:
                body = PICTURE_MESSAGE
            responses[i] = post(f"{address}/v1/embeddings", body)

        threads = [threading.Thread(target=send, args=(i,)) for i in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(responses) == 60
    for i, (status, _, content) in responses.items():
        if i % 10 == 4:
            assert status == 400
        else:
            vector = expected_picture if i % 10 == 9 else expected[i]
            assert np.allclose(content["data"][0]["embedding"], vector, atol=1e-5)


def test_a_picture_waits_in_the_queue_once(engine, monkeypatch):
    app = create_app(engine)
    batcher = app.state.service.batcher
    values = []
    compute_batch = batcher._compute

    async def recorded(batch):
        values.extend(call.value for call in batch)
        await compute_batch(batch)

    monkeypatch.setattr(batcher, "_compute", recorded)
    with TestClient(app) as client:
        content = client.post("/v1/embeddings", json=PICTURE_MESSAGE).json()
        hits = client.post("/v1/search", json={"image": data_url(file_of(NOISE))}).json()["hits"]
        picture = {"image": data_url(file_of(NOISE))}
        results = client.post("/v1/rerank", json={"query": picture, "documents": [picture]}).json()
    assert hits
    assert len(values) == 3
    (measured,) = Encoder(engine.model, workers=0).measure([{"image": NOISE}], "document")
    assert content["usage"]["prompt_tokens"] == measured.tokens
    assert results["usage"]["prompt_tokens"] == 2 * measured.tokens
    assert engine.measure([{"image": NOISE}, {"text": "a dog"}])[0] == measured.tokens


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_picture_is_measured_while_the_model_is_busy(engine, monkeypatch):
    app = create_app(engine)
    batcher = app.state.service.batcher
    embed = engine.embed_documents
    release = threading.Event()

    def embed_when_released(documents):
        release.wait(10)
        return embed(documents)

    monkeypatch.setattr(engine, "embed_documents", embed_when_released)
    with TestClient(app) as client:
        statuses = []

        def send(body: dict) -> None:
            statuses.append(client.post("/v1/embeddings", json=body).status_code)

        text = threading.Thread(target=send, args=({"input": "a"},))
        text.start()
        wait_until(lambda: batcher.batches == 1)
        picture = threading.Thread(target=send, args=(PICTURE_MESSAGE,))
        picture.start()
        wait_until(lambda: len(batcher.queue) == 1)  # measured, and waiting to be computed
        assert statuses == []
        release.set()
        text.join()
        picture.join()
    assert statuses == [200, 200]


def test_inputs_are_measured_with_a_processor_of_their_own(engine):
    measuring, computing = engine._measuring_encoder.model, engine.model
    assert measuring.backbone.processor is not computing.backbone.processor
    assert measuring.tokenizer is not computing.tokenizer
    assert measuring.backbone.reader.processor is measuring.backbone.processor
    assert measuring.backbone.model is computing.backbone.model, "the weights are shared"


def test_busy_and_late_responses(engine, monkeypatch):
    embed = engine.embed_documents

    def slow(documents):
        time.sleep(1.5)
        return embed(documents)

    monkeypatch.setattr(engine, "embed_documents", slow)
    with TestClient(create_app(engine, timeout=0.3)) as impatient:
        response = impatient.post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 504
        assert "not done within 0.3 seconds" in response.json()["error"]["message"]
    with running(engine, waiting=1) as address:
        responses = []

        def send() -> None:
            status, headers, _ = post(f"{address}/v1/embeddings", {"input": "a"})
            responses.append((status, headers.get("Retry-After", headers.get("retry-after"))))

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        with urllib.request.urlopen(f"{address}/health", timeout=10) as response:
            assert response.status == 200
        assert (200, None) not in responses, (
            "the event loop answers while the model's thread computes"
        )
        for thread in threads:
            thread.join()
        assert (429, "1") in responses
        assert (200, None) in responses
