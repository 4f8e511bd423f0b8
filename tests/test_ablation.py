"""benchmarks/nearest_negatives.py: documents to ask about, as the model in training ranks them."""

import sys
from pathlib import Path

import numpy as np
import pytest

from rematch.train.collator import Collator


@pytest.fixture
def collator(monkeypatch, model):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from nearest_negatives import NearestNegatives

    yield NearestNegatives(model)
    del sys.modules["nearest_negatives"]


def test_questions_show_the_nearest_wrong_document_of_the_batch(collator, model, triplets):
    rows = [*triplets, {**triplets[0], "positive": triplets[1]["positive"]}]
    model.train()
    batch = collator(rows)["batch"]
    assert model.training  # embedding has switched it over and back
    samples = collator.read_samples(rows)[0]
    documents = {
        key: model.encode_document(row[column])
        for row, keys in zip(rows, samples, strict=True)
        for column, key in zip(("positive", "negative"), keys[1:], strict=True)
    }
    chosen = []
    for i, row in enumerate(rows):
        query = model.encode_query(row["query"])
        scores = {k: float(query @ vector) for k, vector in documents.items()}
        del scores[samples[i][1]]
        negative = collator.hard_negative(samples, i)
        assert scores[negative] == pytest.approx(max(scores.values()), abs=1e-5)
        chosen.append(negative)
    hard_negatives = [keys[2] for keys in samples]
    assert np.mean(np.array(chosen) == hard_negatives) < 1
    plain = Collator(model)(rows)["batch"]
    assert batch.inputs.equal(plain.inputs)  # InfoNCE sees the same documents
    assert batch.tokens != plain.tokens  # other questions
