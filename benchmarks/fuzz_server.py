"""Requests that no client of good will sends, against a server in a process of its own.

    python benchmarks/fuzz_server.py --requests 100000 --output benchmarks/results/fuzz-server.json

Half of them are bodies for the routes, a quarter whatever can be written to a socket, a quarter
connections that are given up halfway. Outcomes are counted by status, and the server's memory
(PSS) is read after every tenth. It fails if a request is answered with 500, if the server does not
answer in time, or if it dies.
"""

import argparse
import http.client
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.search.build import build
from rematch.search.index import Index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import shared_fuzz

SECONDS = 30  # in which a request is answered


def make_index(model: str, folder: Path) -> str:
    """An index of coloured cards."""
    (folder / "cards").mkdir()
    for colour in ("red", "green", "blue", "white", "black", "orange"):
        Image.new("RGB", (48, 40), colour).save(folder / "cards" / f"{colour}.png")
        (folder / "cards" / f"{colour}.txt").write_text(f"a {colour} card")
    loaded = ReMatch(model)
    index = Index.create(folder / "cards.idx", loaded, name=model, tokens=True)
    build(index, open_corpus(folder / "cards"), Encoder(loaded, workers=0))
    return index.uri


@contextmanager
def server(target: str) -> Iterator[tuple[str, int, int]]:
    """Start a server; yields its host, port and process id."""
    command = [sys.executable, "-m", "rematch.cli", "serve", target, "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        host, port = process.stdout.readline().split("http://")[1].split(";")[0].split(":")
        yield host, int(port), process.pid
    finally:
        process.terminate()
        process.wait(120)


def megabytes(process: int) -> float:
    """Memory of a process, its share of what it shares with others included (PSS)."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return round(int(text.split("\nPss:")[1].split()[0]) / 1024, 1)


def outcome(address: tuple[str, int], seed: int) -> str:
    """What came of one request."""
    rng = random.Random(seed)
    way = rng.randrange(4)
    if way < 2:
        path = rng.choice(shared_fuzz.PATHS)
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        try:
            body = shared_fuzz.body(rng, path)
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return str(response.status)
        finally:
            connection.close()
    message = shared_fuzz.raw_request(rng)
    if way == 2:
        answer = shared_fuzz.converse(address, message, 0.1)
        return answer[9:12].decode() or "no answer to what is not complete"
    with socket.create_connection(address, SECONDS) as connection:
        connection.sendall(message[: rng.randrange(len(message))])
    return "given up by the client"


def main() -> None:
    """Send, print what came of it and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    failures: list[int] = []
    slowest = 0.0
    tenth = max(1, args.requests // 10)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(make_index(args.model, Path(folder))) as (host, port, process),
    ):
        while True:
            try:
                socket.create_connection((host, port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        for i in range(200):  # what is loaded and allocated once
            outcome((host, port), -1 - i)
        memory = [megabytes(process)]

        def send(number: int) -> tuple[str, float]:
            start = time.perf_counter()
            try:
                result = outcome((host, port), args.seed * 1_000_003 + number)
            except (OSError, http.client.HTTPException) as error:
                result = type(error).__name__
            return result, time.perf_counter() - start

        with ThreadPoolExecutor(args.clients) as clients:
            for first in range(0, args.requests, tenth):
                numbers = range(first, min(first + tenth, args.requests))
                for i, (result, seconds) in zip(numbers, clients.map(send, numbers), strict=True):
                    slowest = max(slowest, seconds)
                    outcomes[result] += 1
                    if result == "500" or seconds > SECONDS:
                        failures.append(i)
                memory.append(megabytes(process))
                sent = numbers.stop
                print(f"{sent:,} requests, {memory[-1]:.1f} MB, {dict(outcomes)}", flush=True)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        connection.request("GET", "/health")
        healthy = connection.getresponse().status == 200
        connection.close()
    print(f"memory in MB before and after each tenth: {memory}; slowest: {slowest:.1f} s")
    if args.output:
        content = {
            "requests": args.requests,
            "clients": args.clients,
            "outcomes": dict(outcomes.most_common()),
            "memory_mb": memory,
            "slowest_seconds": round(slowest, 2),
            "answered_with_500": failures,
            "model": args.model,
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "versions": {
                name: version(name)
                for name in ("torch", "pillow", "fastapi", "uvicorn", "h11", "rematch-mm")
            },
        }
        write_json(args.output, content)
    if failures or not healthy:
        raise SystemExit(f"requests that failed: {json.dumps(failures)}; healthy: {healthy}")


if __name__ == "__main__":
    main()
