"""Generative matching (MVQDM, paper.md "Idea" 2): many Yes/No questions in one forward pass under one mask.

A question is *prompt, query view, document view, answer slot*. Views are shared by questions, so all are laid out once,
as **segments** of one sequence, and a 4-D mask decides who sees whom:

1. the prompt (the chat template up to the content) sees itself;
2. a view (raw tokens, or one token that is replaced by ``Z* = MLP(E*)``) sees the prompt and itself;
3. an answer slot (the question and the template's start of the assistant's turn) sees the prompt, its own query view,
   its own document view and itself, and nothing else.

So the eight questions ``{q, Z_q} × {d+, Z_d+, d-, Z_d-}`` share one forward, and each equals, to rounding, a forward of
its own. Choices that the paper leaves open, and why:

- A document does not see the query. Then one document segment serves both query views.
- Positions: every document starts where the query ends, every slot where its own document ends, and ``Z_q`` takes the
  last positions of the raw query. Each question then has the positions of an ordinary, gapless sequence, in training
  and when a single pair is scored. The slot of d+ tells nothing because both documents have the *same* positions:
  exchanging them changes no score, which sequential positions give only on average.

Shapes: B sequences, T tokens, A answer slots, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VIEWS = ("raw-raw", "raw-feat", "feat-raw", "feat-feat")


@dataclass
class Segment:
    """A run of tokens that see each other causally.

    Attributes:
        ids: Token ids, (L,).
        positions: Positions relative to the segment's start, (P, L): P = 1, or 3 for M-RoPE backbones.
        sees: Indices of the earlier segments that it attends to.
        start: Position of its first token in the whole.
        is_slot: Its last token predicts the answer.
        is_feature: Its last token is a placeholder whose input embedding is replaced by ``Z*``.
    """

    ids: Tensor
    positions: Tensor
    sees: tuple[int, ...] = ()
    start: int = 0
    is_slot: bool = False
    is_feature: bool = False

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
        mask: True where a token (row) sees another (column), (B, 1, T, T).
        slots: Column of each answer slot's last token, (B, A); -1 where a sequence has fewer slots.
        features: True where the input embedding is to be replaced by a ``Z*``, (B, T).
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    slots: Tensor
    features: Tensor


def pack(sequences: Sequence[Sequence[Segment]], pad_id: int) -> Packed:
    """Lay out segments one after the other and build the mask.

    Args:
        sequences: For each sequence its segments, in order.
        pad_id: Token id of the padding.
    """
    batch = len(sequences)
    length = max(sum(len(s.ids) for s in segments) for segments in sequences)
    width = sequences[0][0].positions.shape[0]
    most_slots = max(sum(s.is_slot for s in segments) for segments in sequences)
    input_ids = torch.full((batch, length), pad_id)
    position_ids = torch.zeros(width, batch, length, dtype=torch.long)
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    slots = torch.full((batch, most_slots), -1)
    features = torch.zeros(batch, length, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for b, segments in enumerate(sequences):
        sizes = torch.tensor([len(s.ids) for s in segments])
        total = int(sizes.sum())
        input_ids[b, :total] = torch.cat([s.ids for s in segments])
        position_ids[:, b, :total] = torch.cat([s.positions + s.start for s in segments], dim=1)
        visible = torch.eye(len(segments), dtype=torch.bool)
        for i, segment in enumerate(segments):
            visible[i, list(segment.sees)] = True
        owner = torch.repeat_interleave(torch.arange(len(segments)), sizes)
        mask[b, 0, :total, :total] = visible[owner][:, owner] & causal[:total, :total]
        ends = sizes.cumsum(0) - 1
        is_slot = torch.tensor([s.is_slot for s in segments])
        slots[b, : int(is_slot.sum())] = ends[is_slot]
        features[b, ends[torch.tensor([s.is_feature for s in segments])]] = True
    mask |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no row of the softmax is empty
    return Packed(input_ids, position_ids, mask, slots, features)


def lay_out(
    prompt: Segment,
    queries: dict[str, Segment],
    documents: Sequence[dict[str, Segment]],
    slot: Segment,
    questions: Sequence[tuple[str, int, str]],
) -> list[Segment]:
    """The segments of one sequence, with positions and visibility as the module docstring says.

    Args:
        prompt: The chat template up to the content.
        queries: The query's views, ``"raw"`` and/or ``"feat"``.
        documents: Each document's views.
        slot: The question and the start of the assistant's turn.
        questions: (query view, index of the document, document view) of each answer slot, in order.
    """
    segments = [prompt]
    query_end = prompt.end + max(_extent(view) for view in queries.values())
    place: dict[tuple[str, int, str], int] = {}

    def add(key: tuple[str, int, str], view: Segment, start: int) -> None:
        place[key] = len(segments)
        segments.append(replace(view, sees=(0,), start=start))

    for name, view in queries.items():
        add(("query", 0, name), view, query_end - _extent(view))
    for i, views in enumerate(documents):
        for name, view in views.items():
            add(("document", i, name), view, query_end)
    for query_view, i, document_view in questions:
        query, document = place["query", 0, query_view], place["document", i, document_view]
        start = segments[document].end
        segments.append(replace(slot, sees=(0, query, document), start=start, is_slot=True))
    return segments


def _extent(view: Segment) -> int:
    return int(view.positions.max()) + 1


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention scores (a bool mask would be silently wrong under eager attention).

    >>> additive(torch.tensor([[True, False]]), torch.float16)
    tensor([[     0., -65504.]], dtype=torch.float16)
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
