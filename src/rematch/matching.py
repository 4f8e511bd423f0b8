"""Generative matching (MVQDM, paper.md "Idea" 2): many Yes/No questions in one forward pass under
one mask.

A question is *prompt, query view, document view, answer slot*. Views are shared by questions, so
all are laid out once, as **segments** of one sequence, and a 4-D mask decides who sees whom:

1. a prompt (the chat template up to the content) sees itself;
2. a view (raw tokens, or one token that is replaced by ``Z* = MLP(E*)``) sees its prompt and
   itself;
3. an answer slot (the question and the template's start of the assistant's turn) sees the prompt
   of its query view, its own query view, its own document view and itself, and nothing else.

So the eight questions ``{q, Z_q} × {d+, Z_d+, d-, Z_d-}`` share one forward, and each equals, to
rounding, a forward of its own. Choices that the paper leaves open, and why:

- A document does not see the query. Then one document segment serves both query views.
- Positions: a document starts where its query ends, a slot where its own document ends. A raw
  query and ``Z_q`` end at the same position, and each has a prompt right before it; documents see
  that of ``Z_q``. So nothing but a common shift depends on what else is in the sequence, and
  rotary positions do not show a shift: a question has the same score with vectors alone as beside
  the raw views of training. The slot of d+ tells nothing because both documents have the *same*
  positions: exchanging them changes no score, which sequential positions give only on average.

Shapes: B sequences, T tokens, A answer slots, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

VIEWS = ("raw-raw", "raw-feat", "feat-raw", "feat-feat")


@dataclass
class Segment:
    """A run of tokens that see each other causally.

    Attributes:
        ids: Token ids, (L,).
        positions: Positions relative to the segment's start, (P, L): P = 1, or 3 for M-RoPE
            backbones.
        sees: Indices of the earlier segments that it attends to.
        start: Position of its first token in the whole.
        is_slot: Its last token predicts the answer.
        is_feature: Its last token is a placeholder whose input embedding is replaced by ``Z*``.
        source: Of a segment whose keys and values are there already (:func:`lay_out_reuse`): the
            numbers of its tokens among those that were embedded, (L,).
    """

    ids: Tensor
    positions: Tensor
    sees: tuple[int, ...] = ()
    start: int = 0
    is_slot: bool = False
    is_feature: bool = False
    source: Tensor | None = None

    @property
    def end(self) -> int:
        """First position after the segment."""
        return self.start + int(self.positions.max()) + 1


@dataclass
class Packed:
    """A batch of packed sequences, padded on the right.

    Attributes:
        input_ids: (B, T).
        position_ids: (P, B, T).
        owner: Number of the segment that each token belongs to, (B, C + T); padding is a segment
            of its own.
        visible: True where a segment (row) sees another (column), (B, S, S).
        slots: Column of each answer slot's last token, (B, A); -1 where a sequence has fewer
            slots.
        features: True where the input embedding is to be replaced by a ``Z*``, (B, T).
        context: Numbers of the tokens whose keys and values stand before the sequence, (B, C); C =
            0 but for reuse.
    """

    input_ids: Tensor
    position_ids: Tensor
    owner: Tensor
    visible: Tensor
    slots: Tensor
    features: Tensor
    context: Tensor


def pack(sequences: Sequence[Sequence[Segment]], pad_id: int) -> Packed:
    """Lay out segments one after the other and build the mask.

    Args:
        sequences: For each sequence its segments, in order.
        pad_id: Token id of the padding.
    """
    batch = len(sequences)
    fresh = [[s for s in segments if s.source is None] for segments in sequences]
    reused = [[s for s in segments if s.source is not None] for segments in sequences]
    length = max(sum(len(s.ids) for s in segments) for segments in fresh)
    before = max(sum(len(s.ids) for s in segments) for segments in reused)
    width = fresh[0][0].positions.shape[0]
    most_slots = max(sum(s.is_slot for s in segments) for segments in fresh)
    most_segments = max(map(len, sequences))
    input_ids = torch.full((batch, length), pad_id)
    position_ids = torch.zeros(width, batch, length, dtype=torch.long)
    owner = torch.full((batch, before + length), most_segments)
    visible = torch.eye(most_segments + 1, dtype=torch.bool).repeat(batch, 1, 1)
    slots = torch.full((batch, most_slots), -1)
    features = torch.zeros(batch, length, dtype=torch.bool)
    context = torch.zeros(batch, before, dtype=torch.long)
    for b, segments in enumerate(sequences):
        place = {True: 0, False: before}  # columns of reused segments, and of fresh ones
        answers = 0
        for i, segment in enumerate(segments):
            known, size = segment.source is not None, len(segment.ids)
            start, end = place[known], place[known] + size
            place[known] = end
            owner[b, start:end] = i
            visible[b, i, list(segment.sees)] = True
            if segment.source is not None:
                context[b, start:end] = segment.source
                continue
            input_ids[b, start - before : end - before] = segment.ids
            position_ids[:, b, start - before : end - before] = segment.positions + segment.start
            if segment.is_slot:
                slots[b, answers] = end - before - 1
                answers += 1
            features[b, end - before - 1] = segment.is_feature
    return Packed(input_ids, position_ids, owner, visible, slots, features, context)


def unified_mask(owner: Tensor, visible: Tensor, before: int = 0) -> Tensor:
    """True where a token (row) sees another (column): its segment sees the other's, and the other
    is not later.

    Args:
        owner: (B, C + T), as in :class:`Packed`.
        visible: (B, S, S).
        before: C, the columns whose keys and values are there already.

    Returns:
        (B, 1, T, C + T).

    >>> unified_mask(torch.tensor([[0, 0, 1]]), torch.eye(2, dtype=torch.bool)[None]).int()[0, 0]
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    rows = torch.arange(len(owner), device=owner.device)[:, None, None]
    seen = visible[rows, owner[:, before:, None], owner[:, None, :]]
    return seen.tril(before)[:, None]


