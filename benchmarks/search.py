"""What search costs: reranking, orders on Picto, a million vectors, encoding a corpus.

    python benchmarks/search.py --output benchmarks/results/search.json            # all of it, about half an hour
    python benchmarks/search.py --parts rerank,ann

- ``rerank``: 100 candidates by the matching head, for six kinds of query and document: one pair at
  a time, packed (prompt and query run once), and from stored vectors. Ratios are of the sums over
  all kinds; each kind is in the JSON.
- ``picto``: Hit@1 and ms per query, query encoding included, of each order, in indexes of all
  documents of a task; and Hit@1 with smaller vectors.
- ``ann``: a million vectors, mixtures of pairs of real ones with noise; the library's indexes
  against a scan.
- ``encode``: pictures of mixed sizes from disk into an index, against
  ``SentenceTransformer.encode`` on the list; peak memory at 1,000, 5,000 and 20,000 pictures, in
  processes of their own.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from rematch.data import picto
from rematch.data.corpus import Corpus, Document, open_corpus
from rematch.data.picto_tasks import evaluation_tasks
from rematch.encoding.encoder import Encoder
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.search.build import build
from rematch.search.index import Index

PARTS = ("rerank", "picto", "ann", "encode")
KINDS = (
    "Picto-Category",
    "Picto-LeftRight",
    "Picto-I2T",
    "Picto-T2I",
    "Picto-Edit",
    "Picto-Grounding",
)
ORDERS = {
    "cosine": "",
    "MaxSim": "maxsim:100",
    "feat": "feat:20",
    "raw": "raw:20",
    "cascade": "feat:20,raw:5",
}
SMALLER = (128, 64, 32)  # dimensions kept of 256
QUERIES_OF_A_TASK, ANN_QUERIES, NEIGHBOURS, MIXED = 50, 200, 10, 1000


def best_of(rounds: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """(least seconds, what it returned), after a round to warm up."""
    found = run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds), found


def rerank(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for 100 candidates, kind by kind."""
    tasks = {t.name: t for t in evaluation_tasks(queries=50)}
    kinds, worst = {}, 0.0
    for name in KINDS:
        task = tasks[name]
        query = task.queries[0].as_input()
        documents = [task.documents[i].as_input() for i in task.candidates[0][:100]]
        vectors = list(model.encode_document(documents, show_progress_bar=False))
        vector = model.encode_query([query], show_progress_bar=False)[0]
        single, alone = best_of(
            2, lambda q=query, ds=documents: [model.match([q], [d])[0] for d in ds]
        )
        packed, together = best_of(5, lambda q=query, ds=documents: model.match([q] * len(ds), ds))
        feat, _ = best_of(
            5, lambda q=vector, ds=vectors: model.match([q] * len(ds), ds, "feat-feat")
        )
        worst = max(worst, float(np.abs(np.array(alone) - together).max()))
        kinds[name] = {
            "single_s": round(single, 3),
            "packed_s": round(packed, 3),
            "feat_s": round(feat, 4),
        }
    sums = {k: sum(kind[k] for kind in kinds.values()) for k in ("single_s", "packed_s", "feat_s")}
    table = Table(
        "100 candidates", "one pair at a time, s", "packed, s", "ratio", "from vectors, s", "ratio"
    )
    for name, k in [*kinds.items(), ("all", sums)]:
        cells = [
            f"{k['single_s']:.2f}",
            f"{k['packed_s']:.3f}",
            f"{k['single_s'] / k['packed_s']:.1f}",
        ]
        table.add_row(name, *cells, f"{k['feat_s']:.3f}", f"{k['single_s'] / k['feat_s']:.1f}")
    Console(width=110).print(table)
    return {
        "rerank_packed_speedup": round(sums["single_s"] / sums["packed_s"], 2),
        "rerank_feat_speedup": round(sums["single_s"] / sums["feat_s"], 2),
        "rerank_max_abs_diff": worst,
        "rerank_kinds": kinds,
    }


