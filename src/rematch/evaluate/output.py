"""Files of an evaluation: scores.json, predictions.parquet, saved vectors and the leaderboard file
of MMEB and MMEB-V2; the HTML report is in :mod:`rematch.evaluate.report`.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rematch.data.mmeb_table import DATA_SETS
from rematch.data.mmeb_v2_table import VIDEO_SETS, VISDOC_SETS
from rematch.data.schema import Item
from rematch.encoding.encoder import Encoder
from rematch.evaluate.benchmarks import Benchmark
from rematch.evaluate.metrics import (
    Ranks,
    f1_at,
    hit_at,
    map_at,
    mrr_at,
    ndcg_at,
    precision_at,
    recall_at,
)
from rematch.evaluate.report import write_report
from rematch.evaluate.run import TaskResult, summary
from rematch.evaluate.summary import baselines
from rematch.files import (
    check_replaceable,
    check_writable,
    replacing,
    write_json,
    writing,
)
from rematch.model import ReMatch

_FILES = ("scores.json", "predictions.parquet", "report.html")
_CUTOFFS = (1, 5, 10)  # of MMEB's leaderboard
_PREDICTIONS = pa.schema(
    {
        "task": pa.string(),
        "query": pa.int64(),
        "key": pa.string(),
        "text": pa.string(),
        "image": pa.string(),
        "answers": pa.list_(pa.string()),
        "grades": pa.list_(pa.float64()),
        "rank": pa.int64(),
        "candidates": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
    }
)
_IMAGE_SETS = [data_set.name for data_set in DATA_SETS]
_LEADERBOARD = {  # the sets of each modality, in the leaderboard's order
    "image": _IMAGE_SETS,
    "video": [data_set.name for data_set in VIDEO_SETS],
    "visdoc": [data_set.name for data_set in VISDOC_SETS],
}
_METRIC_NAMES = {"hit@1": "Hit@1", "ndcg@5": "nDCG@5"}
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
        "metric": _metric(results),
        "scores": summary(results),
        **baselines([result.task for result in results]),
        "tasks": {result.task.name: _rounded(result.scores) for result in results},
        "methods": {name: _method(name, results) for name in methods if len(methods) > 1},
        "instructions": {
            result.task.name: sorted({query.instruction for query in result.task.queries})
            for result in results
            if result.task.chooses_instructions
        },
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


def _metric(results: Sequence[TaskResult]) -> str:
    """What the means are taken of, in words."""
    metrics = {_METRIC_NAMES[result.task.metric] for result in results}
    return metrics.pop() if len(metrics) == 1 else "Hit@1, of visual documents nDCG@5"


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


def check_output(directory: Path) -> None:
    """Check, before hours of work, that the files of an evaluation can be written.

    Raises:
        StorageError: If not, or if a file of that name is not from an earlier evaluation.
    """
    files = [directory / name for name in (*_FILES, "leaderboard.json")]
    check_replaceable(files, directory / "scores.json", {"benchmark", "model", "tasks"})
    check_writable(directory)


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
    scores, predictions, report = (directory / name for name in _FILES)
    write_json(scores, content)
    _write_predictions(predictions, results)
    write_report(report, content, results)
    paths = [scores, predictions, report]
    if any(r.task.name in names for r in results for names in _LEADERBOARD.values()):
        paths.append(directory / "leaderboard.json")
        write_json(paths[-1], leaderboard(content["model"], results, encoder))
    return paths


def save_vectors(directory: Path, results: Sequence[TaskResult]) -> None:
    """Write one ``.npz`` file for each task.

    It holds ``queries`` (Q, D); ``documents`` (N, D); ``candidates``, indices of documents, the
    pools of all queries one after the other, relevant candidates first; ``sizes`` (Q,), the size
    of each pool; and ``right`` (Q,), how many of its candidates are relevant.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        pools = [result.task.pool(i) for i in range(len(result.task.queries))]
        with replacing(directory / f"{result.task.name}.npz") as temporary:
            np.savez(
                temporary,
                queries=result.queries,
                documents=result.documents,
                candidates=np.concatenate([candidates for candidates, _ in pools]),
                sizes=np.array([len(candidates) for candidates, _ in pools]),
                right=np.array([relevant for _, relevant in pools]),
            )


def leaderboard(model: str, results: Sequence[TaskResult], encoder: Encoder) -> dict[str, Any]:
    """The content of the leaderboard file of MMEB and MMEB-V2. Scores there are fractions, not
    percentages; what only the author knows is empty.
    """
    st_model = encoder.model
    base = st_model.backbone.base_name if isinstance(st_model, ReMatch) else ""
    parameters = sum(parameter.numel() for parameter in st_model.parameters())
    by_name = {result.task.name: result for result in results}
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
            modality: {name: _fractions(by_name[name]) for name in names if name in by_name}
            for modality, names in _LEADERBOARD.items()
        },
    }


def _fractions(result: TaskResult) -> dict[str, float]:
    ranks, grades = result.ranks, result.grades
    metrics: dict[str, Callable[[Sequence[Ranks], int], float]] = {
        "hit": hit_at,
        "ndcg_linear": partial(ndcg_at, grades=grades),
        "ndcg_exponential": partial(ndcg_at, grades=grades, exponential=True),
        "precision": precision_at,
        "recall": recall_at,
        "f1": f1_at,
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
            rows.append(
                {
                    "task": task.name,
                    "query": i,
                    "key": query.key,
                    "text": query.instruction + query.text,
                    "image": "\n".join(_files(query)),
                    "answers": [task.documents[j].key for j in candidates[:relevant]],
                    "grades": [float(grade) for grade in task.relevance(i)],
                    "rank": int(result.ranks[i][0]) if relevant else None,
                    "candidates": [task.documents[j].key for j in best.documents],
                    "scores": [float(score) for score in best.scores],
                }
            )
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_PREDICTIONS), temporary)


def _files(query: Item) -> list[str]:
    """Where the pictures of a query are, as far as they are files."""
    pictures = query.image if isinstance(query.image, list) else [query.image]
    return [str(p) for p in pictures if p is not None and not isinstance(p, Image.Image)]
