"""The HTTP API computes what the library computes."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from shared_server import COLOURS, NOISE, card_engine, data_url, file_of

from rematch.errors import RematchError
from rematch.interpretability import attention_maps
from rematch.serve.app import create_app
from rematch.serve.engine import Engine

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def test_embeddings_are_those_of_encode(client, engine):
    texts = ["a dog", "a longer text about a dog", "x"]
    for task, encode in (
        ("query", engine.model.encode_query),
        ("document", engine.model.encode_document),
    ):
        expected = encode([{"text": t} for t in texts], show_progress_bar=False)
        for settings in ({"task": task}, {"input_type": task}, {"input_type": f"search_{task}"}):
            content = client.post("/v1/embeddings", json={"input": texts} | settings).json()
            vectors = [d["embedding"] for d in content["data"]]
            assert np.allclose(vectors, expected, atol=1e-5)
        assert [d["index"] for d in content["data"]] == [0, 1, 2]
        assert content["usage"]["prompt_tokens"] > 3
    packed = client.post(
        "/v1/embeddings", json={"input": texts, "encoding_format": "base64"}
    ).json()
    vectors = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in packed["data"]]
    assert np.allclose(vectors, expected, atol=1e-5)
    content = client.post("/v1/embeddings", json={"input": "a dog", "dimensions": 8}).json()
    short = content["data"][0]["embedding"]
    assert np.allclose(short, expected[0][:8] / np.linalg.norm(expected[0][:8]), atol=1e-5)


def test_messages_with_pictures_are_embedded(client, engine):
    content = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": data_url(file_of(NOISE))}},
    ]
    body = {"messages": [{"role": "user", "content": content}], "task": "query"}
    response = client.post("/v1/embeddings", json=body).json()
    assert "data" in response, response
    expected = engine.model.encode_query(
        [{"text": "what is this?", "image": NOISE}], show_progress_bar=False
    )[0]
    assert np.allclose(response["data"][0]["embedding"], expected, atol=1e-5)


def test_a_text_that_looks_like_a_path_is_text(client, engine):
    path = Path(engine.index.uri).parent / "cards/red.png"
    assert path.exists()
    content = client.post("/v1/embeddings", json={"input": str(path)}).json()
    (expected,) = engine.model.encode_document([{"text": str(path)}], show_progress_bar=False)
    assert np.allclose(content["data"][0]["embedding"], expected, atol=1e-5)
    response = client.post("/v1/search", json={"image": str(path)})
    assert response.status_code == 400
    assert "data URL" in response.json()["error"]["message"]


def test_a_control_token_in_a_text_is_a_client_error(client):
    message = "its text holds <|end|>, which the model reads as a control token"
    for path, body in {
        "/v1/embeddings": {"input": ["a dog", "a <|end|> dog"]},
        "/v1/search": {"text": "a <|end|> dog"},
        "/v1/rerank": {"query": "a card", "documents": ["a red card", "a <|end|> card"]},
    }.items():
        response = client.post(path, json=body)
        assert response.status_code == 400, path
        assert message in response.json()["error"]["message"], path


def test_rerank_is_match(client, engine):
    documents = ["a red card", {"text": "a blue card"}, {"image": data_url(file_of(NOISE))}]
    inputs = [{"text": "a red card"}, {"text": "a blue card"}, {"image": NOISE}]
    query = {"text": "a card"}
    expected = engine.model.match([query] * 3, inputs)
    body = {"query": "a card", "documents": documents, "return_documents": True}
    for path in ("/v1/rerank", "/v2/rerank"):
        results = client.post(path, json=body).json()["results"]
        assert [r["index"] for r in results] == np.argsort(-expected, kind="stable").tolist()
        assert [r["relevance_score"] for r in results] == pytest.approx(
            sorted(expected.tolist(), reverse=True), abs=1e-5
        )
    assert {r["document"]["text"] for r in results} == {"a red card", "a blue card", ""}
    assert len(client.post("/v1/rerank", json=body | {"top_n": 1}).json()["results"]) == 1


def test_search_is_that_of_the_index(client, engine):
    body = {
        "text": "a red card",
        "image": data_url(file_of(NOISE)),
        "top": 4,
        "rerank": "feat:4,raw:2",
    }
    hits = client.post("/v1/search", json=body).json()["hits"]
    expected = engine.index.search(
        {"text": "a red card", "image": NOISE}, 4, rerank="feat:4,raw:2"
    )
    assert [(h["id"], h["by"], h["first_rank"]) for h in hits] == [
        (h.id, h.by, h.first_rank) for h in expected
    ]
    assert hits[0]["has_picture"]
    plain = client.post("/v1/search", json={"text": "a", "instruction": ""}).json()
    assert plain["instruction"] == ""
    instructed = client.post("/v1/search", json={"text": "a", "instruction": "Find: "}).json()
    assert instructed["instruction"] == "Find:"
    expected = engine.index.search("Find: a", instruction="")
    assert [h["score"] for h in instructed["hits"]] == pytest.approx([h.score for h in expected])
    for instruction in ("Find:\n", "  Find: "):  # encoded as it is, answered without the blanks
        body = {"text": "a", "instruction": instruction, "mode": "vector"}
        instructed = client.post("/v1/search", json=body).json()
        expected = engine.index.search("a", instruction=instruction, mode="vector")
        assert instructed["instruction"] == "Find:"
        assert [h["score"] for h in instructed["hits"]] == pytest.approx(
            [h.score for h in expected], abs=1e-5
        )
    filtered = {"text": "a card", "filter": "year = 2003"}
    hits = client.post("/v1/search", json=filtered).json()["hits"]
    assert [(h["id"], h["metadata"]) for h in hits] == [("white.png", {"year": 2003.0})]
    for bad_body, message in (
        ({"text": "a", "filter": "yeer = 3"}, "The columns are id, text, path, year"),
        ({"text": "a", "filter": "id = $1"}, "'$' cannot be used"),
        ({"text": "a", "filter": "?"}, "'?' cannot be used"),
        ({"text": "a", "filter": "1" + "+1" * 900 + ">0"}, "a value alone"),
        ({"text": "a", "filter": "lpad('a',2147483647)='b'"}, "calls a function"),
        ({"text": "a", "rerank": "raw:x"}, "write STAGE:COUNT"),
        ({"text": " "}, "no query"),
    ):
        response = client.post("/v1/search", json=bad_body)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


def test_pictures_and_attention(client):
    response = client.get("/v1/documents/red.png/picture?edge=16")
    picture = Image.open(io.BytesIO(response.content))
    assert response.headers["content-type"] == "image/jpeg"
    assert max(picture.size) == 16
    assert client.get("/v1/documents/..%2f..%2fetc%2fpasswd/picture").status_code == 404
    maps = client.post("/v1/attention", json={"id": "red.png"}).json()
    assert maps["together"].startswith("data:image/png;base64,")
    assert len(maps["tokens"]) == 4
    assert (
        client.post("/v1/attention", json={"image": data_url(file_of(NOISE))}).status_code == 200
    )
    assert client.post("/v1/attention", json={"text": "no picture"}).status_code == 400
    assert set(client.get("/v1/examples").json()) <= {f"a {c} card" for c in COLOURS}


def test_an_input_too_long_for_attention_maps_is_refused(engine, monkeypatch):
    monkeypatch.setattr("rematch.interpretability.MOST_BYTES", 1 << 10)
    with pytest.raises(RematchError, match="use a smaller picture"):
        attention_maps(engine.model, Image.new("RGB", (96, 96)))


def test_attention_maps_of_several_pictures_show_the_first(client, engine, monkeypatch):
    for count in (1, 4, 8):  # 4 · 36 tokens are a square number too
        document = {"text": "a clip", "image": [NOISE] * count}
        assert attention_maps(engine.model, document).shape == (4, 6, 6)
        monkeypatch.setattr(engine, "document", lambda _, value=document: value)
        assert client.post("/v1/attention", json={"id": "clip"}).status_code == 200
    reader = engine.model.backbone.reader
    tiles = replace(reader.read(NOISE), vision={"pixel_values": torch.zeros(1, 5, 3, 96, 96)})
    monkeypatch.setattr(reader, "read", lambda _: tiles)
    response = client.post("/v1/attention", json={"id": "clip"})
    assert response.status_code == 400
    assert "36 tokens form no grid" in response.json()["error"]["message"]


def test_models_status_and_metrics(client, engine, saved_model):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["dimensions"], card["documents"]) == (32, 6)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    metrics = client.get("/metrics").text
    assert 'rematch_requests_total{path="/v1/models",status="200"}' in metrics
    assert "passwd" not in metrics
    with TestClient(create_app(Engine(str(saved_model)))) as without_index:
        assert without_index.post("/v1/search", json={"text": "a"}).status_code == 404
        assert without_index.get("/").status_code == 404
        assert without_index.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_the_committed_openapi_is_up_to_date(client):
    path = ROOT / "docs/openapi.json"
    assert json.loads(path.read_text()) == client.get("/openapi.json").json(), (
        "run scripts/openapi.py"
    )
