"""From a corpus to an index to answers: what is encoded, what survives, what is found."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rematch import ReMatch, cli
from rematch.data.corpus import Corpus, Document, open_corpus
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError, ModelError, RematchError
from rematch.scoring import maxsim
from rematch.search import build as building
from rematch.search import index as indexing
from rematch.search.build import build
from rematch.search.cascade import Stage, parse
from rematch.search.columns import OWN
from rematch.search.index import EXACT_UP_TO, Index

# float32 sums in another order (batches, threads, other vector instructions) move the parts of a
# unit vector, and cosines of two of them, by less than this: some hundred terms, two normalised
# layers.
ROUNDING = 1e-5
NAMES = ("plain", "with space", "ünï-コード", "it's", 'quo"te', "new\nline", "semi;colon--")


def picture(path: Path, seed: int, size: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def searcher(saved_model) -> ReMatch:
    return ReMatch(str(saved_model))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures of awkward names, some with captions and metadata, one a copy of another."""
    folder = tmp_path / "photos"
    for i, name in enumerate(NAMES):
        picture(folder / "deep" / f"{name}.png", i)
    shutil.copy(folder / "deep" / "plain.png", folder / "copy.png")
    (folder / "deep" / "plain.txt").write_text("a caption\n")
    (folder / "deep" / "it's.json").write_text(
        json.dumps({"caption": "told", "year": 1999, "place": "Rome", "l": [1]})
    )
    (folder / "deep" / "with space.json").write_text(json.dumps({"year": 2010, "good": True}))
    (folder / "._hidden.png").write_bytes(b"what macOS leaves")
    (folder / "circle").symlink_to(folder)
    return folder


def make(model: ReMatch, corpus: Path, output: Path, **settings):
    """(index, report), of a new index or one that is there."""
    made = {k: settings.pop(k) for k in ("dimensions", "tokens") if k in settings}
    if (output / "documents.lance").exists():
        index = Index.open(output, model)
    else:
        index = Index.create(
            output, model, name=model.model_card_data.base_model or "model", **made
        )
    encoder = Encoder(model, batch_tokens=settings.pop("batch_tokens", 200), workers=0)
    return index, build(index, open_corpus(corpus), encoder, **settings)


def contents(uri: Path) -> list[dict]:
    rows = Index.open(uri).table.search().limit(None).to_list()
    return sorted(rows, key=lambda row: row["id"])


# ---- corpora ------------------------------------------------------------------------------------


def test_a_folder_is_read_with_what_lies_beside_its_pictures(photos):
    found = {d.id: d for d in open_corpus(photos)}
    assert set(found) == {"copy.png", *(f"deep/{name}.png" for name in NAMES)}
    assert found["deep/plain.png"].text == "a caption"
    assert found["deep/it's.png"].metadata == {"year": 1999.0, "place": "Rome", "l": "[1]"}
    assert found["deep/it's.png"].read()["text"] == "Represent the given image. told"
    assert open_corpus(photos).size == len(NAMES) + 1


