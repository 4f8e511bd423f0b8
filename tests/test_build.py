"""Building an index: what is encoded, reused, deleted, and what cannot be read."""

import itertools
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from shared_search import (
    NAMES,
    ROUNDING,
    assert_same_rows,
    build_index,
    contents,
    save_picture,
)

from rematch.data.corpus import Corpus, open_corpus
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError
from rematch.search import build as building
from rematch.search.build import build
from rematch.search.columns import CORPUS
from rematch.search.index import Index


def test_only_what_changed_is_encoded(searcher, photos, tmp_path):
    index, report = build_index(searcher, photos, tmp_path / "i")
    documents = len(NAMES) + 1
    assert (report.documents, report.encoded, report.reused) == (documents, documents, 0), (
        "the copy has no caption"
    )
    assert len(index) == len(NAMES) + 1
    for row in contents(tmp_path / "i"):
        document = next(d for d in open_corpus(photos) if d.id == row["id"])
        expected = searcher.encode_document([document.item().as_input()], show_progress_bar=False)[
            0
        ]
        assert np.allclose(row["vector"], expected, atol=ROUNDING)

    _, again = build_index(searcher, photos, tmp_path / "i")
    assert (again.encoded, again.unchanged) == (0, len(NAMES) + 1)

    os.utime(photos / "copy.png", ns=(1, 1))  # touched
    shutil.copy(photos / "copy.png", photos / "second copy.png")
    save_picture(photos / "deep" / "it's.png", 77)  # changed
    (photos / "deep" / "plain.txt").write_text("another caption")
    (photos / "deep" / "with space.png").unlink()
    save_picture(photos / "new.png", 78)
    index, report = build_index(searcher, photos, tmp_path / "i")
    assert (report.encoded, report.reused, report.deleted) == (3, 2, 1)
    fresh, _ = build_index(searcher, photos, tmp_path / "fresh")
    assert_same_rows(contents(tmp_path / "i"), contents(tmp_path / "fresh"))
    assert len(fresh) == len(index)

    (photos / "new.png").unlink()
    _, report = build_index(searcher, photos, tmp_path / "i", keep=True)
    assert report.deleted == 0


def test_unreadable_documents_are_named_and_the_rest_is_indexed(
    searcher, photos, tmp_path, monkeypatch
):
    (photos / "broken.png").write_bytes((photos / "copy.png").read_bytes()[:400])
    (photos / "no picture.jpg").write_text("text")
    (photos / "dangling.png").symlink_to(photos / "gone.png")
    (photos / "deep" / 'quo"te.json').write_text("{")
    Image.new("1", (30_000, 20_000)).save(photos / "huge.png")  # 600 megapixels in a few kilobytes
    index, report = build_index(searcher, photos, tmp_path / "i")
    reasons = {
        "broken.png": "cut off",
        "no picture.jpg": "not a picture",
        "dangling.png": "No such file",
    }
    reasons |= {"huge.png": "decompression bomb", 'deep/quo"te.png': "not valid JSON"}
    assert report.failures.keys() == reasons.keys()
    for name, part in reasons.items():
        assert part in report.failures[name]
    assert len(index) == len(NAMES)
    written = json.loads((tmp_path / "i" / "report.json").read_text())
    assert written["last_run"]["failures"] == report.failures
    assert written["documents"] == len(NAMES)
    monkeypatch.setattr(building, "_MIN_DOCUMENTS", 10)
    with pytest.raises(
        DataError, match=r"4 of 12 documents cannot be indexed, such as .*--max-failures"
    ):
        build_index(searcher, photos, tmp_path / "other")
    assert (
        len(json.loads((tmp_path / "other" / "report.json").read_text())["last_run"]["failures"])
        == 4
    )
    for path in photos.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="1 of 1 documents cannot be indexed"):
        build_index(searcher, photos, tmp_path / "none")


def test_an_id_that_occurs_twice_counts_once(searcher, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n{"id": 2, "text": "a"}\n'
    )
    index, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert len(index) == 2
    assert "occurs twice" in report.failures["1"]
    assert (report.encoded, report.reused) == (1, 1), "equal content is encoded once"
    _, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.encoded == 0


def texts_of(path):
    return {row["id"]: row["text"] for row in contents(path)}


