"""The first stage of a search: the documents nearest to a vector, those that match words, or both.

The words of a document are its text and those of its metadata that are text, such as a title. They
are stored in the column ``_words``, over which LanceDB builds a full-text index (BM25). Both
rankings are fused by reciprocal ranks (RRF).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from lancedb.index import FTS
from lancedb.query import MatchQuery
from lancedb.rerankers import RRFReranker
from numpy.typing import NDArray

from rematch.data.document import Metadata
from rematch.errors import DataError
from rematch.search.columns import WORDS
from rematch.search.condition import Condition, RawSQL, to_sql
from rematch.search.storage import reading

Mode = Literal["auto", "vector", "text", "hybrid"]
MODES = ("auto", "vector", "text", "hybrid")
_FUSED = 100  # documents of each ranking at least, so that ranks further down count too
# Of an approximate index, so many times the documents that are to be returned are scored again
# with their whole vectors, and so many at least.
_RESCORED_FACTOR, _LEAST_RESCORED = 10, 100
# Chosen with rematch-tiny on Tux Paint's stamps and on Picto's scenes with their objects as text,
# see docs/log.md: the first ranks count most, and documents with a few of the words do not count.
_RRF_CONSTANT = 5
_WORST_MATCH = 0.5  # of the best match's BM25
_LONGEST_QUERY = 10_000  # characters


class Candidates(NamedTuple):
    """The N documents of the first stage.

    Attributes:
        rows: Their rows, best first, with ``_rowid``.
        scores: Their scores, (N,).
        by: What the scores are: ``cosine``, ``bm25``, or ``rrf`` of both rankings.
        vector_ranks: The rank of each by cosine, from 1; 0 if it is not among the nearest.
        text_ranks: The rank of each by BM25, from 1; 0 if it is not among the best matches.
    """

    rows: pa.Table
    scores: NDArray[np.float64]
    by: str
    vector_ranks: list[int]
    text_ranks: list[int]


@dataclass(frozen=True)
class Retrieval:
    """What is to be retrieved, whatever it is ordered by.

    Attributes:
        table: The LanceDB table, at one version.
        uri: The index's directory or URI, for messages.
        count: Number of documents.
        columns: Columns of the rows.
        condition: A condition that the documents meet.
        exact: Whether to scan all vectors even if there is an approximate index.
        probes: Number of cells of an approximate index to search.
    """

    table: Any
    uri: str
    count: int
    columns: Sequence[str]
    condition: Condition | RawSQL | None = None
    exact: bool = False
    probes: int = 40

    def by_vector(self, vector: NDArray[np.float32]) -> Candidates:
        """The documents nearest to a vector, which has the index's dimensions."""
        rows = self._nearest(vector, self.count)
        scores = 1 - np.asarray(rows["_distance"], np.float64)
        return Candidates(rows, scores, "cosine", _ranks(rows), [0] * len(rows))

    def by_text(self, text: str) -> Candidates:
        """The documents that best match the words of a text."""
        rows = self._matches(text, self.count)
        scores = np.asarray(rows["_score"], np.float64)
        return Candidates(rows, scores, "bm25", [0] * len(rows), _ranks(rows))

    def by_both(self, vector: NDArray[np.float32], text: str) -> Candidates:
        """The documents of both rankings, by the sum of their reciprocal ranks.

        Of documents with the same sum, those that match the words better come first.
        """
        count = max(self.count, _FUSED)
        nearest, matches = self._nearest(vector, count), self._matches(text, count)
        bm25 = np.asarray(matches["_score"], np.float64)
        matches = matches.filter(pa.array(bm25 >= _WORST_MATCH * bm25.max(initial=0)))
        reranker = RRFReranker(K=_RRF_CONSTANT, return_score="all")
        rows = reranker.rerank_hybrid(text, nearest, matches)
        row_ids = rows["_rowid"].to_pylist()
        vector_ranks, text_ranks = (
            np.array([ranks.get(row_id, 0) for row_id in row_ids], np.int64)
            for ranks in (
                dict(zip(ranking["_rowid"].to_pylist(), _ranks(ranking), strict=True))
                for ranking in (nearest, matches)
            )
        )
        scores = np.asarray(rows["_relevance_score"], np.float32)  # equal sums are equal
        order = np.lexsort((np.where(text_ranks, text_ranks, len(rows) + 1), -scores))
        order = order[: self.count]
        return Candidates(
            rows.take(pa.array(order)),
            scores[order].astype(np.float64),
            "rrf",
            vector_ranks[order].tolist(),
            text_ranks[order].tolist(),
        )

    def _nearest(self, vector: NDArray[np.float32], count: int) -> pa.Table:
        request = self.table.search(vector, vector_column_name="vector").distance_type("cosine")
        if self.exact:
            request = request.bypass_vector_index()
        else:
            factor = max(_RESCORED_FACTOR, math.ceil(_LEAST_RESCORED / max(1, count)))
            request = request.nprobes(self.probes).refine_factor(factor)
        return self._read(request, count, "_distance")

    def _matches(self, text: str, count: int) -> pa.Table:
        words = MatchQuery(text[:_LONGEST_QUERY], WORDS)
        return self._read(self.table.search(words, query_type="fts"), count, "_score")

    def _read(self, request: Any, count: int, score: str) -> pa.Table:
        request = request.limit(count).select([*self.columns, score]).with_row_id(True)
        with reading(self.uri):
            if isinstance(self.condition, RawSQL):
                try:
                    return request.where(self.condition.sql, prefilter=True).to_arrow()
                except Exception as error:
                    if "Not found:" in str(error):
                        raise
                    raise DataError(
                        f"RawSQL({self.condition.sql[:200]!r}): "
                        f"{str(error).splitlines()[0][:200]}. Write a condition in SQL that "
                        "LanceDB accepts."
                    ) from error
            if self.condition is not None:
                request = request.where(to_sql(self.condition), prefilter=True)
            return request.to_arrow()


def _ranks(rows: pa.Table) -> list[int]:
    return list(range(1, len(rows) + 1))


def words_of(text: str, metadata: Metadata) -> str:
    """The words of a document.

    >>> words_of("a red fox", {"title": "Animals", "year": 1999.0})
    'a red fox Animals'
    """
    return " ".join(part for part in (text, *metadata.values()) if part and isinstance(part, str))


def add_words_column(table: Any, metadata_columns: Sequence[str]) -> None:
    """Add the words to a table of an earlier version of rematch, which lacks them."""
    if WORDS not in table.schema.names:
        names = [n for n in metadata_columns if table.schema.field(n).type == pa.string()]
        quoted = ", ".join(f"`{name}`" for name in ("text", *names))
        table.add_columns({WORDS: f"concat_ws(' ', {quoted})"})


def build_full_text_index(table: Any) -> None:
    """Build the full-text index if documents have words and there is none yet."""
    if not has_full_text_index(table) and table.count_rows(f"{WORDS} != ''"):
        table.create_index(WORDS, config=FTS())


def has_full_text_index(table: Any) -> bool:
    """Whether words can be searched for."""
    return any(index.columns == [WORDS] for index in table.list_indices())