def test_rows_of_files_and_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = picture(tmp_path / "a.png", 1)
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
    assert rows[3][0] == "4"
    assert "neither text" in str(rows[3][1])
    assert rows[4].text == "bare text"
    content = path.read_bytes()
    pq.write_table(
        pa.table({"image": [{"bytes": content, "path": None}], "k": ["v"]}), tmp_path / "c.parquet"
    )
    (inside,) = open_corpus(tmp_path / "c.parquet")
    assert inside.read()["image"].content == content
    assert inside.metadata == {"k": "v"}
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
    (one,) = open_corpus(tmp_path / "hf")
    assert one.text == "c"
    assert one.metadata["n"] == 7.0
    assert one.read()["image"].content[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing", None, "no such folder or file"),
        ("empty", "folder", "holds no pictures"),
        ("notes.txt", "x", "neither .jsonl nor .parquet"),
        ("bad.jsonl", "{", "bad.jsonl:1: not valid JSON"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, name, content, said):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        list(open_corpus(path))


# ---- building -----------------------------------------------------------------------------------


def test_only_what_changed_is_encoded(searcher, photos, tmp_path):
    index, report = make(searcher, photos, tmp_path / "i")
    assert (report.seen, report.encoded, report.reused) == (len(NAMES) + 1, len(NAMES) + 1, 0), (
        "the copy has no caption"
    )
    assert len(index) == len(NAMES) + 1
    for row in contents(tmp_path / "i"):
        document = next(d for d in open_corpus(photos) if d.id == row["id"])
        expected = searcher.encode_document([document.item().as_input()], show_progress_bar=False)[
            0
        ]
        assert np.allclose(row["vector"], expected, atol=ROUNDING)

    _, again = make(searcher, photos, tmp_path / "i")
    assert (again.encoded, again.unchanged) == (0, len(NAMES) + 1)

    os.utime(photos / "copy.png", ns=(1, 1))  # touched
    shutil.copy(photos / "copy.png", photos / "second copy.png")
    picture(photos / "deep" / "it's.png", 77)  # changed
    (photos / "deep" / "plain.txt").write_text("another caption")
    (photos / "deep" / "with space.png").unlink()
    picture(photos / "new.png", 78)
    index, report = make(searcher, photos, tmp_path / "i")
    assert (report.encoded, report.reused, report.deleted) == (3, 2, 1)
    fresh, _ = make(searcher, photos, tmp_path / "fresh")
    same_rows(contents(tmp_path / "i"), contents(tmp_path / "fresh"))
    assert len(fresh) == len(index)

    (photos / "new.png").unlink()
    _, report = make(searcher, photos, tmp_path / "i", keep=True)
    assert report.deleted == 0


def same_rows(these: list[dict], those: list[dict]):
    assert [row["id"] for row in these] == [row["id"] for row in those]
    for a, b in zip(these, those, strict=True):
        assert np.allclose(a.pop("vector"), b.pop("vector"), atol=ROUNDING)
        assert ("tokens" in a) == ("tokens" in b)
        if "tokens" in a:
            # float16: a part near a rounding edge falls to the other side, and they are 2**-11
            # apart below 1
            assert np.allclose(
                np.array(a.pop("tokens")), np.array(b.pop("tokens")), atol=2**-11 + ROUNDING
            )
        assert {k: v for k, v in a.items() if v is not None} == {
            k: v for k, v in b.items() if v is not None
        }


def test_what_cannot_be_read_is_named_and_the_rest_is_indexed(
    searcher, photos, tmp_path, monkeypatch
):
    (photos / "broken.png").write_bytes((photos / "copy.png").read_bytes()[:400])
    (photos / "no picture.jpg").write_text("text")
    (photos / "dangling.png").symlink_to(photos / "gone.png")
    (photos / "deep" / 'quo"te.json').write_text("{")
    Image.new("1", (30_000, 20_000)).save(photos / "huge.png")  # 600 megapixels in a few kilobytes
    index, report = make(searcher, photos, tmp_path / "i")
    why = {
        "broken.png": "cut off",
        "no picture.jpg": "not a picture",
        "dangling.png": "No such file",
    }
    why |= {"huge.png": "decompression bomb", 'deep/quo"te.png': "not valid JSON"}
    assert report.failures.keys() == why.keys()
    for name, part in why.items():
        assert part in report.failures[name]
    assert len(index) == len(NAMES)
    written = json.loads((tmp_path / "i" / "report.json").read_text())
    assert written["last_run"]["failures"] == report.failures
    assert written["documents"] == len(NAMES)
    monkeypatch.setattr(building, "_ENOUGH_TO_JUDGE", 10)
    with pytest.raises(
        DataError, match=r"4 of 12 documents cannot be read, such as .*--max-failures"
    ):
        make(searcher, photos, tmp_path / "other")
    assert (
        len(json.loads((tmp_path / "other" / "report.json").read_text())["last_run"]["failures"])
        == 4
    )
    for path in photos.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="1 of 1 documents cannot be read"):
        make(searcher, photos, tmp_path / "none")


