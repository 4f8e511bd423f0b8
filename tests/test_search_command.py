"""``rematch index`` and ``rematch search``: what they print, and one line for each mistake."""

import json
import shutil
import sys

import pytest
from shared_search import NAMES, save_picture

from rematch import cli


@pytest.fixture
def rematch(monkeypatch, capfd):
    """Run the command in this process; returns its exit code, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rematch", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def index(rematch, saved_model, photos, tmp_path):
    """An index of the photos."""
    output = tmp_path / "i"
    code, _, err = rematch("index", saved_model, photos, "--output", output, "--workers", 0)
    assert code == 0, err
    return output


def test_index_prints_counts_and_failures(rematch, saved_model, photos, tmp_path):
    (photos / "broken.png").write_text("x")
    arguments = ("index", saved_model, photos, "--output", tmp_path / "i", "--workers", 0)
    code, out, err = rematch(*arguments)
    assert code == 0, err
    assert f"{len(NAMES) + 1} documents in" in out
    assert "'broken.png': " in err
    _, out, _ = rematch(*arguments)
    assert f"0 encoded, {len(NAMES) + 1} unchanged" in out


def test_only_a_directory_is_said_to_have_a_report(rematch, saved_model, photos, tmp_path):
    for number in range(7):
        (photos / f"broken {number}.png").write_text("x")
    for output in (tmp_path / "i", f"file://{tmp_path}/j"):
        arguments = ("index", saved_model, photos, "--output", output, "--workers", 0)
        _, _, err = rematch(*arguments, "--max-failures", 1)
        assert err.count("'broken ") == 5
        has_report = (tmp_path / str(output)[-1] / "report.json").exists()
        assert ("all of them are in" in err) == has_report
        assert ("and 2 more" in err) != has_report


def test_add_keeps_the_documents_of_another_corpus(rematch, saved_model, index, tmp_path):
    save_picture(tmp_path / "other" / "o.png", 4)
    arguments = ("index", saved_model, tmp_path / "other", "--output", index)
    _, out, _ = rematch(*arguments, "--add", "--workers", 0)
    assert f"{len(NAMES) + 2} documents in" in out


def test_search_prints_a_table_or_json(rematch, photos, index):
    text = ("search", index, "--text", "a")
    _, out, _ = rematch(*text, "--json", "--filter", "year > 2000", "--rerank", "raw:3")
    (line,) = out.splitlines()
    assert json.loads(line)["id"] == "deep/with space.png"
    code, out, _ = rematch("search", index, "--image", photos / "copy.png", "--top", 3)
    assert code == 0
    assert "copy.png" in out
    assert "Query instruction: Find a day-to-day image" in " ".join(out.split())
    _, out, _ = rematch(*text, "--instruction", "")
    assert "Query instruction" not in out
    _, out, _ = rematch(*text, "--filter", "year > 3000")
    assert "No document meets the condition" in out


def test_mistakes_are_one_line(rematch, saved_model, photos, index, tmp_path):
    other, absent = tmp_path / "other", tmp_path / "j"
    save_picture(other / "o.png", 4)
    make, search = ("index", saved_model), ("search", index)
    table = tmp_path / "table.json"
    table.write_text('{"text-image": "Find: "}')
    for arguments, message in (
        ((*make, other, "--output", index), "To add"),
        ((*make, photos, "--output", index, "--tokens"), "made without --tokens"),
        ((*make, photos, "--output", index, "--dimensions", 8), "of 32 dimensions"),
        ((*make, photos, "--output", absent, "--ann", "fast"), "--ann fast is unknown"),
        ((*make, photos, "--output", absent, "--engine", "spark"), "--engine spark is unknown"),
        ((*make, tmp_path / "nope", "--output", absent), "no such folder or file"),
        ((*make, photos, "--output", index, "--instructions", table), "other query instructions"),
        ((*make, photos, "--output", absent, "--instructions", photos), "is a folder"),
        (search, "no query"),
        (("search", tmp_path / "nope", "--text", "a"), "no index there. Make one with"),
        ((*search, "--text", "a", "--model", "rematch-tiny"), "made by another model"),
        ((*search, "--image", "nope.png"), "nope.png: no such picture"),
        ((*search, "--text", "a", "--rerank", "maxsim:3"), "Build it with --tokens"),
    ):
        code, _, err = rematch(*arguments)
        assert code == 2, arguments
        assert message in err
        assert "Traceback" not in err
    assert not absent.exists()


def test_a_model_that_has_moved(rematch, saved_model, photos, tmp_path):
    first, output = tmp_path / "first place", tmp_path / "i"
    shutil.copytree(saved_model, first)
    rematch("index", first, photos, "--output", output, "--workers", 0)
    shutil.rmtree(first)
    search = ("search", output, "--text", "a")
    code, _, err = rematch(*search)
    assert code == 2
    assert f"its model is no longer at {first}. Give its new place with --model" in err
    assert rematch(*search, "--model", saved_model)[0] == 0
