"""Mining: what is dropped and why, resuming, and an output that training reads."""

import json
from dataclasses import replace
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rematch.data.images import CheckedPicture, EncodedPicture, ZippedPicture, load_image
from rematch.data.schema import Item
from rematch.data.triplets import load_triplets
from rematch.encoding.inputs import inspect_picture
from rematch.errors import DataError, ImageError
from rematch.matching import View
from rematch.train import mine as module
from rematch.train.candidates import Rules
from rematch.train.mine import _content_key, mine
from rematch.train.mine_output import _cell
from rematch.train.recipe import load_recipe
from rematch.train.sources import build_dataset

RULES = Rules(negatives=2, candidates=20, margin=0.1, view=View.RAW_RAW)


@pytest.fixture
def data(tmp_path):
    """Five queries: text, picture, or both; one has two positives, one picture is there twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{i}.png")
    Image.new("RGB", (40, 30), "red").save(folder / "twin of 0.png")
    rows = [
        {"query": "a card", "positive": "0.png"},
        {"query": "a card", "positive": "1.png"},
        {"query": {"image": "2.png"}, "positive": "a cat", "negative": "a dog"},
        {
            "query": {"text": "which", "image": "3.png"},
            "positive": {"text": "both", "image": "4.png"},
        },
        {"query": "a cat", "positive": "twin of 0.png"},
        {"query": "the last", "positive": "a cat"},
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def judged(model, monkeypatch):
    """A model whose P(yes) depends on the document: 0.9 for positives, as listed, or 0.1."""
    p_yes = {"a dog": 0.6, "2.png": 0.45}
    p_yes |= dict.fromkeys(("0.png", "1.png", "twin of 0.png", "a cat", "both"), 0.9)

    def name(document):
        if "both" in document.get("text", ""):
            return "both"
        if "image" in document:
            return str(document["image"]).split("/")[-1]
        return document["text"].split(": ")[-1]

    def score_lists(queries, document_lists, view):
        lists = [np.array([p_yes.get(name(d), 0.1) for d in ds]) for ds in document_lists]
        return [np.log(values / (1 - values)).astype(np.float32) for values in lists]

    monkeypatch.setattr(model, "score_lists", score_lists)
    return model


def run(model, data, output, **options):
    return mine(model, data, output, replace(RULES, **options), corpus=data.parent)


def test_everything_is_accounted_for(judged, data, tmp_path):
    output = tmp_path / "out" / "mined.jsonl"
    output.parent.mkdir()
    report = run(judged, data, output)
    # 6 positives and a negative in the data, 6 pictures in the folder; two pictures are the same,
    # and so are the cats
    assert (report["queries"], report["documents"]) == (5, 8)
    assert report["duplicates_in_the_corpus"] == 5
    assert report["rules"]["views"] == "raw-raw"
    counts = report["candidates"]
    assert sum(counts.values()) == 5 * 8
    assert counts["positive"] == 6
    assert counts["query"] == 2  # the picture of one query, and the text "a cat"
    assert counts["kept"] == report["negatives"]
    assert not (tmp_path / "out" / "mined.jsonl.partial").exists()
    page = output.with_suffix(".html").read_text()
    assert (
        f"{counts['yes']} candidates dropped as false negatives: the matching head says Yes"
        in page
    )
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
    pairs = {json.dumps([row["query"], row["negative"]]) for row in rows}
    assert len(pairs) == len({json.dumps(row["query"]) for row in rows})  # one negative a query
    triplets = load_triplets(output)  # it is training data, paths and all
    assert len(triplets) == len(rows)
    assert all(triplet.negative for triplet in triplets)


@pytest.mark.parametrize(("negatives", "rows"), [(1, 2), (3, 3)])
def test_each_positive_of_a_query_has_a_row(judged, data, tmp_path, negatives, rows):
    output = tmp_path / "mined.jsonl"
    report = run(judged, data, output, negatives=negatives)
    triplets = [t for t in load_triplets(output) if t.query.text == "a card"]
    positives = [triplet.positive.image.name for triplet in triplets]
    assert positives == ["0.png", "1.png", "0.png"][:rows]
    assert len({_content_key(t.negative) for t in triplets}) == negatives
    assert report["negatives"] == report["candidates"]["kept"]


@pytest.mark.parametrize("stage", ["encoding documents", "judging"])
def test_an_interrupted_run_resumes_and_ends_like_an_uninterrupted_one(
    judged, data, tmp_path, monkeypatch, stage
):
    """It is interrupted after the queries have been encoded, or the first block judged."""
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 2)
    uninterrupted, interrupted = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(judged, data, uninterrupted)

    def interrupt(name, completed, total):
        if name == stage and completed == (2 if stage == "judging" else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(judged, data, interrupted, RULES, data.parent, interrupt)
    assert not interrupted.exists()
    embed, score_lists = judged.forward, judged.score_lists
    tasks, judged_queries = [], []

    def counting_forward(features, task, **options):
        tasks.append(task)
        return embed(features, task=task, **options)

    def counting_score_lists(queries, document_lists, view):
        judged_queries.extend(queries)
        return score_lists(queries, document_lists, view)

    monkeypatch.setattr(judged, "forward", counting_forward)
    monkeypatch.setattr(judged, "score_lists", counting_score_lists)
    run(judged, data, interrupted)
    assert set(tasks) == ({"document"} if stage == "encoding documents" else set())
    assert len(judged_queries) == (5 if stage == "encoding documents" else 3)
    for suffix in (".jsonl", ".json", ".html"):
        contents = [path.with_suffix(suffix).read_text() for path in (uninterrupted, interrupted)]
        assert contents[0] == contents[1]


def test_an_unfinished_run_with_other_rules_is_refused(judged, data, tmp_path, monkeypatch):
    output = tmp_path / "mined.jsonl"
    monkeypatch.setattr(module, "write_output", lambda *_: None)
    run(judged, data, output)
    with pytest.raises(DataError, match="holds an unfinished run with another model"):
        run(judged, data, output, negatives=3)


@pytest.mark.parametrize("part", ["projector", "token rows", "matching", "joint", "configuration"])
def test_an_unfinished_run_with_another_model_is_refused(
    judged, data, tmp_path, monkeypatch, part
):
    output = tmp_path / "mined.jsonl"
    monkeypatch.setattr(module, "write_output", lambda *_: None)
    run(judged, data, output)
    run(judged, data, output)
    with torch.no_grad():
        if part == "projector":
            next(judged.fusion.projector.parameters()).flatten()[-1] += 1
        elif part == "token rows":
            judged.backbone.model.get_input_embeddings().weight[-1, -1] += 1
        elif part == "matching":
            judged.backbone.set_matching("reuse")
        elif part == "joint":
            judged.backbone.set_matching("unified", joint=True)
        else:
            judged.backbone.model.config.text_config.rms_norm_eps *= 2
    with pytest.raises(DataError, match="holds an unfinished run with another model"):
        run(judged, data, output)


def test_pictures_inside_a_file_become_files_that_training_reads(judged, data, tmp_path):
    """One of the three is a positive of the data, by its content, and needs no file of its own."""
    folder = data.parent
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "a.jpg")
    Image.new("RGB", (40, 30), "purple").save(tmp_path / "b.png")
    contents = [
        (tmp_path / "a.jpg").read_bytes(),
        (tmp_path / "b.png").read_bytes(),
        (folder / "1.png").read_bytes(),
    ]
    pictures = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(
        pa.table({"image": pictures, "text": ["", "with text", ""]}), tmp_path / "corpus.parquet"
    )
    output = tmp_path / "out" / "mined.jsonl"
    output.parent.mkdir()
    rules = Rules(negatives=20, candidates=20, view=View.RAW_RAW)
    report = mine(judged, data, output, rules, corpus=tmp_path / "corpus.parquet")
    assert (report["documents"], report["duplicates_in_the_corpus"]) == (5 + 2, 3)
    written = sorted((tmp_path / "out" / "mined-pictures").iterdir())
    assert sorted(path.suffix for path in written) == [".jpeg", ".png"]
    assert {path.read_bytes() for path in written} == set(contents[:2])
    negatives = [triplet.negative for triplet in load_triplets(output)]
    assert {n.text for n in negatives if n.image in written} == {"", "with text"}
    recipe = load_recipe(
        "recipes/picto.yaml", [f"data.source={output}", "train.batch_size=2", "train.steps=1"]
    )
    row = build_dataset(recipe)[0]
    assert (
        load_image(row["negative"]["image"])
        if "image" in row["negative"]
        else row["negative"]["text"]
    )
    assert not (tmp_path / "out" / "mined.jsonl.partial").exists()


def test_a_picture_is_the_same_wherever_it_lies(tmp_path):
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    with ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.png", content)
    path = tmp_path / "a.png"
    same = [
        path,
        EncodedPicture("e", content),
        ZippedPicture(tmp_path / "z.zip", "a.png"),
        CheckedPicture(path, *inspect_picture(path)),
    ]
    assert len({_content_key(Item("text", picture)) for picture in same}) == 1
    assert _content_key(Item("text", same[0])) != _content_key(Item("other", same[0]))
    assert _content_key(Item("text", [path])) != _content_key(Item("text", [path, path]))
    output = tmp_path / "mined.jsonl"
    cells = [_cell(Item("text", picture), output) for picture in same]
    assert cells[0] == cells[3] == {"text": "text", "image": ["a.png"]}
    assert cells[1] == cells[2]
    assert (tmp_path / cells[1]["image"][0]).read_bytes() == content
    with pytest.raises(ImageError, match="not a picture"):
        _content_key(Item("", EncodedPicture("e", b"text")))


def test_feat_views_read_vectors_alone(model, data, tmp_path):
    output = tmp_path / "mined.jsonl"
    report = run(model, data, output, view=View.FEAT_FEAT, yes=1.0, margin=0.0)
    assert report["queries"] == 5
    model.truncate_dim = 8
    truncated = tmp_path / "truncated.jsonl"
    assert run(model, data, truncated, view=View.FEAT_FEAT, yes=1.0, margin=0.0) == report
    row = json.loads(output.read_text().splitlines()[0]) if report["negatives"] else None
    assert row is None or {"cosine", "p_yes", "positive_p_yes"} < row.keys()


def test_output_that_exists_or_is_not_jsonl_is_refused(model, data, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        run(model, data, data)
    with pytest.raises(DataError, match=r"extension \.jsonl"):
        run(model, data, tmp_path / "mined.csv")
    (tmp_path / "mined-pictures").write_text("")
    with pytest.raises(DataError, match="pictures are written to a folder of this name"):
        run(model, data, tmp_path / "mined.jsonl")
