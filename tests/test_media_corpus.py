"""Folders with PDF files and videos beside pictures, indexed, updated, searched and reranked."""

import json
import os
from contextlib import nullcontext

import pytest
from shared_documents import encrypt, save_pdf, save_video
from shared_search import assert_same_rows, build_index, contents, save_picture

from rematch import cli
from rematch.data import folder as folder_module
from rematch.data.corpus import open_corpus
from rematch.data.document import Document, Unreadable
from rematch.encoding.encoder import Encoder
from rematch.prompts import QUERY_INSTRUCTIONS
from rematch.search.build import build
from rematch.search.index import Index
from rematch.serve.engine import Engine
from rematch.serve.limits import ClientError


def make_folder(folder):
    """A folder with a picture, PDF files of which two cannot be read, and two videos."""
    save_picture(folder / "p.png", 1)
    save_pdf(folder / "report.pdf", ["A red fox", "", "Two owls"], "Animals")
    (folder / "report.json").write_text('{"year": 1999}')
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)))
    encrypt(folder / "report.pdf", folder / "sub.pdf")
    save_video(folder / "clip.mp4", ["red", "blue", "white", "black"])
    (folder / "clip.txt").write_text("colours")
    save_video(folder / "other.webm", ["purple"])
    return folder


@pytest.fixture(scope="module")
def media(searcher, tmp_path_factory):
    """(folder, index, report) of such a folder."""
    folder = make_folder(tmp_path_factory.mktemp("media"))
    index = Index.create(
        folder.parent / "media.idx", searcher, name="model", tokens=True, frames=4
    )
    corpus = open_corpus(folder, frames=4)
    return folder, index, build(index, corpus, Encoder(searcher, workers=0), max_failures=0.9)


def test_pages_and_videos_are_documents(media):
    folder, index, report = media
    rows = {row["id"]: row for row in contents(index.uri)}
    assert set(rows) == {
        "p.png", "clip.mp4", "other.webm", *(f"report.pdf#page={n}" for n in (1, 2, 3)),
    }  # fmt: skip
    first = rows["report.pdf#page=1"]
    assert (first["text"], first["page"], first["pages"], first["title"], first["year"]) == (
        "A red fox", 1, 3, "Animals", 1999,
    )  # fmt: skip
    assert first["path"] == f"{folder}/report.pdf#page=1"
    assert rows["clip.mp4"]["text"] == "colours"
    assert all(row["image"] is None for row in rows.values())
    assert {"broken.pdf", "sub.pdf"} == set(report.failures)
    assert "broken, or not a PDF" in report.failures["broken.pdf"]
    assert "encrypted" in report.failures["sub.pdf"]


def test_a_page_is_encoded_by_its_picture_a_video_by_its_frames(media, searcher):
    folder, index, _ = media
    documents = {d.id: d for d in open_corpus(folder, 4) if isinstance(d, Document)}
    assert documents["report.pdf#page=1"].load_input()["text"].startswith("Understand")
    assert "fox" not in documents["report.pdf#page=1"].load_input()["text"]
    assert len(documents["clip.mp4"].load_input()["image"]) == 4
    inputs = [document.load_input() for document in documents.values()]
    vectors = searcher.encode_document(inputs, show_progress_bar=False)
    rows = {row["id"]: row["vector"] for row in contents(index.uri)}
    for name, vector in zip(documents, vectors, strict=True):
        assert rows[name] == pytest.approx(vector, abs=1e-4)


def test_pages_are_found_by_their_words_and_reranked(media, searcher):
    index = media[1]
    assert [hit.id for hit in index.search("fox", mode="text")] == ["report.pdf#page=1"]
    assert [hit.id for hit in index.search("owls", mode="text")] == ["report.pdf#page=3"]
    hits = index.search("owls", 6, rerank="raw:6")
    assert not hits.warnings
    documents = {d.id: d for d in open_corpus(media[0], 4) if isinstance(d, Document)}
    query = index.instruction("owls") + "owls"
    for hit in hits:
        expected = searcher.match([query], [documents[hit.id].load_input()])[0]
        assert hit.score == pytest.approx(expected, abs=1e-4)