def on_picto(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Hit@1 in each task's whole index, and ms per query."""
    found: dict[str, dict[str, float]] = {order: {} for order in ORDERS}
    smaller: dict[int, list[float]] = {size: [] for size in SMALLER}
    spent = dict.fromkeys(ORDERS, 0.0)
    for task in [t for t in evaluation_tasks() if t.name in KINDS]:
        with tempfile.TemporaryDirectory() as folder:
            documents = [
                _document(Path(folder), str(i), d.as_input()) for i, d in enumerate(task.documents)
            ]
            index = Index.create(Path(folder) / "index", model, name=args.model, tokens=True)
            build(
                index, Corpus(task.name, len(documents), lambda ds=documents: ds), Encoder(model)
            )
            queries = [q.as_input() for q in task.queries[:QUERIES_OF_A_TASK]]
            answers = [str(own[0]) for own in task.candidates[:QUERIES_OF_A_TASK]]
            for order, stages in ORDERS.items():
                index.search(queries[0], 1, rerank=stages)
                started = time.perf_counter()
                first = [index.search(q, 1, rerank=stages)[0].id for q in queries]
                spent[order] += time.perf_counter() - started
                found[order][task.name] = 100 * float(
                    np.mean([a == b for a, b in zip(first, answers, strict=True)])
                )
            for size in SMALLER:
                kept = Index.create(
                    Path(folder) / str(size), model, name=args.model, dimensions=size
                )
                build(
                    kept,
                    Corpus(task.name, len(documents), lambda ds=documents: ds),
                    Encoder(model),
                )
                first = [hits[0].id for hits in kept.search(queries, 1)]
                smaller[size].append(
                    100 * float(np.mean([a == b for a, b in zip(first, answers, strict=True)]))
                )
    table = Table("order", *(n.removeprefix("Picto-") for n in KINDS), "mean", "ms per query")
    report = {}
    for order, hits in found.items():
        mean, cost = (
            statistics.mean(hits.values()),
            1000 * spent[order] / (len(KINDS) * QUERIES_OF_A_TASK),
        )
        report[order] = {
            "hit@1": round(mean, 1),
            "ms_per_query": round(cost, 1),
            "stages": ORDERS[order],
            "tasks": hits,
        }
        table.add_row(order, *(f"{hits[n]:.0f}" for n in KINDS), f"{mean:.1f}", f"{cost:.1f}")
    Console(width=110).print(table)
    small = {str(size): round(statistics.mean(hits), 1) for size, hits in smaller.items()}
    table = Table(*(f"{size} dimensions" for size in small))
    table.add_row(*(f"{hit:.1f}" for hit in small.values()))
    Console(width=110).print(table)
    return {"picto": report, "picto_smaller_vectors": small}


def _document(folder: Path, name: str, given: dict[str, Any]) -> Document:
    """A task's document as a file on disk; its instruction is that of the index, or its text."""
    image, text = given.get("image"), given.get("text", "")
    if image is None:
        return Document(name, text)
    image.save(folder / f"{name}.png")
    return Document(
        name, text.removeprefix("Represent the given image.").strip(), folder / f"{name}.png"
    )


def ann(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """A million vectors: build time, size, latency, recall."""
    rng, wide = np.random.default_rng(0), random.Random(0)
    captions = [picto.caption(picto.sample_scene(wide)) for _ in range(20_000)]
    real = Encoder(model).encode(captions, "document")
    report: dict[str, Any] = {"vectors": args.vectors, "queries": ANN_QUERIES}
    table = Table("index", "build, s", "size, MB", "p50, ms", "p95, ms", "recall@10")

    def mixtures(count: int) -> np.ndarray:
        a, b = real[rng.integers(0, len(real), count)], real[rng.integers(0, len(real), count)]
        share = rng.random((count, 1), np.float32) * 0.5
        mixed = (
            (1 - share) * a
            + share * b
            + rng.normal(0, 0.3 / np.sqrt(real.shape[1]), a.shape).astype(np.float32)
        )
        return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)

    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", model, name=args.model)
        held = []
        for start in range(0, args.vectors, 50_000):
            part = mixtures(min(50_000, args.vectors - start))
            held.append(part)
            index.add(
                [
                    {"id": str(start + i), "vector": v, "content_hash": "0" * 32, "stamp": 0}
                    for i, v in enumerate(part)
                ],
                new=True,
            )
        every, queries = np.concatenate(held), mixtures(ANN_QUERIES)
        near = [np.argpartition(-(every @ q), NEIGHBOURS)[:NEIGHBOURS] for q in queries]
        truth = [{str(i) for i in own} for own in near]
        base = _size(Path(index.uri))
        for kind in ("scan", "float", "int8", "binary"):
            parts = Path(index.uri) / "documents.lance" / "_indices"
            before = set(parts.iterdir()) if parts.exists() else set()
            started = time.perf_counter()
            if kind != "scan":
                index.build_ann(kind)
            built = time.perf_counter() - started
            size = sum(map(_size, set(parts.iterdir()) - before)) if kind != "scan" else base
            for q in queries[:20]:
                index.nearest(q, NEIGHBOURS, exact=kind == "scan", probes=args.probes)
            times, right = [], 0
            for q, own in zip(queries, truth, strict=True):
                started = time.perf_counter()
                rows = index.nearest(q, NEIGHBOURS, exact=kind == "scan", probes=args.probes)
                times.append(1000 * (time.perf_counter() - started))
                right += len(own & set(rows["id"].to_pylist()))
            recall = right / (NEIGHBOURS * ANN_QUERIES)
            p50, p95 = np.percentile(times, [50, 95])
            report[kind] = {
                "build_s": round(built, 1) if kind != "scan" else None,
                "size_mb": round(size / 1e6, 1),
                "p50_ms": round(float(p50), 2),
                "p95_ms": round(float(p95), 2),
                "recall@10": round(recall, 4),
            }
            table.add_row(
                kind,
                f"{built:.0f}" if kind != "scan" else "",
                f"{size / 1e6:.0f}",
                f"{p50:.1f}",
                f"{p95:.1f}",
                f"{recall:.3f}",
            )
            if kind != "scan":
                index.table.drop_index(next(i.name for i in index.table.list_indices()))
    Console(width=110).print(table)
    return {
        "ann": report
        | {"probes": args.probes, "rescored": "the best 100 of the cells, with whole vectors"}
    }


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def corpus_of_mixed_sizes(folder: Path, count: int, most: int) -> None:
    """JPEGs of 100 to ``most`` pixels, all different."""
    rng = random.Random(count)
    drawn = [picto.render(picto.sample_scene(rng), "noto", i) for i in range(200)]
    for i in range(count):
        edge = int(100 * (most / 100) ** rng.random())
        picture = drawn[i % 200].resize((edge, max(60, edge * 3 // 4)), Image.Resampling.BILINEAR)
        picture.putpixel((i % 100, i // 100 % 60), (i % 256, i // 256 % 256, 0))
        picture.save(folder / f"{i:05}.jpg", quality=95)


def encode(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second against plain encode, and peak memory."""
    report: dict[str, Any] = {"encode_per_second": {}}
    table = Table(
        "pictures",
        "SentenceTransformer.encode of the list, a second",
        "rematch index, a second",
        "ratio",
    )
    with tempfile.TemporaryDirectory() as name:
        for most, key in ((3000, "encode_speedup"), (1600, "encode_speedup_to_1600_pixels")):
            folder = Path(name) / f"to {most}"
            folder.mkdir()
            corpus_of_mixed_sizes(folder, MIXED, most)
            inputs = [
                {"text": "Represent the given image.", "image": path}
                for path in sorted(folder.iterdir())
            ]
            model.encode_document(inputs[:32], show_progress_bar=False)
            plain, ours = [], []
            for i in range(3):
                started = time.perf_counter()
                model.encode_document(inputs, batch_size=32, show_progress_bar=False)
                plain.append(time.perf_counter() - started)
                started = time.perf_counter()
                index = Index.create(Path(name) / f"{most}-{i}", model, name=args.model)
                build(index, open_corpus(folder), Encoder(model))
                ours.append(time.perf_counter() - started)
            rates = {
                "plain": MIXED / statistics.median(plain),
                "ours": MIXED / statistics.median(ours),
            }
            report["encode_per_second"][most] = {
                way: round(rate, 1) for way, rate in rates.items()
            }
            report[key] = round(rates["ours"] / rates["plain"], 2)
            cells = [f"{rate:.1f}" for rate in rates.values()]
            table.add_row(f"{MIXED:,} of 100 to {most:,} pixels", *cells, f"{report[key]:.2f}")
        Console(width=110).print(table)
        peaks = {}
        for count in map(int, filter(None, args.memory.split(","))):
            folder = Path(name) / str(count)
            folder.mkdir()
            corpus_of_mixed_sizes(folder, count, 400)
            command = [sys.executable, __file__, "--measure", str(folder), "--model", args.model]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[str(count)] = json.loads(done.stdout.splitlines()[-1])
    if peaks:
        report["encode_peak_mb"] = {count: peak["mb"] for count, peak in peaks.items()}
        report["encode_rate_at"] = {count: peak["rate"] for count, peak in peaks.items()}
    table = Table("pictures", "peak memory of all processes, MB", "pictures a second")
    for count, peak in peaks.items():
        table.add_row(f"{int(count):,}", f"{peak['mb']:,}", f"{peak['rate']:.1f}")
    Console(width=110).print(table)
    return report


def measure(folder: Path, name: str) -> None:
    """In a process of its own: index a folder, print the peak of the processes' memory."""
    model = ReMatch(name)
    encoder = Encoder(model)
    seen, over = [_memory()], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            seen.append(_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as place:
        index = Index.create(Path(place) / "i", model, name=name)
        started = time.perf_counter()
        report = build(index, open_corpus(folder), encoder)
        rate = report.encoded / (time.perf_counter() - started)
    over.set()
    watcher.join()
    sys.stdout.write(json.dumps({"mb": round(max(seen)), "rate": round(rate, 1)}) + "\n")


def _memory() -> float:
    """MB of this process and its children, shared pages counted once (PSS)."""
    total = 0
    for process in (
        os.getpid(),
        *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    ):
        try:
            content = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += int(content.split("\nPss:")[1].split()[0])
    return total / 1024


def main() -> None:
    """Print tables, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument(
        "--probes", type=int, default=40, help="cells of an approximate index that are looked into"
    )
    parser.add_argument(
        "--memory",
        default="1000,5000,20000",
        help="sizes of the corpora for peak memory; empty: none",
    )
    parser.add_argument(
        "--output", type=Path, help="parts that were not run keep what stands there"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.model)
        return
    model = ReMatch(args.model)
    run = dict(zip(PARTS, (rerank, on_picto, ann, encode), strict=True))
    known = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for part in args.parts.split(","):
        known |= run[part](model, args)
        device = (
            torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
        )
        known |= {
            "model": args.model,
            "hardware": f"{device}, {os.cpu_count()} CPU cores",
            "versions": {
                n: version(n) for n in ("torch", "transformers", "lancedb", "rematch-mm")
            },
        }
        if args.output:
            write_json(args.output, known)


if __name__ == "__main__":
    main()
