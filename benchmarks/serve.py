"""Throughput and latency of the HTTP API, with and without batching.

    python benchmarks/serve.py --output benchmarks/results/serve.json

The server runs in a process of its own. 1, 8 and 64 clients, each with one open connection, ask
for the embedding of a new text as soon as they have the previous answer; rounds with and without
batching are interleaved. Then come 10,000 more requests, and the server's memory before and after
them.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rematch.data import picto
from rematch.files import write_json


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, int, int]]:
    """Start a server; yields its host, port and process id."""
    command = [sys.executable, "-m", "rematch.cli", "serve", model]
    command += ["--port", "0", "--waiting", "2048", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split("http://")[1].split(";")[0]
        host, port = address.split(":")
        yield host, int(port), process.pid
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One connection."""

    async def open(self, host: str, port: int) -> "Client":
        """Connect, waiting up to a minute while the server is loading."""
        for _ in range(600):
            try:
                self.reader, self.writer = await asyncio.open_connection(host, port)
                return self
            except OSError:
                await asyncio.sleep(0.1)
        raise TimeoutError("the server does not answer")

    async def embed(self, text: str) -> bool:
        """Request an embedding; whether the answer was one."""
        body = {"input": text, "encoding_format": "base64", "task": "query"}
        status, _, answer = await self.post("/v1/embeddings", body)
        return status == 200 and b'"embedding"' in answer

    async def post(self, path: str, content: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Send a request; the status, the headers and the body of the answer."""
        body = json.dumps(content).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        status = int((await self.reader.readline()).split()[1])
        headers = {}
        while (line := await self.reader.readline()) != b"\r\n":
            if not line:
                raise ConnectionError("the server closed the connection")
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        answer = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return status, headers, answer


async def load(
    host: str, port: int, clients: int, requests: int, texts: Iterator[str]
) -> dict[str, float]:
    """Send requests; requests per second, percentiles of latency, failures."""
    connections = [await Client().open(host, port) for _ in range(clients)]
    remaining, times, failed = requests, [], 0

    async def work(client: Client) -> None:
        nonlocal remaining, failed
        while remaining > 0:
            remaining -= 1
            start = time.perf_counter()
            failed += not await client.embed(next(texts))
            times.append(1000 * (time.perf_counter() - start))

    start = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    seconds = time.perf_counter() - start
    for client in connections:
        client.writer.close()
    p50, p95 = np.percentile(times, [50, 95])
    figures = {"rps": len(times) / seconds, "p50_ms": float(p50), "p95_ms": float(p95)}
    return {name: round(value, 1) for name, value in figures.items()} | {"failed": failed}


def captions() -> Iterator[str]:
    """Endless different texts."""
    rng = random.Random(0)
    number = 0
    while True:
        number += 1
        yield f"{number}: {picto.caption(picto.sample_scene(rng))}"


def memory(process: int) -> int:
    """MB that a process uses."""
    status = Path(f"/proc/{process}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024)


def main() -> None:
    """Measure, print a table and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument(
        "--requests", type=int, default=1000, help="requests per number of clients and way"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds; the median one counts, by requests per second",
    )
    parser.add_argument(
        "--more", type=int, default=10_000, help="requests between the two measurements of memory"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    texts = captions()
    results: dict[str, dict[str, Any]] = {}
    failed = 0
    with server(args.model) as batching, server(args.model, "--no-batching") as no_batching:
        ways = {"batching": batching, "no_batching": no_batching}
        for host, port, _ in ways.values():
            asyncio.run(load(host, port, 8, 300, texts))  # warm-up
        for count in map(int, args.clients.split(",")):
            rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, (host, port, _) in ways.items():
                    rounds[way].append(asyncio.run(load(host, port, count, args.requests, texts)))
            results[str(count)] = {}
            for way, runs in rounds.items():
                failed += int(sum(figures["failed"] for figures in runs))
                runs.sort(key=lambda figures: figures["rps"])
                results[str(count)][way] = runs[len(runs) // 2]
        host, port, process = batching
        before = memory(process)
        failed += int(asyncio.run(load(host, port, 64, args.more, texts))["failed"])
        after = memory(process)
    table = Table("clients", "way", "requests/s", "p50, ms", "p95, ms", "ratio")
    for count, both in results.items():
        ratio = both["batching"]["rps"] / both["no_batching"]["rps"]
        for way, figures in both.items():
            cells = [f"{figures[k]:.1f}" for k in ("rps", "p50_ms", "p95_ms")]
            table.add_row(count, way, *cells, f"{ratio:.2f}" if way == "batching" else "")
    Console(width=90).print(table)
    print(f"failed: {failed}; memory before {args.more:,} requests {before} MB, after {after} MB")
    if args.output:
        names = ("rps", "p50_ms", "p95_ms")
        cores = f"{os.cpu_count()} CPU cores"
        content = {
            "clients": {
                count: {way: {name: run[name] for name in names} for way, run in both.items()}
                for count, both in results.items()
            },
            "failed": failed,
            "memory_mb": {"before": before, "after": after, "requests": args.more},
            "model": args.model,
            "hardware": f"{platform.machine()}, {cores}, clients on the same machine",
            "versions": {
                name: version(name) for name in ("torch", "fastapi", "uvicorn", "rematch-mm")
            },
        }
        write_json(args.output, content)


if __name__ == "__main__":
    main()
