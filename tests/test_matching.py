"""The unified mask against eight forwards of their own, and what an answer slot can see."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn.attention.flex_attention import flex_attention

from rematch.backbone.pictures import Pictures
from rematch.errors import RematchError
from rematch.matching import VIEWS, block_mask, unified_mask
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK
from rematch.tokens import fuse
from rematch.train.collator import Collator
from rematch.train.loss import ReMatchLoss

MIXED = (0, 3, 6, 9)


def embed(model, inputs, task):
    return fuse(model(model.preprocess(inputs, task=task))["multi_vector"])


def one_question(model, query, document, query_z, document_z, views, shifted=False):
    """P(answer) logits of one question in a forward of its own, written out plainly: no segments,
    no packing.

    ``shifted`` puts it where it stands beside the raw query; but for rounding in float32 rotary
    tables it is the same.
    """
    backbone = model.backbone
    tokens = lambda text: backbone.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    raw_query = tokens(MATCH_QUERY) + backbone.reader.read(query).content.ids.tolist()
    raw_document = tokens(MATCH_DOCUMENT) + backbone.reader.read(document).content.ids.tolist()
    query_view, document_view = views.split("-")
    placeholder = [backbone.tokenizer.eos_token_id]
    prompt = tokens(backbone.reader.prefix + MATCH_TASK)
    q = raw_query if query_view == "raw" else tokens(MATCH_QUERY) + placeholder
    d = raw_document if document_view == "raw" else tokens(MATCH_DOCUMENT) + placeholder
    slot = tokens(MATCH_QUESTION + backbone.reader.suffix)
    # a document sees a prompt right before where Z_q stands or would stand, a raw query one of its
    # own
    feat_query = tokens(MATCH_QUERY) + placeholder
    ids = torch.tensor([prompt + prompt + q + d + slot])
    n = len(prompt)
    end_q, end_d = 2 * n + len(q), 2 * n + len(q) + len(d)
    before_document = len(q) - len(feat_query)
    position = [
        *range(before_document, before_document + n),
        *range(n),
        *range(n, n + len(q) + len(d) + len(slot)),
    ]
    if shifted:
        position = [place + len(raw_query) - len(q) for place in position]
    parts = [0] * n + [1] * n + [2] * len(q) + [3] * len(d) + [4] * len(slot)
    sees = {0: {0}, 1: {1}, 2: {1, 2}, 3: {0, 3}, 4: {1, 2, 3, 4}}
    mask = torch.full(
        (1, 1, ids.shape[1], ids.shape[1]), torch.finfo(torch.float64).min, dtype=torch.float64
    )
    for row in range(ids.shape[1]):
        for column in range(row + 1):
            if parts[column] in sees[parts[row]]:
                mask[0, 0, row, column] = 0.0
    embeds = backbone.model.get_input_embeddings()(ids)[0]
    rows = list(embeds)
    if query_view == "feat":
        rows[end_q - 1] = query_z
    if document_view == "feat":
        rows[end_d - 1] = document_z
    embeds = torch.stack(rows)[None]
    pictures = [
        x["image"]
        for x, v in ((query, query_view), (document, document_view))
        if v == "raw" and "image" in x
    ]
    if pictures:
        pixels = backbone.processor.image_processor(pictures, return_tensors="pt")[
            "pixel_values"
        ].double()
        features = torch.cat(list(backbone.base.get_image_features(pixels).pooler_output))
        embeds = embeds.masked_scatter(
            (ids == backbone.model.config.image_token_id)[..., None], features
        )
    out = backbone.base.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=torch.tensor([position])
    ).last_hidden_state
    return backbone.model.lm_head(out[0, -1])


def answer(model, rows, questions, z=None):
    """Logits of questions about inputs, in one packed forward."""
    read = model.backbone.reader.read
    packed, shown = model.backbone.reader.pack_matching(
        [(read(q), [read(d) for d in ds]) for q, ds in rows], questions
    )
    features = vars(packed) | {"vectors": None}
    if shown:
        features["unseen"] = Pictures.collect(
            [r.vision for r in shown], [r.visual_tokens for r in shown]
        )
    with nothing_projected(model):
        return model(features | {"vectors": z})["answer_logits"]


@contextmanager
def nothing_projected(model):
    """Take vectors for Z* themselves."""
    projector, model.fusion.projector = model.fusion.projector, torch.nn.Identity()
    yield
    model.fusion.projector = projector


def packed_and_separate(model, rows):
    """Logits of all eight questions of every row: in one packed forward, and in forwards of their
    own.
    """
    queries = embed(model, [r["query"] for r in rows], "query")
    documents = [embed(model, [r[c] for r in rows], "document") for c in ("positive", "negative")]
    z_query = model.fusion.projector(queries)
    z_documents = torch.stack([model.fusion.projector(d) for d in documents], 1)
    questions = [(q, i, d) for q, d in (v.split("-") for v in VIEWS) for i in (0, 1)]
    sequences = [(r["query"], [r["positive"], r["negative"]]) for r in rows]
    z = torch.cat([z_query[:, None], z_documents], 1).flatten(0, 1)
    together = answer(model, sequences, [questions] * len(rows), z)
    separate = torch.stack(
        [
            torch.stack(
                [
                    one_question(
                        model,
                        r["query"],
                        (r["positive"], r["negative"])[i],
                        z_query[b],
                        z_documents[b, i],
                        f"{q}-{d}",
                        shifted=True,
                    )
                    for q, i, d in questions
                ]
            )
            for b, r in enumerate(rows)
        ]
    )
    return together, separate


def test_one_forward_equals_eight_in_logits_and_gradients(model, triplets):
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


def test_gradient_flows_through_z_into_the_embedding(model, triplets):
    batch = Collator(model, ["feat-feat"])([triplets[i] for i in MIXED])["batch"]
    loss = ReMatchLoss(model, views=["feat-feat"])
    vectors = torch.randn(len(batch.keys), 32, dtype=torch.float64, requires_grad=True)
    torch.stack(
        [loss.match(step, batch, None, vectors) for step in batch.matching]
    ).sum().backward()
    assert (vectors.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("views", VIEWS)
def test_no_slot_sees_another_document(model, triplets, views):
    """Another second document of the same length leaves the first one's logits equal to the bit."""
    row = triplets[0]
    others = [{"text": "a dog above a pizza"}, {"text": "a fox below a taco"}]
    assert len({len(model.backbone.reader.read(other).ids) for other in others}) == 1
    query_view, document_view = views.split("-")
    z = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = []
    for other, last in zip(others, (z[2], -z[2]), strict=True):
        questions = [(query_view, 0, document_view), (query_view, 1, document_view)]
        feats = [z[0]] * (query_view == "feat") + [z[1], last] * (document_view == "feat")
        z_given = torch.stack(feats) if feats else None
        logits.append(
            answer(model, [(row["query"], [row["positive"], other])], [questions], z_given)[0]
        )
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_the_place_of_the_positive_tells_nothing(model, triplets):
    """Both document slots have the same positions: exchanging the documents exchanges their
    scores.
    """
    row = triplets[2]
    questions = [("raw", 0, "raw"), ("raw", 1, "raw")]
    scores = []
    for pair in ([row["positive"], row["negative"]], [row["negative"], row["positive"]]):
        scores.append(answer(model, [(row["query"], pair)], [questions])[0])
    assert (scores[0] - scores[1].flip(0)).abs().max() <= 1e-12


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
        for query, *documents in step.tensors["read"].view(-1, 3).tolist():
            row = batch.inputs[:, 0].tolist().index(query)
            assert set(documents) == {
                batch.inputs[row, 1].item(),
                batch.inputs[(row + 1) % 3, 1].item(),
            }


