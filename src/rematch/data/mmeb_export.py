"""Picto written in two of MMEB's layouts, which :mod:`rematch.data.mmeb` reads.

- MMEB-train: ``<Config>/original-*.parquet`` with ``qry, qry_image_path, pos_text,
  pos_image_path`` and perhaps ``neg_text, neg_image_path``; picture paths start with ``images/``.
- MMEB-eval: ``<Config>/test-*.parquet`` with ``qry_text, qry_img_path, tgt_text[],
  tgt_img_path[]``; the two lists are parallel and **index 0 is the answer**.

In both, text that goes with a picture begins with the marker ``<|image_1|>``, and empty means "".
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rematch.data import picto_tasks
from rematch.data.mmeb import MARKER
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError


def export_picto(
    directory: Path | str, layout: str, *, samples: int = 2000, seed: int = 0
) -> None:
    """Write Picto in one of MMEB's layouts.

    Args:
        directory: Created; must not exist yet. It is written under a temporary name and renamed
            when whole.
        layout: ``"mmeb-train"`` (``samples`` triplets a task) or ``"mmeb-eval"`` (the fixed test
            set, IND and OOD).
        samples: Training samples per task.
        seed: Of the training samples.

    Raises:
        DataError: If the directory exists or the layout is unknown.
    """
    directory = Path(directory)
    if directory.exists():
        raise DataError(f"{directory}: exists already. Choose another directory or remove it.")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if layout == "mmeb-train":
        for name in picto_tasks.TASKS:
            _write_train(partial, name, samples, seed)
    elif layout == "mmeb-eval":
        for task in [*picto_tasks.evaluation_tasks(), *picto_tasks.evaluation_tasks(ood=True)]:
            _write_eval(partial, task)
    else:
        partial.rmdir()
        raise DataError(f"format {layout!r} is unknown; choose mmeb-train or mmeb-eval.")
    partial.rename(directory)


def _saver(root: Path, folder: str) -> Callable[[Item], tuple[str, str]]:
    """A function that writes an item's picture once and gives (text with marker, picture path)."""
    known: dict[int, tuple[Item, str]] = {}  # holds the items, so that an id is not used twice

    def save(item: Item) -> tuple[str, str]:
        text = item.instruction + item.text
        if item.image is None:
            return text, ""
        assert isinstance(item.image, Image.Image)
        if id(item) not in known:
            path = f"images/{folder}/{len(known)}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            item.image.save(root / path)
            known[id(item)] = item, path
        return f"{MARKER}\n{text}", known[id(item)][1]

    return save


def _write_train(root: Path, name: str, samples: int, seed: int) -> None:
    config = name.replace("-", "_")  # as MMEB: ImageNet_1K here, ImageNet-1K in eval
    save = _saver(root, f"{config}/Train")
    columns: dict[str, list[str]] = {c: [] for c in _TRAIN_COLUMNS}
    for triplet in (picto_tasks.training_triplet(seed, i, name) for i in range(samples)):
        parts = (triplet.query, triplet.positive, triplet.negative)
        saved = [save(part) for part in parts if part is not None]
        # targets: MMEB has instructions for pictures only
        texts = [
            text if path else part.text
            for part, (text, path) in zip(parts, saved, strict=True)
            if part
        ]
        texts[0] = saved[0][0]
        for column, value in zip(
            _TRAIN_COLUMNS,
            [v for t, (_, p) in zip(texts, saved, strict=True) for v in (t, p)],
            strict=True,
        ):
            columns[column].append(value)
    _write(root / config / "original-00000-of-00001.parquet", columns)


_TRAIN_COLUMNS = (
    "qry",
    "qry_image_path",
    "pos_text",
    "pos_image_path",
    "neg_text",
    "neg_image_path",
)


def _write_eval(root: Path, task: RetrievalTask) -> None:
    save = _saver(root, task.name)
    documents = [save(d) if d.image is not None else (d.text, "") for d in task.documents]
    columns: dict[str, list[Any]] = {
        c: [] for c in ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    }
    for query, candidates in zip(task.queries, task.candidates, strict=True):
        text, path = save(query)
        columns["qry_text"].append(text)
        columns["qry_img_path"].append(path)
        columns["tgt_text"].append([documents[i][0] for i in candidates])
        columns["tgt_img_path"].append([documents[i][1] for i in candidates])
    _write(root / task.name / "test-00000-of-00001.parquet", columns)


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), partial)
    os.replace(partial, path)