def block_mask(owner: Tensor, visible: Tensor, before: int = 0) -> BlockMask:
    """:func:`unified_mask` for FlexAttention, which does not compute blocks that nobody sees."""

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible[b, owner[b, before + q], owner[b, k]] & (k <= before + q)

    batch, columns = owner.shape
    return create_block_mask(sees, batch, None, columns - before, columns, device=owner.device)


def lay_out(
    prompt: Segment,
    queries: dict[str, Segment],
    documents: Sequence[dict[str, Segment]],
    slot: Segment,
    questions: Sequence[tuple[str, int, str]],
    gap: int,
) -> list[Segment]:
    """The segments of one sequence, with positions and visibility as the module docstring says.

    Args:
        prompt: The chat template up to the content.
        queries: The query's views, ``"raw"`` and/or ``"feat"``.
        documents: Each document's views.
        slot: The question and the start of the assistant's turn.
        questions: (query view, index of the document, document view) of each answer slot, in
            order.
        gap: Positions of a query's ``"feat"`` view, whether or not it is there.
    """
    query_end = prompt.end + max([gap, *map(_extent, queries.values())])
    segments = [replace(prompt, start=query_end - gap - prompt.end)]
    place: dict[tuple[str, int, str], int] = {}
    prompts = {"feat": 0}

    def add(segment: Segment, start: int, *sees: int) -> int:
        segments.append(replace(segment, sees=sees, start=start))
        return len(segments) - 1

    for name, view in queries.items():
        start = query_end - _extent(view)
        if name == "raw":
            prompts["raw"] = add(prompt, start - prompt.end)
        place["query", 0, name] = add(view, start, prompts[name])
    for i, views in enumerate(documents):
        for name, view in views.items():
            place["document", i, name] = add(view, query_end, 0)
    for query_view, i, document_view in questions:
        query, document = place["query", 0, query_view], place["document", i, document_view]
        add(
            replace(slot, is_slot=True),
            segments[document].end,
            prompts[query_view],
            query,
            document,
        )
    return segments