def test_a_missing_page_or_video_drops_out_of_reranking(searcher, tmp_path):
    folder = make_folder(tmp_path / "f")
    index = Index.create(tmp_path / "i", searcher, name="model", frames=2)
    corpus = open_corpus(folder, 2)
    build(index, corpus, Encoder(searcher, workers=0), max_failures=0.9)
    save_pdf(folder / "report.pdf", ["one"])
    (folder / "clip.mp4").unlink()
    hits = index.search("a", 6, rerank="raw:6")
    assert sorted(warning.split(":")[0] for warning in hits.warnings) == [
        "clip.mp4", "report.pdf#page=2", "report.pdf#page=3",
    ]  # fmt: skip


def test_only_changed_files_are_opened_again(media, searcher, monkeypatch, tmp_path):
    folder = make_folder(tmp_path / "f")
    opened = []
    real = folder_module.open_pdf
    monkeypatch.setattr(folder_module, "open_pdf", lambda p: opened.append(p.name) or real(p))
    index = Index.create(tmp_path / "i", searcher, name="model", frames=2)

    def run(segments=0):
        opened.clear()
        encoder = Encoder(searcher, workers=0)
        return build(index, open_corpus(folder, 2, segments), encoder, max_failures=0.9)

    run()
    assert opened == ["broken.pdf", "report.pdf", "sub.pdf"]
    report = run()
    assert opened == ["broken.pdf", "sub.pdf"], "those that failed are tried again"
    assert (report.encoded, report.unchanged) == (0, 6)
    index.delete(["report.pdf#page=2"])  # as after a run that was killed
    report = run()
    assert (report.encoded, report.unchanged, "report.pdf" in opened) == (1, 5, True)
    save_pdf(folder / "report.pdf", ["A red fox"])
    report = run()
    assert (report.deleted, "report.pdf" in opened) == (2, True)
    report = run(segments=2)
    assert {row["id"] for row in contents(index.uri)} == {
        "p.png", "report.pdf#page=1", "clip.mp4#t=0,2", "clip.mp4#t=2,4", "other.webm#t=0,2",
    }  # fmt: skip
    assert run(segments=2).unchanged == 5
    (folder / "report.json").write_text('{"year": 2000}')
    assert run(segments=2).unchanged == 4


def test_pages_of_a_file_that_can_no_longer_be_read_stay(searcher, tmp_path):
    folder = make_folder(tmp_path / "f")
    build_index(searcher, folder, tmp_path / "i", max_failures=0.9)
    (folder / "report.pdf").write_bytes((folder / "broken.pdf").read_bytes())
    _, report = build_index(searcher, folder, tmp_path / "i", max_failures=0.9)
    assert report.deleted == 0
    assert "broken" in report.failures["report.pdf"]
    (folder / "report.pdf").unlink()
    _, report = build_index(searcher, folder, tmp_path / "i", max_failures=0.9)
    assert report.deleted == 3


