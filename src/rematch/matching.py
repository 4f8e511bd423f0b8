"""Generative matching (MVQDM, paper.md "Idea" 2): many Yes/No questions in one forward pass.

A question consists of a prompt, a query, a document and an answer slot. Questions share queries
and documents, so each of these is laid out once, as a **segment** of one packed sequence, and a
4-D attention mask decides which segments attend to which:

1. a prompt (the chat template up to the content) attends to itself;
2. a query or document, as raw tokens or as one placeholder that is replaced by ``Z* = MLP(E*)``,
   attends to its prompt and to itself;
3. an answer slot (the question and the start of the assistant's turn) attends to the prompt of its
   query, to its query, to its document and to itself.

So the eight questions ``{q, Z_q} × {d+, Z_d+, d-, Z_d-}`` share one forward pass, and each has the
logits, up to rounding, of a forward pass of its own. The paper leaves two choices open:

- Whether a document attends to the query. **Isolated** documents do not, as above: one document
  segment serves both forms of the query, and the answer slot alone compares. **Joint** documents
  attend to the query and its prompt as well. A question is then an ordinary chat of prompt, query,
  document and answer slot, and each question has a document segment of its own.
- Positions. A document starts where its query ends; an answer slot starts where its document ends.
  A raw query and ``Z_q`` end at the same position, and a prompt stands right before each; isolated
  documents attend to the prompt of ``Z_q``. What else is in the sequence therefore only shifts a
  question's positions by a constant, which rotary embeddings do not notice: a question has the
  same score from vectors alone as beside the raw inputs of training. Both documents have the
  *same* positions, so the order of d+ and d- reveals nothing: exchanging them changes no score.

Shapes: B sequences, T tokens, S segments, A answer slots, P position dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rematch.errors import RematchError

Form = Literal["raw", "feat"]


class View(str, Enum):
    """The form of the query and the form of the document in a question.

    ``raw`` shows the input itself, ``feat`` only its projected embedding ``Z*``.

    Raises:
        RematchError: If there is no such view.

    >>> View("raw-feat").document
    'feat'
    """

    RAW_RAW = "raw-raw"
    RAW_FEAT = "raw-feat"
    FEAT_RAW = "feat-raw"
    FEAT_FEAT = "feat-feat"

    @property
    def query(self) -> Form:
        """The form of the query."""
        return "raw" if self in (View.RAW_RAW, View.RAW_FEAT) else "feat"

    @property
    def document(self) -> Form:
        """The form of the document."""
        return "raw" if self in (View.RAW_RAW, View.FEAT_RAW) else "feat"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> "View":
        raise RematchError(f"view {value!r} is unknown; choose one of {', '.join(cls)}.")


class Matching(str, Enum):
    """How a model answers questions, in training and afterwards.

    - ``unified``: raw inputs are read once more, in the packed sequence;
    - ``feat``: the same, but training asks about embeddings alone;
    - ``reuse``: answer slots attend to the keys and values of the embedding pass (docs/reuse.md).
    """

    UNIFIED = "unified"
    FEAT = "feat"
    REUSE = "reuse"

    def __str__(self) -> str:
        return self.value


class Question(NamedTuple):
    """One Yes/No decision: the forms that it shows, and which document of the sequence."""

    view: View
    document: int


@dataclass
class Segment:
    """A run of tokens that attend to each other causally.

    Attributes:
        ids: Token ids, (L,).
        positions: Positions relative to the segment's start, (P, L): P = 1, or 3 with M-RoPE.
        attends_to: Indices of the earlier segments that it attends to.
        start: Position of its first token in the sequence.
        is_slot: The answer is predicted at its last token.
        is_placeholder: The input embedding of its last token is replaced by ``Z*``.
        computed: If its keys and values exist already: the numbers of its tokens in the earlier
            pass, (L,). Such a segment is context and takes no part in the pass.
    """

    ids: Tensor
    positions: Tensor
    attends_to: tuple[int, ...] = ()
    start: int = 0
    is_slot: bool = False
    is_placeholder: bool = False
    computed: Tensor | None = None

    @property
    def extent(self) -> int:
        """How many positions it spans."""
        return int(self.positions.max()) + 1

    @property
    def end(self) -> int:
        """The first position after it."""
        return self.start + self.extent


@dataclass
class Packed:
    """A batch of packed sequences, padded on the right.

    Attributes:
        input_ids: (B, T).
        position_ids: (P, B, T).
        segments: Number of the segment of each token, context first, (B, C + T). Padding is a
            segment of its own.
        attends: True where a segment (row) attends to another (column), (B, S, S).
        slots: Column of the last token of each answer slot, (B, A); -1 in sequences with fewer.
        placeholders: True where the input embedding is replaced by a ``Z*``, (B, T).
        context: Numbers of the tokens whose keys and values were computed in an earlier pass and
            stand before the sequence, (B, C). C is 0 unless segments are reused.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    attends: Tensor
    slots: Tensor
    placeholders: Tensor
    context: Tensor