def lay_out_prefix(
    prompt: Segment, query: Segment, head: Segment, gap: int, is_raw: bool
) -> list[Segment]:
    """What all questions about one query have in common: prompt, query view, the documents'
    prompt, and their head.

    Args:
        prompt: As for :func:`lay_out`.
        query: The query's one view.
        head: The tokens before a document's content; :func:`lay_out` has them in each document's
            view.
        gap: As for :func:`lay_out`.
        is_raw: Whether the view is raw; ``Z_q`` shares the documents' prompt.
    """
    query = replace(query, sees=(0,), start=prompt.end)
    segments = [prompt, query]
    if is_raw:
        segments.append(replace(prompt, start=query.end - gap - prompt.end))
    return [*segments, replace(head, sees=(len(segments) - 1 if is_raw else 0,), start=query.end)]


def lay_out_behind(
    prefix: Sequence[Segment], documents: Sequence[Segment], slot: Segment
) -> list[Segment]:
    """Documents and their questions behind a prefix that was run before; scores are those of
    :func:`lay_out`.

    Args:
        prefix: Of :func:`lay_out_prefix`, with :attr:`Segment.source`.
        documents: Their views, without head.
        slot: As for :func:`lay_out`.
    """
    segments = list(prefix)
    head = len(prefix) - 1
    views = (*prefix[head].sees, head)
    segments += [replace(document, sees=views, start=prefix[head].end) for document in documents]
    for i in range(len(prefix), len(segments)):
        segments.append(replace(slot, sees=(0, 1, head, i), start=segments[i].end, is_slot=True))
    return segments


def lay_out_reuse(
    prompt: Segment,
    heads: tuple[Segment, Segment],
    embedded: Sequence[Segment | None],
    feat: Segment,
    slot: Segment,
    questions: Sequence[tuple[str, int, str]],
) -> list[Segment]:
    """The segments of one sequence whose raw views and prompt are read off the embedding pass
    (docs/reuse.md).

    A query or document stands in its own chat turn, learnable tokens included, at positions from
    0; so does the prompt. An answer slot starts after the longest of what it sees. Whatever else
    is in the sequence, a question's positions are those that it has alone.

    Args:
        prompt: As for :func:`lay_out`, with :attr:`Segment.source`.
        heads: "Query:" and "Document:" behind the prompt, for vectors, with their ``source``.
        embedded: The query and the documents, with their ``source``; ``None`` for one without a
            raw view.
        feat: The placeholder of a vector.
        slot: What a question is closed with.
        questions: As for :func:`lay_out`.
    """
    segments = [prompt, *(replace(head, sees=(0,), start=prompt.end) for head in heads)]
    sees: dict[tuple[int, str], tuple[int, ...]] = {}
    for number, one in enumerate(embedded):
        if one is not None:
            sees[number, "raw"] = (len(segments),)
            segments.append(one)
    asked = {(0, q) for q, _, _ in questions} | {(i + 1, d) for _, i, d in questions}
    for number in range(len(embedded)):
        if (number, "feat") in asked:
            head = 1 + min(number, 1)
            sees[number, "feat"] = (head, len(segments))
            segments.append(replace(feat, sees=(0, head), start=segments[head].end))
    for query_view, i, document_view in questions:
        seen = (0, *sees[0, query_view], *sees[i + 1, document_view])
        start = max(segments[j].end for j in seen)
        segments.append(replace(slot, sees=seen, start=start, is_slot=True))
    return segments


def token_numbers(masks: Sequence[Tensor]) -> list[Tensor]:
    """For each input of some padded batches the numbers of its tokens, counted through all of
    them, padding included.

    Args:
        masks: Attention mask of each batch, (B, L).

    >>> token_numbers([torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1]])])
    [tensor([0, 1]), tensor([2]), tensor([4])]
    """
    found, at = [], 0
    for mask in masks:
        numbers = at + torch.arange(mask.numel()).view(mask.shape)
        found += [row[attended] for row, attended in zip(numbers, mask.bool(), strict=True)]
        at += mask.numel()
    return found


def _extent(view: Segment) -> int:
    return int(view.positions.max()) + 1


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention scores (a bool mask would be silently wrong under
    eager attention).

    >>> additive(torch.tensor([[True, False]]), torch.float16)
    tensor([[     0., -65504.]], dtype=torch.float16)
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
