"""Matching questions answered one by one, written out plainly: no segments, no packing."""

from contextlib import contextmanager

import torch

from rematch.backbone.pictures import Pictures
from rematch.matching import Question, View
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK
from rematch.tokens import fuse

MIXED = (0, 3, 6, 9)


def embed(model, inputs, task):
    return fuse(model(model.preprocess(inputs, task=task))["multi_vector"])


def one_question(model, query, document, query_z, document_z, view, shifted=False):
    """P(answer) logits of one question in a forward of its own, written out plainly: no segments,
    no packing. If the model is joint, it is an ordinary causal chat, without a mask.

    ``shifted`` puts it where it stands beside the raw query; but for rounding in float32 rotary
    tables it is the same.
    """
    backbone = model.backbone
    tokens = lambda text: backbone.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    raw_query = tokens(MATCH_QUERY) + backbone.reader.read(query).content.ids.tolist()
    raw_document = tokens(MATCH_DOCUMENT) + backbone.reader.read(document).content.ids.tolist()
    query_view, document_view = View(view).query, View(view).document
    placeholder = [backbone.tokenizer.eos_token_id]
    prompt = tokens(backbone.reader.prefix + MATCH_TASK)
    q = raw_query if query_view == "raw" else tokens(MATCH_QUERY) + placeholder
    d = raw_document if document_view == "raw" else tokens(MATCH_DOCUMENT) + placeholder
    slot = tokens(MATCH_QUESTION + backbone.reader.suffix)
    n = len(prompt)
    if backbone.joint:
        ids, mask = torch.tensor([prompt + q + d + slot]), None
        end_q = n + len(q)
        position = list(range(ids.shape[1]))
    else:
        # a document sees a prompt right before where Z_q stands or would stand, a raw query one
        # of its own
        feat_query = tokens(MATCH_QUERY) + placeholder
        ids = torch.tensor([prompt + prompt + q + d + slot])
        end_q = 2 * n + len(q)
        before_document = len(q) - len(feat_query)
        position = [
            *range(before_document, before_document + n),
            *range(n),
            *range(n, n + len(q) + len(d) + len(slot)),
        ]
        mask = isolated_mask([n, n, len(q), len(d), len(slot)])
    if shifted:
        position = [place + len(raw_query) - len(q) for place in position]
    embeds = backbone.model.get_input_embeddings()(ids)[0]
    rows = list(embeds)
    if query_view == "feat":
        rows[end_q - 1] = query_z
    if document_view == "feat":
        rows[end_q + len(d) - 1] = document_z
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


def isolated_mask(lengths):
    """The mask of the documents' prompt, the query's prompt, query, document and slot."""
    parts = [part for part, length in enumerate(lengths) for _ in range(length)]
    sees = {0: {0}, 1: {1}, 2: {1, 2}, 3: {0, 3}, 4: {1, 2, 3, 4}}
    size = len(parts)
    mask = torch.full((1, 1, size, size), torch.finfo(torch.float64).min, dtype=torch.float64)
    for row in range(size):
        for column in range(row + 1):
            if parts[column] in sees[parts[row]]:
                mask[0, 0, row, column] = 0.0
    return mask


def answer(model, rows, questions, z=None):
    """Logits of questions about inputs, in one packed forward."""
    read = model.backbone.reader.read
    packed, shown = model.backbone.questions.pack(
        [(read(q), [read(d) for d in ds]) for q, ds in rows], questions
    )
    features = vars(packed) | {"embeddings": z}
    if shown:
        features["pictures"] = Pictures.collect(
            [r.vision for r in shown], [r.visual_tokens for r in shown]
        )
    with nothing_projected(model):
        return model.answer(features)


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
    questions = [Question(view, i) for view in View for i in (0, 1)]
    sequences = [(r["query"], [r["positive"], r["negative"]]) for r in rows]
    shown = [0, 1]
    if model.backbone.joint:
        shown = [i for view, i in questions if view.document == "feat"]
    z = torch.cat([z_query[:, None], z_documents[:, shown]], 1).flatten(0, 1)
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
                        view,
                        shifted=True,
                    )
                    for view, i in questions
                ]
            )
            for b, r in enumerate(rows)
        ]
    )
    return together, separate