def test_an_id_that_stands_twice_counts_once(searcher, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n{"id": 2, "text": "a"}\n'
    )
    index, report = make(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert len(index) == 2
    assert "stands twice" in report.failures["1"]
    assert (report.encoded, report.reused) == (1, 1), "equal content is encoded once"
    _, report = make(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.encoded == 0


def test_metadata_of_another_kind_is_refused_by_name(searcher, tmp_path):
    rows = [
        {"text": "a", "year": 1},
        {"text": "b", "year": "1999"},
        {"text": "c", "vector": 1},
        {"text": "d", "new": True},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index, report = make(searcher, tmp_path / "c.jsonl", tmp_path / "i", most_failures=0.9)
    assert "'1999' is no double" in report.failures["2"]
    assert "a name of the index's own" in report.failures["3"]
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
    names += [*OWN, *map(str.upper, OWN), *PARTS]
    return list(
        dict.fromkeys(
            names + ["".join(rng.choices(PARTS, k=rng.randint(1, 4))) for _ in range(60)]
        )
    )


def test_any_name_of_metadata_is_refused_or_works(searcher, tmp_path):
    """Refused by name before anything is written; or stored, found by a filter, and the index goes
    on.
    """
    names = awkward_names()
    path = tmp_path / "c.jsonl"
    corpus = Corpus(
        "c", None, lambda: (Document(str(i), "words", None, {n: "v"}) for i, n in enumerate(names))
    )
    index = Index.create(tmp_path / "i", searcher, name="m")
    report = build(index, corpus, Encoder(searcher, workers=0), most_failures=1.0)
    for i, why in report.failures.items():
        assert repr(names[int(i)]) in why
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
        *OWN,
        *map(str.upper, OWN),
    }
    assert refused.isdisjoint({"year", "select", "a", "é", "漢", "-", "'", '"', "\\", "--"})
    stored = [name for name in names if name not in refused]
    assert len(stored) > 40
    index = Index.open(tmp_path / "i", searcher)
    assert index.metadata_columns == stored
    everything = {hit.id: hit.metadata for hit in index.search("words", len(names))}
    assert everything == {str(i): {name: "v"} for i, name in enumerate(names) if name in stored}
    for name in stored[::4]:
        (hit,) = index.search("words", 9, where=f"`{name}` = 'v'")
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
    index, report = make(searcher, tmp_path / "c.jsonl", tmp_path / "i")
    assert report.failures == {
        "1": "metadata 'year' differs from 'Year' only in case. Spell them alike."
    }
    assert index.metadata_columns == ["year of birth"], (
        "nothing was written of the one that was refused"
    )
    with pytest.raises(DataError, match="in SQL on id, text, path, `year of birth`"):
        index.search("a", where="year of birth > 1")
    with pytest.raises(DataError, match=r"--filter \? > 1"):  # LanceDB's parser panics
        index.search("a", where="? > 1")
    assert len(index.search("a", where="`year of birth` > 1")) == 1


def test_a_corpus_may_change_while_it_is_read(searcher, photos, tmp_path):
    """A file that vanishes between listing and reading is reported; one that changes is found
    again by the next run.
    """
    corpus = open_corpus(photos)

    def documents():
        for number, one in enumerate(open_corpus(photos)):
            yield one
            if number == 0:
                (photos / "deep" / "with space.png").unlink()

    index = Index.create(tmp_path / "i", searcher, name="m")
    changing = type(corpus)(corpus.name, corpus.size, documents)
    report = build(index, changing, Encoder(searcher, workers=0))
    assert list(report.failures) in (
        [],
        ["deep/with space.png"],
    )  # sixteen are listed before the first is read
    _, report = make(searcher, photos, tmp_path / "i")
    assert "deep/with space.png" not in [row["id"] for row in contents(tmp_path / "i")]


CHILD = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from rematch import ReMatch
from rematch.encoding.encoder import Encoder
from rematch.search import build as building
from rematch.data.corpus import open_corpus
from rematch.search.index import Index, exists
model, corpus, output, workers, kills, seconds = sys.argv[1:]
model = ReMatch(model)
rng, killed = random.Random(int(kills)), 0
while True:
    child = os.fork()
    if child == 0:
        building.FLUSH_SECONDS = 0.0
        forward = Encoder._forward
        Encoder._forward = lambda *given: (time.sleep(0.02), forward(*given))[1]  # as a larger model would
        index = Index.open(output, model) if exists(output) else Index.create(output, model, name="m", tokens=True)
        building.build(index, open_corpus(Path(corpus)), Encoder(model, batch_tokens=1, workers=int(workers)))
        os._exit(0)
    if killed < int(kills):
        time.sleep(rng.uniform(0.05, float(seconds)))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        killed += 1
        status = os.waitpid(child, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else "done", flush=True)
        continue
    sys.exit(os.waitpid(child, 0)[1])
"""
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def killed_and_finished(
    model: Path, corpus: Path, output: Path, workers: int, kills: int
) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, corpus, output, str(workers), str(kills), "0.8"],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_kill_9_ten_times_while_indexing_and_while_updating(saved_model, searcher, tmp_path):
    folder = tmp_path / "photos"
    for i in range(120):
        picture(folder / f"{i:03}.png", i)
    first = killed_and_finished(saved_model, folder, tmp_path / "i", 0, 5)
    make(searcher, folder, tmp_path / "undisturbed", tokens=True)
    same_rows(contents(tmp_path / "i"), contents(tmp_path / "undisturbed"))
    for i in range(0, 120, 2):
        picture(folder / f"{i:03}.png", 1000 + i)
    for i in range(1, 120, 10):
        (folder / f"{i:03}.png").unlink()
    for i in range(120, 150):
        picture(folder / f"{i:03}.png", i)
    second = killed_and_finished(saved_model, folder, tmp_path / "i", 0, 5)
    make(searcher, folder, tmp_path / "afresh", tokens=True)
    same_rows(contents(tmp_path / "i"), contents(tmp_path / "afresh"))
    assert (first + second).count("killed") >= 6, "most of them hit a run that was under way"


def test_workers_make_the_same_index(searcher, tmp_path):
    folder = tmp_path / "photos"
    for i in range(40):
        picture(folder / f"{i:03}.png", i)
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:300])
    make(searcher, folder, tmp_path / "alone")
    index = Index.create(tmp_path / "helped", searcher, name="m")
    report = build(index, open_corpus(folder), Encoder(searcher, batch_tokens=100, workers=2))
    assert list(report.failures) == ["broken.png"]
    same_rows(contents(tmp_path / "alone"), contents(tmp_path / "helped"))


# ---- what can go wrong --------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_readers_are_not(searcher, photos, tmp_path):
    index, _ = make(searcher, photos, tmp_path / "i")
    with index.alone():
        with pytest.raises(DataError, match="another process is writing"):
            make(searcher, photos, tmp_path / "i")
        assert Index.open(tmp_path / "i", searcher).search("a", 1)
    make(searcher, photos, tmp_path / "i")


def test_another_models_index_is_refused(searcher, saved_model, photos, tmp_path, make_model):
    make(searcher, photos, tmp_path / "i")
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
    monkeypatch.setattr(indexing, "fingerprint", lambda _: "0123456789abcdef" * 2)  # as they were
    make(searcher, photos, tmp_path / "i")
    monkeypatch.undo()
    with pytest.raises(
        ModelError, match=r"made by an earlier version of rematch.*another --output"
    ):
        make(searcher, photos, tmp_path / "i")


def test_an_index_of_a_model_with_another_configuration_is_refused(
    searcher, saved_model, photos, tmp_path
):
    make(searcher, photos, tmp_path / "i")
    other = ReMatch(str(saved_model))
    other.backbone.model.config.text_config.rope_parameters = {
        "rope_theta": 5e5,
        "rope_type": "default",
    }
    with pytest.raises(ModelError, match="made by another model"):
        Index.open(tmp_path / "i", other)


def test_a_models_truncate_dim_is_the_indexs_width(searcher, saved_model, photos, tmp_path):
    short = ReMatch(str(saved_model), truncate_dim=8)
    index, _ = make(short, photos, tmp_path / "short", tokens=True)
    same, _ = make(searcher, photos, tmp_path / "same", tokens=True, dimensions=8)
    assert index.about["dimensions"] == 8
    assert scores_of(index.search("a", 9)) == pytest.approx(
        scores_of(same.search("a", 9)), abs=ROUNDING
    )
    tokens = [scores_of(i.search("a", 9, rerank="maxsim:9")) for i in (index, same)]
    assert tokens[0] == pytest.approx(tokens[1], abs=1e-3)
    with pytest.raises(RematchError, match="reads whole vectors only"):
        index.search("a", rerank="feat:3")
    make(searcher, photos, tmp_path / "whole")
    with pytest.raises(ModelError, match="keeps 32 dimensions, but the model has truncate_dim=8"):
        Index.open(tmp_path / "whole", short)


def scores_of(hits) -> dict[str, float]:
    return {hit.id: hit.score for hit in hits}


@contextmanager
def small_disk(path: Path, size: str):
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_leaves_a_whole_index(searcher, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "FLUSH_SECONDS", 0.0)
    folder = tmp_path / "photos"
    for i in range(60):
        picture(folder / f"{i:02}.png", i)
    with small_disk(tmp_path / "disk", "400k"):
        output = tmp_path / "disk" / "i"
        with pytest.raises(DataError, match=r"cannot be written.*No space left on device"):
            make(searcher, folder, output, batch_tokens=1)  # a commit for each document
        part = contents(output)
        assert 0 < len(part) < 60
        assert Index.open(output, searcher).search("a", 3)
        subprocess.run(["mount", "-o", "remount,size=50m", tmp_path / "disk"], check=True)
        make(searcher, folder, output)
        make(searcher, folder, tmp_path / "undisturbed")
        same_rows(contents(output), contents(tmp_path / "undisturbed"))


def test_a_read_only_index_can_be_searched_and_not_written(searcher, photos, tmp_path):
    with small_disk(tmp_path / "disk", "20m"):
        make(searcher, photos, tmp_path / "disk" / "i")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert Index.open(tmp_path / "disk" / "i", searcher).search("a", 3)
        with pytest.raises(DataError, match=r"cannot be written.*Read-only file system"):
            make(searcher, photos, tmp_path / "disk" / "i")
        with pytest.raises(DataError, match=r"cannot be written.*Read-only file system"):
            make(searcher, photos, tmp_path / "disk" / "another")


# ---- search -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(searcher, tmp_path_factory) -> Index:
    """40 documents: pictures, texts and both, with years."""
    folder = tmp_path_factory.mktemp("library")
    rows = []
    for i in range(40):
        row = {"id": f"d{i}", "year": 1980 + i}
        row |= {"image": str(picture(folder / f"{i}.png", i))} if i % 3 else {}
        row |= {"text": f"number {i}"} if i % 3 != 1 else {}
        rows.append(row)
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index, _ = make(searcher, folder / "c.jsonl", folder / "i", tokens=True)
    return index


def inputs_of(index: Index) -> list[dict]:
    documents = open_corpus(Path(index.uri).parent / "c.jsonl")
    return [d.item().as_input() for d in documents]


def test_search_is_exact_for_text_pictures_and_both(searcher, library, tmp_path):
    vectors = searcher.encode_document(inputs_of(library), show_progress_bar=False)
    path = picture(tmp_path / "q.png", 500)
    queries = ["number 3", path, {"text": "like this", "image": path}]
    for query, hits in zip(queries, library.search(queries, 7), strict=True):
        cosines = vectors @ searcher.encode_query([query], show_progress_bar=False)[0]
        for results in (hits, library.search(query, 7)):  # with others, and alone
            assert len(results) == 7
            assert_best(
                scores_of(results), {f"d{i}": cosine for i, cosine in enumerate(cosines)}, ROUNDING
            )
    hit = library.search("number 3", 40)[0]
    assert hit.metadata.keys() == {"year"}
    assert hit.by == "cosine"


def test_filters_choose_before_the_search(library):
    hits = library.search("number 3", 40, where="year >= 2000 AND year < 2005")
    assert {hit.id for hit in hits} == {f"d{i}" for i in range(20, 25)}
    with pytest.raises(
        DataError, match=r"--filter yeer > 1.*condition in SQL on id, text, path, year"
    ):
        library.search("number 3", where="yeer > 1")


def assert_best(ranked: dict[str, float], scores: dict[str, float], tolerance: float) -> None:
    """These are the best documents in their order; those that rounding may swap may be swapped."""
    listed = [scores[name] for name in ranked]
    assert list(ranked.values()) == pytest.approx(listed, abs=tolerance)
    assert all(after <= before + 2 * tolerance for before, after in pairwise(listed))
    assert (
        max((s for name, s in scores.items() if name not in ranked), default=-1)
        <= min(listed) + 2 * tolerance
    )


@pytest.mark.parametrize("views", ["raw-raw", "feat-feat", "raw-feat"])
def test_reranking_is_match_of_each_pair(searcher, library, views):
    inputs = inputs_of(library)
    nearest = [int(hit.id[1:]) for hit in library.search("number 3", 12)]
    judged = {f"d{i}": searcher.match(["number 3"], [inputs[i]], views)[0] for i in nearest[:10]}
    hits = library.search("number 3", 12, rerank=f"{views}:10")
    assert_best(scores_of(hits[:10]), judged, ROUNDING)
    assert [hit.id for hit in hits[10:]] == [f"d{i}" for i in nearest[10:]], (
        "behind them the order stays"
    )
    assert [hit.by for hit in hits] == [views] * 10 + ["cosine"] * 2


def test_the_cascade_goes_from_stage_to_stage(searcher, library):
    tokens = searcher.encode_document(
        inputs_of(library), multi_vector=True, show_progress_bar=False
    )
    query = searcher.encode_query(["number 3"], multi_vector=True, show_progress_bar=False)[0]
    nearest = np.array([int(hit.id[1:]) for hit in library.search("number 3", 20)])
    by_tokens = nearest[np.argsort(-maxsim(query, tokens[nearest]), kind="stable")]
    hits = library.search("number 3", 20, rerank="maxsim:20")
    # stored in float16: a part is off by 2**-12 at most, a cosine by the length of that, 2**-12 *
    # sqrt(32) = 1.4e-3
    assert [hit.score for hit in hits] == pytest.approx(
        maxsim(query, tokens[by_tokens]).tolist(), abs=2e-3
    )
    staged = library.search("number 3", 20, rerank="maxsim:20,feat:10,raw:3")
    assert [hit.by for hit in staged] == ["raw-raw"] * 3 + ["feat-feat"] * 7 + ["maxsim"] * 10
    assert {hit.id for hit in staged[:10]} == {hit.id for hit in hits[:10]}
    assert [hit.id for hit in staged[10:]] == [hit.id for hit in hits[10:]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("feet:10", "write STAGE:COUNT"),
        ("feat", "write STAGE:COUNT"),
        ("feat:10,raw:20", "Let counts fall"),
        ("maxsim:10", "Make it with --tokens"),
        ("feat:10", "reads whole vectors only"),
    ],
)
def test_stages_that_cannot_be_are_refused(spec, said):
    with pytest.raises(RematchError, match=said):
        parse(spec, {"tokens": 0, "dimensions": 8 if "whole" in said else 32}, 32)


def test_a_number_alone_is_raw():
    assert parse("10", {"tokens": 0, "dimensions": 8}, 32) == [Stage("raw-raw", 10)]


def test_fewer_dimensions_and_pictures_out_of_a_data_set(searcher, tmp_path):
    content = picture(tmp_path / "a.png", 1).read_bytes()
    (tmp_path / "a.png").unlink()
    table = pa.table({"image": [{"bytes": content, "path": None}] * 2, "text": ["one", "two"]})
    pq.write_table(table, tmp_path / "c.parquet")
    index, _ = make(searcher, tmp_path / "c.parquet", tmp_path / "i", dimensions=8)
    whole = searcher.encode_document(
        [d.read() for d in open_corpus(tmp_path / "c.parquet")], show_progress_bar=False
    )
    short = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    rows = contents(tmp_path / "i")
    assert np.allclose([row["vector"] for row in rows], short, atol=ROUNDING)
    hits = index.search("one", 2, rerank="raw:2")  # the picture comes from the index
    given = [d.read() for d in open_corpus(tmp_path / "c.parquet")]
    assert sorted(hit.score for hit in hits) == pytest.approx(
        sorted(searcher.match(["one"] * 2, given).tolist()), abs=ROUNDING
    )
    with pytest.raises(DataError, match="--dimensions 64: the model's vectors have 32"):
        Index.create(tmp_path / "j", searcher, name="m", dimensions=64)


def test_a_uri_is_written_by_merging_rows(searcher, photos, tmp_path):
    """As on an object store, where nothing is locked."""
    uri = f"file://{tmp_path}/i"
    index = Index.create(uri, searcher, name="m")
    build(index, open_corpus(photos), Encoder(searcher, workers=0))
    picture(photos / "copy.png", 99)
    report = build(Index.open(uri, searcher), open_corpus(photos), Encoder(searcher, workers=0))
    assert (report.encoded, report.unchanged) == (1, len(NAMES))
    make(searcher, photos, tmp_path / "local")
    same_rows(contents(uri), contents(tmp_path / "local"))


def test_deleting_versions_and_compaction(searcher, photos, tmp_path):
    index, _ = make(searcher, photos, tmp_path / "i")
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
    found = [index._nearest(q, 10, "", [], False, 40)["id"].to_pylist() for q in queries]
    truth = [index._nearest(q, 10, "", [], True, 40)["id"].to_pylist() for q in queries]
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ vectors.T
    assert len(truth[0]) == 10
    best = {name: cosines[0][int(name)] for name in truth[0]}
    assert_best(
        best, {str(i): cosine for i, cosine in enumerate(cosines[0])}, 32 * 2**-24
    )  # sums of 32 products
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) > 0.9
    with pytest.raises(DataError, match="--ann ivf is unknown"):
        index.build_ann("ivf")


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
    for asked, kind in (
        ("int8", "int8"),
        ("auto", "int8"),
        ("float", "float"),
        ("none", "none"),
        ("auto", "none"),
    ):
        index, _ = make(searcher, tmp_path / "c.jsonl", tmp_path / "i", keep=True, ann=asked)
        assert index.ann == Index.open(tmp_path / "i").ann == kind
        assert len(index.table.list_indices()) == (kind != "none")
    plan = index.table.search(vectors[0], vector_column_name="vector").explain_plan()
    assert "ANN" not in plan, "searches are exact again"
    assert index._nearest(vectors[0], 1, "", [], False, 1)["id"].to_pylist() == ["0"]


# ---- Ray, adapters, the commands ----------------------------------------------------------------


def test_ray_makes_the_same_index_though_a_worker_is_killed(
    saved_model, searcher, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray")
    from rematch.search import ray as spread

    folder = tmp_path / "photos"
    for i in range(90):
        picture(folder / f"{i:03}.png", i, 300)
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:300])
    make(searcher, folder, tmp_path / "local", tokens=True)
    monkeypatch.setattr(spread, "BLOCK", 6)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    killer = subprocess.Popen([sys.executable, "-c", KILLER], stdout=subprocess.PIPE, text=True)
    try:
        index = Index.create(tmp_path / "spread", searcher, name=str(saved_model), tokens=True)
        report = spread.build(index, open_corpus(folder), str(saved_model), 2)
        assert killer.wait(timeout=60) == 0, "a worker was killed"
        assert list(report.failures) == ["broken.png"]
        same_rows(contents(tmp_path / "spread"), contents(tmp_path / "local"))
        picture(folder / "001.png", 1001)
        (folder / "002.png").unlink()
        report = spread.build(index, open_corpus(folder), str(saved_model), 2)
        assert (report.encoded, report.deleted, report.unchanged) == (1, 1, 88)
        make(searcher, folder, tmp_path / "local")
        same_rows(contents(tmp_path / "spread"), contents(tmp_path / "local"))
    finally:
        killer.kill()
        ray.shutdown()


KILLER = """
import os, signal, sys, time
from pathlib import Path
until = time.time() + 100
while time.time() < until:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            about = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if about.startswith(b"ray::") and b"MapWorker(MapBatches(Worker)).submit" in about:  # while it works on a block
            os.kill(int(entry.name), signal.SIGKILL)
            sys.exit(0)
    time.sleep(0.005)
sys.exit(1)
"""


def test_langchain_and_llama_index_retrieve(library, tmp_path):
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import QueryBundle

    from rematch.search.langchain import ReMatchRetriever as LangChainRetriever
    from rematch.search.llama_index import ReMatchRetriever as LlamaIndexRetriever

    hits = library.search("number 3", 4, where="year > 1990", rerank="feat:4")
    settings = {"top": 4, "where": "year > 1990", "rerank": "feat:4"}
    documents = LangChainRetriever(index=library, **settings).invoke("number 3")
    assert [d.id for d in documents] == [hit.id for hit in hits]
    assert documents[0].metadata["score"] == pytest.approx(hits[0].score)
    assert documents[0].page_content == hits[0].text
    nodes = LlamaIndexRetriever(library, **settings).retrieve("number 3")
    assert [n.node.node_id for n in nodes] == [hit.id for hit in hits]
    path = picture(tmp_path / "q.png", 9)
    nodes = LlamaIndexRetriever(library, top=3).retrieve(
        QueryBundle("like this", image_path=str(path))
    )
    assert [n.node.node_id for n in nodes] == [
        h.id for h in library.search({"text": "like this", "image": path}, 3)
    ]


def test_the_commands(saved_model, photos, tmp_path, monkeypatch, capfd):
    def rematch(*arguments):
        monkeypatch.setattr(sys, "argv", ["rematch", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out = capfd.readouterr()
        return code, out.out, out.err

    (photos / "broken.png").write_text("x")
    code, out, err = rematch(
        "index", saved_model, photos, "--output", tmp_path / "i", "--workers", 0
    )
    assert code == 0, err
    assert f"{len(NAMES) + 1} documents in" in out
    assert "'broken.png': " in err
    code, out, _ = rematch(
        "index", saved_model, photos, "--output", tmp_path / "i", "--workers", 0
    )
    assert f"0 encoded, {len(NAMES) + 1} unchanged" in out
    code, out, _ = rematch(
        "search",
        tmp_path / "i",
        "--text",
        "a",
        "--json",
        "--filter",
        "year > 2000",
        "--rerank",
        "raw:3",
    )
    (line,) = out.splitlines()
    assert json.loads(line)["id"] == "deep/with space.png"
    code, out, _ = rematch("search", tmp_path / "i", "--image", photos / "copy.png", "--top", 3)
    assert code == 0
    assert "copy.png" in out
    _, out, _ = rematch("search", tmp_path / "i", "--text", "a", "--filter", "year > 3000")
    assert "Nothing meets the condition" in out
    other = photos.parent / "other"
    picture(other / "o.png", 4)
    for arguments, said in (
        (("index", saved_model, other, "--output", tmp_path / "i"), "To add"),
        (
            ("index", saved_model, photos, "--output", tmp_path / "i", "--tokens"),
            "made without --tokens",
        ),
        (
            ("index", saved_model, photos, "--output", tmp_path / "i", "--dimensions", 8),
            "keeps 32 dimensions",
        ),
        (
            ("index", saved_model, photos, "--output", tmp_path / "j", "--ann", "fast"),
            "--ann fast is unknown",
        ),
        (
            ("index", saved_model, photos, "--output", tmp_path / "j", "--engine", "spark"),
            "--engine spark is unknown",
        ),
        (
            ("index", saved_model, tmp_path / "nope", "--output", tmp_path / "j"),
            "no such folder or file",
        ),
        (("search", tmp_path / "i"), "no query"),
        (("search", tmp_path / "nope", "--text", "a"), "no index there. Make one with"),
        (
            ("search", tmp_path / "i", "--text", "a", "--model", "rematch-tiny"),
            "made by another model",
        ),
        (("search", tmp_path / "i", "--image", "nope.png"), "nope.png: no such picture"),
        (
            ("search", tmp_path / "i", "--text", "a", "--rerank", "maxsim:3"),
            "Make it with --tokens",
        ),
    ):
        code, _, err = rematch(*arguments)
        assert code == 2, arguments
        assert said in err
        assert "Traceback" not in err
    assert not (tmp_path / "j").exists()
    moved = tmp_path / "moved"
    shutil.copytree(saved_model, moved)
    rematch("index", moved, other, "--output", tmp_path / "k", "--workers", 0)
    shutil.rmtree(moved)
    code, _, err = rematch("search", tmp_path / "k", "--text", "a")
    assert code == 2
    assert "its model is not where it was. Say where with --model" in err
    assert rematch("search", tmp_path / "k", "--text", "a", "--model", saved_model)[0] == 0
    code, out, _ = rematch(
        "index", saved_model, other, "--output", tmp_path / "i", "--add", "--workers", 0
    )
    assert f"{len(NAMES) + 2} documents in" in out


def test_memory_of_ids_is_right_beyond_its_buffer():
    numbers = building.Numbers(np.array([5, 1], np.uint64))
    rng = random.Random(0)
    added = [rng.getrandbits(64) for _ in range(70_000)]
    for number in added:
        numbers.add(number)
    assert len(numbers.few) < 10_000
    assert all(number in numbers for number in [1, 5, *added[:50], *added[-50:]])
    assert 2 not in numbers
