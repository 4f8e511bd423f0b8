"""Rerank the first documents, stage after stage, by scores that cost more and see more.

In ``"maxsim:200,feat:100,raw:10"`` the first 200 documents are ordered by MaxSim over the token
vectors. The first 100 of these are then ordered by the matching head from stored vectors alone, a
few tokens per pair and no pictures. The first 10 of these are ordered by the matching head that
reads query and document again. The documents behind a stage's number keep their order. A number
alone is a ``raw`` stage.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rematch.data.images import load_image
from rematch.errors import ImageError, RematchError
from rematch.matching import View
from rematch.model import ReMatch
from rematch.scoring import maxsim, probability
from rematch.search.retrieval import Candidates
from rematch.search.schema import IndexSettings

_STAGES: dict[str, View | Literal["maxsim"]] = {
    "": View.RAW_RAW,
    "maxsim": "maxsim",
    "raw": View.RAW_RAW,
    "feat": View.FEAT_FEAT,
    **{view.value: view for view in View},
}

_MOST_DIGITS = 6  # of a stage's count


@dataclass(frozen=True)
class Stage:
    """A step of the cascade.

    Attributes:
        by: What orders the documents: MaxSim, or the matching head with this view.
        count: How many of the first documents are reranked; the others keep their places.
    """

    by: View | Literal["maxsim"]
    count: int

    def __post_init__(self) -> None:
        if self.by != "maxsim":
            object.__setattr__(self, "by", View(self.by))  # also from its name

    def reads(self, column: Literal["vector", "tokens"]) -> bool:
        """Whether the stage reads this column of the documents."""
        if isinstance(self.by, View):
            return column == "vector" and self.by.document == "feat"
        return column == "tokens"


class Ranked(NamedTuple):
    """A document after all stages.

    Attributes:
        row: Its row among the candidates, from 0.
        score: The score of the last stage that it went through.
        by: As for :class:`~rematch.search.hits.Hit`.
    """

    row: int
    score: float
    by: str


class Reranked(NamedTuple):
    """What came of the stages.

    Attributes:
        ranking: All documents, best first.
        unreadable: By row, the stage that a document dropped out of because its picture is
            missing or broken.
    """

    ranking: list[Ranked]
    unreadable: dict[int, str]


def parse_stages(spec: str, settings: IndexSettings, width: int) -> list[Stage]:
    """Stages from text such as ``"feat:100,raw:10"``.

    Args:
        spec: Stages separated by commas; may be empty.
        settings: Settings of the index.
        width: D, the width of the model.

    Raises:
        RematchError: If the text cannot be parsed, or the index lacks what a stage needs.
    """
    stages: list[Stage] = []
    for part in spec.split(","):
        if not part.strip():
            continue
        stage = _parse_stage(part.strip(), settings, width)
        if any(stage.by == earlier.by for earlier in stages):
            raise RematchError(
                f"--rerank {spec}: {stage.by} occurs twice, which costs time and changes nothing. "
                "Name each stage once."
            )
        if stages and stage.count > stages[-1].count:
            raise RematchError(
                f"--rerank {spec}: {part.strip()} covers more documents than the stage before it. "
                "Counts must not increase, e.g. maxsim:200,feat:100,raw:10."
            )
        if stage.count:
            stages.append(stage)
    return stages


def _parse_stage(text: str, settings: IndexSettings, width: int) -> Stage:
    name, _, count = text.rpartition(":")
    is_count = re.fullmatch(f"[0-9]{{1,{_MOST_DIGITS}}}", count)
    if not is_count or name not in _STAGES:
        names = ", ".join(name for name in _STAGES if name)
        raise RematchError(
            f"--rerank {text}: not a stage; write STAGE:COUNT, where STAGE is one of {names} and "
            f"COUNT has at most {_MOST_DIGITS} digits; for example feat:100,raw:10."
        )
    by = _STAGES[name]
    if by == "maxsim" and not settings.tokens:
        raise RematchError(
            f"--rerank {text}: the index has no token vectors. Build it with --tokens."
        )
    if isinstance(by, View) and "feat" in (by.query, by.document) and settings.dimensions < width:
        raise RematchError(
            f"--rerank {text}: the index has {settings.dimensions} of {width} dimensions, and the "
            "matching head reads whole vectors only. Use raw, or index without --dimensions."
        )
    return Stage(by, int(count))


def rerank(
    model: ReMatch | None,
    query: Any,
    vector: NDArray[np.float32] | None,
    candidates: Candidates,
    stages: Sequence[Stage],
    load_inputs: Callable[[pa.Table], list[Any]],
) -> Reranked:
    """Order the candidates of a query by the stages.

    A document whose picture cannot be read drops out of a stage that would read it: it comes after
    the others of the stage, with the score that it had.

    Args:
        model: The model of the index; may be ``None`` without stages.
        query: The query.
        vector: The query's whole vector, (D,); may be ``None`` without stages.
        candidates: The documents of the first stage, with the columns that the stages read.
        stages: The stages, in order.
        load_inputs: Returns the documents of some of the rows as a model's inputs.
    """
    rows, scores = candidates.rows, candidates.scores.copy()
    score_names = [candidates.by] * len(rows)
    order = np.arange(len(rows))
    unreadable: dict[int, str] = {}
    for stage in stages:
        first = order[: stage.count]
        if not len(first):
            break
        assert model is not None
        documents = rows.take(pa.array(first))
        rest = order[stage.count :]
        if isinstance(stage.by, View):
            assert vector is not None
            margins, readable = _margins(model, query, vector, documents, stage.by, load_inputs)
            unreadable |= dict.fromkeys(first[~readable].tolist(), str(stage.by))
            rest = np.concatenate([first[~readable], rest])
            first = first[readable]
            ranking = np.argsort(-margins, kind="stable")
            scores[first] = probability(margins)
        else:
            similarities = _maxsim(model, query, documents)
            ranking = np.argsort(-similarities, kind="stable")
            scores[first] = similarities
        for row in first:
            score_names[row] = str(stage.by)
        order = np.concatenate([first[ranking], rest])
    ranked = [Ranked(int(row), float(scores[row]), score_names[row]) for row in order]
    return Reranked(ranked, unreadable)


def _maxsim(model: ReMatch, query: Any, documents: pa.Table) -> NDArray[np.float32]:
    query_tokens = model.encode_query([query], multi_vector=True, show_progress_bar=False)[0]
    flat = documents["tokens"].combine_chunks().flatten().flatten()
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    return maxsim(query_tokens, values.reshape(len(documents), -1, query_tokens.shape[-1]))


def _margins(
    model: ReMatch,
    query: Any,
    vector: NDArray[np.float32],
    documents: pa.Table,
    view: View,
    load_inputs: Callable[[pa.Table], list[Any]],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Margins of those documents that can be read, and which of the N those are, (N,)."""
    inputs: list[Any]
    if view.document == "feat":
        flat = documents["vector"].combine_chunks().flatten().to_numpy().copy()
        inputs = list(flat.reshape(len(documents), -1))
    else:
        inputs = load_inputs(documents)
    query = vector if view.query == "feat" else query
    readable = np.ones(len(inputs), bool)
    try:
        return model.score(query, inputs, view), readable
    except ImageError:
        if view.document == "feat":
            raise
    readable = np.array([_is_readable(value) for value in inputs])
    inputs = [value for value, is_readable in zip(inputs, readable, strict=True) if is_readable]
    margins = model.score(query, inputs, view) if inputs else np.zeros(0, np.float32)
    return margins, readable


def _is_readable(document: dict[str, Any]) -> bool:
    """Whether a document has no picture or one that can be decoded."""
    try:
        pictures = document.get("image", [])
        for picture in pictures if isinstance(pictures, list) else [pictures]:
            load_image(picture)
    except ImageError:
        return False
    return True
