"""The demo's HTML report: one self-contained file with tables, loss curves, example searches and
attention maps.
"""

import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from rematch.data import picto
from rematch.data.images import data_url
from rematch.data.schema import Item
from rematch.evaluate.run import TaskResult
from rematch.files import write_text
from rematch.interpretability import attention_maps, overlay
from rematch.model import ReMatch

_COLOURS = {
    "contrastive": "#888",
    "rematch": "#c2410c",
    "orthogonality": "#0e7490",
    "matching": "#7c3aed",
}


def example_maps(
    model: ReMatch, rng: random.Random
) -> list[tuple[str, Image.Image, Image.Image, list[Image.Image]]]:
    """Where the learnable document tokens look in two unseen scenes.

    Returns:
        For each scene: caption, picture, map of all tokens together, maps of the first six tokens.
    """
    found = []
    for _ in range(2):
        scene = picto.sample_scene(rng, held_out=True, count=3, distinct=True)
        picture = picto.render(scene, "noto", 1)
        weights = attention_maps(model, picture)
        found.append(
            (
                picto.caption(scene),
                picture,
                overlay(picture, weights.mean(0)),
                [overlay(picture, w) for w in weights[:6]],
            )
        )
    return found


def curves(logs: dict[str, list[dict[str, float]]], key: str) -> dict[str, Any]:
    """Polylines of one logged quantity for a 320×140 plot, with the range of the values."""
    series = {
        name: [(row["step"], row[key]) for row in rows if key in row]
        for name, rows in logs.items()
    }
    series = {name: points for name, points in series.items() if points}
    values = [v for points in series.values() for _, v in points]
    low, high = min(values), max(values)
    last = max(step for points in series.values() for step, _ in points)
    lines = {
        name: " ".join(
            f"{10 + 300 * s / last:.1f},{130 - 120 * (v - low) / ((high - low) or 1):.1f}"
            for s, v in points
        )
        for name, points in series.items()
    }
    return {
        "key": key,
        "low": low,
        "high": high,
        "last": last,
        "lines": lines,
        "colours": _COLOURS,
    }


def write_report(
    path: Path,
    content: dict[str, Any],
    logs: dict[str, list[dict[str, float]]],
    searches: list[tuple[dict[str, Any], list[tuple[Item, float]]]],
    tiny: list[TaskResult],
    maps: list[tuple[str, Image.Image, Image.Image, list[Image.Image]]],
) -> Path:
    """Render the report under a temporary name and rename it."""
    template = jinja2.Template(
        (files("rematch") / "assets/report.html.jinja").read_text(), autoescape=True
    )
    views = {f"match_accuracy/{v}" for v in content["matching_accuracy"]}
    accuracy = {
        k.partition("/")[2]: [(r["step"], r[k]) for r in logs["rematch"] if k in r]
        for k in sorted(views)
    }
    html = template.render(
        report=content,
        plots=[
            curves(logs, "contrastive"),
            curves({"rematch": logs["rematch"]}, "orthogonality"),
            curves({"rematch": logs["rematch"]}, "matching"),
        ],
        accuracy=accuracy,
        searches=[_search_view(query, hits) for query, hits in searches],
        tasks=[
            (r.task.name, r.task.meta_task, r.scores["hit@1"], r.scores["hit@10"]) for r in tiny
        ],
        maps=[
            (caption, data_url(p), data_url(m), [data_url(t) for t in tokens])
            for caption, p, m, tokens in maps
        ],
    )
    write_text(path, html)
    return path


def _search_view(query: dict[str, Any], hits: list[tuple[Item, float]]) -> dict[str, Any]:
    shown = [
        (data_url(item.image), item.key, score)
        for item, score in hits
        if isinstance(item.image, Image.Image)
    ]
    return {
        "text": query.get("text", ""),
        "image": data_url(query["image"]) if "image" in query else None,
        "hits": shown,
    }
