"""ReMatch: one MLLM that embeds (``encode_query``, ``encode_document``) and judges (``match``).

A :class:`ReMatch` *is* a ``SentenceTransformer`` of two modules, :class:`~rematch.backbone.Backbone` and
:class:`~rematch.tokens.MultiTokenFusion`; what this file adds is building one from a backbone, several vectors per
input, and matching.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import Tensor

from rematch.backbone import Backbone, resize_vocabulary, resolve
from rematch.cache import KeyValues
from rematch.errors import ModelError, RematchError
from rematch.lora import inject, merge
from rematch.matching import VIEWS, Packed, Segment, token_numbers
from rematch.memory import default_batch_tokens, is_out_of_memory
from rematch.pictures import Pictures, Seen, as_inputs, see
from rematch.prompts import document_token, query_token
from rematch.reading import Reading
from rematch.tokens import MultiTokenFusion, add_tokens_to_template, fuse

Views = Literal["raw-raw", "raw-feat", "feat-raw", "feat-feat"]
_DOCUMENTS_PER_PACK, _PER_ROW = 8, 4  # in a sequence with the query; behind a query that was run before
_CARD = """---
library_name: sentence-transformers
tags: [sentence-transformers, multimodal, retrieval, reranking, rematch]
---
# ReMatch retriever

Embeds and judges pictures and texts; fine-tuned from `{base}` with {tokens} learnable tokens.

```python
from rematch import ReMatch

model = ReMatch("this directory")
model.encode_query(["a dog"]), model.encode_document(["dog.png"]), model.match(["a dog"], ["dog.png"])
```