def test_corpora_in_one_index_leave_one_another_alone(searcher, tmp_path):
    """Rows without ids are named by their numbers, which every file has."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"text": "a"}\n{"text": "b"}\n')
    second.write_text('{"text": "c"}\n{"text": "d", "id": "x"}\n')
    build_index(searcher, first, tmp_path / "i")
    _, report = build_index(searcher, second, tmp_path / "i", keep=True, max_failures=1)
    assert "from another corpus" in report.failures["1"]
    assert texts_of(tmp_path / "i") == {"1": "a", "2": "b", "x": "d"}

    first.write_text('{"text": "a"}\n')
    _, report = build_index(searcher, first, tmp_path / "i")
    assert (report.deleted, report.unchanged) == (1, 1)
    assert texts_of(tmp_path / "i") == {"1": "a", "x": "d"}

    _, report = build_index(searcher, second, tmp_path / "i", keep=True, replace=True)
    assert not report.failures
    assert texts_of(tmp_path / "i") == {"1": "c", "x": "d"}
    _, report = build_index(searcher, second, tmp_path / "i", keep=True)
    assert report.unchanged == 2, "the documents are of this corpus now"


def test_documents_of_an_older_index_are_of_the_corpus_it_was_made_of(searcher, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "a"}\n{"text": "b"}\n')
    name = open_corpus(corpus).name
    index = Index.create(tmp_path / "i", searcher, name="m", corpus=name)
    build(index, open_corpus(corpus), Encoder(searcher, workers=0))
    index.table.drop_columns([CORPUS])
    corpus.write_text('{"text": "a"}\n')
    _, report = build_index(searcher, corpus, tmp_path / "i")
    assert (report.unchanged, report.deleted) == (1, 1)


def test_a_corpus_may_change_while_it_is_read(searcher, photos, tmp_path):
    """A file that vanishes between listing and reading is reported, or gone with the next run."""
    corpus = open_corpus(photos)

    def documents():
        for number, document in enumerate(open_corpus(photos)):
            yield document
            if number == 0:
                (photos / "deep" / "with space.png").unlink()

    index = Index.create(tmp_path / "i", searcher, name="m")
    changing = Corpus(corpus.name, corpus.size, documents)
    report = build(index, changing, Encoder(searcher, workers=0))
    assert list(report.failures) in (
        [],
        ["deep/with space.png"],
    )  # sixteen are listed before the first is read
    _, report = build_index(searcher, photos, tmp_path / "i")
    assert "deep/with space.png" not in [row["id"] for row in contents(tmp_path / "i")]


def test_workers_make_the_same_index(searcher, tmp_path):
    folder = tmp_path / "photos"
    for i in range(40):
        save_picture(folder / f"{i:03}.png", i)
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:300])
    build_index(searcher, folder, tmp_path / "alone")
    index = Index.create(tmp_path / "helped", searcher, name="m")
    report = build(index, open_corpus(folder), Encoder(searcher, batch_tokens=100, workers=2))
    assert list(report.failures) == ["broken.png"]
    assert_same_rows(contents(tmp_path / "alone"), contents(tmp_path / "helped"))


def test_a_uri_is_written_by_merging_rows(searcher, photos, tmp_path):
    """As on an object store, where nothing is locked."""
    uri = f"file://{tmp_path}/i"
    index = Index.create(uri, searcher, name="m")
    build(index, open_corpus(photos), Encoder(searcher, workers=0))
    save_picture(photos / "copy.png", 99)
    report = build(Index.open(uri, searcher), open_corpus(photos), Encoder(searcher, workers=0))
    assert (report.encoded, report.unchanged) == (1, len(NAMES))
    build_index(searcher, photos, tmp_path / "local")
    assert_same_rows(contents(uri), contents(tmp_path / "local"))


def test_a_hash_set_is_right_beyond_its_buffer():
    hashes = building.HashSet(np.array([5, 1], np.uint64))
    rng = random.Random(0)
    added = [rng.getrandbits(64) for _ in range(70_000)]
    for number in added:
        hashes.add(number)
    assert len(hashes.recent) < 10_000
    assert all(number in hashes for number in [1, 5, *added[:50], *added[-50:]])
    assert 2 not in hashes


def test_a_clock_that_is_set_back_changes_nothing(searcher, photos, tmp_path, monkeypatch):
    """A changed file seems older, and each look at the clock would go back a day."""
    now = time.time()
    days = itertools.count()
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(days))
    build_index(searcher, photos, tmp_path / "i")
    follower = Index.open(tmp_path / "i", searcher)
    changed = save_picture(photos / "deep" / "plain.png", 50)
    os.utime(changed, (now - 10**9, now - 10**9))
    (photos / "deep" / 'quo"te.png').unlink()
    index, report = build_index(searcher, photos, tmp_path / "i")
    assert (report.encoded, report.deleted) == (1, 1)
    time.sleep(0.6)
    assert len(follower) == len(index)
    _, report = build_index(searcher, photos, tmp_path / "i")
    assert report.unchanged == report.documents == len(index)
