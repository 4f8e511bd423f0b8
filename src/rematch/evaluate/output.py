"""What an evaluation leaves behind: scores.json, predictions.parquet, report.html and MMEB's
leaderboard file.
"""

import json
import os
import platform
import random
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rematch.data.images import data_url, load_image
from rematch.data.mmeb_table import DATA_SETS
from rematch.data.schema import Item
from rematch.encoding.encoder import Encoder
from rematch.evaluate.benchmarks import Benchmark
from rematch.evaluate.metrics import Ranks, hit_at, map_at, mrr_at, ndcg_at, recall_at
from rematch.evaluate.run import TaskResult, baselines, summary
from rematch.files import write_json, write_text
from rematch.model import ReMatch

_CUTS = (1, 5, 10)
_FAILURES = 6  # examples of failures in the report
_CANDIDATES_SHOWN = 3


@cache
def reference() -> dict[str, Any]:
    """Published MMEB scores: ``per_dataset``, ``meta_task_scores`` with their ``columns``, and
    their ``source``.
    """
    content: dict[str, Any] = json.loads(
        (files("rematch") / "assets/mmeb_reference_scores.json").read_text()
    )
    return content


def content_of(
    model: str,
    benchmark: Benchmark,
    results: Sequence[TaskResult],
    encoder: Encoder,
    seconds: float,
    options: Any,
) -> dict[str, Any]:
    """What ``scores.json`` holds; all but ``run`` is the same however often a run was interrupted."""
    methods = list(dict.fromkeys(name for r in results for name in r.methods))
    return {
        "benchmark": benchmark.name,
        "model": model,
        "scores": summary(results),
        **baselines([r.task for r in results]),
        "tasks": {r.task.name: _rounded(r.scores) for r in results},
        "methods": {name: _method(name, results) for name in methods if len(methods) > 1},
        "left_out": benchmark.left_out,
        "warnings": [warning for r in results for warning in r.warnings],
        "options": options,
        "run": {
            "date": date.today().isoformat(),
            "seconds": round(seconds, 1),
            "inputs_encoded": encoder.encoded,
            "inputs_found_on_disk": encoder.reused,
            "ms_per_query": {
                n: round(float(np.mean([r.methods[n]["ms_per_query"] for r in results])), 3)
                for n in methods
            },
            "hardware": _hardware(encoder),
            "versions": {
                n: version(n)
                for n in ("rematch-mm", "torch", "transformers", "sentence-transformers")
            },
        },
    }


def _method(name: str, results: Sequence[TaskResult]) -> dict[str, Any]:
    means = summary(results, lambda r: r.methods[name]["hit@1"])
    return {
        "scores": means,
        "tasks": {r.task.name: _rounded(r.methods[name], leave="ms_per_query") for r in results},
    }


def _rounded(scores: dict[str, float], leave: str = "") -> dict[str, float]:
    return {name: round(value, 2) for name, value in scores.items() if name != leave}


def _hardware(encoder: Encoder) -> str:
    device = encoder.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores"


def write(
    directory: Path, content: dict[str, Any], results: Sequence[TaskResult], encoder: Encoder
) -> list[Path]:
    """Write everything into ``directory`` and return the files' paths."""
    written = [
        directory / "scores.json",
        directory / "predictions.parquet",
        directory / "report.html",
    ]
    write_json(written[0], content)
    _write_predictions(written[1], results)
    _write_report(written[2], content, results)
    if content["benchmark"] == "mmeb":
        written.append(directory / "leaderboard.json")
        write_json(written[-1], leaderboard(content["model"], results, encoder))
    return written


