"""One packed forward pass against eight separate ones, and what answer slots attend to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from shared_questions import MIXED, answer, one_question, packed_and_separate
from torch.nn.attention.flex_attention import flex_attention

from rematch.errors import RematchError
from rematch.matching import Question, View, block_mask, unified_mask
from rematch.scoring import MatchingHead
from rematch.tokens import fuse
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss

JOINT = pytest.mark.parametrize("joint", [False, True])


@JOINT
def test_one_forward_equals_eight_in_logits_and_gradients(model, triplets, joint):
    model.backbone.set_matching("unified", joint)
    rows = [triplets[i] for i in MIXED]
    torch.manual_seed(0)
    weights = torch.randn(
        len(rows), 8, model.backbone.model.config.text_config.vocab_size, dtype=torch.float64
    )
    gradients = []
    logits = packed_and_separate(model, rows)
    assert (logits[0] - logits[1]).abs().max() <= 1e-10
    for which in logits:
        model.zero_grad()
        (which * weights).sum().backward(retain_graph=True)
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert any("embed_tokens" in n for n in gradients[0])
    assert any("projector" in n for n in gradients[0])
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().clamp(min=1.0)
        assert ((gradient - gradients[1][name]) / scale).abs().max() <= 1e-10, name


@JOINT
def test_gradient_flows_through_z_into_the_embedding(model, triplets, joint):
    model.backbone.set_matching("unified", joint)
    batch = Collator(model, ["feat-feat"])([triplets[i] for i in MIXED])["batch"]
    loss = ReMatchLoss(model, views=["feat-feat"])
    vectors = torch.randn(len(batch.keys), 32, dtype=torch.float64, requires_grad=True)
    passes = loss.passes(batch)
    shares = [loss.match(mini_batch, passes, vectors) for mini_batch in batch.matching]
    torch.stack(shares).sum().backward()
    assert (vectors.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("view", View)
@JOINT
def test_no_slot_attends_to_another_document(model, triplets, view, joint):
    """Replacing the second document by another of the same length leaves the logits of the first
    equal to the bit.
    """
    model.backbone.set_matching("unified", joint)
    row = triplets[0]
    others = [{"text": "a dog above a pizza"}, {"text": "a fox below a taco"}]
    assert len({len(model.backbone.reader.read(other).ids) for other in others}) == 1
    z = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = []
    for other, last in zip(others, (z[2], -z[2]), strict=True):
        questions = [Question(view, 0), Question(view, 1)]
        vectors = [z[0]] if view.query == "feat" else []
        vectors += [z[1], last] if view.document == "feat" else []
        stacked = torch.stack(vectors) if vectors else None
        sequence = (row["query"], [row["positive"], other])
        logits.append(answer(model, [sequence], [questions], stacked)[0])
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


@JOINT
def test_the_order_of_the_documents_reveals_nothing(model, triplets, joint):
    """Both documents have the same positions: exchanging them exchanges their scores."""
    model.backbone.set_matching("unified", joint)
    row = triplets[2]
    exchanged = row | {"positive": row["negative"], "negative": row["positive"]}
    logits = [packed_and_separate(model, [pair])[0].view(4, 2, -1) for pair in (row, exchanged)]
    assert (logits[0] - logits[1].flip(1)).abs().max() <= 1e-12


@JOINT
@pytest.mark.parametrize("view", View)
def test_only_joint_documents_see_the_query(model, triplets, view, joint):
    """The state of a document's last token, with one query and with another."""
    model.backbone.set_matching("unified", joint)
    read = model.backbone.reader.read
    queries = [read("a dog above a pizza"), read("a fox below a taco")]
    assert len(queries[0].ids) == len(queries[1].ids)
    z = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = []
    for query, z_query in zip(queries, z[:2], strict=True):
        packed, _ = model.backbone.questions.pack(
            [(query, [read("a cat")])], [[Question(view, 0)]]
        )
        vectors = [z_query] if view.query == "feat" else []
        vectors += [z[2]] if view.document == "feat" else []
        before_slot = int((packed.segments[0] < packed.segments[0].max()).sum()) - 1
        out = model.backbone.run_packed(vars(packed), torch.stack(vectors) if vectors else None)
        states.append(out[0, before_slot])
    assert torch.equal(*states) == (not joint)


