"""d- of the matching questions, chosen by the model in training: an experiment of ablation.py."""

from typing import Any

import numpy as np

from rematch.train.batch import Batch
from rematch.train.collator import Collator, Row


class NearestNegatives(Collator):
    """Asks about the wrong document of the batch that is nearest to the query.

    The paper asks about the given hard negative, which is among the candidates here. InfoNCE sees
    the same documents as always. The model in training embeds each batch once more for this, one
    step ahead of its own, as the trainer fetches batches. All in one process: no data workers.
    """

    def __call__(self, rows: list[Row]) -> dict[str, Batch]:
        training = self.model.training
        queries, documents = (
            encode([row[column] for column in columns for row in rows], show_progress_bar=False)
            for encode, columns in (
                (self.model.encode_query, ["query"]),
                (self.model.encode_document, ["positive", "negative"]),
            )
        )
        self.model.train(training)
        self._nearest_first = np.argsort(-(queries @ documents.T), axis=1)  # (B, 2B)
        return super().__call__(rows)

    def hard_negative(self, samples: list[list[int]], i: int) -> int:
        keys = [sample[column] for column in (1, 2) for sample in samples]
        candidates: Any = (keys[number] for number in self._nearest_first[i])
        negative: int = next(key for key in candidates if key != samples[i][1])
        return negative
