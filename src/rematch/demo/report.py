"""The demo's reports: report.json, and a self-contained report.html with tables, loss curves,
example searches and attention maps.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from rematch.data.images import data_url
from rematch.demo.examples import ExampleMaps, ExampleSearch
from rematch.demo.run import DemoResults, LogEntry
from rematch.files import check_replaceable, check_writable, write_json, write_text

_COLOURS = {
    "contrastive": "#888",
    "rematch": "#c2410c",
    "orthogonality": "#0e7490",
    "matching": "#7c3aed",
}


def check_output(directory: Path) -> None:
    """Check, before minutes of work, that the reports can be written.

    Raises:
        StorageError: If not, or if a file of that name is not from an earlier demo.
    """
    record, page = directory / "report.json", directory / "report.html"
    check_replaceable([record, page], record, {"benchmark", "arms"})
    check_writable(directory)


def write_reports(directory: Path, results: DemoResults) -> Path:
    """Write both reports.

    Returns:
        Path of the HTML report.
    """
    write_json(directory / "report.json", results.content)
    log = results.logs["rematch"]
    source = (files("rematch") / "assets/report.html.jinja").read_text()
    page = jinja2.Template(source, autoescape=True).render(
        report=results.content,
        plots=[
            _plot(results.logs, "contrastive"),
            _plot({"rematch": log}, "orthogonality"),
            _plot({"rematch": log}, "matching"),
        ],
        accuracy={
            view: [(entry["step"], entry[f"match_accuracy/{view}"]) for entry in log]
            for view in sorted(results.content["matching_accuracy"])
        },
        searches=[_search_view(search) for search in results.searches],
        tasks=[
            {"name": r.task.name, "meta_task": r.task.meta_task, "scores": r.scores}
            for r in results.tiny
        ],
        maps=[_maps_view(example) for example in results.maps],
    )
    path = directory / "report.html"
    write_text(path, page)
    return path


def _plot(logs: dict[str, list[LogEntry]], loss: str) -> dict[str, Any]:
    """Curves of a loss for a 320×140 plot, with the range of its values."""
    series = {
        name: [(entry["step"], entry[loss]) for entry in entries] for name, entries in logs.items()
    }
    values = [value for points in series.values() for _, value in points]
    last_step = max(step for points in series.values() for step, _ in points)
    low, high = min(values), max(values)
    height = (high - low) or 1
    return {
        "loss": loss,
        "low": low,
        "high": high,
        "last_step": last_step,
        "curves": [
            {
                "name": name,
                "colour": _COLOURS[name if len(series) > 1 else loss],
                "points": " ".join(
                    f"{10 + 300 * step / last_step:.1f},{130 - 120 * (value - low) / height:.1f}"
                    for step, value in points
                ),
            }
            for name, points in series.items()
        ],
    }


def _search_view(search: ExampleSearch) -> dict[str, Any]:
    """A search as the page shows it."""
    picture = search.query.get("image")
    return {
        "text": search.query.get("text", ""),
        "image": data_url(picture) if picture else None,
        "hits": [
            {"image": data_url(item.image), "caption": item.key, "score": score}
            for item, score in search.hits
            if isinstance(item.image, Image.Image)
        ],
    }


def _maps_view(example: ExampleMaps) -> dict[str, Any]:
    """Attention maps as the page shows them."""
    return {
        "caption": example.caption,
        "picture": data_url(example.picture),
        "all_tokens": data_url(example.all_tokens),
        "tokens": [data_url(token) for token in example.tokens],
    }
