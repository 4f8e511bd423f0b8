"""ReMatch: one MLLM that embeds (``encode_query``, ``encode_document``) and judges (``match``).

A :class:`ReMatch` *is* a ``SentenceTransformer`` of two modules,
:class:`~rematch.backbone.module.Backbone` and :class:`~rematch.tokens.MultiTokenFusion`; what this
file adds is building one from a backbone, several vectors per input, and matching.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import Tensor

from rematch.backbone.lora import inject, merge
from rematch.backbone.memory import default_batch_tokens
from rematch.backbone.module import Backbone, resize_vocabulary, resolve
from rematch.backbone.pictures import Pictures, Seen, as_inputs, see
from rematch.errors import ModelError, RematchError
from rematch.prompts import document_token, query_token
from rematch.scoring import Judge, embed_and_answer
from rematch.tokens import MultiTokenFusion, add_tokens_to_template

Views = Literal["raw-raw", "raw-feat", "feat-raw", "feat-feat"]
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

    ``ReMatch(path)`` loads a checkpoint: a directory, a hub name, or the packaged
    ``rematch-tiny``. Keyword arguments are those of ``SentenceTransformer``. A new one is made by
    :meth:`from_backbone`.

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
                f"{model_name_or_path}: cannot be loaded ({str(error).strip().splitlines()[0]}). "
                "Give the output directory of a finished `rematch train`, a hub name, or "
                "rematch-tiny."
            ) from error
        if (
            len(self) != 2
            or not isinstance(self[0], Backbone)
            or not isinstance(self[1], MultiTokenFusion)
        ):
            raise ModelError(
                f"{model_name_or_path}: a SentenceTransformer, but no ReMatch model. Load it with "
                "SentenceTransformer."
            )

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Without ``modules.json`` the library would put mean pooling on any backbone; that is no
        ReMatch model.
        """
        raise ModelError(
            f"{model_name_or_path}: no ReMatch checkpoint (modules.json is not there). Give the "
            "output directory of a finished `rematch train`, or build a model from a backbone "
            "with ReMatch.from_backbone."
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
            name_or_path: Hub name or directory of the backbone; ``rematch-base`` is a packaged
                tiny one.
            num_tokens: K, learnable tokens per query and per document; 0 pools the last token.
            lora: Train an adapter of this rank, alpha and dropout on the language model's linear
                layers (``target_modules`` and ``trainable_token_indices`` are filled in unless
                set); ``None`` leaves every weight trainable.
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
            raise ModelError(
                f"{name_or_path}: is a ReMatch model already. Load it with ReMatch(path)."
            )
        names = [query_token(i) for i in range(num_tokens)] + [
            document_token(i) for i in range(num_tokens)
        ]
        backbone.tokenizer.add_tokens(names, special_tokens=True)
        ids = backbone.tokenizer.convert_tokens_to_ids(names)
        embedding = backbone.model.get_input_embeddings().weight
        known = embedding.detach()[: len(backbone.tokenizer) - len(names)]
        resize_vocabulary(backbone.model, len(backbone.tokenizer))
        scale = known.float().pow(2).mean().sqrt().item()
        with torch.no_grad():
            embedding = backbone.model.get_input_embeddings().weight
            embedding[ids] = (torch.randn(len(ids), embedding.shape[1]) * scale).to(embedding)
        backbone.processor.chat_template = add_tokens_to_template(
            backbone.processor.chat_template, num_tokens
        )
        backbone.check_reading(name_or_path)  # again, with the learnable tokens
        if lora is not None:
            inject(backbone.model, lora, ids, lora_vision)
        fusion = MultiTokenFusion(num_tokens, backbone.width, scale)
        return cls(modules=[backbone, fusion], device=device)

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        (Path(path) / "README.md").write_text(
            _CARD.format(base=self.backbone.base_name, tokens=self.fusion.num_tokens)
        )

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
        """Fold a LoRA adapter into the weights (in place), so that the checkpoint needs no base
        and no peft.
        """
        merge(self.backbone.model)
        return self

    # ---- embedding ------------------------------------------------------------------------------

    def encode(self, inputs: Any, *args: Any, multi_vector: bool = False, **kwargs: Any) -> Any:
        """Embed inputs; as ``SentenceTransformer.encode``, for documents unless ``task="query"``.

        Args:
            inputs: One or a list of: text; a picture; a path of one; ``{"text": …, "image": …}``,
                where ``image`` may be several.
            multi_vector: Return the K unit-length token vectors instead of their fusion.

        Returns:
            float32 (N, D), unit length; (N, K, D) with ``multi_vector``. One input gives one
            vector, without N.

        Raises:
            RematchError: If an input is empty, or a picture cannot be read; the message names it.
        """
        if not multi_vector:
            with self.backbone.reader.own_numbers(
                [inputs] if self.is_singular_input(inputs) else inputs
            ):
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
            raise RematchError(
                f"multi_vector=True does not go with {named}: it returns whole unit vectors."
            )
        self.fusion.flat_output = True
        try:
            with self.truncate_embeddings(None):
                flat = self.encode(inputs, *args, **kwargs)
        finally:
            self.fusion.flat_output = False
        return flat.reshape(*flat.shape[:-1], -1, self.backbone.width)

    def is_singular_input(self, inputs: Any) -> bool:
        return isinstance(inputs, Path) or bool(super().is_singular_input(inputs))

    # ---- matching -------------------------------------------------------------------------------

    def match(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        views: Views = "raw-raw",
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """P(yes): how likely the MLLM finds each document relevant to its query.

        Args:
            queries: N queries, as for :meth:`encode_query`; for a ``feat`` view also their
                vectors, (N, D).
            documents: N documents, the i-th for the i-th query; for a ``feat`` view also their
                vectors.
            views: Query view and document view: ``raw`` reads the input again, ``feat`` only its
                embedding.
            batch_tokens: Tokens of a forward pass, padding included; by default 2,048 on a CPU,
                16,384 elsewhere. Neighbouring pairs of one query (the same object) share a
                sequence, in which the query is computed once.

        Returns:
            (N,) probabilities, Yes against No. Near 1 they are rounded to the same number where
            :meth:`match_margins` still tells documents apart.

        Raises:
            RematchError: If there are not as many documents as queries, ``views`` is unknown, or
                one pair alone does not fit into memory.
        """
        return (
            torch.from_numpy(self.match_margins(queries, documents, views, batch_tokens))
            .sigmoid()
            .numpy()
        )

    @torch.inference_mode()
    def match_margins(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        views: Views = "raw-raw",
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """Logit of Yes minus logit of No for each pair, the number to order documents by; else as
        :meth:`match`.
        """
        self.eval()
        judge = Judge(self.backbone, self.fusion, self._embeddings)
        return judge.margins(
            queries, documents, views, batch_tokens or default_batch_tokens(self.device)
        )

    def _embeddings(self, inputs: list[Any], task: str) -> Tensor:
        encode = self.encode_query if task == "query" else self.encode_document
        with self.truncate_embeddings(None):  # the projector reads whole vectors
            return torch.as_tensor(encode(inputs, convert_to_tensor=True, show_progress_bar=False))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """All that training and scoring run on the weights, told apart by what the features hold.

        - ``pictures``: the vision tower alone → ``seen``;
        - ``slots``: packed matching questions (:class:`~rematch.matching.Packed`), with
          ``vectors``, the E* of their placeholders in reading order → ``answer_logits`` (B, A, V);
        - ``slots`` and ``parts``: padded batches of inputs to embed, and questions that read them
          where they stand, with ``read``, which of them stand in the placeholders, or ``vectors``
          → ``multi_vector``, ``answer_logits``;
        - else embedding, as any SentenceTransformer → ``multi_vector``, ``sentence_embedding``.

        In place of ``pixel_values`` may come ``seen``, the features of the picture sets in reading
        order, or ``unseen``, the :class:`~rematch.backbone.pictures.Pictures` themselves; ``idle``
        ones stand nowhere.
        """
        if "pictures" in features:
            return {"seen": self._see(features["pictures"])}
        features = dict(features)
        idle = self._see(features.pop("idle")) if "idle" in features else []
        seen = (
            self._see(features.pop("unseen")) if "unseen" in features else features.pop("seen", [])
        )
        if "slots" not in features:
            out: dict[str, Any] = super().forward(features | as_inputs(seen), **kwargs)
        elif "parts" in features:
            out = embed_and_answer(
                self.backbone, self.fusion, features, seen, self.backbone.answer_logits
            )
            out["answer_logits"] = out.pop("answers")
        else:
            vectors = features["vectors"]
            z = self.fusion.projector(vectors) if vectors is not None else None
            out = {"answer_logits": self.backbone.answer_logits(features | as_inputs(seen), z)}
        for one in idle:  # pictures that stand nowhere
            name = "answer_logits" if "answer_logits" in out else "multi_vector"
            out[name] = out[name] + 0.0 * sum(unit.sum() for unit in one.units)
        return out

    def _see(self, pictures: Pictures) -> list[Seen]:
        return see(self.backbone.base, pictures.to(self.device, self.backbone.model.dtype))
