"""The MLLM as the first module of a SentenceTransformer.

:class:`Backbone` differs from sentence-transformers' ``Transformer`` in three ways. Inputs may be
paths, pictures with transparency and several pictures at once, and errors name the row. Only the
base model runs: no LM head, hidden states after the final norm. And the same weights answer packed
matching questions (:mod:`rematch.matching`).

Shapes: B sequences, T tokens, A answer slots, V vocabulary, D width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, Cache, PreTrainedConfig, PreTrainedModel

from rematch.backbone import checks
from rematch.backbone.key_values import KeyValues
from rematch.backbone.loading import (
    PACKAGED,
    adapter_directory,
    base_of_adapter,
    load_model,
    load_model_with_adapter,
    loading,
    packaged_name,
    resolve,
)
from rematch.backbone.pictures import PictureFeatures, Pictures, picture_features
from rematch.backbone.questions import QuestionPacker
from rematch.backbone.reading import Reader, too_long_error
from rematch.backbone.turns import user_turn
from rematch.errors import ModelError
from rematch.matching import Matching, additive, block_mask, unified_mask

_GENERATION_PROMPT = {"chat_template": {"add_generation_prompt": True}}
_DOWNLOAD_KEYS = frozenset({"token", "cache_dir", "local_files_only", "revision"})
_HUB_KEYS = frozenset({"token", "cache_dir", "local_files_only", "trust_remote_code"})


class Backbone(Transformer):  # type: ignore[misc]  # sentence-transformers ships no types
    """An image-text-to-text model that embeds inputs and answers Yes/No questions.

    Args:
        model_name_or_path: A hub name, a directory, or the name of a packaged model.
        fingerprint: Fingerprint of the base that a saved adapter belongs to; checked on load.
        adapter: Whether the checkpoint is an adapter. An adapter whose weights are missing is then
            not mistaken for a whole model.
        answer_ids: Token ids of Yes and No; checked against the tokenizer on load.
        document_instructions: Whether documents had their instruction in training; evaluation
            follows it.
        matching: How the model was trained to answer questions; scoring follows it.
        joint: Whether documents attended to the query; scoring follows it.
        kwargs: Further arguments of sentence-transformers' ``Transformer``.

    Attributes:
        reader: Tokenizes inputs.
        questions: Packs matching questions.
        fingerprint: Fingerprint of the base.

    Raises:
        ModelError: If the model cannot be loaded; has no chat template, reads no pictures, or
            splits Yes or No into several tokens; reads other tokens in training than in
            ``encode``; is joint in ``reuse`` mode; or if the checkpoint lacks its adapter or
            belongs to another base.
    """

    config_keys = [
        *Transformer.config_keys,
        "fingerprint",
        "adapter",
        "answer_ids",
        "document_instructions",
        "matching",
        "joint",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        fingerprint: str | None = None,
        adapter: bool = False,
        answer_ids: list[int] | None = None,
        document_instructions: bool = True,
        matching: Matching | str = Matching.UNIFIED,
        joint: bool = False,
        **kwargs: Any,
    ) -> None:
        path = resolve(str(model_name_or_path))
        if adapter:
            options = kwargs.get("model_kwargs", {})
            path = adapter_directory(
                path, **{key: options[key] for key in _DOWNLOAD_KEYS if key in options}
            )
        self.adapter = adapter
        self.saved_fingerprint = fingerprint
        defaults = {"transformer_task": "any-to-any", "processing_kwargs": _GENERATION_PROMPT}
        remedy = (
            "Give a hub name, a directory that holds an image-text-to-text model, or one of "
            f"{', '.join(PACKAGED)}."
        )
        with loading(str(model_name_or_path), remedy):
            super().__init__(path, **(defaults | kwargs))
            checks.check_weights(self.model, str(model_name_or_path))
            self.module_output_name = "token_embeddings"
            checks.check_processor(self.processor, model_name_or_path)
            checks.check_attention(self.model, model_name_or_path)
            self.reader = Reader(self.processor, self.base)
            self.questions = QuestionPacker(self.reader)
            self.check_reading(model_name_or_path)
            self.document_instructions = document_instructions
            self.set_matching(matching, joint)
            self.answer_ids = checks.answer_token_ids(self.tokenizer)
        if answer_ids is not None and answer_ids != self.answer_ids:
            raise ModelError(
                f"{path}: saved with the answer tokens {answer_ids}, but its tokenizer now gives "
                f"{self.answer_ids}. The tokenizer files were changed; restore those that belong "
                "to the checkpoint."
            )

    def check_reading(self, name: str) -> None:
        """Check that training reads what ``encode`` reads, again after a change of the template.

        Args:
            name: Name of the backbone, for the error.

        Raises:
            ModelError: If token ids or the shapes of pictures differ.
        """
        preprocess = super().preprocess

        def encode(value: Any, task: str) -> dict[str, Tensor]:
            features: dict[str, Tensor] = preprocess(
                [user_turn(*self.reader.pictures_and_text(value, 0))], task=task
            )
            return features

        checks.check_reading(self.reader, encode, name)

    def set_matching(self, matching: Matching | str, joint: bool = False) -> None:
        """Choose how the model answers questions.

        Args:
            matching: The mode of matching.
            joint: Whether documents attend to the query.

        Raises:
            ModelError: If documents should attend to the query in ``reuse`` mode.
        """
        if joint and matching == Matching.REUSE:
            raise ModelError(
                "joint documents attend to the query, but reuse mode takes their keys and values "
                "from the embedding pass, which has no query. Choose joint=False, or matching "
                "unified or feat."
            )
        self._matching, self.questions.joint = Matching(matching), joint

    @property
    def matching(self) -> Matching:
        """The mode of matching."""
        return self._matching

    @property
    def joint(self) -> bool:
        """Whether documents attend to the query."""
        return self.questions.joint

    # ---- loading and saving ---------------------------------------------------------------------

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PreTrainedConfig, bool]:
        if not (Path(model_name_or_path) / "adapter_config.json").exists():
            config, is_adapter = super()._load_config(model_name_or_path, backend, config_kwargs)
            if not is_adapter:
                return config, False
        hub = {key: value for key, value in config_kwargs.items() if key in _HUB_KEYS}
        return AutoConfig.from_pretrained(base_of_adapter(model_name_or_path), **hub), True

    def _load_model(
        self,
        path: str,
        task: str,
        config: PreTrainedConfig,
        backend: str,
        is_adapter: bool,
        **kwargs: Any,
    ) -> PreTrainedModel:
        checks.check_size(config)
        if is_adapter:
            model, self.fingerprint = load_model_with_adapter(
                path, config, self.saved_fingerprint, **kwargs
            )
        else:
            model, self.fingerprint = load_model(path, config, **kwargs)
        return model

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.adapter = self.has_adapter
        super().save(output_path, *args, **kwargs)
        if self.adapter:
            settings_file = Path(output_path) / "adapter_config.json"
            settings = json.loads(settings_file.read_text())
            settings["base_model_name_or_path"] = self.base_name
            settings_file.write_text(json.dumps(settings, indent=2))
        size = self.model.get_input_embeddings().weight.shape[0]
        (Path(output_path) / "rematch.json").write_text(json.dumps({"vocabulary": size}) + "\n")

    @property
    def has_adapter(self) -> bool:
        """Whether the model has a LoRA adapter that is not merged."""
        return bool(getattr(self.model, "_hf_peft_config_loaded", False))

    @property
    def base_name(self) -> str:
        """Name or path of the base; a packaged base keeps its name, so that adapters can move."""
        return packaged_name(str(self.model.config._name_or_path))

    # ---- parts of the model ---------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """The model without its LM head."""
        base: nn.Module = self.model.base_model
        return base

    @property
    def width(self) -> int:
        """D, the width of hidden states and input embeddings."""
        return int(self.model.config.get_text_config().hidden_size)

    def _vision_parameters(self) -> list[nn.Parameter]:
        """The weights of the vision tower and of what joins it to the language model."""
        language = {id(p) for p in self.model.get_decoder().parameters()}
        language |= {id(p) for p in self.model.get_output_embeddings().parameters()}
        return [p for p in self.model.parameters() if id(p) not in language]

    def freeze_vision(self) -> None:
        """Freeze the vision tower and what joins it to the language model."""
        for parameter in self._vision_parameters():
            parameter.requires_grad_(False)

    @property
    def trains_vision(self) -> bool:
        """Whether any weight between a picture and the language model is trainable."""
        return any(p.requires_grad for p in self._vision_parameters())

    def picture_features(self, pictures: Pictures) -> list[PictureFeatures]:
        """Run the vision tower on picture sets and return the features of each set."""
        return picture_features(self.base, pictures.to(self.model.device, self.model.dtype))

    def feature_bytes(self, visual_tokens: int) -> int:
        """Return the bytes that the vision tower's features of ``visual_tokens`` tokens take."""
        vision = getattr(self.model.config, "vision_config", None)
        levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])
        return int(visual_tokens * levels * self.width * self.model.dtype.itemsize)

    # ---- embedding ------------------------------------------------------------------------------

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Write inputs as chat turns and tokenize them.

        Args:
            inputs: Inputs of any kind that :func:`~rematch.data.inputs.pictures_and_text` takes.
            prompt: Text put before the text of every input.
            kwargs: ``task`` (``"query"``, or ``"document"`` by default) and further arguments of
                ``Transformer.preprocess``.

        Returns:
            The processor's features: ``input_ids`` (B, T), ``attention_mask`` (B, T) and so on.

        Raises:
            RematchError: If an input cannot be used; the message names its row.
        """
        kwargs["task"] = kwargs.get("task") or "document"
        turns = [
            user_turn(*self.reader.pictures_and_text(value, row, prompt or ""))
            for row, value in enumerate(inputs)
        ]
        features: dict[str, Any] = super().preprocess(turns, **kwargs)
        self._check_learnable_tokens(features, kwargs["task"])
        return features

    def _check_learnable_tokens(self, features: dict[str, Any], task: str) -> None:
        """Raise an error if truncation cut off the learnable tokens at the end of an input."""
        learnable = self.reader.learnable_ids(task)
        if not learnable:
            return
        for row, attended in enumerate(features["attention_mask"].bool()):
            ids = features["input_ids"][row][attended]
            if ids[-len(learnable) :].tolist() != learnable:
                raise too_long_error(row, self.tokenizer.model_max_length)

    def _verify_left_padding(self, *args: Any) -> None:
        """Accept either padding side: the attention mask tells where the learnable tokens are."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``token_embeddings`` (B, T, D), the last hidden states after the final norm."""
        features["token_embeddings"] = self._run_base(features).last_hidden_state
        return features

    def _run_base(self, features: dict[str, Any], **kwargs: Any) -> Any:
        """Run the base model on those features that it takes."""
        parameters = signature(self.base.forward).parameters
        inputs = {name: value for name, value in features.items() if name in parameters}
        return self.base(**inputs, **kwargs)

    def embed_with_key_values(
        self, parts: Sequence[dict[str, Any]]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Run padded batches and also return the keys and values that attention computed.

        Args:
            parts: Features of each batch, as for :meth:`forward`.

        Returns:
            The last hidden states of each batch, (B, T, D). And for each layer the keys and the
            values of the tokens of all batches one after another, padding included, (sum of B · T,
            heads, head width) each.
        """
        states, caches = [], []
        for part in parts:
            cache = KeyValues()
            output = self._run_base(part, past_key_values=cache, use_cache=True)
            states.append(output.last_hidden_state)
            caches.append(cache.new)

        def concatenate(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors])

        layers = []
        for layer in zip(*caches, strict=True):
            keys, values = zip(*layer, strict=True)
            layers.append((concatenate(keys), concatenate(values)))
        return states, layers

    # ---- matching -------------------------------------------------------------------------------

    def answer_logits(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute next-token logits at every answer slot; the LM head runs only there.

        Args:
            features: The fields of :class:`~rematch.matching.Packed`, and the pictures as the base
                model takes them.
            embeddings: ``Z*`` of the placeholders in reading order, (number of placeholders, D).
            cache: Keys and values of the context, if there is any.

        Returns:
            (B, A, V); the rows of absent slots (-1) are meaningless.
        """
        states = self._answer_states(features, embeddings, cache)
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits

    def answer_margins(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute the margin at every answer slot, in float32 or better.

        Rounded to bfloat16, most margins of a candidate list would be equal.

        Args:
            features: The same as for :meth:`answer_logits`.
            embeddings: The same as for :meth:`answer_logits`.
            cache: The same as for :meth:`answer_logits`.

        Returns:
            Logit of Yes minus logit of No, (B, A).
        """
        states = self._answer_states(features, embeddings, cache)
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        head = self.model.get_output_embeddings()
        yes, no = head.weight[self.answer_ids].to(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            margins: Tensor = states @ (yes - no)
        if getattr(head, "bias", None) is not None:
            yes, no = head.bias[self.answer_ids].to(states.dtype)
            margins = margins + (yes - no)
        return margins

    def _answer_states(
        self, features: dict[str, Any], embeddings: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Last hidden states at the answer slots, (B, A, D)."""
        slots = features["slots"]
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        return self.run_packed(features, embeddings, cache)[rows, slots]

    def run_packed(
        self,
        features: dict[str, Any],
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run packed sequences; the arguments are those of :meth:`answer_logits`.

        Returns:
            Last hidden states, (B, T, D).
        """
        layout = features["segments"], features["attends"], features["context"].shape[1]
        attention = self.model.config.get_text_config()._attn_implementation
        if "flash" in attention:
            raise ModelError(
                f"matching needs a mask for every pair of tokens, which {attention} cannot take. "
                "Load the model with attn_implementation sdpa, eager or flex_attention."
            )
        if attention == "flex_attention":
            mask: Tensor | BlockMask = block_mask(*layout)
        else:
            mask = additive(unified_mask(*layout), self.model.dtype)
        positions = features["position_ids"]
        pictures = {name: value for name, value in features.items() if name.startswith("mm_")}
        with self._placeholders_replaced(features["placeholders"], embeddings):
            output = self.base(
                input_ids=features["input_ids"],
                attention_mask=mask,
                position_ids=positions[0] if len(positions) == 1 else positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **pictures,
            )
        states: Tensor = output.last_hidden_state
        return states

    @contextmanager
    def _placeholders_replaced(
        self, placeholders: Tensor, embeddings: Tensor | None
    ) -> Iterator[None]:
        """Replace the input embeddings at the placeholders, (B, T) bool, while the block runs."""
        if embeddings is None:
            yield
            return

        def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output.masked_scatter(placeholders[..., None], embeddings.to(output.dtype))

        handle = self.model.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
