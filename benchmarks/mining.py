"""Does the matching head remove false negatives and keep hard ones? Picto with planted right
answers.

    python benchmarks/mining.py --output benchmarks/results/mining.json

The queries are held-out scenes, by their caption (text to picture) or as a picture in another
style (picture to picture). Besides the labelled positive, the corpus holds for each query a right
answer that nobody labelled (the scene drawn again) and a nearly right one (two objects exchanged,
or one replaced). Of the candidates that `rematch mine` judges:

- precision: the share of the presumed false negatives that show the query's scene;
- recall: the share of those showing the query's scene that are presumed false negatives;
- kept: the share of the nearly right ones that remain as hard negatives.
"""

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
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

INSTRUCTIONS = {
    "text to picture": "Find me an image that matches the given caption: ",
    "picture to picture": "Find an image that shows the same scene drawn in another style.",
}
# with these rules the output holds every judged candidate
EVERYTHING = {"negatives": 1_000_000, "yes": 1.1, "margin": -1.0}


def build(directory: Path, kind: str, queries: int) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Write training data, corpus and pictures.

    Returns:
        The data file, the caption of each picture's scene, and the positive that each nearly right
        picture belongs to.
    """
    rng = random.Random(f"mining/{kind}")
    rows, captions, near = [], {}, {}
    for i in range(queries):
        scene = picto.sample_scene(rng, held_out=True)
        other = picto.near_miss(scene, rng, ("swap", "object"))
        query_style, document_style = rng.sample(picto.TRAIN_STYLES, 2)
        for name, content in (("positive", scene), ("planted", scene), ("near", other)):
            file = f"{name}-{i}.png"
            picture = picto.render(content, document_style, rng.getrandbits(32), augment=True)
            picture.save(directory / file)
            captions[file] = picto.caption(content)
        query: dict[str, Any] = {"text": INSTRUCTIONS[kind] + picto.caption(scene)}
        if kind == "picture to picture":
            picture = picto.render(scene, query_style, rng.getrandbits(32), augment=True)
            picture.save(directory / f"query-{i}.jpg")
            query = {"text": INSTRUCTIONS[kind], "image": f"query-{i}.jpg"}
        near[f"near-{i}.png"] = f"positive-{i}.png"
        rows.append({"query": query, "positive": {"image": f"positive-{i}.png"}})
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"image": file}) + "\n" for file in captions))
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data, captions, near


@dataclass(frozen=True)
class Candidate:
    """A judged candidate of a query."""

    is_right: bool
    is_nearly_right: bool
    p_yes: float
    positive_p_yes: float


def judge(model: ReMatch, kind: str, queries: int, views: Any) -> list[Candidate]:
    """Mine with rules that keep everything, and return all candidates."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data, captions, near = build(directory, kind, queries)
        rules = Rules(**EVERYTHING, view=View(views))
        mine(model, data, directory / "mined.jsonl", rules, directory / "corpus.jsonl")
        candidates = []
        for line in (directory / "mined.jsonl").read_text().splitlines():
            row = json.loads(line)
            file, positive = row["negative"]["image"][0], row["positive"]["image"][0]
            candidates.append(
                Candidate(
                    captions[file] == captions[positive],
                    near.get(file) == positive,
                    row["p_yes"],
                    row["positive_p_yes"],
                )
            )
    return candidates


def figures(candidates: list[Candidate], yes: float, margin: float) -> dict[str, float]:
    """Precision, recall, and the share of nearly right candidates that are kept, in percent."""

    def is_dropped(candidate: Candidate) -> bool:
        return candidate.p_yes >= yes or candidate.p_yes > candidate.positive_p_yes - margin

    shares = {
        "precision": [c.is_right for c in candidates if is_dropped(c)],
        "recall": [is_dropped(c) for c in candidates if c.is_right],
        "near_kept": [not is_dropped(c) for c in candidates if c.is_nearly_right],
    }
    return {name: round(100 * sum(part) / max(1, len(part)), 1) for name, part in shares.items()}


def main() -> None:
    """Measure, print a table and, with ``--output``, write JSON."""
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
    for kind in INSTRUCTIONS:
        for views in args.views:
            candidates = judge(model, kind, args.queries, views)
            rights = sum(candidate.is_right for candidate in candidates)
            share = round(100 * rights / len(candidates), 1)
            for yes, margin in ((0.3, 0.0), (0.5, 0.0), (0.5, 0.1), (0.7, 0.0), (0.9, 0.0)):
                row = figures(candidates, yes, margin)
                table.add_row(
                    kind, views, str(yes), str(margin), *(f"{value:.1f}" for value in row.values())
                )
                results.append(
                    {"queries": kind, "views": views, "yes": yes, "margin": margin, "false": share}
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
