"""ReMatch: one MLLM that embeds (``encode_query``, ``encode_document``) and judges (``match``).

A :class:`ReMatch` *is* a ``SentenceTransformer`` of two modules, :class:`~rematch.backbone.Backbone` and
:class:`~rematch.tokens.MultiTokenFusion`; what this file adds is building one from a backbone, several vectors per
input, and matching.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from rematch.backbone import Backbone, resize_vocabulary, resolve
from rematch.errors import ModelError, RematchError
from rematch.matching import VIEWS, Packed, Segment, lay_out, pack
from rematch.prompts import MATCH_DOCUMENT, MATCH_QUERY, MATCH_QUESTION, MATCH_TASK, document_token, query_token
from rematch.tokens import MultiTokenFusion, add_tokens_to_template

Views = Literal["raw-raw", "raw-feat", "feat-raw", "feat-feat"]
_DOCUMENTS_PER_PACK = 8
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
        if lora is not None:
            _add_lora(backbone, lora, ids, lora_vision)
            for parameter in backbone.parameters():
                if parameter.requires_grad:  # an adapter on a bfloat16 base: its small updates need float32
                    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
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
        model = self.backbone.model
        if not getattr(model, "_hf_peft_config_loaded", False):
            return self
        done: list[str] = []  # a replaced wrapper's own layers need no second look
        for name, layer in list(model.named_modules()):
            if any(name.startswith(prefix) for prefix in done):
                continue
            if isinstance(layer, AuxiliaryTrainingWrapper):
                merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            elif isinstance(layer, BaseTunerLayer):
                layer.merge()
                merged = layer.get_base_layer()
            else:
                continue
            model.set_submodule(name, merged)
            done.append(name + ".")
        model._hf_peft_config_loaded = False
        del model.peft_config
        model._weight_conversions = None  # it would write adapter names into the merged checkpoint
        model.tie_weights()
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
            flat = super().encode(inputs, *args, **kwargs)
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
            joins = groups and len(groups[-1]) < _DOCUMENTS_PER_PACK and queries[groups[-1][0]] is query
            groups[-1].append(i) if joins else groups.append([i])
        scores = np.empty(len(queries), np.float32)
        for start in range(0, len(groups), batch_size):
            batch = groups[start : start + batch_size]
            rows = [([queries[g[0]]], [documents[i] for i in g]) for g in batch]
            logits = self._match_batch(rows, query_view, document_view)
            for group, row in zip(batch, logits, strict=True):
                scores[group] = row[: len(group)]
        return scores

    def _match_batch(self, rows: list[tuple[list[Any], list[Any]]], query_view: str, document_view: str) -> Any:
        questions = [[(query_view, i, document_view) for i in range(len(documents))] for _, documents in rows]
        raw_rows = [
            ([q if query_view == "raw" else None for q in qs], [d if document_view == "raw" else None for d in ds])
            for qs, ds in rows
        ]
        packed, vision = self.pack_matching(raw_rows, questions)
        feats: list[Tensor] = []
        if "feat" in (query_view, document_view):
            as_queries = self._vectors([q for qs, _ in rows for q in qs], "query") if query_view == "feat" else None
            as_documents = (
                self._vectors([d for _, ds in rows for d in ds], "document") if document_view == "feat" else None
            )
            at = 0
            for i, (_, ds) in enumerate(rows):  # in reading order: the query, then its documents
                feats += [as_queries[i : i + 1]] if as_queries is not None else []
                feats += [as_documents[at : at + len(ds)]] if as_documents is not None else []
                at += len(ds)
        z = self.fusion.projector(torch.cat(feats)) if feats else None
        logits = self.answer_logits(packed, vision, z)
        yes, no = self.backbone.answer_ids
        return (logits[..., yes] - logits[..., no]).float().sigmoid().cpu().numpy()

    def _vectors(self, inputs: list[Any], task: str) -> Tensor:
        """Vectors as given, or the embeddings of inputs."""
        if all(isinstance(x, np.ndarray | Tensor) for x in inputs):
            return torch.stack([torch.as_tensor(x) for x in inputs]).to(self.device)
        encode = self.encode_query if task == "query" else self.encode_document
        return torch.as_tensor(encode(inputs, convert_to_tensor=True, show_progress_bar=False))

    def pack_matching(
        self, rows: Sequence[tuple[Sequence[Any], Sequence[Any]]], questions: Sequence[Sequence[tuple[str, int, str]]]
    ) -> tuple[Packed, dict[str, Tensor]]:
        """Tokenize and lay out matching questions; needs no forward pass, so data workers can do it.

        Args:
            rows: For each sequence ([query], documents); ``None`` for one that only has a ``feat`` view.
            questions: For each sequence the (query view, document index, document view) of every answer slot. Views
                are laid out if a question asks for them.

        Returns:
            The packed sequences, and the picture inputs of their raw views in order.
        """
        backbone = self.backbone
        heads, inputs = [], []
        for (query, documents), asked in zip(rows, questions, strict=True):
            raw_query = any(q == "raw" for q, _, _ in asked)
            raw_documents = {i for _, i, d in asked if d == "raw"}
            heads += [MATCH_QUERY] * raw_query + [MATCH_DOCUMENT] * len(raw_documents)
            inputs += list(query) * raw_query + [documents[i] for i in sorted(raw_documents)]
        raw, vision = backbone.segments(heads, inputs) if inputs else ([], {})
        remaining = iter(raw)
        prompt = backbone.text_segment(backbone.prefix + MATCH_TASK, opening=True)
        slot = backbone.text_segment(MATCH_QUESTION + backbone.suffix)
        query_feat = backbone.text_segment(MATCH_QUERY, placeholder=True)
        document_feat = backbone.text_segment(MATCH_DOCUMENT, placeholder=True)
        sequences = []
        for (_, documents), asked in zip(rows, questions, strict=True):
            queries = _views({q for q, _, _ in asked}, remaining, query_feat)
            views = [
                _views({d for _, i, d in asked if i == j}, remaining, document_feat) for j in range(len(documents))
            ]
            sequences.append(lay_out(prompt, queries, views, slot, asked))
        return pack(sequences, int(backbone.tokenizer.pad_token_id or 0)), vision

    def answer_logits(self, packed: Packed, vision: dict[str, Tensor], z: Tensor | None = None) -> Tensor:
        """:meth:`Backbone.answer_logits <rematch.backbone.Backbone.answer_logits>` on the model's device."""
        device = self.device
        packed = Packed(**{name: value.to(device) for name, value in vars(packed).items()})
        logits: Tensor = self.backbone.answer_logits(packed, {k: v.to(device) for k, v in vision.items()}, z)
        return logits


def _views(wanted: set[str], raw: Any, feat: Segment) -> dict[str, Segment]:
    views = {"raw": next(raw)} if "raw" in wanted else {}
    return views | ({"feat": feat} if "feat" in wanted else {})


def _add_lora(backbone: Backbone, lora: LoraConfig, token_ids: list[int], vision: bool) -> None:
    """Inject the adapter: linear layers of the language model, and the rows of the learnable tokens."""
    model = backbone.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if lora.target_modules is None:
        reached = [model.get_decoder()]
        if vision:
            reached += [m for m in model.modules() if "Vision" in type(m).__name__]
        lora.target_modules = sorted(
            {
                names[layer]
                for part in reached
                for layer in part.modules()
                if isinstance(layer, nn.Linear) and layer is not head
            }
        )
    if lora.trainable_token_indices is None and token_ids:
        lora.trainable_token_indices = {names[embedding].rpartition(".")[2]: token_ids}
    model.add_adapter(lora)
