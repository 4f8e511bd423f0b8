"""Corpora: folders, files of rows, and data sets."""

import json
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared_search import NAMES, save_picture

from rematch.data.corpus import documents_of, open_corpus
from rematch.data.document import Document, Unreadable
from rematch.data.rows import load_rows
from rematch.errors import DataError


def test_a_folder_is_read_with_the_files_beside_its_pictures(photos):
    documents = {d.id: d for d in open_corpus(photos)}
    assert set(documents) == {"copy.png", *(f"deep/{name}.png" for name in NAMES)}
    assert documents["deep/plain.png"].text == "a caption"
    assert documents["deep/it's.png"].metadata == {"year": 1999.0, "place": "Rome", "l": "[1]"}
    assert (
        documents["deep/it's.png"].load_input()["text"] == "Represent the given image. a dark room"
    )
    assert open_corpus(photos).size == len(NAMES) + 1


def test_rows_of_files_and_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = save_picture(tmp_path / "a.png", 1)
    lines = [
        {"id": "x", "text": "words", "year": 3},
        {"image": "a.png", "text": "both"},
        {"document": "a.png"},
        {"text": ""},
        "bare text",
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = list(open_corpus(tmp_path / "c.jsonl"))
    assert rows[0] == Document("x", "words", None, {"year": 3.0})
    assert rows[1].id == "2"
    assert rows[1].image == path
    assert rows[2].image == path
    assert isinstance(rows[3], Unreadable)
    assert rows[3].id == "4"
    assert "neither text" in str(rows[3].error)
    assert rows[4].text == "bare text"
    content = path.read_bytes()
    pq.write_table(
        pa.table({"image": [{"bytes": content, "path": None}], "k": ["v"]}), tmp_path / "c.parquet"
    )
    (embedded,) = open_corpus(tmp_path / "c.parquet")
    assert embedded.load_input()["image"].content == content
    assert embedded.metadata == {"k": "v"}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "n": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_dict(
        {"image": [str(path)], "caption": ["c"], "n": [7]}, features
    ).save_to_disk(tmp_path / "hf")
    (document,) = open_corpus(tmp_path / "hf")
    assert document.text == "c"
    assert document.metadata["n"] == 7.0
    assert document.load_input()["image"].content[:4] == b"\x89PNG"


def test_a_parquet_file_is_read_as_a_window(tmp_path):
    size, rows = 20_000, 1000
    rng = np.random.default_rng(0)
    table = pa.table({"text": ["a"] * rows, "junk": [rng.bytes(size) for _ in range(rows)]})
    path = tmp_path / "c.parquet"
    pq.write_table(table, path, row_group_size=100)
    allocated = pa.total_allocated_bytes()
    stream = load_rows(path)
    for number, row in stream:
        assert row == table.slice(number - 1, 1).to_pylist()[0]
        assert pa.total_allocated_bytes() - allocated < rows * size / 2
    assert number == rows
    content = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(3).column(0).dictionary_page_offset
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    stream = load_rows(path)
    assert [number for number, _ in islice(stream, 200)] == list(range(1, 201))
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read as parquet \([^\n]*\)\.$"):
        list(stream)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such folder or file"),
        ("empty", "folder", "holds no files to index"),
        ("notes.txt", "x", "neither .jsonl nor .parquet"),
    ],
)
def test_an_invalid_corpus_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(path))


def test_documents_of_a_corpus_must_all_be_readable(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "id": "x"}\n')
    assert [(item.key, item.text) for item in documents_of(path)] == [("x", "a")]
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match="neither text"):
        documents_of(path)
    path.write_text('{"text": "a"}\n{\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: not valid JSON"):
        documents_of(path)
