"""The unified mask against eight forwards of their own, and what an answer slot can see."""

import dataclasses

import pytest
import torch

from rematch.losses import fuse
from rematch.matching import VIEWS
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK
from rematch.train.collator import Collator

MIXED = (0, 3, 6, 9)


def embed(model, inputs, task):
    return fuse(model(model.preprocess(inputs, task=task))["multi_vector"])


def one_question(model, query, document, query_z, document_z, views):
    """P(answer) logits of one question in a forward of its own, written out plainly: no segments, no packing."""
    backbone = model.backbone
    tokens = lambda text: backbone.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    (raw_query, raw_document), _ = backbone.segments([MATCH_QUERY, MATCH_DOCUMENT], [query, document])
    query_view, document_view = views.split("-")
    placeholder = [backbone.tokenizer.eos_token_id]
    prompt = tokens(backbone.prefix + MATCH_TASK)
    q = raw_query.ids.tolist() if query_view == "raw" else tokens(MATCH_QUERY) + placeholder
    d = raw_document.ids.tolist() if document_view == "raw" else tokens(MATCH_DOCUMENT) + placeholder
    slot = tokens(MATCH_QUESTION + backbone.suffix)
    ids = torch.tensor([prompt + q + d + slot])
    gap = len(raw_query.ids) - len(q)  # Z_q sits where the raw query would end
    position = list(range(len(prompt))) + [len(prompt) + gap + i for i in range(len(q) + len(d) + len(slot))]
    n, end_q, end_d = len(prompt), len(prompt) + len(q), len(prompt) + len(q) + len(d)
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), torch.finfo(torch.float64).min, dtype=torch.float64)
    for row in range(ids.shape[1]):
        for column in range(row + 1):
            document_to_query = end_q <= row < end_d and n <= column < end_q
            if not document_to_query:
                mask[0, 0, row, column] = 0.0
    embeds = backbone.model.get_input_embeddings()(ids)[0]
    rows = list(embeds)
    if query_view == "feat":
        rows[end_q - 1] = query_z
    if document_view == "feat":
        rows[end_d - 1] = document_z
    embeds = torch.stack(rows)[None]
    pictures = [x["image"] for x, v in ((query, query_view), (document, document_view)) if v == "raw" and "image" in x]
    if pictures:
        pixels = backbone.processor.image_processor(pictures, return_tensors="pt")["pixel_values"].double()
        features = torch.cat(list(backbone.base.get_image_features(pixels).pooler_output))
        embeds = embeds.masked_scatter((ids == backbone.model.config.image_token_id)[..., None], features)
    out = backbone.base.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=torch.tensor([position])
    ).last_hidden_state
    return backbone.model.lm_head(out[0, -1])


def packed_and_separate(model, rows):
    """Logits of all eight questions of every row: in one packed forward, and in forwards of their own."""
    collator = Collator(model)
    features = collator.matching(rows)
    order = features["order"]
    queries = embed(model, [r["query"] for r in rows], "query")
    documents = [embed(model, [r[c] for r in rows], "document") for c in ("positive", "negative")]
    z_query = model.fusion.projector(queries)
    z_documents = torch.stack([model.fusion.projector(d) for d in documents], 1)
    z_slots = z_documents.gather(1, order[..., None].expand_as(z_documents))
    questions = [(q, i, d) for q, d in (v.split("-") for v in VIEWS) for i in (0, 1)]
    sequences = [
        ([r["query"]], [(r["positive"], r["negative"])[j] for j in o]) for r, o in zip(rows, order, strict=True)
    ]
    packed, vision = model.pack_matching(sequences, [questions] * len(rows))
    vision = {k: v.double() for k, v in vision.items()}
    together = model.backbone.answer_logits(packed, vision, torch.cat([z_query[:, None], z_slots], 1).flatten(0, 1))
    separate = torch.stack(
        [
            torch.stack(
                [
                    one_question(
                        model, r["query"], (r["positive"], r["negative"])[o[i]], z_query[b], z_slots[b, i], f"{q}-{d}"
                    )
                    for q, i, d in questions
                ]
            )
            for b, (r, o) in enumerate(zip(rows, order, strict=True))
        ]
    )
    return together, separate


def test_one_forward_equals_eight_in_logits_and_gradients(model, triplets):
    rows = [triplets[i] for i in MIXED]
    torch.manual_seed(0)
    weights = torch.randn(len(rows), 8, model.backbone.model.config.text_config.vocab_size, dtype=torch.float64)
    gradients = []
    logits = packed_and_separate(model, rows)
    assert (logits[0] - logits[1]).abs().max() <= 1e-10
    for which in logits:
        model.zero_grad()
        (which * weights).sum().backward(retain_graph=True)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("embed_tokens" in n for n in gradients[0])
    assert any("projector" in n for n in gradients[0])
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().clamp(min=1.0)
        assert ((gradient - gradients[1][name]) / scale).abs().max() <= 1e-10, name


