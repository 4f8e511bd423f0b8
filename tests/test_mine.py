"""Mining: what is dropped and why, resuming, and an output that training reads."""

import json

import numpy as np
import pytest
from PIL import Image

from rematch.data.pairs import read_triplets
from rematch.errors import DataError
from rematch.train import mine as module
from rematch.train.mine import Rules, mine


@pytest.fixture
def data(tmp_path):
    """Five queries as text, picture and both; one has two positives; positives repeat; a corpus with a twin file."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{i}.png")
    Image.new("RGB", (40, 30), "red").save(folder / "twin of 0.png")
    rows = [
        {"query": "a card", "positive": "0.png"},
        {"query": "a card", "positive": "1.png"},
        {"query": {"image": "2.png"}, "positive": "a cat", "negative": "a dog"},
        {"query": {"text": "which", "image": "3.png"}, "positive": {"text": "both", "image": "4.png"}},
        {"query": "a cat", "positive": "twin of 0.png"},
        {"query": "the last", "positive": "a cat"},
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def judged(model, monkeypatch):
    """A model whose P(yes) is by the document: as told here, else 0.1; right answers have 0.9."""
    said = {"a dog": 0.6, "2.png": 0.45}
    right = {"0.png", "1.png", "twin of 0.png", "a cat", "both"}

    def name(document):
        return document["text"].split(": ")[-1] if "image" not in document else str(document["image"]).split("/")[-1]

    def match(queries, documents, views):
        names = [name(d) if "both" not in d.get("text", "") else "both" for d in documents]
        return np.array([said.get(n, 0.9 if n in right else 0.1) for n in names], np.float32)

    monkeypatch.setattr(model, "match", match)
    return model


def run(model, data, output, **options):
    return mine(
        model,
        data,
        output,
        Rules(**({"negatives": 2, "candidates": 20, "margin": 0.1, "views": "raw-raw"} | options)),
        corpus=data.parent,
    )


def test_everything_is_accounted_for(judged, data, tmp_path):
    output = tmp_path / "out" / "mined.jsonl"
    output.parent.mkdir()
    report = run(judged, data, output)
    # six positives and a negative in the data, six pictures in the folder; 0 and its twin are one, so are the cats
    assert (report["queries"], report["documents"], report["duplicates_in_the_corpus"]) == (5, 8, 5)
    counts = report["candidates"]
    assert sum(counts.values()) == 5 * 8
    assert counts["positive"] == 6
    assert counts["query"] == 2  # the pictures that are asked with, and the text "a cat" against itself
    assert counts["kept"] == report["negatives"]
    assert not (tmp_path / "out" / "mined.jsonl.partial").exists()
    page = output.with_suffix(".html").read_text()
    assert f"{counts['yes']} candidates false negative: the matching head says Yes" in page
    assert page.count("data:image/png") > 5
    assert json.loads(output.with_suffix(".json").read_text()) == report


def test_false_negatives_are_dropped_and_the_hardest_of_the_others_kept(judged, data, tmp_path):
    output = tmp_path / "mined.jsonl"
    run(judged, data, output, negatives=1, margin=0.5)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    texts = [json.dumps(row["negative"]) for row in rows]
    assert not any("a dog" in text for text in texts)  # P(yes) 0.6
    assert not any("2.png" in text for text in texts)  # 0.45 is less than 0.5 below 0.9
    for row in rows:
        assert row["p_yes"] < 0.5
        assert row["p_yes"] <= row["positive_p_yes"] - 0.5
    assert len({json.dumps(row["query"]) for row in rows}) == len(rows)  # one negative a query
    triplets = read_triplets(output)  # it is training data, paths and all
    assert len(triplets) == len(rows)
    assert all(triplet.negative for triplet in triplets)


def test_a_cut_off_run_goes_on_and_ends_like_an_undisturbed_one(judged, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(module, "INPUTS_AT_ONCE", 3)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(judged, data, whole)
    asked = []
    match = judged.match

    def dies(queries, documents, views):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(queries))
        return match(queries, documents, views)

    monkeypatch.setattr(judged, "match", dies)
    with pytest.raises(KeyboardInterrupt):
        run(judged, data, cut)
    assert not cut.exists()
    monkeypatch.setattr(judged, "match", match)
    monkeypatch.setattr(judged, "encode_document", None)  # nothing is encoded again
    monkeypatch.setattr(judged, "encode_query", None)
    run(judged, data, cut)
    assert cut.read_text() == whole.read_text()


def test_unfinished_work_of_another_run_is_not_mixed_in(judged, data, tmp_path, monkeypatch):
    output = tmp_path / "mined.jsonl"
    monkeypatch.setattr(module, "_write", lambda *_: None)
    run(judged, data, output)
    with pytest.raises(DataError, match="unfinished work of another run"):
        run(judged, data, output, negatives=3)


def test_feature_views_read_vectors_alone(model, data, tmp_path):
    output = tmp_path / "mined.jsonl"
    report = run(model, data, output, views="feat-feat", yes=1.0, margin=0.0)
    assert report["queries"] == 5
    row = json.loads(output.read_text().splitlines()[0]) if report["negatives"] else None
    assert row is None or {"cosine", "p_yes", "positive_p_yes"} < row.keys()


def test_output_that_exists_or_is_no_jsonl_is_refused(model, data, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        run(model, data, data)
    with pytest.raises(DataError, match=r"ending \.jsonl"):
        run(model, data, tmp_path / "mined.csv")
