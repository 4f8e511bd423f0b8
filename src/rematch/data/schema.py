"""The one form in which every reader hands out data: items, triplets for training, tasks for
evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rematch.data.images import Picture


@dataclass(frozen=True)
class Item:
    """A query or a document: text, a picture, or both, and the instruction that goes before the
    text.

    Attributes:
        text: May be empty if there is a picture.
        image: A picture (decoded, its path, its place in a zip archive), or several paths.
        instruction: Kept apart from the text so that it can be left off (target instructions are
            an ablation).
        key: Identity of a document within its task; two items with one key are one document.
    """

    text: str = ""
    image: Picture | list[Path] | None = None
    instruction: str = ""
    key: str = ""

    def as_input(self, instruction: bool = True) -> dict[str, object]:
        """The ``{"text", "image"}`` dictionary that a model encodes.

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
    """One training sample: a query, its document, and a hard negative if there is one."""

    query: Item
    positive: Item
    negative: Item | None = None


@dataclass
class RetrievalTask:
    """One evaluation task.

    Attributes:
        name: As in the benchmark's tables.
        meta_task: What mean it counts in; for MMEB ``"classification"``, ``"vqa"``,
            ``"retrieval"`` or ``"grounding"``.
        queries: The queries.
        documents: Every distinct document of the task.
        candidates: For each query the indices of its candidate documents; the **first is the
            answer**. Empty if every document is a candidate of every query.
        ood: Whether the task is out of distribution.
        answers: For each query the indices of all its right documents, where there may be several.
    """

    name: str
    meta_task: str
    queries: list[Item]
    documents: list[Item]
    candidates: list[Sequence[int] | NDArray[np.int32]]
    ood: bool = False
    answers: list[Sequence[int]] | None = None

    def pool(self, query: int) -> tuple[NDArray[np.int64], int]:
        """(a query's candidates, the right ones first; how many are right)."""
        if self.answers is None:
            return np.asarray(self.candidates[query], np.int64), 1
        right = np.asarray(self.answers[query], np.int64)
        every = (
            np.asarray(self.candidates[query], np.int64)
            if self.candidates
            else np.arange(len(self.documents))
        )
        return np.concatenate([right, every[~np.isin(every, right)]]), len(right)