@JOINT
@pytest.mark.parametrize("views", [list(View), ["raw-raw"], ["feat-raw", "raw-feat"]])
def test_mini_batches_of_questions_keep_to_the_budget(model, triplets, views, joint):
    model.backbone.set_matching("unified", joint)
    batch = Collator(model, views, batch_tokens=1500)(triplets)["batch"]
    rows = [len(step.tensors["slots"]) for step in batch.matching]
    assert max(rows) > 1
    assert all(
        step.tokens <= 1500 or count == 1 for step, count in zip(batch.matching, rows, strict=True)
    )


def test_the_collator_puts_the_positive_first_half_of_the_time(model):
    rows = [
        {"query": {"text": f"query {i}"}, "positive": {"text": f"document {i}"}}
        for i in range(200)
    ]
    steps = Collator(model, ["feat-feat"])(rows)["batch"].matching
    first = torch.cat([step.tensors["relevant"][:, 0] for step in steps]).float()
    assert 0.4 < first.mean() < 0.6


def test_without_hard_negatives_another_samples_document_serves(model, triplets):
    rows = [{"query": t["query"], "positive": t["positive"]} for t in triplets[:3]]
    batch = Collator(model)(rows)["batch"]
    for step in batch.matching:
        for query, *documents in step.tensors["placeholder_inputs"].view(-1, 3).tolist():
            row = batch.inputs[:, 0].tolist().index(query)
            assert set(documents) == {
                batch.inputs[row, 1].item(),
                batch.inputs[(row + 1) % 3, 1].item(),
            }


@JOINT
def test_match_equals_the_plain_question(model, triplets, joint):
    model.backbone.set_matching("unified", joint)
    row = triplets[1]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        vectors = [
            torch.as_tensor(model.encode_query(row["query"])),
            torch.as_tensor(model.encode_document(row["positive"])),
        ]
        z = [model.fusion.projector(v[None].double())[0] for v in vectors]
        for view in View:
            logits = one_question(model, row["query"], row["positive"], z[0], z[1], view)
            expected = torch.sigmoid(logits[yes] - logits[no]).item()
            assert model.match([row["query"]], [row["positive"]], view)[0] == pytest.approx(
                expected, abs=1e-6
            )


def test_match_takes_vectors_as_arrays_or_lists(model, triplets):
    arrays = (
        model.encode_query([t["query"] for t in triplets]),
        model.encode_document([t["positive"] for t in triplets]),
    )
    assert model.match(*arrays, "feat-feat") == pytest.approx(
        model.match(*map(list, arrays), "feat-feat"), abs=1e-6
    )


@JOINT
def test_short_and_long_lists_are_scored_as_single_pairs_are(model, triplets, joint):
    """Lists that share sequences with their query, and one behind a query computed once."""
    model.backbone.set_matching("unified", joint)
    queries = [t["query"] for t in triplets[:4]]
    documents = [t[side] for side in ("positive", "negative") for t in triplets[:10]]
    lists = [documents, documents[:10], documents[10:11], []]
    q = model.encode_query(queries)
    d = [model.encode_document(ds) if ds else ds for ds in lists]
    for view, vectors in (
        ("raw-raw", (queries, lists)),
        ("feat-feat", (q, d)),
        ("raw-feat", (queries, d)),
    ):
        together = model.score_lists(queries, lists, view)
        assert [len(margins) for margins in together] == [20, 10, 1, 0]
        for query, query_documents, margins in zip(queries, lists, together, strict=True):
            single = [model.score(query, [document], view)[0] for document in query_documents]
            assert margins == pytest.approx(single, abs=1e-6)
        for margins, expected in zip(model.score_lists(*vectors, view), together, strict=True):
            assert margins == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("long_list", [False, True])
