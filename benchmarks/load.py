"""A server under more load than it can bear: mixed search, reranking and embeddings.

    python benchmarks/load.py --output benchmarks/results/load.json

First a single client sends the mix, which measures what each kind of request takes when nothing
else runs. Then many clients send it, each as soon as it has the previous answer; one that is
refused (429) waits as long as Retry-After says. Goodput is the time that the answered requests
would have taken one after the other, per second; an unloaded server has 1. No request may be
answered with anything but 200 or 429.
"""

import argparse
import asyncio
import os
import platform
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from serve import Client, captions, server

from rematch import ReMatch
from rematch.data.corpus import open_corpus
from rematch.encoding.encoder import Encoder
from rematch.files import write_json, write_text
from rematch.search.build import build
from rematch.search.index import Index

MIX = {"embeddings": 6, "search": 6, "search feat:50": 3, "search raw:20": 2, "rerank": 3}
_REFUSED_EARLY = 0.25  # of the timeout


def make_index(model: str, path: Path, documents: int, texts: Iterator[str]) -> None:
    """An index of captions."""
    corpus = path.with_suffix(".jsonl")
    rows = [f'{{"id": "{i}", "text": "{next(texts)}"}}' for i in range(documents)]
    write_text(corpus, "\n".join(rows))
    loaded = ReMatch(model)
    index = Index.create(path, loaded, name=model)
    build(index, open_corpus(corpus), Encoder(loaded, workers=0))


def requests(seed: int, texts: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Endless requests of different texts: kind, path and body."""
    rng = random.Random(seed)
    while True:
        (kind,) = rng.choices(list(MIX), list(MIX.values()))
        text, *documents = (f"{rng.randrange(10**6)}: {rng.choice(texts)}" for _ in range(13))
        if kind == "embeddings":
            yield kind, "/v1/embeddings", {"input": [text, documents[0]], "task": "query"}
        elif kind == "rerank":
            yield kind, "/v1/rerank", {"query": text, "documents": documents}
        else:
            rerank = kind.removeprefix("search").strip()
            yield kind, "/v1/search", {"text": text, "rerank": rerank}


async def load(host: str, port: int, clients: int, seconds: float) -> dict[str, Any]:
    """Send requests for some seconds; durations by kind and status, and the time it took."""
    texts = list(islice(captions(), 500))
    durations: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    stop = time.monotonic() + seconds

    async def work(number: int) -> None:
        client = await Client().open(host, port)
        for kind, path, body in requests(number, texts):
            start = time.monotonic()
            if start > stop:
                break
            status, headers, _ = await client.post(path, body)
            durations[kind, status].append(time.monotonic() - start)
            if status == 429:
                await asyncio.sleep(float(headers["retry-after"]))
        client.writer.close()

    start = time.monotonic()
    await asyncio.gather(*map(work, range(1, clients + 1)))
    return {"durations": durations, "seconds": time.monotonic() - start}


def main() -> None:
    """Measure, print a table, and with ``--output`` write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each part")
    parser.add_argument("--timeout", type=float, default=12.0, help="the server's timeout")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "captions.idx"
        make_index(args.model, path, args.documents, captions())
        with server(str(path), "--timeout", str(args.timeout)) as (host, port, _):
            asyncio.run(load(host, port, 1, 5.0))  # warm-up
            alone = asyncio.run(load(host, port, 1, args.seconds))
            loaded = asyncio.run(load(host, port, args.clients, args.seconds))
    kinds: dict[str, dict[str, float]] = {}
    work = 0.0
    table = Table("kind", "alone, ms", "200", "429", "other", "p50 of 200, ms", "p95, ms")
    for kind in MIX:
        own_seconds = float(np.mean(alone["durations"][kind, 200]))
        counts = Counter(
            {status: len(d) for (k, status), d in loaded["durations"].items() if k == kind}
        )
        work += counts[200] * own_seconds
        p50, p95 = 1000 * np.percentile(loaded["durations"].get((kind, 200), [0.0]), [50, 95])
        kinds[kind] = {
            "alone_ms": round(1000 * own_seconds, 1),
            "answered": counts[200],
            "refused": counts[429],
            "other": sum(counts.values()) - counts[200] - counts[429],
            "p50_ms": round(float(p50), 1),
            "p95_ms": round(float(p95), 1),
        }
        table.add_row(kind, *map(str, kinds[kind].values()))
    refused = [t for (_, status), d in loaded["durations"].items() if status == 429 for t in d]
    late = sum(t > _REFUSED_EARLY * args.timeout for t in refused)
    other = sum(figures["other"] for figures in kinds.values())
    goodput = round(work / loaded["seconds"], 2)
    Console(width=90).print(table)
    print(f"goodput {goodput}; {len(refused)} refused, {late} of them late; {other} other answers")
    if args.output:
        content = {
            "clients": args.clients,
            "timeout_s": args.timeout,
            "documents": args.documents,
            "goodput": goodput,
            "refused": len(refused),
            "refused_late": late,
            "kinds": kinds,
            "model": args.model,
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, clients on them too",
            "versions": {
                name: version(name) for name in ("torch", "fastapi", "uvicorn", "rematch-mm")
            },
        }
        write_json(args.output, content)
    if other or goodput < 0.8:
        raise SystemExit("goodput must be at least 0.8, and every answer 200 or 429")


if __name__ == "__main__":
    main()
