"""Search by words, and by words and vectors together."""

import json
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_search import build_index, save_picture

from rematch.errors import DataError
from rematch.search import index as index_module
from rematch.search.columns import WORDS
from rematch.search.index import Index
from rematch.search.retrieval import Retrieval, words_of

DOCUMENTS = [
    {"id": "fox", "text": "A red fox in the snow", "year": 1990},
    {"id": "owl", "text": "An owl", "title": "Night birds", "year": 2001},
    {"id": "car", "text": "A red car", "title": "Sports", "year": 2010},
    {"id": "sea", "text": "The blue sea", "year": 2010},
    {"id": "plain", "text": "Nothing of interest", "wet": True},
]


def write(path, documents):
    """Write a corpus."""
    path.write_text("\n".join(map(json.dumps, documents)))


@pytest.fixture(scope="module")
def animals(searcher, tmp_path_factory):
    """An index of documents with words and metadata."""
    folder = tmp_path_factory.mktemp("animals")
    write(folder / "c.jsonl", DOCUMENTS)
    return build_index(searcher, folder / "c.jsonl", folder / "i")[0]


def test_words_of_text_and_metadata_are_searched(animals):
    hits = animals.search("birds of the night", mode="text")
    assert [hit.id for hit in hits] == ["owl"]
    assert (hits.mode, hits[0].by, hits[0].text_rank, hits[0].vector_rank) == (
        "text", "bm25", 1, 0,
    )  # fmt: skip
    assert [hit.id for hit in animals.search("red foxes", mode="text")] == ["fox", "car"]
    assert animals.search("zebra", mode="text") == []
    assert "_words" not in animals.metadata_columns


def test_a_search_by_words_loads_no_model(animals, monkeypatch):
    expected = animals.search("red fox", mode="text")
    monkeypatch.setattr(index_module, "ReMatch", Mock(side_effect=AssertionError("loaded")))
    index = Index.open(animals.uri)
    assert index.search("red fox", mode="text") == expected
    with pytest.raises(AssertionError, match="loaded"):
        index.search("red fox", mode="text", rerank="raw:1")


def test_filters_apply_to_words(animals):
    for mode in ("text", "hybrid"):
        hits = animals.search("red", filter="year > 2000", mode=mode)
        assert {hit.id for hit in hits} <= {"owl", "car", "sea"}
        assert hits[0].id == "car"
    with pytest.raises(DataError, match="_words is not a column"):
        animals.search("red", filter="_words = 'red'", mode="text")


def test_the_mode_follows_query_and_index(animals, searcher, tmp_path):
    picture = save_picture(tmp_path / "pictures" / "p.png", 1)
    assert animals.search("red").mode == "hybrid"
    assert animals.search(picture).mode == "vector"
    assert animals.search({"text": "red", "image": picture}).mode == "vector"
    assert animals.search({"text": "red", "image": picture}, mode="hybrid").mode == "hybrid"
    without_words, _ = build_index(searcher, tmp_path / "pictures", tmp_path / "i")
    assert without_words.search("red").mode == "vector"
    with pytest.raises(DataError, match=r"no full-text index.*rematch index"):
        without_words.search("red", mode="hybrid")
    with pytest.raises(DataError, match="the query has no words"):
        animals.search(picture, mode="text")
    with pytest.raises(DataError, match="--mode word is unknown; choose auto, vector"):
        animals.search("red", mode="word")


def test_hybrid_is_the_sum_of_reciprocal_ranks(searcher, tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = np.array(["fox", "owl", "red", "blue", "tree", "house", "snow"])
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 5))) for _ in range(200)]
    write(tmp_path / "c.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    index, _ = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    for query in ("red fox", "owl tree snow", "blue"):
        by_vector = [hit.id for hit in index.search(query, 200, mode="vector")]
        by_text = index.search(query, 200, mode="text")
        by_text = [hit.id for hit in by_text if hit.score >= by_text[0].score / 2]
        expected = {}
        for ranking in (by_vector, by_text):
            for place, document in enumerate(ranking, 1):
                expected[document] = expected.get(document, 0) + 1 / (5 + place)
        hits = index.search(query, 200, mode="hybrid")
        assert {hit.id: hit.score for hit in hits} == pytest.approx(expected)
        keys = [(-round(hit.score, 6), hit.text_rank or 1000) for hit in hits]
        assert keys == sorted(keys)
        for hit in hits:
            assert hit.vector_rank == (by_vector.index(hit.id) + 1 if hit.id in by_vector else 0)
            assert hit.text_rank == (by_text.index(hit.id) + 1 if hit.id in by_text else 0)
        assert index.search(query, 7) == index.search(query, 100)[:7]


def test_reranking_begins_with_both_rankings(animals):
    hits = animals.search("a red car", 5, rerank="feat:3")
    first = {hit.id: place for place, hit in enumerate(animals.search("a red car", 5), 1)}
    assert {hit.id: hit.first_rank for hit in hits} == first
    assert [hit.by for hit in hits] == ["feat-feat"] * 3 + ["rrf"] * 2
    assert animals.search("a red car", rerank="feat:2", mode="text")[0].by == "feat-feat"


def test_words_follow_updates_and_deletions(searcher, tmp_path):
    write(tmp_path / "c.jsonl", DOCUMENTS)
    build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    changed = [{"id": "fox", "text": "A green frog"}, *DOCUMENTS[2:], {"id": "n", "text": "zebra"}]
    write(tmp_path / "c.jsonl", changed)
    index, _ = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")

    def ids(query):
        return [hit.id for hit in index.search(query, mode="text")]

    assert (ids("fox"), ids("frog"), ids("zebra"), ids("owl")) == ([], ["fox"], ["n"], [])
    statistics = index.table.index_stats("_words_idx")
    assert statistics.num_unindexed_rows == 0
    index.delete(["n"])
    assert ids("zebra") == []


def test_an_index_without_words_gets_them_by_the_next_run(searcher, tmp_path):
    """Both one of an earlier version, and one whose run was killed before the end."""
    write(tmp_path / "c.jsonl", DOCUMENTS)
    index, _ = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    expected = sorted(index.table.search().to_arrow()[WORDS].to_pylist())
    index.table.drop_index("_words_idx")
    with pytest.raises(DataError, match="full-text"):
        Index.open(tmp_path / "i", searcher).search("red", mode="text")
    index, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.encoded == 0
    assert index.search("red", mode="text")
    index.table.drop_index("_words_idx")
    index.table.drop_columns([WORDS])
    old = Index.open(tmp_path / "i", searcher)
    assert old.search("red").mode == "vector"
    index, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.encoded == 0
    assert sorted(index.table.search().to_arrow()[WORDS].to_pylist()) == expected
    assert [hit.id for hit in index.search("birds", mode="text")] == ["owl"]


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_is_words(animals, text):
    retrieval = Retrieval(animals.table, animals.uri, 5, ["id"])
    assert isinstance(retrieval.by_text(text).rows, pa.Table)


@pytest.mark.parametrize("text", ['"red', "red AND (", "*", "red:", "\0", "a" * 100_000, "+-!~"])
def test_query_syntax_is_text(animals, text):
    assert animals.search(text, mode="text") is not None


def test_words_are_what_is_text():
    assert words_of("", {"a": True, "b": 2.0, "c": None, "d": "x"}) == "x"
