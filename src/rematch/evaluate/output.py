"""Files of an evaluation: scores.json, predictions.parquet, saved vectors and MMEB's leaderboard
file; the HTML report is in :mod:`rematch.evaluate.report`.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rematch.data.mmeb_table import DATA_SETS
from rematch.encoding.encoder import Encoder
from rematch.evaluate.benchmarks import Benchmark
from rematch.evaluate.metrics import Ranks, hit_at, map_at, mrr_at, ndcg_at, recall_at
from rematch.evaluate.report import write_report
from rematch.evaluate.run import TaskResult, summary
from rematch.evaluate.summary import baselines
from rematch.files import write_json
from rematch.model import ReMatch

_CUTOFFS = (1, 5, 10)  # of MMEB's leaderboard
_PACKAGES = ("rematch-mm", "torch", "transformers", "sentence-transformers")


def scores_json(
    model: str,
    benchmark: Benchmark,
    results: Sequence[TaskResult],
    encoder: Encoder,
    seconds: float,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``scores.json``. Everything but ``run`` is the same for a run that was
    interrupted and resumed.
    """
    methods = list(results[0].methods)
    return {
        "benchmark": benchmark.name,
        "model": model,
        "scores": summary(results),
        **baselines([result.task for result in results]),
        "tasks": {result.task.name: _rounded(result.scores) for result in results},
        "methods": {name: _method(name, results) for name in methods if len(methods) > 1},
        "left_out": benchmark.left_out,
        "warnings": [warning for result in results for warning in result.warnings],
        "options": dict(options),
        "run": {
            "date": date.today().isoformat(),
            "seconds": round(seconds, 1),
            "inputs_encoded": encoder.encoded,
            "inputs_found_on_disk": encoder.reused,
            "ms_per_query": {
                name: round(float(np.mean([r.methods[name].ms_per_query for r in results])), 3)
                for name in methods
            },
            "hardware": _hardware(encoder),
            "versions": {package: version(package) for package in _PACKAGES},
        },
    }


def _method(name: str, results: Sequence[TaskResult]) -> dict[str, Any]:
    return {
        "scores": summary(results, name),
        "tasks": {r.task.name: _rounded(r.methods[name].scores) for r in results},
    }


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in scores.items()}


def _hardware(encoder: Encoder) -> str:
    device = encoder.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores"


def write(
    directory: Path, content: dict[str, Any], results: Sequence[TaskResult], encoder: Encoder
) -> list[Path]:
    """Write the files of an evaluation, except for vectors.

    Args:
        directory: Where to write them.
        content: The content of ``scores.json`` (:func:`scores_json`).
        results: The results of the tasks.
        encoder: Encoder of the model.

    Returns:
        The files' paths.
    """
    scores, predictions, report = (
        directory / name for name in ("scores.json", "predictions.parquet", "report.html")
    )
    write_json(scores, content)
    _write_predictions(predictions, results)
    write_report(report, content, results)
    paths = [scores, predictions, report]
    if content["benchmark"] == "mmeb":
        paths.append(directory / "leaderboard.json")
        write_json(paths[-1], leaderboard(content["model"], results, encoder))
    return paths


def save_vectors(directory: Path, results: Sequence[TaskResult]) -> None:
    """Write one ``.npz`` file for each task.

    It holds ``queries`` (Q, D); ``documents`` (N, D); ``candidates``, indices of documents, the
    pools of all queries one after the other, relevant candidates first; ``sizes`` (Q,), the size
    of each pool; and ``right`` (Q,), how many of its candidates are relevant.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        pools = [result.task.pool(i) for i in range(len(result.task.queries))]
        partial = directory / f"{result.task.name}.partial.npz"
        np.savez(
            partial,
            queries=result.queries,
            documents=result.documents,
            candidates=np.concatenate([candidates for candidates, _ in pools]),
            sizes=np.array([len(candidates) for candidates, _ in pools]),
            right=np.array([relevant for _, relevant in pools]),
        )
        os.replace(partial, directory / f"{result.task.name}.npz")


def leaderboard(model: str, results: Sequence[TaskResult], encoder: Encoder) -> dict[str, Any]:
    """The content of MMEB's leaderboard file. Scores there are fractions, not percentages; what
    only the author knows is empty.
    """
    st_model = encoder.model
    base = st_model.backbone.base_name if isinstance(st_model, ReMatch) else ""
    parameters = sum(parameter.numel() for parameter in st_model.parameters())
    order = [data_set.name for data_set in DATA_SETS]
    ordered = sorted(results, key=lambda result: order.index(result.task.name))
    return {
        "metadata": {
            "model_name": Path(model).name,
            "model_backbone": Path(base).name,
            "model_size": f"{parameters / 1e9:.3g}B",
            "embedding_dimension": st_model.get_embedding_dimension(),
            "max_length_tokens": st_model.max_seq_length,
            "model_release_date": "",
            "data_source": "Self-Reported",
            "url": "",
            "report_generated_date": date.today().isoformat(),
        },
        "metrics": {
            "image": {result.task.name: _fractions(result.ranks) for result in ordered},
            "video": {},
            "visdoc": {},
        },
    }


def _fractions(ranks: Sequence[Ranks]) -> dict[str, float]:
    metrics = {
        "hit": hit_at,
        "ndcg_linear": ndcg_at,
        "ndcg_exponential": ndcg_at,  # equal to the linear one where relevance is binary
        "recall": recall_at,
        "map": map_at,
        "mrr": mrr_at,
    }
    fractions: dict[str, float] = {}
    for name, metric in metrics.items():
        fractions |= {f"{name}@{k}": metric(ranks, k) / 100 for k in _CUTOFFS}
    return fractions | {"num_pred": len(ranks), "num_data": len(ranks)}


def _write_predictions(path: Path, results: Sequence[TaskResult]) -> None:
    rows = []
    for result in results:
        task = result.task
        for i, query in enumerate(task.queries):
            candidates, relevant = task.pool(i)
            best = result.best[i]
            is_file = query.image is not None and not isinstance(query.image, Image.Image)
            rows.append(
                {
                    "task": task.name,
                    "query": i,
                    "text": query.instruction + query.text,
                    "image": str(query.image) if is_file else "",
                    "answers": [task.documents[j].key for j in candidates[:relevant]],
                    "rank": int(result.ranks[i][0]),
                    "candidates": [task.documents[j].key for j in best.documents],
                    "scores": [float(score) for score in best.scores],
                }
            )
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    os.replace(partial, path)
