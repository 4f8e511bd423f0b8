"""Packing matching questions about readings, with a backbone's prompt and chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rematch.backbone.reading import Reader, Reading
from rematch.matching import (
    Form,
    Packed,
    Question,
    Segment,
    lay_out,
    lay_out_behind,
    lay_out_prefix,
    lay_out_reuse,
    pack,
)
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK


class QuestionPacker:
    """Packs matching questions into sequences (:mod:`rematch.matching`).

    It needs no forward pass, so data workers can do it. A query or document that no question shows
    as ``raw`` needs no reading, so ``None`` stands for it.

    Args:
        reader: Tokenizes inputs for the backbone.

    Attributes:
        joint: Whether documents attend to the query.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.joint = False

    def pack(
        self,
        rows: Sequence[tuple[Reading | None, Sequence[Reading | None]]],
        questions: Sequence[Sequence[Question]],
    ) -> tuple[Packed, list[Reading]]:
        """Pack questions whose raw inputs are read anew.

        Args:
            rows: The query and the documents of each sequence.
            questions: The questions of each sequence.

        Returns:
            The packed sequences, and the readings whose pictures they show, in reading order. A
            joint document occurs as often as questions show it raw.
        """
        text_segment = self.reader.text_segment
        prompt, query_head, document_head = self._prompt_and_heads()
        slot = text_segment(MATCH_QUESTION + self.reader.suffix)
        query_placeholder = text_segment(MATCH_QUERY, placeholder=True)
        document_placeholder = text_segment(MATCH_DOCUMENT, placeholder=True)
        readings_with_pictures: list[Reading] = []

        def segments_by_form(
            forms: set[Form], reading: Reading | None, head: Segment, placeholder: Segment
        ) -> Mapping[Form, Segment]:
            segments: dict[Form, Segment] = {}
            if "raw" in forms and reading is not None:
                segments["raw"] = self.reader.prepend(head, reading.content)
            if "feat" in forms:
                segments["feat"] = placeholder
            return segments

        sequences = []
        for (query, documents), row_questions in zip(rows, questions, strict=True):
            query_forms = {view.query for view, _ in row_questions}
            query_segments = segments_by_form(query_forms, query, query_head, query_placeholder)
            document_segments = []
            for number, document in enumerate(documents):
                forms = {view.document for view, j in row_questions if j == number}
                document_segments.append(
                    segments_by_form(forms, document, document_head, document_placeholder)
                )
            extent = query_placeholder.extent
            sequences.append(
                lay_out(
                    prompt,
                    query_segments,
                    document_segments,
                    slot,
                    row_questions,
                    extent,
                    self.joint,
                )
            )
            raw_readings = [query] if "raw" in query_forms else []
            if self.joint:
                raw_readings += [documents[j] for v, j in row_questions if v.document == "raw"]
            else:
                raw_readings += [
                    document
                    for document, segments in zip(documents, document_segments, strict=True)
                    if "raw" in segments
                ]
            readings_with_pictures += [r for r in raw_readings if r and r.vision]
        return self._packed(sequences), readings_with_pictures

    def pack_prefix(self, query: Reading | None) -> tuple[Packed, list[Segment]]:
        """Pack what all questions about a query share, to be computed once.

        Args:
            query: The query, or ``None`` to show it as feat.

        Returns:
            The packed sequence, and its segments, marked as computed.
        """
        prompt, query_head, document_head = self._prompt_and_heads()
        placeholder = self.reader.text_segment(MATCH_QUERY, placeholder=True)
        form: Form = "feat" if query is None else "raw"
        segment = placeholder if query is None else self.reader.prepend(query_head, query.content)
        segments = lay_out_prefix(
            prompt, segment, document_head, placeholder.extent, form, self.joint
        )
        packed = self._packed([segments])
        numbers = torch.arange(packed.input_ids.shape[1])
        parts = torch.split(numbers, [len(s.ids) for s in segments])
        return packed, [replace(s, computed=n) for s, n in zip(segments, parts, strict=True)]

    def pack_behind(
        self, prefix: Sequence[Segment], rows: Sequence[Sequence[Reading | None]]
    ) -> Packed:
        """Pack documents and their questions behind a prefix.

        Args:
            prefix: The segments that :meth:`pack_prefix` returns.
            rows: The documents of each sequence; ``None`` stands for a document shown as feat.
        """
        slot = self.reader.text_segment(MATCH_QUESTION + self.reader.suffix)
        placeholder = self.reader.text_segment("", placeholder=True)
        sequences = []
        for documents in rows:
            segments = [placeholder if d is None else d.content for d in documents]
            sequences.append(lay_out_behind(prefix, segments, slot))
        return self._packed(sequences)

    def prompts(self) -> dict[str, Tensor]:
        """Return the prompts that ``reuse`` mode computes once, with the embedding pass.

        Returns:
            Two rows padded to a batch
            (:meth:`~rematch.backbone.reading.Reader.embedding_batch`): the prompt with the head of
            a query, and the prompt with the head of a document.
        """
        prompt, *heads = self._prompt_and_heads()
        return self.reader.pad([self.reader.prepend(prompt, head) for head in heads])

    def pack_reuse(
        self,
        rows: Sequence[Sequence[Segment | None]],
        questions: Sequence[Sequence[Question]],
        prompts: Sequence[Tensor],
    ) -> Packed:
        """Pack questions that reuse the embedding pass (:func:`rematch.matching.lay_out_reuse`).

        Args:
            rows: The query and the documents of each sequence as they were embedded, marked as
                computed.
            questions: The questions of each sequence.
            prompts: For both rows of :meth:`prompts`, the numbers of their tokens among the
                computed ones.
        """
        prompt, *heads = self._prompt_and_heads()
        size = len(prompt.ids)
        prompt = replace(prompt, computed=prompts[0][:size])
        query_head, document_head = (
            replace(head, computed=numbers[size:])
            for head, numbers in zip(heads, prompts, strict=True)
        )
        placeholder = self.reader.text_segment("", placeholder=True)
        slot = self.reader.text_segment(self.reader.suffix)
        sequences = [
            lay_out_reuse(
                prompt, (query_head, document_head), embedded, placeholder, slot, row_questions
            )
            for embedded, row_questions in zip(rows, questions, strict=True)
        ]
        return self._packed(sequences)

    def overhead(self) -> tuple[int, int]:
        """Count the tokens of a packed sequence of one view, besides the contents.

        Returns:
            Tokens for the query, and tokens for each document with its question.
        """
        prompt, query_head, document_head = (len(s.ids) for s in self._prompt_and_heads())
        slot = len(self.reader.text_segment(MATCH_QUESTION + self.reader.suffix).ids)
        prompts = 1 if self.joint else 2
        return prompts * prompt + query_head, document_head + slot

    def _prompt_and_heads(self) -> list[Segment]:
        prompt = self.reader.text_segment(self.reader.prefix + MATCH_TASK, opening=True)
        heads = (MATCH_QUERY, MATCH_DOCUMENT)
        return [prompt, *(self.reader.text_segment(head) for head in heads)]

    def _packed(self, sequences: Sequence[Sequence[Segment]]) -> Packed:
        return pack(sequences, int(self.reader.tokenizer.pad_token_id or 0))