def test_gradient_flows_through_z_into_the_embedding(model, triplets):
    rows = [triplets[i] for i in MIXED]
    features = Collator(model, ["feat-feat"]).matching(rows)
    query = embed(model, [r["query"] for r in rows], "query").detach().requires_grad_()
    documents = [
        embed(model, [r[c] for r in rows], "document").detach().requires_grad_() for c in ("positive", "negative")
    ]
    from rematch.losses import ReMatchLoss

    ReMatchLoss(model, views=["feat-feat"]).matching(features, query, documents).backward()
    assert all(x.grad.abs().sum() > 0 for x in (query, *documents))


@pytest.mark.parametrize("views", VIEWS)
def test_no_slot_sees_another_document(model, triplets, views):
    """Another second document of the same length leaves the first one's logits equal to the bit."""
    row = triplets[0]
    others = [{"text": "a dog above a pizza"}, {"text": "a fox below a taco"}]
    lengths = {len(s.ids) for s in model.backbone.segments([MATCH_DOCUMENT] * 2, others)[0]}
    assert len(lengths) == 1
    query_view, document_view = views.split("-")
    z = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = []
    for other, last in zip(others, (z[2], -z[2]), strict=True):
        questions = [(query_view, 0, document_view), (query_view, 1, document_view)]
        packed, vision = model.pack_matching([([row["query"]], [row["positive"], other])], [questions])
        feats = [z[0]] * (query_view == "feat") + [z[1], last] * (document_view == "feat")
        vision = {k: v.double() for k, v in vision.items()}
        logits.append(model.backbone.answer_logits(packed, vision, torch.stack(feats) if feats else None)[0])
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_the_place_of_the_positive_tells_nothing(model, triplets):
    """Both document slots have the same positions: exchanging the documents exchanges their scores."""
    row = triplets[2]
    questions = [("raw", 0, "raw"), ("raw", 1, "raw")]
    scores = []
    for pair in ([row["positive"], row["negative"]], [row["negative"], row["positive"]]):
        packed, vision = model.pack_matching([([row["query"]], pair)], [questions])
        scores.append(model.backbone.answer_logits(packed, {k: v.double() for k, v in vision.items()})[0])
    assert (scores[0] - scores[1].flip(0)).abs().max() <= 1e-12


def test_the_collator_puts_the_positive_first_half_of_the_time(model, triplets):
    collator = Collator(model, ["feat-feat"])
    first = torch.cat([collator.matching(triplets)["order"][:, 0] for _ in range(20)]).float()
    assert 0.4 < first.mean() < 0.6


def test_without_hard_negatives_another_samples_document_serves(model, triplets):
    rows = [{"query": t["query"], "positive": t["positive"]} for t in triplets[:3]]
    assert Collator(model).matching(rows)["negative_row"].tolist() == [1, 2, 0]


def test_match_equals_the_plain_question(model, triplets):
    row = triplets[1]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        vectors = [
            torch.as_tensor(model.encode_query(row["query"])),
            torch.as_tensor(model.encode_document(row["positive"])),
        ]
        z = [model.fusion.projector(v[None].double())[0] for v in vectors]
        for views in ("raw-raw", "raw-feat"):
            logits = one_question(model, row["query"], row["positive"], z[0], z[1], views)
            expected = torch.sigmoid(logits[yes] - logits[no]).item()
            assert model.match([row["query"]], [row["positive"]], views)[0] == pytest.approx(expected, abs=1e-6)


def test_match_takes_vectors_for_feature_views_and_packs_neighbours(model, triplets):
    queries = [triplets[0]["query"]] * 10 + [t["query"] for t in triplets[:2]]
    documents = [t["positive"] for t in triplets[:10]] + [t["negative"] for t in triplets[:2]]
    q, d = model.encode_query(queries), model.encode_document(documents)
    for views, given in (
        ("raw-raw", (queries, documents)),
        ("feat-feat", (list(q), list(d))),
        ("raw-feat", (queries, list(d))),
    ):
        together = model.match(queries, documents, views)
        single = [model.match([queries[i]], [documents[i]], views)[0] for i in range(12)]
        assert together == pytest.approx(single, abs=1e-6)
        assert model.match(*given, views) == pytest.approx(together, abs=1e-6)


def test_packing_pads_without_empty_rows(model, triplets):
    packed, _ = model.pack_matching([([t["query"]], [t["positive"]]) for t in triplets[:3]], [[("raw", 0, "raw")]] * 3)
    assert packed.mask.any(-1).all()
    assert {f.name for f in dataclasses.fields(packed)} == {"input_ids", "position_ids", "mask", "slots", "features"}