With `rematch-mm` installed, `SentenceTransformer("this directory", trust_remote_code=True)` gives the same vectors.
"""


@dataclass
class _Row:
    """A sequence to be: a query with a few documents, and the numbers of these pairs."""

    query: Any
    query_reading: Reading | None
    pairs: list[int]
    documents: list[Any]
    readings: list[Reading | None]
    tokens: int

    def add(self, pair: int, document: Any, reading: Reading | None, tokens: int) -> None:
        self.pairs.append(pair)
        self.documents.append(document)
        self.readings.append(reading)
        self.tokens += tokens

    def halves(self) -> list["_Row"]:
        half = _half(len(self.pairs))
        return [
            replace(self, pairs=self.pairs[part], documents=self.documents[part], readings=self.readings[part])
            for part in (slice(half), slice(half, None))
        ]


def _half(count: int) -> int:
    if count == 1:
        raise RematchError(
            "out of memory with a single query and document. Shorten them, use smaller pictures, or a machine with "
            "more memory."
        )
    return count // 2


def _batches(rows: Iterable[_Row], budget: int) -> Iterator[list[_Row]]:
    """Rows as they come, as many at a time as fit into a budget of tokens, padding included."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(member.tokens for member in [*batch, row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class ReMatch(SentenceTransformer):  # type: ignore[misc]  # sentence-transformers ships no types
    """An MLLM fine-tuned (or about to be) as retriever and reranker.

    ``ReMatch(path)`` loads a checkpoint: a directory, a hub name, or the packaged ``rematch-tiny``. Keyword arguments
    are those of ``SentenceTransformer``. A new one is made by :meth:`from_backbone`.

    Raises:
        ModelError: If there is no ReMatch checkpoint at ``path``, or it is incomplete.
    """

    def __init__(self, model_name_or_path: str | Path | None = None, **kwargs: Any) -> None:
        self._module_classes = {
            f"{c.__module__}.{c.__qualname__}": c for c in (Backbone, MultiTokenFusion)
        }  # our own classes need no trust_remote_code
        if model_name_or_path is None:
            super().__init__(**kwargs)
            return
        try:
            super().__init__(resolve(str(model_name_or_path)), **kwargs)
        except RematchError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{model_name_or_path}: cannot be loaded ({str(error).strip().splitlines()[0]}). Give the output "
                "directory of a finished `rematch train`, a hub name, or rematch-tiny."
            ) from error
        if len(self) != 2 or not isinstance(self[0], Backbone) or not isinstance(self[1], MultiTokenFusion):
            raise ModelError(
                f"{model_name_or_path}: a SentenceTransformer, but no ReMatch model. Load it with SentenceTransformer."
            )

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Without ``modules.json`` the library would put mean pooling on any backbone; that is no ReMatch model."""
        raise ModelError(
            f"{model_name_or_path}: no ReMatch checkpoint (modules.json is not there). Give the output directory of a "
            "finished `rematch train`, or build a model from a backbone with ReMatch.from_backbone."
        )

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        num_tokens: int = 16,
        *,
        lora: LoraConfig | None = None,
        lora_vision: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        device: str | None = None,
    ) -> "ReMatch":
        """A retriever-to-be from any Hugging Face image-text-to-text model.

        Args:
            name_or_path: Hub name or directory of the backbone; ``rematch-base`` is a packaged tiny one.
            num_tokens: K, learnable tokens per query and per document; 0 pools the last token.
            lora: Train an adapter of this rank, alpha and dropout on the language model's linear layers
                (``target_modules`` and ``trainable_token_indices`` are filled in unless set); ``None`` leaves every
                weight trainable.
            lora_vision: Let the adapter reach the vision tower too.
            model_kwargs: For ``from_pretrained``, such as ``{"dtype": torch.bfloat16}``.
            device: As for ``SentenceTransformer``.

        Raises:
            ModelError: If the backbone cannot be used; the message says why.
        """
        backbone = Backbone(name_or_path, model_kwargs=model_kwargs)
        if (
            query_token(0) in backbone.tokenizer.get_added_vocab()
            or (Path(resolve(name_or_path)) / "modules.json").exists()
        ):
            raise ModelError(f"{name_or_path}: is a ReMatch model already. Load it with ReMatch(path).")
        names = [query_token(i) for i in range(num_tokens)] + [document_token(i) for i in range(num_tokens)]
        backbone.tokenizer.add_tokens(names, special_tokens=True)
        ids = backbone.tokenizer.convert_tokens_to_ids(names)
        embedding = backbone.model.get_input_embeddings().weight
        known = embedding.detach()[: len(backbone.tokenizer) - len(names)]
        resize_vocabulary(backbone.model, len(backbone.tokenizer))
        scale = known.float().pow(2).mean().sqrt().item()
        with torch.no_grad():
            embedding = backbone.model.get_input_embeddings().weight
            embedding[ids] = (torch.randn(len(ids), embedding.shape[1]) * scale).to(embedding)
        backbone.processor.chat_template = add_tokens_to_template(backbone.processor.chat_template, num_tokens)
        if lora is not None:
            inject(backbone.model, lora, ids, lora_vision)
        fusion = MultiTokenFusion(num_tokens, backbone.width, scale)
        return cls(modules=[backbone, fusion], device=device)

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "README.md").write_text(_CARD.format(base=self.backbone.base_name, tokens=self.fusion.num_tokens))

    @property
    def backbone(self) -> Backbone:
        """The MLLM module."""
        module: Backbone = self[0]
        return module

    @property
    def fusion(self) -> MultiTokenFusion:
        """The module of learnable-token fusion and of the ``Z*`` projector."""
        module: MultiTokenFusion = self[1]
        return module

    def merge_lora(self) -> "ReMatch":
        """Fold a LoRA adapter into the weights (in place), so that the checkpoint needs no base and no peft."""
        merge(self.backbone.model)
        return self

    # ---- embedding ----------------------------------------------------------------------------------------------

    def encode(self, inputs: Any, *args: Any, multi_vector: bool = False, **kwargs: Any) -> Any:
        """Embed inputs; as ``SentenceTransformer.encode``, for documents unless ``task="query"``.

        Args:
            inputs: One or a list of: text; a picture; a path of one; ``{"text": …, "image": …}``, where ``image`` may
                be several.
            multi_vector: Return the K unit-length token vectors instead of their fusion.

        Returns:
            float32 (N, D), unit length; (N, K, D) with ``multi_vector``. One input gives one vector, without N.

        Raises:
            RematchError: If an input is empty, or a picture cannot be read; the message names it.
        """
        if not multi_vector:
            return super().encode(inputs, *args, **kwargs)
        usual = {
            "pool": None,
            "truncate_dim": None,
            "output_value": "sentence_embedding",
            "normalize_embeddings": False,
        }
        unfit = [name for name, value in usual.items() if kwargs.get(name, value) != value]
        if args or unfit:
            named = ", ".join(unfit) or "positional arguments"
            raise RematchError(f"multi_vector=True does not go with {named}: it returns whole unit vectors.")
        self.fusion.flat_output = True
        try:
            with self.truncate_embeddings(None):
                flat = super().encode(inputs, *args, **kwargs)
        finally:
            self.fusion.flat_output = False
        return flat.reshape(*flat.shape[:-1], -1, self.backbone.width)

    def is_singular_input(self, inputs: Any) -> bool:
        return isinstance(inputs, Path) or bool(super().is_singular_input(inputs))

    # ---- matching -----------------------------------------------------------------------------------------------

    def match(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        views: Views = "raw-raw",
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """P(yes): how likely the MLLM finds each document relevant to its query.

        Args:
            queries: N queries, as for :meth:`encode_query`; for a ``feat`` view also their vectors, (N, D).
            documents: N documents, the i-th for the i-th query; for a ``feat`` view also their vectors.
            views: Query view and document view: ``raw`` reads the input again, ``feat`` only its embedding.
            batch_tokens: Tokens of a forward pass, padding included; by default 2,048 on a CPU, 16,384 elsewhere.
                Neighbouring pairs of one query (the same object) share a sequence, in which the query is computed once.

        Returns:
            (N,) probabilities, Yes against No. Near 1 they are rounded to the same number where
            :meth:`match_margins` still tells documents apart.

        Raises:
            RematchError: If there are not as many documents as queries, ``views`` is unknown, or one pair alone does
                not fit into memory.
        """
        return torch.from_numpy(self.match_margins(queries, documents, views, batch_tokens)).sigmoid().numpy()

    @torch.inference_mode()
    def match_margins(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        views: Views = "raw-raw",
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """Logit of Yes minus logit of No for each pair, the number to order documents by; else as :meth:`match`."""
        if views not in VIEWS:
            raise RematchError(f"views={views!r} is unknown; choose one of {', '.join(VIEWS)}.")
        if len(queries) != len(documents):
            raise RematchError(
                f"{len(queries)} queries and {len(documents)} documents: match wants pairs, one for one."
            )
        self.eval()
        budget = batch_tokens or default_batch_tokens(self.device)
        groups: list[list[int]] = []
        for i, query in enumerate(queries):
            if groups and queries[groups[-1][0]] is query:
                groups[-1].append(i)
            else:
                groups.append([i])
        margins = np.empty(len(queries), np.float32)
        packed: list[list[int]] = []
        for group in groups:
            if len(group) <= 2 * _DOCUMENTS_PER_PACK or self.backbone.matching == "reuse":
                packed.append(group)
            else:
                margins[group] = self._match_many(queries[group[0]], [documents[i] for i in group], views, budget)
        rows = self._rows(queries, documents, packed, views, budget)
        for batch in _batches(rows, budget):
            for row, judged in zip(batch, self._match_rows(batch, views), strict=True):
                margins[row.pairs] = judged
        return margins

    def _rows(
        self, queries: Sequence[Any], documents: Sequence[Any], groups: list[list[int]], views: Views, budget: int
    ) -> Iterator["_Row"]:
        """Sequences of a query and a few of its documents, read one after the other."""
        reader, (query_view, document_view) = self.backbone.reader, views.split("-")
        for_query, for_document = reader.matching_overhead()
        for group in groups:
            query = queries[group[0]]
            query_reading = reader.read(query, group[0]) if query_view == "raw" else None
            row = None
            for i in group:
                reading = reader.read(documents[i], i) if document_view == "raw" else None
                tokens = for_document + (len(reading.ids) if reading else 1)
                if row is None or row.tokens + tokens > budget or len(row.pairs) == _DOCUMENTS_PER_PACK:
                    if row is not None:
                        yield row
                    first = for_query + (len(query_reading.ids) if query_reading else 1)
                    row = _Row(query, query_reading, [], [], [], first)
                row.add(i, documents[i], reading, tokens)
            if row is not None:
                yield row

    def _match_many(self, query: Any, documents: Sequence[Any], views: Views, budget: int) -> NDArray[np.float32]:
        """One query with many documents: prompt and query run once, and the documents read their keys and values."""
        reader = self.backbone.reader
        query_view, document_view = views.split("-")
        query_reading = reader.read(query) if query_view == "raw" else None
        packed, prefix = reader.pack_prefix(query_reading)
        z = self.fusion.projector(self._vectors([query], "query")) if query_reading is None else None
        computed = KeyValues()
        self.backbone.run_packed(self._packed(packed, [query_reading] if query_reading else []), z, computed)
        _, for_document = reader.matching_overhead()
        shared = for_document + packed.input_ids.shape[1] // _PER_ROW
        margins: list[NDArray[np.float32]] = []
        chunk: list[tuple[Any, Reading | None]] = []
        filled = 0
        for i, document in enumerate(documents):
            reading = reader.read(document, i) if document_view == "raw" else None
            tokens = shared + (len(reading.ids) if reading else 1)
            if chunk and filled + tokens > budget:
                margins.append(self._match_behind(prefix, computed, chunk))
                chunk, filled = [], 0
            chunk.append((document, reading))
            filled += tokens
        return np.concatenate([*margins, self._match_behind(prefix, computed, chunk)])

    def _match_behind(
        self, prefix: list[Segment], computed: KeyValues, chunk: list[tuple[Any, Reading | None]]
    ) -> NDArray[np.float32]:
        """Documents behind a prefix that was run before, half of them at a time if memory runs out."""
        count = -(-len(chunk) // _PER_ROW)
        bounds = [len(chunk) * i // count for i in range(count + 1)]
        readings = [reading for _, reading in chunk]
        try:
            packed = self.backbone.reader.pack_behind(prefix, [readings[a:b] for a, b in pairwise(bounds)])
            z = None
            if readings[0] is None:
                z = self.fusion.projector(self._vectors([document for document, _ in chunk], "document"))
            keys_values = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in computed.new]
            features = self._packed(packed, [reading for reading in readings if reading])
            judged = self.backbone.answer_margins(features, z, KeyValues(keys_values)).float().cpu().numpy()
            return np.concatenate([row[: b - a] for row, (a, b) in zip(judged, pairwise(bounds), strict=True)])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        half = _half(len(chunk))
        return np.concatenate(
            [self._match_behind(prefix, computed, chunk[:half]), self._match_behind(prefix, computed, chunk[half:])]
        )

    def _packed(self, packed: Packed, readings: list[Reading]) -> dict[str, Any]:
        """Packed sequences as features, with the pictures of the readings that they show."""
        pictures = [reading for reading in readings if reading.vision]
        seen: list[Seen] = []
        if pictures:
            seen = self._see(Pictures.collect([r.vision for r in pictures], [r.visual_tokens for r in pictures]))
        return {name: value.to(self.device) for name, value in vars(packed).items()} | as_inputs(seen)

    def _match_rows(self, rows: list["_Row"], views: Views) -> list[NDArray[np.float32]]:
        """Margins of each row's pairs, half of the rows at a time if memory runs out."""
        try:
            return self._match_batch(rows, *views.split("-"))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(rows) > 1:
            half = _half(len(rows))
            return self._match_rows(rows[:half], views) + self._match_rows(rows[half:], views)
        return [np.concatenate(self._match_rows(rows[0].halves(), views))]

    def _match_batch(self, rows: list["_Row"], query_view: str, document_view: str) -> list[NDArray[np.float32]]:
        reader = self.backbone.reader
        questions = [[(query_view, i, document_view) for i in range(len(row.pairs))] for row in rows]
        tasks: dict[int, tuple[Reading, str]] = {}  # an input in several rows is embedded, and its pictures seen, once
        for row in rows:
            for reading, task in [(row.query_reading, "query"), *((r, "document") for r in row.readings)]:
                if reading is not None:
                    tasks[id(reading)] = (reading, task)
        pictures = {key: reading for key, (reading, _) in tasks.items() if reading.vision}
        seen: dict[int, Seen] = {}
        if pictures:
            collected = Pictures.collect(
                [r.vision for r in pictures.values()], [r.visual_tokens for r in pictures.values()]
            )
            seen = dict(zip(pictures, self._see(collected), strict=True))
        vectors = []  # of the placeholders, in reading order
        for row in rows:
            if query_view == "feat":
                vectors.append(self._vectors([row.query], "query"))
            if document_view == "feat":
                vectors.append(self._vectors(row.documents, "document"))
        z_inputs = torch.cat(vectors) if vectors else None
        if self.backbone.matching == "reuse":
            judged = self._match_reusing(rows, questions, tasks, seen, z_inputs)
        else:
            packed, shown = reader.pack_matching([(row.query_reading, row.readings) for row in rows], questions)
            features = {name: value.to(self.device) for name, value in vars(packed).items()}
            z = self.fusion.projector(z_inputs) if z_inputs is not None else None
            judged = self.backbone.answer_margins(features | as_inputs([seen[id(r)] for r in shown]), z)
        answers = judged.float().cpu().numpy()
        return [row_answers[: len(row.pairs)] for row, row_answers in zip(rows, answers, strict=True)]

    def _match_reusing(
        self,
        rows: list["_Row"],
        questions: list[list[tuple[str, int, str]]],
        tasks: dict[int, tuple[Reading, str]],
        seen: dict[int, Seen],
        vectors: Tensor | None,
    ) -> Tensor:
        """Margins from the keys and values of the embedding pass, for models that were trained so."""
        reader = self.backbone.reader
        readings = [reading for reading, _ in tasks.values()]
        batches = [reader.embedding_batch(readings, [task for _, task in tasks.values()])] if readings else []
        masks = [batch["attention_mask"] for batch in batches]
        *numbers, first, second = token_numbers([*masks, reader.matching_prompts()["attention_mask"]])
        embedded: dict[int, Segment] = {}
        for tokens, (key, (reading, task)) in zip(numbers, tasks.items(), strict=True):
            embedded[key] = replace(reader.embedded(reading, task), source=tokens)
        segments = [[embedded[id(r)] if r else None for r in (row.query_reading, *row.readings)] for row in rows]
        packed = reader.pack_reuse(segments, questions, (first, second))
        shown = [seen[key] for key in tasks if key in seen]
        features: dict[str, Any] = {name: value.to(self.device) for name, value in vars(packed).items()}
        features["vectors"] = vectors
        features["parts"] = [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]
        features["shown"] = [len(shown)] * len(batches)
        return self._embed_and_answer(features, shown, self.backbone.answer_margins)["answers"]  # type: ignore[no-any-return]

    def _vectors(self, inputs: list[Any], task: str) -> Tensor:
        """Vectors as given, or the embeddings of inputs."""
        if all(isinstance(x, np.ndarray | Tensor) for x in inputs):
            return torch.stack([torch.as_tensor(x) for x in inputs]).to(self.device)
        encode = self.encode_query if task == "query" else self.encode_document
        return torch.as_tensor(encode(inputs, convert_to_tensor=True, show_progress_bar=False))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """All that training and scoring run on the weights, told apart by what the features hold.

        - ``pictures``: the vision tower alone → ``seen``;
        - ``slots``: packed matching questions (:class:`~rematch.matching.Packed`), with ``vectors``, the E* of their
          placeholders in reading order → ``answer_logits`` (B, A, V);
        - ``slots`` and ``parts``: padded batches of inputs to embed, and questions that read them where they stand,
          with ``read``, which of them stand in the placeholders, or ``vectors`` → ``multi_vector``, ``answer_logits``;
        - else embedding, as any SentenceTransformer → ``multi_vector``, ``sentence_embedding``.

        In place of ``pixel_values`` may come ``seen``, the features of the picture sets in reading order, or
        ``unseen``, the :class:`~rematch.pictures.Pictures` themselves; ``idle`` ones stand nowhere.
        """
        if "pictures" in features:
            return {"seen": self._see(features["pictures"])}
        features = dict(features)
        idle = self._see(features.pop("idle")) if "idle" in features else []
        seen = self._see(features.pop("unseen")) if "unseen" in features else features.pop("seen", [])
        if "slots" not in features:
            out: dict[str, Any] = super().forward(features | as_inputs(seen), **kwargs)
        elif "parts" in features:
            out = self._embed_and_answer(features, seen, self.backbone.answer_logits)
            out["answer_logits"] = out.pop("answers")
        else:
            vectors = features["vectors"]
            z = self.fusion.projector(vectors) if vectors is not None else None
            out = {"answer_logits": self.backbone.answer_logits(features | as_inputs(seen), z)}
        for one in idle:  # pictures that stand nowhere
            name = "answer_logits" if "answer_logits" in out else "multi_vector"
            out[name] = out[name] + 0.0 * sum(unit.sum() for unit in one.units)
        return out

    def _embed_and_answer(
        self, features: dict[str, Any], seen: list[Seen], answer: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """Embedding and matching in one, the answer slots reading the keys and values that embedding left behind.

        Args:
            features: As for :meth:`forward`.
            seen: Likewise.
            answer: Of the backbone: what is computed at the answer slots.

        Returns:
            ``answers``, and ``multi_vector`` if anything is embedded.
        """
        remaining = iter(seen)
        parts = [
            part | as_inputs([next(remaining) for _ in range(count)])
            for part, count in zip(features["parts"], features["shown"], strict=True)
        ]
        prompts = {name: value.to(self.device) for name, value in self.backbone.reader.matching_prompts().items()}
        (*states, last), layers = self.backbone.embed_keeping([*parts, prompts])
        multi = [
            self.fusion({"token_embeddings": state, "attention_mask": part["attention_mask"]})["multi_vector"]
            for state, part in zip(states, parts, strict=True)
        ]
        context = features["context"]

        def gathered(tokens: Tensor) -> Tensor:  # (tokens, heads, width) → (b, heads, C, width)
            chosen = tokens.index_select(0, context.flatten())
            return chosen.view(*context.shape, *tokens.shape[1:]).transpose(1, 2)

        cache = KeyValues([(gathered(keys), gathered(values)) for keys, values in layers])
        vectors = fuse(torch.cat(multi))[features["read"]] if "read" in features else features["vectors"]
        z = self.fusion.projector(vectors) if vectors is not None and len(vectors) else None
        answers = answer(features, z, cache)
        if torch.is_grad_enabled():  # FSDP2 gathers a layer's weights for the gradient of its output, none otherwise
            answers = answers + 0.0 * last.sum()
        out: dict[str, Any] = {"answers": answers}
        return out | ({"multi_vector": torch.cat(multi)} if multi else {})

    def _see(self, pictures: Pictures) -> list[Seen]:
        return see(self.backbone.base, pictures.to(self.device, self.backbone.model.dtype))
