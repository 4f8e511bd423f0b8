"""Evaluations that are killed and resumed, or shared by two processes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from rematch.evaluate.command import EvaluateOptions, run

ROUNDING = 1e-5  # of float32 sums in another order, as in test_encoder.py


COMMAND = [sys.executable, "-m", "rematch.cli", "evaluate"]


QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def one_thread():
    """One thread, as in the processes that these tests start.

    Rounding depends on the number of threads, and with it the ranks of nearly equal scores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_run(content: dict) -> dict:
    """Scores without the date, times and counts of a run, as JSON has them."""
    return json.loads(json.dumps({name: v for name, v in content.items() if name != "run"}))


def rows_of(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return connection.execute("select count(*) from vectors").fetchone()[0]


def test_an_evaluation_resumes_after_kill_9_with_the_same_scores(
    saved_model, tmp_path, one_thread
):
    output = tmp_path / "interrupted"
    tasks = ["Picto-T2I", "Picto-I2T", "Picto-Style", "Picto-Edit", "Picto-Grounding"]
    settings = {"limit": 25, "batch_tokens": 400, "workers": 0, "tasks": tasks}
    whole = run(EvaluateOptions(str(saved_model), output=tmp_path / "whole", **settings))
    options = f"--limit 25 --batch-tokens 400 --workers 0 --tasks {','.join(tasks)}"
    arguments = [*options.split(), "--output", output]
    process = subprocess.Popen(
        [*COMMAND, str(saved_model), *arguments],
        env=os.environ | QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = 0
    deadline = time.time() + 120
    while rows < 60 and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
        for file in output.glob("vectors/*.sqlite"):
            with suppress(sqlite3.OperationalError):  # it may have no tables yet
                rows = rows_of(file)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rows >= 60
    assert not (output / "scores.json").exists()
    (file,) = output.glob("vectors/*.sqlite")
    stored = rows_of(file)
    resumed = run(EvaluateOptions(str(saved_model), output=output, **settings))
    assert 0 < stored < whole["run"]["inputs_encoded"]
    assert resumed["run"]["inputs_encoded"] == whole["run"]["inputs_encoded"] - stored
    assert without_run(resumed) == without_run(whole)


def test_two_processes_give_the_vectors_of_a_single_one(saved_model, tmp_path, one_thread):
    tasks = ["Picto-T2I"]
    settings = {"limit": 8, "save_vectors": True, "rerank": 3, "tasks": tasks, "maxsim": True}
    single = run(EvaluateOptions(str(saved_model), output=tmp_path / "single", **settings))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m rematch.cli evaluate"
    options = "--limit 8 --save-vectors --rerank 3 --tasks Picto-T2I --maxsim"
    result = subprocess.run(
        [
            sys.executable,
            *torchrun.split(),
            str(saved_model),
            *options.split(),
            "--output",
            tmp_path / "two",
        ],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two/scores.json").read_text())
    assert without_run(two) == without_run(single)
    for task in tasks:
        a = np.load(tmp_path / f"single/arrays/{task}.npz")
        b = np.load(tmp_path / f"two/arrays/{task}.npz")
        assert np.allclose(a["queries"], b["queries"], atol=ROUNDING)
        assert np.allclose(a["documents"], b["documents"], atol=ROUNDING)
