"""Reordering the nearest documents, stage after stage, by what costs more and sees more.

``"maxsim:200,feat:100,raw:10"``: the first 200 by MaxSim over the token vectors, then the first
100 of these by the matching head from stored vectors alone (a few tokens a pair, no picture is
read), then the first 10 by the matching head that reads query and document again. Behind a stage's
number the order stays. A number alone is ``raw``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rematch.data.corpus import Document, Metadata
from rematch.data.images import EncodedPicture
from rematch.errors import RematchError
from rematch.matching import View
from rematch.scoring import maxsim, probability

if TYPE_CHECKING:
    from rematch.search.index import Index

_SHORT = {"raw": "raw-raw", "feat": "feat-feat"}


@dataclass(frozen=True)
class Stage:
    """The first ``count`` documents are put in the order of ``views``: a view pair of the matching
    head, or maxsim.
    """

    views: str
    count: int


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        id: Of the document.
        score: In what ``by`` says.
        by: ``"cosine"``, ``"maxsim"``, or the view pair whose P(yes) it is.
        nearest: Its place by cosine, from 1, before anything reordered.
        text: The document's text.
        path: Its picture, if that is a file.
        metadata: Whatever else the corpus said of it.
    """

    id: str
    score: float
    by: str = "cosine"
    nearest: int = 0
    text: str = ""
    path: str = ""
    metadata: Metadata = field(default_factory=dict)


def parse(spec: str, about: dict[str, Any], width: int) -> list[Stage]:
    """Stages from ``"feat:100,raw:10"``.

    Args:
        spec: Stages with commas between; may be empty.
        about: Of the index (:attr:`~rematch.search.index.Index.about`).
        width: D of the model.

    Raises:
        RematchError: If it cannot be read, or the index does not hold what a stage needs.
    """
    stages: list[Stage] = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, count = part.rpartition(":")
        views = _SHORT.get(name or "raw", name)
        if not count.isdigit() or (views != "maxsim" and views not in list(View)):
            raise RematchError(
                f"--rerank {part}: write STAGE:COUNT, where STAGE is maxsim, "
                f"{', '.join([*_SHORT, *View])}; for example feat:100,raw:10."
            )
        if stages and int(count) > stages[-1].count:
            raise RematchError(
                f"--rerank {spec}: {part} looks further than the stage before it. Let counts fall."
            )
        if views == "maxsim" and not about["tokens"]:
            raise RematchError(
                f"--rerank {part}: the index holds no token vectors. Make it with --tokens."
            )
        if "feat" in views and about["dimensions"] < width:
            raise RematchError(
                f"--rerank {part}: the index keeps {about['dimensions']} of {width} dimensions, "
                "and the matching head reads whole vectors only. Use raw, or index without "
                "--dimensions."
            )
        if int(count):
            stages.append(Stage(views, int(count)))
    return stages


def reorder(
    index: "Index",
    query: Any,
    vector: NDArray[np.float32],
    rows: pa.Table,
    stages: Sequence[Stage],
) -> list[Hit]:
    """The rows as hits, after all stages.

    Args:
        index: Where they come from.
        query: The query.
        vector: Its whole vector, (D,).
        rows: The nearest documents, nearest first.
        stages: In their order.
    """
    scores = 1 - np.asarray(rows["_distance"], np.float64)
    by = ["cosine"] * len(rows)
    order = np.arange(len(rows))
    for stage in stages:
        first = order[: stage.count]
        if not len(first):
            break
        if stage.views == "maxsim":
            judged = _maxsim(index, query, rows.take(pa.array(first)))
        else:
            judged = _match(index, query, vector, rows.take(pa.array(first)), stage.views)
        ranking = np.argsort(-judged, kind="stable")
        order = np.concatenate([first[ranking], order[stage.count :]])
        scores[first] = judged if stage.views == "maxsim" else probability(judged)
        for i in first:
            by[i] = stage.views
    metadata = (
        rows.select(index.metadata_columns).to_pylist()
        if index.metadata_columns
        else [{}] * len(rows)
    )
    plain = rows.select(["id", "text", "path"]).to_pylist()
    return [
        Hit(
            plain[i]["id"],
            float(scores[i]),
            by[i],
            int(i) + 1,
            plain[i]["text"] or "",
            plain[i]["path"] or "",
            {k: v for k, v in metadata[i].items() if v is not None},
        )
        for i in order
    ]


def _maxsim(index: "Index", query: Any, rows: pa.Table) -> NDArray[np.float32]:
    own = index.model.encode_query([query], multi_vector=True, show_progress_bar=False)[0]
    flat = rows["tokens"].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    return maxsim(own, flat.astype(np.float32).reshape(len(rows), -1, own.shape[-1]))


def _match(
    index: "Index", query: Any, vector: NDArray[np.float32], rows: pa.Table, views: str
) -> NDArray[np.float32]:
    view = View(views)
    asked = vector if view.query == "feat" else query
    given: list[Any]
    if view.document == "feat":
        flat = rows["vector"].combine_chunks().flatten().to_numpy().copy()
        given = list(flat.reshape(len(rows), -1))
    else:
        given = _inputs(index, rows)
    return index.model.score(asked, given, view)


def _inputs(index: "Index", rows: pa.Table) -> list[Any]:
    """What the documents were when they were indexed."""
    plain = rows.select(["id", "text", "path"]).to_pylist()
    stored = [row["path"] is None for row in plain]
    numbers = [n for n, inside in zip(rows["_rowid"].to_pylist(), stored, strict=True) if inside]
    files = iter(index.pictures(numbers) if numbers else [])
    inputs = []
    for row, inside in zip(plain, stored, strict=True):
        content = next(files) if inside else None
        image = (
            EncodedPicture(row["id"], content)
            if content
            else Path(row["path"])
            if row["path"]
            else None
        )
        document = Document(row["id"], row["text"] or "", image)
        inputs.append(document.item().as_input(index.about["document_instructions"]))
    return inputs
