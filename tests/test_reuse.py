"""Matching from the keys and values of the embedding pass, against an explicit slow version."""

import json

import pytest
import torch
from shared_gradients import SMALL, assert_equal, both, gradients
from transformers import DynamicCache

from rematch import ReMatch
from rematch.errors import ModelError
from rematch.matching import View
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_TASK
from rematch.tokens import fuse
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss
from rematch.train.recipe import Recipe


def embed_with_cache(model, value, task):
    """One input alone: its multi-vector, and the keys and values of every layer, (1, heads, L,
    width).
    """
    features, cache = model.preprocess([value], task=task), DynamicCache()
    features["pixel_values"] = (
        features["pixel_values"].double() if "pixel_values" in features else None
    )
    accepted = {
        k: features[k]
        for k in ("input_ids", "attention_mask", "pixel_values")
        if features.get(k) is not None
    }
    states = model.backbone.base(
        **accepted, past_key_values=cache, use_cache=True
    ).last_hidden_state
    multi = model.fusion(
        {"token_embeddings": states, "attention_mask": features["attention_mask"]}
    )["multi_vector"]
    return multi, [(layer.keys, layer.values) for layer in cache.layers], states.shape[1]


def one_question(model, query, document, view):
    """Answer logits of one question: no batch, no sharing, the mask written out by hand."""
    tokens = lambda text: model.backbone.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    reader = model.backbone.reader
    q, q_layers, q_length = embed_with_cache(model, query, "query")
    d, d_layers, d_length = embed_with_cache(model, document, "document")
    query_view, document_view = view.query, view.document
    prompt = tokens(reader.prefix + MATCH_TASK)
    placeholder = [model.backbone.tokenizer.eos_token_id]
    q_feat = tokens(MATCH_QUERY) + placeholder if query_view == "feat" else []
    d_feat = tokens(MATCH_DOCUMENT) + placeholder if document_view == "feat" else []
    slot = tokens(reader.suffix)
    ids = prompt + q_feat + d_feat + slot
    p, a, b = len(prompt), len(prompt) + len(q_feat), len(prompt) + len(q_feat) + len(d_feat)
    end_q, end_d = (
        (p + len(q_feat) if q_feat else q_length),
        (p + len(d_feat) if d_feat else d_length),
    )
    start = max(p, end_q, end_d)
    position = [
        *range(p),
        *range(p, p + len(q_feat)),
        *range(p, p + len(d_feat)),
        *range(start, start + len(slot)),
    ]
    context = q_length + d_length
    mask = torch.full(
        (len(ids), context + len(ids)), torch.finfo(torch.float64).min, dtype=torch.float64
    )
    for row in range(len(ids)):
        for column in range(row + 1):
            same = (
                (row < p) == (column < p)
                and (row < a) == (column < a)
                and (row < b) == (column < b)
            )
            if column < p or same or row >= b:
                mask[row, context + column] = 0.0
    if query_view == "raw":
        mask[b:, :q_length] = 0.0
    if document_view == "raw":
        mask[b:, q_length:context] = 0.0
    cache = DynamicCache()
    for index, ((kq, vq), (kd, vd)) in enumerate(zip(q_layers, d_layers, strict=True)):
        cache.update(torch.cat([kq, kd], 2), torch.cat([vq, vd], 2), index)
    embeds = list(model.backbone.model.get_input_embeddings()(torch.tensor(ids)))
    if q_feat:
        embeds[a - 1] = model.fusion.projector(fuse(q))[0]
    if d_feat:
        embeds[b - 1] = model.fusion.projector(fuse(d))[0]
    out = model.backbone.base.language_model(
        inputs_embeds=torch.stack(embeds)[None],
        attention_mask=mask[None, None],
        position_ids=torch.tensor([position]),
        past_key_values=cache,
    ).last_hidden_state
    return model.backbone.model.lm_head(out[0, -1])