def pack(sequences: Sequence[Sequence[Segment]], pad_id: int) -> Packed:
    """Concatenate the segments of each sequence and build what the mask needs.

    Args:
        sequences: The segments of each sequence, in order.
        pad_id: Token id of the padding.
    """
    batch = len(sequences)
    fresh = [[s for s in sequence if s.computed is None] for sequence in sequences]
    reused = [[s for s in sequence if s.computed is not None] for sequence in sequences]
    length = max(sum(len(s.ids) for s in sequence) for sequence in fresh)
    context_length = max(sum(len(s.ids) for s in sequence) for sequence in reused)
    position_dimensions = fresh[0][0].positions.shape[0]
    slot_count = max(sum(s.is_slot for s in sequence) for sequence in fresh)
    padding = max(map(len, sequences))  # the number of the segment that padding belongs to
    input_ids = torch.full((batch, length), pad_id)
    position_ids = torch.zeros(position_dimensions, batch, length, dtype=torch.long)
    segments = torch.full((batch, context_length + length), padding)
    attends = torch.eye(padding + 1, dtype=torch.bool).repeat(batch, 1, 1)
    slots = torch.full((batch, slot_count), -1)
    placeholders = torch.zeros(batch, length, dtype=torch.bool)
    context = torch.zeros(batch, context_length, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        context_end = end = slot = 0
        for number, segment in enumerate(sequence):
            attends[b, number, list(segment.attends_to)] = True
            size = len(segment.ids)
            if segment.computed is not None:
                span = slice(context_end, context_end + size)
                segments[b, span], context[b, span] = number, segment.computed
                context_end += size
                continue
            span = slice(end, end + size)
            end += size
            segments[b, context_length:][span] = number
            input_ids[b, span] = segment.ids
            position_ids[:, b, span] = segment.positions + segment.start
            placeholders[b, end - 1] = segment.is_placeholder
            if segment.is_slot:
                slots[b, slot] = end - 1
                slot += 1
    return Packed(input_ids, position_ids, segments, attends, slots, placeholders, context)


def unified_mask(segments: Tensor, attends: Tensor, context: int = 0) -> Tensor:
    """True where a token (row) attends to another (column).

    It does if its segment attends to the other's, and the other token is not later.

    Args:
        segments: As in :class:`Packed`, (B, C + T).
        attends: As in :class:`Packed`, (B, S, S).
        context: C, the number of columns whose keys and values exist already.

    Returns:
        (B, 1, T, C + T).

    >>> unified_mask(torch.tensor([[0, 0, 1]]), torch.eye(2, dtype=torch.bool)[None]).int()[0, 0]
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    rows = torch.arange(len(segments), device=segments.device)[:, None, None]
    mask = attends[rows, segments[:, context:, None], segments[:, None, :]]
    return mask.tril(context)[:, None]


def block_mask(segments: Tensor, attends: Tensor, context: int = 0) -> BlockMask:
    """:func:`unified_mask` for FlexAttention, which skips blocks that are masked entirely."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attends[b, segments[b, context + q], segments[b, k]] & (k <= context + q)

    batch, columns = segments.shape
    return create_block_mask(
        visible, batch, None, columns - context, columns, device=segments.device
    )


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention scores.

    Under eager attention, a boolean mask would silently be wrong.

    >>> additive(torch.tensor([[True, False]]), torch.float16)
    tensor([[     0., -65504.]], dtype=torch.float16)
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def lay_out(
    prompt: Segment,
    query: Mapping[Form, Segment],
    documents: Sequence[Mapping[Form, Segment]],
    slot: Segment,
    questions: Sequence[Question],
    placeholder_extent: int,
    joint: bool = False,
) -> list[Segment]:
    """The segments of one sequence, with the positions and visibility of the module docstring.

    Args:
        prompt: The chat template up to the content.
        query: The query in each form that questions show.
        documents: Each document in each form that questions show.
        slot: The question and the start of the assistant's turn.
        questions: What each answer slot asks, in order.
        placeholder_extent: Positions that a query spans as ``feat``, even if it is only ``raw``.
        joint: Whether documents attend to the query.

    Returns:
        The query's forms with their prompts come first. Isolated documents follow in order, each
        with all its forms, and then the answer slots. Joint documents follow in the order of
        ``questions``, each with its answer slot behind it.
    """
    query_end = prompt.extent + max(placeholder_extent, *(s.extent for s in query.values()))
    segments: list[Segment] = []

    def add(segment: Segment, start: int, *attends_to: int) -> int:
        segments.append(replace(segment, attends_to=attends_to, start=start))
        return len(segments) - 1

    prompts: dict[Form, int] = {}
    if not joint:
        prompts["feat"] = add(prompt, query_end - placeholder_extent - prompt.extent)
    queries: dict[Form, tuple[int, int]] = {}  # form → the query's prompt and the query
    for form, segment in query.items():
        start = query_end - segment.extent
        if form not in prompts:
            prompts[form] = add(prompt, start - prompt.extent)
        queries[form] = prompts[form], add(segment, start, prompts[form])
    places: list[dict[Form, int]] = []
    if not joint:
        for forms in documents:
            places.append({f: add(s, query_end, prompts["feat"]) for f, s in forms.items()})
    for view, number in questions:
        if joint:
            segment = documents[number][view.document]
            document = add(segment, query_end, *queries[view.query])
        else:
            document = places[number][view.document]
        attends_to = *queries[view.query], document
        add(replace(slot, is_slot=True), segments[document].end, *attends_to)
    return segments


def lay_out_prefix(
    prompt: Segment,
    query: Segment,
    head: Segment,
    placeholder_extent: int,
    form: Form,
    joint: bool = False,
) -> list[Segment]:
    """What all questions about one query share: prompt, query, the documents' prompt, their head.

    Args:
        prompt: As for :func:`lay_out`.
        query: The query in its one form.
        head: The tokens before the content of a document ("Document:").
        placeholder_extent: As for :func:`lay_out`.
        form: The form of the query; ``Z_q`` shares the prompt of the documents.
        joint: Whether documents attend to the query; they then share its prompt in either form.
    """
    query = replace(query, attends_to=(0,), start=prompt.extent)
    segments = [prompt, query]
    attended = [0, 1] if joint else [0]
    if form == "raw" and not joint:
        segments.append(replace(prompt, start=query.end - placeholder_extent - prompt.extent))
        attended = [2]
    return [*segments, replace(head, attends_to=tuple(attended), start=query.end)]


def lay_out_behind(
    prefix: Sequence[Segment], documents: Sequence[Segment], slot: Segment
) -> list[Segment]:
    """Documents and their questions behind a prefix that was computed before.

    The scores are those of :func:`lay_out`.

    Args:
        prefix: The segments of :func:`lay_out_prefix`, with :attr:`Segment.computed`.
        documents: The documents, without head.
        slot: As for :func:`lay_out`.
    """
    head = len(prefix) - 1
    attends_to = (*prefix[head].attends_to, head)
    segments = list(prefix)
    segments += [replace(d, attends_to=attends_to, start=prefix[head].end) for d in documents]
    for number in range(len(prefix), len(segments)):
        attended = (0, 1, head, number)
        end = segments[number].end
        segments.append(replace(slot, attends_to=attended, start=end, is_slot=True))
    return segments


def lay_out_reuse(
    prompt: Segment,
    heads: tuple[Segment, Segment],
    embedded: Sequence[Segment | None],
    placeholder: Segment,
    slot: Segment,
    questions: Sequence[Question],
) -> list[Segment]:
    """The segments of one sequence that reuses the embedding pass (docs/reuse.md).

    A raw query or document stands in its own chat turn, learnable tokens included, at positions
    from 0; so does the prompt. An answer slot starts after the longest segment that it attends to.
    A question's positions do not depend on what else is in the sequence.

    Args:
        prompt: As for :func:`lay_out`, with :attr:`Segment.computed`.
        heads: "Query:" and "Document:" behind the prompt, with :attr:`Segment.computed`.
        embedded: The query and then the documents as they were embedded, with
            :attr:`Segment.computed`; ``None`` where no question shows the raw form.
        placeholder: The token that a vector replaces.
        slot: The end of a question.
        questions: As for :func:`lay_out`.
    """
    segments = [prompt, *(replace(head, attends_to=(0,), start=prompt.end) for head in heads)]
    attended: dict[tuple[int, Form], tuple[int, ...]] = {}  # (input, form) → segments of a slot
    for number, segment in enumerate(embedded):
        if segment is not None:
            attended[number, "raw"] = (len(segments),)
            segments.append(segment)
    shown = {(0, view.query) for view, _ in questions}
    shown |= {(number + 1, view.document) for view, number in questions}
    for number in range(len(embedded)):
        if (number, "feat") in shown:
            head = 1 if number == 0 else 2
            attended[number, "feat"] = (head, len(segments))
            start = segments[head].end
            segments.append(replace(placeholder, attends_to=(0, head), start=start))
    for view, number in questions:
        attends_to = (0, *attended[0, view.query], *attended[number + 1, view.document])
        start = max(segments[i].end for i in attends_to)
        segments.append(replace(slot, attends_to=attends_to, start=start, is_slot=True))
    return segments


def token_numbers(masks: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of each input's tokens, counted through several padded batches with the padding.

    Args:
        masks: Attention mask of each batch, (B, L).

    >>> token_numbers([torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1]])])
    [tensor([0, 1]), tensor([2]), tensor([4])]
    """
    numbers_of_inputs, start = [], 0
    for mask in masks:
        numbers = start + torch.arange(mask.numel()).view(mask.shape)
        numbers_of_inputs += [row[m] for row, m in zip(numbers, mask.bool(), strict=True)]
        start += mask.numel()
    return numbers_of_inputs
