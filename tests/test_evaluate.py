"""Evaluation against independent computations: metrics, rankings, reranking, means, warnings."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch

from rematch.data.mmeb_export import export_picto
from rematch.data.picto_tasks import TASKS, evaluation_tasks
from rematch.data.schema import Item, RetrievalTask
from rematch.encoding.encoder import Encoder
from rematch.errors import DataError
from rematch.evaluate import metrics
from rematch.evaluate.benchmarks import load_benchmark
from rematch.evaluate.command import EvaluateOptions, run
from rematch.evaluate.metrics import ranks_of_relevant
from rematch.evaluate.rerank import Reranking
from rematch.evaluate.run import evaluate, evaluate_task, summarize
from rematch.evaluate.summary import chance, task_means
from rematch.matching import View
from rematch.scoring import maxsim


def test_metrics_equal_those_of_trec():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=30) for _ in range(40)]
    relevant = rng.integers(1, 6, size=40)
    qrels = {str(i): {str(j): 1 for j in range(p)} for i, p in enumerate(relevant)}
    runs = {str(i): {str(j): float(s) for j, s in enumerate(row)} for i, row in enumerate(scores)}
    measures = {"success_1,5,10", "recip_rank", "ndcg_cut_10", "recall_10", "map", "map_cut_5"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(runs)

    def mean(name):
        return 100 * np.mean([row[name] for row in theirs.values()])

    ranks = [ranks_of_relevant(row, p) for row, p in zip(scores, relevant, strict=True)]
    for k in (1, 5, 10):
        assert metrics.hit_at(ranks, k) == pytest.approx(mean(f"success_{k}"))
    assert metrics.mrr_at(ranks) == pytest.approx(mean("recip_rank"))
    assert metrics.ndcg_at(ranks, 10) == pytest.approx(mean("ndcg_cut_10"))
    assert metrics.recall_at(ranks, 10) == pytest.approx(mean("recall_10"))
    assert metrics.map_at(ranks) == pytest.approx(mean("map"))


def test_ties_and_nan_are_misses():
    assert ranks_of_relevant(np.ones(5)).tolist() == [5]
    assert ranks_of_relevant(np.full(5, np.nan)).tolist() == [5]
    assert ranks_of_relevant(np.array([np.nan, -1.0])).tolist() == [2]
    assert ranks_of_relevant(np.array([1.0, np.nan])).tolist() == [2]
    assert ranks_of_relevant(np.array([1.0, 1.0, 1.0]), relevant=2).tolist() == [2, 3]


def hits_from_saved_vectors(path):
    """Hit@1 of one task query by query, from its saved vectors and nothing else; None where
    rounding decides.

    The evaluator's cosines are sums of D float32 products, whose parts add up to 1 at most: each
    is off by less than D * 2**-24, whatever the order.
    """
    saved = np.load(path)
    hits, start = [], 0
    rounding = saved["queries"].shape[1] * 2.0**-24
    for query, size, right in zip(saved["queries"], saved["sizes"], saved["right"], strict=True):
        candidates = saved["candidates"][start : start + size]
        start += size
        best_right = -np.inf
        best_wrong = -np.inf
        for place, document in enumerate(candidates):
            score = np.dot(
                saved["documents"][document].astype(np.float64), query.astype(np.float64)
            )
            if place < right:
                best_right = max(best_right, score)
            else:
                best_wrong = max(best_wrong, score)
        hits.append(
            bool(best_right > best_wrong) if abs(best_right - best_wrong) > 2 * rounding else None
        )
    return hits


def test_hits_on_an_mmeb_export_equal_an_independent_script_query_by_query(saved_model, tmp_path):
    import pyarrow.parquet as pq

    export_picto(tmp_path / "tree", "mmeb-eval", queries=50)
    content = run(
        EvaluateOptions(
            str(saved_model),
            output=tmp_path / "out",
            data=tmp_path / "tree",
            limit=12,
            save_vectors=True,
        )
    )
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert len(content["tasks"]) == 24
    hits_at_1 = [scores["hit@1"] for scores in content["tasks"].values()]
    assert content["scores"]["overall"] == pytest.approx(np.mean(hits_at_1), abs=0.01)
    assert {"ind", "ood", "style"} < set(content["scores"])
    report = (tmp_path / "out/report.html").read_text()
    assert f">style {content['scores']['style']:.1f}</tr>" in report
    assert report.count('<span class="small">OOD</span>') == 8  # four tasks in both sections
    decided = []
    for name, scores in content["tasks"].items():
        hits = hits_from_saved_vectors(tmp_path / f"out/arrays/{name}.npz")
        evaluated = [row["rank"] == 1 for row in rows if row["task"] == name]
        decided += [
            (theirs, ours)
            for theirs, ours in zip(hits, evaluated, strict=True)
            if theirs is not None
        ]
        assert scores["hit@1"] == pytest.approx(100 * np.mean(evaluated), abs=0.01)
    assert all(theirs == ours for theirs, ours in decided)
    assert len(decided) > 0.95 * len(rows)


def test_text_documents_shared_by_tasks_are_encoded_once(make_model):
    tasks = evaluation_tasks(list(TASKS)[:2], queries=50)
    model = make_model(dtype=torch.float32)
    encoder = Encoder(model, workers=0)
    together, _ = evaluate(encoder, tasks)
    distinct = {q.text + str(id(q.image)) for t in tasks for q in t.queries} | {
        d.instruction + d.text for t in tasks for d in t.documents
    }
    assert encoder.encoded == len(distinct)
    for result, task in zip(together, tasks, strict=True):
        alone = evaluate_task(Encoder(model, workers=0), task)
        # in other batches, so not equal to the last bit
        assert np.allclose(result.queries, alone.queries, atol=1e-5)
        assert np.allclose(result.documents, alone.documents, atol=1e-5)


def test_several_answers_and_whole_corpora():
    items = [Item(text=str(i), key=str(i)) for i in range(5)]
    task = RetrievalTask("t", "retrieval", items[:2], items, [], answers=[[3, 1], [0]])
    candidates, relevant = task.pool(0)
    assert candidates[:2].tolist() == [3, 1]
    assert relevant == 2
    assert sorted(candidates.tolist()) == [0, 1, 2, 3, 4]
    assert chance(task) == pytest.approx(100 * (2 / 5 + 1 / 5) / 2)


def task(name, meta_task, ood=False, unseen_style=False):
    return RetrievalTask(name, meta_task, [], [], [], ood=ood, unseen_style=unseen_style)


def test_means_are_mmebs_and_pictos():
    mmeb = [task("A", "vqa"), task("B", "vqa", ood=True), task("C", "grounding")]
    assert task_means(mmeb, [10, 20, 60]) == {
        "overall": 30.0,
        "vqa": 15.0,
        "grounding": 60.0,
        "ood": 20.0,
        "ind": 35.0,
    }
    picto = [task(t.name, t.meta_task, t.ood, unseen_style=True) for t in mmeb]
    assert task_means([*mmeb, *picto], [10, 20, 60, 1, 2, 6]) == {
        "overall": 16.5,
        "vqa": 15.0,
        "grounding": 60.0,
        "ood": 20.0,
        "ind": 35.0,
        "style": 3.0,
    }
    assert task_means(picto, [1, 2, 6]) == {"overall": 3.0, "style": 3.0}
    assert task_means([mmeb[1], picto[1]], [20, 2]) == {
        "overall": 11.0,
        "vqa": 20.0,
        "style": 2.0,
    }, "without tasks in distribution there is nothing to tell apart"


def test_pictos_splits_are_benchmarks_with_mmebs_means(monkeypatch):
    names = ("Picto-Background", "Picto-Count", "Picto-T2I")
    monkeypatch.setattr("rematch.data.picto_tasks.TASKS", {name: TASKS[name] for name in names})
    test, validation = (load_benchmark(n, limit=2) for n in ("picto", "picto-validation"))
    assert (test.name, validation.name) == ("picto", "picto-validation")
    for a, b in zip(test.tasks, validation.tasks, strict=True):
        assert (a.name, len(a.queries)) == (b.name, 2)
        images = [[q.image and q.image.tobytes() for q in t.queries] for t in (a, b)]
        assert a.queries != b.queries
        assert images[0] != images[1] or not any(images[0])
    hits = [100.0 * (t.ood and not t.unseen_style) for t in test.tasks]
    assert len(hits) == 6
    means = task_means(test.tasks, hits)
    assert (means["overall"], means["ind"], means["ood"], means["style"]) == (16.67, 0, 100, 0)
    with pytest.raises(DataError, match=r"only Picto's test split is exported. Leave out --data"):
        load_benchmark("picto-validation", Path("picto-eval"))


def test_hits_are_those_of_each_query_in_order(make_model, monkeypatch):
    """Queries and documents get vectors that make exactly the first and third query right."""
    documents = [Item(text=str(i), key=str(i)) for i in range(3)]
    queries = [Item(text=str(i)) for i in range(3)]
    task = RetrievalTask("t", "vqa", queries, documents, [[0, 1, 2], [1, 2, 0], [2, 0, 1]])
    encoder = Encoder(make_model(dtype=torch.float32), workers=0)
    vectors = {
        "query": np.eye(3, dtype=np.float32)[[0, 0, 2]],
        "document": np.eye(3, dtype=np.float32),
    }
    monkeypatch.setattr(encoder, "encode", lambda _, side, **__: vectors[side])
    result = evaluate_task(encoder, task)
    assert result.hits.tolist() == [True, False, True]
    assert 100 * result.hits.mean() == pytest.approx(result.scores["hit@1"])


def test_maxsim_is_the_mean_of_best_cosines():
    rng = np.random.default_rng(0)
    query, documents = rng.normal(size=(3, 8)), rng.normal(size=(5, 4, 8))
    slow = [
        np.mean([max(float(q @ t) for t in document) for q in query]) for document in documents
    ]
    assert np.allclose(maxsim(query, documents), slow)


def test_reranking_orders_the_first_candidates_by_p_yes_of_single_pairs(make_model):
    model = make_model(dtype=torch.float32)
    [task] = evaluation_tasks(["Picto-T2I"], queries=50)
    task.queries, task.candidates = task.queries[:6], task.candidates[:6]
    views = (View.RAW_RAW, View.FEAT_FEAT)
    encoder = Encoder(model, workers=0)
    result = evaluate_task(encoder, task, reranking=Reranking(9, views), multi_vector=True)
    assert list(result.methods) == [
        "embedding",
        "MaxSim",
        "rerank 9, raw-raw",
        "rerank 9, feat-feat",
    ]
    query_inputs = [query.as_input() for query in task.queries]
    document_inputs = [document.as_input() for document in task.documents]
    for view in views:
        # the lowest and highest ranks if rounding swaps two documents: single pairs and packed
        # ones differ by it
        lowest, highest = [], []
        for i, candidates in enumerate(task.candidates):
            first, answer = result.best[i].documents[:9].tolist(), candidates[0]
            if answer not in first:
                lowest.append(result.ranks[i][0])
                highest.append(result.ranks[i][0])
                continue
            p_yes = []
            for j in first:  # one pair at a time
                if view is View.RAW_RAW:
                    pair = query_inputs[i], document_inputs[j]
                else:
                    pair = result.queries[i], result.documents[j]
                p_yes.append(float(model.match([pair[0]], [pair[1]], view)[0]))
            p_yes_of_answer = p_yes.pop(first.index(answer))
            lowest.append(1 + sum(p > p_yes_of_answer + 1e-5 for p in p_yes))
            highest.append(1 + sum(p > p_yes_of_answer - 1e-5 for p in p_yes))
        scores = result.methods[f"rerank 9, {view}"].scores
        assert min(lowest) < 10, "the answer is among the first candidates of some query"
        worst = summarize([np.array([rank]) for rank in highest])
        best = summarize([np.array([rank]) for rank in lowest])
        for name in ("hit@1", "mrr"):
            assert worst[name] - 1e-9 <= scores[name] <= best[name] + 1e-9


@pytest.mark.parametrize("whole_corpus", [True, False])
def test_reranking_equals_a_ranking_of_all_candidates(make_model, monkeypatch, whole_corpus):
    """Margins with ties, several answers with grades; the slow version orders all candidates."""
    rng = np.random.default_rng(0)
    documents = [Item(text=str(i), key=str(i)) for i in range(30)]
    queries = [Item(text=str(i)) for i in range(8)]
    answers = [rng.choice(30, size=4, replace=False).tolist() for _ in queries]
    candidates = [] if whole_corpus else [rng.permutation(30)[:20] for _ in queries]
    task = RetrievalTask(
        "t", "vqa", queries, documents, candidates, answers=answers, grades=[[1, 2, 3, 4]] * 8
    )
    vectors = {
        side: rng.normal(size=(count, 1 + 2, 4)).astype(np.float32)
        for side, count in (("query", 8), ("document", 30))
    }
    vectors = {side: v / np.linalg.norm(v, axis=-1, keepdims=True) for side, v in vectors.items()}
    margins = rng.integers(-2, 3, size=(8, 30)).astype(np.float32)
    model = make_model(dtype=torch.float32)
    encoder = Encoder(model, workers=0)

    def score_lists(queries, document_lists, view):
        return [
            margins[int(query["text"]), [int(document["text"]) for document in list_]]
            for query, list_ in zip(queries, document_lists, strict=True)
        ]

    monkeypatch.setattr(encoder, "encode", lambda _, side, **__: vectors[side])
    monkeypatch.setattr(model, "score_lists", score_lists)
    result = evaluate_task(encoder, task, reranking=Reranking(9), multi_vector=True)
    slow = {name: ([], []) for name in result.methods}
    for i in range(8):
        pool, relevant = task.pool(i)
        cosines = vectors["document"][pool, 0] @ vectors["query"][i, 0]
        order = metrics.rank_candidates(cosines, relevant)
        reranked = np.empty(len(pool))
        reranked[order] = -10.0 - np.arange(len(pool))
        reranked[order[:9]] = margins[i, pool[order[:9]]]
        by_maxsim = maxsim(vectors["query"][i, 1:], vectors["document"][pool, 1:])
        for name, scores in zip(slow, (cosines, by_maxsim, reranked), strict=True):
            order = metrics.rank_candidates(scores, relevant)
            slow[name][0].append(metrics.ranks_in(order, relevant))
            slow[name][1].append(task.relevance(i)[order[slow[name][0][-1] - 1]])
    for name, (ranks, grades) in slow.items():
        assert result.methods[name].scores == summarize(ranks, grades)


def test_memory_does_not_grow_with_queries_times_documents(make_model, monkeypatch):
    documents = [Item(text=str(i), key=str(i)) for i in range(4000)]
    queries = [Item(text=str(i)) for i in range(100)]
    answers = [[i] for i in range(100)]
    task = RetrievalTask("t", "retrieval", queries, documents, [], answers=answers)
    rng = np.random.default_rng(0)
    vectors = {
        side: rng.normal(size=(count, 4)).astype(np.float32)
        for side, count in (("query", 100), ("document", 4000))
    }
    model = make_model(dtype=torch.float32)
    encoder = Encoder(model, workers=0)
    monkeypatch.setattr(encoder, "encode", lambda _, side, **__: vectors[side])
    monkeypatch.setattr(
        model, "score_lists", lambda _, lists, __: [np.zeros(len(list_)) for list_ in lists]
    )
    tracemalloc.start()
    try:
        result = evaluate_task(encoder, task, reranking=Reranking(9))
        chance(task)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(result.methods) == 2
    assert peak < 100 * 4000 * 8  # bytes of one index for each query and document


def test_equal_vectors_nan_and_chance_are_flagged(make_model, monkeypatch):
    model = make_model(dtype=torch.float32)
    [task] = evaluation_tasks(["Picto-Count"], queries=50)
    encoder = Encoder(model, workers=0)
    monkeypatch.setattr(
        encoder, "encode", lambda inputs, *_, **__: np.ones((len(inputs), 4), np.float32)
    )
    warnings = " ".join(evaluate_task(encoder, task).warnings)
    assert "all vectors of documents are equal" in warnings
    assert "no better than chance (1.0)" in warnings
    monkeypatch.setattr(
        encoder, "encode", lambda inputs, *_, **__: np.full((len(inputs), 4), np.nan, np.float32)
    )
    result = evaluate_task(encoder, task)
    assert "contain NaN" in " ".join(result.warnings)
    assert result.scores["hit@10"] == 0


@pytest.mark.filterwarnings(
    "ignore:The fill_missing parameter is deprecated:DeprecationWarning",
    "ignore:The `get_sentence_embedding_dimension` method:FutureWarning",
)
def test_mteb_runs_a_model_through_its_own_wrapper(model):
    """The scores are those of our evaluator on the same data; in float64, so that rounding decides
    no rank.
    """
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    texts = [f"number {i} is {'even' if i % 2 == 0 else 'odd'}" for i in range(30)]
    questions = [f"which is number {i}?" for i in range(12)]

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalNumbers",
            description="Numbers.",
            reference=None,
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *args, **kwargs):
            corpus = Dataset.from_list([{"id": str(i), "text": t} for i, t in enumerate(texts)])
            queries = Dataset.from_list(
                [{"id": str(i), "text": t} for i, t in enumerate(questions)]
            )
            relevant = {str(i): {str(i): 1} for i in range(len(questions))}
            split = {
                "corpus": corpus,
                "queries": queries,
                "relevant_docs": relevant,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    outcome = mteb.evaluate(model, Local(), cache=None, show_progress_bar=False)
    theirs = outcome.task_results[0].scores["test"][0]
    documents = [Item(text=t, key=t) for t in texts]
    queries = [Item(text=t) for t in questions]
    answers = [[i] for i in range(12)]
    task = RetrievalTask("n", "numbers", queries, documents, [], answers=answers)
    ours = evaluate_task(Encoder(model, workers=0), task).scores
    assert ours["ndcg@10"] == pytest.approx(100 * theirs["ndcg_at_10"], abs=0.01)
    assert ours["hit@1"] == pytest.approx(100 * theirs["recall_at_1"], abs=0.01)