def test_reuse_equals_one_question_at_a_time_in_value_and_gradient(model, triplets):
    rows = [triplets[i] for i in (0, 4, 7)]
    batch = Collator(model, reuse=True, batch_tokens=100_000)(rows)["batch"]
    loss = ReMatchLoss(model)
    torch.manual_seed(0)
    matching = lambda: loss([batch])["matching"]  # noqa: E731
    yes, no = model.backbone.answer_ids

    def slow():
        terms = []
        for row in rows:
            for column, answer in (("positive", yes), ("negative", no)):
                for view in View:
                    terms.append(
                        -one_question(model, row["query"], row[column], view).log_softmax(-1)[
                            answer
                        ]
                    )
        return 0.1 * torch.stack(terms).mean()

    results = []
    for version in (slow, matching):
        model.zero_grad()
        value = version()
        value.backward()
        results.append(
            (
                [value.item()],
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    assert_equal(*results, 1e-6)  # rows alone are not padded: the rotary tables are float32


def test_vectors_are_those_of_ordinary_embedding(model, triplets):
    plain, reuse = (
        Collator(model, reuse=flag, batch_tokens=SMALL)(triplets)["batch"]
        for flag in (False, True)
    )
    parts = [ReMatchLoss(model)([batch]) for batch in (plain, reuse)]
    for name in ("contrastive", "orthogonality"):
        assert parts[0][name].item() == pytest.approx(parts[1][name].item(), rel=1e-6)


@pytest.mark.parametrize("views", [list(View), ["raw-raw"], ["feat-feat"]])
def test_cached_reuse_equals_plain_reuse(model, triplets, views):
    batch = Collator(model, views, SMALL, reuse=True)(triplets)["batch"]
    assert len(batch.embedding) > 4
    assert not batch.matching
    assert_equal(*both(model, [batch], scale=64.0, views=views), 1e-9)


def test_a_frozen_tower_serves_reuse(model, triplets):
    batch = Collator(model, batch_tokens=SMALL, reuse=True)(triplets)["batch"]
    free = gradients(model, ReMatchLoss(model), [batch])
    model.backbone.freeze_vision()
    frozen = gradients(model, ReMatchLoss(model), [batch])
    assert frozen[0] == pytest.approx(free[0], rel=1e-9)


def test_reuse_without_hard_negatives_finds_another_document(model, triplets):
    rows = [{"query": t["query"], "positive": t["positive"]} for t in triplets[:4]]
    batch = Collator(model, batch_tokens=1, reuse=True)(rows)[
        "batch"
    ]  # every sample a mini-batch of its own
    assert len(batch.embedding) == 4
    assert all(step.tensors["relevant"].sum() == 1 for step in batch.embedding)


@pytest.mark.parametrize("view", View)
def test_match_answers_as_training_asked(model, triplets, view):
    model.backbone.set_matching("reuse")
    queries, documents = [t["query"] for t in triplets[:4]], [t["positive"] for t in triplets[:4]]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        logits = [one_question(model, q, d, view) for q, d in zip(queries, documents, strict=True)]
    expected = [torch.sigmoid(x[yes] - x[no]).item() for x in logits]
    assert model.match(queries, documents, view) == pytest.approx(expected, abs=1e-6)
    assert model.score(queries[0], documents, view) == pytest.approx(
        [model.score(queries[0], [d], view)[0] for d in documents], abs=1e-6
    )


@pytest.mark.parametrize(("matching", "joint"), [("reuse", False), ("feat", True)])
def test_the_way_of_matching_is_saved(model, tmp_path, matching, joint):
    model.backbone.set_matching(matching, joint)
    model.save_pretrained(str(tmp_path))
    loaded = ReMatch(tmp_path).backbone
    assert (loaded.matching, loaded.joint) == (matching, joint)


def test_a_checkpoint_of_before_is_isolated(model, tmp_path):
    model.backbone.set_matching("unified", joint=True)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "sentence_bert_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("joint")
    file.write_text(json.dumps(settings))
    assert not ReMatch(tmp_path).backbone.joint


def test_joint_documents_cannot_be_reused(model, tmp_path):
    with pytest.raises(ModelError, match="embedding pass, which has no query"):
        model.backbone.set_matching("reuse", joint=True)
    assert (model.backbone.matching, model.backbone.joint) == ("unified", False)
    with pytest.raises(ValueError, match=r"loss\.joint .* loss\.matching=reuse"):
        Recipe.model_validate({"loss": {"joint": True, "matching": "reuse"}})