def test_match_equals_the_plain_question(model, triplets):
    row = triplets[1]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        vectors = [
            torch.as_tensor(model.encode_query(row["query"])),
            torch.as_tensor(model.encode_document(row["positive"])),
        ]
        z = [model.fusion.projector(v[None].double())[0] for v in vectors]
        for views in VIEWS:
            logits = one_question(model, row["query"], row["positive"], z[0], z[1], views)
            expected = torch.sigmoid(logits[yes] - logits[no]).item()
            assert model.match([row["query"]], [row["positive"]], views)[0] == pytest.approx(
                expected, abs=1e-6
            )


def test_match_takes_vectors_packs_neighbours_and_runs_a_query_of_many_documents_once(
    model, triplets
):
    arrays = (
        model.encode_query([t["query"] for t in triplets]),
        model.encode_document([t["positive"] for t in triplets]),
    )
    assert model.match(*arrays, "feat-feat") == pytest.approx(
        model.match(*map(list, arrays), "feat-feat"), abs=1e-6
    )
    queries = (
        [triplets[0]["query"]] * 20
        + [triplets[1]["query"]] * 10
        + [t["query"] for t in triplets[:2]]
    )
    every = [t[side] for side in ("positive", "negative") for t in triplets[:10]]
    documents = every + every[:12]
    q, d = model.encode_query(queries), model.encode_document(documents)
    for views, given in (
        ("raw-raw", (queries, documents)),
        ("feat-feat", (list(q), list(d))),
        ("raw-feat", (queries, list(d))),
    ):
        together = model.match(queries, documents, views)
        single = [model.match([queries[i]], [documents[i]], views)[0] for i in range(32)]
        assert together == pytest.approx(single, abs=1e-6)
        assert model.match(*given, views) == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("views", VIEWS)
