"""An index: whose model it belongs to, exact and approximate search, filters, versions."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shared_search import (
    NAMES,
    ROUNDING,
    assert_best,
    build_index,
    contents,
    library_inputs,
    save_picture,
    scores_of,
)

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.data.instructions import instruction_table, with_instruction
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, ModelError, RematchError
from rematch.prompts import QUERY_INSTRUCTIONS
from rematch.search import index as index_module
from rematch.search.approximate import EXACT_UP_TO
from rematch.search.build import build
from rematch.search.index import Index
from rematch.search.retrieval import Retrieval
from rematch.search.schema import settings_of


def test_another_models_index_is_refused(searcher, saved_model, photos, tmp_path, make_model):
    build_index(searcher, photos, tmp_path / "i")
    torch.manual_seed(5)
    other = make_model(dtype=torch.float32, num_tokens=3)
    with pytest.raises(ModelError, match="made by another model"):
        Index.open(tmp_path / "i", other)
    Index.open(
        tmp_path / "i", ReMatch(str(saved_model)).to(torch.bfloat16)
    )  # the same weights in another precision
    with pytest.raises(DataError, match="no index there"):
        Index.open(tmp_path)


def test_an_index_of_an_earlier_version_is_refused_as_such(
    searcher, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        index_module, "model_fingerprint", lambda _: "0123456789abcdef" * 2
    )  # as they were
    build_index(searcher, photos, tmp_path / "i")
    monkeypatch.undo()
    with pytest.raises(
        ModelError, match=r"made by an earlier version of rematch.*another --output"
    ):
        build_index(searcher, photos, tmp_path / "i")


def test_an_index_of_a_model_with_another_configuration_is_refused(
    searcher, saved_model, photos, tmp_path
):
    build_index(searcher, photos, tmp_path / "i")
    other = ReMatch(str(saved_model))
    other.backbone.model.config.text_config.rope_parameters = {
        "rope_theta": 5e5,
        "rope_type": "default",
    }
    with pytest.raises(ModelError, match="made by another model"):
        Index.open(tmp_path / "i", other)


def test_a_models_truncate_dim_is_the_indexs_width(searcher, saved_model, photos, tmp_path):
    short = ReMatch(str(saved_model), truncate_dim=8)
    index, _ = build_index(short, photos, tmp_path / "short", tokens=True)
    same, _ = build_index(searcher, photos, tmp_path / "same", tokens=True, dimensions=8)
    assert index.settings.dimensions == 8
    assert scores_of(index.search("a", 9, mode="vector")) == pytest.approx(
        scores_of(same.search("a", 9, mode="vector")), abs=ROUNDING
    )
    tokens = [scores_of(i.search("a", 9, rerank="maxsim:9")) for i in (index, same)]
    assert tokens[0] == pytest.approx(tokens[1], abs=1e-3)
    with pytest.raises(RematchError, match="reads whole vectors only"):
        index.search("a", rerank="feat:3")
    build_index(searcher, photos, tmp_path / "whole")
    with pytest.raises(ModelError, match="has 32 dimensions, but the model has truncate_dim=8"):
        Index.open(tmp_path / "whole", short)


def test_search_is_exact_for_text_pictures_and_both(searcher, library, tmp_path):
    vectors = searcher.encode_document(library_inputs(library), show_progress_bar=False)
    path = save_picture(tmp_path / "q.png", 500)
    queries = ["number 3", path, {"text": "like this", "image": path}]
    for query, hits in zip(queries, library.search(queries, 7, mode="vector"), strict=True):
        instructed = with_instruction(query, library.instruction(query))
        cosines = vectors @ searcher.encode_query([instructed], show_progress_bar=False)[0]
        for results in (hits, library.search(query, 7, mode="vector")):  # with others, and alone
            assert len(results) == 7
            assert_best(
                scores_of(results), {f"d{i}": cosine for i, cosine in enumerate(cosines)}, ROUNDING
            )
    hit = library.search("number 3", 40, mode="vector")[0]
    assert hit.metadata.keys() == {"year"}
    assert hit.by == "cosine"


def test_a_search_puts_an_instruction_before_the_query(searcher, library, tmp_path):
    picture = tmp_path / "q.png"
    save_picture(picture, 77)
    queries = ["number 7", {"image": picture}, {"text": "brighter", "image": picture}]
    texts = [
        "Find me an everyday image that matches the given caption: number 7",
        "Find a day-to-day image that looks similar to the provided image.",
        "Given an image, find a similar everyday image with the described changes: brighter",
    ]
    plain = [{"text": texts[0]}, *({"text": text, "image": picture} for text in texts[1:])]
    for rerank in ("", "raw:5"):
        for hits, expected in zip(
            library.search(queries, 5, rerank=rerank, mode="vector"),
            library.search(plain, 5, rerank=rerank, instruction="", mode="vector"),
            strict=True,
        ):
            assert hits == expected
            assert hits.instruction
            assert not expected.instruction
    assert library.search("number 7", instruction="Find:") == library.search(
        "Find: number 7", instruction=""
    )


def test_the_model_and_the_corpus_replace_instructions(searcher, tmp_path):
    save_picture(tmp_path / "pictures" / "a.png", 1)
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n')
    table = {"text-image": "Find a photo: "}
    index = Index.create(tmp_path / "i", searcher, name="model", instructions=table)
    build(index, open_corpus(tmp_path / "pictures"), Encoder(searcher, workers=0))
    assert index.instruction("a dog") == "Find a photo: "
    assert Index.open(tmp_path / "i", searcher).instruction("a dog") == "Find a photo: "
    searcher.prompts["text-text"] = "Find a word: "
    try:
        texts, _ = build_index(searcher, tmp_path / "texts.jsonl", tmp_path / "t")
    finally:
        del searcher.prompts["text-text"]
    assert texts.instruction("a dog") == "Find a word: "
    assert texts.instruction({"image": tmp_path}) == QUERY_INSTRUCTIONS["image-text"]


def test_an_index_of_an_earlier_version_has_the_usual_instructions(searcher, library):
    schema = library.table.schema
    settings = json.loads(schema.metadata[b"rematch"])
    del settings["instructions"]
    old = settings_of(schema.with_metadata({b"rematch": json.dumps(settings)}), "old")
    assert instruction_table(old.instructions) == QUERY_INSTRUCTIONS


def test_filters_apply_before_the_search(library):
    hits = library.search("number 3", 40, filter="year >= 2000 AND year < 2005")
    assert {hit.id for hit in hits} == {f"d{i}" for i in range(20, 25)}
    with pytest.raises(DataError, match=r"yeer is not a column.*columns are id, text, path, year"):
        library.search("number 3", filter="yeer > 1")


def test_fewer_dimensions_and_pictures_out_of_a_data_set(searcher, tmp_path):
    content = save_picture(tmp_path / "a.png", 1).read_bytes()
    (tmp_path / "a.png").unlink()
    table = pa.table({"image": [{"bytes": content, "path": None}] * 2, "text": ["one", "two"]})
    pq.write_table(table, tmp_path / "c.parquet")
    index, _ = build_index(searcher, tmp_path / "c.parquet", tmp_path / "i", dimensions=8)
    whole = searcher.encode_document(
        [d.load_input() for d in open_corpus(tmp_path / "c.parquet")], show_progress_bar=False
    )
    short = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    rows = contents(tmp_path / "i")
    assert np.allclose([row["vector"] for row in rows], short, atol=ROUNDING)
    hits = index.search(
        "one", 2, rerank="raw:2", instruction=""
    )  # the picture comes from the index
    inputs = [d.load_input() for d in open_corpus(tmp_path / "c.parquet")]
    assert sorted(hit.score for hit in hits) == pytest.approx(
        sorted(searcher.match(["one"] * 2, inputs).tolist()), abs=ROUNDING
    )
    with pytest.raises(DataError, match="--dimensions 64: the model's vectors have only 32"):
        Index.create(tmp_path / "j", searcher, name="m", dimensions=64)


def bytes_read() -> int:
    """What this process has read from files so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_few_of_the_stored_pictures_are_read_to_know_which_documents_have_one(searcher, tmp_path):
    index = Index.create(tmp_path / "i", searcher, name="m")
    size = 50_000
    pictures = np.random.default_rng(0)
    index.add(
        [
            {
                "id": str(i),
                "vector": np.eye(32)[i % 32],
                "text": "" if i % 4 == 3 else "words",
                "image": pictures.bytes(size) if i % 4 else None,
                "content_hash": "0" * 32,
                "stamp": i,
            }
            for i in range(400)
        ],
        new=True,
    )
    before = bytes_read()
    assert index.with_stored_picture(["0", "1", "2", "4", "no such"]) == {"1", "2"}
    assert bytes_read() - before < 20 * size
    before = bytes_read()
    assert index.instruction("a query") == QUERY_INSTRUCTIONS["text-image"]
    assert bytes_read() - before < 100 * size


