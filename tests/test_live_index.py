"""A server over an index that other processes update, compact, replace, restore and kill."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pytest
from shared_server import NOISE, card_engine, file_of, post, running

from rematch.search.index import Index
from rematch.serve.engine import Engine

WRITER = """
import lancedb, sys
from datetime import timedelta
table = lancedb.connect(sys.argv[1]).open_table("documents")
row = table.search().limit(1).to_arrow()
names = row.schema.names
number = table.count_rows()
input()
table.checkout_latest()
print("writing", flush=True)
while True:
    number += 1
    id = row.schema.field("id")
    table.add(row.set_column(names.index("id"), id, [[f"written {number}"]]))
    if number % 3 == 0:
        table.delete(f"id = 'written {number - 2}'")
    if number % 5 == 0:
        table.optimize(cleanup_older_than=timedelta(milliseconds=1))
"""


@pytest.fixture
def engine(saved_model, tmp_path) -> Engine:
    return card_engine(saved_model, tmp_path)


def records(prefix: str, count: int, rng: random.Random) -> list[dict]:
    """Rows as the builder makes them; the pictures of some are stored in the index."""
    rows = []
    for i in range(count):
        vectors = np.random.default_rng(rng.randrange(1000)).normal(size=(5, 32))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        picture = file_of(NOISE) if rng.random() < 0.5 else None
        rows.append(
            {"id": f"{prefix} {i}", "vector": vectors[0], "tokens": vectors[1:], "text": prefix}
            | {"image": picture, "content_hash": f"{i:032x}", "stamp": i}
        )
    return rows


class Searcher:
    """Searches all the time, and keeps what is not an answer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.answers, self.failures = 0, []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(2)]

    def _run(self, number: int) -> None:
        bodies = [
            {"text": "a card", "top": 200, "rerank": "feat:10,raw:3"},
            {"text": "a card", "top": 200, "filter": "id != 'x'"},
        ]
        while not self._stop.is_set():
            status, _, content = post(f"{self.address}/v1/search", bodies[number])
            time.sleep(0.02)
            if status == 200 and content["hits"]:
                self.answers += 1
            else:
                self.failures.append((status, content))

    def __enter__(self) -> "Searcher":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, ids: set[str]) -> None:
        """Wait until a search returns these documents."""
        deadline = time.monotonic() + 30  # half a second, on a machine that is not busy
        while True:
            _, _, content = post(f"{self.address}/v1/search", {"text": "a card", "top": 200})
            if {hit["id"] for hit in content.get("hits", [])} == ids:
                return
            assert time.monotonic() < deadline, content
            time.sleep(0.05)


def ids_of(path: Path) -> set[str]:
    table = lancedb.connect(str(path)).open_table("documents")
    return set(table.search().select(["id"]).to_arrow()["id"].to_pylist())


def test_a_server_follows_whatever_is_done_to_its_index(engine, tally):
    rng = random.Random(0)
    path = Path(engine.index.uri)
    backup = path.with_name("backup")
    outcomes = tally("Live index")

    def add(index):
        index.add(records(f"new {rng.randrange(1000)}", rng.randint(1, 9), rng), new=False)

    def delete(index):
        index.delete(rng.sample(sorted(ids_of(path)), 2))

    def delete_and_restore(index):
        version = index.table.version
        delete(index)
        index.restore(version)

    def add_column(index):
        index.add_metadata_columns({f"column{rng.randrange(1000)}": "text"})

    def compact(index):
        index.compact(timedelta(milliseconds=1))

    def replace(index):
        copy = path.with_name("copy")
        shutil.copytree(path, copy)
        add(Index.open(copy))
        shutil.rmtree(path)
        time.sleep(rng.uniform(0, 0.5))
        copy.rename(path)

    def restore_backup(index):
        shutil.rmtree(path)
        shutil.copytree(backup, path)

    changes = [add, delete, delete_and_restore, add_column, compact, replace, restore_backup]
    shutil.copytree(path, backup)
    with running(engine) as address, Searcher(address) as searcher:
        for change in [*rng.sample(changes, 7), *rng.choices(changes, k=5)]:
            change(Index.open(path))
            searcher.wait_for(ids_of(path))
            outcomes["changes"] += 1
    assert not searcher.failures, searcher.failures[:3]
    assert searcher.answers > 12
    outcomes["answered searches"] += searcher.answers


def test_a_writer_that_is_killed_does_not_harm_the_server(engine, tally):
    path = Path(engine.index.uri)
    outcomes = tally("Live index")
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, **pipes) as first,
        subprocess.Popen(command, **pipes) as second,
        running(engine) as address,
        Searcher(address) as searcher,
    ):
        for writer, seconds in ((first, 0.3), (second, 0.7)):
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == b"writing\n"
            time.sleep(seconds)
            writer.send_signal(signal.SIGKILL)
            writer.wait(30)
            searcher.wait_for(ids_of(path))
            outcomes["killed writers"] += 1
    assert not searcher.failures, searcher.failures[:3]
    outcomes["answered searches"] += searcher.answers


def test_an_index_that_is_gone_is_said_to_be(engine, saved_model):
    path = Path(engine.index.uri)
    with running(engine) as address:
        path.rename(path.with_name("elsewhere"))
        search = {"text": "a card"}
        time.sleep(0.6)  # what was read half a second ago counts as present
        for _ in range(2):
            status, headers, content = post(f"{address}/v1/search", search)
            assert status == 503
            assert str(path.parent) not in content["error"]["message"]
            assert headers["retry-after"] == "1"
        assert post(f"{address}/v1/embeddings", {"input": "a card"})[0] == 200
        assert not path.exists(), "a backup can be moved to its place"
        path.with_name("elsewhere").rename(path)
        assert post(f"{address}/v1/search", search)[0] == 200


def test_a_copy_under_way_is_read_once_it_is_complete(engine):
    folder = Path(engine.index.uri, "documents.lance", "_versions")
    # numbers count down in names, so that the latest version comes first
    newer = sorted(folder.glob("*.manifest"))[:-1]
    contents = {path: path.read_bytes() for path in newer}
    assert len(engine.index) == 6

    def copy():
        for path, content in reversed(contents.items()):
            time.sleep(0.15)
            path.write_bytes(content)

    for path in newer:
        path.unlink()
    assert lancedb.connect(engine.index.uri).open_table("documents").count_rows() == 0
    time.sleep(0.6)  # until the version in hand is checked again
    copying = threading.Thread(target=copy)
    copying.start()
    try:
        assert len(engine.index) == 6
    finally:
        copying.join()


def test_a_version_that_was_opened_stays(engine):
    path = engine.index.uri
    version = engine.index.table.version
    index = Index.open(path, version=version)
    Index.open(path).delete(["red.png"])
    time.sleep(0.6)
    assert len(index) == 6
    assert len(engine.index) == 5