def test_the_kind_of_most_documents_chooses_the_instruction(searcher, tmp_path):
    for name, make, expected in (
        ("pages", lambda f: save_pdf(f / "a.pdf", ["a", "b"]), "document image"),
        ("videos", lambda f: save_video(f / "a.mp4", ["red"]), "a video"),
        ("pictures", lambda f: save_picture(f / "a.png", 1), "everyday image"),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        index, _ = build_index(searcher, tmp_path / name, tmp_path / f"{name}.idx")
        assert expected in index.instruction("a fox")


def test_the_kind_of_documents_is_told_by_a_few_of_them(searcher, tmp_path, monkeypatch):
    monkeypatch.setattr("rematch.search.index._KIND_ROWS", 3)
    index = Index.create(tmp_path / "i", searcher, name="model")
    assert index.instruction("a fox") == QUERY_INSTRUCTIONS["text-text"]  # still empty
    folder = tmp_path / "f"
    folder.mkdir()
    for number in range(12):
        save_picture(folder / f"{number:02}.png", number)
    save_pdf(folder / "zz.pdf", ["a"])
    build(index, open_corpus(folder), Encoder(searcher, workers=0))
    assert index.instruction("a fox") == QUERY_INSTRUCTIONS["text-image"]


def test_stored_pictures_make_the_files_dispensable(searcher, saved_model, tmp_path):
    folder = make_folder(tmp_path / "f")
    arguments = {"name": "model", "frames": 2}
    index = Index.create(tmp_path / "i", searcher, store_pictures=True, **arguments)
    other = Index.create(tmp_path / "j", searcher, **arguments)
    for target in (index, other):
        build(target, open_corpus(folder, 2), Encoder(searcher, workers=0), max_failures=0.9)
    expected = other.search("a", 6, rerank="raw:6")
    engine = Engine(index.uri, str(saved_model))
    assert engine.file("report.pdf#page=3") == folder / "report.pdf"  # still to be opened there
    assert engine.file("clip.mp4") == folder / "clip.mp4"
    for path in folder.iterdir():
        if path.suffix in (".pdf", ".png"):
            path.unlink()
    hits = index.search("a", 6, rerank="raw:6")
    for name in ("report.pdf#page=3", "p.png", "no such"):
        with pytest.raises(ClientError, match="no PDF file or video"):
            engine.file(name)
    assert not hits.warnings
    assert [hit.id for hit in hits] == [hit.id for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-4)


def test_hostile_files_are_failures_with_a_reason(tmp_path):
    save_picture(tmp_path / "p.png", 1)
    os.mkfifo(tmp_path / "pipe.pdf")
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "dangling.pdf").symlink_to("nowhere.pdf")
    (tmp_path / "json.pdf").write_bytes(save_pdf(tmp_path / "x.pdf", ["a"]).read_bytes())
    (tmp_path / "json.json").write_text("[1]")
    (tmp_path / os.fsdecode(b"\xff.pdf")).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.mp4")
    documents = list(open_corpus(tmp_path, segments=5))
    failures = {d.id: str(d.error) for d in documents if isinstance(d, Unreadable)}
    assert len(failures) == len(documents) - 2
    for name, reason in (
        ("pipe.pdf", "a pipe"), ("empty.pdf", "broken"), ("dangling.pdf", "cannot be read"),
        ("json.pdf", "holds a list"), (r"\xff.pdf", "not UTF-8"), ("pipe.mp4", "a pipe"),
    ):  # fmt: skip
        assert reason in failures[name]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    save_pdf(tmp_path / "a.pdf", ["a"])
    save_video(tmp_path / "a.mp4", ["red"])
    for module in ("pypdfium2", "av"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    from rematch.data import pages

    pages._pdfium.cache_clear()
    pages._document.cache_clear()
    failures = [str(d.error) for d in open_corpus(tmp_path, segments=5)]
    pages._pdfium.cache_clear()
    assert sorted(reason.split("pip install ")[1] for reason in failures) == [
        "'rematch-mm[documents]'.", "'rematch-mm[video]'.",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_to_the_same_index(searcher, tmp_path):
    """Stopped after each of several commits, between the pages of a file and elsewhere."""
    folder = tmp_path / "f"
    folder.mkdir()
    save_pdf(folder / "a.pdf", [f"page {n}" for n in range(40)])
    save_video(folder / "b.mp4", ["red", "blue", "white"])
    whole, _ = build_index(searcher, folder, tmp_path / "whole")

    class StopError(Exception):
        pass

    index = Index.create(tmp_path / "i", searcher, name="model")
    for limit in (5, 17, 9):
        written = 0
        add = Index.add

        def stopping_add(self, records, *, new, limit=limit, add=add):
            nonlocal written
            add(self, records[: max(0, limit - written)], new=new)
            written += len(records)
            if written >= limit:
                raise StopError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Index, "add", stopping_add)
            with pytest.raises(StopError):
                build(index, open_corpus(folder), Encoder(searcher, workers=0))
    build(index, open_corpus(folder), Encoder(searcher, workers=0))
    assert_same_rows(contents(index.uri), contents(whole.uri))


def test_the_options_of_the_command(saved_model, tmp_path, monkeypatch, capfd):
    def rematch(*arguments):
        monkeypatch.setattr("sys.argv", ["rematch", *map(str, arguments)])
        with pytest.raises(SystemExit) if arguments[-1] != 0 else nullcontext():
            cli.main()
        return capfd.readouterr().err

    folder = tmp_path / "f"
    folder.mkdir()
    save_video(folder / "a.mp4", ["red", "blue"])
    output = tmp_path / "i"
    arguments = ("index", saved_model, folder, "--output", output)
    rematch(*arguments, "--frames", 2, "--segments", 1, "--workers", 0)
    assert [row["id"] for row in contents(output)] == ["a.mp4#t=0,1", "a.mp4#t=1,2"]
    assert json.loads((output / "report.json").read_text())["about"]["frames"] == 2
    assert "was made with --frames 2" in rematch(*arguments, "--frames", 3)
    assert "without --store-pictures" in rematch(*arguments, "--store-pictures")
