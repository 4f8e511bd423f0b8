"""The loss against a plain re-implementation of the method's formulas, and each part switched off."""

import math

import pytest
import torch
from shared_questions import packed_and_separate

from rematch.losses import info_nce, orthogonality
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss


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
    queries, documents = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(6, 4, dtype=torch.float64),
    )
    cos = lambda a, b: (a @ b / (a.norm() * b.norm())).item()  # noqa: E731
    losses = []
    for i, q in enumerate(queries):
        terms = [math.exp(cos(q, d) / 0.02) for d in documents]
        losses.append(-math.log(terms[i] / sum(terms)))
    assert info_nce(queries, documents, 0.02).item() == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_each_query_can_have_its_own_temperature():
    queries, documents = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(6, 4, dtype=torch.float64),
    )
    own = torch.tensor([[0.02], [0.1], [0.5]], dtype=torch.float64)
    each = []
    for i, tau in enumerate(own.flatten().tolist()):
        order = [i, *(j for j in range(6) if j != i)]
        each.append(info_nce(queries[i : i + 1], documents[order], tau).item())
    assert info_nce(queries, documents, own).item() == pytest.approx(sum(each) / 3, rel=1e-12)


def test_the_whole_loss_equals_a_plain_one(model, triplets):
    """L = L_cl + 0.5 L_orth + 0.1 L_qdm, from embeddings and from eight separate matching
    forwards.
    """
    rows = triplets[:4]
    parts = ReMatchLoss(model)([Collator(model)(rows)["batch"]])

    multi = {c: [] for c in ("query", "positive", "negative")}
    for column, vectors in multi.items():
        for row in rows:  # one at a time: no padding, no batch
            task = "query" if column == "query" else "document"
            vectors.append(model(model.preprocess([row[column]], task=task))["multi_vector"][0])
    mean = {c: torch.stack(v).mean(1) for c, v in multi.items()}
    unit = {c: v / v.norm(dim=1, keepdim=True) for c, v in mean.items()}
    scores = unit["query"] @ torch.cat([unit["positive"], unit["negative"]]).T / 0.02
    contrastive = -scores.log_softmax(1).diagonal().mean()
    penalties = []
    for vectors in [v for column in multi.values() for v in column]:
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
