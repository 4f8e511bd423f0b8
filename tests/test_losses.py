"""The losses against their formulas written out plainly, and each part switched off."""

import math

import pytest
import torch
from shared_gradients import assert_equal
from shared_questions import packed_and_separate

from rematch.losses import info_nce, matching_loss, orthogonality, rematch_loss
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss


def random_vectors(count, width=4):
    return torch.randn(count, width, dtype=torch.float64)


def test_orthogonality_is_its_formula():
    e = torch.randn(3, 5, 7, dtype=torch.float64)
    total = 0.0
    for vectors in e:
        unit = [v / v.norm() for v in vectors]
        pairs = sum((unit[i] @ unit[j]) ** 2 for i in range(5) for j in range(i + 1, 5))
        total += 2 / (5 * 4) * pairs
    assert orthogonality(e).item() == pytest.approx((total / 3).item(), abs=1e-14)
    assert orthogonality(e[:, :1]).item() == 0.0


def test_info_nce_is_its_formula():
    queries, documents = random_vectors(3), random_vectors(6)

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    losses = []
    for i, query in enumerate(queries):
        terms = [math.exp(cosine(query, document) / 0.02) for document in documents]
        losses.append(-math.log(terms[i] / sum(terms)))
    assert info_nce(queries, documents, 0.02).item() == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_each_query_can_have_its_own_temperature():
    queries, documents = random_vectors(3), random_vectors(6)
    temperatures = torch.tensor([[0.02], [0.1], [0.5]], dtype=torch.float64)
    losses = []
    for i, tau in enumerate(temperatures.flatten().tolist()):
        order = [i, *(j for j in range(6) if j != i)]
        losses.append(info_nce(queries[i : i + 1], documents[order], tau).item())
    loss = info_nce(queries, documents, temperatures)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-12)


@pytest.mark.parametrize("each_its_own", [False, True])
def test_info_nce_in_chunks_equals_info_nce_at_once(model, each_its_own):
    """In value and in the gradient of queries, documents and temperature."""
    positives, masked = torch.tensor([2, 0, 4, 1, 5]), torch.rand(5, 9) < 0.3
    results = []
    for max_scores in (1 << 24, 20):
        torch.manual_seed(0)
        queries, documents = random_vectors(5), random_vectors(9)
        temperature = torch.rand((5, 1) if each_its_own else (), dtype=torch.float64) + 0.1
        inputs = [tensor.requires_grad_() for tensor in (queries, documents, temperature)]
        loss = ReMatchLoss(model, hardness=0.5, max_scores=max_scores)._info_nce(
            *inputs, positives, masked
        )
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in inputs)])
    for at_once, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(at_once, in_chunks, rtol=1e-12, atol=1e-12)


def test_matching_loss_is_its_formula():
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    relevant = torch.tensor([[True, False, True, False], [False, True, False, True]])
    log_p = logits.log_softmax(-1)
    terms = [-log_p[b, a, 5 if relevant[b, a] else 3] for b in range(2) for a in range(4)]
    loss = matching_loss(logits, relevant, yes=5, no=3)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_training_computes_rematch_loss(model, triplets, joint):
    """In value and gradient: embedding one input at a time, and eight separate questions.

    Rows alone have other positions than padded ones, and the rotary tables are float32.
    """
    model.backbone.set_matching("unified", joint)
    rows = triplets[:4]
    yes, no = model.backbone.answer_ids

    def plain():
        multi_vectors = {"query": [], "positive": [], "negative": []}
        for column, vectors in multi_vectors.items():
            task = "query" if column == "query" else "document"
            for row in rows:
                features = model.preprocess([row[column]], task=task)
                vectors.append(model(features)["multi_vector"][0])
        stacked = {column: torch.stack(vectors) for column, vectors in multi_vectors.items()}
        documents = torch.cat([stacked["positive"], stacked["negative"]])
        _, separate = packed_and_separate(model, rows)
        relevant = torch.tensor([[True, False] * 4] * 4)
        return rematch_loss(stacked["query"], documents, separate, relevant, yes, no)

    def trained():
        losses = ReMatchLoss(model)([Collator(model)(rows)["batch"]])
        return torch.stack(list(losses.values())).sum()

    results = []
    for version in (plain, trained):
        model.zero_grad()
        total = version()
        total.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append(([total.item()], gradients))
    assert_equal(*results, 1e-6)


