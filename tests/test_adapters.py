"""An index as a retriever of LangChain and LlamaIndex."""

import pytest
from shared_search import save_picture


def test_langchain_and_llama_index_retrieve(library, tmp_path):
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import QueryBundle

    from rematch.search.langchain import ReMatchRetriever as LangChainRetriever
    from rematch.search.llama_index import ReMatchRetriever as LlamaIndexRetriever

    hits = library.search("number 3", 4, filter="year > 1990", rerank="feat:4")
    settings = {"top": 4, "filter": "year > 1990", "rerank": "feat:4"}
    documents = LangChainRetriever(index=library, **settings).invoke("number 3")
    assert [d.id for d in documents] == [hit.id for hit in hits]
    assert documents[0].metadata["score"] == pytest.approx(hits[0].score)
    assert documents[0].page_content == hits[0].text
    nodes = LlamaIndexRetriever(library, **settings).retrieve("number 3")
    assert [n.node.node_id for n in nodes] == [hit.id for hit in hits]
    path = save_picture(tmp_path / "q.png", 9)
    nodes = LlamaIndexRetriever(library, top=3).retrieve(
        QueryBundle("like this", image_path=str(path))
    )
    assert [n.node.node_id for n in nodes] == [
        h.id for h in library.search({"text": "like this", "image": path}, 3)
    ]
