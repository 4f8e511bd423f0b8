"""The API works with other projects' clients."""

import numpy as np
import pytest
from shared_server import card_engine, running

from rematch.serve.engine import Engine


@pytest.fixture(scope="module")
def engine(saved_model, tmp_path_factory) -> Engine:
    return card_engine(saved_model, tmp_path_factory.mktemp("served"))


def test_the_openai_client(engine):
    openai = pytest.importorskip("openai")
    with (
        running(engine, keys=["secret"]) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as refused_client,
    ):
        response = client.embeddings.create(model="any", input=["a dog", "a cat"])
        expected = engine.model.encode_document(
            [{"text": "a dog"}, {"text": "a cat"}], show_progress_bar=False
        )
        assert np.allclose([d.embedding for d in response.data], expected, atol=1e-5)
        query = client.embeddings.create(
            model="any", input="a dog", dimensions=8, extra_body={"task": "query"}
        )
        assert len(query.data[0].embedding) == 8
        assert [m.id for m in client.models.list().data] == [engine.name]
        with pytest.raises(openai.AuthenticationError):
            refused_client.models.list()
        with pytest.raises(openai.BadRequestError, match="empty list"):
            client.embeddings.create(model="any", input=[])


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_the_cohere_client(engine, version):
    cohere = pytest.importorskip("cohere")
    documents = ["a red card", "a blue card", "nothing"]
    expected = engine.model.match([{"text": "a card"}] * 3, [{"text": d} for d in documents])
    order = np.argsort(-expected, kind="stable")
    with (
        running(engine, keys=["secret"]) as address,
        getattr(cohere, version)("secret", base_url=address) as client,
    ):
        response = client.rerank(model="any", query="a card", documents=documents, top_n=2)
    assert [r.index for r in response.results] == order[:2].tolist()
    assert response.results[0].relevance_score == pytest.approx(expected.max(), abs=1e-5)
