"""Exact search: a folder of pictures or a data file as corpus, cosine over all of it, reranking by matching."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rematch.data.images import EXTENSIONS
from rematch.data.pairs import item, rows
from rematch.data.schema import Item
from rematch.errors import DataError
from rematch.model import ReMatch
from rematch.prompts import DOCUMENT_INSTRUCTIONS


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        index: Place in the corpus.
        name: Path or text to show.
        score: Cosine; P(yes) of the matching head if reranked.
        reranked: Which of the two.
    """

    index: int
    name: str
    score: float
    reranked: bool = False


def read_corpus(source: Path | str) -> list[Item]:
    """Documents of a corpus.

    Args:
        source: A folder (every picture in it, at any depth, in the order of the names), or a .jsonl/.parquet file whose
            rows hold ``document``, or ``text`` and/or ``image``.

    Raises:
        DataError: If there is nothing there, or a row cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("._"))
        if not found:
            raise DataError(f"{source}: holds no pictures ({', '.join(EXTENSIONS)}).")
        instruction = DOCUMENT_INSTRUCTIONS["image"]
        return [Item(image=path, instruction=instruction, key=str(path.relative_to(source))) for path in found]
    documents = []
    for row, record in rows(source):
        value = record.get("document", record) if isinstance(record, dict) else record
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k in ("text", "image")}
        document = item(value, source, row, "document")
        documents.append(replace(document, key=str(document.image or document.text)))
    if not documents:
        raise DataError(f"{source}: holds no documents.")
    return documents


class Searcher:
    """A corpus in memory.

    Args:
        model: Encodes and, if asked, reranks.
        corpus: The documents.
        show_progress: A progress bar while the corpus is encoded.
    """

    def __init__(self, model: ReMatch, corpus: Sequence[Item], *, show_progress: bool = False) -> None:
        self.model = model
        self.corpus = list(corpus)
        self.inputs = [document.as_input(model.backbone.document_instructions) for document in self.corpus]
        self.vectors: NDArray[np.float32] = model.encode_document(self.inputs, show_progress_bar=show_progress)

    def search(self, query: dict[str, Any], top: int = 5, rerank: int = 0) -> list[Hit]:
        """The best documents for a query.

        Args:
            query: ``{"text": …, "image": …}``, either or both.
            top: How many.
            rerank: Put the best so many in the order of P(yes), raw query against raw document.
        """
        scores = self.vectors @ self.model.encode_query([query], show_progress_bar=False)[0]
        order = np.argsort(-scores, kind="stable")[: max(top, rerank)]
        if rerank:
            best = order[:rerank]
            judged = self.model.match([query] * len(best), [self.inputs[i] for i in best])
            ranking = np.argsort(-judged, kind="stable")
            hits = [self._hit(best[j], judged[j], True) for j in ranking]
            hits += [self._hit(i, scores[i], False) for i in order[rerank:]]
        else:
            hits = [self._hit(i, scores[i], False) for i in order]
        return hits[:top]

    def _hit(self, index: np.integer, score: np.floating, reranked: bool) -> Hit:
        return Hit(int(index), self.corpus[int(index)].key, float(score), reranked)