def test_the_parts_of_the_loss_equal_plain_ones(model, triplets):
    """L = L_cl + 0.5 L_orth + 0.1 L_qdm, from embeddings and from eight separate matching
    forwards.
    """
    rows = triplets[:4]
    parts = ReMatchLoss(model)([Collator(model)(rows)["batch"]])

    multi_vectors = {column: [] for column in ("query", "positive", "negative")}
    for column, vectors in multi_vectors.items():
        for row in rows:  # one at a time: no padding, no batch
            task = "query" if column == "query" else "document"
            vectors.append(model(model.preprocess([row[column]], task=task))["multi_vector"][0])
    mean = {column: torch.stack(vectors).mean(1) for column, vectors in multi_vectors.items()}
    unit = {
        column: vectors / vectors.norm(dim=1, keepdim=True) for column, vectors in mean.items()
    }
    scores = unit["query"] @ torch.cat([unit["positive"], unit["negative"]]).T / 0.02
    contrastive = -scores.log_softmax(1).diagonal().mean()
    penalties = []
    for vectors in [v for column in multi_vectors.values() for v in column]:
        e = vectors / vectors.norm(dim=1, keepdim=True)
        penalties.append(((e @ e.T) ** 2).triu(1).sum() * 2 / (4 * 3))
    # rows alone have other positions than padded ones, and the rotary tables are float32
    assert parts["contrastive"].item() == pytest.approx(contrastive.item(), rel=1e-7)
    assert parts["orthogonality"].item() == pytest.approx(
        0.5 * torch.stack(penalties).mean().item(), rel=1e-7
    )

    _, separate = packed_and_separate(model, rows)
    yes, no = model.backbone.answer_ids
    log_p = separate.log_softmax(-1)
    answers = [-log_p[b, a, yes if a % 2 == 0 else no] for b in range(4) for a in range(8)]
    assert parts["matching"].item() == pytest.approx(
        0.1 * torch.stack(answers).mean().item(), rel=1e-9
    )


def test_duplicates_are_masked_in_both_directions(model):
    """Backwards a query is no negative of a positive if it is the same query, or has the same
    positive.
    """
    texts = [("a dog", "b one"), ("a cat", "b one"), ("a dog", "b two"), ("a fox", "b three")]
    rows = [{"query": q, "positive": p} for q, p in texts]
    batch = Collator(model, views=[])(rows)["batch"]
    part = ReMatchLoss(model, w_orth=0, w_qdm=0, symmetric=True, mask_duplicates=True)([batch])[
        "contrastive"
    ]
    queries, positives = (
        torch.as_tensor(model.encode([r[c] for r in rows], prompt=None, task=task)).double()
        for c, task in (("query", "query"), ("positive", "document"))
    )
    scores = queries @ positives.T / 0.02
    terms = []
    for i, (query, positive) in enumerate(texts):
        forward = [j for j, (_, p) in enumerate(texts) if j == i or p != positive]
        backward = [
            j for j, (q, p) in enumerate(texts) if j == i or (q != query and p != positive)
        ]
        terms.append(
            scores[i, forward].logsumexp(0)
            - scores[i, i]
            + scores[backward, i].logsumexp(0)
            - scores[i, i]
        )
    assert part.item() == pytest.approx(torch.stack(terms).mean().item() / 2, rel=1e-4)


def test_each_part_can_be_switched_off(model, triplets):
    batch = [Collator(model)(triplets[:3])["batch"]]
    assert set(ReMatchLoss(model)(batch)) == {"contrastive", "orthogonality", "matching"}
    assert set(ReMatchLoss(model, w_orth=0)(batch)) == {"contrastive", "matching"}
    assert set(ReMatchLoss(model, w_qdm=0)(batch)) == {"contrastive", "orthogonality"}
    without = Collator(model, views=[])(
        [{c: t[c] for c in ("query", "positive")} for t in triplets[:3]]
    )["batch"]
    assert without.matching == []
    assert set(ReMatchLoss(model)([without])) == {"contrastive", "orthogonality"}


def test_accuracy_is_counted_per_view_pair(model, triplets):
    views = ["raw-raw", "feat-feat"]
    loss = ReMatchLoss(model, views=views)
    loss([Collator(model, views)(triplets)["batch"]])
    accuracy = loss.pop_metrics()
    assert 0 < accuracy.pop("token_cosine") < 1
    assert set(accuracy) == {
        f"match_accuracy/{v}/{d}" for v in views for d in ("positive", "negative")
    }
    queries, positives, negatives = (
        [t[c] for t in triplets] for c in ("query", "positive", "negative")
    )
    for documents, side, wanted in ((positives, "positive", True), (negatives, "negative", False)):
        hits = (model.match(queries, documents, "raw-raw") > 0.5) == wanted
        assert accuracy[f"match_accuracy/raw-raw/{side}"] == pytest.approx(
            100 * hits.mean(), abs=0.01
        )
    assert loss.pop_metrics() == {}
