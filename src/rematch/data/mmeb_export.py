"""Writing Picto in two of MMEB's layouts, which :mod:`rematch.data.mmeb` loads.

- MMEB-train: ``<Config>/original-*.parquet`` with ``qry, qry_image_path, pos_text,
  pos_image_path, neg_text, neg_image_path``; picture paths start with ``images/``.
- MMEB-eval: ``<Config>/test-*.parquet`` with ``qry_text, qry_img_path, tgt_text[],
  tgt_img_path[]``; the two lists are parallel and **index 0 is the positive**.

In both, a text with a picture begins with the marker ``<|image_1|>``, and a missing picture is an
empty path.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rematch.data import picto_tasks
from rematch.data.mmeb import MARKER
from rematch.data.picto_pages import export_picto_v2
from rematch.data.schema import Item, RetrievalTask
from rematch.errors import DataError
from rematch.files import PartialDirectory, writing

_TRAIN_COLUMNS = (
    "qry",
    "qry_image_path",
    "pos_text",
    "pos_image_path",
    "neg_text",
    "neg_image_path",
)


def export_picto(
    directory: Path | str,
    layout: str,
    *,
    samples: int = 2000,
    queries: int = picto_tasks.QUERIES,
    seed: int = 0,
) -> None:
    """Write Picto in one of the layouts of MMEB and MMEB-V2.

    Args:
        directory: Directory to create; it is written under a temporary name and renamed when
            complete.
        layout: ``"mmeb-train"`` (``samples`` training samples of each trained task),
            ``"mmeb-eval"`` (the test split of all tasks, in the training styles and the unseen
            one) or ``"mmeb-v2"`` (pages and clips, :mod:`rematch.data.picto_pages`).
        samples: Number of training samples per task.
        queries: Number of queries per task of the test split, a multiple of 50, at most 200.
        seed: Seed of the training samples.

    Raises:
        DataError: If the directory exists, the layout is unknown, or ``queries`` is not such a
            multiple.
        StorageError: If it cannot be written.
    """
    if layout not in ("mmeb-train", "mmeb-eval", "mmeb-v2"):
        raise DataError(f"unknown format {layout!r}. Choose mmeb-train, mmeb-eval or mmeb-v2.")
    directory = Path(directory)
    if os.path.lexists(directory):
        raise DataError(f"{directory}: exists already. Choose another directory or delete it.")
    with PartialDirectory(directory) as partial:
        try:
            with writing(partial.path):
                partial.empty()
                if layout == "mmeb-train":
                    for name in picto_tasks.TRAINED_TASKS:
                        _write_train(partial.path, name, samples, seed)
                elif layout == "mmeb-eval":
                    for unseen_style in (False, True):
                        for task in picto_tasks.evaluation_tasks(
                            unseen_style=unseen_style, queries=queries
                        ):
                            _write_eval(partial.path, task)
                else:
                    export_picto_v2(partial.path)
        except BaseException:
            partial.discard()
            raise
        partial.publish()


def _saver(root: Path, folder: str) -> Callable[[Item], tuple[str, str]]:
    """Return a function that writes an item's picture, unless it has done so before.

    That function returns the item's text with the marker, and the path of the picture.
    """
    saved: dict[int, tuple[Item, str]] = {}  # holds the items, so that no id is used twice

    def save(item: Item) -> tuple[str, str]:
        text = item.instruction + item.text
        if item.image is None:
            return text, ""
        assert isinstance(item.image, Image.Image)
        if id(item) not in saved:
            path = f"images/{folder}/{len(saved)}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            item.image.save(root / path)
            saved[id(item)] = item, path
        return f"{MARKER}\n{text}", saved[id(item)][1]

    return save


def _write_train(root: Path, name: str, samples: int, seed: int) -> None:
    config = name.replace("-", "_")  # MMEB has ImageNet_1K here and ImageNet-1K in eval
    save = _saver(root, f"{config}/Train")
    columns: dict[str, list[str]] = {column: [] for column in _TRAIN_COLUMNS}
    for i in range(samples):
        triplet = picto_tasks.training_triplet(seed, i, name)
        assert triplet.negative is not None
        cells = [*save(triplet.query)]
        for target in (triplet.positive, triplet.negative):
            text, path = save(target)
            cells += [text if path else target.text, path]  # only pictures have instructions there
        for column, cell in zip(_TRAIN_COLUMNS, cells, strict=True):
            columns[column].append(cell)
    _write(root / config / "original-00000-of-00001.parquet", columns)


def _write_eval(root: Path, task: RetrievalTask) -> None:
    save = _saver(root, task.name)
    documents = [save(d) if d.image is not None else (d.text, "") for d in task.documents]
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for query, candidates in zip(task.queries, task.candidates, strict=True):
        text, path = save(query)
        columns["qry_text"].append(text)
        columns["qry_img_path"].append(path)
        columns["tgt_text"].append([documents[i][0] for i in candidates])
        columns["tgt_img_path"].append([documents[i][1] for i in candidates])
    _write(root / task.name / "test-00000-of-00001.parquet", columns)


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
