"""Time of a search by vector, by words and by both, in one index.

    python benchmarks/hybrid.py --rows 100000 --output benchmarks/results/hybrid.json

The rows have random vectors and captions of Picto's scenes as text. The model's time is left out;
the modes take turns with the same queries.
"""

import argparse
import os
import platform
import random
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import lancedb
import numpy as np
import pyarrow as pa

from rematch.data import picto
from rematch.files import write_json
from rematch.search import approximate
from rematch.search.columns import WORDS
from rematch.search.retrieval import Retrieval, build_full_text_index


def make_table(folder: str, rows: int, width: int) -> lancedb.table.Table:
    """A table with what a first stage reads."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    vectors = rng.normal(size=(rows, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    captions = [f"{picto.caption(picto.sample_scene(draw))} {n}" for n in range(rows)]
    table = pa.table(
        {
            "id": [str(n) for n in range(rows)],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
            "text": captions,
            "path": pa.nulls(rows, pa.string()),
            WORDS: captions,
        }
    )
    return lancedb.connect(folder).create_table("documents", table)


def main() -> None:
    """Measure, print and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    draw, rng = random.Random(1), np.random.default_rng(1)
    with TemporaryDirectory() as folder:
        table = make_table(folder, args.rows, args.width)
        started = time.monotonic()
        build_full_text_index(table)
        seconds = time.monotonic() - started
        results: dict[str, dict[str, dict[str, float]]] = {}
        for ann in ("none", "int8"):
            approximate.build(table, ann)
            retrieval = Retrieval(table, folder, 10, ["id", "text", "path"])
            times: dict[str, list[float]] = {"vector": [], "text": [], "hybrid": []}
            for number in range(args.queries + 5):
                vector = rng.normal(size=args.width).astype(np.float32)
                words = picto.caption(picto.sample_scene(draw))
                for mode, search in (
                    ("vector", partial(retrieval.by_vector, vector)),
                    ("text", partial(retrieval.by_text, words)),
                    ("hybrid", partial(retrieval.by_both, vector, words)),
                ):
                    begin = time.perf_counter()
                    search()
                    if number >= 5:  # after the caches are warm
                        times[mode].append(1000 * (time.perf_counter() - begin))
            results["scan" if ann == "none" else ann] = {
                mode: {f"p{q}_ms": round(float(np.percentile(values, q)), 1) for q in (50, 95)}
                for mode, values in times.items()
            }
    content = {
        "rows": args.rows,
        "width": args.width,
        "queries": args.queries,
        "full_text_build_seconds": round(seconds, 1),
        "times": results,
        "hybrid_p95_over_vector_p95": {
            name: round(modes["hybrid"]["p95_ms"] / modes["vector"]["p95_ms"], 2)
            for name, modes in results.items()
        },
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {n: version(n) for n in ("lancedb", "pyarrow")},
    }
    print(content)
    if args.output:
        write_json(args.output, content)


if __name__ == "__main__":
    main()
