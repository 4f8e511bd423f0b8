"""What search costs: reranking, orders on Picto, a million vectors, encoding a corpus.

    python benchmarks/search.py --output benchmarks/results/search.json    # about half an hour
    python benchmarks/search.py --parts rerank,ann

- ``rerank``: 100 candidates by the matching head, for six kinds of query and document: one pair at
  a time, packed (prompt and query run once), and from stored vectors. Ratios are of the sums over
  all kinds; each kind is in the JSON.
- ``picto``: Hit@1 and ms per query of each order, encoding of the query included, in indexes of
  all documents of a task; and Hit@1 with truncated vectors.
- ``ann``: a million vectors, mixtures of pairs of real ones with noise; LanceDB's approximate
  indexes against a scan.
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
from rematch.data.corpus import Corpus, open_corpus
from rematch.data.document import Document
from rematch.data.picto_tasks import evaluation_tasks
from rematch.encoding.encoder import Encoder
from rematch.files import write_json
from rematch.model import ReMatch
from rematch.scoring import probability
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
SMALLER = (128, 64, 32)  # dimensions, of 256
QUERIES_OF_A_TASK, ANN_QUERIES, NEIGHBOURS, MIXED = 50, 200, 10, 1000


def best_of(rounds: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest time in seconds and the result, after a warm-up."""
    result = run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def rerank(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds for 100 candidates, kind by kind."""
    tasks = {task.name: task for task in evaluation_tasks(KINDS, queries=50)}
    kinds, worst = {}, 0.0
    for name in KINDS:
        task = tasks[name]
        query = task.queries[0].as_input()
        documents = [task.documents[i].as_input() for i in task.candidates[0][:100]]
        vectors = list(model.encode_document(documents, show_progress_bar=False))
        vector = model.encode_query([query], show_progress_bar=False)[0]
        single, single_scores = best_of(
            2, lambda q=query, ds=documents: [model.match([q], [d])[0] for d in ds]
        )
        packed, packed_scores = best_of(
            5, lambda q=query, ds=documents: probability(model.score(q, ds))
        )
        feat, _ = best_of(5, lambda q=vector, ds=vectors: model.score(q, ds, "feat-feat"))
        worst = max(worst, float(np.abs(np.array(single_scores) - packed_scores).max()))
        kinds[name] = {
            "single_s": round(single, 3),
            "packed_s": round(packed, 3),
            "feat_s": round(feat, 4),
        }
    sums = {k: sum(kind[k] for kind in kinds.values()) for k in ("single_s", "packed_s", "feat_s")}
    table = Table(
        "100 candidates", "one pair at a time, s", "packed, s", "ratio", "from vectors, s", "ratio"
    )
    for name, times in [*kinds.items(), ("all", sums)]:
        single, packed, feat = times["single_s"], times["packed_s"], times["feat_s"]
        cells = [f"{single:.2f}", f"{packed:.3f}", f"{single / packed:.1f}"]
        table.add_row(name, *cells, f"{feat:.3f}", f"{single / feat:.1f}")
    Console(width=110).print(table)
    return {
        "rerank_packed_speedup": round(sums["single_s"] / sums["packed_s"], 2),
        "rerank_feat_speedup": round(sums["single_s"] / sums["feat_s"], 2),
        "rerank_max_abs_diff": worst,
        "rerank_kinds": kinds,
    }


def on_picto(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Measure Hit@1 in each task's whole index, and ms per query."""
    hits: dict[str, dict[str, float]] = {order: {} for order in ORDERS}
    truncated: dict[int, list[float]] = {size: [] for size in SMALLER}
    seconds = dict.fromkeys(ORDERS, 0.0)
    for task in evaluation_tasks(KINDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            documents = [
                write_document(folder, str(i), document.as_input())
                for i, document in enumerate(task.documents)
            ]
            corpus = Corpus(task.name, len(documents), lambda ds=documents: ds)
            queries = [query.as_input() for query in task.queries[:QUERIES_OF_A_TASK]]
            answers = [str(candidates[0]) for candidates in task.candidates[:QUERIES_OF_A_TASK]]
            index = Index.create(folder / "index", model, name=args.model, tokens=True)
            build(index, corpus, Encoder(model))
            for order, stages in ORDERS.items():
                index.search(queries[0], 1, rerank=stages, instruction="", mode="vector")
                start = time.perf_counter()
                best = [
                    index.search(query, 1, rerank=stages, instruction="", mode="vector")[0].id
                    for query in queries
                ]
                seconds[order] += time.perf_counter() - start
                hits[order][task.name] = percent_equal(best, answers)
            for size in SMALLER:
                index = Index.create(folder / str(size), model, name=args.model, dimensions=size)
                build(index, corpus, Encoder(model))
                best = [
                    results[0].id
                    for results in index.search(queries, 1, instruction="", mode="vector")
                ]
                truncated[size].append(percent_equal(best, answers))
    table = Table(
        "order", *(name.removeprefix("Picto-") for name in KINDS), "mean", "ms per query"
    )
    report = {}
    for order, by_task in hits.items():
        mean = statistics.mean(by_task.values())
        cost = 1000 * seconds[order] / (len(KINDS) * QUERIES_OF_A_TASK)
        report[order] = {
            "hit@1": round(mean, 1),
            "ms_per_query": round(cost, 1),
            "stages": ORDERS[order],
            "tasks": by_task,
        }
        table.add_row(order, *(f"{by_task[n]:.0f}" for n in KINDS), f"{mean:.1f}", f"{cost:.1f}")
    Console(width=110).print(table)
    means = {str(size): round(statistics.mean(values), 1) for size, values in truncated.items()}
    table = Table(*(f"{size} dimensions" for size in means))
    table.add_row(*(f"{mean:.1f}" for mean in means.values()))
    Console(width=110).print(table)
    return {"picto": report, "picto_smaller_vectors": means}


def percent_equal(ids: list[str], answers: list[str]) -> float:
    """Share of ids that equal their answer, in percent."""
    return 100 * float(np.mean([a == b for a, b in zip(ids, answers, strict=True)]))


def write_document(folder: Path, name: str, content: dict[str, Any]) -> Document:
    """Write a task's document to disk; its instruction is the index's, or part of its text."""
    image, text = content.get("image"), content.get("text", "")
    if image is None:
        return Document(name, text)
    path = folder / f"{name}.png"
    image.save(path)
    return Document(name, text.removeprefix("Represent the given image.").strip(), path)


def ann(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Measure build time, size, latency and recall of a million vectors."""
    rng, scenes = np.random.default_rng(0), random.Random(0)
    captions = [picto.caption(picto.sample_scene(scenes)) for _ in range(20_000)]
    real = Encoder(model).encode(captions, "document")
    report: dict[str, Any] = {"vectors": args.vectors, "queries": ANN_QUERIES}
    table = Table("index", "build, s", "size, MB", "p50, ms", "p95, ms", "recall@10")

    def mixtures(count: int) -> np.ndarray:
        a, b = real[rng.integers(0, len(real), count)], real[rng.integers(0, len(real), count)]
        share = rng.random((count, 1), np.float32) * 0.5
        noise = rng.normal(0, 0.3 / np.sqrt(real.shape[1]), a.shape).astype(np.float32)
        mixed = (1 - share) * a + share * b + noise
        return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)

    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", model, name=args.model)
        parts = []
        for start in range(0, args.vectors, 50_000):
            part = mixtures(min(50_000, args.vectors - start))
            parts.append(part)
            index.add(
                [
                    {"id": str(start + i), "vector": v, "content_hash": "0" * 32, "stamp": 0}
                    for i, v in enumerate(part)
                ],
                new=True,
            )
        vectors, queries = np.concatenate(parts), mixtures(ANN_QUERIES)
        neighbours = [
            {str(i) for i in np.argpartition(-(vectors @ query), NEIGHBOURS)[:NEIGHBOURS]}
            for query in queries
        ]
        table_size = folder_size(Path(index.uri))
        for kind in ("scan", "float", "int8", "binary"):
            is_scan = kind == "scan"
            indices = Path(index.uri) / "documents.lance" / "_indices"
            before = set(indices.iterdir()) if indices.exists() else set()
            start = time.perf_counter()
            if not is_scan:
                index.build_ann(kind)
            build_time = time.perf_counter() - start
            size = (
                table_size if is_scan else sum(map(folder_size, set(indices.iterdir()) - before))
            )
            for query in queries[:20]:
                index.nearest(query, NEIGHBOURS, exact=is_scan, probes=args.probes)
            times, matches = [], 0
            for query, nearest in zip(queries, neighbours, strict=True):
                start = time.perf_counter()
                rows = index.nearest(query, NEIGHBOURS, exact=is_scan, probes=args.probes)
                times.append(1000 * (time.perf_counter() - start))
                matches += len(nearest & set(rows["id"].to_pylist()))
            recall = matches / (NEIGHBOURS * ANN_QUERIES)
            p50, p95 = np.percentile(times, [50, 95])
            report[kind] = {
                "build_s": None if is_scan else round(build_time, 1),
                "size_mb": round(size / 1e6, 1),
                "p50_ms": round(float(p50), 2),
                "p95_ms": round(float(p95), 2),
                "recall@10": round(recall, 4),
            }
            cells = ["" if is_scan else f"{build_time:.0f}", f"{size / 1e6:.0f}"]
            table.add_row(kind, *cells, f"{p50:.1f}", f"{p95:.1f}", f"{recall:.3f}")
            if not is_scan:
                index.build_ann("none")
    Console(width=110).print(table)
    settings = {"probes": args.probes, "rescored": "the best 100 of the cells, with whole vectors"}
    return {"ann": report | settings}


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_pictures(folder: Path, count: int, longest: int) -> None:
    """Write different JPEGs with a longer side of 100 to ``longest`` pixels."""
    rng = random.Random(count)
    scenes = [picto.render(picto.sample_scene(rng), "noto", i) for i in range(200)]
    for i in range(count):
        edge = int(100 * (longest / 100) ** rng.random())
        picture = scenes[i % 200].resize((edge, max(60, edge * 3 // 4)), Image.Resampling.BILINEAR)
        picture.putpixel((i % 100, i // 100 % 60), (i % 256, i // 256 % 256, 0))
        picture.save(folder / f"{i:05}.jpg", quality=95)


def encode(model: ReMatch, args: argparse.Namespace) -> dict[str, Any]:
    """Measure pictures per second against plain encode, and peak memory."""
    report: dict[str, Any] = {"encode_per_second": {}}
    table = Table("pictures per second", "SentenceTransformer.encode", "rematch index", "ratio")
    with tempfile.TemporaryDirectory() as name:
        for longest, key in ((3000, "encode_speedup"), (1600, "encode_speedup_to_1600_pixels")):
            folder = Path(name) / f"to {longest}"
            folder.mkdir()
            write_pictures(folder, MIXED, longest)
            inputs = [
                {"text": "Represent the given image.", "image": path}
                for path in sorted(folder.iterdir())
            ]
            model.encode_document(inputs[:32], show_progress_bar=False)
            plain, ours = [], []
            for i in range(3):
                start = time.perf_counter()
                model.encode_document(inputs, batch_size=32, show_progress_bar=False)
                plain.append(time.perf_counter() - start)
                start = time.perf_counter()
                index = Index.create(Path(name) / f"{longest}-{i}", model, name=args.model)
                build(index, open_corpus(folder), Encoder(model))
                ours.append(time.perf_counter() - start)
            rates = {
                "plain": MIXED / statistics.median(plain),
                "ours": MIXED / statistics.median(ours),
            }
            report["encode_per_second"][longest] = {
                way: round(rate, 1) for way, rate in rates.items()
            }
            report[key] = round(rates["ours"] / rates["plain"], 2)
            cells = [f"{rate:.1f}" for rate in rates.values()]
            table.add_row(f"{MIXED:,} of 100 to {longest:,} pixels", *cells, f"{report[key]:.2f}")
        Console(width=110).print(table)
        peaks = {}
        for count in map(int, filter(None, args.memory.split(","))):
            folder = Path(name) / str(count)
            folder.mkdir()
            write_pictures(folder, count, 400)
            command = [sys.executable, __file__, "--measure", str(folder), "--model", args.model]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[str(count)] = json.loads(process.stdout.splitlines()[-1])
    if peaks:
        report["encode_peak_mb"] = {count: peak["mb"] for count, peak in peaks.items()}
        report["encode_rate_at"] = {count: peak["rate"] for count, peak in peaks.items()}
    table = Table("pictures", "peak memory of all processes, MB", "pictures per second")
    for count, peak in peaks.items():
        table.add_row(f"{int(count):,}", f"{peak['mb']:,}", f"{peak['rate']:.1f}")
    Console(width=110).print(table)
    return report


def measure(folder: Path, name: str) -> None:
    """Index a folder, and print peak memory and rate as JSON; runs in a process of its own."""
    model = ReMatch(name)
    encoder = Encoder(model)
    samples, finished = [memory_in_use()], threading.Event()

    def watch() -> None:
        while not finished.wait(0.1):
            samples.append(memory_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as directory:
        index = Index.create(Path(directory) / "index", model, name=name)
        start = time.perf_counter()
        report = build(index, open_corpus(folder), encoder)
        rate = report.encoded / (time.perf_counter() - start)
    finished.set()
    watcher.join()
    sys.stdout.write(json.dumps({"mb": round(max(samples)), "rate": round(rate, 1)}) + "\n")


def memory_in_use() -> float:
    """MB of this process and its children, shared pages counted once (PSS)."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in (os.getpid(), *map(int, children)):
        try:
            content = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # the process has just ended
            continue
        total += int(content.split("\nPss:")[1].split()[0])
    return total / 1024


def main() -> None:
    """Measure, print tables and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument(
        "--probes", type=int, default=40, help="cells of an approximate index that are searched"
    )
    parser.add_argument(
        "--memory",
        default="1000,5000,20000",
        help="corpus sizes for peak memory; empty: none",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; results of other parts in it are kept"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.model)
        return
    model = ReMatch(args.model)
    functions = dict(zip(PARTS, (rerank, on_picto, ann, encode), strict=True))
    report = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for part in args.parts.split(","):
        report |= functions[part](model, args)
        device = (
            torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
        )
        report |= {
            "model": args.model,
            "hardware": f"{device}, {os.cpu_count()} CPU cores",
            "versions": {
                name: version(name) for name in ("torch", "transformers", "lancedb", "rematch-mm")
            },
        }
        if args.output:
            write_json(args.output, report)


if __name__ == "__main__":
    main()
