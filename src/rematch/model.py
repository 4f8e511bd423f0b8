"""ReMatch: one MLLM that embeds (``encode_query``, ``encode_document``) and reranks (``score``).

A :class:`ReMatch` *is* a ``SentenceTransformer`` of two modules,
:class:`~rematch.backbone.module.Backbone` and :class:`~rematch.tokens.MultiTokenFusion`; what this
file adds is building one from a backbone, several vectors per input, and matching.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import Tensor

from rematch.backbone.checks import check_weights
from rematch.backbone.loading import is_checkpoint, loading, resize_vocabulary, resolve
from rematch.backbone.lora import inject, merge, train_in_float32
from rematch.backbone.memory import default_batch_tokens
from rematch.backbone.module import Backbone
from rematch.backbone.pictures import PictureFeatures, Pictures, feature_inputs
from rematch.errors import ModelError, RematchError
from rematch.matching import Matching, View
from rematch.prompts import TokenInit, document_token, query_token
from rematch.scoring import MatchingHead, embed_and_answer
from rematch.tokens import MultiTokenFusion, add_tokens_to_template, initial_rows

_CARD = """---
library_name: sentence-transformers
tags: [sentence-transformers, multimodal, retrieval, reranking, rematch]
---
# ReMatch retriever

Embeds and reranks pictures and texts; fine-tuned from `{base}` with {tokens} learnable tokens.

```python
from rematch import ReMatch

model = ReMatch("this directory")
queries, documents = model.encode_query(["a dog"]), model.encode_document(["dog.png"])
p_yes = model.match(["a dog"], ["dog.png"])
```

