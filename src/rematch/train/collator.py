"""From rows of triplets to the tensors of one training step: embedding inputs per column, and packed matching."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from rematch.matching import VIEWS
from rematch.model import ReMatch

TASKS = {"query": "query", "positive": "document", "negative": "document"}


class Collator(SentenceTransformerDataCollator):  # type: ignore[misc]  # sentence-transformers ships no types
    """sentence-transformers' collator, plus the eight matching questions of every sample.

    Each sample is laid out once: its query, and d+ and d- in two document slots, which of them first is drawn at
    random. Where there is no hard negative, the positive of another sample serves as d-.

    Args:
        model: The model in training (its tokenizer and template).
        views: View pairs to ask about; none leaves matching out.
        seed: Of the random slots.
    """

    def __init__(self, model: ReMatch, views: Sequence[str] = VIEWS, seed: int = 0) -> None:
        super().__init__(preprocess_fn=model.preprocess, router_mapping=TASKS)
        self.model = model
        self.views = tuple(views)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(features)
        if self.views:
            batch |= {f"matching_{name}": value for name, value in self.matching(features).items()}
        return batch

    def matching(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Packed matching questions of a batch.

        Returns:
            The fields of :class:`~rematch.matching.Packed`, the picture inputs, ``order`` (B, 2): the document (0: d+,
            1: d-) in each slot, and ``negative_row`` (B,): the row whose positive is d- if there are no hard negatives.
        """
        order = torch.rand(len(rows), 2, generator=self.generator).argsort(1)
        negative_row = [next_other(rows, i) for i in range(len(rows))]
        sequences = []
        for i, row in enumerate(rows):
            pair = [row["positive"], row["negative"] if "negative" in row else rows[negative_row[i]]["positive"]]
            sequences.append(([row["query"]], [pair[j] for j in order[i]]))
        views = [view.split("-") for view in self.views]
        questions = [(query, slot, document) for query, document in views for slot in (0, 1)]
        packed, vision = self.model.pack_matching(sequences, [questions] * len(rows))
        fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
        return fields | vision | {"order": order, "negative_row": torch.tensor(negative_row)}


def next_other(rows: list[dict[str, Any]], i: int) -> int:
    """The next row, cyclically, whose positive differs from row i's; row i + 1 if none does.

    >>> next_other([{"positive": "a"}, {"positive": "a"}, {"positive": "b"}], 0)
    2
    """
    n = len(rows)
    following = [(i + step) % n for step in range(1, n)] or [i]
    return next((j for j in following if rows[j]["positive"] != rows[i]["positive"]), following[0])
