"""Metadata as columns: every name works or is refused by name."""

import json
import random

import pytest
from shared_search import build_index

from rematch.data.corpus import Corpus, open_corpus
from rematch.data.document import Document
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError
from rematch.search.build import build
from rematch.search.columns import RESERVED
from rematch.search.index import Index


def test_metadata_of_another_type_is_refused_by_name(searcher, tmp_path):
    rows = [
        {"text": "a", "year": 1},
        {"text": "b", "year": "1999"},
        {"text": "c", "vector": 1},
        {"text": "d", "new": True},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i", max_failures=0.9)
    assert "'1999' is text, but other documents have a number" in report.failures["2"]
    assert "a name that the index reserves" in report.failures["3"]
    assert index.metadata_columns == ["year", "new"]


PARTS = [
    *"aBé漢😀_0 -;,:/?#%&=$@!|~^+<>{}[]()'\"\\",
    *"*.`",
    "\t",
    "\n",
    "\0",
    "\x7f",
    "\u200b",
    "\ud800",
    "or",
    "--",
]


def awkward_names() -> list[str]:
    rng = random.Random(0)
    names = [
        "",
        " ",
        "*",
        "a.b",
        "a`b",
        "year",
        "Year",
        "YEAR",
        "Text",
        "_distance",
        "select",
        "true",
        "null",
        "case",
    ]
    names += [*RESERVED, *map(str.upper, RESERVED), *PARTS]
    return list(
        dict.fromkeys(
            names + ["".join(rng.choices(PARTS, k=rng.randint(1, 4))) for _ in range(60)]
        )
    )


def test_every_metadata_name_works_or_is_refused(searcher, tmp_path):
    """A name is refused before anything is written, or it is stored and can be filtered by."""
    names = awkward_names()
    path = tmp_path / "c.jsonl"
    corpus = Corpus(
        "c", None, lambda: (Document(str(i), "words", None, {n: "v"}) for i, n in enumerate(names))
    )
    index = Index.create(tmp_path / "i", searcher, name="m")
    report = build(index, corpus, Encoder(searcher, workers=0), max_failures=1.0)
    for i, reason in report.failures.items():
        assert repr(names[int(i)]) in reason
    refused = {names[int(i)] for i in report.failures}
    assert refused >= {
        "",
        " ",
        "*",
        "a.b",
        "a`b",
        "Year",
        "YEAR",
        "Text",
        *RESERVED,
        *map(str.upper, RESERVED),
    }
    assert refused.isdisjoint({"year", "select", "a", "é", "漢", "-", "'", '"', "\\", "--"})
    stored = [name for name in names if name not in refused]
    assert len(stored) > 40
    index = Index.open(tmp_path / "i", searcher)
    assert index.metadata_columns == stored
    everything = {hit.id: hit.metadata for hit in index.search("words", len(names))}
    assert everything == {str(i): {name: "v"} for i, name in enumerate(names) if name in stored}
    for name in stored[::4]:
        (hit,) = index.search("words", 9, filter=f"`{name}` = 'v'")
        assert hit.metadata == {name: "v"}
    path.write_text(json.dumps({"id": "last", "text": "words", "later": 1}))
    build(index, open_corpus(path), Encoder(searcher, workers=0), keep=True)
    index.compact()
    assert len(Index.open(tmp_path / "i", searcher).search("words", 999)) == len(stored) + 1
    assert index.documents([str(names.index("select"))])[0].metadata == {"select": "v"}


def test_metadata_that_differs_in_case_within_a_document_is_refused(searcher, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"text": "a", "Year": 1, "year": 2}\n{"text": "b", "year of birth": 3}\n'
    )
    index, report = build_index(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.failures == {
        "1": "metadata 'year' differs from 'Year' only in case. Use one spelling."
    }
    assert index.metadata_columns == ["year of birth"], (
        "nothing of the refused document was written"
    )
    with pytest.raises(DataError, match="columns are id, text, path, `year of birth`"):
        index.search("a", filter="year of birth > 1")
    assert len(index.search("a", filter="`year of birth` > 1")) == 1