@pytest.mark.parametrize("view", View)
@JOINT
def test_scores_are_the_answers_of_training(model, triplets, view, long_list, joint):
    """The questions of a training batch, all views in one sequence, against one view at a time."""
    model.backbone.set_matching("unified", joint)
    rows = [triplets[i] for i in MIXED]
    loss = ReMatchLoss(model)
    batch = Collator(model)(rows)["batch"]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        passes = replace(loss.passes(batch), features=None)
        multi = torch.cat([loss.embed(step, passes)[0] for step in batch.embedding])
        vectors = torch.nn.functional.normalize(fuse(multi), dim=-1)
        trained = []
        for step in batch.matching:
            features = loss._inputs(step, passes)
            logits = model.answer(
                features | {"embeddings": vectors[features["placeholder_inputs"]]}
            )
            places = features["placeholder_inputs"].view(len(logits), -1)[:, :3]
            trained += [
                (*map(int, place), answers) for place, answers in zip(places, logits, strict=True)
            ]
    inputs = {
        int(place): row[c]
        for row, places in zip(rows, batch.inputs, strict=True)
        for c, place in zip(row, places, strict=False)
    }
    slot = 2 * list(View).index(view)
    for query, first, second, logits in trained:
        queries, documents = (
            vectors if form == "feat" else inputs for form in (view.query, view.document)
        )
        candidates = [documents[first], documents[second]] * (10 if long_list else 1)
        scores = 1 / (1 + np.exp(-model.score(queries[query], candidates, view)))
        expected = torch.sigmoid(logits[slot : slot + 2, yes] - logits[slot : slot + 2, no])
        assert scores[:2] == pytest.approx(expected.numpy(), abs=1e-6)
        assert scores[-2:] == pytest.approx(expected.numpy(), abs=1e-6)


def test_margins_tell_documents_apart_in_bfloat16(make_model, triplets):
    """Logits rounded to bfloat16 would tie."""
    model = make_model(dtype=torch.bfloat16)
    documents = [t[side] for t in triplets for side in ("positive", "negative")]
    margins = model.score(triplets[0]["query"], documents)
    assert len(set(margins.tolist())) == len(documents)
    assert np.array_equal(
        model.match([triplets[0]["query"]], documents[:1]), 1 / (1 + np.exp(-margins[:1]))
    )


def test_margins_are_exact_under_autocast(make_model, triplets):
    model = make_model(dtype=torch.float32)
    documents = [t["positive"] for t in triplets]
    with torch.autocast("cpu", torch.bfloat16):
        margins = torch.from_numpy(model.score(triplets[0]["query"], documents))
    assert not torch.equal(margins, margins.bfloat16().float())


def test_documents_of_several_queries_are_read_and_embedded_once(model, triplets, monkeypatch):
    reads, embedded = [], []
    read, encode = model.backbone.reader.read, model.encode_document
    monkeypatch.setattr(
        model.backbone.reader, "read", lambda value, row=0: reads.append(row) or read(value, row)
    )
    monkeypatch.setattr(
        model,
        "encode_document",
        lambda inputs, **k: embedded.append(len(inputs)) or encode(inputs, **k),
    )
    queries = [t["query"] for t in triplets[:4]]
    lists = [[t["positive"] for t in triplets[:3]]] * 4
    model.score_lists(queries, lists)
    assert len(reads) == 4 + 3
    model.score_lists(queries, lists, "raw-feat")
    assert embedded == [3]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_margins_are_those_of_the_logits(make_model, triplets, lora):
    model = make_model(lora=lora)
    yes, no = model.backbone.answer_ids
    query, document = (model.backbone.reader.read(text) for text in ("a dog", "a cat"))
    packed, _ = model.backbone.questions.pack([(query, [document])], [[Question(View.RAW_RAW, 0)]])
    logits = model.backbone.answer_logits(vars(packed))
    margins = model.backbone.answer_margins(vars(packed))
    torch.testing.assert_close(margins, logits[..., yes] - logits[..., no], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("matching", "joint"), [("unified", False), ("unified", True), ("reuse", False)]
)
def test_scoring_halves_a_pass_that_runs_out_of_memory(
    model, triplets, monkeypatch, matching, joint
):
    model.backbone.set_matching(matching, joint)
    documents = [t[side] for side in ("positive", "negative") for t in triplets]
    queries = [t["query"] for t in (triplets[0], *triplets)]
    lists = [documents[:20], *(documents[i : i + 2] for i in range(0, 24, 2))]
    expected = np.concatenate(model.score_lists(queries, lists))
    sizes = []
    run = model.backbone.answer_margins

    def limited(features, *args):
        sizes.append(len(features["slots"]) * features["slots"].shape[1])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(features, *args)

    monkeypatch.setattr(model.backbone, "answer_margins", limited)
    margins = np.concatenate(model.score_lists(queries, lists))
    assert margins == pytest.approx(expected, abs=1e-6)
    assert max(sizes) > 2
    monkeypatch.setattr(model.backbone, "answer_margins", out_of_memory)
    with pytest.raises(RematchError, match="out of memory with a single query and document"):
        model.match(queries[:3], documents[:3])


