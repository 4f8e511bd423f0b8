"""Builds that are killed, locked out, or cannot write."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from shared_search import assert_same_rows, build_index, contents, save_picture

from rematch.errors import DataError
from rematch.search import build as building
from rematch.search.index import Index
from rematch.search.storage import write_lock

CHILD = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from unittest.mock import Mock
from rematch import ReMatch
from rematch.encoding.encoder import Encoder
from rematch.search import build as building
from rematch.data.corpus import open_corpus
from rematch.search.index import Index
from rematch.search.storage import exists
model, corpus, output, workers, kills, seconds = sys.argv[1:]
model = ReMatch(model)
forward = Encoder._forward
def slow_forward(*arguments):
    time.sleep(0.02)  # as a larger model would
    return forward(*arguments)
rng, killed = random.Random(int(kills)), 0
while True:
    child = os.fork()
    if child == 0:
        building.FLUSH_SECONDS = 0.0
        Encoder._forward = slow_forward
        if exists(output):
            index = Index.open(output, model)
        else:
            index = Index.create(output, model, name="m", tokens=True)
        encoder = Encoder(model, batch_tokens=1, workers=int(workers))
        building.build(index, open_corpus(Path(corpus)), encoder)
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
    result = subprocess.run(
        [sys.executable, "-c", CHILD, model, corpus, output, str(workers), str(kills), "0.8"],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


def test_kill_9_ten_times_while_indexing_and_while_updating(saved_model, searcher, tmp_path):
    folder = tmp_path / "photos"
    for i in range(120):
        save_picture(folder / f"{i:03}.png", i)
    first = killed_and_finished(saved_model, folder, tmp_path / "i", 0, 5)
    build_index(searcher, folder, tmp_path / "undisturbed", tokens=True)
    assert_same_rows(contents(tmp_path / "i"), contents(tmp_path / "undisturbed"))
    for i in range(0, 120, 2):
        save_picture(folder / f"{i:03}.png", 1000 + i)
    for i in range(1, 120, 10):
        (folder / f"{i:03}.png").unlink()
    for i in range(120, 150):
        save_picture(folder / f"{i:03}.png", i)
    second = killed_and_finished(saved_model, folder, tmp_path / "i", 0, 5)
    build_index(searcher, folder, tmp_path / "afresh", tokens=True)
    assert_same_rows(contents(tmp_path / "i"), contents(tmp_path / "afresh"))
    assert (first + second).count("killed") >= 6, "most kills hit a run that was not finished"


def test_a_run_that_ends_in_its_last_step_is_completed_by_the_next(
    searcher, photos, tmp_path, monkeypatch
):
    index, _ = build_index(searcher, photos, tmp_path / "i")
    save_picture(photos / "new.png", 77)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "compact", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(searcher, photos, tmp_path / "i")
    assert Index.open(tmp_path / "i").has_unindexed_rows
    index, report = build_index(searcher, photos, tmp_path / "i")
    assert report.encoded == 0
    assert not index.has_unindexed_rows
    version = index.table.version
    index, _ = build_index(searcher, photos, tmp_path / "i")
    assert index.table.version == version, "nothing is left to do"


def test_a_second_writer_is_refused_and_readers_are_not(searcher, photos, tmp_path):
    index, _ = build_index(searcher, photos, tmp_path / "i")
    with write_lock(index.uri):
        with pytest.raises(DataError, match="another process is writing"):
            build_index(searcher, photos, tmp_path / "i")
        assert Index.open(tmp_path / "i", searcher).search("a", 1)
    build_index(searcher, photos, tmp_path / "i")


@contextmanager
def small_disk(path: Path, size: str):
    path.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_leaves_a_whole_index(searcher, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "FLUSH_SECONDS", 0.0)
    folder = tmp_path / "photos"
    for i in range(60):
        save_picture(folder / f"{i:02}.png", i)
    with small_disk(tmp_path / "disk", "400k"):
        output = tmp_path / "disk" / "i"
        with pytest.raises(DataError, match=r"cannot be written.*No space left on device"):
            build_index(searcher, folder, output, batch_tokens=1)  # a commit for each document
        part = contents(output)
        assert 0 < len(part) < 60
        assert Index.open(output, searcher).search("a", 3)
        subprocess.run(["mount", "-o", "remount,size=50m", tmp_path / "disk"], check=True)
        build_index(searcher, folder, output)
        build_index(searcher, folder, tmp_path / "undisturbed")
        assert_same_rows(contents(output), contents(tmp_path / "undisturbed"))


def test_a_read_only_index_can_be_searched_and_not_written(searcher, photos, tmp_path):
    with small_disk(tmp_path / "disk", "20m"):
        build_index(searcher, photos, tmp_path / "disk" / "i")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert Index.open(tmp_path / "disk" / "i", searcher).search("a", 3)
        with pytest.raises(DataError, match=r"cannot be written.*Read-only file system"):
            build_index(searcher, photos, tmp_path / "disk" / "i")
        with pytest.raises(DataError, match=r"cannot be written.*Read-only file system"):
            build_index(searcher, photos, tmp_path / "disk" / "another")
