"""The form in which every data set is loaded: items, training triplets, evaluation tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rematch.data.clips import Frame
from rematch.data.images import PictureSource

Modality = Literal["", "image", "video", "visdoc"]
Metric = Literal["hit@1", "ndcg@5"]


@dataclass(frozen=True)
class Item:
    """A query or a document: text, a picture, or both, and the instruction before the text.

    Attributes:
        text: The text; may be empty if there is a picture.
        image: A picture (decoded, or where its file is), or several, such as a video's frames.
        instruction: Task instruction, kept apart from the text so that it can be left out.
        key: Key of a document within its task; items with the same key are the same document.
    """

    text: str = ""
    image: PictureSource | list[Path] | list[Image.Image] | list[Frame] | None = None
    instruction: str = ""
    key: str = ""

    def as_input(self, instruction: bool = True) -> dict[str, object]:
        """Return the ``{"text", "image"}`` dictionary that a model encodes.

        Args:
            instruction: Whether the instruction is put before the text.

        >>> Item("a dog", instruction="Represent the image caption: ").as_input()
        {'text': 'Represent the image caption: a dog'}
        """
        text = (self.instruction if instruction else "") + self.text
        parts: dict[str, object] = {"text": text} if text else {}
        if self.image is not None:
            parts["image"] = self.image
        return parts


@dataclass(frozen=True)
class Triplet:
    """A training sample: a query, its positive and, optionally, a hard negative."""

    query: Item
    positive: Item
    negative: Item | None = None


@dataclass
class RetrievalTask:
    """An evaluation task.

    Attributes:
        name: Name in the benchmark's tables.
        meta_task: The group whose mean the task counts in; for MMEB ``"classification"``,
            ``"vqa"``, ``"retrieval"`` or ``"grounding"``.
        queries: The queries.
        documents: Every distinct document of the task.
        candidates: For each query, the indices of its candidate documents; the **first is the
            positive**. Empty if every document is a candidate of every query.
        ood: Whether the task is out of distribution, that is, not trained.
        answers: For each query, the indices of its positives, if there may be several.
        unseen_style: Whether queries are drawn in a style that no training picture has (Picto).
        grades: For each query, how relevant each of its positives is (above 0), in the order of
            ``answers``; by default all are equally relevant.
        metric: The metric that means are taken of.
        modality: What the task is about, in MMEB-V2: images, videos or visual documents; empty in
            other benchmarks.
        notes: What to know of the data before its scores are trusted, such as queries left out.
        chooses_instructions: Whether the queries came without an instruction, so that
            :mod:`rematch.data.instructions` chooses it.
    """

    name: str
    meta_task: str
    queries: list[Item]
    documents: list[Item]
    candidates: list[Sequence[int] | NDArray[np.int32]]
    ood: bool = False
    answers: list[Sequence[int]] | None = None
    unseen_style: bool = False
    grades: list[Sequence[float]] | None = None
    metric: Metric = "hit@1"
    modality: Modality = ""
    notes: list[str] = field(default_factory=list)
    chooses_instructions: bool = False

    def relevance(self, query: int) -> NDArray[np.float64]:
        """Return the grades of a query's positives, in the order of :meth:`pool`.

        Args:
            query: Index of the query.
        """
        if self.grades is None:
            return np.ones(1 if self.answers is None else len(self.answers[query]))
        return np.asarray(self.grades[query], np.float64)

    def pool(self, query: int) -> tuple[NDArray[np.int64], int]:
        """Return the candidates of a query.

        Args:
            query: Index of the query.

        Returns:
            The indices of the candidate documents, positives first; and the number of positives.
        """
        if self.answers is None:
            return np.asarray(self.candidates[query], np.int64), 1
        positives = np.asarray(self.answers[query], np.int64)
        if self.candidates:
            pool = np.asarray(self.candidates[query], np.int64)
        else:
            pool = np.arange(len(self.documents))
        return np.concatenate([positives, pool[~np.isin(pool, positives)]]), len(positives)