def out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


def test_forward_passes_of_scoring_keep_to_their_budget(model, triplets, monkeypatch):
    sizes = []
    run = model.backbone.run_packed

    def recorded(features, *args):
        sizes.append(features["input_ids"].numel())
        return run(features, *args)

    monkeypatch.setattr(model.backbone, "run_packed", recorded)
    queries = [t["query"] for t in triplets]
    lists = [[t["positive"], t["negative"]] for t in triplets]
    expected = np.concatenate(model.score_lists(queries, lists, batch_tokens=100_000))
    assert len(sizes) == 1
    sizes.clear()
    margins = np.concatenate(model.score_lists(queries, lists, batch_tokens=500))
    assert margins == pytest.approx(expected, abs=1e-6)
    assert len(sizes) > 5
    assert max(sizes) <= 500


@pytest.mark.parametrize(
    ("matching", "joint"), [("unified", False), ("unified", True), ("reuse", False)]
)
def test_a_list_fills_its_rows_evenly(model, triplets, monkeypatch, matching, joint):
    """Every row but the last holds as many documents as fit, not the first row alone."""
    model.backbone.set_matching(matching, joint)
    sizes = []
    score_batch = MatchingHead._score_batch

    def recorded(head, rows):
        sizes.extend(len(row.numbers) for row in rows)
        return score_batch(head, rows)

    monkeypatch.setattr(MatchingHead, "_score_batch", recorded)
    documents = ["a dog above a pizza"] * 16
    overhead, per_document = model.backbone.questions.overhead()
    query_length = len(model.backbone.reader.read("a dog").ids)
    document_length = len(model.backbone.reader.read(documents[0]).ids)
    budget = overhead + query_length + 7 * (per_document + document_length)
    model.score("a dog", documents, batch_tokens=budget)
    assert sizes == [7, 7, 2]


def test_padding_attends_to_itself(model, triplets):
    read = model.backbone.reader.read
    rows = [(read(t["query"]), [read(t["positive"])]) for t in triplets[:3]]
    packed, _ = model.backbone.questions.pack(rows, [[Question(View.RAW_RAW, 0)]] * 3)
    assert unified_mask(packed.segments, packed.attends).any(-1).all()


@pytest.mark.parametrize("before", [0, 5])
def test_the_block_mask_is_the_unified_mask(before):
    """FlexAttention under the one, attention under the other; values, for it has no gradient on
    CPUs.
    """
    torch.manual_seed(before)
    owner = torch.randint(0, 4, (2, before + 40)).sort(dim=1).values
    visible = (torch.rand(2, 4, 4) < 0.5) | torch.eye(4, dtype=torch.bool)
    q = torch.randn(2, 2, 40, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, before + 40, 8, dtype=torch.float64) for _ in range(2))
    flexible = flex_attention(q, k, v, block_mask=block_mask(owner, visible, before))
    dense = unified_mask(owner, visible, before)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flexible, plain, rtol=1e-9, atol=1e-9)
    assert not dense.all()