def test_deleting_versions_and_compaction(searcher, photos, tmp_path):
    index, _ = build_index(searcher, photos, tmp_path / "i")
    before = index.versions()[-1]["version"]
    index.delete(["deep/it's.png", "deep/new\nline.png"])
    assert len(index) == len(NAMES) - 1
    assert len(Index.open(tmp_path / "i", searcher, version=before)) == len(NAMES) + 1
    index.restore(before)
    assert len(Index.open(tmp_path / "i")) == len(NAMES) + 1
    index.compact()
    assert len(index.search("a", 20)) == len(NAMES) + 1
    with pytest.raises(DataError, match="has no version 999"):
        Index.open(tmp_path / "i", version=999)


@pytest.mark.parametrize("kind", ["float", "int8", "binary", "pq", "hnsw"])
def test_an_approximate_index_finds_nearly_what_a_scan_finds(searcher, tmp_path, kind):
    """On vectors of many clusters; the scan is the truth."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32))
    vectors = centres[rng.integers(0, 40, 3000)] + 0.5 * rng.normal(size=(3000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = Index.create(tmp_path / "i", searcher, name="m")
    rows = [
        {"id": str(i), "vector": v, "content_hash": "0" * 32, "stamp": i}
        for i, v in enumerate(vectors)
    ]
    index.add(rows, new=True)
    assert index.build_ann("auto") == "none", f"below {EXACT_UP_TO} rows a scan is enough"
    index.build_ann(kind)
    assert index.ann == kind
    queries = vectors[:40] + 0.1 * rng.normal(size=(40, 32)).astype(np.float32)
    approximate = [index.nearest(q, 10)["id"].to_pylist() for q in queries]
    truth = [index.nearest(q, 10, exact=True)["id"].to_pylist() for q in queries]
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ vectors.T
    assert len(truth[0]) == 10
    best = {name: cosines[0][int(name)] for name in truth[0]}
    assert_best(
        best, {str(i): cosine for i, cosine in enumerate(cosines[0])}, 32 * 2**-24
    )  # sums of 32 products
    assert (
        np.mean([len(set(a) & set(b)) / 10 for a, b in zip(approximate, truth, strict=True)]) > 0.9
    )
    with pytest.raises(DataError, match="--ann ivf is unknown"):
        index.build_ann("ivf")


def test_an_approximate_search_scores_a_hundred_again_at_least(searcher, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "i", searcher, name="m")
    read, rescored = Retrieval._read, []

    def count_rescored(self, request, count, score):
        rescored.append(count * request.limit(count).to_query_object().refine_factor)
        return read(self, request, count, score)

    monkeypatch.setattr(Retrieval, "_read", count_rescored)
    for count in (1, 3, 10, 50):
        index.nearest(np.ones(32, np.float32), count)
    assert rescored == [100, 102, 100, 500]


def test_another_kind_replaces_an_approximate_index_and_none_drops_it(searcher, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    index = Index.create(tmp_path / "i", searcher, name="m")
    index.add(
        [
            {"id": str(i), "vector": v, "content_hash": "0" * 32, "stamp": i}
            for i, v in enumerate(vectors)
        ],
        new=True,
    )
    (tmp_path / "c.jsonl").write_text('{"id": "new", "text": "a"}')
    for requested, kind in (
        ("int8", "int8"),
        ("auto", "int8"),
        ("float", "float"),
        ("none", "none"),
        ("auto", "none"),
    ):
        index, _ = build_index(
            searcher, tmp_path / "c.jsonl", tmp_path / "i", keep=True, ann=requested
        )
        assert index.ann == Index.open(tmp_path / "i").ann == kind
        assert len(index.table.list_indices()) == 1 + (kind != "none")  # and that of words
    plan = index.table.search(vectors[0], vector_column_name="vector").explain_plan()
    assert "ANN" not in plan, "searches are exact again"
    assert index.nearest(vectors[0], 1, probes=1)["id"].to_pylist() == ["0"]
