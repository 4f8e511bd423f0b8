"""ReMatch: one MLLM that embeds (``encode_query``, ``encode_document``) and judges (``match``).

A :class:`ReMatch` *is* a ``SentenceTransformer`` of two modules, :class:`~rematch.backbone.Backbone` and
:class:`~rematch.tokens.MultiTokenFusion`; what this file adds is building one from a backbone, several vectors per
input, and matching.
"""

from collections.abc import Sequence
from dataclasses import replace
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
        backbone.check_reading(name_or_path)  # again, with the learnable tokens
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
            with self.backbone.reader.own_numbers([inputs] if self.is_singular_input(inputs) else inputs):
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
            flat = self.encode(inputs, *args, **kwargs)
        finally:
            self.fusion.flat_output = False
        return flat.reshape(*flat.shape[:-1], -1, self.backbone.width)

    def is_singular_input(self, inputs: Any) -> bool:
        return isinstance(inputs, Path) or bool(super().is_singular_input(inputs))

    # ---- matching -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def match(
        self, queries: Sequence[Any], documents: Sequence[Any], views: Views = "raw-raw", batch_size: int = 16
    ) -> NDArray[np.float32]:
        """P(yes): how likely the MLLM finds each document relevant to its query.

        Args:
            queries: N queries, as for :meth:`encode_query`; for a ``feat`` view also their vectors, (N, D).
            documents: N documents, the i-th for the i-th query; for a ``feat`` view also their vectors.
            views: Query view and document view: ``raw`` reads the input again, ``feat`` only its embedding.
            batch_size: Sequences per forward. Neighbouring pairs of one query (the same object) share a sequence, in
                which the query is computed once.

        Returns:
            (N,) probabilities, Yes against No.

        Raises:
            RematchError: If there are not as many documents as queries, or ``views`` is unknown.
        """
        if views not in VIEWS:
            raise RematchError(f"views={views!r} is unknown; choose one of {', '.join(VIEWS)}.")
        if len(queries) != len(documents):
            raise RematchError(
                f"{len(queries)} queries and {len(documents)} documents: match wants pairs, one for one."
            )
        self.eval()
        query_view, document_view = views.split("-")
        groups: list[list[int]] = []
        for i, query in enumerate(queries):
            joins = groups and queries[groups[-1][0]] is query
            groups[-1].append(i) if joins else groups.append([i])
        scores = np.empty(len(queries), np.float32)
        packs: list[list[int]] = []
        for group in groups:
            if len(group) <= 2 * _DOCUMENTS_PER_PACK or self.backbone.matching == "reuse":
                packs += [group[i : i + _DOCUMENTS_PER_PACK] for i in range(0, len(group), _DOCUMENTS_PER_PACK)]
            else:
                found = self._match_many(queries[group[0]], [documents[i] for i in group], views, batch_size)
                scores[group] = found
        for start in range(0, len(packs), batch_size):
            batch = packs[start : start + batch_size]
            rows = [(queries[g[0]], [documents[i] for i in g]) for g in batch]
            logits = self._match_batch(rows, query_view, document_view)
            for group, row in zip(batch, logits, strict=True):
                scores[group] = row[: len(group)]
        return scores

    def _match_many(self, query: Any, documents: Sequence[Any], views: Views, batch_size: int) -> NDArray[np.float32]:
        """One query with many documents: prompt and query run once, and the documents read their keys and values."""
        reader = self.backbone.reader
        query_view, document_view = views.split("-")
        asked = reader.read(query) if query_view == "raw" else None
        packed, prefix = reader.pack_prefix(asked)
        z = self.fusion.projector(self._vectors([query], "query")) if asked is None else None
        kept = KeyValues()
        self.backbone.run_packed(self._packed(packed, [asked] if asked else []), z, kept)
        scores, size = [], _PER_ROW * batch_size
        for start in range(0, len(documents), size):
            some = documents[start : start + size]
            count = -(-len(some) // _PER_ROW)
            bounds = [len(some) * i // count for i in range(count + 1)]
            readings = [reader.read(d, i) if document_view == "raw" else None for i, d in enumerate(some)]
            rows = [readings[a:b] for a, b in pairwise(bounds)]
            packed = reader.pack_behind(prefix, rows)
            z = None if document_view == "raw" else self.fusion.projector(self._vectors(list(some), "document"))
            cache = KeyValues([(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in kept.new])
            logits = self.backbone.answer_logits(self._packed(packed, [r for r in readings if r]), z, cache)
            yes, no = self.backbone.answer_ids
            judged = (logits[..., yes] - logits[..., no]).float().sigmoid().cpu().numpy()
            scores += [row[: b - a] for row, (a, b) in zip(judged, pairwise(bounds), strict=True)]
        return np.concatenate(scores)

    def _packed(self, packed: Packed, readings: list[Reading]) -> dict[str, Any]:
        """Packed sequences as features, with the pictures of the readings that they show."""
        sets = [r for r in readings if r.vision]
        seen: list[Seen] = []
        if sets:
            seen = self._see(Pictures.collect([r.vision for r in sets], [r.visual_tokens for r in sets]))
        return {name: value.to(self.device) for name, value in vars(packed).items()} | as_inputs(seen)

    def _match_batch(self, rows: list[tuple[Any, list[Any]]], query_view: str, document_view: str) -> Any:
        reader = self.backbone.reader
        read: dict[tuple[int, str], Reading] = {}  # what stands in several pairs is read, and its pictures seen, once

        def reading(value: Any, view: str, task: str) -> Reading | None:
            if view == "feat":
                return None
            if (id(value), task) not in read:
                read[id(value), task] = reader.read(value, len(read))
            return read[id(value), task]

        questions = [[(query_view, i, document_view) for i in range(len(documents))] for _, documents in rows]
        readings = [
            (reading(q, query_view, "query"), [reading(d, document_view, "document") for d in ds]) for q, ds in rows
        ]
        sets = {id(r): r for r in read.values() if r.vision}
        seen: dict[int, Seen] = {}
        if sets:
            pictures = Pictures.collect([r.vision for r in sets.values()], [r.visual_tokens for r in sets.values()])
            seen = dict(zip(sets, self({"pictures": pictures})["seen"], strict=True))
        parts: list[dict[str, Any]] = []
        shown: list[Reading] = []
        if reuse := self.backbone.matching == "reuse":
            source: dict[int, Segment] = {}
            if read:
                batch = reader.embedding_batch(list(read.values()), [task for _, task in read])
                parts.append({name: value.to(self.device) for name, value in batch.items()})
                shown = [r for r in read.values() if r.vision]
            masks = [part["attention_mask"].cpu() for part in parts]
            *numbers, first, second = token_numbers([*masks, reader.matching_prompts()["attention_mask"]])
            for own, ((_, task), one) in zip(numbers, read.items(), strict=True):
                source[id(one)] = replace(reader.embedded(one, task), source=own)
            embedded = [[source[id(r)] if r else None for r in (q, *ds)] for q, ds in readings]
            packed = reader.pack_reuse(embedded, questions, (first, second))
        else:
            packed, shown = reader.pack_matching(readings, questions)
        by_query: Sequence[Tensor | None] = [None] * len(rows)
        by_document = by_query
        if query_view == "feat":
            by_query = torch.split(self._vectors([q for q, _ in rows], "query"), 1)
        if document_view == "feat":
            vectors = self._vectors([d for _, ds in rows for d in ds], "document")
            by_document = torch.split(vectors, [len(ds) for _, ds in rows])
        feats = [v for pair in zip(by_query, by_document, strict=True) for v in pair if v is not None]  # reading order
        features: dict[str, Any] = {name: value.to(self.device) for name, value in vars(packed).items()}
        features["vectors"] = torch.cat(feats) if feats else None
        features["seen"] = [seen[id(r)] for r in shown]
        logits = self(features | ({"parts": parts, "shown": [len(shown)] * len(parts)} if reuse else {}))[
            "answer_logits"
        ]
        yes, no = self.backbone.answer_ids
        return (logits[..., yes] - logits[..., no]).float().sigmoid().cpu().numpy()

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
            out = self._embed_and_answer(features, seen)
        else:
            vectors = features["vectors"]
            z = self.fusion.projector(vectors) if vectors is not None else None
            out = {"answer_logits": self.backbone.answer_logits(features | as_inputs(seen), z)}
        for one in idle:  # pictures that stand nowhere
            name = "answer_logits" if "answer_logits" in out else "multi_vector"
            out[name] = out[name] + 0.0 * sum(unit.sum() for unit in one.units)
        return out

    def _embed_and_answer(self, features: dict[str, Any], seen: list[Seen]) -> dict[str, Any]:
        """Embedding and matching in one, the answer slots reading the keys and values that embedding left behind."""
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
        logits = self.backbone.answer_logits(features, z, cache)
        if torch.is_grad_enabled():  # FSDP2 gathers a layer's weights for the gradient of its output, none otherwise
            logits = logits + 0.0 * last.sum()
        out: dict[str, Any] = {"answer_logits": logits}
        return out | ({"multi_vector": torch.cat(multi)} if multi else {})

    def _see(self, pictures: Pictures) -> list[Seen]:
        return see(self.backbone.base, pictures.to(self.device, self.backbone.model.dtype))
