"""How much faster is evaluation than encoding every row, and encoding than plain
``SentenceTransformer.encode``?

    python benchmarks/evaluate.py --output benchmarks/results/evaluate.json

- ``speedup_evaluate``: a Picto run in MMEB-eval form, read, encoded, stored on disk and scored by
  our evaluator, against ``encode`` of every row's query and candidates as they stand (without
  scoring).
- ``speedup_over_distinct``: the same against ``encode`` of each task's queries and distinct
  documents: the gain that remains for someone who has already thought of that.
- ``speedup_encode``: throughput alone, on a list without duplicates: equal numbers of short texts,
  long texts, small pictures and large pictures, half of the pictures with a caption.

The sides of a ratio are interleaved, and each is the median of its rounds.
"""

import argparse
import os
import platform
import random
import statistics
import tempfile
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
from rematch.data.mmeb import load_mmeb_eval
from rematch.data.mmeb_export import export_picto
from rematch.encoding.encoder import Encoder
from rematch.encoding.vector_store import VectorStore
from rematch.evaluate.run import evaluate
from rematch.files import write_json
from rematch.model import ReMatch


def mixed(folder: Path, each: int) -> list[dict[str, Any]]:
    """Distinct inputs: short texts, long texts, small and large pictures, as files."""
    rng = random.Random(0)

    def caption() -> str:
        return picto.caption(picto.sample_scene(rng, held_out=True))

    inputs: list[dict[str, Any]] = [{"text": f"{caption()} ({i})"} for i in range(each)]
    inputs += [
        {"text": f"{i}: " + ", ".join(caption() for _ in range(rng.randint(6, 14)))}
        for i in range(each)
    ]
    for i in range(2 * each):
        picture = picto.render(picto.sample_scene(rng, held_out=True), "noto", i)
        path = folder / f"{i}.png"
        if i >= each:
            edge, path = rng.randint(800, 2000), folder / f"{i}.jpg"
            picture = picture.resize((edge, edge * 3 // 4), Image.Resampling.BICUBIC)
        picture.save(path, quality=90)
        inputs.append({"image": path} | ({"text": caption()} if i % 2 else {}))
    rng.shuffle(inputs)
    return inputs


def medians(rounds: int, arms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each arm; arms are interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(values), 2) for name, values in seconds.items()}


def main() -> None:
    """Measure, print a table and, with ``--output``, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument(
        "--limit", type=int, default=10, help="queries per task; the first ratio grows with it"
    )
    parser.add_argument("--each", type=int, default=200, help="inputs of each of the four kinds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32, help="of plain encode")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = ReMatch(args.model)
    plain = {"batch_size": args.batch_size, "show_progress_bar": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_picto(folder / "tree", "mmeb-eval")
        count = iter(range(1_000_000))

        def ours() -> None:
            tasks, _ = load_mmeb_eval(folder / "tree", limit=args.limit)
            evaluate(Encoder(model, VectorStore(folder / f"store{next(count)}", model)), tasks)

        def every_row() -> None:
            for task in load_mmeb_eval(folder / "tree", limit=args.limit)[0]:
                model.encode_query([query.as_input() for query in task.queries], **plain)
                for candidates in task.candidates:
                    documents = [task.documents[i].as_input() for i in candidates]
                    model.encode_document(documents, **plain)

        def distinct_rows() -> None:
            for task in load_mmeb_eval(folder / "tree", limit=args.limit)[0]:
                model.encode_query([query.as_input() for query in task.queries], **plain)
                model.encode_document(
                    [document.as_input() for document in task.documents], **plain
                )

        inputs = mixed(folder, args.each)
        model.encode_document(inputs[:64], **plain)  # warm-up
        encode = medians(
            args.rounds,
            {
                "encode": lambda: model.encode_document(inputs, **plain),
                "ours": lambda: Encoder(model).encode(inputs, "document"),
            },
        )
        difference = np.abs(
            model.encode_document(inputs, **plain) - Encoder(model).encode(inputs, "document")
        ).max()
        runs = medians(1, {"every row": every_row}) | medians(
            args.rounds, {"distinct": distinct_rows, "ours": ours}
        )
    ratios = {
        "speedup_evaluate": round(runs["every row"] / runs["ours"], 2),
        "speedup_over_distinct": round(runs["distinct"] / runs["ours"], 2),
        "speedup_encode": round(encode["encode"] / encode["ours"], 2),
    }
    table = Table("run", "plain encode, s", "ours, s", "ratio")
    table.add_row(
        "Picto run, every row",
        f"{runs['every row']:.2f}",
        f"{runs['ours']:.2f}",
        f"{ratios['speedup_evaluate']:.2f}",
    )
    table.add_row(
        "Picto run, distinct",
        f"{runs['distinct']:.2f}",
        f"{runs['ours']:.2f}",
        f"{ratios['speedup_over_distinct']:.2f}",
    )
    table.add_row(
        "mixed list",
        f"{encode['encode']:.2f}",
        f"{encode['ours']:.2f}",
        f"{ratios['speedup_encode']:.2f}",
    )
    Console(width=90).print(table)
    print(f"largest difference of a vector's component on the mixed list: {difference:.1e}")
    if args.output:
        device = (
            torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine()
        )
        content = ratios | {
            "seconds": {"evaluate": runs, "encode": encode},
            "largest_difference": float(difference),
            "model": args.model,
            "queries_per_task": args.limit,
            "inputs_of_each_kind": args.each,
            "hardware": f"{device}, {os.cpu_count()} CPU cores",
            "versions": {
                name: version(name)
                for name in ("torch", "transformers", "sentence-transformers", "rematch-mm")
            },
        }
        write_json(args.output, content)


if __name__ == "__main__":
    main()
