"""Building by Ray: the same index, even if a worker is killed."""

import subprocess
import sys

import pytest
from shared_search import assert_same_rows, build_index, contents, save_picture

from rematch.data.corpus import open_corpus
from rematch.search.index import Index


def test_ray_makes_the_same_index_though_a_worker_is_killed(
    saved_model, searcher, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray")
    from rematch.search import ray as ray_module

    folder = tmp_path / "photos"
    for i in range(48):
        save_picture(folder / f"{i:03}.png", i, 200)
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:300])
    build_index(searcher, folder, tmp_path / "local", tokens=True)
    monkeypatch.setattr(ray_module, "BLOCK", 6)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    killer = subprocess.Popen([sys.executable, "-c", KILLER], stdout=subprocess.PIPE, text=True)
    try:
        index = Index.create(tmp_path / "spread", searcher, name=str(saved_model), tokens=True)
        report = ray_module.build(index, open_corpus(folder), str(saved_model), 2)
        assert killer.wait(timeout=60) == 0, "a worker was killed"
        assert list(report.failures) == ["broken.png"]
        assert_same_rows(contents(tmp_path / "spread"), contents(tmp_path / "local"))
        save_picture(folder / "001.png", 1001)
        (folder / "002.png").unlink()
        report = ray_module.build(index, open_corpus(folder), str(saved_model), 1)
        assert (report.encoded, report.deleted, report.unchanged) == (1, 1, 46)
        build_index(searcher, folder, tmp_path / "local")
        assert_same_rows(contents(tmp_path / "spread"), contents(tmp_path / "local"))
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
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        # while it works on a block
        if command.startswith(b"ray::") and b"MapWorker(MapBatches(Worker)).submit" in command:
            os.kill(int(entry.name), signal.SIGKILL)
            sys.exit(0)
    time.sleep(0.005)
sys.exit(1)
"""
