"""Processes that write to an index and serve it are killed again and again.

    python benchmarks/kill.py --output benchmarks/results/kill.json

A server answers searches while another process indexes a corpus of captions. The indexer is killed
with SIGKILL at random moments after it has written, and started again, ten times; after each the
index must be readable and the server must follow it. Then the last run finishes, and the index
must have every document. Finally the server is killed, and another one must give the same answers.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from serve import captions, server

from rematch.files import write_json, write_text
from rematch.search.index import Index


def search(address: str, top: int = 200) -> tuple[int, list[str]]:
    """The status of a search, and the ids of its hits."""
    body: dict[str, Any] = {"text": "a red apple", "top": top, "rerank": "feat:20"}
    request = urllib.request.Request(
        f"{address}/v1/search", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, [hit["id"] for hit in json.load(response)["hits"]]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, []


def wait_for(address: str) -> None:
    """Wait until a server answers."""
    for _ in range(1200):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not answer")


def main() -> None:
    """Kill, print what came of it, and with ``--output`` write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="longest time from a write to the kill"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    statuses: Counter[int] = Counter()
    stop = threading.Event()
    sizes: list[int] = []
    with TemporaryDirectory() as folder:
        path, corpus = Path(folder) / "captions.idx", Path(folder) / "captions.jsonl"
        rows = [
            json.dumps({"id": str(i), "text": text})
            for i, text in enumerate(islice(captions(), args.documents))
        ]
        write_text(corpus, "\n".join(rows[:20]))
        command = [sys.executable, "-m", "rematch.cli", "index", args.model, str(corpus)]
        command += ["--output", str(path)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, check=True, **quiet)
        write_text(corpus, "\n".join(rows))
        with server(str(path)) as (host, port, process):
            address = f"http://{host}:{port}"
            wait_for(address)

            def ask() -> None:
                while not stop.is_set():
                    statuses[search(address)[0]] += 1

            asking = threading.Thread(target=ask)
            asking.start()
            killed = 0
            while killed < args.kills:
                indexer = subprocess.Popen(command, **quiet, start_new_session=True)
                size = len(Index.open(path))
                while len(Index.open(path)) == size and indexer.poll() is None:
                    time.sleep(0.1)
                time.sleep(rng.uniform(0, args.seconds))
                if indexer.poll() is not None:
                    raise SystemExit("the indexer ended before it was killed: more --documents")
                os.killpg(indexer.pid, signal.SIGKILL)  # its workers too
                indexer.wait()
                killed += 1
                sizes.append(len(Index.open(path)))
                print(f"killed {killed} times; the index has {sizes[-1]:,} documents")
            subprocess.run(command, check=True, **quiet)
            final = len(Index.open(path))
            time.sleep(1)
            before = search(address)
            stop.set()
            asking.join()
            os.kill(process, signal.SIGKILL)
        with server(str(path)) as (host, port, _):
            wait_for(f"http://{host}:{port}")
            after = search(f"http://{host}:{port}")
    content = {
        "killed": killed,
        "documents_after_each": sizes,
        "documents": final,
        "searches": {str(status): count for status, count in statuses.items()},
        "same_answers_after_restart": before == after,
    }
    print(content)
    if args.output:
        write_json(args.output, content)
    if set(statuses) != {200} or final != args.documents or before != after:
        raise SystemExit("something was lost")


if __name__ == "__main__":
    main()