def save_vectors(directory: Path, results: Sequence[TaskResult]) -> None:
    """One ``.npz`` a task: ``queries`` (Q, D), ``documents`` (N, D), ``candidates`` (all pools one
    after the other, the right ones first), ``sizes`` (Q,) of the pools, ``right`` (Q,) how many
    are right.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        assert result.vectors is not None
        pools = [result.task.pool(i) for i in range(len(result.task.queries))]
        partial = directory / f"{result.task.name}.partial.npz"
        np.savez(
            partial,
            queries=result.vectors[0],
            documents=result.vectors[1],
            candidates=np.concatenate([own for own, _ in pools]),
            sizes=np.array([len(own) for own, _ in pools]),
            right=np.array([right for _, right in pools]),
        )
        os.replace(partial, directory / f"{result.task.name}.npz")


def leaderboard(model: str, results: Sequence[TaskResult], encoder: Encoder) -> dict[str, Any]:
    """MMEB's leaderboard file; scores there are shares, not percent. What only the author knows is
    left empty.
    """
    st = encoder.model
    base = st.backbone.base_name if isinstance(st, ReMatch) else ""
    names = [d.name for d in DATA_SETS]
    return {
        "metadata": {
            "model_name": Path(model).name,
            "model_backbone": Path(base).name,
            "model_size": f"{sum(p.numel() for p in st.parameters()) / 1e9:.3g}B",
            "embedding_dimension": st.get_embedding_dimension(),
            "max_length_tokens": st.max_seq_length,
            "model_release_date": "",
            "data_source": "Self-Reported",
            "url": "",
            "report_generated_date": date.today().isoformat(),
        },
        "metrics": {
            "image": {
                r.task.name: _shares(r.ranks)
                for r in sorted(results, key=lambda r: names.index(r.task.name))
            },
            "video": {},
            "visdoc": {},
        },
    }


def _shares(ranks: Sequence[Ranks]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, measure in (
        ("hit", hit_at),
        ("ndcg_linear", ndcg_at),
        ("ndcg_exponential", ndcg_at),  # the same where an answer is right or wrong
        ("recall", recall_at),
        ("map", map_at),
        ("mrr", mrr_at),
    ):
        found |= {f"{name}@{k}": measure(ranks, k) / 100 for k in _CUTS}
    return found | {"num_pred": len(ranks), "num_data": len(ranks)}


def _write_predictions(path: Path, results: Sequence[TaskResult]) -> None:
    columns: dict[str, list[Any]] = {
        n: []
        for n in ("task", "query", "text", "image", "answers", "rank", "candidates", "scores")
    }
    for result in results:
        for i, (query, ranks, (best, scores)) in enumerate(
            zip(result.task.queries, result.ranks, result.best, strict=True)
        ):
            own, right = result.task.pool(i)
            row = {
                "task": result.task.name,
                "query": i,
                "text": query.instruction + query.text,
                "image": ""
                if query.image is None or isinstance(query.image, Image.Image)
                else str(query.image),
                "answers": [result.task.documents[j].key for j in own[:right]],
                "rank": int(ranks[0]),
                "candidates": [result.task.documents[j].key for j in best],
                "scores": [float(s) for s in scores],
            }
            for name, value in row.items():
                columns[name].append(value)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    os.replace(partial, path)


def _write_report(path: Path, content: dict[str, Any], results: Sequence[TaskResult]) -> None:
    template = jinja2.Template(
        (files("rematch") / "assets/evaluation.html.jinja").read_text(), autoescape=True
    )
    worst = sorted(results, key=lambda r: r.scores["hit@1"])[:5]
    published = _published(content, results) if content["benchmark"] == "mmeb" else None
    metas: dict[str, list[TaskResult]] = {}
    for result in results:
        metas.setdefault(result.task.meta_task, []).append(result)
    failures = [(r.task.name, r.scores["hit@1"], _failures(r)) for r in worst]
    write_text(
        path,
        template.render(
            report=content, metas=metas, published=published, failures=failures, source=reference()
        ),
    )


def _published(content: dict[str, Any], results: Sequence[TaskResult]) -> dict[str, Any]:
    """Ours beside the published figures, meta-task by meta-task and data set by data set."""
    known = reference()
    columns = known["meta_task_scores"]["columns"]
    whole = len(results) == len(DATA_SETS)
    ours = [content["scores"].get(c) for c in columns]
    rows = {n: v for n, v in known["meta_task_scores"].items() if n != "columns"}
    per = known["per_dataset"]
    return {
        "columns": columns,
        "ours": ours,
        "whole": whole,
        "rows": rows,
        "models": list(per),
        "datasets": [
            (r.task.name, r.scores["hit@1"], [per[m].get(r.task.name) for m in per])
            for r in results
        ],
    }


def _failures(result: TaskResult) -> list[dict[str, Any]]:
    """Some queries whose answer is not first, drawn by lot."""
    task, missed = result.task, [i for i, ranks in enumerate(result.ranks) if ranks[0] > 1]
    found = []
    for i in sorted(random.Random(0).sample(missed, min(_FAILURES, len(missed)))):
        own, right = task.pool(i)
        answers, (best, scores) = set(own[:right].tolist()), result.best[i]
        found.append(
            {
                "query": _shown(task.queries[i]),
                "answer": _shown(task.documents[own[0]]),
                "rank": int(result.ranks[i][0]),
                "best": [
                    (_shown(task.documents[j]), float(s), int(j) in answers)
                    for j, s in zip(
                        best[:_CANDIDATES_SHOWN], scores[:_CANDIDATES_SHOWN], strict=True
                    )
                ],
            }
        )
    return found


def _shown(item: Item) -> dict[str, Any]:
    given = (
        item.image if isinstance(item.image, list) else [] if item.image is None else [item.image]
    )
    text = item.text if len(item.text) <= 240 else item.text[:240] + " …"
    return {"images": [data_url(load_image(one)) for one in given], "text": text}