def test_match_answers_what_training_answers(model, triplets, views, many):
    """The questions of a training batch, all views in one sequence, scored one view pair at a
    time.
    """
    rows = [triplets[i] for i in MIXED]
    loss = ReMatchLoss(model)
    batch = Collator(model)(rows)["batch"]
    yes, no = model.backbone.answer_ids
    with torch.no_grad():
        multi = torch.cat([loss.embed(step, batch, None)[0] for step in batch.embedding])
        vectors = torch.nn.functional.normalize(fuse(multi), dim=-1)
        trained = []
        for step in batch.matching:
            features = loss._features(step, batch, None)
            logits = model(features | {"vectors": vectors[features["read"]]})["answer_logits"]
            places = features["read"].view(-1, 3)
            trained += [
                (*map(int, place), answers) for place, answers in zip(places, logits, strict=True)
            ]
    inputs = {
        int(place): row[c]
        for row, places in zip(rows, batch.inputs, strict=True)
        for c, place in zip(row, places, strict=False)
    }
    slot = 2 * VIEWS.index(views)
    for query, first, second, logits in trained:
        sides = [vectors if view == "feat" else inputs for view in views.split("-")]
        documents = [sides[1][first], sides[1][second]] * (10 if many else 1)
        scores = model.match([sides[0][query]] * len(documents), documents, views)
        expected = torch.sigmoid(logits[slot : slot + 2, yes] - logits[slot : slot + 2, no])
        assert scores[:2] == pytest.approx(expected.numpy(), abs=1e-6)
        assert scores[-2:] == pytest.approx(expected.numpy(), abs=1e-6)


def test_margins_tell_documents_apart_in_bfloat16(make_model, triplets):
    """Their logits, rounded to bfloat16 first, tie."""
    model = make_model(dtype=torch.bfloat16)
    documents = [t[side] for t in triplets for side in ("positive", "negative")]
    margins = model.match_margins([triplets[0]["query"]] * len(documents), documents)
    assert len(set(margins.tolist())) == len(documents)
    assert np.array_equal(
        model.match([triplets[0]["query"]], documents[:1]), 1 / (1 + np.exp(-margins[:1]))
    )


def test_margins_are_exact_under_autocast(make_model, triplets):
    model = make_model(dtype=torch.float32)
    documents = [t["positive"] for t in triplets]
    with torch.autocast("cpu", torch.bfloat16):
        margins = torch.from_numpy(model.match_margins([triplets[0]["query"]] * 12, documents))
    assert not torch.equal(margins, margins.bfloat16().float())


def test_inputs_of_many_pairs_are_read_and_embedded_once(model, triplets, monkeypatch):
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
    queries = [t["query"] for t in triplets[:4] for _ in range(3)]
    documents = [t["positive"] for t in triplets[:3]] * 4
    model.match(queries, documents)
    assert len(reads) == 4 + 3
    model.match(queries, documents, "raw-feat")
    assert embedded == [3]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_margins_are_those_of_the_logits(make_model, triplets, lora):
    model = make_model(lora=lora)
    yes, no = model.backbone.answer_ids
    packed, _ = model.backbone.reader.pack_matching(
        [(model.backbone.reader.read("a dog"), [model.backbone.reader.read("a cat")])],
        [[("raw", 0, "raw")]],
    )
    logits = model.backbone.answer_logits(vars(packed))
    margins = model.backbone.answer_margins(vars(packed))
    torch.testing.assert_close(margins, logits[..., yes] - logits[..., no], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matching", ["packed", "reuse"])
def test_match_keeps_its_budget_and_halves_on_out_of_memory(
    model, triplets, monkeypatch, matching
):
    model.backbone.matching = matching
    every = [t[side] for side in ("positive", "negative") for t in triplets]
    queries = [triplets[0]["query"]] * 20 + [t["query"] for t in triplets for _ in range(2)]
    documents = [*every[:20], *every]
    expected = model.match_margins(queries, documents)
    sizes = []
    run = model.backbone.answer_margins

    def limited(features, *args):
        sizes.append(len(features["slots"]) * features["slots"].shape[1])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(features, *args)

    monkeypatch.setattr(model.backbone, "answer_margins", limited)
    assert model.match_margins(queries, documents) == pytest.approx(expected, abs=1e-6)
    assert max(sizes) > 2
    monkeypatch.setattr(model.backbone, "answer_margins", out_of_memory)
    with pytest.raises(RematchError, match="out of memory with a single query and document"):
        model.match_margins(queries[:3], documents[:3])


def out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


def test_a_forward_pass_of_match_holds_its_budget(model, triplets, monkeypatch):
    sizes = []
    run = model.backbone.run_packed

    def recorded(features, *args):
        sizes.append(features["input_ids"].numel())
        return run(features, *args)

    monkeypatch.setattr(model.backbone, "run_packed", recorded)
    queries = [t["query"] for t in triplets for _ in range(2)]
    documents = [t[side] for t in triplets for side in ("positive", "negative")]
    expected = model.match_margins(queries, documents, batch_tokens=100_000)
    assert len(sizes) == 1
    sizes.clear()
    assert model.match_margins(queries, documents, batch_tokens=500) == pytest.approx(
        expected, abs=1e-6
    )
    assert len(sizes) > 5
    assert max(sizes) <= 500


def test_padding_sees_itself(model, triplets):
    read = model.backbone.reader.read
    rows = [(read(t["query"]), [read(t["positive"])]) for t in triplets[:3]]
    packed, _ = model.backbone.reader.pack_matching(rows, [[("raw", 0, "raw")]] * 3)
    assert unified_mask(packed.owner, packed.visible).any(-1).all()


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
