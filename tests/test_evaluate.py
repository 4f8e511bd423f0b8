"""The evaluator against an independent computation, and its summary."""

import numpy as np
import pytest
import torch

from rematch.data.picto_tasks import evaluation_tasks
from rematch.evaluate.metrics import answer_ranks, hit_at
from rematch.evaluate.run import evaluate, evaluate_task, summary


def test_hits_equal_an_independent_script(make_model):
    model = make_model(dtype=torch.float32)
    for task in evaluation_tasks(queries=50)[6:8]:
        result = evaluate_task(model, task)
        queries = model.encode_query([q.as_input() for q in task.queries], batch_size=7)
        documents = model.encode_document([d.as_input() for d in task.documents], batch_size=7)
        for i, candidates in enumerate(task.candidates):
            scores = [float(np.dot(queries[i], documents[j])) for j in candidates]
            gap = min(abs(s - scores[0]) for s in scores[1:])
            if gap > 1e-6:
                assert result.ranks[i] == 1 + sum(s >= scores[0] for s in scores[1:])
        assert result.scores["hit@1"] == pytest.approx(100 * np.mean(result.ranks == 1))


def test_text_documents_shared_by_tasks_are_encoded_once(make_model, monkeypatch):
    model = make_model(dtype=torch.float32)
    tasks = evaluation_tasks(queries=50)[:2]
    apart = [evaluate_task(model, task).ranks for task in tasks]
    encoded = []
    encode = model.encode_document
    monkeypatch.setattr(
        model, "encode_document", lambda inputs, **kw: encoded.append(len(inputs)) or encode(inputs, **kw)
    )
    together = [result.ranks for result in evaluate(model, tasks)]
    assert all(np.array_equal(a, b) for a, b in zip(apart, together, strict=True))
    assert encoded == [len(tasks[0].documents), 0]


def test_nan_and_ties_are_misses():
    assert hit_at(answer_ranks(np.full((3, 5), np.nan)), 1) == 0
    assert hit_at(answer_ranks(np.ones((3, 5))), 1) == 0


def test_summary_means_tasks_as_mmeb_does(make_model):
    tasks = [t for ood in (False, True) for t in evaluation_tasks(ood=ood, queries=50)[:4:3]]
    done = []
    means = summary(results := evaluate(make_model(dtype=torch.float32), tasks, progress=done.append))
    assert done == [t.name for t in tasks]
    hits = [r.scores["hit@1"] for r in results]
    assert means["overall"] == pytest.approx(np.mean(hits[:2]), abs=0.01)
    assert means["ood_overall"] == pytest.approx(np.mean(hits[2:]), abs=0.01)
    assert means["classification"] == pytest.approx(hits[0], abs=0.01)
