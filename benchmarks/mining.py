"""Does the matching head take out false negatives and leave hard ones? Picto with planted right
answers.

    python benchmarks/mining.py --output benchmarks/results/mining.json

Held-out scenes are asked for by their caption (text to picture) and by a picture in another style
(picture to picture). For each query the corpus holds, beside the labelled positive, a right answer
that nobody labelled (the scene drawn once more) and a nearly right one (two objects exchanged, or
one replaced). Of the candidates that `rematch mine` judges:

- precision: how many of those that it takes for false negatives show the query's scene;
- recall: how many of those that show the query's scene it takes for false negatives;
- kept: how many of the nearly right ones it keeps as hard negatives.
"""

import argparse
import json
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rematch.data import picto
from rematch.files import write_json
from rematch.matching import View
from rematch.model import ReMatch
from rematch.train.candidates import Rules
from rematch.train.mine import mine

ASK = {
    "text to picture": "Find me an image that matches the given caption: ",
    "picture to picture": "Find an image that shows the same scene drawn in another style.",
}
EVERYTHING = {
    "negatives": 1_000_000,
    "yes": 1.1,
    "margin": -1.0,
}  # the output then holds every judged candidate


def build(directory: Path, kind: str, queries: int) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Own data with pictures; what scene each file shows, and which files are the nearly right
    ones of which query.
    """
    rng = random.Random(f"mining/{kind}")
    rows, shows, near = [], {}, {}
    for i in range(queries):
        scene = picto.sample_scene(rng, held_out=True)
        other = picto.near_miss(scene, rng, ("swap", "object"))
        asked, *styles = rng.sample(picto.TRAIN_STYLES, 2)
        drawn = {
            "positive": (scene, styles[0]),
            "planted": (scene, styles[0]),
            "near": (other, styles[0]),
        }
        for name, (what, style) in drawn.items():
            file = f"{name}-{i}.png"
            picto.render(what, style, rng.getrandbits(32), augment=True).save(directory / file)
            shows[file] = picto.caption(what)
        query: dict[str, Any] = {"text": ASK[kind] + picto.caption(scene)}
        if kind == "picture to picture":
            picto.render(scene, asked, rng.getrandbits(32), augment=True).save(
                directory / f"query-{i}.jpg"
            )
            query = {"text": ASK[kind], "image": f"query-{i}.jpg"}
        near[f"near-{i}.png"] = f"positive-{i}.png"
        rows.append({"query": query, "positive": {"image": f"positive-{i}.png"}})
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"image": file}) + "\n" for file in shows))
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data, shows, near


def judged(
    model: ReMatch, kind: str, queries: int, views: Any
) -> list[tuple[bool, bool, float, float]]:
    """Of every candidate: shows the query's scene, is its nearly right one, P(yes), the positive's
    P(yes).
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data, shows, near = build(directory, kind, queries)
        rules = Rules(**EVERYTHING, view=View(views))
        mine(model, data, directory / "mined.jsonl", rules, directory / "corpus.jsonl")
        found = []
        for line in (directory / "mined.jsonl").read_text().splitlines():
            row = json.loads(line)
            file, positive = row["negative"]["image"][0], row["positive"]["image"][0]
            right = shows[file] == shows[positive]
            found.append((right, near.get(file) == positive, row["p_yes"], row["positive_p_yes"]))
    return found


def figures(
    found: list[tuple[bool, bool, float, float]], yes: float, margin: float
) -> dict[str, float]:
    """Precision, recall and what is kept of the nearly right ones, in percent."""
    dropped = [p >= yes or p > positive - margin for *_, p, positive in found]
    true = [row[0] for row, out in zip(found, dropped, strict=True) if out]
    caught = [out for row, out in zip(found, dropped, strict=True) if row[0]]
    near = [not out for row, out in zip(found, dropped, strict=True) if row[1]]
    shares = {"precision": true, "recall": caught, "near_kept": near}
    return {name: round(100 * sum(part) / max(1, len(part)), 1) for name, part in shares.items()}


def main() -> None:
    """Print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="rematch-tiny")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--views", nargs="+", default=["raw-raw", "feat-feat"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, results = ReMatch(args.model), []
    table = Table("queries", "views", "yes", "margin", "precision", "recall", "nearly right kept")
    for kind in ASK:
        for views in args.views:
            found = judged(model, kind, args.queries, views)
            base = round(100 * sum(row[0] for row in found) / len(found), 1)
            for yes, margin in ((0.3, 0.0), (0.5, 0.0), (0.5, 0.1), (0.7, 0.0), (0.9, 0.0)):
                row = figures(found, yes, margin)
                table.add_row(
                    kind, views, str(yes), str(margin), *(f"{value:.1f}" for value in row.values())
                )
                results.append(
                    {"queries": kind, "views": views, "yes": yes, "margin": margin, "false": base}
                    | row
                )
    Console(width=100).print(table)
    if args.output:
        versions = {name: version(name) for name in ("torch", "transformers", "rematch-mm")}
        write_json(
            args.output,
            {"model": args.model, "queries": args.queries, "versions": versions, "rows": results},
        )


if __name__ == "__main__":
    main()