With `rematch-mm` installed, `SentenceTransformer("this directory", trust_remote_code=True)` gives
the same vectors.
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
        # sentence-transformers asks for trust_remote_code to load any other class
        self._module_classes = {
            f"{c.__module__}.{c.__qualname__}": c for c in (Backbone, MultiTokenFusion)
        }
        if model_name_or_path is None:
            super().__init__(**kwargs)
            return
        remedy = (
            "Give the output directory of a finished `rematch train`, a hub name, or rematch-tiny."
        )
        with loading(str(model_name_or_path), remedy):
            super().__init__(resolve(str(model_name_or_path)), **kwargs)
        if (
            len(self) != 2
            or not isinstance(self[0], Backbone)
            or not isinstance(self[1], MultiTokenFusion)
        ):
            raise ModelError(
                f"{model_name_or_path}: is a SentenceTransformer, but not a ReMatch model. Load "
                "it with SentenceTransformer."
            )
        check_weights(self.fusion, str(model_name_or_path))
        tokens, width = self.fusion.num_tokens, self.fusion.width
        learnable = len(self.backbone.reader.learnable_ids("query"))
        if (tokens, width) != (learnable, self.backbone.width):
            raise ModelError(
                f"{model_name_or_path}: its token fusion is for {tokens} learnable tokens of "
                f"width {width}, but its backbone has {learnable} of width "
                f"{self.backbone.width}. Copy the checkpoint again."
            )

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Refuse a directory without ``modules.json``.

        sentence-transformers would put mean pooling on it, which is not a ReMatch model.
        """
        if Path(model_name_or_path).is_dir():
            reason = "not a ReMatch checkpoint: modules.json is missing"
        else:
            reason = "no such directory, nor could a ReMatch checkpoint be found on the hub"
        raise ModelError(
            f"{model_name_or_path}: {reason}. Give the output directory of a finished `rematch "
            "train`, or build a model from a backbone with ReMatch.from_backbone."
        )

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        num_tokens: int = 16,
        *,
        token_init: TokenInit = "random",
        lora: LoraConfig | None = None,
        lora_vision: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        device: str | None = None,
    ) -> "ReMatch":
        """An untrained retriever from any Hugging Face image-text-to-text model.

        Args:
            name_or_path: Hub name or directory of the backbone; ``rematch-base`` is a packaged
                tiny one.
            num_tokens: K, learnable tokens per query and per document; 0 pools the last token.
            token_init: How the embeddings of the learnable tokens start: see
                :func:`~rematch.tokens.initial_rows`.
            lora: Train an adapter of this rank, alpha and dropout on the language model's linear
                layers (``target_modules`` and ``trainable_token_indices`` are filled in unless
                set); ``None`` leaves every weight trainable.
            lora_vision: Whether the vision tower gets an adapter too.
            model_kwargs: For ``from_pretrained``, such as ``{"dtype": torch.bfloat16}``.
            device: As for ``SentenceTransformer``.

        Raises:
            ModelError: If the backbone cannot be used, or ``token_init`` is unknown; the message
                says why.
        """
        backbone = Backbone(name_or_path, model_kwargs=model_kwargs)
        if query_token(0) in backbone.tokenizer.get_added_vocab() or is_checkpoint(name_or_path):
            raise ModelError(
                f"{name_or_path}: is already a ReMatch model. Load it with ReMatch(path)."
            )
        last = int(backbone.reader.read("a").ids[-1])
        names = [query_token(i) for i in range(num_tokens)] + [
            document_token(i) for i in range(num_tokens)
        ]
        backbone.tokenizer.add_tokens(names, special_tokens=True)
        ids = backbone.tokenizer.convert_tokens_to_ids(names)
        embedding = backbone.model.get_input_embeddings().weight
        words = embedding.detach()[: len(backbone.tokenizer) - len(names)]
        resize_vocabulary(backbone.model, len(backbone.tokenizer))
        with torch.no_grad():
            embedding = backbone.model.get_input_embeddings().weight
            embedding[ids] = initial_rows(words, last, len(ids), token_init).to(embedding)
        backbone.processor.chat_template = add_tokens_to_template(
            backbone.processor.chat_template, num_tokens
        )
        backbone.check_reading(name_or_path)  # again, with the learnable tokens
        scale = words.float().pow(2).mean().sqrt().item()
        fusion = MultiTokenFusion(num_tokens, backbone.width, scale)
        model = cls(modules=[backbone, fusion], device=device)
        if lora is not None:
            model.add_lora(lora, vision=lora_vision)
        return model

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that FSDP2 shards one by one.

        In ``reuse`` mode there are none: processes run different numbers of passes within a
        mini-batch, and could not gather layers together.
        """
        if self.backbone.matching == Matching.REUSE:
            return []
        names = self.backbone.model._no_split_modules or []
        return sorted({*names} & {type(module).__name__ for module in self.modules()})

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

    def add_lora(self, lora: LoraConfig, *, vision: bool = False) -> "ReMatch":
        """Add a LoRA adapter (in place), which is trained instead of the weights.

        Adapter and projector train in float32, whatever the dtype of the weights.

        Args:
            lora: As in :meth:`from_backbone`.
            vision: Whether the vision tower gets an adapter too.
        """
        reader = self.backbone.reader
        ids = [*reader.learnable_ids("query"), *reader.learnable_ids("document")]
        inject(self.backbone.model, lora, ids, vision)
        train_in_float32(self.fusion)
        return self

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
            with self.backbone.reader.report_original_rows(
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
        view: View | str = View.RAW_RAW,
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """P(yes) of pairs: how likely the model finds each document relevant to its query.

        Every pair is computed by itself. For several documents of one query, :meth:`score` and
        :meth:`score_lists` are faster: they compute the query once.

        Args:
            queries: N queries, as for :meth:`encode`; for the feat form also vectors, (N, D).
            documents: N documents, the i-th for the i-th query; for the feat form also vectors.
            view: Forms of query and document: ``raw`` reads the input again, ``feat`` reads only
                its embedding.
            batch_tokens: Tokens of a forward pass, padding included; by default 2,048 on a CPU and
                16,384 elsewhere.

        Returns:
            (N,) probabilities. Near 1 they round to the same number; :meth:`score` still tells
            such documents apart.

        Raises:
            RematchError: If there are not as many documents as queries, the view is unknown, or a
                single pair does not fit into memory.
        """
        if len(queries) != len(documents):
            raise RematchError(
                f"{len(queries)} queries and {len(documents)} documents: match takes pairs. Pass "
                "one document for each query, or use score for one query and many documents."
            )
        lists = self.score_lists(queries, [[d] for d in documents], view, batch_tokens)
        margins = np.concatenate([np.zeros(0, np.float32), *lists])
        return torch.from_numpy(margins).sigmoid().numpy()

    def score(
        self,
        query: Any,
        documents: Sequence[Any],
        view: View | str = View.RAW_RAW,
        batch_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """Margins of the documents of one query: the numbers to order them by.

        Arguments as for :meth:`match`, but one query, which is computed once for many documents.

        Returns:
            (N,) logits of Yes minus logits of No.
        """
        return self.score_lists([query], [documents], view, batch_tokens)[0]

    @torch.inference_mode()
    def score_lists(
        self,
        queries: Sequence[Any],
        document_lists: Sequence[Sequence[Any]],
        view: View | str = View.RAW_RAW,
        batch_tokens: int | None = None,
    ) -> list[NDArray[np.float32]]:
        """:meth:`score` for several queries, each with its own documents, in shared passes."""
        self.eval()
        budget = batch_tokens or default_batch_tokens(self.device)
        head = MatchingHead(self.backbone, self.fusion, self._embeddings, View(view), budget)
        return head.score_lists(queries, document_lists)

    def _embeddings(self, inputs: list[Any], task: str) -> Tensor:
        encode = self.encode_query if task == "query" else self.encode_document
        with self.truncate_embeddings(None):  # the projector reads whole vectors
            vectors = encode(inputs, convert_to_tensor=True, show_progress_bar=False)
            return torch.as_tensor(vectors)

    # ---- forward passes -------------------------------------------------------------------------

    def forward(self, features: dict[str, Any], *, method: str = "embed", **kwargs: Any) -> Any:
        """Run :meth:`embed`, as sentence-transformers does, or another of the methods below.

        DDP and FSDP2 wrap ``forward`` alone, so training calls those methods by name through it.
        """
        return getattr(self, method)(features, **kwargs)

    def embed(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed a padded batch: adds ``multi_vector`` and ``sentence_embedding``.

        Args:
            features: Inputs of the backbone. Pictures come as ``pixel_values``, or as
                ``picture_features`` or ``pictures`` of the sets in reading order. With
                ``picture_order``, ``pictures`` are distinct sets, and it numbers them in reading
                order. ``idle_pictures`` pass the vision tower and are used nowhere.
            kwargs: As for ``SentenceTransformer.forward``.
        """
        inputs, features_in_order, idle = self._with_picture_features(features)
        out = super().forward(inputs | feature_inputs(features_in_order), **kwargs)
        if idle is not None:
            out["multi_vector"] = out["multi_vector"] + idle
        return dict(out)

    def answer(self, features: dict[str, Any]) -> Tensor:
        """Answer packed questions.

        Args:
            features: The fields of :class:`~rematch.matching.Packed`; ``embeddings``, the E* of
                the placeholders in reading order, or ``None``; pictures as for :meth:`embed`.

        Returns:
            Logits at the answer slots, (B, A, V).
        """
        inputs, features_in_order, idle = self._with_picture_features(features)
        embeddings = inputs["embeddings"]
        projected = None if embeddings is None else self.fusion.projector(embeddings)
        inputs |= feature_inputs(features_in_order)
        logits = self.backbone.answer_logits(inputs, projected)
        return logits if idle is None else logits + idle

    def embed_and_answer(self, features: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Embed inputs and answer questions from their keys and values (docs/reuse.md).

        Args:
            features: The fields of :class:`~rematch.matching.Packed`; ``parts``, the padded
                batches to embed, with ``picture_sets``, how many picture sets each has; and
                ``placeholder_inputs``, the inputs that stand in the placeholders, or
                ``embeddings``; pictures as for :meth:`embed`.

        Returns:
            Multi-vectors (N, K, D), and logits at the answer slots (B, A, V).
        """
        inputs, features_in_order, idle = self._with_picture_features(features)
        answer = self.backbone.answer_logits
        multi_vector, logits = embed_and_answer(
            self.backbone, self.fusion, inputs, features_in_order, answer
        )
        return multi_vector, logits if idle is None else logits + idle

    def picture_features(self, pictures: Pictures) -> list[PictureFeatures]:
        """Run the vision tower alone."""
        return self.backbone.picture_features(pictures)

    def _with_picture_features(
        self, features: dict[str, Any]
    ) -> tuple[dict[str, Any], list[PictureFeatures], Tensor | None]:
        """Features without pictures, the features of the pictures, and a zero from idle ones."""
        inputs = dict(features)
        idle = None
        if "idle_pictures" in inputs:
            idle_features = self.picture_features(inputs.pop("idle_pictures"))
            sums = [unit.sum() for picture_set in idle_features for unit in picture_set.units]
            idle = 0.0 * torch.stack(sums).sum()
        if "pictures" in inputs:
            distinct = self.picture_features(inputs.pop("pictures"))
            order = inputs.pop("picture_order", range(len(distinct)))
            return inputs, [distinct[number] for number in order], idle
        return inputs, inputs.pop("picture_features", []), idle
